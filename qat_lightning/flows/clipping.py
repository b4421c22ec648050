"""Clips for free: ReLU6, Hardtanh and clamp as the saturation of the requantization that follows them.

An int8 layer writes its output into 8 bits, and what does not fit saturates. Where the range of the output ends at the limit of the
clip, saturation is the clip: the layer runs as one with a ReLU, or with nothing, behind it, and the observer of its output never sees
more than the limit. Otherwise the wide output would be quantized first and clipped after, which wastes most of the 256 steps.
Hardswish and hardsigmoid stay operations of their own, but are constant beyond -3 (and 3): their input needs no range out there.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.backend import CONVOLUTIONS
from qat_lightning.plan import STATIC_LAYERS, Plan

Limits: TypeAlias = tuple[float, float]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ADDITIONS = (operator.add, operator.iadd, torch.add)
CONSTANT_BEYOND: dict[Any, Limits] = {
    nn.Hardswish: (-3.0, float("inf")),
    F.hardswish: (-3.0, float("inf")),
    nn.Hardsigmoid: (-3.0, 3.0),
    F.hardsigmoid: (-3.0, 3.0),
}
"""Beyond these inputs the operation returns what it returns at them; hardswish is not constant above."""


@dataclass(frozen=True)
class Clip:
    """A clip that was taken out of a graph.

    Args:
        head: the module whose int8 output saturates: the layer in front of the clip, or the ReLU that took its place behind an addition.
        relu: name of the ReLU that took its place; None where nothing did.
        limits: of the clip.
    """

    head: str
    relu: str | None
    limits: Limits


def free_clips(plan: Plan) -> bool:
    """Whether saturation can clip: kernels saturate at 8 bits, so a range of 7 ends at half of where they do."""
    return all(layer.kernel.activation_bits == 8 for layer in plan.layers.values())


def limits_of(module: nn.Module) -> Limits | None:
    """Return the limits of a module that clips around zero, None for any other."""
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return _around_zero(module.min_val, module.max_val)
    return None


# --- taking clips out of a graph ---------------------------------------------------------------------------------------------


def take_clips(module: fx.GraphModule, plan: Plan) -> list[Clip]:
    """Take the clips out of a graph that the output of an int8 layer or addition can make; others stay.

    Args:
        module: the traced float module; clips at zero become ReLUs, which torch fuses, others vanish.
        plan: names the layers to quantize.
    """
    calls = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    clips = []
    for node in list(module.graph.nodes):
        limits = _limits_of_node(module, node)
        source = node.args[0] if node.args else None
        if limits is None or not isinstance(source, fx.Node) or len(source.users) > 1:
            continue
        head = _head(module, source, plan, once=lambda name: calls.count(name) == 1)
        if head is not None and (head or limits[0] == 0):
            clips.append(_take(module, node, source, head, limits))
    module.recompile()
    return clips


def _limits_of_node(module: fx.GraphModule, node: fx.Node) -> Limits | None:
    if node.op == "call_module":
        return limits_of(module.get_submodule(str(node.target)))
    if node.target is F.relu6:
        return 0.0, 6.0
    if node.target in (F.hardtanh, torch.nn.functional.hardtanh_):
        return _around_zero(*_arguments(node, min_val=-1.0, max_val=1.0))
    if node.target in (torch.clamp, torch.clip, "clamp", "clamp_", "clip", "clip_"):
        return _around_zero(*_arguments(node, min=None, max=None))
    return None


def _arguments(node: fx.Node, **defaults: Any) -> list[Any]:
    """Return the arguments behind the first, given by place or by name."""
    return [
        node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
        for place, (name, default) in enumerate(defaults.items(), start=1)
    ]


def _around_zero(low: Any, high: Any) -> Limits | None:
    """Return the limits if they are numbers with zero inside, which every quantized range has."""
    numbers = all(isinstance(limit, int | float) for limit in (low, high))
    return (float(low), float(high)) if numbers and low <= 0 < high else None


def _head(module: fx.GraphModule, source: fx.Node, plan: Plan, once: Callable[[str], bool]) -> str | None:
    """Return the layer whose output a clip behind ``source`` gets, an empty name for an addition, None where there is neither."""
    if source.op == "call_function" and source.target in ADDITIONS:
        return "" if all(isinstance(argument, fx.Node) for argument in source.args) else None
    if source.op != "call_module":
        return None
    layer, types = source, STATIC_LAYERS
    if isinstance(module.get_submodule(str(source.target)), BATCH_NORMS):
        before = source.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            return None
        layer, types = before, CONVOLUTIONS
    name = str(layer.target)
    fits = name in plan.layers and type(module.get_submodule(name)) in types and once(name) and once(str(source.target))
    return name if fits else None


def _take(module: fx.GraphModule, node: fx.Node, source: fx.Node, head: str, limits: Limits) -> Clip:
    relu = None
    if limits[0] == 0:
        relu = f"{node.name}_relu"
        module.add_submodule(relu, nn.ReLU().train(module.training))
        with module.graph.inserting_after(node):
            replacement = module.graph.call_module(relu, (source,))
        node.replace_all_uses_with(replacement)
    else:
        node.replace_all_uses_with(source)
    module.graph.erase_node(node)
    return Clip(head or str(relu), relu, limits)


# --- giving them to the fake-quant that saturates ----------------------------------------------------------------------------


def give_limits(prepared: fx.GraphModule, clips: list[Clip]) -> None:
    """Give each clip to the fake-quant behind its layer; one that torch has not fused becomes a clip again."""
    nodes = {str(node.target): node for node in prepared.graph.nodes if node.op == "call_module"}
    for clip in clips:
        fused = clip.relu is None or clip.relu not in nodes or clip.head == clip.relu
        node = nodes.get(clip.head if fused else str(clip.relu))
        fake_quant = None if node is None else _sole_fake_quant(prepared, node)
        if fused and fake_quant is not None:
            fake_quant.limits = clip.limits
        elif node is not None:
            _clip_again(prepared, node, clip)
    for fake_quant, limits in _constant_beyond(prepared):
        fake_quant.limits = limits
    prepared.recompile()


def _sole_fake_quant(prepared: fx.GraphModule, node: fx.Node) -> Any:
    """Return the fake-quant that alone takes the output of ``node``, None where there is no such."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    module = prepared.get_submodule(str(user.target)) if user.op == "call_module" else None
    return module if hasattr(module, "limits") else None


def _clip_again(prepared: fx.GraphModule, node: fx.Node, clip: Clip) -> None:
    if clip.relu is not None and node.target == clip.relu:
        prepared.set_submodule(clip.relu, nn.Hardtanh(*clip.limits))
        return
    with prepared.graph.inserting_after(node):
        clipped = prepared.graph.call_function(F.hardtanh, (node, *clip.limits))
    node.replace_all_uses_with(clipped, delete_user_cb=lambda user: user is not clipped)


def _constant_beyond(prepared: fx.GraphModule) -> Iterator[tuple[Any, Limits]]:
    """Yield the fake-quants whose output goes to operations that are constant beyond some input, and nowhere else."""
    for node in prepared.graph.nodes:
        fake_quant = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if fake_quant is None or not hasattr(fake_quant, "limits") or fake_quant.limits is not None:
            continue
        beyond = [CONSTANT_BEYOND.get(_kind(prepared, user)) for user in node.users]
        known = [limits for limits in beyond if limits is not None]
        if known and len(known) == len(beyond):
            yield fake_quant, (min(low for low, _ in known), max(high for _, high in known))


def _kind(prepared: fx.GraphModule, node: fx.Node) -> Any:
    return type(prepared.get_submodule(str(node.target))) if node.op == "call_module" else node.target
