"""What test_distributed has two processes do: ``torchrun ... -m tests.two_processes FOLDER``. Each saves what it found, by its rank."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

import qat_lightning.conversion
from qat_lightning import QAT, QuantizationCallback, StaticPTQ, When
from qat_lightning.errors import QuantizationError
from qat_lightning.observers import fake_quants
from tests.nets import QUIET, Disturb, Images, ModuleNet, Plain, fit

LOUDER = 100  # how many times the data of rank 1 are larger
STEPS = 3
FLOWS = ("fx", "eager", "pt2e")
TWO_BATCHES = {"accumulate_grad_batches": 2}
OBSERVERS = ("histogram", "minmax", "moving_average", "entropy")
LABELS = torch.arange(8) % 4
GENERATOR = torch.Generator().manual_seed(5)
PARTS = [[torch.randn(8, 1, 8, 8, generator=GENERATOR) * scale for _ in range(STEPS + 1)] for scale in (1, LOUDER)]
CALIBRATION = [(PARTS[step % 2][step // 2], LABELS) for step in range(5)]
FRACTIONS = {"freeze_observers": When(fraction=0.75), "freeze_bn": When(fraction=0.5)}


class Loud(LightningDataModule):
    """Batches of which each process has a part, those of rank 1 larger; a single process has both parts of each."""

    def train_dataloader(self):
        parts = PARTS if self.trainer.world_size == 1 else [PARTS[self.trainer.global_rank]]
        batches = [(torch.cat(images), LABELS.repeat(len(parts))) for images in zip(*parts, strict=True)]
        return DataLoader(batches, batch_size=None)

    val_dataloader = train_dataloader


def without_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))


def with_batch_norm():
    seed_everything(3)
    return Plain(ModuleNet())


def quant_state(module):
    """Return the tensors of fake-quant and observers by name."""
    return {
        f"{name}.{key}": value.clone()
        for name, quant in module.named_modules()
        if hasattr(quant, "enable_observer")
        for key, value in quant.state_dict().items()
    }


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- ranges ------------------------------------------------------------------------------------------------------------------


class Ranges(Callback):
    """Keeps the state of fake-quant after each batch."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(quant_state(pl_module))


def ranges(flow, start=None, **trainer):
    """Train without learning, and return the state of fake-quant after each batch."""
    watch, recipe = Ranges(), QAT(flow=flow, start=start, freeze_bn=None, freeze_observers=None, bias_correction=False)
    options = {"max_epochs": 1, "limit_train_batches": STEPS, "use_distributed_sampler": False, **trainer}
    fit(QuantizationCallback(recipe), Plain(without_batch_norm(), lr=0.0), Loud(), [watch], **options)
    return watch.after


def own_biases(module):
    return [value.detach().clone() for name, value in module.named_parameters() if name.endswith("bias")]


def biases(flow, **trainer):
    """Train without learning, and return the biases of the layers before and after."""
    module = Plain(without_batch_norm(), lr=0.0)
    before = own_biases(module)
    recipe = QAT(flow=flow, activation_bits=7, per_channel=False)
    fit(QuantizationCallback(recipe), module, Loud(), max_epochs=1, use_distributed_sampler=False, **trainer)
    return before, own_biases(module)


# --- training ----------------------------------------------------------------------------------------------------------------


class Before(Callback):
    """Keeps the random state before the quantization's hooks."""

    def setup(self, trainer, pl_module, stage):
        self.at_setup = torch.get_rng_state()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.at_batch_end = torch.get_rng_state()


class After(Callback):
    """Compares the random state after the quantization's hooks, and keeps what training starts from and what is on in each batch."""

    def __init__(self, before, checkpoint):
        self.before, self.checkpoint = before, checkpoint
        self.undisturbed, self.observers, self.bn_frozen = [], [], []

    def setup(self, trainer, pl_module, stage):
        self.undisturbed.append(torch.equal(self.before.at_setup, torch.get_rng_state()))

    def on_train_start(self, trainer, pl_module):
        self.start = state(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.observers.append(any(bool(quant.observer_enabled[0]) for quant in fake_quants(pl_module)))
        self.bn_frozen.append(not any(child.training for child in pl_module.modules() if isinstance(child, _BatchNorm)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.undisturbed.append(torch.equal(self.before.at_batch_end, torch.get_rng_state()))

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0 and self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint)


def training(flow, checkpoint=None, resume=None, **trainer):
    """Train two epochs; save a checkpoint after the first, or resume one."""
    before = Before()
    after, callback = After(before, checkpoint), QuantizationCallback(QAT(flow=flow, bn_reestimation_batches=2, **FRACTIONS))
    module = with_batch_norm()
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [before, callback, after], **trainer})
    trainer.fit(module, Images(), ckpt_path=resume)
    found = {name: getattr(after, name) for name in ("undisturbed", "start", "observers", "bn_frozen")}
    return {**found, "end": state(module), **outcome(callback, trainer)}, callback


class InOrder(Images):
    """The same images in each step, however many processes share them."""

    train_dataloader = Images.loader


def taught(flow, shift, batch_size=16, **trainer):
    """Train by distillation on labels that are shifted, and return the module's state before and after."""
    seed_everything(4)
    module, images = Plain(without_batch_norm()), InOrder(batch_size)
    images.labels = (images.labels + shift) % 4
    before = [value.detach().clone() for value in module.net.parameters()]
    callback = QuantizationCallback(QAT(flow=flow, distillation=1.0, freeze_observers=When(epoch=0)))
    fit(callback, module, images, [Disturb()], max_epochs=1, **trainer)
    return before, [value.detach().clone() for value in module.net.parameters()]


def averaging(flow, averages_first, **trainer):
    """Train on unequal parts, and return the state of fake-quant in the averaged module."""
    callbacks = [QuantizationCallback(QAT(flow=flow, **FRACTIONS)), EMAWeightAveraging(decay=0.5)]
    module, options = Plain(without_batch_norm()), {"max_epochs": 2, "use_distributed_sampler": False, **trainer}
    Trainer(callbacks=callbacks[::-1] if averages_first else callbacks, **{**QUIET, **options}).fit(module, Loud())
    return quant_state(module)


def outcome(callback, trainer):
    """Return what the callback has on this process, or why it has nothing."""
    try:
        layers = [(layer.layer, layer.scale, layer.zero_point) for layer in callback.report.layers]
        return {"layers": layers, "int8": type(callback.quantized_module).__name__, "parity": callback.report.parity_passed}
    except QuantizationError as error:
        assert not trainer.is_global_zero
        return {"error": str(error)}


# --- calibration -------------------------------------------------------------------------------------------------------------


class Recording(QuantizationCallback):
    """Keeps the calibrated module and the first pixel of what it was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pixels = []

    def calibration_step(self, module, batch):
        self.pixels.append(float(batch[0][0, 0, 0, 0]))
        self.calibrated = module.net
        super().calibration_step(module, batch)


class Talkative(Plain):
    """Waits for the other processes in each step: with an unequal number of steps it would wait for ever."""

    def validation_step(self, batch, batch_idx):
        self.all_gather(batch[1])
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("val/acc", self.accuracy.compute(), sync_dist=True)


def calibration(flow, observer="minmax", data=CALIBRATION, batches=5, **trainer):
    """Calibrate without training, on batches of which every second is larger."""
    callback = Recording(StaticPTQ(flow=flow, observer=observer, calibration_batches=batches), calibration_data=data)
    _, trainer = fit(callback, Talkative(without_batch_norm()), max_epochs=0, **trainer)
    calibrated = quant_state(callback.calibrated) if callback.pixels else {}
    return {"quants": calibrated, "pixels": callback.pixels, **outcome(callback, trainer)}


def failure(flow, **trainer):
    """Calibrate on NaN in the second batch, which is the first one of rank 1."""
    try:
        calibration(flow, data=[CALIBRATION[0], (CALIBRATION[1][0] * torch.nan, LABELS)], **trainer)
    except QuantizationError as error:
        return f"{type(error).__name__}: {error}"


class Diverging(Plain):
    """Gets NaN on rank 1."""

    def training_step(self, batch, batch_idx):
        return super().training_step((batch[0] * torch.nan if self.global_rank == 1 else batch[0], batch[1]), batch_idx)


def divergence(flow, **trainer):
    """Train with NaN on rank 1."""
    try:
        fit(QuantizationCallback(QAT(flow=flow)), Diverging(), **trainer)
    except QuantizationError as error:
        return str(error)


# --- both processes ----------------------------------------------------------------------------------------------------------


def count_conversions():
    calls, convert = [], qat_lightning.conversion._convert
    qat_lightning.conversion._convert = lambda *arguments: calls.append(1) or convert(*arguments)
    return calls


def everything(flow, folder):
    ddp = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    conversions = count_conversions()
    found = {
        "ranges": ranges(flow, **ddp),
        "ranges, late start": ranges(flow, When(step=STEPS - 1), **ddp),
        "ranges, gradients of two batches": ranges(flow, **TWO_BATCHES, **{**ddp, "strategy": DDPStrategy(broadcast_buffers=False)}),
        "fast": len(ranges(flow, fast_dev_run=True, **ddp)),
    }
    found["biases"] = biases(flow, **ddp)
    conversions.clear()
    found["training"], callback = training(flow, checkpoint=folder / f"{flow}-ddp.ckpt", **ddp)
    found["conversions"] = len(conversions)
    unshared = {**ddp, "strategy": DDPStrategy(broadcast_buffers=False)}
    found["resumed"], _ = training(flow, resume=folder / f"{flow}-single.ckpt", **unshared)
    found["taught"] = [taught(flow, shift, **ddp) for shift in (0, 1)]
    found["averages"] = [averaging(flow, averages_first, **ddp) for averages_first in (True, False)]
    for observer in OBSERVERS:
        found[observer] = calibration(flow, observer, **ddp)
    found["one batch"] = calibration(flow, data=CALIBRATION[:1], **ddp)
    found["training data"] = calibration(flow, data=None, batches=3, **ddp)
    found["failure"], found["divergence"] = failure(flow, **ddp), divergence(flow, **ddp)
    return found, callback


def main(folder, flows):
    """Run everything in some flows, and save it by rank."""
    torch.set_num_threads(1)
    found = {}
    for flow in flows:
        found[flow], callback = everything(flow, folder)
    rank = dist.get_rank()
    dist.destroy_process_group()
    if rank == 0:
        (found["test"],) = Trainer(devices=1, **QUIET).test(callback.quantized_module, Images(), verbose=False)
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
