"""A program in the form that PyTorch's compilers read: real numbers between quantize and dequantize operators of ``quantized_decomposed``.

XNNPACK has integers of int8, 128 less than the uint8 of torch's kernels and of Inductor; the scales are the same.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning.errors import UnsupportedModelError
from qat_lightning.export.describing import describe
from qat_lightning.export.graph import Grid, integers_and_scales
from qat_lightning.program.execution import quantized_weight
from qat_lightning.program.nodes import Cpu, Node, Packed, Program, Ref, Weight

LOW, HIGH = -128, 127
OFFSET = 128
_MOVING = (
    *("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "contiguous", "clone", "dropout"),
    *("slice", "select", "narrow", "channel_shuffle", "pixel_shuffle", "max_pool1d", "max_pool2d"),
)
_WEIGHT = "aten::_make_per_"
_OF_TWO = ("add", "sub", "mul", "floor_divide", "div")
_NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floor_divide": operator.floordiv, "div": operator.truediv,
    "NumToTensor": lambda number: number, "Int": int, "IntImplicit": int, "ScalarImplicit": lambda number: number, "Float": float,
}  # fmt: skip
_BINARY: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "matmul": torch.matmul,
    "add_scalar": torch.add,
    "mul_scalar": torch.mul,
}
_CONVOLUTIONS: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
_UNARY: dict[str, Callable[..., Tensor]] = {"hardswish": F.hardswish, "sigmoid": torch.sigmoid, "relu6": F.relu6}


@dataclass(frozen=True)
class _Integers:
    """A tensor on its grid; each that uses it dequantizes it anew, as XNNPACK's partitioner wants it."""

    tensor: Tensor
    where: tuple[float, int, int, int, torch.dtype]

    @classmethod
    def of(cls, result: Tensor, grid: Grid, signed: bool) -> "_Integers":
        if signed:
            return cls.at(result, (grid.scale, grid.zero_point - OFFSET, LOW, HIGH, torch.int8))
        return cls.at(result, (grid.scale, grid.zero_point, LOW + OFFSET, HIGH + OFFSET, torch.uint8))

    @classmethod
    def at(cls, result: Tensor, where: "tuple[float, int, int, int, torch.dtype]") -> "_Integers":
        return cls(torch.ops.quantized_decomposed.quantize_per_tensor.default(result, *where), where)

    def dequantize(self) -> Tensor:
        result: Tensor = torch.ops.quantized_decomposed.dequantize_per_tensor.default(self.tensor, *self.where)
        return result


class ReferenceModule(nn.Module):
    """Runs a program node by node, for ``torch.export`` to trace.

    Args:
        program: of a module that was quantized statically.
        weights: of the model by name.
        grids: of the quantized tensors of the program by number.
        signed: for XNNPACK, else for Inductor.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor], grids: Mapping[int, Grid], signed: bool) -> None:
        super().__init__()
        # Registers the operators.
        from torch.ao.quantization.fx import _decomposed  # noqa: F401

        self.program, self.grids, self.signed = program, grids, signed
        # Where the next node quantizes, the operation before it has that grid.
        quantizing = [node for node in program.nodes if node.op.startswith("aten::quantize_per_tensor")]
        self.rounded_to = {**{node.args[0].value: grids[node.outputs[0]] for node in quantizing}, **grids}
        self._names: dict[str, str] = {}
        everything = {**weights, **program.constants}
        for name in _names_of_tensors(program):
            self._keep(name, everything[name])
        for name, layer in program.layers.items():
            self._keep_weight(name, *integers_and_scales(quantized_weight(weights, layer.weight)))
        for node in program.nodes:
            if node.op.startswith(_WEIGHT):
                name, scale = node.args[0].tensor, node.args[1]
                scale = everything[scale.tensor] if isinstance(scale, Weight) else torch.tensor(scale)
                self._keep_weight(name, everything[name], scale, in_int8=self._feeds_rounded_layers(node))

    def _feeds_rounded_layers(self, node: Node) -> bool:
        """Whether each layer that takes a weight is followed by a rounding: XNNPACK has no int8 kernel for others, Inductor has."""
        if not self.signed:
            return True
        dequantized = [user.outputs[0] for user in _users(self.program, node.outputs[0])]
        return all(user.outputs[0] in self.rounded_to for number in dequantized for user in _users(self.program, number))

    def _keep(self, name: str, tensor: Tensor) -> None:
        self._names[name] = f"tensor{len(self._names)}"
        self.register_buffer(self._names[name], tensor.detach())

    def _kept(self, name: str) -> Tensor:
        return getattr(self, self._names[name])  # type: ignore[no-any-return]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the program."""
        values: dict[int, Any] = dict(enumerate(tensors))
        for node in self.program.nodes:
            if node.op.startswith(_WEIGHT):
                values[node.outputs[0]] = self._weight(node.args[0].tensor)
                continue
            if node.op.startswith("aten::dequantize"):
                values[node.outputs[0]] = values[node.args[0].value]
                continue
            results = self._compute(node, [self._resolve(argument, values) for argument in node.args])
            for number, result in zip(node.outputs, results, strict=True):
                grid = self.grids.get(number)
                values[number] = _moved(node, result, values) if grid is None else _Integers.of(result, grid, self.signed)
        return tuple(self._resolve(Ref(number), values) for number in self.program.outputs)

    def _resolve(self, argument: Any, values: Mapping[int, Any]) -> Any:
        if isinstance(argument, Ref):
            value = values[argument.value]
            return value.dequantize() if isinstance(value, _Integers) else value
        if isinstance(argument, Weight):
            return self._kept(argument.tensor)
        if isinstance(argument, Cpu):
            return torch.device("cpu")
        if isinstance(argument, tuple):
            return [self._resolve(item, values) for item in argument]
        return argument

    def _weight(self, name: str) -> Tensor:
        if f"{name} real" in self._names:
            return self._kept(f"{name} real")
        parts = [self._kept(f"{name} {part}") for part in ("integers", "scale", "zero_point")]
        dequantized: Tensor = torch.ops.quantized_decomposed.dequantize_per_channel.default(*parts, 0, LOW, HIGH, torch.int8)
        return dequantized

    def _keep_weight(self, name: str, integers: Tensor, scale: Tensor, in_int8: bool = True) -> None:
        """Keep a weight as XNNPACK wants it: a scale and a zero point for each output channel, or real numbers."""
        if not in_int8:
            self._keep(f"{name} real", integers * scale.float().reshape(-1, *[1] * (integers.dim() - 1)))
            return
        self._keep(f"{name} integers", integers)
        self._keep(f"{name} scale", scale.float().reshape(-1).repeat(len(integers) // scale.numel()))
        self._keep(f"{name} zero_point", torch.zeros(len(integers), dtype=torch.int64))

    def _compute(self, node: Node, args: list[Any]) -> Sequence[Any]:
        """Return what an operator gives, before it is rounded."""
        namespace, _, rest = node.op.partition("::")
        name, _, overload = rest.partition(".")
        if namespace == "quantized":
            return [self._quantized(node, name, args)]
        if name == "quantize_per_tensor":
            return args[:1]
        if name == "ListUnpack":
            return args[0]  # type: ignore[no-any-return]
        if name == "size" and overload == "int":
            return [args[0].shape[args[1]]]
        if name in _NUMBERS and all(isinstance(item, int | float) for item in args):
            return [_NUMBERS[name](*args[: 2 if name in _OF_TWO else 1])]
        if name == "mean" and overload == "dim" and args[0].dim() == 4 and sorted(axis % 4 for axis in args[1]) == [2, 3]:
            return [self._pooled(node, args[0], keep=args[2])]
        if name == "cat":
            return [self._concatenated(node, args)]
        if name == "_convolution":
            return [torch.ops.aten.convolution.default(*args[:9])]
        if namespace != "aten":
            raise _unsupported(node)
        result = _call(getattr(getattr(torch.ops.aten, name), overload or "default"), args)
        return result if isinstance(result, tuple | list) and len(node.outputs) > 1 else [result]

    def _pooled(self, node: Node, x: Tensor, keep: bool) -> Tensor:
        """Return the means of images; XNNPACK takes them with the dimensions they had."""
        pooled, grid = x.mean((2, 3), keepdim=True), self.grids.get(node.outputs[0])
        if keep:
            return pooled
        return (pooled if grid is None else _Integers.of(pooled, grid, self.signed).dequantize()).flatten(1)

    def _concatenated(self, node: Node, args: list[Any]) -> Tensor:
        """Return tensors one behind the other, each rounded before: XNNPACK wants one grid for all."""
        grid = self.rounded_to.get(node.outputs[0])
        return torch.cat([tensor if grid is None else _Integers.of(tensor, grid, self.signed).dequantize() for tensor in args[0]], args[1])

    def _quantized(self, node: Node, name: str, args: list[Any]) -> Tensor:
        rectified = name.endswith("_relu")
        name = name.removesuffix("_relu")
        if name in _CONVOLUTIONS or name == "linear":
            result = self._layer(name, args)
        elif name in _BINARY:
            result = _BINARY[name](args[0], args[1])
        elif name in _UNARY:
            result = _UNARY[name](args[0])
        elif name == "cat":
            result = self._concatenated(node, args)
        elif name == "leaky_relu":
            result = F.leaky_relu(args[0], args[1])
        elif name == "softmax":
            result = F.softmax(args[0], args[1])
        elif name == "layer_norm":
            result = F.layer_norm(*args[:5])
        elif name.startswith("batch_norm"):
            x, weight, bias, mean, variance, eps = args[:6]
            result = F.batch_norm(x, mean, variance, weight, bias, eps=eps)
        else:
            raise _unsupported(node)
        grid = self.grids.get(node.outputs[0])
        # On a grid that starts at 0, saturation is the ReLU.
        return F.relu(result) if rectified and (grid is None or grid.zero_point != 0) else result

    def _layer(self, name: str, args: list[Any]) -> Tensor:
        x, packed = args[:2]
        assert isinstance(packed, Packed)
        layer = self.program.layers[packed.layer]
        bias = None if layer.bias is None else self._kept(layer.bias)
        weight = self._weight(packed.layer)
        if name == "linear":
            return F.linear(x, weight, bias)
        return _CONVOLUTIONS[name](x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def reference_of(program: Program, weights: Mapping[str, Tensor], tensors: Sequence[Tensor], signed: bool) -> ReferenceModule:
    """Return a program in eval mode for a compiler.

    Args:
        program: of a module that was quantized statically.
        weights: of the model by name.
        tensors: an example of its inputs.
        signed: for XNNPACK, else for Inductor.

    Raises:
        UnsupportedModelError: names an operator of dynamic quantization.
    """
    grids = {number: value.grid for number, value in describe(program, weights, tensors).items() if value.grid is not None}
    return ReferenceModule(program, weights, grids, signed).eval()


def _moved(node: Node, result: Any, values: Mapping[int, Any]) -> Any:
    """Return what an operator that only moves numbers gives, on the grid that they had: XNNPACK moves integers, and rounds no numbers."""
    given = values.get(node.args[0].value) if node.args and isinstance(node.args[0], Ref) else None
    name = node.op.partition("::")[2].partition(".")[0]
    return _Integers.at(result, given.where) if name in _MOVING and isinstance(given, _Integers) else result


def _users(program: Program, number: int) -> list[Node]:
    return [node for node in program.nodes if Ref(number) in node.args]


def _names_of_tensors(program: Program) -> list[str]:
    """Return the tensors that nodes and biases name, but for weights, which are kept in another form."""
    found = [layer.bias for layer in program.layers.values() if layer.bias is not None]
    waiting: list[Any] = [argument for node in program.nodes if not node.op.startswith(_WEIGHT) for argument in node.args]
    while waiting:
        argument = waiting.pop()
        if isinstance(argument, tuple):
            waiting += argument
        elif isinstance(argument, Weight):
            found.append(argument.tensor)
    return sorted({*found})


def _call(function: Any, args: Sequence[Any]) -> Any:
    """Call an operator with its arguments in the order of its schema, some of which have to be named."""
    names = [argument.name if argument.kwarg_only else None for argument in function._schema.arguments]
    positional = [value for name, value in zip(names, args, strict=True) if name is None]
    return function(*positional, **{name: value for name, value in zip(names, args, strict=True) if name is not None})


def _unsupported(node: Node) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The export cannot carry the operator {node.op}: keep that part out of the module, or serve it with torch."
    )
