"""What a module is given before it trains with fake-quant: the ranges and biases of post-training quantization.

BatchNorm normalises with each batch's own statistics where it will do so in training. Those of a network that starts untrained say
nothing yet: ranges found with them are so narrow that everything saturates, and a deep network diverges in its first steps.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.batch_norm import put_back
from qat_lightning.bn_reestimation import tracked_norms
from qat_lightning.calibration import observe
from qat_lightning.conversion import FirstBatches, captured
from qat_lightning.distributed import Processes, alone, fail_together, share_parameters
from qat_lightning.errors import CalibrationError
from qat_lightning.observers import apply_phase, fake_quants, freeze_bn, measure_weights
from qat_lightning.plan import Plan
from qat_lightning.recipe import QAT
from qat_lightning.refinement import SAMPLES, refine_layers
from qat_lightning.running import attached, clone, to_device
from qat_lightning.schedule import IDLE, Phase


def start_from_calibration(
    module: LightningModule,
    plans: Mapping[str, Plan],
    recipe: QAT,
    phase: Phase,
    trainer: Trainer,
    batches: Iterable[Any],
    step: Callable[[LightningModule, Any], Any],
    batch_norms: Mapping[str, nn.Module],
) -> None:
    """Give ``module`` the ranges, and where BatchNorm is frozen the biases, that post-training quantization would give it.

    A copy watches the batches, in evaluation mode but for BatchNorm: of the module nothing else changes. While BatchNorm learns, it
    subtracts the mean error of each batch itself, so that biases are left alone.

    Args:
        module: prepared, on the device it trains on.
        plans: of its prepared submodules.
        recipe: how many batches, how a range is chosen, and whether biases are corrected.
        phase: in which it is about to train.
        trainer: in its fit.
        batches: the part of this process.
        step: runs one batch through a LightningModule.
        batch_norms: from :func:`qat_lightning.batch_norm.batch_norms`, before any was replaced.

    Raises:
        CalibrationError: no batch, NaN or infinite values in a batch or an activation, or a batch with one value per channel for a
            BatchNorm that learns.
    """
    unshifted = phase.bn_frozen or not tracked_norms({name: module.get_submodule(name) for name in plans})
    corrects = recipe.bias_correction and unshifted
    processes = Processes.of(trainer)
    first = FirstBatches(batches, 1, SAMPLES if corrects else 0)
    for name in plans:
        measure_weights(module.get_submodule(name))  # they may have been loaded since the module was prepared
    copied = _as_in_training(module, plans, phase, batch_norms)

    def run(batch: Any) -> None:
        step(copied, to_device(copied, batch))

    with torch.random.fork_rng(devices=[]), attached(copied, trainer):
        _calibrate_ranges(module, copied, plans, recipe, first, run, processes)
        if corrects:
            with fail_together(processes):
                if processes.rank == 0:
                    with alone():
                        _correct_biases(module, copied, plans, first.batches(), run)
            share_parameters([module.get_submodule(name) for name in plans], processes)


def _as_in_training(module: LightningModule, targets: Iterable[str], phase: Phase, originals: Mapping[str, nn.Module]) -> LightningModule:
    """Return a copy in eval mode, but for the BatchNorm that will learn; none of it waits for another process."""
    copied = clone(module)
    put_back(copied, originals)
    learning = [child for child in copied.modules() if isinstance(child, _BatchNorm) and child.training]
    copied.eval()
    for child in learning:
        child.train()
    if phase.bn_frozen:
        for name in targets:
            freeze_bn(copied.get_submodule(name), frozen=True)
    return copied


def learnt_nothing(module: nn.Module) -> bool:
    """Whether fake-quant has yet to begin in a prepared module."""
    return not any(bool(quant.fake_quant_enabled[0]) for quant in fake_quants(module))


# --- ranges ------------------------------------------------------------------------------------------------------------------


def _calibrate_ranges(
    module: LightningModule,
    copied: LightningModule,
    targets: Collection[str],
    recipe: QAT,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    processes: Processes,
) -> None:
    """Let the fake-quant of ``copied`` watch, and that of ``module`` take its ranges."""
    watching = [copied.get_submodule(name) for name in targets]
    twins = [_swap(target, recipe.observer) for target in watching]
    limit = processes.part_of(recipe.calibration_batches)
    with _explaining_single_values():
        observe(watching, batches, run, limit, progress=processes.rank == 0, processes=processes)
    for name, by_path in zip(targets, twins, strict=True):
        for path, twin in by_path.items():
            if twin.saw_no_number:
                raise CalibrationError(
                    f"{name}: the observer {path!r} has seen NaN or infinite activations before training. "
                    f"Check the data and the float model."
                )
            learner: Any = module.get_submodule(name).get_submodule(path)
            learner.take_range(twin)


@contextmanager
def _explaining_single_values() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise CalibrationError(
            f"A calibration batch has a single value per channel for a BatchNorm that learns ({error}). Calibrate with larger batches, or "
            f"freeze BatchNorm from the start with freeze_bn=When(epoch=0)."
        ) from error


def _swap(target: nn.Module, observer: str) -> dict[str, Any]:
    """Replace the fake-quant of activations by twins that are calibrated, and return these by name."""
    twins: dict[int, Any] = {}
    found = {}
    for path, quant in list(target.named_modules(remove_duplicate=False)):
        if hasattr(quant, "twin"):
            found[path] = twins.setdefault(id(quant), quant.twin(observer))
            target.set_submodule(path, found[path])
    return found


# --- biases ------------------------------------------------------------------------------------------------------------------


def _correct_biases(
    module: LightningModule, copied: LightningModule, plans: Mapping[str, Plan], batches: Sequence[Any], run: Callable[[Any], Any]
) -> None:
    """Correct the calibrated copy, and take its parameters."""
    targets = {name: copied.get_submodule(name) for name in plans}
    for target in targets.values():
        apply_phase(target, IDLE)
    calls = captured(targets, batches, run)
    for name, target in targets.items():
        refine_layers(target, plans[name], calls[name], bias_correction=True, adaround=None, progress=True)
        for learnt, corrected in zip(module.get_submodule(name).parameters(), target.parameters(), strict=True):
            learnt.data.copy_(corrected)
