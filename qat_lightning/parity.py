"""Fake-quant against int8, layer by layer, in quantization steps.

Each int8 layer is given the very values its fake-quantized twin was given. They lie on the grid, so what differs is the arithmetic
of the layer alone: at most one step, where a value falls on the border between two integers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat_lightning.affine import QParams, step_difference
from qat_lightning.report import LayerParity


@dataclass(frozen=True)
class Reference:
    """What a layer returned under fake-quant.

    Args:
        value: the rounded output, float32.
        qparams: the grid it lies on.
    """

    value: Tensor
    qparams: QParams

    def fits(self, output: Tensor) -> bool:
        """Whether ``output``, an int8 tensor, can be the same value."""
        # float32 buffers become Python floats on the way; anything but the same number would be another grid.
        scale = float(torch.tensor(output.q_scale(), dtype=torch.float32))
        return output.shape == self.value.shape and (scale, output.q_zero_point()) == (self.qparams.scale, self.qparams.zero_point)

    def quantized(self) -> Tensor:
        """Return the value as uint8."""
        return torch.quantize_per_tensor(self.value, self.qparams.scale, self.qparams.zero_point, torch.quint8)


def compare(layer: str, output: Tensor, reference: Reference) -> LayerParity:
    """Return by how many steps the int8 ``output`` of ``layer`` is off."""
    difference = step_difference(output.dequantize(), reference.value, reference.qparams)
    if difference.numel() == 0:
        return LayerParity(layer=layer, max_steps=0, differing=0.0)
    return LayerParity(layer=layer, max_steps=int(difference.max()), differing=float((difference > 0).float().mean()))


def merge(found: list[LayerParity]) -> tuple[LayerParity, ...]:
    """Return one entry per layer: the largest difference and the mean fraction over all its comparisons."""
    groups: dict[str, list[LayerParity]] = {}
    for entry in found:
        groups.setdefault(entry.layer, []).append(entry)
    return tuple(
        LayerParity(
            layer=layer,
            max_steps=max(entry.max_steps for entry in entries),
            differing=sum(entry.differing for entry in entries) / len(entries),
        )
        for layer, entries in groups.items()
    )
