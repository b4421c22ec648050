"""What the callback costs: an epoch of it against one of the shortest hand-written loop of torch.ao, ``python -m benchmarks.overhead``.

    python -m benchmarks.overhead --net torchvision.models:mobilenet_v2 --size 64 --batches 8

Both train the same network on the same batches in one process and take turns, epoch by epoch; the first epoch of each is left out.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import QAT, QuantizationCallback, When
from qat_lightning.benchmark.worker import load_net
from qat_lightning.deprecation import quiet

LEARNING_RATE = 1e-3
PHASES: dict[str, When | None] = {"observers and BatchNorm learn": None, "both frozen": When(fraction=0.0)}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Module(LightningModule):
    """A classifier as short as the loop it is compared with."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss; the ranges are calibrated with this step."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


class HandWritten:
    """The loop of PyTorch's tutorial on FX graph mode.

    Args:
        net: in float; a copy is prepared.
        batches: what it trains on.
        frozen: no observers, statistics of BatchNorm fixed.
    """

    def __init__(self, net: nn.Module, batches: DataLoader[Any], frozen: bool) -> None:
        from torch.ao import quantization as ao
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        self.batches = batches
        images = next(iter(batches))[0]
        with quiet():
            self.net = prepare_qat_fx(copy.deepcopy(net).train(), ao.get_default_qat_qconfig_mapping("x86"), (images,))
        self.net(images)  # ranges, before they freeze
        if frozen:
            self.net.apply(ao.disable_observer).apply(torch.nn.intrinsic.qat.freeze_bn_stats)
        self.optimizer = torch.optim.SGD(self.net.parameters(), LEARNING_RATE)

    def train_epoch(self) -> None:
        """Train for an epoch."""
        for images, labels in self.batches:
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(images), labels).backward()
            self.optimizer.step()


class Turns(Callback):
    """Times an epoch of the Trainer, then one of the hand-written loop."""

    def __init__(self, by_hand: HandWritten) -> None:
        self.by_hand, self.ours, self.theirs = by_hand, list[float](), list[float]()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        """Stop it, and let the other loop train."""
        middle = time.perf_counter()
        self.by_hand.train_epoch()
        self.ours.append(middle - self.start)
        self.theirs.append(time.perf_counter() - middle)


def measure(net: nn.Module, batches: DataLoader[Any], epochs: int, freeze: When | None) -> tuple[float, float]:
    """Return the median seconds of an epoch with the callback, and of one by hand."""
    turns = Turns(HandWritten(net, batches, frozen=freeze is not None))
    callbacks = [QuantizationCallback(QAT(freeze_observers=freeze, freeze_bn=freeze), parity="off"), turns]
    trainer = Trainer(max_epochs=epochs + 1, accelerator="cpu", callbacks=callbacks, limit_val_batches=0, **QUIET)
    trainer.fit(Module(copy.deepcopy(net)), batches, batches)
    return statistics.median(turns.ours[1:]), statistics.median(turns.theirs[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="torchvision.models:resnet18", help="MODULE:FUNCTION")
    parser.add_argument("--size", type=int, default=64, help="of the images")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=8, help="an epoch")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    seed_everything(0, verbose=False)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    net = load_net(chosen.net).train()
    images = torch.randn(chosen.batch * chosen.batches, 3, chosen.size, chosen.size)
    batches = DataLoader(TensorDataset(images, torch.arange(len(images)) % 2), chosen.batch)
    console, rows = Console(stderr=True), {}
    for phase, freeze in PHASES.items():
        with console.status(f"{phase}: {chosen.epochs} epochs of each"):
            rows[phase] = measure(net, batches, chosen.epochs, freeze)
    print("| epoch | callback (s) | by hand (s) | ratio |\n|---|---|---|---|")
    for phase, (ours, theirs) in rows.items():
        print(f"| {phase} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")
    if chosen.json:
        chosen.json.write_text(
            json.dumps({phase: {"callback": ours, "by hand": theirs} for phase, (ours, theirs) in rows.items()}, indent=2)
        )


if __name__ == "__main__":
    main()
