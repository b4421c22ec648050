"""Runs a program without Python between its operators."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat_lightning.backend import engine
from qat_lightning.deprecation import quiet
from qat_lightning.program.nodes import Cpu, Node, Packed, PackedLayer, Program, Ref, Weight

Run = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]


def compile_program(program: Program, weights: Mapping[str, Tensor]) -> Run:
    """Return a function from the tensors that a program takes to those it gives.

    The operators become a function of TorchScript that exists in memory alone: nothing between two of them goes through Python. The
    weights of each layer are packed by the engine that the program names, which no file of TorchScript would keep.

    Args:
        program: checked.
        weights: of the model by name, as :func:`qat_lightning.tensors.to_plain` gives them.

    Raises:
        ValueError: the program names weights that are not there, or gives an operator what it does not take.
    """
    builder = _Builder(program, weights)
    try:
        function = torch._C._create_function_from_graph("forward", builder.graph)
    except RuntimeError as error:
        raise ValueError(f"its operators do not fit each other: {str(error).strip().splitlines()[0]}") from error

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = function(*tensors)
        return found

    return run


class _Builder:
    """Builds the graph of a program."""

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        self.program, self.weights = program, {**weights, **program.constants}
        self.graph: Any = torch._C.Graph()
        self.values: dict[int, Any] = {}
        self.packed: dict[str, Any] = {}
        for index in range(len(program.inputs)):
            self.values[index] = self.graph.addInput(f"input{index}")
        for index, node in enumerate(program.nodes):
            try:
                self._add(node)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"node {index} ({node.op}): {str(error).strip().splitlines()[0]}") from error
        outputs = self.graph.create("prim::TupleConstruct", [self.values[value] for value in program.outputs], 1)
        self.graph.insertNode(outputs)
        outputs.output().setType(torch._C.TupleType([torch._C.TensorType.get() for _ in program.outputs]))
        self.graph.registerOutput(outputs.output())

    def _add(self, node: Node) -> None:
        schema = _schema(node.op)
        kinds = [argument.type for argument in schema.arguments] if schema is not None else _kinds_in_torchscript(node.op)
        if len(kinds) != len(node.args):
            raise ValueError(f"node {node.op} takes {len(kinds)} arguments, not {len(node.args)}")
        arguments = [self._argument(argument, kind) for argument, kind in zip(node.args, kinds, strict=True)]
        created = self.graph.create(node.op.partition(".")[0], arguments, len(node.outputs))
        self.graph.insertNode(created)
        results = [result.type for result in schema.returns] if schema is not None else [torch._C.TensorType.get() for _ in node.outputs]
        for value, number, kind in zip(created.outputs(), node.outputs, results, strict=True):
            value.setType(kind)
            self.values[number] = value

    def _argument(self, argument: Any, kind: Any) -> Any:
        """Return an argument in the graph; nothing but this check keeps a value of another type from the operator."""
        value = self._value(argument, kind)
        if kind is not None and not value.type().isSubtypeOf(kind):
            raise TypeError(f"an argument is a {value.type()}, and must be a {kind}")
        return value

    def _value(self, argument: Any, kind: Any) -> Any:
        if isinstance(argument, Ref):
            return self.values[argument.value]
        if isinstance(argument, Weight):
            return self.graph.insertConstant(_plain(self.weights, argument.tensor))
        if isinstance(argument, Packed):
            if argument.layer not in self.packed:
                self.packed[argument.layer] = self.graph.insertConstant(pack(self.program.layers[argument.layer], self.weights))
            return self.packed[argument.layer]
        if isinstance(argument, Cpu):
            return self.graph.insertConstant(torch.device("cpu"))
        if isinstance(argument, int | float) and isinstance(kind, torch._C.TensorType):  # which a trace writes for a number beside a tensor
            argument = torch.tensor(argument, dtype=torch.float64 if isinstance(argument, float) else None)
        return self._list(argument, kind) if isinstance(argument, tuple) else self.graph.insertConstant(argument)

    def _list(self, items: tuple[Any, ...], kind: Any) -> Any:
        if isinstance(kind, torch._C.OptionalType):
            kind = kind.getElementType()
        inner = kind.getElementType() if isinstance(kind, torch._C.ListType) else None
        created = self.graph.create("prim::ListConstruct", [self._argument(item, inner) for item in items], 1)
        self.graph.insertNode(created)
        created.output().setType(kind)
        return created.output()


def pack(layer: PackedLayer, weights: Mapping[str, Tensor]) -> Any:
    """Return the packed weights of a layer.

    Raises:
        ValueError: weights that are missing or do not fit it.
    """
    weight, bias = quantized_weight(weights, layer.weight), _bias(weights, layer.bias)
    ops: Any = torch.ops.quantized
    try:
        with engine(layer.engine), quiet():
            if layer.hidden_weight is not None:
                hidden_weight, hidden_bias = quantized_weight(weights, layer.hidden_weight), _bias(weights, layer.hidden_bias)
                packed = ops.linear_prepack(weight, bias), ops.linear_prepack(hidden_weight, hidden_bias)
                return ops.make_quantized_cell_params_dynamic(*packed, bias, hidden_bias, True)  # inputs of 7 bits, as torch's modules
            if layer.kind.startswith("linear"):
                return ops.linear_prepack(weight, bias)
            geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
            return getattr(ops, f"{layer.kind}_prepack")(weight, bias, *geometry)
    except RuntimeError as error:
        raise ValueError(f"{layer.weight} cannot be packed: {str(error).splitlines()[0]}") from error


def _bias(weights: Mapping[str, Tensor], name: str | None) -> Tensor | None:
    return None if name is None else _plain(weights, name)


def _schema(op: str) -> Any:
    """Return the schema of an operator, None for what belongs to TorchScript itself."""
    namespace, _, rest = op.partition("::")
    name, _, overload = rest.partition(".")
    if namespace == "prim":
        return None
    found = [schema for schema in torch._C._jit_get_schemas_for_operator(f"{namespace}::{name}") if schema.overload_name == overload]
    if not found:
        raise ValueError(f"this version of torch has no operator {op}")
    return found[0]


def _kinds_in_torchscript(op: str) -> list[Any]:
    return [torch._C.IntType.get() if op == "prim::NumToTensor" else torch._C.ListType(torch._C.TensorType.get())]


def _plain(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"the tensor {name!r} is missing")
    return weights[name]


def quantized_weight(weights: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the weight of a layer as a quantized tensor.

    Raises:
        ValueError: a part of it is missing.
    """
    integers, scale, zero_point = (_plain(weights, f"{name}.{part}") for part in ("int8", "scale", "zero_point"))
    with quiet():
        if scale.dim():
            return torch._make_per_channel_quantized_tensor(integers, scale, zero_point, 0)
        return torch._make_per_tensor_quantized_tensor(integers, float(scale), int(zero_point))


def _returns_tensor(op: str) -> bool:
    """Whether an operator gives tensors, and neither lists of them nor numbers."""
    if op == "prim::ListUnpack":
        return True
    schema = _schema(op)
    return schema is not None and all(isinstance(result.type, torch._C.TensorType) for result in schema.returns)


def run_all(program: Program, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return every tensor of a run of a program by its number, from those it takes to those it gives."""
    made = (output for node in program.nodes if _returns_tensor(node.op) for output in node.outputs)
    numbers = [*range(len(program.inputs)), *made]
    run = compile_program(replace(program, outputs=tuple(numbers)), weights)
    with torch.inference_mode():
        return dict(zip(numbers, run(tensors), strict=True))
