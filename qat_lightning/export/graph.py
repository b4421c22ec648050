"""An ONNX graph while it is being built, and what the values of a program are in it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat_lightning.errors import UnsupportedModelError
from qat_lightning.program.execution import quantized_weight
from qat_lightning.program.nodes import Node, Program, Ref, Weight
from qat_lightning.tensors import scale_of


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of an activation in uint8."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class Value:
    """A tensor of the graph.

    Args:
        name: in ONNX.
        shape: size of each dimension, None for one that varies.
        dtype: of the tensor in ONNX; ``torch.uint8`` where it has a grid.
        grid: of a quantized one, None for any other.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    grid: Grid | None = None

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


@dataclass(frozen=True)
class Size:
    """A size of a tensor that varies, as an int64 tensor with one element."""

    name: str


@dataclass
class OnnxGraph:
    """Nodes and initializers, with names given in the order in which they come.

    Args:
        program: what is translated.
        weights: of the model and the program by name.
        described: shape, dtype and grid of each tensor of the program; its name is not used.
    """

    program: Program
    weights: dict[str, Tensor]
    described: dict[int, Value]
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    values: dict[int, Any] = field(default_factory=dict)
    constants: dict[Any, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    count: int = 0

    def add(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns the name of its output, or a list of names where it has several."""
        import onnx

        names = [self.fresh() for _ in range(outputs)]
        self.nodes.append(onnx.helper.make_node(op, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def fresh(self, wanted: str | None = None) -> str:
        """Return a name that nothing has yet: the wanted one if it is free, else a short one, for each stands in the file twice."""
        name = wanted
        while name is None or name in self.taken:
            self.count += 1
            name = f"t{self.count}"
        self.taken.add(name)
        return name

    def constant(self, tensor: Tensor, name: str | None = None) -> str:
        """Return the name of an initializer; equal ones are kept once, but for int8.

        On processors without VNNI, ONNX Runtime replaces int8 by uint8, and fails where it meets a tensor for the second time.
        """
        array = tensor.detach().contiguous().numpy()
        if tensor.dtype == torch.int8:
            return self._stored(array, name)
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self.constants:
            self.constants[key] = self._stored(array, name)
        return self.constants[key]

    def _stored(self, array: Any, name: str | None) -> str:
        import onnx

        name = self.fresh(name)
        self.initializers.append(onnx.numpy_helper.from_array(array, name))
        return name

    def number(self, value: float, dtype: torch.dtype = torch.float32) -> str:
        """Return the name of a scalar."""
        return self.constant(torch.tensor(value, dtype=dtype))

    def ints(self, values: Sequence[int]) -> str:
        """Return the name of a vector of int64."""
        return self.constant(torch.tensor(list(values), dtype=torch.int64).reshape(-1))

    # --- arguments of the program's nodes ----------------------------------------------------------------------------------------

    def resolve(self, argument: Any) -> Any:
        """Return an argument with values in place of references, and tensors in place of names."""
        if isinstance(argument, Ref):
            return self.values[argument.value]
        if isinstance(argument, Weight):
            return self.weights[argument.tensor]
        if isinstance(argument, tuple):
            return [self.resolve(item) for item in argument]
        return argument

    def real(self, value: Any) -> str:
        """Return the name of a value as real numbers: a quantized one is dequantized, a tensor or number becomes a constant."""
        if isinstance(value, Value):
            return value.name if value.grid is None else self.dequantize(value.name, value.grid)
        if isinstance(value, Tensor):
            return self.constant(value)
        if isinstance(value, bool | int | float):
            return self.number(value)
        if isinstance(value, Size):
            return str(self.add("Squeeze", [value.name]))
        raise UnsupportedModelError(f"ONNX export cannot take a {type(value).__name__} for a tensor.")

    def dequantize(self, name: str, grid: Grid) -> str:
        """Return the real numbers of a quantized tensor."""
        return str(self.add("DequantizeLinear", [name, *self._grid(grid)]))

    def quantize(self, name: str, grid: Grid) -> str:
        """Return the integers of real numbers."""
        return str(self.add("QuantizeLinear", [name, *self._grid(grid)]))

    def _grid(self, grid: Grid) -> list[str]:
        return [self.number(grid.scale), self.number(grid.zero_point, torch.uint8)]

    def put(self, node: Node, name: str, index: int = 0, integers: bool = False) -> None:
        """Let a tensor be an output of a node of the program; real numbers are quantized where the program's output is.

        Args:
            node: of the program.
            name: of the tensor.
            index: of the output.
            integers: whether the tensor holds the integers already.
        """
        described = self.described[node.outputs[index]]
        if described.grid is not None and not integers:
            name = self.quantize(name, described.grid)
        self.values[node.outputs[index]] = Value(name, described.shape, described.dtype, described.grid)

    def layer_weight(self, layer: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return integers, scale per output channel, and bias of a packed layer."""
        packed = self.program.layers[layer]
        bias = None if packed.bias is None else self.weights[packed.bias]
        return *integers_and_scales(quantized_weight(self.weights, packed.weight)), bias


def integers_and_scales(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers of a quantized weight, and a scale for each output channel."""
    return weight.int_repr(), scale_of(weight).float().expand(weight.shape[0]).contiguous()
