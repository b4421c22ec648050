"""From a trained LightningModule to its int8 copy: rehearsed before training, carried out and measured after it."""

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from qat_lightning.backend import cpu_name
from qat_lightning.bn_reestimation import reestimate, tracked_norms
from qat_lightning.calibration import calibrate, refuse_nan
from qat_lightning.core import convert_planned, plan_of, prepare_planned, record_inputs
from qat_lightning.distributed import ALONE, Processes, alone, fail_together
from qat_lightning.equalization import Equalizer
from qat_lightning.errors import QuantizationError, UnsupportedModelError
from qat_lightning.evaluation import interleaved_medians, serialized_bytes
from qat_lightning.flows import get_flow
from qat_lightning.flows.blame import line_of_error, module_of_error, short_message
from qat_lightning.observers import apply_phase, check_ranges
from qat_lightning.parity import merge
from qat_lightning.plan import Call, Plan
from qat_lightning.recipe import QAT, DynamicPTQ, EqualizationName, Recipe, StaticPTQ
from qat_lightning.refinement import SAMPLES, refine_layers
from qat_lightning.report import LayerParity, LayerReport, Measurement, Report
from qat_lightning.running import clone, to_cpu_float
from qat_lightning.schedule import IDLE
from qat_lightning.signature import batch_size, describe, first_of_batch
from qat_lightning.targets import capture_calls

log = logging.getLogger(__name__)

PARITY_BATCHES = 2
# Kept in memory, since batches may be readable once only: 256 inputs in batches of 32, as in Nagel et al. 2019.
EQUALIZATION_BATCHES = 8


@dataclass(frozen=True)
class Baseline:
    """The model before quantization.

    Args:
        targets: float copies of the modules to quantize, on the CPU in eval mode.
        size_bytes: serialized size of the whole LightningModule.
    """

    targets: Mapping[str, nn.Module]
    size_bytes: int


def rehearse(name: str, module: nn.Module, plan: Plan, call: Call | None = None) -> None:
    """Carry prepare and convert out on a copy, and run the result where a call is given.

    Args:
        name: of the module, for the message.
        module: float, or prepared already.
        plan: how it is quantized.
        call: what the module was called with.

    Raises:
        QuantizationError: whatever would have gone wrong after training.
    """
    rehearsed = clone(module).cpu()
    try:
        rehearsed = _prepare_if_float(rehearsed, plan)
        if call is None:
            convert_planned(rehearsed, plan)
            return
        example = to_cpu_float(call)
        if plan.observer is not None:
            calibrate([rehearsed.eval()], [example], lambda one: one.run(rehearsed))
            refine_layers(rehearsed, plan, [example], bias_correction=True, adaround=None, progress=False)
        else:
            check_ranges(rehearsed, f"module {name!r}")
        rehearsed = convert_planned(rehearsed, plan)
        with torch.inference_mode():
            example.run(rehearsed)
    except QuantizationError:
        raise
    except Exception as error:
        other = "fx" if plan.flow == "eager" else "eager"
        owner = f"{name}.{module_of_error(error, rehearsed)}".rstrip(".")
        raise UnsupportedModelError(
            f"flow={plan.flow!r} cannot run {owner!r} in int8: at {line_of_error(error)}: {short_message(error)}. "
            f"Use flow={other!r}, or keep the part in float with `overrides`."
        ) from error


def quantize_copy(
    module: LightningModule,
    plans: Mapping[str, Plan],
    recipe: Recipe,
    batches: Iterable[Any],
    step: Callable[[Any], Any],
    baseline: Baseline,
    compare: bool = True,
    processes: Processes = ALONE,
) -> Report | None:
    """Swap the targets of ``module`` for int8 ones, and report.

    Args:
        module: a copy of the trained module, on the CPU in eval mode; on rank zero it becomes the int8 module.
        plans: of its targets, prepared already in QAT.
        recipe: what to do.
        batches: for calibration, parity and latency; the part of this process.
        step: runs one batch through ``module``.
        baseline: the float model.
        compare: measure parity.
        processes: of the run; all of them calibrate, rank zero converts while the others wait.

    Returns:
        the report, on rank zero.

    Raises:
        CalibrationError: no data, or NaN in it.
        QuantizationError: another process has failed.
    """
    prepared, first = prepare_targets(module, plans, recipe, batches, step, processes)
    with fail_together(processes):
        sample = first.batches()
        with alone():
            return _convert(module, prepared, plans, recipe, sample, step, baseline, compare) if processes.rank == 0 else None


def prepare_targets(
    module: nn.Module,
    plans: Mapping[str, Plan],
    recipe: Recipe,
    batches: Iterable[Any],
    step: Callable[[Any], Any],
    processes: Processes = ALONE,
    progress: bool = True,
) -> tuple[dict[str, nn.Module], "FirstBatches"]:
    """Equalize, prepare and calibrate the targets of ``module``, as far as the recipe wants it and they are not prepared already.

    Of targets that are prepared for QAT, rank zero measures the statistics of BatchNorm anew, where the recipe wants it.

    Args:
        module: a copy of the trained module, on the CPU in eval mode; it gets the prepared targets.
        plans: of its targets.
        recipe: what to do.
        batches: the part of this process.
        step: runs one batch through ``module``.
        processes: of the run.
        progress: show a progress bar, on rank zero.

    Returns:
        the targets by name, and the batches, of which the first are kept.

    Raises:
        CalibrationError: no data, or NaN in it.
    """
    if isinstance(recipe, StaticPTQ) and recipe.equalize is not None:
        reader = iter(batches)
        kept = list(islice(reader, min(EQUALIZATION_BATCHES, processes.part_of(recipe.calibration_batches))))
        with fail_together(processes):
            equalizers = _watched(module, plans, kept, step)
        _equalize(equalizers, recipe.equalize, processes)
        batches = chain(kept, reader)
    prepared = {name: _prepare_if_float(module.get_submodule(name), plan) for name, plan in plans.items()}
    for name, target in prepared.items():
        module.set_submodule(name, target.eval())
    first = FirstBatches(batches, PARITY_BATCHES, SAMPLES if isinstance(recipe, StaticPTQ) else 0)
    if isinstance(recipe, StaticPTQ):
        limit = processes.part_of(recipe.calibration_batches)
        calibrate(prepared.values(), first, step, limit, progress=progress and processes.rank == 0, processes=processes)
    if isinstance(recipe, QAT) and recipe.bn_reestimation_batches:
        with fail_together(processes):
            if processes.rank == 0:
                with alone():
                    _reestimate(prepared, islice(first, recipe.bn_reestimation_batches), step)
    return prepared, first


def _reestimate(prepared: Mapping[str, nn.Module], batches: Iterable[Any], step: Callable[[Any], Any]) -> None:
    """Measure the statistics of BatchNorm for what int8 will compute; without a batch they stay, for the training is not to be lost."""
    for target in prepared.values():
        apply_phase(target, IDLE)
    if not reestimate(prepared, batches, step) and tracked_norms(prepared):
        log.warning(
            "The training batches can be read once only: BatchNorm keeps its statistics. Give `calibration_data` to measure them anew."
        )


def refine_targets(
    prepared: Mapping[str, nn.Module], plans: Mapping[str, Plan], recipe: Recipe, calls: Mapping[str, Sequence[Call]], progress: bool = True
) -> None:
    """Refine the calibrated targets of a static quantization, as its recipe wants it; others are left alone.

    Args:
        prepared: targets by name, in eval mode.
        plans: of the targets.
        recipe: what to do.
        calls: how each is called.
        progress: show a progress bar.
    """
    if isinstance(recipe, StaticPTQ):
        for name, target in prepared.items():
            refine_layers(target, plans[name], calls[name], recipe.bias_correction, recipe.adaround, progress)


def _convert(
    module: LightningModule,
    prepared: Mapping[str, nn.Module],
    plans: Mapping[str, Plan],
    recipe: Recipe,
    sample: Sequence[Any],
    step: Callable[[Any], Any],
    baseline: Baseline,
    compare: bool,
) -> Report:
    if not isinstance(recipe, StaticPTQ):
        for name, target in prepared.items():
            apply_phase(target, IDLE)
            check_ranges(target, f"module {name!r}")
    calls = captured(prepared, sample, step)
    refine_targets(prepared, plans, recipe, calls)
    single = captured(prepared, [first_of_batch(sample[0])] if sample else [], step)
    int8 = {name: convert_planned(copy.deepcopy(target), plans[name]) for name, target in prepared.items()}
    parity = None if isinstance(recipe, DynamicPTQ) or not compare else _parity(prepared, int8, plans, calls)
    for name, target in int8.items():
        record_inputs(target, describe([*calls[name], *single[name]]), next(iter(single[name]), None))
        module.set_submodule(name, target)
    float_ms, int8_ms = latency(baseline.targets, int8, single)
    layers = tuple(_layers(int8, plans))
    return Report(
        recipe=recipe.name,
        flow=recipe.flow,
        backend=recipe.backend,
        quantized_modules=len(layers),
        float32=Measurement(size_bytes=baseline.size_bytes, latency_ms=float_ms),
        int8=Measurement(size_bytes=serialized_bytes(module), latency_ms=int8_ms),
        parity=parity,
        layers=layers,
        torch=torch.__version__,
        cpu=cpu_name(),
    )


def _watched(module: nn.Module, plans: Mapping[str, Plan], batches: Sequence[Any], step: Callable[[Any], Any]) -> dict[str, Equalizer]:
    """Return an equalizer of each target that has seen the batches."""
    targets = {name: module.get_submodule(name) for name in plans}
    equalizers: dict[str, Equalizer] = {}
    for index, batch in enumerate(batches):
        refuse_nan(batch, index)
        with alone():
            calls = captured(targets, [batch], step, limit=sys.maxsize)
        for name, call in ((name, call) for name, those in calls.items() for call in those):
            if name not in equalizers:
                opaque = [
                    path for path in plans[name].float_modules if path and any(True for _ in targets[name].get_submodule(path).children())
                ]
                equalizers[name] = Equalizer(targets[name], call, opaque)
            equalizers[name].observe(call)
    return equalizers


def _equalize(equalizers: Mapping[str, Equalizer], rule: EqualizationName, processes: Processes) -> None:
    for equalizer in equalizers.values():
        equalizer.merge(processes)
        equalizer.apply(rule)


class FirstBatches:
    """Batches that can be read once, of which the first few are kept.

    Args:
        source: the batches.
        count: how many are kept at least.
        samples: how many samples are kept at least.
    """

    def __init__(self, source: Iterable[Any], count: int, samples: int) -> None:
        self.source = source
        self.count = count
        self.samples = samples
        self.kept: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in self.source:
            if len(self.kept) < self.count or seen < self.samples:
                self.kept.append(batch)
                seen += batch_size(batch)
            yield batch

    def batches(self) -> list[Any]:
        """Return the first batches; they are read now if nobody has iterated."""
        return self.kept or list(islice(self, self.count))


def _prepare_if_float(module: nn.Module, plan: Plan) -> nn.Module:
    return module if plan.recipe == DynamicPTQ.name or plan_of(module) is not None else prepare_planned(module, plan)


def captured(
    targets: Mapping[str, nn.Module], batches: Sequence[Any], step: Callable[[Any], Any], limit: int | None = None
) -> dict[str, list[Call]]:
    """Return the first calls that the targets receive while ``step`` runs the batches: ``limit``, or as many as there are batches."""

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                step(batch)

    return capture_calls(targets, run, limit=limit or max(len(batches), 1))


def _parity(
    prepared: Mapping[str, nn.Module], int8: Mapping[str, nn.Module], plans: Mapping[str, Plan], calls: Mapping[str, list[Call]]
) -> tuple[LayerParity, ...]:
    found: list[LayerParity] = []
    with torch.inference_mode():
        for name, plan in plans.items():
            layers = get_flow(plan.flow).parity(prepared[name], int8[name], calls[name][:PARITY_BATCHES])
            found.extend(
                LayerParity(layer=full_name(name, entry.layer), max_steps=entry.max_steps, differing=entry.differing) for entry in layers
            )
    return merge(found)


def _layers(int8: Mapping[str, nn.Module], plans: Mapping[str, Plan]) -> Iterable[LayerReport]:
    for name, target in int8.items():
        for layer in get_flow(plans[name].flow).layers(target, plans[name]):
            yield replace(layer, layer=full_name(name, layer.layer))


def full_name(target: str, layer: str) -> str:
    """Return the layer's name in the LightningModule, without the parent that some targets are given."""
    return f"{target}.{layer}".replace(".wrapped", "")


def latency(
    floats: Mapping[str, nn.Module], int8: Mapping[str, nn.Module], calls: Mapping[str, list[Call]]
) -> tuple[float | None, float | None]:
    """Return the milliseconds that the targets take together, float and int8; None where there is nothing to run.

    Args:
        floats: targets by name; may lack some.
        int8: the other targets to time, in turns with the first.
        calls: how each is called.
    """
    called = [name for name in int8 if calls[name]]

    def run(modules: Mapping[str, nn.Module]) -> Callable[[], None]:
        def all_targets() -> None:
            for name in called:
                calls[name][0].run(modules[name])

        return all_targets

    if not called:
        return None, None
    if any(name not in floats for name in called):
        return None, interleaved_medians([run(int8)])[0]
    float_ms, int8_ms = interleaved_medians([run(floats), run(int8)])
    return float_ms, int8_ms
