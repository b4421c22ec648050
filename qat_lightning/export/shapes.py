"""Operations that move numbers and compute none; quantized tensors stay on their grid."""

from typing import Any

import torch
from torch import Tensor

from qat_lightning.errors import UnsupportedModelError
from qat_lightning.export.graph import OnnxGraph, Size, Value
from qat_lightning.export.registry import translates
from qat_lightning.program.nodes import Node

LAST = 2**62


@translates("aten::alias", "aten::detach", "aten::clone", "aten::contiguous", "aten::dropout", "aten::feature_dropout", "aten::dropout_")
def same(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Pass on."""
    if "dropout" in node.op and args[2]:
        raise UnsupportedModelError("ONNX export found dropout that is on: put the model into eval mode.")
    if isinstance(args[0], Value):
        graph.values[node.outputs[0]] = args[0]
    else:
        graph.put(node, graph.real(args[0]))


# --- sizes -------------------------------------------------------------------------------------------------------------------


@translates("aten::size.int")
def size(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Return a size: a number where it is always the same."""
    x, axis = args
    known = x.shape[axis]
    axis %= x.rank
    value: Any = known
    if known is None:
        value = Size(graph.add("Slice", [graph.add("Shape", [x.name]), graph.ints([axis]), graph.ints([axis + 1])]))
    graph.values[node.outputs[0]] = value


@translates("prim::NumToTensor", "aten::Int", "aten::IntImplicit", "aten::ScalarImplicit")
def number(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Pass on a size."""
    value = args[0]
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, int | Size):
        raise UnsupportedModelError(f"ONNX export cannot take {node.op} of a tensor that is no size.")
    graph.values[node.outputs[0]] = value


def arithmetic_of_sizes(graph: OnnxGraph, node: Node, args: list[Any]) -> bool:
    """Compute with sizes; returns whether the operands are such."""
    one, other = args[0], args[1]
    one, other = (
        item.item() if isinstance(item, Tensor) and item.dim() == 0 and not item.is_floating_point() else item for item in (one, other)
    )
    kinds = (int, Size)
    if not (isinstance(one, kinds) and isinstance(other, kinds)):
        return False
    name = node.op.partition("::")[2].partition(".")[0]
    if isinstance(one, int) and isinstance(other, int):
        compute = {"add": one + other, "sub": one - other, "mul": one * other}
        graph.values[node.outputs[0]] = compute[name] if name in compute else one // other
        return True
    op = {"add": "Add", "sub": "Sub", "mul": "Mul", "floor_divide": "Div"}.get(name)
    if op is None:
        raise UnsupportedModelError(f"ONNX export cannot compute {node.op} of sizes that vary.")
    graph.values[node.outputs[0]] = Size(graph.add(op, [_as_vector(graph, item) for item in (one, other)]))
    return True


@translates("aten::floor_divide")
def floor_divide(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Divide sizes."""
    if not arithmetic_of_sizes(graph, node, args):
        raise UnsupportedModelError("ONNX export has floor division of sizes alone.")


def _as_vector(graph: OnnxGraph, item: Any) -> str:
    return item.name if isinstance(item, Size) else graph.ints([item])


def shape_of(graph: OnnxGraph, items: list[Any]) -> str:
    """Return a shape as a vector of int64."""
    if all(isinstance(item, int) for item in items):
        return graph.ints(items)
    return str(graph.add("Concat", [_as_vector(graph, item) for item in items], axis=0))


# --- tensors -----------------------------------------------------------------------------------------------------------------


def _moved(graph: OnnxGraph, node: Node, x: Any, op: str, *more: str, **attributes: Any) -> None:
    """Apply an operation that moves elements to the integers of a quantized tensor, or to the numbers of another."""
    name = x.name if isinstance(x, Value) else graph.real(x)
    graph.put(node, graph.add(op, [name, *more], **attributes), integers=True)


@translates("aten::view", "aten::reshape")
def reshape(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Reshape."""
    _moved(graph, node, args[0], "Reshape", shape_of(graph, args[1]))


@translates("aten::flatten.using_ints")
def flatten(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Make one dimension of several."""
    x, start, end = args[0], args[1] % args[0].rank, args[2] % args[0].rank
    if start == 1 and end == x.rank - 1:
        _moved(graph, node, x, "Flatten", axis=1)
        return
    shape = graph.described[node.outputs[0]].shape
    if shape.count(None) > 1:
        raise UnsupportedModelError("ONNX export cannot flatten a tensor with several sizes that vary, but from its second dimension on.")
    _moved(graph, node, x, "Reshape", graph.ints([-1 if size is None else size for size in shape]))


@translates("aten::permute")
def permute(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Reorder dimensions."""
    _moved(graph, node, args[0], "Transpose", perm=[axis % args[0].rank for axis in args[1]])


@translates("aten::transpose.int", "aten::t")
def transpose(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Swap two dimensions."""
    order = list(range(args[0].rank))
    one, other = (args[1], args[2]) if len(args) > 1 else (0, -1)
    order[one], order[other] = order[other], order[one]
    _moved(graph, node, args[0], "Transpose", perm=order)


@translates("aten::squeeze.dim")
def squeeze(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Drop a dimension of size one."""
    if args[0].shape[args[1]] != 1:
        same(graph, node, args)
        return
    _moved(graph, node, args[0], "Squeeze", graph.ints([args[1]]))


@translates("aten::unsqueeze")
def unsqueeze(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Add a dimension of size one."""
    _moved(graph, node, args[0], "Unsqueeze", graph.ints([args[1]]))


@translates("aten::expand")
def expand(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Repeat along dimensions of size one."""
    _moved(graph, node, args[0], "Expand", shape_of(graph, [1 if item == -1 else item for item in args[1]]))


@translates("aten::expand_as")
def expand_as(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Repeat along dimensions of size one to the shape of another tensor."""
    _moved(graph, node, args[0], "Expand", graph.add("Shape", [args[1].name]))


@translates("aten::repeat")
def repeat(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Repeat."""
    x, times = args
    if len(times) > x.rank:
        raise UnsupportedModelError("ONNX export has no repeat that adds dimensions.")
    _moved(graph, node, x, "Tile", shape_of(graph, times))


@translates("aten::slice.Tensor")
def slice_(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Take a range of indices."""
    x, axis, start, end, step = args
    bounds = [graph.ints([0]) if start is None else _as_vector(graph, start), graph.ints([LAST]) if end is None else _as_vector(graph, end)]
    _moved(graph, node, x, "Slice", *bounds, graph.ints([axis]), graph.ints([step]))


@translates("aten::select.int")
def select(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Take one index."""
    x, axis, index = args
    if isinstance(index, Size):
        raise UnsupportedModelError("ONNX export cannot select an index that depends on a size.")
    _moved(graph, node, x, "Gather", graph.constant(torch.tensor(index)), axis=axis)


@translates(
    "aten::chunk", "aten::split.Tensor", "aten::split_with_sizes", "aten::split.sizes", "aten::tensor_split.sections", "aten::unbind.int"
)
def split(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Cut into parts; the node that unpacks them gives them names."""
    graph.values[node.outputs[0]] = (node.op.partition("::")[2].partition(".")[0], args)


@translates("prim::ListUnpack")
def unpack(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Give the parts of a tensor names."""
    (op, (x, *rest)) = args[0]
    axis = rest[-1] if op == "unbind" else rest[1]
    described = [graph.described[output] for output in node.outputs]
    if op == "unbind":
        for index, _ in enumerate(node.outputs):
            name = graph.add("Gather", [x.name, graph.constant(torch.tensor(index))], axis=axis)
            graph.put(node, name, index, integers=True)
        return
    sizes = [value.shape[axis] for value in described]
    if None in sizes:
        raise UnsupportedModelError("ONNX export cannot split a dimension that varies.")
    parts = graph.add("Split", [x.name, graph.ints([size for size in sizes if size is not None])], outputs=len(sizes), axis=axis)
    for index, name in enumerate(parts if len(sizes) > 1 else [parts]):
        graph.put(node, name, index, integers=True)


@translates("aten::cat")
def cat(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Concatenate real numbers."""
    graph.put(node, graph.add("Concat", [graph.real(item) for item in args[0]], axis=args[1]))


@translates("aten::stack")
def stack(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Concatenate along a dimension of its own."""
    rows = [graph.add("Unsqueeze", [graph.real(item), graph.ints([args[1]])]) for item in args[0]]
    graph.put(node, graph.add("Concat", rows, axis=args[1]))


@translates("aten::constant_pad_nd", "aten::pad")
def pad(graph: OnnxGraph, node: Node, args: list[Any]) -> None:
    """Pad with a number."""
    x, pads = args[0], args[1]
    mode, value = ("constant", args[2]) if "constant_pad" in node.op else (args[2], args[3])
    if mode != "constant" or not all(isinstance(item, int) for item in pads):
        raise UnsupportedModelError("ONNX export has padding by a fixed width with a number alone.")
    before, after = [0] * x.rank, [0] * x.rank
    for place in range(len(pads) // 2):
        before[-1 - place], after[-1 - place] = pads[2 * place], pads[2 * place + 1]
    graph.put(node, graph.add("Pad", [graph.real(x), graph.ints([*before, *after]), graph.number(float(value or 0))]))
