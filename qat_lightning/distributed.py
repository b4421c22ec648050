"""What the processes of a DDP run tell each other: activation ranges, what they saw in calibration, and that one of them has failed."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from qat_lightning.errors import QuantizationError
from qat_lightning.histogram import merge
from qat_lightning.observers import fake_quants

T = TypeVar("T")

# Torch's half hour is meant for a training step; what rank zero does alone may take longer.
PATIENCE = timedelta(days=365)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this one is.

    Args:
        rank: of this process.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    @staticmethod
    def of(trainer: Trainer) -> "Processes":
        """Return the processes that a Trainer trains with."""
        return Processes(trainer.global_rank, trainer.world_size)

    def part_of(self, number: int) -> int:
        """Return the part of each process of ``number`` things, rounded up."""
        return math.ceil(number / self.count)


ALONE = Processes()


# --- training ----------------------------------------------------------------------------------------------------------------


def synchronize_ranges(modules: Iterable[nn.Module]) -> None:
    """Give the observers of every process the ranges that they would have, had each seen the batches of all.

    DDP hands rank zero's ranges to the others before each forward pass, so what these have learnt would be lost. Every process starts
    a batch from the same running minimum and maximum ``r``, and the moving average ``r + c (x - r)`` never falls as the extreme ``x`` of
    its part of the batch grows, not even by rounding. The extremes over the processes are therefore those of the whole batch, to the
    last bit; where a module runs more than once in a batch, they are bounds of them.

    Call it after each batch on every process, before anything reads the ranges.

    Args:
        modules: prepared, their observers on.
    """
    followers = [quant for module in modules for quant in fake_quants(module) if hasattr(quant, "follow_observer")]
    if not followers:
        return
    low = torch.stack([quant.activation_post_process.min_val.flatten()[0] for quant in followers])
    high = torch.stack([quant.activation_post_process.max_val.flatten()[0] for quant in followers])
    low, high = _extremes(low, high)
    known = (low.isfinite() & high.isfinite()).tolist()
    for quant, new_low, new_high, is_known in zip(followers, low, high, known, strict=True):
        # In place: DDP and checkpoints know these very tensors.
        quant.activation_post_process.min_val.copy_(new_low)
        quant.activation_post_process.max_val.copy_(new_high)
        if is_known:
            quant.follow_observer()


def share_parameters(modules: Iterable[nn.Module], processes: Processes) -> None:
    """Give every process the parameters of rank zero."""
    if processes.count > 1:
        for module in modules:
            for parameter in module.parameters():
                dist.broadcast(parameter.data, 0)


def _extremes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest ``low`` and the largest ``high`` of all processes; NaN where one has NaN."""
    # A maximum over processes may lose NaN, which is why it travels as a number.
    broken = (low.isnan() | high.isnan()).to(low.dtype)
    packed = torch.cat([-low, high, broken])
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    low, high, broken = packed.chunk(3)
    return torch.where(broken > 0, torch.nan, -low), torch.where(broken > 0, torch.nan, high)


# --- calibration -------------------------------------------------------------------------------------------------------------


def own_share(batches: Iterable[T], processes: Processes) -> Iterable[T]:
    """Return every ``processes.count``-th batch, or all where the loader's sampler gives each process its own already."""
    if processes.count == 1 or isinstance(getattr(batches, "sampler", None), DistributedSampler):
        return batches
    return islice(batches, processes.rank, None, processes.count)


@dataclass(frozen=True)
class Seen:
    """What one observer has seen on one process.

    Args:
        batches: how many batches the process has run.
        low: minimum, or its moving average; infinite where nothing was seen.
        high: maximum, or its moving average.
        histogram: counts, as in :mod:`qat_lightning.histogram`; None where the observer keeps none.
        saw_no_number: whether an activation was NaN or infinite.
    """

    batches: int
    low: Tensor
    high: Tensor
    histogram: Tensor | None
    saw_no_number: bool


def merge_calibration(modules: Iterable[nn.Module], batches: int, processes: Processes) -> int:
    """Give the observers of every process what those of all have seen; the result is the same on each.

    Minima, maxima and histograms are those of one process that saw everything. Moving averages are averaged with the number of batches
    as weights: each is an average over the batches of its process.

    Args:
        modules: calibrated, before their ranges are frozen.
        batches: how many batches this process has run.
        processes: of the run.

    Returns:
        how many batches all have run.
    """
    if processes.count == 1:
        return batches
    watching = [quant for module in modules for quant in fake_quants(module) if hasattr(quant, "freeze_range")]
    with _group() as group:
        everyone = _gather((batches, [_seen(quant, batches) for quant in watching]), group)
    for index, quant in enumerate(watching):
        _merge(quant, [seen[index] for _, seen in everyone])
    return sum(count for count, _ in everyone)


def merge_extremes(extremes: Sequence[tuple[Tensor, Tensor]], processes: Processes) -> list[tuple[Tensor, Tensor]]:
    """Return the minima and maxima that all processes have seen together.

    Args:
        extremes: minima and maxima on this process; every process gives tensors of the same shapes.
        processes: of the run.
    """
    if processes.count == 1:
        return list(extremes)
    with _group() as group:
        everyone = _gather(list(extremes), group)
    return [
        (torch.stack([low for low, _ in seen]).amin(0), torch.stack([high for _, high in seen]).amax(0))
        for seen in zip(*everyone, strict=True)
    ]


def _seen(quant: Any, batches: int) -> Seen:
    observer = quant.activation_post_process
    low, high, histogram = observer.min_val.cpu(), observer.max_val.cpu(), getattr(observer, "histogram", None)
    return Seen(batches, low, high, None if histogram is None else histogram.cpu(), quant.saw_no_number)


def _merge(quant: Any, everyone: Sequence[Seen]) -> None:
    quant.saw_no_number = any(seen.saw_no_number for seen in everyone)
    known = [seen for seen in everyone if seen.low <= seen.high]
    if not known:
        return
    observer = quant.activation_post_process
    low, high = torch.stack([seen.low for seen in known]), torch.stack([seen.high for seen in known])
    if hasattr(observer, "averaging_constant"):
        weights = torch.tensor([seen.batches for seen in known], dtype=torch.float64)
        low, high = (weights * low).sum() / weights.sum(), (weights * high).sum() / weights.sum()
    else:
        low, high = low.min(), high.max()
    histograms = [(float(seen.low), float(seen.high), seen.histogram) for seen in known if seen.histogram is not None]
    if histograms:
        observer.histogram.copy_(merge(histograms)[2])
    observer.min_val.copy_(low)
    observer.max_val.copy_(high)


# --- work of one process -----------------------------------------------------------------------------------------------------


@contextmanager
def fail_together(processes: Processes) -> Iterator[None]:
    """Wait at the end of the block until every process is there, and fail where one has failed: nobody is left waiting for it.

    Args:
        processes: of the run; all of them enter the block.

    Raises:
        QuantizationError: another process has failed; names it and its reason.
    """
    if processes.count == 1:
        yield
        return
    error: Exception | None = None
    with _group() as group:
        try:
            yield
        except Exception as caught:
            error = caught
        failures = _gather(None if error is None else f"{type(error).__name__}: {error}", group)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise QuantizationError(f"The process of rank {rank} has failed: {failure}")


@contextmanager
def alone() -> Iterator[None]:
    """Hide the process group from this process for the time of the block.

    A metric, a Trainer of one device or ``self.all_gather`` in a user's step would wait for processes that do something else.
    """
    if not dist.is_available() or not dist.is_initialized():
        yield
        return
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = world


@contextmanager
def _group() -> Iterator[Any]:
    """Make a group of all processes that passes Python objects and has patience, whatever the backend of training."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def _gather(value: T, group: Any) -> list[T]:
    """Return the values of all processes in order of rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values
