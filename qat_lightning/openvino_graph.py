"""Changes an ONNX model with QDQ nodes, as OpenVINO has read it, so that OpenVINO computes the same with fewer passes over memory.

A grid between a layer and an activation such as hardswish is read by no int8 kernel. OpenVINO makes integers there all the same, and three
operations of their own that make real numbers of them again. Rounded as real numbers they stay what they are, and the rounding becomes a
part of the layer's kernel. The same holds for hardsigmoid with torch's constants, for which OpenVINO has an operation that can be one.
What a layer gives to a sum alone OpenVINO adds in the layer's kernel, and does not round; rounded as a real number it is.
"""

import math
from typing import Any

import numpy

# What OpenVINO computes in real numbers, whatever it reads.
REAL_ACTIVATIONS = frozenset({"HSwish", "HSigmoid", "HardSigmoid", "Sigmoid", "Swish", "Tanh", "Gelu", "Elu", "Mish", "SoftPlus"})
# What it computes in the kernel of the layer in front, unless another kernel needs its integers.
SUMS = frozenset({"Add"})
REAL_CONVOLUTION = "GroupConvolution with real weights"
UINT8_LEVELS = 256


def round_in_kernels(model: Any) -> int:
    """Change a model in place.

    Args:
        model: an ``openvino.Model``.

    Returns:
        how many operations were replaced.
    """
    replaced = 0
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        other = _rounded(node) if kind == "Multiply" else _hard_sigmoid(node) if kind == "HardSigmoid" else None
        if other is not None:
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(other.output(0))
            replaced += 1
    return replaced


def _rounded(dequantized: Any) -> Any:
    """Return the rounding of what was quantized and is dequantized by this product; None where an int8 kernel may read it."""
    from openvino import opset13

    readers = {_kind(reader.get_node()) for reader in dequantized.output(0).get_target_inputs()}
    if not readers or not readers <= REAL_ACTIVATIONS | SUMS | {REAL_CONVOLUTION}:
        return None
    scale, integers = _number(dequantized.input_value(1)), dequantized.input_value(0).get_node()
    zero_point: float | None = 0.0
    if integers.get_type_name() == "Subtract":
        zero_point, integers = _number(integers.input_value(1)), integers.input_value(0).get_node()
    quantized = before_casts(integers)
    if scale is None or zero_point is None or quantized.get_type_name() != "FakeQuantize":
        return None
    if quantized.get_attributes()["levels"] != UINT8_LEVELS or (readers & SUMS and _also_read(quantized)):
        return None
    # As torch's kernels do it: multiplied by the reciprocal.
    steps = opset13.round(opset13.multiply(quantized.input_value(0), numpy.float32(1 / scale)), "half_to_even")
    return opset13.multiply(opset13.clamp(steps, -zero_point, UINT8_LEVELS - 1 - zero_point), numpy.float32(scale))


def _kind(reader: Any) -> str:
    kind: str = reader.get_type_name()
    return REAL_CONVOLUTION if kind == "GroupConvolution" and reader.input_value(1).get_node().get_type_name() == "Constant" else kind


def _also_read(quantized: Any) -> bool:
    """Return whether more than one dequantization reads the integers."""
    node = quantized
    while node.get_type_name() in ("FakeQuantize", "Convert", "Subtract"):
        readers = node.output(0).get_target_inputs()
        if len(readers) != 1:
            return True
        node = next(iter(readers)).get_node()
    return False


def _hard_sigmoid(node: Any) -> Any:
    """Return the operation that is hardsigmoid with a slope of a sixth, and None for any other."""
    from openvino import opset13

    slope, offset = (_number(node.input_value(index)) for index in (1, 2))
    if slope is None or offset != 0.5 or not math.isclose(slope, 1 / 6, rel_tol=1e-6):
        return None
    return opset13.hsigmoid(node.input_value(0))


def _number(output: Any) -> float | None:
    """Return a constant with one element, None for anything else."""
    node = before_casts(output.get_node())
    if node.get_type_name() != "Constant" or node.get_data().size != 1:
        return None
    return float(node.get_data().reshape(-1)[0])


def before_casts(node: Any) -> Any:
    """Return the operation whose numbers are cast."""
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node
