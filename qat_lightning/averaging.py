"""Averages of weights that other callbacks keep, kept true to a prepared module: weights are averaged, ranges are not."""

from collections.abc import Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from qat_lightning.observers import fake_quants, measure_weights


def copy_anew(trainer: Trainer, pl_module: LightningModule) -> None:
    """Let callbacks that have copied the module before it was prepared copy it again."""
    for callback, _ in _averages(trainer):
        callback.setup(trainer, pl_module, "fit")


@torch.no_grad()
def keep_ranges(trainer: Trainer, pl_module: LightningModule) -> None:
    """Give averaged models the ranges of the trained one: switches, zero points and empty ranges have no average.

    The scales of averaged weights are measured on these weights.
    """
    for _, average in _averages(trainer):
        if isinstance(average, AveragedModel):
            for source, target in zip(fake_quants(pl_module), fake_quants(average.module), strict=True):
                for current, averaged in zip(source.buffers(), target.buffers(), strict=True):
                    averaged.copy_(current)
            measure_weights(average.module)


def measure_averaged(trainer: Trainer, pl_module: LightningModule) -> None:
    """Measure the weights of a module that averaged ones have been copied into, its ranges left as they were."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback, _ in _averages(trainer)):
        measure_weights(pl_module)


def _averages(trainer: Trainer) -> Iterator[tuple[Callback, nn.Module]]:
    """Yield the callbacks that average, and their copies of the module."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging) and average is not None:
            yield callback, average
