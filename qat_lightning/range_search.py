"""Which part of an activation's values the integers are to cover: ranges chosen on a histogram.

Every range contains 0.0 and lies on a grid of integers: with ``scale = (high - low) / (q_max - q_min)``, ``low`` and ``high`` are
``(q - zero_point) * scale`` for ``q_min`` and ``q_max``, as :func:`qat_lightning.affine.choose_qparams` finds them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qat_lightning.affine import SMALLEST_SCALE
from qat_lightning.histogram import BINS_PER_SIGN, Density, cumulated

PERCENTILE = 99.99
"""The default of ONNX Runtime's percentile calibration: with 8 bits, a lower one clips what convolutional networks need."""

TINY = torch.finfo(torch.float64).tiny

RangeSearch = Callable[[Tensor, float, float, int, int], tuple[float, float]]


def least_squares_range(counts: Tensor, low: float, high: float, q_min: int, q_max: int) -> tuple[float, float]:
    """Return the range of the smallest squared quantization error, rounding and clipping together.

    Each candidate is a pair of minimum and maximum, from the full range down to a thousandth of it on either side: every combination
    of octaves, then three grids around the best that are four times finer each. The error of a candidate is summed over all its
    integers; for the density of the histogram it is exact (the criterion is that of Sung et al. 2015, arXiv:1511.06488, and of
    PyTorch's ``HistogramObserver``, which approximates it and moves one end at a time).

    Args:
        counts: histogram from :mod:`qat_lightning.histogram`.
        low: the smallest value seen.
        high: the largest value seen.
        q_min: smallest integer.
        q_max: largest integer.
    """
    density = Density.of(counts, low, high)
    full = best = torch.tensor([[min(low, 0.0), max(high, 0.0)]], dtype=torch.float64)
    least = _error_of(density, full, q_min, q_max)[0]
    for factors in (2.0 ** -torch.arange(11), *(2.0 ** (torch.arange(-4, 5) / finer) for finer in (4, 16, 64))):
        ends = best.T * factors.double()
        pairs = torch.cartesian_prod(*(torch.unique(end) for end in (ends[0].clamp(min=full[0, 0]), ends[1].clamp(max=full[0, 1]))))
        errors = _error_of(density, pairs, q_min, q_max)
        index = errors.argmin()
        if errors[index] < least:
            best, least = pairs[index : index + 1], errors[index]
    return _range(_grids(best, q_min, q_max), q_min, q_max)


def percentile_range(counts: Tensor, low: float, high: float, q_min: int, q_max: int) -> tuple[float, float]:
    """Return the range that leaves out the same share of values at either end, together 0.01 percent.

    After ONNX Runtime's ``HistogramCollector.compute_percentile`` (asymmetric case); zeros count as values. Arguments are those of
    :func:`least_squares_range`.
    """
    cut = (1 - PERCENTILE / 100) / 2
    density = Density.of(counts, low, high)
    ends = torch.tensor([[min(density.quantile(cut), 0.0), max(density.quantile(1 - cut), 0.0)]], dtype=torch.float64)
    return _range(_grids(ends, q_min, q_max), q_min, q_max)


def entropy_range(counts: Tensor, low: float, high: float, q_min: int, q_max: int) -> tuple[float, float]:
    """Return the range whose integers keep most of the information: smallest Kullback-Leibler divergence from the values seen.

    After TensorRT (Migacz 2017, "8-bit Inference with TensorRT", GTC) and ONNX Runtime's ``get_entropy_threshold``: the distribution is
    compared with itself after each quantization step has been made uniform over the part that is not empty, what is clipped added to
    the outermost step. One threshold clips both signs. Those compare symmetric integers on a histogram of equal bins, in which an
    outlier leaves but a few bins for the rest; here the candidates are the affine ranges [max(low, -t), min(high, t)] with all their
    integers, so that activations of one sign (ReLU) or nearly so (SiLU) are judged by the grid they get, on bins of logarithmic width.
    Values that are zero do not count: any range represents them (NVIDIA's pytorch-quantization replaces their bin, too). What is clipped
    is missing from the quantized distribution, which is not scaled up to make good for it: few values would be clipped at no loss.

    Arguments are those of :func:`least_squares_range`.
    """
    scale, zero_point = _grids(_clipped(low, high), q_min, q_max)
    index = 0
    if bool(counts.sum() > counts[BINS_PER_SIGN]):
        losses = divergence(Density.smooth(counts, low, high), scale, zero_point, q_min, q_max)
        # The largest range of those that are equally good.
        index = int((losses <= losses.min() + 1e-9).nonzero()[0])
    return _range((scale[index], zero_point[index]), q_min, q_max)


def squared_error(density: Density, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
    """Return the sum of squared quantization errors over all values of ``density``.

    With the values between two rounding boundaries, ``n`` of them with sum ``m``, on the grid point ``v``, the sum over all grid points
    of ``n v^2 - 2 m v``, plus the sum of squares of all values.

    Args:
        density: of the values.
        scale: float64 ``(candidates,)``.
        zero_point: of the same shape.
        q_min: smallest integer.
        q_max: largest integer.

    Returns:
        float64 ``(candidates,)``.
    """
    points = (torch.arange(q_min, q_max + 1, dtype=torch.float64) - zero_point[:, None]) * scale[:, None]
    counts, sums = density.below(points[:, :-1] + scale[:, None] / 2)
    total = density.count.sum(), (density.count * (density.left + density.width / 2)).sum()
    counts, sums = _between(counts, total[0]), _between(sums, total[1])
    return (counts * points**2 - 2 * sums * points).sum(1) + density.squares()


def _between(sums: Tensor, total: Tensor) -> Tensor:
    """Return the differences along the last axis, from 0 at its beginning to ``total`` at its end."""
    shape = (*sums.shape[:-1], 1)
    return torch.diff(sums, prepend=torch.zeros(shape, dtype=sums.dtype), append=total.expand(shape))


def divergence(density: Density, scale: Tensor, zero_point: Tensor, q_min: int, q_max: int) -> Tensor:
    """Return the Kullback-Leibler divergence of the quantized distribution from that of the values.

    With density ``f`` and, of each step, the share ``p`` of the values and the length ``l`` that is not empty, inside the range the
    integral of ``f log f`` less the sum of ``p log(p / l)``. A share ``o`` that is clipped adds ``(p + o) log((p + o) / p)`` of the
    outermost step that is not empty.

    Arguments are those of :func:`squared_error`.

    Returns:
        in nats, float64 ``(candidates,)``.
    """
    borders = (torch.arange(q_min, q_max + 2, dtype=torch.float64) - 0.5 - zero_point[:, None]) * scale[:, None]
    share = density.count / density.count.sum()
    index, part = density.place(borders)

    def until_borders(of_bins: Tensor) -> Tensor:
        return cumulated(of_bins)[index] + of_bins[index] * part

    shares = until_borders(share)
    information = until_borders(torch.xlogy(share, share / density.width.clamp(min=TINY)))
    p, length = shares.diff(), until_borders(density.width * (share > 0)).diff().clamp(min=TINY)
    shape = information[:, -1] - information[:, 0] - torch.xlogy(p, p / length).sum(1)
    return shape + _clipping(p, shares[:, 0]) + _clipping(p.flip(1), 1 - shares[:, -1])


def _clipping(p: Tensor, clipped: Tensor) -> Tensor:
    """Return what the clipped share costs in the first of the steps that is not empty."""
    full = p > 1e-9
    outermost = p.gather(1, full.long().argmax(1, keepdim=True)).squeeze(1)
    cost = torch.xlogy(outermost + clipped, (outermost + clipped) / outermost)
    return torch.where(full.any(1), torch.where(clipped > 1e-12, cost, 0.0), torch.inf)


def _error_of(density: Density, ranges: Tensor, q_min: int, q_max: int) -> Tensor:
    return squared_error(density, *_grids(ranges, q_min, q_max), q_min, q_max)


def _clipped(low: float, high: float) -> Tensor:
    """Return the ranges that one threshold makes, float64 ``(81, 2)``: from the full one down to a thousandth, in eighths of an octave."""
    thresholds = max(-low, high) * 2.0 ** (-torch.arange(81, dtype=torch.float64) / 8)
    return torch.stack([(-thresholds).clamp(min=min(low, 0.0)), thresholds.clamp(max=max(high, 0.0))], 1)


def _grids(ranges: Tensor, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of ranges ``(n, 2)``."""
    scale = ((ranges[:, 1] - ranges[:, 0]) / (q_max - q_min)).clamp(min=SMALLEST_SCALE)
    return scale, (q_min - ranges[:, 0] / scale).round().clamp(q_min, q_max)


def _range(grid: tuple[Tensor, Tensor], q_min: int, q_max: int) -> tuple[float, float]:
    scale, zero_point = (float(value) for value in grid)
    return (q_min - zero_point) * scale, (q_max - zero_point) * scale
