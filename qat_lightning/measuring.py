"""Sensitivity and fallback of a LightningModule: which figure of which data counts."""

import logging
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn

from qat_lightning.conversion import prepare_targets
from qat_lightning.errors import ConfigurationError
from qat_lightning.evaluation.sensitivity import Sensitivity, measure
from qat_lightning.fallback import Choice, Score, Step, Trials, fall_back
from qat_lightning.observers import apply_phase, check_ranges
from qat_lightning.plan import Plan
from qat_lightning.recipe import DynamicPTQ, Recipe, StaticPTQ
from qat_lightning.schedule import IDLE
from qat_lightning.validation import Validation, accuracy_name

log = logging.getLogger(__name__)

AGREEMENT = "agreement of outputs"
# Outputs of the float model are kept for comparison.
AGREEMENT_BATCHES = 8
SENSITIVITY_BATCHES = 4


def sensitivity_of(
    copied: LightningModule,
    plans: Mapping[str, Plan],
    recipe: Recipe,
    batches: Iterable[Any],
    step: Step,
    validation: Validation | None,
    metric: str | None,
) -> Sensitivity:
    """Measure the sensitivity of the layers of a LightningModule, as they are before bias correction and learned rounding.

    Args:
        copied: a copy of the trained module, on the CPU in eval mode; it is used up.
        plans: of its targets.
        recipe: of the plans.
        batches: for calibration and for the comparison of outputs.
        step: runs one batch through the module.
        validation: gives the metric; None compares outputs alone.
        metric: its name; None: the first accuracy.

    Raises:
        ConfigurationError: a dynamic recipe, which has no fake-quant to switch.
        CalibrationError: no batch.
    """
    if isinstance(recipe, DynamicPTQ):
        raise ConfigurationError("Sensitivity is measured with fake-quant, which dynamic quantization has not: use StaticPTQ or QAT.")
    kept = list(islice(batches, recipe.calibration_batches if isinstance(recipe, StaticPTQ) else SENSITIVITY_BATCHES))
    prepared, _ = prepare_targets(copied, plans, recipe, kept, lambda batch: step(copied, batch))
    for name, target in prepared.items():
        apply_phase(target, IDLE)
        check_ranges(target, f"module {name!r}")
    score, name = _score(copied, validation, metric)
    bound = None if score is None else lambda: score(copied)
    return measure(prepared, kept[:SENSITIVITY_BATCHES], lambda batch: step(copied, batch), bound, name, progress=True)


def keep_accuracy(
    copied: LightningModule,
    plans: Mapping[str, Plan],
    recipe: Recipe,
    batches: Iterable[Any],
    step: Step,
    validation: Validation | None,
    metric: str | None,
    max_drop: float,
) -> tuple[Choice, list[Any]]:
    """Find the layers of a LightningModule that stay in float.

    Without a validation metric, outputs are compared: on the validation data, or on the calibration data where there are none.

    Args:
        copied: a float copy of the trained module, on the CPU in eval mode.
        plans: of its targets.
        recipe: of the plans.
        batches: for calibration.
        step: runs one batch through a copy of the module.
        validation: the validation data; None where there are none.
        metric: the metric to bound; None: the first accuracy.
        max_drop: the bound.

    Returns:
        the choice, and the batches of the calibration, for the same int8 model once more.
    """
    limit = recipe.calibration_batches if isinstance(recipe, StaticPTQ) else AGREEMENT_BATCHES
    kept = list(islice(batches, limit))
    trials = Trials(copied, plans, recipe, kept, step)
    score, name = _score(copied, validation, metric)
    if score is None:
        log.warning("No validation metric to bound: `max_accuracy_drop` bounds the relative squared error of the outputs.")
        distance = trials.distance(kept[:AGREEMENT_BATCHES] if validation is None else validation.batches(AGREEMENT_BATCHES))
        return fall_back(trials, lambda module: 1 - distance(module), AGREEMENT, max_drop), kept
    return fall_back(trials, score, name, max_drop), kept


def _score(module: LightningModule, validation: Validation | None, wanted: str | None) -> tuple[Score | None, str]:
    """Return what measures a copy of ``module``, and its name; None where its validation logs no such metric."""
    if validation is None:
        return None, ""
    names = validation.metrics(module)
    name = wanted if wanted in names else None if wanted is not None else accuracy_name(names)
    if wanted is not None and name is None:
        # No error: it would cost the user a trained model.
        log.warning("The validation logs no %r, only %s: choose one with `metric`. Outputs are compared instead.", wanted, sorted(names))
    if name is None:
        return None, ""
    chosen: str = name

    def score(copied: nn.Module) -> float:
        assert isinstance(copied, LightningModule)
        return validation.metrics(copied)[chosen]

    return score, name
