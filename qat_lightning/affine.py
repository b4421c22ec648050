"""The arithmetic of affine quantization: how a real interval maps to integers and back.

With the real interval [x_min, x_max] and the integer range [q_min, q_max] (Jacob et al. 2018, arXiv:1712.05877, section 2.1)::

    scale       s = (x_max - x_min) / (q_max - q_min)
    zero point  z = clamp(round(q_min - x_min / s), q_min, q_max)
    quantize    q = clamp(round(x / s) + z, q_min, q_max)
    dequantize  x = s (q - z)

Rounding is to the nearest integer, halves to even, as in PyTorch's kernels.

>>> qparams = choose_qparams(-6.0, 6.0, 0, 255)
>>> round(qparams.scale, 3), qparams.zero_point
(0.047, 128)
>>> quantize(torch.tensor([-6.0, 0.0, 6.0]), qparams).tolist()
[0, 128, 255]
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""A constant tensor has an empty interval; PyTorch's observers fall back to the same scale."""


_LARGEST_BIAS = 2.0**31 - 2**7
"""Largest int32 that is a float32."""

_DISTANCES = sorted(range(-24, 25), key=abs)
"""How far from the nearest value to look for one that all kernels take alike, nearest first."""


def weight_limits(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest integer of a weight; the scale puts the largest magnitude on the latter.

    The smallest is stored too, though only a weight that grew after its range was frozen gets there.
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def weight_bits(integers: Tensor) -> int:
    """Return the value range, 7 or 8 bits, that int8 integers of any shape need."""
    low, high = weight_limits(7)
    return 7 if integers.numel() == 0 or (low <= int(integers.min()) and int(integers.max()) <= high) else 8


def widest_weight(weights: Mapping[str, Tensor]) -> int:
    """Return the value range, 7 or 8 bits, of the int8 tensors of a model by name."""
    return max((weight_bits(tensor) for tensor in weights.values() if tensor.dtype == torch.int8), default=8)


@dataclass(frozen=True)
class QParams:
    """Scale, zero point and integer range of one tensor.

    Args:
        scale: real size of one quantization step, positive.
        zero_point: the integer that stands for 0.0.
        q_min: smallest integer.
        q_max: largest integer.
    """

    scale: float
    zero_point: int
    q_min: int
    q_max: int


def choose_qparams(x_min: float, x_max: float, q_min: int, q_max: int) -> QParams:
    """Return the qparams that map [x_min, x_max] onto [q_min, q_max].

    The interval is first widened to hold 0.0, so that zero (padding, ReLU) is represented exactly.

    Args:
        x_min: smallest real value.
        x_max: largest real value.
        q_min: smallest integer.
        q_max: largest integer.

    Raises:
        ValueError: an interval that is not finite or whose ends are swapped.
    """
    if not (math.isfinite(x_min) and math.isfinite(x_max)) or x_min > x_max:
        raise ValueError(f"Expected finite x_min <= x_max, but got x_min={x_min} and x_max={x_max}.")
    if q_min >= q_max:
        raise ValueError(f"Expected q_min < q_max, but got q_min={q_min} and q_max={q_max}.")
    x_min, x_max = min(x_min, 0.0), max(x_max, 0.0)
    scale = max((x_max - x_min) / (q_max - q_min), SMALLEST_SCALE)
    zero_point = min(max(round(q_min - x_min / scale), q_min), q_max)
    return QParams(scale, zero_point, q_min, q_max)


def quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Return the integers that stand for ``x``.

    Args:
        x: real values, any shape.
        qparams: scale, zero point and range.

    Returns:
        int64 tensor of the shape of ``x``.
    """
    # PyTorch's kernels multiply by the reciprocal in single precision; a division rounds some ties the other way.
    inverse = torch.tensor(1.0, dtype=torch.float32) / torch.tensor(qparams.scale, dtype=torch.float32)
    steps = torch.round(x.to(torch.float32) * inverse) + qparams.zero_point
    return steps.clamp(qparams.q_min, qparams.q_max).to(torch.int64)


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """Return the real values, float32, that the integers ``q`` stand for."""
    return (q - qparams.zero_point).to(torch.float32) * torch.tensor(qparams.scale, dtype=torch.float32)


def product_scale(scale: Tensor, input_scale: float) -> Tensor:
    """Return the scale of the products of weights and inputs, multiplied in float32 as kernels do.

    Args:
        scale: of the weight, per channel or for all.
        input_scale: of the activation that the layer takes.
    """
    return scale.float() * torch.tensor(input_scale, dtype=torch.float32)


def quantize_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the integers by which kernels add a bias to their sums of products (Jacob et al. 2018, section 2.4).

    Args:
        bias: one value per output channel.
        scale: of the products, input scale times weight scale, per channel or for all.

    Returns:
        int32 tensor of the shape of ``bias``; each a float32 exactly, so that kernels that add it in float32 add the same.
    """
    return torch.round(bias.float() / scale.float()).clamp(-_LARGEST_BIAS, _LARGEST_BIAS).to(torch.int32)


def bias_on_grid(bias: Tensor, scale: Tensor) -> Tensor:
    """Round a bias to the grid of the products, to a value whose quotient by the scale is a whole number in float32 too.

    fbgemm divides the bias by the scale in float32 and adds the quotient; a quotient that is off by its last bit rounds some sum to another
    integer than a kernel that adds an integer. Some multiples of a scale are such, so that the next of them that is not
    is taken: thousandths of a step of the output away. Of a few biases in ten thousand all near multiples are such.

    Args:
        bias: one value per output channel.
        scale: of the products, per channel or for all.

    Returns:
        float32 tensor of the shape of ``bias``, of which :func:`quantize_bias` gives the integers.
    """
    products = scale.float()
    nearest = quantize_bias(bias, products).float()
    spacing = (torch.nextafter(nearest.abs(), torch.tensor(torch.inf)) - nearest.abs()).clamp(min=1)

    def fits(integers: Tensor) -> Tensor:
        return (integers * products / products == integers) & (integers.abs() <= _LARGEST_BIAS)

    return _nearest(nearest, spacing, fits) * products


def scale_for_kernels(scale: Tensor, input_scale: float, output_scale: float) -> Tensor:
    """Return weight scales by whose products all kernels multiply alike, wherever there are such.

    A sum of products becomes an integer of the output by ``input_scale * scale / output_scale``. qnnpack multiplies by the reciprocal of
    the output scale in float32, where fbgemm and ONNX Runtime divide, and they round a sum next to the border between two integers to
    different ones. Among the float32 values next to a scale there is one whose product is the same by both, but for a few scales in a
    thousand: those of an output whose reciprocal a float32 misses by almost half of its last bit.

    Args:
        scale: of the weight, per channel or for all.
        input_scale: of the activation that the layer takes.
        output_scale: of the one it gives.

    Returns:
        float32 tensor of the shape of ``scale``, a few last bits away.
    """
    given = scale.float()
    spacing = torch.nextafter(given, torch.tensor(torch.inf)) - given
    of_output = torch.tensor(output_scale, dtype=torch.float32)

    def fits(scales: Tensor) -> Tensor:
        products = product_scale(scales, input_scale)
        return products * (1 / of_output) == products / of_output

    return _nearest(given, spacing, fits)


def _nearest(values: Tensor, spacing: Tensor, fits: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the values, or where they do not fit the nearest that do, whole spacings away; as they are where none does."""
    found, missing = values, torch.ones_like(values, dtype=torch.bool)
    for distance in _DISTANCES:
        candidate = values + distance * spacing
        good = missing & fits(candidate)
        found, missing = torch.where(good, candidate, found), missing & ~good
    return found


def weight_scale(weight: Tensor, axis: int | None, q_max: int) -> Tensor:
    """Return the scale that puts the largest magnitude on ``q_max``.

    Args:
        weight: of two dimensions or more.
        axis: of the channels that have a scale of their own; None: one scale for all.
        q_max: largest integer.

    Returns:
        float32, one element per channel, or one.
    """
    magnitudes = weight.detach().float().abs()
    largest = magnitudes.amax() if axis is None else magnitudes.amax([other for other in range(weight.dim()) if other != axis])
    return (largest.reshape(-1) / q_max).clamp(min=SMALLEST_SCALE)


def round_weight(weight: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, limits: tuple[int, int]) -> Tensor:
    """Return a weight rounded to its grid, in its dtype; gradients pass straight through where it lies within the limits.

    Args:
        weight: any shape.
        scale: from :func:`weight_scale`.
        zero_point: int32 zeros in the shape of ``scale``.
        axis: of the channels, None for one scale for all.
        limits: the smallest and the largest integer.
    """
    real = weight.float()
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(real, scale, zero_point, *limits).to(weight.dtype)
    return torch.fake_quantize_per_channel_affine(real, scale, zero_point, axis, *limits).to(weight.dtype)


def step_difference(left: Tensor, right: Tensor, qparams: QParams) -> Tensor:
    """Return how many quantization steps lie between two real tensors, int64, same shape."""
    return (quantize(left, qparams) - quantize(right, qparams)).abs()
