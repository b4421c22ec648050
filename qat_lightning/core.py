"""Quantization as functions on modules, for whoever has no Trainer: prepare, calibrate, convert, quantize_dynamic."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.bn_reestimation import reestimate, tracked_norms
from qat_lightning.calibration import calibrate as run_calibration
from qat_lightning.compilation import inside, uncompiled_copy
from qat_lightning.errors import CalibrationError, ConfigurationError
from qat_lightning.flows import get_flow
from qat_lightning.modes import evaluating
from qat_lightning.observers import check_ranges
from qat_lightning.parity import merge
from qat_lightning.plan import Call, Plan, check_fuse, check_overrides, make_plan
from qat_lightning.recipe import AdaRound, DynamicPTQ, Recipe, StaticPTQ, parse_recipe
from qat_lightning.refinement import refine_layers
from qat_lightning.report import LayerParity
from qat_lightning.signature import Signature, first_of_call, widen
from qat_lightning.state import PreparedState, tensor_names
from qat_lightning.suitability import adapt
from qat_lightning.zero_scales import lift_zero_scales

_PREPARED = "prepared"
_INT8 = "int8"
_INPUTS = "inputs"
_EXAMPLE = "example"
_MARK = "_qat_lightning"


def prepare(module: nn.Module, recipe: Recipe | str, example: Call | None = None) -> nn.Module:
    """Return a copy of ``module`` with fake-quant and observers, all switched off.

    Args:
        module: any module; it is not changed.
        recipe: :class:`QAT` or :class:`StaticPTQ`, or its name.
        example: a call of the module; needed where an optional argument of ``forward`` is a tensor.

    Raises:
        ConfigurationError: nothing to quantize, an override without a match, a dynamic recipe, a recipe that equalizes.
        UnsupportedModelError: the flow cannot handle the module; names the line and a flow that can.
    """
    recipe = parse_recipe(recipe)
    if isinstance(recipe, DynamicPTQ):
        raise ConfigurationError("Dynamic quantization has nothing to prepare: use quantize_dynamic(module, recipe).")
    if isinstance(recipe, StaticPTQ) and recipe.equalize is not None:
        raise ConfigurationError(
            f"prepare sees no data, which equalize={recipe.equalize!r} needs: leave it out of the recipe, and prepare what "
            f"equalize(module, batches, rule={recipe.equalize!r}) returns."
        )
    module = uncompiled_copy(module)
    check_overrides(recipe, {"": module})
    check_fuse(recipe, {"": module})
    plan = make_plan(module, recipe, example=example)
    require_layers({"": plan})
    return prepare_planned(module, plan)


def calibrate(prepared: nn.Module, batches: Iterable[Any], limit: int | None = None, progress: bool = False) -> nn.Module:
    """Let the observers of ``prepared`` watch ``batches`` and switch fake-quant on; returns ``prepared``.

    Args:
        prepared: from :func:`prepare`.
        batches: inputs of the module: a tensor, a tuple of positional arguments or a mapping of keyword arguments each.
        limit: how many batches are used at most; None: all.
        progress: show a progress bar.

    Raises:
        CalibrationError: no batch, or NaN or infinite values.
        ConfigurationError: the module was not prepared.
    """
    bare = inside(prepared)
    require_prepared(bare)
    bare.eval()

    def step(batch: Any) -> None:
        call = as_call(batch)
        record_inputs(bare, widen(inputs_of(bare), call), example_of(bare) or first_of_call(call))
        call.run(bare)

    run_calibration([bare], batches, step, limit, progress)
    return prepared


def refine(
    prepared: nn.Module, batches: Iterable[Any], bias_correction: bool = True, adaround: AdaRound | None = None, progress: bool = False
) -> nn.Module:
    """Bring each layer of a calibrated module nearer to float, in place; returns ``prepared``.

    Args:
        prepared: from :func:`calibrate`, prepared by :class:`StaticPTQ`.
        batches: inputs of the module, as for :func:`calibrate`; all are held in memory, a few hundred samples are enough.
        bias_correction: shift the bias of each layer by the mean error of its output, per channel.
        adaround: settings of learned rounding; None rounds weights to nearest.
        progress: show a progress bar.

    Raises:
        CalibrationError: no batch, or a module that was not calibrated.
        ConfigurationError: the module was not prepared, or for QAT, whose layers refine themselves.
    """
    bare = inside(prepared)
    plan = require_prepared(bare)
    if plan.observer is None:
        raise ConfigurationError(
            f"refine is for post-training quantization, but the module was prepared by recipe {plan.recipe!r}: train it."
        )
    check_ranges(bare, "refine")
    calls = [as_call(batch) for batch in batches]
    if not calls:
        raise CalibrationError("refine got no batch: give it at least one of those of the calibration.")
    refine_layers(bare.eval(), plan, calls, bias_correction, adaround, progress)
    return prepared


def reestimate_batch_norm(module: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Measure the running statistics of every BatchNorm anew, in place; returns ``module``. See :mod:`qat_lightning.bn_reestimation`.

    Nothing else changes but the scales of weights that BatchNorm is fused with, since these weights are multiplied by its statistics.

    Args:
        module: in float, or from :func:`prepare` for :class:`QAT` and trained, on any device; without BatchNorm nothing happens.
        batches: inputs of the module, as for :func:`calibrate`, of at least two samples each.

    Raises:
        CalibrationError: no batch, NaN or infinite values, or a single value per channel; the statistics stay.
    """
    bare = inside(module)
    with evaluating(bare):
        count = reestimate({"": bare}, batches, lambda batch: as_call(batch).run(bare))
    if not count and tracked_norms({"": bare}):
        raise CalibrationError("BatchNorm re-estimation got no batch: give it at least one of the training data.")
    return module


def convert(prepared: nn.Module) -> nn.Module:
    """Return an int8 copy of ``prepared`` on the CPU; ``prepared`` itself is not changed.

    Args:
        prepared: from :func:`prepare`, trained or calibrated.

    Raises:
        ConfigurationError: the module was not prepared.
        CalibrationError: it was neither trained nor calibrated, or has seen NaN.
    """
    plan = require_prepared(inside(prepared))
    check_ranges(prepared, "convert")
    int8 = convert_planned(uncompiled_copy(prepared).cpu(), plan)
    record_inputs(int8, inputs_of(inside(prepared)), example_of(inside(prepared)))
    return int8


def quantize_dynamic(module: nn.Module, recipe: Recipe | str = "dynamic") -> nn.Module:
    """Return a copy of ``module`` on the CPU whose Linear, LSTM and GRU layers are quantized dynamically.

    Args:
        module: any module; it is not changed.
        recipe: :class:`DynamicPTQ`, or its name.

    Raises:
        ConfigurationError: nothing to quantize, an override without a match, another recipe.
    """
    recipe = parse_recipe(recipe)
    if not isinstance(recipe, DynamicPTQ):
        raise ConfigurationError(f"Expected a DynamicPTQ recipe, but got {recipe!r}: use prepare, calibrate and convert for it.")
    module = uncompiled_copy(module).cpu()
    check_overrides(recipe, {"": module})
    plan = make_plan(module, recipe)
    require_layers({"": plan})
    return convert_planned(module, plan)


def measure_parity(prepared: nn.Module, int8: nn.Module, batches: Sequence[Any]) -> tuple[LayerParity, ...]:
    """Compare a prepared module in eval mode with its int8 copy, layer by layer.

    Args:
        prepared: from :func:`prepare`, trained or calibrated, on the CPU.
        int8: from :func:`convert`.
        batches: inputs as in :func:`calibrate`.
    """
    plan = require_prepared(prepared)
    return merge(get_flow(plan.flow).parity(prepared.eval(), int8, [as_call(batch) for batch in batches]))


def as_call(batch: Any) -> Call:
    """Return a batch as the arguments of a module."""
    if isinstance(batch, Call):
        return batch
    if isinstance(batch, Mapping):  # a tokenizer's result is no dict
        return Call((), dict(batch))
    return Call(tuple(batch), {}) if isinstance(batch, list | tuple) else Call((batch,), {})


def prepare_planned(module: nn.Module, plan: Plan) -> nn.Module:
    """Prepare by a plan; the module is used up and its parameters live on in the result."""
    before = tensor_names(module)
    adapt(module)
    with torch.random.fork_rng(devices=[]):  # torch.ao draws initial weights for layers it then gives the user's weights
        prepared = get_flow(plan.flow).prepare(module, plan)
    lift_zero_scales(prepared)
    PreparedState(plan, before, prepared)
    return _mark(prepared, _PREPARED, plan)


def convert_planned(module: nn.Module, plan: Plan) -> nn.Module:
    """Convert a prepared module, or quantize a float one dynamically; the module lies on the CPU and is used up."""
    flow = get_flow(plan.flow)
    PreparedState.detach(module)
    with torch.random.fork_rng(devices=[]):
        int8 = flow.quantize_dynamic(module, plan) if plan.recipe == DynamicPTQ.name else flow.convert(module, plan)
    return _keep_engines(_mark(int8, _INT8, plan))


def plan_of(module: nn.Module) -> Plan | None:
    """Return the plan of a prepared module, None for any other."""
    return _read(module, _PREPARED)


def int8_plan_of(module: nn.Module) -> Plan | None:
    """Return the plan of an int8 module, None for any other."""
    return _read(module, _INT8)


def record_inputs(module: nn.Module, inputs: Signature | None, example: Call | None = None) -> None:
    """Keep what a prepared or int8 module is called with, and one such call."""
    _home(module)[_MARK][_INPUTS] = inputs
    _home(module)[_MARK][_EXAMPLE] = example


def inputs_of(module: nn.Module) -> Signature | None:
    """Return what a prepared or int8 module is called with; None where nobody saw a call."""
    inputs: Signature | None = _home(module)[_MARK].get(_INPUTS)
    return inputs


def example_of(module: nn.Module) -> Call | None:
    """Return a call of a prepared or int8 module with one sample; None where nobody kept one."""
    example: Call | None = _home(module)[_MARK].get(_EXAMPLE)
    return example


def require_layers(plans: dict[str, Plan]) -> None:
    """Refuse to quantize nothing.

    Raises:
        ConfigurationError: no plan has a layer.
    """
    if any(plan.layers for plan in plans.values()):
        return
    kinds = "Linear, LSTM or GRU" if any(plan.recipe == DynamicPTQ.name for plan in plans.values()) else "Conv1d, Conv2d, Conv3d or Linear"
    raise ConfigurationError(
        f"Nothing to quantize: {sorted(plans) if any(plans) else 'the module'} holds no {kinds} layer, or `overrides` keeps all in float. "
        f"Name modules that do with `modules`, or remove the overrides."
    )


def require_prepared(module: nn.Module) -> Plan:
    """Return the plan of a prepared module.

    Raises:
        ConfigurationError: the module was not prepared.
    """
    plan = plan_of(module)
    if plan is None:
        raise ConfigurationError(f"{type(module).__name__} was not prepared: call prepare(module, recipe) first.")
    return plan


def _keep_engines(int8: nn.Module) -> nn.Module:
    """Let copies of an int8 module have its kernels: torch packs the weights of a copy for whatever engine is set, which may overflow."""
    vars(int8)["__deepcopy__"] = partial(_copy_packed, int8)
    return int8


def _copy_packed(int8: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Do what ``copy.deepcopy`` does without this function, and pack the weights by the plan."""
    own = vars(int8).pop("__deepcopy__")
    try:
        copied = copy.deepcopy(int8, memo)
    finally:
        vars(int8)["__deepcopy__"] = own
    plan = int8_plan_of(copied)
    assert plan is not None  # both kinds of modules keep it in a copy
    get_flow(plan.flow).pack(copied, plan)
    return _keep_engines(copied)


def _mark(module: nn.Module, key: str, plan: Plan) -> nn.Module:
    _home(module)[_MARK] = {key: plan}
    return module


def _read(module: nn.Module, key: str) -> Plan | None:
    plan: Plan | None = _home(module).get(_MARK, {}).get(key)
    return plan


def _home(module: nn.Module) -> dict[str, Any]:
    # A GraphModule keeps nothing but its `meta` when it is copied.
    return module.meta if isinstance(module, fx.GraphModule) else vars(module)
