"""Runs the graph of a module with the labels of channels beside its values, and so finds which channels can be scaled together."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qat_lightning.backend import CONVOLUTIONS
from qat_lightning.equalization.labels import NOTHING, PINNED, Classes, Layer, Site, spread

DIMS = (1, 2, 3)
AVERAGES = tuple(getattr(nn, f"AdaptiveAvgPool{dims}d") for dims in DIMS)
POOLS = (*(getattr(nn, f"{kind}Pool{dims}d") for kind in ("Max", "Avg", "AdaptiveMax") for dims in DIMS), nn.Upsample)
# What the modules compute, by the name of the function.
MODULES: dict[type[nn.Module], str] = {
    **dict.fromkeys((*CONVOLUTIONS, nn.Linear), "layer"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "norm"),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU), "relu"),
    **dict.fromkeys((nn.ReLU6, nn.Hardtanh), "hardtanh"),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "clone"),
    **dict.fromkeys(POOLS, "max_pool2d"),
    **dict.fromkeys(AVERAGES, "adaptive_avg_pool2d"),
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle), "view"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "pad"),
}
MOVES = (
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "squeeze", "unsqueeze", "expand", "repeat"),
    *("cat", "concat", "concatenate", "stack", "chunk", "split", "tensor_split", "unbind", "getitem", "select", "narrow", "roll", "flip"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
)
METADATA = ("size", "dim", "getattr", "ndimension", "numel")
BINARY = ("input", "other", "alpha")


class Labeller(fx.Interpreter):
    """Finds the layers of a graph as producers and consumers of labels, and the sites whose ranges matter.

    Whatever it does not know pins the channels that it reads, and so does a layer that is called twice, shares its weight or has hooks.

    Args:
        module: a graph in eval mode; to be run once.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.classes = Classes()
        self.producers: list[Layer] = []
        self.consumers: list[Layer] = []
        self.sites: list[Site] = []
        self._labels: dict[fx.Node, Any] = {}
        self._uses = Counter(
            id(tensor) for node in module.graph.nodes if node.op in ("call_module", "get_attr") for tensor in self._own_tensors(node)
        )

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and keep the labels of its result."""
        value = super().run_node(n)
        name = self._name(n)
        if name in METADATA and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            return value
        handler = HANDLERS.get(name)
        labels = handler(self, n, value) if handler is not None else None
        if labels is None or (isinstance(labels, Tensor) and labels.dim() == 0):
            labels = None
            self._pin_inputs(n)
        self._labels[n] = labels
        return value

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            return "" if module._forward_hooks or module._forward_pre_hooks else MODULES.get(type(module), "")
        if node.op not in ("call_function", "call_method"):
            return ""
        return str(getattr(node.target, "__name__", node.target)).strip("_")

    def _own_tensors(self, node: fx.Node) -> list[Tensor]:
        found = self.fetch_attr(str(node.target))
        return list(found.parameters()) if isinstance(found, nn.Module) else [found]

    def _pin_inputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            for leaf in pytree.tree_leaves(self._labels.get(source)):
                if leaf is not None:
                    self.classes.pin(leaf)

    def _of(self, node: Any) -> Tensor | None:
        """Return the labels of an argument that is one tensor with labels."""
        labels = self._labels.get(node) if isinstance(node, fx.Node) else None
        return labels if isinstance(labels, Tensor) else None

    def _watch(self, node: fx.Node, value: fx.Node, axis: int, kind: str, bounds: tuple[float, float] = (-torch.inf, torch.inf)) -> None:
        self.sites.append(Site(node, value, axis, self.classes.vector(self._labels[value], axis), kind, bounds))

    # --- handlers: return the labels of the result, or None where it has none; then the arguments are pinned ----------------------

    def _layer(self, node: fx.Node, value: Tensor) -> Tensor | None:
        layer = self.fetch_attr(str(node.target))
        if self._is_shared(node) or "weight" not in layer._parameters:
            return None
        axis = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
        norm = self._norm_behind(node)
        source = _source(node)
        if (labels := self._of(source)) is not None:
            self.consumers.append(Layer(layer, self.classes.vector(labels, axis), norm=norm))
            self._watch(node, source, axis, "read")
            if not _takes_shift(layer, norm):
                self.classes.forbid_shift(labels)
        fresh = self.classes.new(value.shape[axis])
        self.producers.append(Layer(layer, fresh))
        if layer.bias is None:
            self.classes.forbid_shift(fresh)
        return spread(fresh, axis, value.shape)

    def _norm(self, node: fx.Node, value: Tensor) -> Tensor | None:
        norm = self.fetch_attr(str(node.target))
        if self._is_shared(node) or not norm.affine or norm.running_mean is None or value.dim() < 2:
            return None
        self._pin_inputs(node)
        source = _source(node)
        behind = self._name(source) == "layer" and len(source.users) == 1
        fresh = self.classes.new(norm.num_features)
        self.producers.append(Layer(norm, fresh, source=self.fetch_attr(str(source.target)) if behind else None))
        return spread(fresh, 1, value.shape)

    def _is_shared(self, node: fx.Node) -> bool:
        return any(self._uses[id(tensor)] > 1 for tensor in self._own_tensors(node))

    def _norm_behind(self, node: fx.Node) -> Any:
        """Return the BatchNorm that alone reads a layer, None where there is none that knows its statistics."""
        user = next(iter(node.users), None)
        if user is None or len(node.users) > 1 or self._name(user) != "norm" or self._is_shared(user):
            return None
        norm = self.fetch_attr(str(user.target))
        return norm if norm.running_mean is not None else None

    def _keep(self, node: fx.Node, value: Any) -> Tensor | None:
        return self._of(_source(node))

    def _rectify(self, node: fx.Node, value: Tensor) -> Tensor | None:
        labels = self._keep(node, value)
        if labels is not None:
            self._watch(node, _source(node), self.classes.axis(labels), "rectify")
        return labels

    def _clip(self, node: fx.Node, value: Tensor) -> Tensor | None:
        labels, (low, high) = self._keep(node, value), self._bounds(node)
        if labels is None or not low <= 0 <= high:
            return None
        self._watch(node, _source(node), self.classes.axis(labels), "clip", (low, high))
        return labels

    def _bounds(self, node: fx.Node) -> tuple[float, float]:
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            return module.min_val, module.max_val
        if self._name(node) == "relu6":
            return 0.0, 6.0
        defaults = (-1.0, 1.0) if self._name(node) == "hardtanh" else (None, None)
        names = (("min_val", "min"), ("max_val", "max"))
        given = [_argument(node, index + 1, names[index], defaults[index]) for index in (0, 1)]
        if any(isinstance(bound, fx.Node) for bound in given):
            return 1.0, -1.0
        return -torch.inf if given[0] is None else given[0], torch.inf if given[1] is None else given[1]

    def _pool(self, node: fx.Node, value: Any) -> Tensor | None:
        labels = self._keep(node, value)
        if labels is None or not isinstance(value, Tensor) or value.dim() != labels.dim() or value.shape[1] != labels.shape[1]:
            return None
        self.classes.forbid_shift(labels)
        return spread(self.classes.vector(labels, 1), 1, value.shape)

    def _average(self, node: fx.Node, value: Any) -> Tensor | None:
        labels = self._keep(node, value)
        if labels is None or value.dim() != labels.dim() or value.shape[1] != labels.shape[1]:
            return None
        return spread(self.classes.vector(labels, 1), 1, value.shape)

    def _mean(self, node: fx.Node, value: Tensor) -> Tensor | None:
        labels, dims, keepdim = self._keep(node, value), _argument(node, 1, ("dim", "axis")), _argument(node, 2, ("keepdim",), False)
        if labels is None or not isinstance(dims, int | tuple | list):
            return None
        high = labels.amax(dims, keepdim)
        self.classes.join(torch.where(labels == NOTHING, labels.amax(dims, True), labels).amin(dims, keepdim), high)
        if self._name(node) == "sum" or bool((labels == NOTHING).any()):
            self.classes.forbid_shift(labels)
        return high

    def _move(self, node: fx.Node, value: Any) -> Any:
        plain = [self.env[source] for source in node.all_input_nodes if self._labels.get(source) is None]
        tensors = [leaf for leaf in pytree.tree_leaves(plain) if isinstance(leaf, Tensor)]
        if len(plain) == len(node.all_input_nodes) or not all(leaf.is_floating_point() for leaf in tensors):
            return None  # the latter are indices

        def pinned(leaf: Any) -> Any:
            return torch.full(leaf.shape, float(PINNED), dtype=torch.float64) if isinstance(leaf, Tensor) else leaf

        def swap(source: fx.Node) -> Any:
            labels = self._labels.get(source)
            if labels is None:
                return pytree.tree_map(pinned, self.env[source])
            return pytree.tree_map(lambda leaf: leaf if leaf is None else leaf.contiguous(), labels)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), swap)
        return getattr(self, node.op)(node.target, args, kwargs)

    def _pad(self, node: fx.Node, value: Tensor) -> Any:
        if node.op == "call_function":
            zeros = _argument(node, 2, ("mode",), "constant") == "constant" and _argument(node, 3, ("value",)) in (None, 0, 0.0)
            if not zeros:
                return None
        if (labels := self._keep(node, value)) is not None:
            self.classes.forbid_shift(labels)
        return self._move(node, value)

    def _add(self, node: fx.Node, value: Tensor) -> Tensor | None:
        sources = [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
        labels = [own for source in sources if (own := self._of(source)) is not None]
        if len(labels) != 2 or node.kwargs:
            return None
        self.classes.join(*labels)
        for source, own in zip(sources, labels, strict=True):
            self.classes.forbid_shift(own)
            if own.shape == value.shape:
                self._watch(node, source, self.classes.axis(own), "read")
        one, other = (own.broadcast_to(value.shape) for own in labels)
        return torch.where(one == NOTHING, other, one)

    def _multiply(self, node: fx.Node, value: Tensor) -> Tensor | None:
        """Scale passes through one factor; the other one, such as a gate, keeps its own."""
        if len(node.args) < 2 or node.kwargs:
            return None
        factors = [self._of(argument) for argument in node.args[:2]]
        fits = [index for index, labels in enumerate(factors) if labels is not None and labels.shape == value.shape]
        if not fits or (fits[0] == 1 and "mul" not in self._name(node)):
            return None
        kept, other = factors[fits[0]], factors[1 - fits[0]]
        assert kept is not None
        if other is not None:
            self.classes.pin(other)
        self.classes.forbid_shift(kept)
        return kept


def _source(node: fx.Node) -> fx.Node:
    """Return the first argument of a node that is one."""
    return node.all_input_nodes[0]


def _takes_shift(layer: Any, norm: Any) -> bool:
    """Whether a constant can be added to the layer's input channels: no zeros are padded, and a bias or a BatchNorm takes the result."""
    padded = (
        not isinstance(layer, nn.Linear) and layer.padding_mode == "zeros" and layer.padding not in ("valid", (0,) * len(layer.kernel_size))
    )
    return not padded and (norm is not None or layer.bias is not None)


def _argument(node: fx.Node, index: int, names: tuple[str, ...], default: Any = None) -> Any:
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


HANDLERS: dict[str, Callable[[Labeller, fx.Node, Any], Any]] = {
    "layer": Labeller._layer,
    "norm": Labeller._norm,
    **dict.fromkeys(("relu", "leaky_relu", "prelu"), Labeller._rectify),
    **dict.fromkeys(("relu6", "hardtanh", "clamp", "clip"), Labeller._clip),
    **dict.fromkeys(("clone", "contiguous", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d"), Labeller._keep),
    **dict.fromkeys((f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max") for dims in DIMS), Labeller._pool),
    **dict.fromkeys(("interpolate", "upsample"), Labeller._pool),
    **dict.fromkeys((f"adaptive_avg_pool{dims}d" for dims in DIMS), Labeller._average),
    **dict.fromkeys(("mean", "sum"), Labeller._mean),
    **dict.fromkeys(MOVES, Labeller._move),
    "pad": Labeller._pad,
    **dict.fromkeys(("add", "iadd", "radd", "sub", "isub", "maximum", "minimum"), Labeller._add),
    **dict.fromkeys(("mul", "imul", "rmul", "div", "truediv", "itruediv"), Labeller._multiply),
}
