"""Calibrated activation ranges for a module that is about to be trained with fake-quant."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from qat_lightning.calibration import observe
from qat_lightning.distributed import Processes
from qat_lightning.errors import CalibrationError
from qat_lightning.observers import fake_quants
from qat_lightning.recipe import QAT
from qat_lightning.running import attached, clone, to_device


def calibrate_ranges(
    module: LightningModule,
    targets: Sequence[str],
    recipe: QAT,
    trainer: Trainer,
    batches: Iterable[Any],
    step: Callable[[LightningModule, Any], Any],
) -> None:
    """Give the fake-quant of ``module`` the ranges that post-training quantization would give it.

    A copy watches the batches, in evaluation mode: of the module nothing but the ranges changes.

    Args:
        module: prepared, on the device it trains on.
        targets: names of its prepared submodules.
        recipe: how many batches, and how a range is chosen.
        trainer: in its fit.
        batches: the part of this process.
        step: runs one batch through a LightningModule.

    Raises:
        CalibrationError: no batch, or NaN or infinite values in a batch or an activation.
    """
    copied = clone(module).eval()
    watching = [copied.get_submodule(name) for name in targets]
    twins = [_swap(target, recipe.observer) for target in watching]
    processes = Processes.of(trainer)
    with attached(copied, trainer), torch.random.fork_rng(devices=[]):
        observe(
            watching,
            batches,
            lambda batch: step(copied, to_device(copied, batch)),
            limit=processes.part_of(recipe.calibration_batches),
            progress=processes.rank == 0,
            processes=processes,
        )
    for name, by_path in zip(targets, twins, strict=True):
        for path, twin in by_path.items():
            if twin.saw_no_number:
                raise CalibrationError(
                    f"{name}: the observer {path!r} has seen NaN or infinite activations before training. "
                    f"Check the data and the float model."
                )
            learner: Any = module.get_submodule(name).get_submodule(path)
            learner.take_range(twin)


def _swap(target: nn.Module, observer: str) -> dict[str, Any]:
    """Replace the fake-quant of activations by twins that are calibrated, and return these by name."""
    twins: dict[int, Any] = {}
    found = {}
    for path, quant in list(target.named_modules(remove_duplicate=False)):
        if hasattr(quant, "twin"):
            found[path] = twins.setdefault(id(quant), quant.twin(observer))
            target.set_submodule(path, found[path])
    return found


def learnt_nothing(module: nn.Module) -> bool:
    """Whether fake-quant has yet to begin in a prepared module."""
    return not any(bool(quant.fake_quant_enabled[0]) for quant in fake_quants(module))
