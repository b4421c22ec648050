"""The parts of a program, written as JSON and read strictly."""

import base64
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from qat_lightning.decoding import decode, parse_json, shown
from qat_lightning.input_spec import InputSpec
from qat_lightning.program.operators import OPERATORS
from qat_lightning.recipe import ACTIVATION_BITS, BACKENDS, BackendName, check_choice

Kind = Literal["conv1d", "conv2d", "conv3d", "linear", "linear_dynamic", "cell"]
CONSTANT_DTYPES = tuple(
    str(dtype).removeprefix("torch.") for dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.bool, torch.uint8)
)


@dataclass(frozen=True)
class Ref:
    """What an earlier node, or an input, gave."""

    value: int


@dataclass(frozen=True)
class Weight:
    """A tensor of the model, by its name in the file of the weights, or a constant of the program."""

    tensor: str


@dataclass(frozen=True)
class Packed:
    """The packed weights of a layer, by its name."""

    layer: str


@dataclass(frozen=True)
class Cpu:
    """The device."""


Argument: TypeAlias = Any
"""A :class:`Ref`, :class:`Weight`, :class:`Packed`, :class:`Cpu`, None, a bool, int, float or str, or a tuple of these."""


@dataclass(frozen=True)
class Node:
    """One operator.

    Args:
        op: its name with the overload, e.g. ``"aten::add.Tensor"``.
        args: in the order of its schema.
        outputs: numbers of what it gives.
    """

    op: str
    args: tuple[Argument, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class PackedLayer:
    """A layer with packed weights.

    Args:
        kind: of the kernel; ``"cell"`` is one direction of one layer of an LSTM or GRU.
        engine: that packs the weights.
        activation_bits: value range of what goes in, 7 or 8.
        weight: name of the integers, scales and zero points in the file of the weights, without the last part.
        bias: name of the bias there, None where there is none.
        stride: of a convolution.
        padding: of a convolution.
        dilation: of a convolution.
        groups: of a convolution.
        hidden_weight: of a cell, as ``weight``: what multiplies its last state.
        hidden_bias: of a cell, as ``bias``.
    """

    kind: Kind
    engine: BackendName
    activation_bits: int
    weight: str
    bias: str | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    hidden_weight: str | None = None
    hidden_bias: str | None = None

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        check_choice("engine", self.engine, BACKENDS)
        check_choice("activation_bits", self.activation_bits, ACTIVATION_BITS)
        dims = int(self.kind[4]) if self.kind.startswith("conv") else 0
        if any(len(values) != dims for values in (self.stride, self.padding, self.dilation)):
            raise ValueError(f"a {self.kind} needs {dims} strides, paddings and dilations")
        of_cells = [self.hidden_weight, self.hidden_bias, *([self.bias] if self.kind == "cell" else [])]
        if any((name is None) == (self.kind == "cell") for name in of_cells):
            raise ValueError("a cell needs weights and biases for its input and its last state, and no other layer has the latter")
        if self.groups < 1 or any(
            value < low for low, values in ((1, self.stride), (0, self.padding), (1, self.dilation)) for value in values
        ):
            raise ValueError("stride, dilation and groups must be at least 1, padding 0")


@dataclass(frozen=True)
class Program:
    """What a call of an int8 model computes.

    Args:
        inputs: the tensors it takes.
        fixed: arguments that are no tensors, by name: the program holds for these alone.
        nodes: in the order in which they run; the inputs are numbered first.
        outputs: numbers of the tensors it returns.
        structure: how they are nested: an index, None, a number or a text in a list; see :mod:`.calling`.
        layers: the packed layers by name.
        constants: tensors that are not in the file of the weights.
    """

    inputs: tuple[InputSpec, ...]
    fixed: Mapping[str, Any]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]
    structure: Any
    layers: Mapping[str, PackedLayer]
    constants: Mapping[str, Tensor]

    def to_json(self) -> str:
        """Return the program as it is written."""
        content = {
            "inputs": [asdict(spec) for spec in self.inputs],
            "fixed": dict(self.fixed),
            "nodes": [[node.op, [_encode(argument) for argument in node.args], list(node.outputs)] for node in self.nodes],
            "outputs": list(self.outputs),
            "structure": self.structure,
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
            "constants": {name: _encode_tensor(tensor) for name, tensor in self.constants.items()},
        }
        return json.dumps(content, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: bytes) -> "Program":
        """Return the program that ``to_json`` wrote.

        Raises:
            ValueError: names what it never writes: an unknown key or operator, a value that nothing gave before, a tensor of wrong size.
        """
        content = parse_json(text)
        keys = ("inputs", "fixed", "nodes", "outputs", "structure", "layers", "constants")
        if not isinstance(content, dict) or sorted(content) != sorted(keys):
            raise ValueError(f"its keys are not {', '.join(keys)}")
        head = decode(_Head, {name: content[name] for name in ("inputs", "outputs", "layers", "constants")})
        if not isinstance(content["fixed"], dict) or not isinstance(content["nodes"], list):
            raise ValueError("`fixed` must be a mapping and `nodes` a list")
        program = Program(
            inputs=head.inputs,
            fixed=content["fixed"],
            nodes=tuple(_decode_node(node, index) for index, node in enumerate(content["nodes"])),
            outputs=head.outputs,
            structure=content["structure"],
            layers=head.layers,
            constants={name: _decode_tensor(name, constant) for name, constant in head.constants.items()},
        )
        check_references(program)
        return program


@dataclass(frozen=True)
class _Constant:
    dtype: str
    shape: tuple[int, ...]
    data: str


@dataclass(frozen=True)
class _Head:
    inputs: tuple[InputSpec, ...]
    outputs: tuple[int, ...]
    layers: Mapping[str, PackedLayer]
    constants: Mapping[str, _Constant]


def leaves(argument: Argument) -> Iterator[Any]:
    """Yield an argument, or the elements of one that is a tuple."""
    if isinstance(argument, tuple):
        for item in argument:
            yield from leaves(item)
    else:
        yield argument


def check_references(program: Program) -> None:
    """Check that every value exists before it is used, and every layer at all.

    Raises:
        ValueError: names the first node for which it does not hold.
    """
    known = set(range(len(program.inputs)))
    for index, node in enumerate(program.nodes):
        for leaf in leaves(node.args):
            if isinstance(leaf, Ref) and leaf.value not in known:
                raise ValueError(f"node {index} ({node.op}) uses value {leaf.value}, which nothing has given before")
            if isinstance(leaf, Packed) and leaf.layer not in program.layers:
                raise ValueError(f"node {index} ({node.op}) uses layer {shown(leaf.layer)}, which is not described")
        if known & {*node.outputs} or len({*node.outputs}) < len(node.outputs):
            raise ValueError(f"node {index} ({node.op}) gives a value that another gives, too")
        known |= {*node.outputs}
    if not {*program.outputs} <= known:
        raise ValueError("it returns a value that nothing gives")


def _encode(argument: Argument) -> Any:
    if isinstance(argument, tuple):
        return [_encode(item) for item in argument]
    if isinstance(argument, Cpu):
        return {"device": "cpu"}
    if isinstance(argument, Ref | Weight | Packed):
        return asdict(argument)
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"number": str(argument)}
    return argument


def _decode_node(content: Any, index: int) -> Node:
    if not isinstance(content, list) or len(content) != 3 or not isinstance(content[1], list) or not isinstance(content[2], list):
        raise ValueError(f"`nodes[{index}]` is no operator with arguments and outputs")
    op, args, outputs = content
    if not isinstance(op, str) or op not in OPERATORS:
        raise ValueError(f"`nodes[{index}]` has the operator {shown(op)}, which no program may use")
    if not all(type(output) is int for output in outputs):
        raise ValueError(f"`nodes[{index}]` has outputs that are no numbers")
    return Node(op, tuple(_decode(argument, index) for argument in args), tuple(outputs))


def _decode(content: Any, index: int) -> Argument:
    if isinstance(content, list):
        return tuple(_decode(item, index) for item in content)
    if not isinstance(content, dict):
        return content
    if len(content) == 1:
        ((key, value),) = content.items()
        if key == "value" and type(value) is int:
            return Ref(value)
        if key in ("tensor", "layer") and isinstance(value, str):
            return Weight(value) if key == "tensor" else Packed(value)
        if (key, value) == ("device", "cpu"):
            return Cpu()
        if key == "number" and value in ("inf", "-inf", "nan"):
            return float(value)
    raise ValueError(f"`nodes[{index}]` has the argument {shown(content)}, which no program may have")


def _encode_tensor(tensor: Tensor) -> dict[str, Any]:
    data = base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": data}


def _decode_tensor(name: str, constant: _Constant) -> Tensor:
    if constant.dtype not in CONSTANT_DTYPES:
        raise ValueError(f"constant {shown(name)} has dtype {shown(constant.dtype)}")
    dtype: torch.dtype = getattr(torch, constant.dtype)
    data = bytearray(base64.b64decode(constant.data, validate=True))
    if any(size < 0 for size in constant.shape) or len(data) != math.prod(constant.shape) * dtype.itemsize:
        raise ValueError(f"constant {shown(name)} has {len(data)} bytes, which its shape does not fit")
    return torch.frombuffer(data, dtype=dtype).reshape(constant.shape) if data else torch.empty(constant.shape, dtype=dtype)
