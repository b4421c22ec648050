"""Keeps the fewest layers in float with which an int8 model is accurate enough.

Layers are ranked by what each alone, in int8, does to the outputs; the search of :mod:`qat_lightning.search` then tries sets of them. Each
trial is a real int8 model: equalized, prepared, calibrated, refined and converted from the float model with the same batches, as the
recipe wants it (learned rounding takes its time in each), and measured on data that the caller chooses, neither test nor calibration data.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from qat_lightning.compilation import uncompiled_copy
from qat_lightning.conversion import captured, latency, prepare_targets, refine_targets
from qat_lightning.core import as_call, convert_planned, require_layers
from qat_lightning.errors import CalibrationError, ConfigurationError
from qat_lightning.evaluation import serialized_bytes
from qat_lightning.evaluation.divergence import divergence, outputs_of
from qat_lightning.evaluation.sensitivity import rank_layers
from qat_lightning.plan import Plan, check_fuse, check_overrides, make_plan
from qat_lightning.recipe import DynamicPTQ, Recipe, StaticPTQ
from qat_lightning.report import Fallback
from qat_lightning.running import clone
from qat_lightning.search import Found, fewest_in_float
from qat_lightning.signature import first_of_batch

log = logging.getLogger(__name__)

RANKING_BATCHES = 2
# Metrics are means in single precision: 0.98 - 0.975 is a little more than 0.005.
TOLERANCE = 1e-6

_ONLY_CHILD = "module"

Step = Callable[[nn.Module, Any], Any]
Score = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Choice:
    """The outcome of :func:`fall_back`.

    Args:
        plans: of the targets, without those of which nothing is quantized.
        int8: the int8 module.
        fallback: for the report.
    """

    plans: dict[str, Plan]
    int8: nn.Module
    fallback: Fallback


class Trials:
    """Int8 models of one float module that differ in the layers that stay in float.

    Args:
        module: float, on the CPU in eval mode; it is not changed.
        plans: of its targets.
        recipe: :class:`StaticPTQ` or :class:`DynamicPTQ`.
        batches: for calibration and for the ranking.
        step: runs one batch through a module that has the structure of ``module``.
        prefix: what the names of layers are given without.
    """

    def __init__(
        self, module: nn.Module, plans: Mapping[str, Plan], recipe: Recipe, batches: Sequence[Any], step: Step, prefix: str = ""
    ) -> None:
        self.module = module
        self.plans = plans
        self.recipe = recipe
        self.batches = batches
        self.step = step
        self.prefix = prefix
        self.layers = tuple(self._name(target, layer) for target, plan in plans.items() for layer in plan.layers)

    def plans_with(self, kept: Iterable[str]) -> dict[str, Plan]:
        """Return the plans with these layers in float; a target without any other stays as it is."""
        chosen = set(kept)
        plans = {}
        for target, plan in self.plans.items():
            plans[target] = plan.keep_float(layer for layer in plan.layers if self._name(target, layer) in chosen)
        return {target: plan for target, plan in plans.items() if plan.layers}

    def int8(self, kept: Iterable[str]) -> nn.Module:
        """Return the int8 module with these layers in float."""
        plans = self.plans_with(kept)
        root, prepared, sample = self._prepared(plans)
        if isinstance(self.recipe, StaticPTQ):
            calls = captured(prepared, sample, lambda batch: self.step(root, batch))
            refine_targets(prepared, plans, self.recipe, calls, progress=False)
        for target, module in prepared.items():
            root.set_submodule(target, convert_planned(module, plans[target]))
        return root

    def rank(self) -> tuple[str, ...]:
        """Return the layers, the one that alone in int8 changes the outputs most first."""
        batches = self.batches[:RANKING_BATCHES]
        if isinstance(self.recipe, DynamicPTQ):
            distance = self.distance(batches)
            harm = {layer: distance(self.int8(other for other in self.layers if other != layer)) for layer in self.layers}
            return tuple(sorted(self.layers, key=lambda layer: harm[layer], reverse=True))
        root, prepared, _ = self._prepared(self.plans)
        ranked = [name.removeprefix(self.prefix) for name in rank_layers(prepared, batches, lambda batch: self.step(root, batch), True)]
        return (*(name for name in ranked if name in self.layers), *(name for name in self.layers if name not in ranked))

    def distance(self, batches: Sequence[Any]) -> Score:
        """Return a function that gives the divergence of another module's outputs from those of the float module."""

        def outputs(module: nn.Module) -> Any:
            return outputs_of({name: module.get_submodule(name) for name in self.plans}, batches, lambda batch: self.step(module, batch))

        if not batches:
            raise CalibrationError("There is no batch to compare outputs with: give at least one.")
        reference = outputs(self.module)
        return lambda module: divergence(reference, outputs(module))

    def added_ms(self, one: nn.Module, other: nn.Module) -> float | None:
        """Return by how many milliseconds the targets of ``other`` are slower than those of ``one``, batch 1; None without a batch."""
        both = [{name: module.get_submodule(name) for name in self.plans} for module in (one, other)]
        calls = captured(both[0], [first_of_batch(batch) for batch in self.batches[:1]], lambda batch: self.step(one, batch))
        before, after = latency(both[0], both[1], calls)
        return None if before is None or after is None else after - before

    def _prepared(self, plans: Mapping[str, Plan]) -> tuple[nn.Module, dict[str, nn.Module], list[Any]]:
        root = clone(self.module)
        prepared, first = prepare_targets(root, plans, self.recipe, self.batches, lambda batch: self.step(root, batch), progress=False)
        return root, prepared, first.batches()

    def _name(self, target: str, layer: str) -> str:
        return f"{target}.{layer}".strip(".").removeprefix(self.prefix)


def fall_back(trials: Trials, score: Score, metric: str, max_drop: float) -> Choice:
    """Find the layers that stay in float.

    Args:
        trials: makes the int8 models.
        score: measures a float or an int8 module, higher is better.
        metric: its name.
        max_drop: what int8 may lose of it.
    """
    in_float = score(trials.module)
    full = trials.int8(())
    all_int8 = score(full)
    required = in_float - max_drop - TOLERANCE
    log.info("%s: %.4f in float, %.4f in int8; %.4f is required.", metric, in_float, all_int8, in_float - max_drop)

    def evaluate(kept: frozenset[str]) -> float:
        if not kept:
            return all_int8
        found = score(trials.int8(kept))
        log.info("%s: %.4f with %d layers in float.", metric, found, len(kept))
        return found

    found = Found((), all_int8, True, all_int8, 1) if all_int8 >= required else fewest_in_float(trials.rank(), evaluate, required)
    int8 = trials.int8(found.kept) if found.kept else full
    fallback = Fallback(
        metric=metric,
        max_drop=max_drop,
        met=found.met,
        float32=in_float,
        all_int8=all_int8,
        int8=found.score,
        kept=found.kept,
        layers=len(trials.layers),
        trials=found.trials,
        added_bytes=serialized_bytes(int8) - serialized_bytes(full),
        added_ms=trials.added_ms(full, int8) if found.kept else 0.0,
    )
    (log.info if found.met else log.warning)("Kept in float: %s.", fallback.sentence())
    return Choice(trials.plans_with(found.kept), int8, fallback)


def quantize_within(
    module: nn.Module, recipe: StaticPTQ | DynamicPTQ, batches: Iterable[Any], score: Callable[[nn.Module], float], metric: str = "metric"
) -> tuple[nn.Module, Fallback]:
    """Quantize ``module`` so that a score falls by no more than ``recipe.max_accuracy_drop``; without a Trainer.

    Args:
        module: any float module; it is not changed.
        recipe: with a bound.
        batches: for calibration, as in :func:`qat_lightning.calibrate`; static quantization uses ``recipe.calibration_batches`` of them.
        score: measures the float module and int8 modules on the CPU, higher is better: accuracy on data kept apart for it.
        metric: name of the score.

    Returns:
        the int8 module, and what stays in float in it. Where the bound cannot be met these are the best that were found.

    Raises:
        ConfigurationError: the recipe has no bound or cannot have one, or there is nothing to quantize.
        CalibrationError: no batch, or NaN in one.
    """
    if not isinstance(recipe, StaticPTQ | DynamicPTQ) or recipe.max_accuracy_drop is None:
        raise ConfigurationError(f"Expected a StaticPTQ or DynamicPTQ with max_accuracy_drop, such as 0.005, but got {recipe!r}.")
    module = uncompiled_copy(module).cpu().eval()
    check_overrides(recipe, {"": module})
    check_fuse(recipe, {"": module})
    plans = {_ONLY_CHILD: make_plan(module, recipe)}
    require_layers(plans)
    limit = recipe.calibration_batches if isinstance(recipe, StaticPTQ) else RANKING_BATCHES
    root = nn.Module()
    root.add_module(_ONLY_CHILD, module)
    trials = Trials(
        module=root,
        plans=plans,
        recipe=recipe,
        batches=list(islice(batches, limit)),
        step=lambda parent, batch: as_call(batch).run(parent.get_submodule(_ONLY_CHILD)),
        prefix=f"{_ONLY_CHILD}.",
    )
    choice = fall_back(trials, lambda parent: score(parent.get_submodule(_ONLY_CHILD)), metric, recipe.max_accuracy_drop)
    return choice.int8.get_submodule(_ONLY_CHILD), choice.fallback


def max_drop_of(recipe: Recipe) -> float | None:
    """Return the bound of a recipe; None where it has none."""
    return recipe.max_accuracy_drop if isinstance(recipe, StaticPTQ | DynamicPTQ) else None
