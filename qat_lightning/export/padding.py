"""Padding by zeros in front of convolutions alone, which do it themselves: a pass over memory less for every runtime."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from qat_lightning.export.graph import OnnxGraph

CASTS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def fold_padding(graph: OnnxGraph, outputs: set[str]) -> int:
    """Let convolutions do the padding that nothing else reads; zeros are zeros on every grid, so that no number changes.

    Args:
        graph: whole; it is changed.
        outputs: names of its outputs.

    Returns:
        how many nodes Pad are gone.
    """
    constants = {tensor.name: tensor for tensor in graph.initializers}
    makers = {name: node for node in graph.nodes for name in node.output}
    readers = _readers(graph.nodes)
    folded = 0
    for pad in [node for node in graph.nodes if node.op_type == "Pad"]:
        convolutions = list(_convolutions(readers, pad.output[0]))
        widths = _widths(constants, pad)
        if widths is None or not convolutions or None in convolutions:
            continue
        for convolution in convolutions:
            _widen(convolution, widths)
        _bypass(readers, pad, makers.get(pad.input[0]))
        folded += 1
    if folded:
        _drop_unread(graph, outputs)
    return folded


def _readers(nodes: list[Any]) -> dict[str, list[Any]]:
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    return readers


def _convolutions(readers: dict[str, list[Any]], name: str) -> Iterator[Any]:
    """Yield the convolutions that read a tensor, on a grid or not, and None for any other reader."""
    for reader in readers[name]:
        if reader.op_type in CASTS:
            yield from _convolutions(readers, reader.output[0])
        else:
            yield reader if reader.op_type == "Conv" and list(reader.input).count(name) == 1 and reader.input[0] == name else None


def _widths(constants: dict[str, Any], pad: Any) -> list[int] | None:
    """Return the widths before and after each spatial dimension; None where the padding is none that a convolution has."""
    import onnx

    given, value = (onnx.numpy_helper.to_array(constants[name]) for name in pad.input[1:3])
    widths = [int(width) for width in given]
    before, after = widths[: len(widths) // 2], widths[len(widths) // 2 :]
    if value != 0 or any((*before[:2], *after[:2])) or min(widths) < 0:
        return None
    return [*before[2:], *after[2:]]


def _widen(convolution: Any, widths: list[int]) -> None:
    """Add widths to the padding of a convolution."""
    import onnx

    own = [list(attribute.ints) for attribute in convolution.attribute if attribute.name == "pads"] or [[0] * len(widths)]
    kept = [attribute for attribute in convolution.attribute if attribute.name != "pads"]
    del convolution.attribute[:]
    pads = [one + other for one, other in zip(own[0], widths, strict=True)]
    convolution.attribute.extend([*kept, onnx.helper.make_attribute("pads", pads)])


def _bypass(readers: dict[str, list[Any]], pad: Any, maker: Any) -> None:
    """Let the readers of a padded tensor read the tensor itself: its integers, where they would only make the same ones again."""
    for reader in readers[pad.output[0]]:
        if _undoes(maker, reader):
            for behind in readers[reader.output[0]]:
                behind.input[0] = maker.input[0]
        else:
            reader.input[0] = pad.input[0]


def _undoes(maker: Any, reader: Any) -> bool:
    """Return whether a quantization gives the integers that a dequantization has taken."""
    if maker is None or maker.op_type != "DequantizeLinear" or reader.op_type != "QuantizeLinear":
        return False
    return list(maker.input[1:]) == list(reader.input[1:])


def _drop_unread(graph: OnnxGraph, outputs: set[str]) -> None:
    """Remove what nothing reads any more."""
    read, kept = set(outputs), []
    for node in reversed(graph.nodes):
        if read & set(node.output):
            kept.append(node)
            read |= set(node.input)
    graph.nodes = kept[::-1]
    graph.initializers = [tensor for tensor in graph.initializers if tensor.name in read]
