"""What the tensors of a program are: their shapes, dtypes and grids."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qat_lightning.errors import UnsupportedModelError
from qat_lightning.export.graph import Grid, Value
from qat_lightning.program.execution import run_all
from qat_lightning.program.nodes import Program


def describe(program: Program, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> dict[int, Value]:
    """Run the program at two sizes and return what each tensor is; a dimension that is equal in both does not vary.

    Raises:
        UnsupportedModelError: the program was quantized dynamically, where tensors have no grids.
    """
    _refuse_dynamic(program)
    one = run_all(program, weights, tensors)
    other = run_all(program, weights, [_larger(tensor, spec.shape or ()) for tensor, spec in zip(tensors, program.inputs, strict=True)])
    return {number: _value(one[number], other[number]) for number in one}


def _refuse_dynamic(program: Program) -> None:
    cells = ("aten::quantized_lstm", "aten::quantized_gru")
    dynamic = [node.op for node in program.nodes if "dynamic" in node.op or node.op.startswith(cells)]
    if dynamic:
        raise UnsupportedModelError(f"The export carries what was quantized statically, and not {dynamic[0]}: serve it with torch.")


def _larger(tensor: Tensor, shape: Sequence[int | None]) -> Tensor:
    """Return a tensor whose dimensions that may vary are longer by one."""
    for axis, size in enumerate(shape):
        if size is None:
            tensor = torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
    return tensor


def _value(one: Tensor, other: Tensor) -> Value:
    shape = tuple(size if size == also else None for size, also in zip(one.shape, other.shape, strict=True))
    if one.is_quantized and one.dtype == torch.quint8:
        return Value("", shape, torch.uint8, Grid(one.q_scale(), one.q_zero_point()))
    return Value("", shape, torch.float32 if one.is_quantized else one.dtype)
