"""int8 layers and operations: a DequantizeLinear for each input, the operation in real numbers, a QuantizeLinear behind it.

Runtimes recognise these groups and run each as one integer kernel. A clip that the saturation of QuantizeLinear makes is left out.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qat_lightning.affine import product_scale, quantize_bias
from qat_lightning.errors import UnsupportedModelError
from qat_lightning.export.graph import OnnxGraph, Value
from qat_lightning.export.registry import translates
from qat_lightning.program.nodes import Node, Packed, PackedLayer


@translates("aten::quantize_per_tensor")
def quantize(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Quantize the input of a layer."""
    graph.put(node, graph.real(args[0]))


@translates("aten::dequantize")
def dequantize(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Leave int8."""
    graph.put(node, graph.real(args[0]))


@translates("aten::_make_per_channel_quantized_tensor", "aten::_make_per_tensor_quantized_tensor")
def weight(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Take the integers and scales of a weight, which the node behind it makes real numbers."""
    integers, scale = args[0], torch.as_tensor(args[1], dtype=torch.float32).reshape(-1)
    zero_points = torch.zeros(len(scale), dtype=torch.int8)
    described = graph.described[node.outputs[0]]
    inputs = [
        graph.constant(integers, "weight"),
        *(graph.constant(tensor if len(scale) > 1 else tensor[0]) for tensor in (scale, zero_points)),
    ]
    graph.values[node.outputs[0]] = replace(described, name=graph.add("DequantizeLinear", inputs, axis=0), grid=None)


@translates(*(f"quantized::conv{dims}d{relu}" for dims in (1, 2, 3) for relu in ("", "_relu")))
def convolution(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Convolve; the weights stay int8 in the file."""
    x, packed = args[0], args[1]
    weight, scale, bias = graph.layer_weight(packed.layer)
    inputs = [graph.real(x), *_parameters(graph, packed, x, weight, scale, bias, axis=0)]
    graph.put(node, _rectified(graph, node, graph.add("Conv", inputs, **_geometry(graph.program.layers[packed.layer]))))


def _geometry(layer: PackedLayer) -> dict[str, Any]:
    """Return the attributes of a convolution that are not those it has without."""
    geometry: dict[str, Any] = {}
    if any(layer.padding):
        geometry["pads"] = (*layer.padding, *layer.padding)
    if {*layer.stride} != {1}:
        geometry["strides"] = layer.stride
    if {*layer.dilation} != {1}:
        geometry["dilations"] = layer.dilation
    if layer.groups != 1:
        geometry["group"] = layer.groups
    return geometry


@translates("quantized::linear", "quantized::linear_relu")
def linear(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Multiply by a matrix; inputs of more than two dimensions become two, which runtimes have an integer kernel for."""
    x, packed = args[0], args[1]
    weight, scale, bias = graph.layer_weight(packed.layer)
    rows = x
    if x.rank != 2:
        rows = Value(graph.add("Reshape", [x.name, graph.ints([-1, weight.shape[1]])]), (None, weight.shape[1]), x.dtype, x.grid)
    inputs = [graph.real(rows), *_parameters(graph, packed, x, weight.t(), scale, bias, axis=1)]
    product = _rectified(graph, node, graph.add("Gemm", inputs))
    if x.rank == 2:
        graph.put(node, product)
        return
    grid = graph.described[node.outputs[0]].grid
    assert grid is not None
    shape = _leading_shape(graph, x, weight.shape[0])
    graph.put(node, graph.add("Reshape", [graph.quantize(product, grid), shape]), integers=True)


def _leading_shape(graph: OnnxGraph, x: Value, last: int) -> str:
    """Return the shape of ``x`` with another last size."""
    if x.shape[:-1].count(None) <= 1:
        return graph.ints([*(-1 if size is None else size for size in x.shape[:-1]), last])
    lead = graph.add("Slice", [graph.add("Shape", [x.name]), graph.ints([0]), graph.ints([x.rank - 1])])
    return str(graph.add("Concat", [lead, graph.ints([last])], axis=0))


@translates("quantized::add", "quantized::add_relu", "quantized::mul", "quantized::mul_relu", "quantized::matmul")
def binary(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Add or multiply two tensors, or one and a number."""
    name = node.op.partition("::")[2].partition(".")[0].removesuffix("_relu")
    result = graph.add({"add": "Add", "mul": "Mul", "matmul": "MatMul"}[name], [graph.real(args[0]), graph.real(args[1])])
    graph.put(node, _rectified(graph, node, result))


@translates("quantized::add_scalar", "quantized::mul_scalar", "quantized::add_scalar_relu", "quantized::mul_scalar_relu")
def binary_scalar(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Add or multiply a tensor and a number."""
    binary(graph, Node(node.op.replace("_scalar", ""), node.args, node.outputs), args)


@translates("quantized::cat", "quantized::cat_relu")
def concatenate(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Concatenate tensors, each from its own grid."""
    tensors, axis = args[0], args[1]
    graph.put(node, _rectified(graph, node, graph.add("Concat", [graph.real(tensor) for tensor in tensors], axis=axis)))


@translates("quantized::batch_norm2d", "quantized::batch_norm2d_relu", "quantized::batch_norm1d", "quantized::batch_norm")
def batch_norm(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Normalise by running statistics."""
    x, weight, bias, mean, variance, eps = args[:6]
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    inputs = [graph.real(x), *(graph.constant(tensor) for tensor in (weight, bias, mean, variance))]
    graph.put(node, _rectified(graph, node, graph.add("BatchNormalization", inputs, epsilon=float(eps))))


def _rectified(graph: OnnxGraph, node: Node, name: str) -> str:
    """Return the output of an operation behind the ReLU that is fused with it; on a grid that starts at 0, saturation is the ReLU."""
    if not node.op.partition(".")[0].endswith("_relu"):
        return name
    grid = graph.described[node.outputs[0]].grid
    return name if grid is not None and grid.zero_point == 0 else str(graph.add("Relu", [name]))


def _parameters(graph: OnnxGraph, packed: Packed, x: Value, weight: Tensor, scale: Tensor, bias: Tensor | None, axis: int) -> Iterator[str]:
    """Yield the weight, and the bias if there is one, in int32 on the grid of the products, as integer kernels add it."""
    name, scales = packed.layer or "layer", graph.constant(scale)
    zero_points = graph.constant(torch.zeros(len(scale), dtype=torch.int8))
    yield graph.add("DequantizeLinear", [graph.constant(weight, f"{name}.weight"), scales, zero_points], axis=axis)
    if bias is None:
        return
    if x.grid is None:
        raise UnsupportedModelError(f"Layer {packed.layer!r} takes real numbers: ONNX export has static quantization alone.")
    integers = quantize_bias(bias.detach(), product_scale(scale, x.grid.scale))
    products = graph.add("Mul", [scales, graph.number(x.grid.scale)])
    yield graph.add("DequantizeLinear", [graph.constant(integers, f"{name}.bias"), products], axis=0)
