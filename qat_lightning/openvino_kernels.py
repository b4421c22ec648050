"""Changes an OpenVINO model so that faster kernels compute the same, on x86 processors with AVX2 and neither VNNI nor AMX.

Measured on an AMD EPYC with 512 KiB of L2 and 8 MiB of L3 cache, one thread.
"""

from typing import Any

import numpy

from qat_lightning.openvino_graph import before_casts

# Of one element, from its own numbers and constants: they do not ask how many dimensions there are.
ELEMENTWISE = frozenset(
    {
        "Multiply",
        "Subtract",
        "Add",
        "FakeQuantize",
        "Convert",
        "Relu",
        "Clamp",
        "HSwish",
        "HSigmoid",
        "HardSigmoid",
        "Sigmoid",
        "Tanh",
        "Round",
    }
)
LARGEST_IMAGE = 1_000_000
LARGEST_BATCH = 2_500_000
"""Bytes of real numbers up to which a depthwise convolution is faster on them, for an image and for all."""


def linear_as_convolutions(model: Any) -> int:
    """Let convolutions of one pixel compute linear layers: 0.2 to 0.5 of the time of OpenVINO's int8 matrix product, and the same integers.

    Args:
        model: an ``openvino.Model``; it is changed.

    Returns:
        how many layers were replaced.
    """
    replaced = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and _as_convolution(node):
            replaced += 1
    model.validate_nodes_and_infer_types()
    return replaced


def _as_convolution(product: Any) -> bool:
    """Replace a product with an int8 matrix, and compute what follows of each element as pixels; says whether it did."""
    from openvino import opset13

    attributes = product.get_attributes()
    rows = product.input_value(0)
    weight = _int8_matrix(product.input_value(1), attributes["transpose_b"])
    if weight is None or attributes["transpose_a"] or rows.get_partial_shape().rank.is_dynamic:
        return False
    integers, scale = weight
    kernel = opset13.multiply(
        opset13.convert(opset13.constant(integers[..., None, None]), "f32"), opset13.constant(scale[:, None, None, None])
    )
    last = opset13.convolution(_pixels(rows, integers.shape[1]), kernel, [1, 1], [0, 0], [0, 0], [1, 1]).output(0)
    readers = product.output(0).get_target_inputs()
    while (behind := _elementwise(readers)) is not None:
        _widen_vectors(behind)
        _redirect(readers, last)
        behind.validate_and_infer_types()
        last = behind.output(0)
        readers = last.get_target_inputs()
    _redirect(readers, _rows(last, rows, len(scale)))
    return True


def _pixels(rows: Any, channels: int) -> Any:
    """Return rows, of any dimensions, as images of one pixel."""
    from openvino import opset13

    if rows.get_partial_shape().rank.get_length() == 2:
        return opset13.unsqueeze(rows, numpy.array([2, 3]))
    return opset13.reshape(rows, numpy.array([-1, channels, 1, 1]), False)


def _rows(pixels: Any, given: Any, channels: int) -> Any:
    """Return images of one pixel as rows, of the dimensions that the given ones have."""
    from openvino import opset13

    rank = given.get_partial_shape().rank.get_length()
    if rank == 2:
        return opset13.squeeze(pixels, numpy.array([2, 3])).output(0)
    leading = opset13.gather(opset13.shape_of(given), numpy.arange(rank - 1), numpy.array(0))
    return opset13.reshape(pixels, opset13.concat([leading, numpy.array([channels])], 0), False).output(0)


def _int8_matrix(output: Any, transposed: bool) -> tuple[Any, Any] | None:
    """Return integers of shape (outputs, inputs) and a scale for each output; None for what is no int8 matrix."""
    product = output.get_node()
    if product.get_type_name() == "Transpose" and constant(product.input_value(1)).tolist() == [1, 0]:
        return _int8_matrix(product.input_value(0), not transposed)
    if product.get_type_name() != "Multiply":
        return None
    left = product.input_value(0).get_node()
    if left.get_type_name() == "Subtract":
        zero_points = constant(left.input_value(1))
        if zero_points is None or zero_points.any():
            return None
        left = left.input_value(0).get_node()
    stored, scale = before_casts(left), constant(product.input_value(1))
    if stored.get_type_name() != "Constant" or stored.get_element_type().get_type_name() != "i8" or scale is None:
        return None
    integers = stored.get_data()
    scales = numpy.broadcast_to(scale, integers.shape)
    if not transposed:
        integers, scales = integers.T, scales.T
    if integers.ndim != 2 or (scales != scales[:, :1]).any():
        return None
    return numpy.ascontiguousarray(integers), numpy.ascontiguousarray(scales[:, 0])


def _elementwise(readers: Any) -> Any:
    """Return the only reader where it computes each element from itself and from a number, or one for each channel; else None."""
    if len(readers) != 1:
        return None
    (reader,) = readers
    node = reader.get_node()
    if node.get_type_name() not in ELEMENTWISE or reader.get_index() != 0:
        return None
    if any(other is None or (other.size != 1 and other.shape[-1] != other.size) for other in _operands(node)):
        return None
    return node


def _operands(node: Any) -> list[Any]:
    """Return the inputs behind the first, None for each that is not constant."""
    return [constant(node.input_value(index)) for index in range(1, node.get_input_size())]


def _widen_vectors(node: Any) -> None:
    """Give numbers per column the shape of numbers per channel."""
    from openvino import opset13

    for index, values in enumerate(_operands(node), start=1):
        if values.ndim:
            shape = [1, values.size, 1, 1]
            node.input(index).replace_source_output(opset13.constant(values.reshape(shape)).output(0))


def _redirect(readers: Any, output: Any) -> None:
    for reader in readers:
        reader.replace_source_output(output)


def depthwise_on_real_numbers(model: Any) -> int:
    """Let small depthwise convolutions read real numbers, behind a convolution of one pixel that rounds them in its kernel.

    Their int8 kernel takes 1.2 to 1.5 of the time of that for real numbers, which is bound by memory from some size on.

    Args:
        model: an ``openvino.Model`` whose inputs have fixed sizes; it is changed. What the layers read is rounded by
            :func:`~qat_lightning.openvino_graph.round_in_kernels` afterwards.

    Returns:
        how many layers were replaced.
    """
    from openvino import opset13

    found = [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupConvolution" and _gains_by_real_numbers(node)]
    for node in found:
        node.input(1).replace_source_output(opset13.constant(constant(node.input_value(1))).output(0))
    return len(found)


def _gains_by_real_numbers(node: Any) -> bool:
    x, weight = node.input_value(0).get_partial_shape(), node.input_value(1)
    if x.is_dynamic or weight.get_node().get_type_name() == "Constant" or constant(weight) is None:
        return False
    size = 4 * numpy.prod(x.to_shape())
    if size > LARGEST_BATCH or size > LARGEST_IMAGE * x.to_shape()[0]:
        return False
    depthwise = weight.get_shape()[1:3] == [1, 1]
    return depthwise and set(node.get_attributes()["strides"]) == {1} and _is_read_alone(node) and _comes_from_pixels(node)


def _is_read_alone(node: Any) -> bool:
    """Return whether nothing else reads the numbers."""
    return len(node.input_value(0).get_target_inputs()) == 1


def _comes_from_pixels(node: Any) -> bool:
    """Return whether a convolution of one pixel gives the numbers, with nothing behind it that is no part of its kernel."""
    source = node.input_value(0).get_node()
    while source.get_type_name() in ELEMENTWISE:
        if any(operand is None for operand in _operands(source)):
            return False
        source = source.input_value(0).get_node()
    return source.get_type_name() == "Convolution" and {*source.get_input_shape(1)[2:]} == {1}


def constant(output: Any) -> Any:
    """Return the numbers of constants, and of what is computed from constants alone, as float32; None for anything else."""
    node, kind = output.get_node(), output.get_node().get_type_name()
    if kind == "Constant":
        return node.get_data().astype(numpy.float32)
    if kind == "Convert":
        return constant(node.input_value(0))
    if kind in ("Reshape", "Unsqueeze"):
        values, shape = constant(node.input_value(0)), output.get_partial_shape()
        return None if values is None or shape.is_dynamic else values.reshape(shape.to_shape())
    if kind in ("Multiply", "Subtract"):
        one, other = constant(node.input_value(0)), constant(node.input_value(1))
        if one is None or other is None:
            return None
        return one * other if kind == "Multiply" else one - other
    return None
