"""The eager flow: eager mode of ``torch.ao.quantization``. Swaps modules and traces nothing; functional operations stay float.

The target's inputs are quantized and its outputs dequantized at its border, so the user writes no stubs; stubs that a network already
has are used instead. A layer that stays float inside is surrounded by a dequantization and a quantization.
"""

import copy
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.ao.nn.quantized import FloatFunctional, QFunctional
from torch.ao.quantization import (
    DeQuantStub,
    FakeQuantizeBase,
    QuantStub,
    fuse_modules,
    fuse_modules_qat,
    get_default_static_quant_module_mappings,
    prepare_qat,
)
from torch.ao.quantization import convert as torch_convert
from torch.ao.quantization import (
    quantize_dynamic as torch_quantize_dynamic,
)
from torch.ao.quantization.quantization_mappings import DEFAULT_MODULE_TO_ACT_POST_PROCESS
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from qat_lightning.backend import RECURRENT, TRANSPOSED, engine
from qat_lightning.deprecation import quiet
from qat_lightning.errors import UnsupportedModelError
from qat_lightning.flows.base import Parent, with_parent
from qat_lightning.flows.blame import line_of_node
from qat_lightning.flows.clipping import Limits, free_clips, limits_of
from qat_lightning.flows.torch_ao import (
    STATELESS_TYPES,
    choose_observer,
    dynamic_qconfig,
    initialize,
    layer_reports,
    limit_activation,
    load_portable_state,
    pack,
    portable_state,
    reference_of,
    static_qconfig,
)
from qat_lightning.flows.walking import walk_modules
from qat_lightning.fusion import Group, check_groups, find_groups
from qat_lightning.layerwise import Visit
from qat_lightning.models.layers import Add
from qat_lightning.observers import fake_quants
from qat_lightning.parity import Reference, compare
from qat_lightning.plan import Call, Plan
from qat_lightning.report import LayerParity, LayerReport

log = logging.getLogger(__name__)

__all__ = ["convert", "layers", "load_portable_state", "pack", "parity", "portable_state", "prepare", "quantize_dynamic", "walk"]

# torch.ao would swap them, but has no fake-quant for their weights: training and parity would not see their rounding.
FLOAT_TYPES: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, *RECURRENT, *TRANSPOSED, *STATELESS_TYPES)
# Layers that move or select values without computing new ones: on int8 they return what fake-quant returned.
EXACT_TYPES: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle),
    *(QuantStub, DeQuantStub, FloatFunctional),
)
UNSUPPORTED_FUNCTIONS: frozenset[Any] = frozenset(
    {
        *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv, operator.matmul),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat, torch.stack, torch.matmul, torch.bmm, torch.einsum),
        *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.batch_norm, F.layer_norm, F.softmax, F.gelu, F.silu, F.pad),
        *(F.scaled_dot_product_attention,),
    }
)
UNSUPPORTED_METHODS = frozenset({"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "matmul", "bmm", "softmax"})
SHAPE_METHODS = frozenset({"size", "dim", "numel", "shape", "ndim", "device", "dtype"})


class FunctionalAdd(nn.Module):
    """The residual addition with a fake-quant of its own, in place of :class:`qat_lightning.models.layers.Add`."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        self.relu = relu
        self.functional = FloatFunctional()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a + b``, clipped at zero where ``relu`` is set."""
        return self.functional.add_relu(a, b) if self.relu else self.functional.add(a, b)


def prepare(module: nn.Module, plan: Plan) -> nn.Module:
    """Fuse, add stubs and insert fake-quant; see :class:`qat_lightning.flows.base.Flow`."""
    training = module.training
    if "" in plan.layers or isinstance(module, nn.Sequential):  # a Sequential would call the stub as its last layer
        module, plan = with_parent(module, plan)
    refuse_functional_arithmetic(module, plan)
    _swap_additions(module)
    module.train(plan.observer is None)
    with quiet():
        limits = _fuse(module, plan)
        _set_qconfigs(module, plan)
        _add_stubs(module, plan)
        prepared = prepare_qat(module.train(), inplace=True)
    for name, limit in limits.items():
        cast(Any, prepared.get_submodule(name)).activation_post_process.limits = limit
    for stub in _stubs_of_wish(prepared, plan):
        stub.activation_post_process.may_stay_empty = True
    if any(layer.kernel.activation_bits < 8 for layer in plan.layers.values()):
        for fake_quant in fake_quants(prepared):  # without a graph nobody knows which output feeds which layer
            limit_activation(fake_quant, 7)
    for name, layer in plan.layers.items():
        choose_observer(getattr(prepared.get_submodule(name), "activation_post_process", None), layer.observer)
    initialize(prepared)
    return cast(nn.Module, prepared.train(training))


def convert(prepared: nn.Module, plan: Plan) -> nn.Module:
    """Swap in the int8 layers; see :class:`qat_lightning.flows.base.Flow`."""
    with quiet(), engine(plan.backend):
        int8 = torch_convert(prepared.eval(), inplace=True)
    pack(int8, plan)
    return cast(nn.Module, int8)


def quantize_dynamic(module: nn.Module, plan: Plan) -> nn.Module:
    """Swap in dynamic int8 layers; see :class:`qat_lightning.flows.base.Flow`."""
    module.eval()
    if "" in plan.layers:
        module, plan = with_parent(module, plan)
    read = _layers_read(module, plan)
    if read:
        log.warning("%d layers stay in float, for forward reads their weights in place of calling them, from %r on.", len(read), read[0])
    qconfigs = {name: dynamic_qconfig(layer) for name, layer in plan.layers.items() if name not in read}
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer):
            child.activation_relu_or_gelu = 0  # what its fused kernel, which reads float weights, asks for
    with quiet(), engine(plan.backend):
        int8 = torch_quantize_dynamic(module, qconfigs, inplace=True)
    pack(int8, plan)
    return cast(nn.Module, int8)


def _layers_read(module: nn.Module, plan: Plan) -> list[str]:
    """Return the layers whose weight forward hands to a function, as attention does: an int8 layer has no such weight.

    Of a module that cannot be traced there are none.
    """
    traced = _traced(copy.deepcopy(module), plan)  # forward may keep what it is given
    owners = {str(node.target).rpartition(".")[0] for node in traced if node.op == "get_attr"}
    return [name for name in plan.layers if name in owners]


def layers(int8: nn.Module, plan: Plan) -> Iterator[LayerReport]:
    """Yield the layers that run in int8."""
    return layer_reports(int8, plan)


def parity(prepared: nn.Module, int8: nn.Module, calls: Sequence[Call]) -> list[LayerParity]:
    """Compare fake-quant and int8 module by module; see :class:`qat_lightning.flows.base.Flow`."""
    found: list[LayerParity] = []
    for call in calls:
        references = _record(prepared, call)
        found.extend(_follow(int8, call, references))
    return found


def walk(prepared: nn.Module, calls: Sequence[Call], visit: Visit, progress: bool) -> None:
    """Visit the layers in the order in which they run; see :class:`qat_lightning.flows.base.Flow`."""
    walk_modules(prepared, calls, visit, progress)


# --- what eager mode cannot run ----------------------------------------------------------------------------------------------


def refuse_functional_arithmetic(module: nn.Module, plan: Plan) -> None:
    """Refuse a forward that adds, multiplies or concatenates tensors: on int8 tensors those operations do not exist.

    A module that cannot be traced is let through; its first batch shows whether it runs.

    Raises:
        UnsupportedModelError: names the line.
    """
    for node in _traced(module, plan):
        if _is_arithmetic(node) and any(_holds_tensor(argument) for argument in node.all_input_nodes):
            raise UnsupportedModelError(
                f"flow='eager' cannot run {_operation(node)!r} on int8 tensors in {_owner(node, module)} at {line_of_node(node)}. "
                f"Use flow='fx', which quantizes functional operations; or write it as a module "
                f"(qat_lightning.models.Add for a residual addition, torch.ao.nn.quantized.FloatFunctional for others)."
            )


def _traced(module: nn.Module, plan: Plan) -> list[fx.Node]:
    """Return the operations of forward; none where it cannot be traced."""
    tracer = _StubTracer(plan.float_modules)
    tracer.record_stack_traces = True
    try:
        return list(tracer.trace(module).nodes)
    except Exception:  # the user's forward may raise anything when it is given a proxy
        return []


class _StubTracer(fx.Tracer):
    """Traces into user code, not into layers of torch, containers that stay float or the functional modules of eager mode."""

    def __init__(self, float_modules: tuple[str, ...]) -> None:
        super().__init__()
        self.float_modules = float_modules
        self.owners: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        inside = any(module_qualified_name == name or module_qualified_name.startswith(f"{name}.") for name in self.float_modules)
        return inside or isinstance(m, Add | FloatFunctional) or super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta["owner"] = self.scope.module_path
        return node


def _is_arithmetic(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in UNSUPPORTED_FUNCTIONS and "functional_modules.py" not in (node.stack_trace or "")
    return node.op == "call_method" and node.target in UNSUPPORTED_METHODS


def _holds_tensor(node: fx.Node) -> bool:
    """Whether the value of a node is a tensor, as far as a graph tells: not a size, nor what is computed from sizes."""
    if node.op == "call_method" and node.target in SHAPE_METHODS:
        return False
    if node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_METHODS:
        return False
    if node.op in ("placeholder", "call_module", "get_attr"):
        return True
    return any(_holds_tensor(source) for source in node.all_input_nodes)


def _operation(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else node.target.__name__


def _owner(node: fx.Node, module: nn.Module) -> str:
    path = node.meta.get("owner", "")
    return f"module {path!r} ({type(module.get_submodule(path)).__name__})" if path else type(module).__name__


# --- swapping ----------------------------------------------------------------------------------------------------------------


def _swap_additions(module: nn.Module) -> None:
    for name, child in list(module.named_modules()):
        if isinstance(child, Add):
            module.set_submodule(name, FunctionalAdd(child.relu).train(child.training))


def _fuse(module: nn.Module, plan: Plan) -> dict[str, Limits]:
    """Fuse, and return the limits of the clips that are left to the saturation of fused layers, by the name of the layer."""
    if plan.fuse is not None:
        check_groups(module, plan.fuse)
        groups = list(plan.fuse)
    else:
        found = find_groups(module)
        groups = [group for group in found if not any(_stays_float(name, plan) for name in group)]
        for group in found:
            if group not in groups:
                _keep_group_float(module, plan, group)
    limits, groups = _take_clips(module, plan, groups)
    if groups:
        fuse: Any = fuse_modules if plan.observer is not None else fuse_modules_qat
        fuse(module, [list(group) for group in groups], inplace=True)
    return limits


def _take_clips(module: nn.Module, plan: Plan, groups: Sequence[Group]) -> tuple[dict[str, Limits], list[Group]]:
    """Put a ReLU in place of the ReLU6 at the end of a group; where saturation cannot clip, leave it out of the group."""
    limits, kept = {}, []
    for group in groups:
        clip = limits_of(module.get_submodule(group[-1]))
        if clip is not None and group[0] in plan.layers and free_clips(plan):
            module.set_submodule(group[-1], nn.ReLU().train(module.training))
            limits[group[0]] = clip
        elif clip is not None:
            group = group[:-1]
        if len(group) > 1:
            kept.append(group)
    return limits, kept


def _keep_group_float(module: nn.Module, plan: Plan, group: Group) -> None:
    """Put BatchNorm and activation in float, too, behind a layer that stays there; see :mod:`qat_lightning.flows.following`."""
    if plan.observer is None or group[0] not in plan.float_modules:
        return
    together = nn.Sequential(*(module.get_submodule(name) for name in group))
    for name in group[1:]:
        module.set_submodule(name, nn.Identity())
    module.set_submodule(group[0], together)


def _stays_float(name: str, plan: Plan) -> bool:
    return any(parent in ("", name) or name.startswith(f"{parent}.") for parent in plan.float_modules)


def _set_qconfigs(module: nn.Module, plan: Plan) -> None:
    # prepare_qat passes the qconfig of a module on to its children, unless they have one of their own.
    vars(module)["qconfig"] = static_qconfig(plan)
    for name, child in module.named_modules():
        if name and _stays_float(name, plan):
            vars(child)["qconfig"] = None
    for name, layer in plan.layers.items():
        vars(module.get_submodule(name))["qconfig"] = static_qconfig(plan, layer.per_channel, layer.kernel.weight_bits)


def _add_stubs(module: nn.Module, plan: Plan) -> None:
    user_has_placed_them = any(isinstance(child, QuantStub) for child in module.modules())
    for name, child in list(module.named_modules()):
        if name and _runs_in_float(name, child, plan):
            vars(child)["qconfig"] = None
            if isinstance(child, nn.Sequential | nn.Softmax):  # torch looks for no stub inside a Softmax
                child = Parent(child)
                vars(child)["qconfig"] = None
                module.set_submodule(name, child)
            _surround_with_float(child, plan)
    if not user_has_placed_them:
        module.input_stub = QuantStub(static_qconfig(plan))
        module.register_forward_pre_hook(_quantize_inputs, with_kwargs=True)
        module.register_forward_hook(_dequantize_output)


def _stubs_of_wish(prepared: nn.Module, plan: Plan) -> Iterator[Any]:
    """Yield the stubs behind modules that the user keeps in float, also because forward never calls them."""
    for name in plan.float_modules:
        stub = getattr(prepared.get_submodule(name), "output_stub", None)
        if stub is not None:
            yield stub


def _runs_in_float(name: str, child: nn.Module, plan: Plan) -> bool:
    """Whether the module is the outermost of what stays float, by the user's wish or for want of an int8 kernel."""
    if _stays_float(name, plan):
        return name in plan.float_modules
    if type(child) in FLOAT_TYPES:
        return True
    is_layer = next(child.children(), None) is None
    swapped = {*get_default_static_quant_module_mappings(), *DEFAULT_MODULE_TO_ACT_POST_PROCESS}
    # torch's int8 ReLU6 keeps the grid of its input, whatever range training has given its output; Softmax has no int8 kernel.
    swapped -= {nn.ReLU6, nn.Softmax}
    return is_layer and type(child) not in EXACT_TYPES and type(child) not in swapped


def _surround_with_float(child: nn.Module, plan: Plan) -> None:
    child.output_stub = QuantStub(static_qconfig(plan))
    child.register_forward_pre_hook(_dequantize_inputs, with_kwargs=True)
    child.register_forward_hook(_quantize_output)


# The hooks find their stubs on the module they are called with, so that a copy of the module uses its own.


def _quantize_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _map_float(module.input_stub, (args, kwargs))


def _dequantize_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _map_quantized((args, kwargs))


def _quantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    return _map_float(module.output_stub, output)


def _dequantize_output(module: nn.Module, args: Any, output: Any) -> Any:
    return _map_quantized(output)


def _map_float(stub: Any, values: Any) -> Any:
    def quantize(leaf: Any) -> Any:
        return stub(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_quantized else leaf

    return pytree.tree_map(quantize, values)


def _map_quantized(values: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.dequantize() if isinstance(leaf, Tensor) and leaf.is_quantized else leaf, values)


# --- parity ------------------------------------------------------------------------------------------------------------------


def _record(prepared: nn.Module, call: Call) -> dict[str, list[Reference]]:
    """Return what each activation fake-quant gave, in order of its calls, by the name of the module that owns it."""
    references: dict[str, list[Reference]] = {}

    def hook(owner: str) -> Callable[..., None]:
        def keep(module: Any, args: Any, output: Tensor) -> None:
            references.setdefault(owner, []).append(reference_of(module, output))

        return keep

    handles = [
        child.register_forward_hook(hook(name.rpartition(".")[0]))
        for name, child in prepared.named_modules()
        if isinstance(child, FakeQuantizeBase) and name.rpartition(".")[2] == "activation_post_process"
    ]
    _run_hooked(prepared, call, handles)
    return references


def _follow(int8: nn.Module, call: Call, references: dict[str, list[Reference]]) -> list[LayerParity]:
    """Run the int8 module, each layer on the values of its fake-quantized twin."""
    found: list[LayerParity] = []

    def hook(owner: str) -> Callable[..., Tensor | None]:
        def replace(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            queue = references[owner]
            if not isinstance(output, Tensor) or not output.is_quantized or not queue or not queue[0].fits(output):
                return None
            reference = queue.pop(0)
            found.append(compare(owner, output, reference))
            return reference.quantized()

        return replace

    handles = [
        (child.activation_post_process if isinstance(child, QFunctional) else child).register_forward_hook(hook(name), prepend=True)
        for name, child in int8.named_modules()
        if name in references
    ]
    _run_hooked(int8, call, handles)
    return found


def _run_hooked(module: nn.Module, call: Call, handles: list[Any]) -> None:
    try:
        with torch.inference_mode():
            call.run(module)
    finally:
        for handle in handles:
            handle.remove()
