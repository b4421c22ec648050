"""Exports a float module with ``torch.export`` and gives the graph its modules back.

An exported graph has an operation for each convolution, BatchNorm and dropout, with the mode of the export in it. Here those with
parameters or with a mode become calls of the user's own modules again, by the names they had: eps, momentum and p stay what they were,
``train()`` and ``eval()`` switch them, and state dicts keep their names.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from qat_lightning.errors import UnsupportedModelError
from qat_lightning.flows.blame import line_of_error, line_of_node, short_message
from qat_lightning.flows.surface import Surface
from qat_lightning.input_spec import leaves, rebuild
from qat_lightning.plan import STATIC_LAYERS, Plan

aten: Any = torch.ops.aten

# Operations of the layers and modes that become modules.
LAYERS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default, aten.conv1d.padding, aten.conv2d.padding)
DROPOUTS: dict[Any, type[_DropoutNd]] = {
    aten.dropout.default: nn.Dropout,
    aten.feature_dropout.default: nn.Dropout2d,
    aten.alpha_dropout.default: nn.AlphaDropout,
    aten.feature_alpha_dropout.default: nn.FeatureAlphaDropout,
}
CHECKS = ("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")
# In these no size of the example can be left: a graph of them alone takes any size that the layers take.
SIZE_FREE = (
    *("conv1d", "conv2d", "conv3d", "linear", "batch_norm", "relu", "hardtanh", "relu6", "hardswish", "hardsigmoid", "silu", "gelu"),
    *("sigmoid", "tanh", "leaky_relu", "elu", "mish", "clamp", "add", "sub", "mul", "div", "cat", "max_pool1d", "max_pool2d", "max_pool3d"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "mean", "flatten"),
    *("dropout", "feature_dropout", "alpha_dropout", "alias", "embedding", "layer_norm", "group_norm", "softmax", "permute", "transpose"),
    *("unsqueeze", "squeeze", "contiguous", "clone", "select", "chunk", "split"),
)
FRESH = ("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "empty_like", "arange")
VIEWS = ("view", "slice", "select", "unsqueeze", "squeeze", "permute", "transpose", "expand", "narrow", "detach", "as_strided", "t")


def export(module: nn.Module, plan: Plan) -> tuple[fx.GraphModule, "FlatSurface"]:
    """Return the graph of a float module in evaluation, over the module's own parameters, and what calls it.

    Args:
        module: is used up.
        plan: with an example of how the module is called.

    Raises:
        UnsupportedModelError: the module cannot be exported; names the line and the way out.
    """
    args, kwargs = _example(module, plan)
    program = _export(module, plan, args, kwargs)
    if plan.observer is None and _may_branch(module):
        _refuse_training_branches(module, plan, program, args, kwargs)
    graph_module = _with_own_tensors(program, module)
    _drop_checks(graph_module.graph)
    _functionalize(graph_module.graph)
    _give_modules_back(graph_module, module, plan)
    surface = FlatSurface(module, plan, program, graph_module.graph)
    return graph_module, surface


class FlatSurface(Surface):
    """What the user's code sees of a module that was exported: its arguments become a flat list of tensors, and the result what it was.

    Args:
        module: the float module.
        plan: how it is quantized.
        program: from ``torch.export``.
        graph: made from it; loses the inputs that are no tensors.
    """

    def __init__(self, module: nn.Module, plan: Plan, program: ExportedProgram, graph: fx.Graph) -> None:
        super().__init__(module, plan)
        assert plan.example is not None
        self.names = [spec.name for spec in plan.example]
        self.owner = type(module).__name__
        self.structure = _restructure(graph, program)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        any_size = _takes_any_size(module, graph)
        self.shapes = [_shape_of(node, program, any_size) for node in inputs]

    def register(self, module: fx.GraphModule) -> None:
        """Register the hooks that flatten and restore."""
        module.register_forward_pre_hook(self, with_kwargs=True)
        if self.structure is not None:
            module.register_forward_hook(self.restore)

    def restore(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Return the flat output of the graph in the structure that the user's forward returned."""
        assert self.structure is not None
        return pytree.tree_unflatten(list(output), self.structure)

    def positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the tensors in the arguments of a call, in the order of the graph's inputs.

        Raises:
            UnsupportedModelError: the call has other arguments or sizes than the one that was exported.
        """
        bound = self.bind(args, kwargs)
        tensors = [(name, leaf) for name, leaf in leaves(bound.args, bound.kwargs) if isinstance(leaf, Tensor)]
        if [name for name, _ in tensors] != self.names:
            raise self._other(f"the tensors {self.names}", f"{[name for name, _ in tensors]}")
        for index, (name, tensor) in enumerate(tensors):
            if not _fits(tensor, self.shapes[index]):
                raise self._other(f"{name} of shape {_shown(self.shapes[index])}", f"shape {tuple(tensor.shape)}")
        return tuple(tensor for _, tensor in tensors)

    def _other(self, there: str, here: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.owner} was exported for a call with {there}, but is called with {here}. Set `example_input_array` on the "
            f"LightningModule (or pass `example` to prepare) to a call as it will come, or use flow='fx'."
        )


# --- export ------------------------------------------------------------------------------------------------------------------


def _example(module: nn.Module, plan: Plan) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if plan.example is None:
        raise UnsupportedModelError(
            f"flow='pt2e' exports {type(module).__name__}, for which it needs an example of how it is called. Set `example_input_array` on "
            f"the LightningModule, or pass `example` to prepare: prepare(module, recipe, example=Call((x,), {{}}))."
        )
    try:
        args, kwargs = rebuild(plan.example)
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"flow='pt2e' cannot call {type(module).__name__}.forward with tensors alone ({error}): give other arguments a default."
        ) from error
    bound.apply_defaults()
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, (bound.args, dict(bound.kwargs)))  # type: ignore[no-any-return]


def _export(module: nn.Module, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool = False) -> ExportedProgram:
    shapes = ShapesCollection()  # type: ignore[no-untyped-call]
    assert plan.example is not None
    tensors = [leaf for _, leaf in leaves(args, kwargs) if isinstance(leaf, Tensor)]
    for tensor, spec in zip(tensors, plan.example, strict=True):
        # Tokens and masks come in any length; of images a dynamic size makes the export of some networks take minutes.
        free = [index for index, size in enumerate(spec.shape or ()) if size is None or (not tensor.is_floating_point() and size > 1)]
        if free:
            shapes[tensor] = {index: Dim.AUTO for index in free}
    modes = {child: child.training for child in module.modules()}
    try:
        with _without_fast_path(), _marking(module.train(training)), torch.enable_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise UnsupportedModelError(
            f"flow='pt2e' cannot export {type(module).__name__} at {line_of_error(error)}: {short_message(error)}. Use flow='eager', "
            f"which does not trace, or rewrite the line without Python control flow on tensors."
        ) from error
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Have attention computed by operations that can be trained, and whose linear layers are seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _marking(module: nn.Module) -> Iterator[None]:
    """Let modules that do nothing in evaluation leave a mark in the graph, by which they are found again: such as stochastic depth."""
    marked = [child for child in module.modules() if _is_user_leaf(child) and _mentions(type(child), {"training"})]
    for child in marked:
        vars(child)["forward"] = _marker(child.forward, child)
    try:
        yield
    finally:
        for child in marked:
            del vars(child)["forward"]


def _marker(forward: Callable[..., Any], child: nn.Module) -> Callable[..., Any]:
    def marked(x: Any, *args: Any, **kwargs: Any) -> Any:
        training = child.training
        child.training = False
        try:
            output = forward(x, *args, **kwargs)
        finally:
            child.training = training
        return aten.alias.default(x) if output is x and isinstance(x, Tensor) else forward(x, *args, **kwargs)

    return marked


def _is_user_leaf(child: nn.Module) -> bool:
    torchs = type(child).__module__.partition(".")[0] == "torch"
    return not torchs and not any(True for _ in child.children()) and not child._parameters and not child._buffers


def _mentions(kind: type[nn.Module], words: set[str]) -> bool:
    """Whether the code of a class outside torch uses one of the words."""
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] == "torch":
            continue
        for function in vars(base).values():
            if inspect.isfunction(function) and words & _names(function.__code__):
                return True
    return False


def _names(code: Any) -> set[str]:
    inner = (name for constant in code.co_consts if inspect.iscode(constant) for name in _names(constant))
    return {*code.co_names, *inner}


def _may_branch(module: nn.Module) -> bool:
    return any(_mentions(type(child), {"training"}) for child in module.modules() if not _is_user_leaf(child))


def _refuse_training_branches(
    module: nn.Module, plan: Plan, program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A graph has one side of ``if self.training``; refuse unless both sides are the same."""
    evaluated, trained = _operations(program), _operations(_export(module, plan, args, kwargs, training=True))
    for one, other in zip((*evaluated, None), (*trained, None), strict=False):
        if (one and one.target) != (other and other.target):
            line = line_of_node(one or other)  # type: ignore[arg-type]
            raise UnsupportedModelError(
                f"flow='pt2e' has one graph for training and evaluation, but {type(module).__name__}.forward branches on `self.training` "
                f"near {line}. Use flow='eager', recipe 'ptq' (which only needs evaluation), or move the branch out of the module."
            )


def _operations(program: ExportedProgram) -> list[fx.Node]:
    """Return the operations, without those that count the batches of BatchNorm."""
    counters = {name for name, buffer in program.graph_signature.inputs_to_buffers.items() if buffer.endswith("num_batches_tracked")}
    return [
        node
        for node in program.graph.nodes
        if node.op == "call_function" and not any(argument.name in counters for argument in node.all_input_nodes) and not _is_check(node)
    ]


# --- from the exported graph to one over the user's modules -------------------------------------------------------------------


def _with_own_tensors(program: ExportedProgram, module: nn.Module) -> fx.GraphModule:
    """Return the graph with the parameters, buffers and constants of the module in place of inputs."""
    signature, graph = program.graph_signature, fx.Graph()
    own = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    root = nn.Module()
    seen: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        name = str(node.target)
        if node.op == "placeholder" and name in own:
            _place(root, own[name], _tensor_at(module, own[name], program))
            seen[node] = graph.get_attr(own[name])
        elif node.op == "placeholder" and name in signature.inputs_to_lifted_tensor_constants:
            constant = f"constant_{len(seen)}"
            root.register_buffer(constant, program.constants[signature.inputs_to_lifted_tensor_constants[name]], persistent=False)
            seen[node] = graph.get_attr(constant)
        elif node.op == "output":
            mutations = len(node.args[0]) - len(signature.user_outputs)
            graph.output(tuple(_mapped(value, seen) for value in node.args[0][mutations:]))
        else:
            seen[node] = graph.node_copy(node, lambda argument: seen[argument])
    return fx.GraphModule(root, graph)


def _mapped(value: Any, seen: dict[fx.Node, fx.Node]) -> Any:
    return seen[value] if isinstance(value, fx.Node) else value


def _tensor_at(module: nn.Module, name: str, program: ExportedProgram) -> Tensor:
    path, _, last = name.rpartition(".")
    try:
        tensor = getattr(module.get_submodule(path), last)
    except AttributeError:
        tensor = program.state_dict.get(name, program.constants.get(name))
    assert isinstance(tensor, Tensor)
    return tensor


def _place(root: nn.Module, name: str, tensor: Tensor) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor)


def _drop_checks(graph: fx.Graph) -> None:
    """Remove what only checks sizes and dtypes."""
    for node in reversed(list(graph.nodes)):
        if _is_check(node) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(_has_effects)


def _is_check(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", "") in CHECKS


def _functionalize(graph: fx.Graph) -> None:
    """Turn operations in place into those that return a new tensor: fake-quant behind one would otherwise be bypassed."""
    for node in list(graph.nodes):
        source = node.args[0] if node.args else None
        if not _is_in_place(node) or not isinstance(source, fx.Node):
            continue
        if operation(source) in VIEWS:
            _refuse_writing_into(node, source)
            continue
        pure = getattr(getattr(aten, node.target._opname[:-1], None), node.target._overloadname, None)
        if pure is None:
            continue
        node.target = pure
        later = _behind(node)
        source.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _refuse_writing_into(node: fx.Node, source: fx.Node) -> None:
    """Refuse to write into a part of an activation; a tensor that the network has just made, such as a mask, may be filled in parts."""
    while operation(source) in VIEWS and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    if operation(source) not in FRESH:
        raise UnsupportedModelError(
            f"flow='pt2e' cannot round an activation that is written into in parts, at {line_of_node(node)}. Join the parts with torch.cat "
            f"or torch.where, or use flow='eager'."
        )


def _is_in_place(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", "")
    return node.op == "call_function" and name.endswith("_") and not name.endswith("__")


def _has_effects(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or _is_in_place(node)


def _behind(node: fx.Node) -> set[fx.Node]:
    found, current = set(), node.next
    while current.op != "root":
        found.add(current)
        current = current.next
    return found


def operation(node: fx.Node) -> str:
    """Return the name of the operation that a node calls, without namespace and overload; empty for anything else."""
    return str(getattr(node.target, "_opname", "")) if node.op == "call_function" else ""


def owner_of(node: fx.Node) -> str:
    """Return the qualified name of the module whose forward made the node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return re.sub(r"@\d+", "", str(path))


def _give_modules_back(graph_module: fx.GraphModule, module: nn.Module, plan: Plan) -> None:
    """Replace operations of layers that are planned, of BatchNorm, dropout and marked modules by calls of the user's modules."""
    modules, calls = dict(module.named_modules(remove_duplicate=False)), _Calls(graph_module)
    for node in list(graph_module.graph.nodes):
        path = owner_of(node)
        owner = modules.get(path)
        if _is_call_of(node, owner, planned=path in plan.layers):
            calls.replace(node, path, owner)
        elif node.target in DROPOUTS:
            calls.replace(node, f"{node.name}_module", DROPOUTS[node.target](p=node.args[1]))
        elif operation(node) in ("batch_norm", "rrelu") and plan.observer is None:
            raise UnsupportedModelError(
                f"flow='pt2e' exports what {operation(node)} does in evaluation, at {line_of_node(node)}, and training would do the same. "
                f"Use torch's own module, such as nn.BatchNorm2d, or recipe 'ptq', which does not train."
            )
    graph_module.graph.eliminate_dead_code(_has_effects)
    graph_module.graph.lint()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()


def _is_call_of(node: fx.Node, owner: nn.Module | None, planned: bool) -> bool:
    """Whether the node is all that the forward of a module does, so that a call of the module can take its place."""
    if operation(node) == "alias":
        return owner is not None and _is_user_leaf(owner)
    if type(owner) in STATIC_LAYERS:
        return planned and node.target in LAYERS
    if type(owner).__module__.partition(".")[0] != "torch":
        return False
    return (operation(node) == "batch_norm" and isinstance(owner, _BatchNorm)) or (
        node.target in DROPOUTS and isinstance(owner, _DropoutNd)
    )


class _Calls:
    """Calls of modules in a graph: the second and every later call of a module with tensors gets a copy that shares them."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.count: dict[str, int] = {}

    def replace(self, node: fx.Node, path: str, module: Any) -> None:
        self.count[path] = self.count.get(path, 0) + 1
        name, source = path, node.args[0]
        if getattr(module, "padding_mode", "zeros") != "zeros" and isinstance(source, fx.Node) and owner_of(source) == path:
            source = source.args[0]  # the module pads its input itself
        if self.count[path] > 1 and (module._parameters or module._buffers):
            name = f"{path}_call{self.count[path]}"
            module = _twin(module)
        _add(self.graph_module, name, module)
        with self.graph_module.graph.inserting_before(node):
            call = self.graph_module.graph.call_module(name, (source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        self.graph_module.graph.erase_node(node)


def _twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def _add(root: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root._modules.pop(last, None)
    root.add_module(last, module)


# --- arguments and results -----------------------------------------------------------------------------------------------------


def _restructure(graph: fx.Graph, program: ExportedProgram) -> pytree.TreeSpec | None:
    """Drop inputs that are no tensors, and let the graph return what forward returned; of a class that no graph can make, its structure."""
    for node in list(graph.nodes):
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor):
            if node.users:
                continue
            graph.erase_node(node)
    (output,) = (node for node in graph.nodes if node.op == "output")
    structure = program.call_spec.out_spec
    assert structure is not None
    value = pytree.tree_unflatten(list(output.args[0]), structure)
    if not _is_plain(value):
        return cast(pytree.TreeSpec, structure)
    output.args = (value,)
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return (type(value) in (list, tuple) or hasattr(value, "_fields")) and all(_is_plain(item) for item in value)
    return value is None or isinstance(value, fx.Node | int | float | str | bool)


Bounds = list[tuple[int, int]]
ENDLESS = 2**31


def _shape_of(node: fx.Node, program: ExportedProgram, any_size: bool) -> Bounds:
    """Return the smallest and largest size of each dimension of an input."""
    return [_bounds_of(size, program, any_size) for size in node.meta["val"].shape]


def _bounds_of(size: Any, program: ExportedProgram, any_size: bool) -> tuple[int, int]:
    if isinstance(size, int):
        return (0, ENDLESS) if any_size else (size, size)
    ranges = program.range_constraints.get(size.node.expr)
    if ranges is None:
        return 0, ENDLESS
    # Exports assume at least two; the operations do not.
    return 0 if ranges.lower <= 2 else int(ranges.lower), int(ranges.upper) if ranges.upper < ENDLESS else ENDLESS


def _fits(tensor: Tensor, bounds: Bounds) -> bool:
    return tensor.dim() == len(bounds) and all(low <= size <= high for size, (low, high) in zip(tensor.shape, bounds, strict=True))


def _shown(bounds: Bounds) -> str:
    sizes = [str(low) if low == high else "any" if (low, high) == (0, ENDLESS) else f"{low} to {high}" for low, high in bounds]
    return f"({', '.join(sizes)})"


def _takes_any_size(module: nn.Module, graph: fx.Graph) -> bool:
    """Whether nothing in the graph, and no branch of the user's code, can depend on the sizes of the example besides the first."""
    if any(_mentions(type(child), {"shape", "size"}) for child in module.modules()):
        return False
    return all(operation(node) in SIZE_FREE or node.target is getattr for node in graph.nodes if node.op == "call_function")
