"""One candidate in a process of its own: builds once, then answers with times. Speaks JSON, a line each way."""

import gc
import importlib
import json
import resource
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from qat_lightning.benchmark.candidates import CANDIDATES

TURN_MS, MOST_CALLS = 100.0, 30
"""How long a turn lasts, and how many calls it has at most."""

WARM_UP = 3


@dataclass(frozen=True)
class Task:
    """What a worker builds.

    Args:
        candidate: its name.
        net: ``module:callable`` that returns the network; ``=VALUE`` behind it is one integer argument.
        batch: images of one call.
        size: side of the images.
        data: folder of images by class for the calibration; None: normal numbers.
        calibration: images for the calibration.
        threads: at most.
    """

    candidate: str
    net: str
    batch: int
    size: int
    data: str | None
    calibration: int
    threads: int


def load_net(spec: str) -> nn.Module:
    """Return the network that a text names, in eval mode; equal for each process."""
    module, _, rest = spec.partition(":")
    name, _, argument = rest.partition("=")
    torch.manual_seed(0)
    net: nn.Module = getattr(importlib.import_module(module), name)(*([int(argument)] if argument else []))
    return net.eval()


def calibration_batches(task: Task) -> list[Tensor]:
    """Return the images of the calibration in batches of the size that is timed."""
    count = max(1, task.calibration // task.batch)
    generator = torch.Generator().manual_seed(0)
    if task.data is None:
        return [torch.randn(task.batch, 3, task.size, task.size, generator=generator) for _ in range(count)]
    normalize = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    images = ImageFolder(task.data, T.Compose([T.Resize(task.size), T.CenterCrop(task.size), T.ToTensor(), normalize]))
    chosen = torch.randperm(len(images), generator=generator)[: count * task.batch].tolist()
    tensors = torch.stack([images[index][0] for index in chosen])
    return list(torch.split(tensors, task.batch))


def main() -> None:
    """Build the candidate of the first line, then time as many calls as each further line says."""
    warnings.simplefilter("ignore")
    task = Task(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(task.threads)
    batches = calibration_batches(task)
    with torch.inference_mode(mode="compile" not in task.candidate and "inductor" not in task.candidate), torch.no_grad():
        made = CANDIDATES[task.candidate].make(load_net(task.net), batches)
        for _ in range(WARM_UP):
            made.run(batches[0])
        _say(size_bytes=made.size_bytes, runtime=getattr(made.run, "runtime", None))
        gc.disable()
        for line in sys.stdin:
            _say(milliseconds=_turn(made.run, batches[0], least=int(line)), peak_bytes=_peak())


def ask(task: Task) -> str:
    """Return a task as the first line for a worker."""
    return json.dumps(asdict(task)) + "\n"


def _turn(run: Any, images: Tensor, least: int) -> list[float]:
    """Return the times of some calls, more of fast ones, behind one that finds the caches as another candidate has left them."""
    first = _time(run, images)
    return [_time(run, images) for _ in range(max(least, min(MOST_CALLS, int(TURN_MS / first))))]


def _time(run: Any, images: Tensor) -> float:
    begin = time.perf_counter()
    run(images)
    return 1e3 * (time.perf_counter() - begin)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _say(**values: Any) -> None:
    sys.__stdout__.write(json.dumps(values) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
