"""Runs batches through the observers of a prepared module."""

from collections.abc import Callable, Iterable, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_lightning.distributed import ALONE, Processes, alone, fail_together, merge_calibration
from qat_lightning.errors import CalibrationError
from qat_lightning.observers import apply_phase, check_ranges, freeze_ranges
from qat_lightning.schedule import IDLE, Phase

WATCHING = Phase(fake_quant=False, observers=True, bn_frozen=True)


def calibrate(
    prepared: Iterable[nn.Module],
    batches: Iterable[Any],
    step: Callable[[Any], Any],
    limit: int | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> int:
    """Let the observers of ``prepared`` watch ``batches``, then fix their ranges and switch fake-quant on.

    Args:
        prepared: modules from :func:`qat_lightning.prepare`, in eval mode.
        batches: whatever ``step`` takes; the part of this process.
        step: runs one batch through the modules.
        limit: how many batches this process uses at most; None: all.
        progress: show a progress bar.
        processes: that share the calibration; all get the same ranges.

    Returns:
        how many batches were used by all processes.

    Raises:
        CalibrationError: no batch, or NaN or infinite values in a batch or an activation.
    """
    modules = list(prepared)
    count = observe(modules, batches, step, limit, progress, processes)
    for module in modules:
        check_ranges(module, "calibration")
        freeze_ranges(module)
        apply_phase(module, IDLE)
    return count


def observe(
    modules: Sequence[nn.Module],
    batches: Iterable[Any],
    step: Callable[[Any], Any],
    limit: int | None,
    progress: bool,
    processes: Processes,
) -> int:
    """Let the observers of ``modules`` watch ``batches``; arguments, result and errors are those of :func:`calibrate`."""
    for module in modules:
        apply_phase(module, WATCHING)
    with fail_together(processes):
        count = _watch(batches, step, limit, progress)
    count = merge_calibration(modules, count, processes)
    if count == 0:
        raise CalibrationError("Calibration got no batch: the loader is empty. Give it at least one batch of training data.")
    return count


def _watch(batches: Iterable[Any], step: Callable[[Any], Any], limit: int | None, progress: bool) -> int:
    chosen = islice(batches, limit)
    total = min((number for number in (limit, length_of(batches)) if number is not None), default=None)
    count = 0
    for batch in track(chosen, "Calibrating", total=total) if progress else chosen:
        refuse_nan(batch, count)
        with alone(), torch.inference_mode():
            step(batch)
        count += 1
    return count


def length_of(batches: Iterable[Any]) -> int | None:
    """Return how many batches there are, None where they do not tell."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # what a DataLoader over an iterable dataset raises
        return None


def refuse_nan(batch: Any, index: int) -> None:
    """Refuse a batch with NaN or infinite values.

    Raises:
        CalibrationError: names the batch.
    """
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
            raise CalibrationError(
                f"Calibration batch {index} holds NaN or infinite values, shape {tuple(leaf.shape)}: "
                f"every range learnt from it would be useless. Remove such samples from the calibration data."
            )
