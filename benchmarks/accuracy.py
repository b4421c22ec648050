"""int8 accuracy after post-training quantization, next to other tools on the same images and weights: ``python -m benchmarks.accuracy``.

    python -m benchmarks.accuracy --net my_package.models:MyNet --data images --size 160 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5

The network returns logits, its weights loaded; the data are ImageFolder trees with ``train`` and ``test``. All
methods calibrate with the same training images, without labels. Other tools run where they are installed (``pip install -e ".[bench]"``).
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from qat_lightning import StaticPTQ, calibrate, convert, prepare, refine
from qat_lightning.backend import supported_backends
from qat_lightning.benchmark.peers import PEERS, Peer
from qat_lightning.benchmark.worker import load_net

Run = Callable[[Tensor], Tensor]
WORKERS = 1
# The same numbers as another, faster or slower.
SPEED_ONLY = ("torch-x86-traced", "pt2e-inductor")


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        method: tool and settings.
        top1: in percent; None where the tool is not installed or failed.
        drop: points below float.
        seconds: of the quantization.
        error: squared error of the logits relative to float's mean square.
        remark: why there are no figures.
    """

    method: str
    top1: float | None = None
    drop: float | None = None
    seconds: float | None = None
    error: float | None = None
    remark: str = ""

    def to_markdown(self) -> str:
        """Return a row of the table."""
        if self.top1 is None or self.drop is None or self.error is None:
            return f"| {self.method} | {self.remark} | | | |"
        return f"| {self.method} | {self.top1:.2f} | {self.drop:+.2f} | {self.error:.4f} | {self.seconds or 0:.0f} |"


HEADER = "| method | top-1 | drop | error of the logits | seconds |\n|---|---|---|---|---|"


class Case:
    """A trained network and images.

    Args:
        net: in float.
        root: folder of the images.
        size: shorter side after resizing, then cropped in the centre; None: as they are.
        mean: of the channels.
        std: of the channels.
        calibration: number of training images.
        every: take every n-th test image.
    """

    def __init__(
        self, net: nn.Module, root: Path, size: int | None, mean: Sequence[float], std: Sequence[float], calibration: int, every: int
    ) -> None:
        resize = [] if size is None else [T.Resize(size), T.CenterCrop(size)]
        transform = T.Compose([*resize, T.ToTensor(), T.Normalize(list(mean), list(std))])
        train, test = (ImageFolder(str(root / part), transform) for part in ("train", "test"))
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:calibration].tolist()
        self.net = net.eval()
        self.calibration = [images for images, _ in DataLoader(Subset(train, chosen), batch_size=32)]
        self.test = DataLoader(Subset(test, range(0, len(test), every)), batch_size=50, num_workers=WORKERS)
        self.reference, self.labels = self.run(self.net, "float")

    def measure(self, method: str, quantize: Callable[[], Run]) -> Row:
        """Return the row of a method."""
        start = time.perf_counter()
        run = quantize()
        seconds = time.perf_counter() - start
        logits, _ = self.run(run, method)
        error = float((logits - self.reference).square().mean() / self.reference.square().mean())
        top1 = self._top1(logits)
        return Row(method, top1, self._top1(self.reference) - top1, seconds, error)

    def float_row(self) -> Row:
        """Return the row of the float network."""
        return Row("float", self._top1(self.reference), 0.0, 0.0, 0.0)

    def run(self, run: Run, name: str) -> tuple[Tensor, Tensor]:
        """Return what a function gives for the test images, and their labels."""
        with torch.inference_mode():
            pairs = [(run(images), labels) for images, labels in track(self.test, name, console=Console(stderr=True))]
        return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])

    def _top1(self, logits: Tensor) -> float:
        return 100 * float((logits.argmax(1) == self.labels).float().mean())


def ours(case: Case, refined: bool = True, **options: Any) -> nn.Module:
    """Quantize as ``+quant=ptq`` does."""
    prepared = calibrate(prepare(case.net, StaticPTQ(**options)), case.calibration)
    return convert(refine(prepared, case.calibration) if refined else prepared)


def rows(case: Case, backends: Sequence[str], peers: Sequence[Peer], ablation: bool) -> list[Row]:
    """Measure all methods."""
    found = [case.float_row()]
    for backend in backends:
        found.append(case.measure(f"qat_lightning, {backend}", lambda backend=backend: ours(case, backend=backend)))
    if ablation:
        found.append(case.measure("... without bias correction", lambda: ours(case, refined=False)))
        found.append(case.measure("... nor histogram, minima and maxima", lambda: ours(case, refined=False, observer="minmax")))
        found.append(case.measure("... one weight scale per tensor", lambda: ours(case, per_channel=False)))
        found.append(case.measure("... weights of 7 bits", lambda: ours(case, weight_bits=7)))
    for peer in peers:
        if any(importlib.util.find_spec(package) is None for package in peer.packages):
            found.append(Row(peer.name, remark=f"not installed: {', '.join(peer.packages)}"))
            continue
        found.append(case.measure(peer.name, lambda peer=peer: peer.quantize(case.net, case.calibration).run))
    return found


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose a network and images."""
    parser.add_argument(
        "--net", required=True, help="module:callable that returns the trained network; append =VALUE for one integer argument"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--size", type=int, help="resize and crop to this; else images as they are")
    parser.add_argument("--mean", type=float, nargs=3, default=[0.485, 0.456, 0.406])
    parser.add_argument("--std", type=float, nargs=3, default=[0.229, 0.224, 0.225])
    parser.add_argument("--calibration", type=int, default=256, help="training images")
    parser.add_argument("--every", type=int, default=1, help="take every n-th test image")


def case_of(chosen: argparse.Namespace) -> Case:
    """Return what these options choose."""
    return Case(load_net(chosen.net), chosen.data.expanduser(), chosen.size, chosen.mean, chosen.std, chosen.calibration, chosen.every)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--backends", nargs="*", default=list(supported_backends()))
    parser.add_argument("--peers", nargs="*", default=[name for name in PEERS if name not in SPEED_ONLY], choices=list(PEERS))
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    case = case_of(chosen)
    found = rows(case, chosen.backends, [PEERS[peer] for peer in chosen.peers], chosen.ablation)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in found], indent=2) + "\n")
    print("\n".join([HEADER, *(row.to_markdown() for row in found)]))


if __name__ == "__main__":
    main()
