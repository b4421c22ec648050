"""BatchNorm scales that are exactly zero, by which torch's fused training layers divide."""

import warnings

import torch
from torch import nn

SMALLEST_SCALE = 1e-3
"""In place of a BatchNorm scale of zero: little beside the usual 0.1 to 2, and enough for int8 weights with all their levels."""


def lift_zero_scales(prepared: nn.Module) -> None:
    """Give the channels of fused BatchNorm layers whose scale is zero a small one, with a warning.

    Torch's fused training layers multiply the weight by scale / deviation before they round it, and divide by it afterwards: zero,
    as in ``zero_init_residual`` or channels that training has switched off, makes NaN of the channel.

    Args:
        prepared: module with fake-quant, changed in place.
    """
    lifted: dict[str, int] = {}
    for name, layer in prepared.named_modules():
        scale = getattr(getattr(layer, "bn", None), "weight", None)
        if not hasattr(layer, "weight_fake_quant") or not isinstance(scale, nn.Parameter):
            continue
        zero = scale.detach() == 0
        if zero.any():
            lifted[name] = int(zero.sum())
            with torch.no_grad():
                scale.masked_fill_(zero, SMALLEST_SCALE)
    if lifted:
        warnings.warn(
            f"{sum(lifted.values())} BatchNorm scales are zero, in {len(lifted)} layers from {next(iter(lifted))!r} on, and torch's fused "
            f"training layers divide by them: they begin quantization-aware training at {SMALLEST_SCALE}.",
            stacklevel=2,
        )
