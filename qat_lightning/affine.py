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

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""A constant tensor has an empty interval; PyTorch's observers fall back to the same scale."""


_LARGEST_BIAS = 2.0**31 - 2**7
"""Largest int32 that is a float32."""

_FAR_FROM_A_BORDER = 1e-4
"""In steps: a few float32 roundings of 255."""

_QUARTER_OF_LAST_BIT = 2.0**-26

_SCALE_BITS = 18
"""Significant bits of scales that are chosen; a product with an integer of six more is a float32."""

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
    spacing = _last_bit(nearest.abs()).clamp(min=1)

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
    return _nearest(given, _last_bit(given), lambda scales: _multiplied_alike(product_scale(scales, input_scale), output_scale))


def _multiplied_alike(products: Tensor, output_scale: float) -> Tensor:
    of_output = torch.tensor(output_scale, dtype=torch.float32)
    return products * (1 / of_output) == products / of_output


def settle_layer(scale: Tensor, bias: Tensor | None, input_scale: float, output_scale: float) -> tuple[Tensor, Tensor | None]:
    """Return scale and bias of a layer from which all kernels compute the same integers.

    Args:
        scale: of the weight, per channel or for all.
        bias: one value per output channel, if there is one.
        input_scale: of the activation that the layer takes.
        output_scale: of the one it gives.

    Returns:
        a scale as of :func:`scale_for_kernels` by which the nearest integer of the bias will do, wherever there is one, and the bias as of
        :func:`bias_on_grid`.
    """
    given = scale_for_kernels(scale, input_scale, output_scale)
    if bias is None:
        return given, None
    own = bias.detach()
    hopeless = ~_multiplied_alike(product_scale(given, input_scale), output_scale)

    def fits(scales: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        products = product_scale(scales, input_scale)
        quotients = rounded(products) / products
        whole = quotients == quotients.round()
        alike = _multiplied_alike(products, output_scale) | hopeless
        return alike & (whole if whole.shape == scales.shape else whole.all())

    def nearest(products: Tensor) -> Tensor:
        return quantize_bias(own, products) * products

    def near(products: Tensor) -> Tensor:
        return bias_on_grid(own, products)

    settled = given
    for rounded in (nearest, near):
        settled = _nearest(settled, _last_bit(given), functools.partial(fits, rounded=rounded))
    return settled, near(product_scale(settled, input_scale)).to(bias.dtype)


def scale_with_reciprocal(scale: float) -> float:
    """Return a scale near another for which it matters less how kernels compute with it.

    Its reciprocal is almost a float32, so that kernels that multiply by it round as those that divide. Its last bits are zeros, so that its
    products with small integers are exact, such as those with the number of pixels that are averaged.

    Args:
        scale: of an activation.

    Returns:
        a float32, a few millionths away.
    """

    def error(candidate: float) -> float:
        return abs(float(1 / torch.tensor(candidate, dtype=torch.float32)) * candidate - 1)

    return _first(_near(scale), error, _QUARTER_OF_LAST_BIT)


def scale_off_borders(values: Tensor, scale: float, zero_point: int) -> float:
    """Return an output scale by which no value of an operation lies next to the border between two integers.

    What two kernels compute in float32, in different orders, differs by less than 0.0001 of a step; by the scale that is returned they
    round every value to the same integer. Without it, sums of two activations have one such value in 65,536 on average.

    Args:
        values: all that the operation can give, float64, any shape.
        scale: of the output.
        zero_point: of the output, in 0 to 255.

    Returns:
        the nearest that will do, else the best of those at most an eight-thousandth away; with zeros as last bits, as that of
        :func:`scale_with_reciprocal`.
    """

    def closeness(candidate: float) -> float:
        steps = values / candidate + zero_point
        steps = steps[(steps > -1) & (steps < 256)]
        return 0.5 - float((steps - steps.floor() - 0.5).abs().min()) if steps.numel() else 0.0

    return _first(_near(scale), closeness, 0.5 - _FAR_FROM_A_BORDER)


def _first(candidates: Iterable[float], error: Callable[[float], float], enough: float) -> float:
    """Return the first candidate whose error is small enough, else the one that has the smallest."""
    found, smallest = math.nan, math.inf
    for candidate in candidates:
        own = error(candidate)
        if own < smallest:
            found, smallest = candidate, own
        if smallest <= enough:
            break
    return found


def _near(scale: float) -> Iterator[float]:
    """Yield the float32 of few bits around a scale, nearest first."""
    mantissa, exponent = math.frexp(scale)
    nearest = round(math.ldexp(mantissa, _SCALE_BITS))
    yield from (math.ldexp(nearest + distance, exponent - _SCALE_BITS) for distance in sorted(range(-32, 33), key=abs))


def _nearest(values: Tensor, spacing: Tensor, fits: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the values, or where they do not fit the nearest that do, whole spacings away; as they are where none does."""
    found, missing = values, torch.ones_like(values, dtype=torch.bool)
    for distance in _DISTANCES:
        candidate = values + distance * spacing
        good = missing & fits(candidate)
        found, missing = torch.where(good, candidate, found), missing & ~good
        if not missing.any():
            break
    return found


def _last_bit(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.tensor(torch.inf)) - values


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
