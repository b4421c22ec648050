"""Operations on real numbers. One on a quantized tensor stands between a dequantization and a quantization, as torch computes it."""

import math
from typing import Any

import torch
from torch import Tensor

from qat_lightning.errors import UnsupportedModelError
from qat_lightning.export.graph import OnnxGraph, Value
from qat_lightning.export.registry import translates
from qat_lightning.export.shapes import arithmetic_of_sizes
from qat_lightning.program.nodes import Node

UNARY = {
    "relu": "Relu", "hardswish": "HardSwish", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
    "neg": "Neg", "abs": "Abs", "erf": "Erf", "reciprocal": "Reciprocal", "softplus": "Softplus", "mish": "Mish", "sin": "Sin",
    "cos": "Cos", "floor": "Floor", "ceil": "Ceil", "round": "Round",
}  # fmt: skip
BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min", "pow": "Pow"}
COMPARISONS = {"eq": "Equal", "gt": "Greater", "lt": "Less", "ge": "GreaterOrEqual", "le": "LessOrEqual"}
INF = float("inf")


def _name(node: Node) -> str:
    return node.op.partition("::")[2].partition(".")[0].rstrip("_")


@translates(*(f"aten::{name}{place}" for name in UNARY for place in ("", "_")), "quantized::hardswish", "quantized::sigmoid")
def unary(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply a function of one argument."""
    if _name(node) == "softplus" and (args[1], args[2]) != (1, 20):
        raise UnsupportedModelError("ONNX export has softplus with its defaults alone.")
    graph.put(node, graph.add(UNARY[_name(node)], [graph.real(args[0])]))


@translates(*(f"aten::{name}{place}" for name in BINARY for place in ("", "_")), "aten::rsub")
def binary(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply arithmetic of two arguments."""
    if arithmetic_of_sizes(graph, node, args):
        return
    one, other = (_operand(graph, node, item) for item in args[:2])
    scaled = len(args) > 2 and _name(node) in ("add", "sub", "rsub") and args[2] != 1
    if scaled:
        other = graph.add("Mul", [other, graph.number(float(args[2]))]) if _name(node) != "rsub" else other
    if _name(node) == "rsub":
        one, other = other, one
        if scaled:
            raise UnsupportedModelError("ONNX export has rsub with alpha=1 alone.")
    graph.put(node, graph.add(BINARY.get(_name(node), "Sub"), [one, other]))


def _operand(graph: OnnxGraph, node: Node, item: Any) -> str:
    """Return an operand in the dtype of the result."""
    wanted = graph.described[node.outputs[0]].dtype
    wanted = torch.float32 if wanted == torch.uint8 else wanted
    if isinstance(item, bool | int | float):
        return graph.number(item, wanted)
    if isinstance(item, Tensor):
        return graph.constant(item.to(wanted))
    name = graph.real(item)
    own = item.dtype if isinstance(item, Value) and item.grid is None else torch.float32
    return name if own == wanted else _cast(graph, name, wanted)


def _cast(graph: OnnxGraph, name: str, dtype: torch.dtype) -> str:
    import onnx

    kinds = {
        torch.float32: onnx.TensorProto.FLOAT, torch.float64: onnx.TensorProto.DOUBLE, torch.int64: onnx.TensorProto.INT64,
        torch.int32: onnx.TensorProto.INT32, torch.bool: onnx.TensorProto.BOOL,
    }  # fmt: skip
    if dtype not in kinds:
        raise UnsupportedModelError(f"ONNX export has no cast to {dtype}.")
    return str(graph.add("Cast", [name], to=kinds[dtype]))


@translates("aten::to", "aten::type_as")
def cast(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Change the dtype."""
    wanted = graph.described[node.outputs[0]]
    if isinstance(args[0], Value) and (args[0].dtype, args[0].grid) == (wanted.dtype, wanted.grid):
        graph.values[node.outputs[0]] = args[0]
    else:
        graph.put(node, _cast(graph, graph.real(args[0]), wanted.dtype))


@translates(*(f"aten::{name}" for name in COMPARISONS), "aten::ne")
def compare(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Compare two tensors, or a tensor and a number."""
    dtype = args[0].dtype if isinstance(args[0], Value) and args[0].grid is None else torch.float32
    other = graph.number(args[1], dtype) if isinstance(args[1], bool | int | float) else graph.real(args[1])
    name = graph.add(COMPARISONS.get(_name(node), "Equal"), [graph.real(args[0]), other])
    graph.put(node, graph.add("Not", [name]) if _name(node) == "ne" else name)


@translates("aten::logical_not", "aten::bitwise_not")
def negate(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Negate a condition."""
    graph.put(node, graph.add("Not", [_cast(graph, graph.real(args[0]), torch.bool)]))


@translates("aten::masked_fill", "aten::masked_fill_")
def masked_fill(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Replace what a mask marks."""
    x, mask, value = args
    dtype = graph.described[node.outputs[0]].dtype
    graph.put(node, graph.add("Where", [graph.real(mask), graph.number(value, dtype), graph.real(x)]))


@translates("aten::where.self")
def where(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Choose by a condition."""
    graph.put(node, graph.add("Where", [graph.real(args[0]), _operand(graph, node, args[1]), _operand(graph, node, args[2])]))


@translates("aten::clamp", "aten::clamp_", "aten::hardtanh", "aten::hardtanh_", "aten::relu6", "aten::relu6_", "aten::clamp_min")
def clip(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Keep within limits."""
    low, high = (0.0, 6.0) if "relu6" in node.op else (args[1], args[2] if len(args) > 2 else None)
    if any(isinstance(limit, Value | Tensor) for limit in (low, high)):
        raise UnsupportedModelError("ONNX export has limits that are numbers alone.")
    limits = ["" if limit is None else graph.number(float(limit)) for limit in (low, high)]
    graph.put(node, graph.add("Clip", [graph.real(args[0]), *limits]))


@translates("aten::hardsigmoid", "aten::hardsigmoid_")
def hardsigmoid(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply hardsigmoid."""
    graph.put(node, graph.add("HardSigmoid", [graph.real(args[0])], alpha=1 / 6, beta=0.5))


@translates("aten::silu", "aten::silu_")
def silu(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply SiLU."""
    x = graph.real(args[0])
    graph.put(node, graph.add("Mul", [x, graph.add("Sigmoid", [x])]))


@translates("aten::gelu")
def gelu(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply GELU."""
    graph.put(node, graph.add("Gelu", [graph.real(args[0])], approximate=args[1]))


@translates("aten::leaky_relu", "aten::leaky_relu_", "quantized::leaky_relu", "aten::elu", "aten::elu_")
def leaky(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply a ReLU that is not zero below zero."""
    if _name(node) == "elu" and args[2:] != [1, 1]:
        raise UnsupportedModelError("ONNX export has ELU with alpha alone.")
    graph.put(node, graph.add("LeakyRelu" if "leaky" in node.op else "Elu", [graph.real(args[0])], alpha=float(args[1])))


@translates("aten::prelu")
def prelu(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply a ReLU with learned slopes."""
    x, slopes = args
    shape = (-1, *[1] * (x.rank - 2)) if slopes.numel() > 1 else (1,)
    graph.put(node, graph.add("PRelu", [graph.real(x), graph.constant(slopes.detach().reshape(shape))]))


@translates("aten::softmax", "quantized::softmax", "aten::log_softmax")
def softmax(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Apply softmax or its logarithm."""
    graph.put(node, graph.add("Softmax" if _name(node) == "softmax" else "LogSoftmax", [graph.real(args[0])], axis=args[1]))


# --- products ----------------------------------------------------------------------------------------------------------------


@translates("aten::matmul", "aten::bmm", "aten::mm")
def matmul(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Multiply matrices."""
    graph.put(node, graph.add("MatMul", [graph.real(args[0]), graph.real(args[1])]))


@translates("aten::linear")
def linear(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Multiply by a matrix in float."""
    x, weight, bias = args
    if isinstance(weight, Value) and x.rank == 2:
        inputs = [graph.real(x), graph.real(weight), *([] if bias is None else [graph.real(bias)])]
        graph.put(node, graph.add("Gemm", inputs, transB=1))
        return
    turned = (
        graph.constant(weight.detach().t()) if isinstance(weight, Tensor) else graph.add("Transpose", [graph.real(weight)], perm=[1, 0])
    )
    product = graph.add("MatMul", [graph.real(x), turned])
    graph.put(node, product if bias is None else graph.add("Add", [product, graph.real(bias)]))


@translates("aten::addmm")
def addmm(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Multiply matrices and add."""
    graph.put(
        node, graph.add("Gemm", [graph.real(args[1]), graph.real(args[2]), graph.real(args[0])], beta=float(args[3]), alpha=float(args[4]))
    )


@translates("aten::_convolution", "aten::convolution")
def convolution(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Convolve in float."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args[:9]
    dims = (weight.rank if isinstance(weight, Value) else weight.dim()) - 2
    stride, padding, dilation = (list(values) * (dims if len(values) == 1 else 1) for values in (stride, padding, dilation))
    inputs = [graph.real(x), graph.real(weight), *([] if bias is None else [graph.real(bias)])]
    geometry: dict[str, Any] = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
    if transposed:
        graph.put(node, graph.add("ConvTranspose", inputs, output_padding=list(output_padding), **geometry))
    else:
        graph.put(node, graph.add("Conv", inputs, **geometry))


@translates("aten::conv1d", "aten::conv2d", "aten::conv3d")
def functional_convolution(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Convolve in float, called as a function."""
    x, weight, bias, stride, padding, dilation, groups = args
    if isinstance(padding, str):
        raise UnsupportedModelError(f"ONNX export has no convolution with padding={padding!r}: give it numbers.")
    convolution(graph, node, [x, weight, bias, stride, padding, dilation, False, [0], groups])


@translates("aten::embedding")
def embedding(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Look vectors up."""
    graph.put(node, graph.add("Gather", [graph.real(args[0]), graph.real(args[1])]))


@translates("aten::scaled_dot_product_attention")
def attention(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Attend: softmax of scaled products, times values."""
    query, key, value, mask, dropout, causal, scale = args[:7]
    if causal or dropout:
        raise UnsupportedModelError("ONNX export has attention without dropout and causal masks made by torch.")
    order = [*range(key.rank - 2), key.rank - 1, key.rank - 2]
    scaled = graph.add("Mul", [graph.real(query), graph.number(1 / math.sqrt(query.shape[-1]) if scale is None else scale)])
    scores = graph.add("MatMul", [scaled, graph.add("Transpose", [graph.real(key)], perm=order)])
    if isinstance(mask, Value | Tensor):
        scores = _masked(graph, scores, mask)
    graph.put(node, graph.add("MatMul", [graph.add("Softmax", [scores], axis=-1), graph.real(value)]))


def _masked(graph: OnnxGraph, scores: str, mask: Any) -> str:
    if mask.dtype == torch.bool:
        return str(graph.add("Where", [graph.real(mask), scores, graph.number(-INF)]))
    return str(graph.add("Add", [scores, graph.real(mask)]))


# --- normalisation -----------------------------------------------------------------------------------------------------------


@translates("aten::layer_norm", "quantized::layer_norm")
def layer_norm(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Normalise over the last dimensions."""
    x, shape, weight, bias, eps = args[:5]
    scale = torch.ones(shape) if weight is None else weight
    inputs = [graph.real(x), graph.real(scale), *([] if bias is None else [graph.real(bias)])]
    graph.put(node, graph.add("LayerNormalization", inputs, axis=-len(shape), epsilon=float(eps)))


@translates("aten::group_norm")
def group_norm(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Normalise over groups of channels."""
    x, groups, weight, bias, eps = args[:5]
    channels = x.shape[1]
    weight = torch.ones(channels) if weight is None else weight
    bias = torch.zeros(channels) if bias is None else bias
    inputs = [graph.real(x), graph.real(weight), graph.real(bias)]
    graph.put(node, graph.add("GroupNormalization", inputs, num_groups=groups, epsilon=float(eps)))


@translates("aten::batch_norm")
def batch_norm(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Normalise by running statistics."""
    x, weight, bias, mean, variance, training, _, eps = args[:8]
    if training or mean is None:
        raise UnsupportedModelError("ONNX export has BatchNorm by running statistics alone: put the model into eval mode.")
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    inputs = [graph.real(x), *(graph.real(tensor) for tensor in (weight, bias, mean, variance))]
    graph.put(node, graph.add("BatchNormalization", inputs, epsilon=float(eps)))


# --- reductions and pooling --------------------------------------------------------------------------------------------------


@translates("aten::mean", "aten::mean.dim", "aten::sum", "aten::sum.dim_IntList", "aten::amax", "aten::amin")
def reduce(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Take the mean, sum or an extreme over dimensions."""
    x, axes = args[0], args[1] if isinstance(args[1], list) else list(range(args[0].rank))
    axes, keep = [axis % x.rank for axis in axes] or list(range(x.rank)), len(args) > 2 and args[2] is True
    if _name(node) == "mean" and x.rank == 4 and sorted(axes) == [2, 3]:
        pooled = graph.add("GlobalAveragePool", [graph.real(x)])
        grid = graph.described[node.outputs[0]].grid
        if keep or grid is None:
            graph.put(node, pooled if keep else graph.add("Squeeze", [pooled, graph.ints([2, 3])]))
        else:
            graph.put(node, graph.add("Squeeze", [graph.quantize(pooled, grid), graph.ints([2, 3])]), integers=True)
        return
    op = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}[_name(node)]
    graph.put(node, graph.add(op, [graph.real(x), graph.ints(axes)], keepdims=int(keep)))


@translates("aten::adaptive_avg_pool1d", "aten::adaptive_avg_pool2d", "aten::adaptive_avg_pool3d")
def adaptive_pool(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Take means so that the output has a given size."""
    x, sizes = args
    before = x.shape[-len(sizes) :]
    if all(size == 1 for size in sizes):
        graph.put(node, graph.add("GlobalAveragePool", [graph.real(x)]))
        return
    if any(own is None or own % size for own, size in zip(before, sizes, strict=True)):
        raise UnsupportedModelError(
            f"ONNX export has adaptive pooling to one element, or to sizes that divide those of the input; not {list(before)} to {sizes}."
        )
    steps = [own // size for own, size in zip(before, sizes, strict=True)]
    graph.put(node, graph.add("AveragePool", [graph.real(x)], kernel_shape=steps, strides=steps))


@translates("aten::max_pool1d", "aten::max_pool2d", "aten::max_pool3d")
def max_pool(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Take the largest of each window."""
    x, kernel, stride, padding, dilation, ceil = args
    kernel, stride, padding, dilation = _window(node, kernel, stride, padding, dilation)
    geometry: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": stride,
        "pads": [*padding, *padding],
        "dilations": dilation,
        "ceil_mode": int(ceil),
    }
    graph.put(node, graph.add("MaxPool", [graph.real(x)], **geometry))


@translates("aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d")
def avg_pool(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Take the mean of each window."""
    x, kernel, stride, padding, ceil, include = args[:6]
    if len(args) > 6 and args[6] is not None:
        raise UnsupportedModelError("ONNX export has average pooling without divisor_override alone.")
    kernel, stride, padding, _ = _window(node, kernel, stride, padding, [1])
    geometry: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": [*padding, *padding], "ceil_mode": int(ceil)}
    graph.put(node, graph.add("AveragePool", [graph.real(x)], count_include_pad=int(include), **geometry))


def _window(node: Node, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> list[list[int]]:
    dims = int(_name(node)[-2])
    return [values * dims if len(values) == 1 else values for values in (kernel, stride or kernel, padding, dilation)]
