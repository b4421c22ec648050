"""Decides where the activations of an exported graph are rounded to uint8, and puts fake-quant there.

The output of each layer, and of additions, products and concatenations that touch one, lies on a grid of its own; so does whatever
else a layer reads. Operations that only move or select numbers keep the grid of their input. A BatchNorm behind a layer becomes part of
it, and so does the activation that alone takes its output: only what comes out of both is rounded. ReLU and other clips cost nothing:
they are limits of the fake-quant, see :mod:`qat_lightning.flows.clipping`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from qat_lightning.flows.clipping import Limits
from qat_lightning.flows.exporting import operation, owner_of
from qat_lightning.flows.fake_quant import (
    OBSERVERS,
    ActivationFakeQuantize,
    CalibratedFakeQuantize,
    TrainingFakeQuantize,
    choose_observer,
    limit_bits,
)
from qat_lightning.flows.quantized_layers import with_fake_quant
from qat_lightning.flows.sharing import original
from qat_lightning.plan import STATIC_LAYERS, LayerPlan, Plan

ENDLESS = float("inf")
# What has one output for two grids or more.
JOINING = ("add", "mul", "cat")
# What an int8 layer can compute before it rounds its output.
ACTIVATIONS = ("hardswish", "hardsigmoid", "silu", "gelu", "sigmoid", "tanh", "leaky_relu", "elu", "mish")
# What moves or selects numbers, besides the calls of modules that do.
MOVING = (
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "squeeze", "unsqueeze", "contiguous", "clone", "alias"),
    *("expand", "slice", "select", "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "narrow", "index_select", "movedim"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "relu", "roll"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "repeat", "detach", "getitem", "flip"),
)
CONSTANT_BEYOND: dict[str, Limits] = {"hardswish": (-3.0, ENDLESS), "hardsigmoid": (-3.0, 3.0)}
"""As in :mod:`qat_lightning.flows.clipping`."""


def planned_layer(plan: Plan, name: str) -> LayerPlan | None:
    """Return the plan of the layer, also where the module has been given a parent or is the copy for a second call."""
    own = original(name).removeprefix("wrapped").removeprefix(".")
    return plan.layers.get(name) or plan.layers.get(original(name)) or plan.layers.get(own)


def annotate(graph_module: fx.GraphModule, plan: Plan) -> None:
    """Put fake-quant into a graph, in place.

    Args:
        graph_module: from :func:`qat_lightning.flows.exporting.export`.
        plan: names the layers.
    """
    _Annotation(graph_module, plan).run()


class _Annotation:
    def __init__(self, graph_module: fx.GraphModule, plan: Plan) -> None:
        self.module, self.plan = graph_module, plan
        # The node that rounds, of each node that is rounded: itself where it moves what is rounded.
        self.rounded: dict[fx.Node, fx.Node] = {}
        self.count = 0

    def run(self) -> None:
        for node in list(self.module.graph.nodes):
            if node._erased or node in self.rounded or node.op in ("placeholder", "output", "get_attr"):
                continue
            planned = self._planned(node)
            if planned is not None:
                self._layer(node, planned)
            elif self._joins(node):
                self._join(node)
            elif self._moves(node) and node.args[0] in self.rounded:
                self.rounded[node] = node
        for node in self.module.graph.nodes:
            node.meta = {key: value for key, value in node.meta.items() if key == "stack_trace"}
        self.module.delete_all_unused_submodules()
        self.module.graph.lint()
        self.module.recompile()

    # --- kinds of nodes ------------------------------------------------------------------------------------------------------

    def _planned(self, node: fx.Node) -> LayerPlan | None:
        if node.op != "call_module" or type(self._called(node)) not in STATIC_LAYERS:
            return None
        return planned_layer(self.plan, str(node.target))

    def _called(self, node: fx.Node) -> Any:
        return self.module.get_submodule(str(node.target))

    def _joins(self, node: fx.Node) -> bool:
        """Whether the node joins tensors, one of which is rounded, and lies outside of what stays in float."""
        if operation(node) not in JOINING or not _is_float(node) or self._stays_float(node):
            return False
        inputs = list(_tensors(node))
        enough = len(inputs) > 1 and all(source.op != "get_attr" and _is_float(source) for source in inputs)
        return enough and any(source in self.rounded for source in inputs)

    def _stays_float(self, node: fx.Node) -> bool:
        path = owner_of(node)
        return any(name == "" or path == name or path.startswith(f"{name}.") for name in self.plan.float_modules)

    def _moves(self, node: fx.Node) -> bool:
        if not node.args or not isinstance(node.args[0], fx.Node):
            return False
        if node.op == "call_module":
            called = self._called(node)
            return isinstance(called, _DropoutNd) or (not isinstance(called, (*STATIC_LAYERS, _BatchNorm)) and not any(called.children()))
        if operation(node) == "pad":
            return bool(_arguments(node, pad=None, mode="constant", value=None)[1:] in (["constant", None], ["constant", 0]))
        return operation(node) in MOVING or getattr(node.target, "__name__", "") == "getitem"

    # --- rounding ------------------------------------------------------------------------------------------------------------

    def _layer(self, node: fx.Node, planned: LayerPlan) -> None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        grid = self._read(node, source)
        if planned.kernel.activation_bits < 8:
            limit_bits(self._grid_of(grid), planned.kernel.activation_bits)
        last = self._fuse(node, planned)
        last, limits = self._tail(last)
        choose_observer(self._round(last, limits), planned.observer)

    def _join(self, node: fx.Node) -> None:
        for source in list(_tensors(node)):
            self._read(node, source)
        last, limits = self._clips(node)
        self._round(last, limits)

    def _read(self, reader: fx.Node, source: fx.Node) -> fx.Node:
        """Have a node read ``source`` from a grid, and return what it reads."""
        if source not in self.rounded:
            self._insert(source, None)
        grid = self.rounded[source]
        if grid is not source:
            reader.replace_input_with(source, grid)
        return grid

    def _round(self, node: fx.Node, limits: Limits | None) -> ActivationFakeQuantize:
        """Have everybody read ``node`` from a grid."""
        fake_quant, grid = self._insert(node, limits)
        node.replace_all_uses_with(grid, delete_user_cb=lambda user: user is not grid)
        self.rounded[grid] = grid
        beyond = [CONSTANT_BEYOND.get(operation(user)) for user in grid.users]
        known = [limit for limit in beyond if limit is not None]
        if limits is None and known and len(known) == len(beyond):
            fake_quant.limits = (min(low for low, _ in known), max(high for _, high in known))
        return fake_quant

    def _insert(self, node: fx.Node, limits: Limits | None) -> tuple[ActivationFakeQuantize, fx.Node]:
        observer = None if self.plan.observer is None else OBSERVERS[self.plan.observer](255)
        fake_quant = TrainingFakeQuantize() if observer is None else CalibratedFakeQuantize(observer)
        fake_quant.limits = limits
        name = f"activation_post_process_{self.count}"
        self.count += 1
        self.module.add_submodule(name, fake_quant)
        with self.module.graph.inserting_after(node):
            grid = self.module.graph.call_module(name, (node,))
        grid.meta = {key: value for key, value in node.meta.items() if key in ("val", "nn_module_stack")}
        self.rounded[node] = self.rounded[grid] = grid
        return fake_quant, grid

    def _grid_of(self, node: fx.Node) -> Any:
        """Return the fake-quant whose grid a node lies on."""
        while node.op != "call_module" or not isinstance(self._called(node), ActivationFakeQuantize):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node = source
        return self._called(node)

    # --- what becomes part of a layer -------------------------------------------------------------------------------------------

    def _fuse(self, node: fx.Node, planned: LayerPlan) -> fx.Node:
        """Give a layer its fake-quant, and the BatchNorm that alone takes its output; return the node behind which both lie."""
        layer, user = self._called(node), _only_user(node)
        norm = self._called(user) if user is not None and user.op == "call_module" else None
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None or not self._fits(layer, norm):
            norm = None
        if norm is not None:
            assert user is not None
            if self.plan.observer is not None:
                fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
                layer, norm = _named_alike(fuse(layer.eval(), norm.eval()), layer), None
            user.replace_all_uses_with(node)
            self.module.graph.erase_node(user)
            self.module.delete_submodule(str(user.target))
        self.module.set_submodule(str(node.target), with_fake_quant(layer, planned, norm))
        return node

    def _fits(self, layer: Any, norm: Any) -> bool:
        """Whether BatchNorm has the channels of the layer: behind a linear layer in three dimensions it has those of the second."""
        return bool(norm.num_features == layer.weight.shape[0])

    def _tail(self, node: fx.Node) -> tuple[fx.Node, Limits | None]:
        """Return the last node of a layer and the limits of its output; clips vanish from the graph."""
        last, limits = self._clips(node)
        user = _only_user(last)
        if limits is None and user is not None and operation(user) in ACTIVATIONS and user.args[0] is last:
            return user, None
        return last, limits

    def _clips(self, node: fx.Node) -> tuple[fx.Node, Limits | None]:
        user = _only_user(node)
        limits = None if user is None else limits_of(user)
        if user is None or limits is None:
            return node, None
        user.replace_all_uses_with(node)
        self.module.graph.erase_node(user)
        return node, limits


def _named_alike(fused: nn.Module, layer: nn.Module) -> nn.Module:
    fused.training = layer.training
    return fused


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _tensors(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the tensors that a node joins."""
    first = node.args[0]
    sources = first if isinstance(first, list | tuple) else node.args[:2]
    yield from (source for source in sources if isinstance(source, fx.Node))


def limits_of(node: fx.Node) -> Limits | None:
    """Return the limits of an operation that clips around zero, None for any other."""
    name = operation(node)
    if name == "relu":
        return 0.0, ENDLESS
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        return _around_zero(*_arguments(node, min_val=-1.0, max_val=1.0))
    if name == "clamp":
        return _around_zero(*_arguments(node, min=None, max=None))
    return None


def _arguments(node: fx.Node, **defaults: Any) -> list[Any]:
    return [
        node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
        for place, (name, default) in enumerate(defaults.items(), start=1)
    ]


def _around_zero(low: Any, high: Any) -> Limits | None:
    """Return the limits if they are numbers with zero inside, which every quantized range has."""
    if low is None and high is None:
        return None
    low, high = -ENDLESS if low is None else low, ENDLESS if high is None else high
    numbers = all(isinstance(limit, int | float) for limit in (low, high))
    return (float(low), float(high)) if numbers and low <= 0 < high else None
