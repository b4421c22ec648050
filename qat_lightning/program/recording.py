"""Records a call of an int8 model as a program."""

import linecache
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.module import _jit_is_scripting
from torch import Tensor, nn

from qat_lightning.backend import Kernel
from qat_lightning.deprecation import quiet
from qat_lightning.errors import UnsupportedModelError
from qat_lightning.plan import Call
from qat_lightning.program.calling import FlatModule, describe_call, fixed_arguments
from qat_lightning.program.nodes import Cpu, Node, Packed, PackedLayer, Program, Ref, Weight
from qat_lightning.program.operators import OPERATORS
from qat_lightning.signature import Signature

CONSTANT_LIMIT = 16_000_000
PACKED_TYPES = {
    "Conv2dPackedParamsBase": "conv",
    "Conv3dPackedParamsBase": "conv",
    "LinearPackedParamsBase": "linear",
    "CellParamsBase": "cell",
}
LISTS = ("prim::ListConstruct", "prim::TupleConstruct")


def record(module: nn.Module, call: Call, kernels: Mapping[str, Kernel], inputs: Signature | None = None) -> Program:
    """Return the program of a call.

    Args:
        module: with int8 submodules, on the CPU in eval mode.
        call: what to trace it with.
        kernels: of each packed layer by qualified name.
        inputs: what calls have in common; None: all sizes but the first may not vary.

    Raises:
        UnsupportedModelError: what a list of operators cannot hold, such as control flow in Python that depends on a tensor.
    """
    flat = FlatModule(module, call)
    traced = _trace(flat)
    recorder = _Recorder(module, traced.inlined_graph, kernels)
    signature = inputs or describe_call(call)
    return Program(
        inputs=tuple(spec for spec in signature if spec.shape is not None),
        fixed=fixed_arguments(call),
        nodes=tuple(recorder.nodes),
        outputs=recorder.outputs,
        structure=flat.structure,
        layers=recorder.layers,
        constants=recorder.constants,
    )


def _trace(flat: FlatModule) -> Any:
    # The last context is Lightning's: its modules may be asked for a trainer that they do not have.
    with warnings.catch_warnings(record=True) as caught, quiet(), torch.inference_mode(), _jit_is_scripting():
        warnings.simplefilter("always")
        try:
            traced: Any = torch.jit.trace(flat, tuple(flat.tensors), check_trace=False, strict=False)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise UnsupportedModelError(f"{type(flat.module).__name__} cannot be recorded: {str(error).splitlines()[0]}") from error
    for warning in caught:
        if "Python boolean" in str(warning.message) and not _is_assertion(warning.filename, warning.lineno):
            raise UnsupportedModelError(
                f"{type(flat.module).__name__} cannot be recorded: its control flow depends on a tensor or its size at "
                f"{Path(warning.filename).name}:{warning.lineno}, and a list of operators has one way only. Move the branch out of forward."
            )
    return traced


def _is_assertion(file: str, line: int) -> bool:
    """Whether the line only checks; torch's own modules and ours branch on what no call changes."""
    return any(str(root) in file for root in (Path(torch.__file__).parent, Path(__file__).parents[1])) or "assert" in linecache.getline(
        file, line
    )


class _Recorder:
    """Turns the graph of a trace into nodes."""

    def __init__(self, module: nn.Module, graph: Any, kernels: Mapping[str, Kernel]) -> None:
        self.module, self.kernels = module, kernels
        self.state = set(module.state_dict().keys())
        self.nodes: list[Node] = []
        self.layers: dict[str, PackedLayer] = {}
        self.constants: dict[str, Tensor] = {}
        self.known: dict[str, Any] = {}
        own, *inputs = graph.inputs()
        self.known[own.debugName()] = ()
        self.count = 0
        for value in inputs:
            self.known[value.debugName()] = self._next()
        for node in graph.nodes():
            self._visit(node)
        (output,) = graph.outputs()
        returned = self.known[output.debugName()]
        self.outputs = tuple(self._as_value(item) for item in (returned if isinstance(returned, tuple) else (returned,)))

    def _next(self) -> Ref:
        self.count += 1
        return Ref(self.count - 1)

    def _as_value(self, item: Any) -> int:
        """Return the number of a value; a constant that is returned as it is needs a node."""
        if isinstance(item, Ref):
            return item.value
        output = self._next()
        self.nodes.append(Node("aten::alias", (item,), (output.value,)))
        return output.value

    def _visit(self, node: Any) -> None:
        kind = node.kind()
        if kind == "prim::GetAttr":
            (owner,) = node.inputs()
            path = (*self.known[owner.debugName()], node.s("name"))
            self.known[node.output().debugName()] = self._attribute(path, node.output())
        elif kind == "prim::Constant":
            self.known[node.output().debugName()] = self._constant(node.output().toIValue())
        elif kind in LISTS:
            self.known[node.output().debugName()] = tuple(self._arguments(node))
        elif kind in ("prim::TupleUnpack", "prim::ListUnpack") and isinstance(self._arguments(node)[0], tuple):
            for output, item in zip(node.outputs(), self._arguments(node)[0], strict=True):
                self.known[output.debugName()] = item
        else:
            self._operator(node, kind)

    def _arguments(self, node: Any) -> list[Any]:
        return [self.known[value.debugName()] for value in node.inputs()]

    def _operator(self, node: Any, kind: str) -> None:
        overload = torch._C.parse_schema(node.schema()).overload_name if kind.partition("::")[0] != "prim" else ""
        op = f"{kind}.{overload}" if overload else kind
        if op not in OPERATORS:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} cannot be recorded: it runs {op}, which programs do not have. Serve it with its class: "
                f"load_quantized(folder, model)."
            )
        arguments = tuple(self._arguments(node))
        outputs = [self._next() for _ in node.outputs()]
        for value, output in zip(node.outputs(), outputs, strict=True):
            self.known[value.debugName()] = output
        self.nodes.append(Node(op, arguments, tuple(output.value for output in outputs)))

    def _constant(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._embed(value)
        if isinstance(value, torch.device):
            return Cpu()
        if isinstance(value, list | tuple):
            return tuple(self._constant(item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise UnsupportedModelError(f"{type(self.module).__name__} cannot be recorded: it holds a constant of type {type(value).__name__}.")

    def _embed(self, tensor: Tensor) -> Weight:
        if tensor.nbytes + sum(constant.nbytes for constant in self.constants.values()) > CONSTANT_LIMIT:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} cannot be recorded: it holds a tensor of {tensor.nbytes} bytes outside its state dict. "
                f"Register it as a buffer."
            )
        name = f"constant{len(self.constants)}"
        self.constants[name] = tensor.detach().clone()
        return Weight(name)

    def _attribute(self, path: tuple[str, ...], output: Any) -> Any:
        kind = str(output.type())
        packed = next((name for suffix, name in PACKED_TYPES.items() if kind.endswith(suffix)), None)
        if packed is not None:
            return self._layer(path, packed)
        if not output.type().isSubtypeOf(torch._C.TensorType.get()):
            if "PackedParams" in kind and "torch.classes" in kind:
                raise UnsupportedModelError(f"{type(self.module).__name__} cannot be recorded: programs have no {kind.rpartition('.')[2]}.")
            return path
        name = ".".join(path[1:])  # the first is the wrapper's
        if name in self.state:
            return Weight(name)
        owner, _, last = name.rpartition(".")
        return self._embed(getattr(self.module.get_submodule(owner), last))

    def _layer(self, path: tuple[str, ...], kind: str) -> Packed:
        if kind == "cell":
            return self._cell(path)
        parts = [part for part in path[1:] if part != "_packed_params"]
        name = ".".join(parts)
        if name not in self.layers:
            self.layers[name] = self._describe(name, self.module.get_submodule(name), kind)
        return Packed(name)

    def _cell(self, path: tuple[str, ...]) -> Packed:
        """Return one direction of one layer of an LSTM or GRU; torch numbers the directions of the first layer first."""
        *owner, _, number, _ = path[1:]
        name = ".".join(owner)
        recurrent: Any = self.module.get_submodule(name)
        depth, reverse = divmod(int(number), 2 if recurrent.bidirectional else 1)
        ending, prefix, kernel = f"l{depth}{'_reverse' if reverse else ''}", f"{name}." if name else "", self.kernels[name]
        self.layers[f"{prefix}{ending}"] = PackedLayer(
            "cell",
            engine=kernel.engine,
            activation_bits=kernel.activation_bits,
            weight=f"{prefix}weight_ih_{ending}",
            bias=f"{prefix}bias_ih_{ending}",
            hidden_weight=f"{prefix}weight_hh_{ending}",
            hidden_bias=f"{prefix}bias_hh_{ending}",
        )
        return Packed(f"{prefix}{ending}")

    def _describe(self, name: str, layer: Any, kind: str) -> PackedLayer:
        inner = "_packed_params._packed_params." if kind == "linear" else ""
        prefix = f"{name}.{inner}" if name else inner
        weight, bias = layer._weight_bias()
        kernel = self.kernels[name]
        common: dict[str, Any] = {
            "engine": kernel.engine,
            "activation_bits": kernel.activation_bits,
            "weight": f"{prefix}weight",
            "bias": None if bias is None else f"{prefix}bias",
        }
        if kind == "linear":
            return PackedLayer("linear_dynamic" if "dynamic" in type(layer).__module__ else "linear", **common)
        dims, packed = weight.dim() - 2, layer._packed_params
        stride, padding, dilation = (tuple(values())[-dims:] for values in (packed.stride, packed.padding, packed.dilation))
        names: Sequence[Any] = ("conv1d", "conv2d", "conv3d")
        return PackedLayer(names[dims - 1], **common, stride=stride, padding=padding, dilation=dilation, groups=packed.groups())
