"""Fake-quant against int8, layer by layer, in quantization steps.

Each int8 layer is given the very values its fake-quantized twin was given. They lie on the grid, so what differs is the arithmetic
of the layer alone: at most one step, where a value falls on the border between two integers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat_lightning.report import LayerParity

TOLERATED_STEPS = 1


@dataclass(frozen=True)
class Reference:
    """What a layer returned under fake-quant.

    Args:
        value: the rounded output, float32.
        scale: its quantization step.
        zero_point: its zero point.
    """

    value: Tensor
    scale: float
    zero_point: int

    def fits(self, output: Tensor) -> bool:
        """Whether ``output``, an int8 tensor, can be the same value."""
        return output.shape == self.value.shape and _same_grid(output, self)

    def quantized(self) -> Tensor:
        """Return the value as uint8."""
        return torch.quantize_per_tensor(self.value.float(), self.scale, self.zero_point, torch.quint8)


def compare(layer: str, output: Tensor, reference: Reference) -> LayerParity:
    """Return by how many steps the int8 ``output`` of ``layer`` is off."""
    difference = (output.int_repr().int() - reference.quantized().int_repr().int()).abs()
    largest = int(difference.max()) if difference.numel() else 0
    return LayerParity(layer=layer, max_steps=largest, differing=float((difference > 0).float().mean()) if difference.numel() else 0.0)


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


def _same_grid(output: Tensor, reference: Reference) -> bool:
    # float32 buffers become Python floats on the way; anything but the same number would be another grid.
    return float(torch.tensor(output.q_scale(), dtype=torch.float32)) == reference.scale and output.q_zero_point() == reference.zero_point
