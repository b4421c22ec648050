"""Walks through a calibrated module layer by layer, next to its float twin."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn

from qat_lightning.flows.surface import Surface
from qat_lightning.layerwise import LayerCase, Visit
from qat_lightning.observers import fake_quants
from qat_lightning.plan import Call

# What the activations of all batches may take between two layers; further batches are left out.
MEMORY = 4 * 2**30
# Layers of torch.ao, by name, since it may be absent.
WITH_RELU = ("ConvReLU1d", "ConvReLU2d", "ConvReLU3d", "LinearReLU")


def walk_traced(prepared: nn.Module, calls: Sequence[Call], visit: Visit, progress: bool) -> None:
    """Visit the layers in the order of the graph; see :class:`qat_lightning.flows.base.Flow`."""
    assert isinstance(prepared, fx.GraphModule)
    surface = Surface.found_on(prepared)
    walk_graph(prepared, [surface.positional(call.args, call.kwargs) for call in calls], visit, progress)


def walk_graph(prepared: fx.GraphModule, inputs: Sequence[tuple[Any, ...]], visit: Visit, progress: bool) -> None:
    """Visit the layers of a graph in the order in which they run; all batches pass each node together, so that it runs once.

    Args:
        prepared: calibrated, in eval mode.
        inputs: positional arguments of one batch each.
        visit: is given each layer that shares its weights with no other.
        progress: show a progress bar.
    """
    twin = float_twin(prepared)
    with torch.no_grad():
        pairs = [(_Lane(prepared, batch), _Lane(twin, batch)) for batch in inputs[: _affordable(prepared, inputs)]]
        nodes = list(zip(prepared.graph.nodes, twin.graph.nodes, strict=True))
        alone = _alone(prepared)
        for node, twin_node in _tracked(nodes, progress):
            if node.op == "call_module" and node.target in alone:
                layer = prepared.get_submodule(str(node.target))
                users: list[Any] = [prepared.get_submodule(str(user.target)) for user in node.users if user.op == "call_module"]
                clip = next((user.limits for user in users if len(node.users) == 1 and hasattr(user, "limits")), None)
                visit(
                    LayerCase(
                        name=str(node.target),
                        layer=layer,
                        twin=twin.get_submodule(str(node.target)),
                        inputs=[lane.env[node.args[0]] for lane, _ in pairs],
                        float_inputs=[lane.env[twin_node.args[0]] for _, lane in pairs],
                        limits=_limits(layer, clip),
                    )
                )
            for lane, twin_lane in pairs:
                lane.step(node)
                twin_lane.step(twin_node)


def walk_modules(prepared: nn.Module, calls: Sequence[Call], visit: Visit, progress: bool) -> None:
    """Visit the layers of a module that has no graph in the order in which they run; the module runs anew up to each of them.

    Args:
        prepared: calibrated, in eval mode.
        calls: a call of one batch each.
        visit: is given each layer that runs once per batch and shares its weights with no other.
        progress: show a progress bar.
    """
    twin = float_twin(prepared)
    with torch.no_grad():
        for name in _tracked(_layers_in_order(prepared, calls[0]), progress):
            layer: Any = prepared.get_submodule(name)
            visit(
                LayerCase(
                    name=name,
                    layer=layer,
                    twin=twin.get_submodule(name),
                    inputs=[_input_of(prepared, name, call) for call in calls],
                    float_inputs=[_input_of(twin, name, call) for call in calls],
                    limits=_limits(layer, getattr(getattr(layer, "activation_post_process", None), "limits", None)),
                )
            )


def float_twin(prepared: nn.Module) -> Any:
    """Return a copy that rounds nothing."""
    twin = copy.deepcopy(prepared)
    for fake_quant in fake_quants(twin):
        fake_quant.enable_observer(False)
        fake_quant.enable_fake_quant(False)
    return twin


def _alone(prepared: nn.Module) -> set[str]:
    """Return the names of the layers whose weights no other layer has: of shared weights, each call would undo what helps the other."""
    layers = {name: child for name, child in prepared.named_modules() if hasattr(child, "weight_fake_quant")}
    owners = Counter(id(child.weight) for child in layers.values())
    return {name for name, child in layers.items() if owners[id(child.weight)] == 1}


def _tracked(items: Sequence[Any], progress: bool) -> Any:
    return track(items, "Refining") if progress else items


def _limits(layer: Any, clip: tuple[float, float] | None) -> tuple[float, float]:
    low, high = clip or (-float("inf"), float("inf"))
    return (max(low, 0.0), high) if type(layer).__name__ in WITH_RELU else (low, high)


# --- graphs ------------------------------------------------------------------------------------------------------------------


class _Lane(fx.Interpreter):
    """One batch on its way through a graph, a node at a time."""

    def __init__(self, module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        super().__init__(module)
        self.args_iter = iter(inputs)

    def step(self, node: fx.Node) -> None:
        self.env[node] = self.run_node(node)
        for used_up in self.user_to_last_uses.get(node, ()):
            del self.env[used_up]

    def held(self) -> int:
        return sum(value.nbytes for value in self.env.values() if isinstance(value, Tensor))


def _affordable(prepared: fx.GraphModule, inputs: Sequence[tuple[Any, ...]]) -> int:
    """Return how many batches fit into memory, at least one."""
    lane, most = _Lane(prepared, inputs[0]), 1
    for node in prepared.graph.nodes:
        lane.step(node)
        most = max(most, lane.held())
    return max(1, min(len(inputs), MEMORY // (2 * most)))


# --- modules -----------------------------------------------------------------------------------------------------------------


class _Reached(Exception):
    """Stops a forward pass at a layer."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x


def _layers_in_order(prepared: nn.Module, call: Call) -> list[str]:
    """Return the names of the layers that run exactly once."""
    order: list[str] = []

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args: order.append(name)

    with _hooks({name: keep(name) for name, child in prepared.named_modules() if hasattr(child, "weight_fake_quant")}, prepared):
        call.run(prepared)
    alone = _alone(prepared)
    return [name for name in order if order.count(name) == 1 and name in alone]


def _input_of(module: nn.Module, name: str, call: Call) -> Tensor:
    def stop(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    with _hooks({name: stop}, module):
        try:
            call.run(module)
        except _Reached as reached:
            return reached.x
    raise AssertionError(f"{name} ran for the first batch, but not for this one")


@contextmanager
def _hooks(hooks: dict[str, Callable[..., None]], module: nn.Module) -> Iterator[None]:
    handles = [module.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
