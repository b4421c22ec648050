"""A histogram of activations that needs no range beforehand: one pass, fixed size, and merged without loss.

The bins are those of floating-point numbers: a value falls into the bin of its sign, its exponent and the first bits of its mantissa
(as in HdrHistogram, http://hdrhistogram.org), so that a bin is at most 1/256 as wide as the values in it. The bins cover the 20 octaves
below the largest magnitude; what is smaller counts as zero. When a larger magnitude comes the bins move up by whole octaves, and each
value stays in the bin it has. Counts are integers. The histogram of several batches, in any order, or of several processes is therefore
that of all their values at once, to the last bit.

>>> low, high, counts = merge([seen(torch.tensor([0.5, 1.0])), seen(torch.tensor([-64.0]))])
>>> Density.of(counts, low, high).below(torch.tensor([-1.0, 0.75, 1.0]))[0].tolist()
[1.0, 2.0, 3.0]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OCTAVES = 20
MANTISSA_BITS = 8
BINS_PER_OCTAVE = 2**MANTISSA_BITS
BINS_PER_SIGN = OCTAVES * BINS_PER_OCTAVE
BINS = 2 * BINS_PER_SIGN + 1
SMOOTH_BINS_PER_OCTAVE = 16

# IEEE 754, 32 bits: sign, 8 bits of exponent plus 127, 23 bits of mantissa.
FLOAT_MANTISSA_BITS = 23
EXPONENT_BIAS = 127
CODES_PER_SIGN = 2 ** (8 + MANTISSA_BITS)
# The bins end above the subnormal numbers, and far below half of the smallest scale.
LOWEST_TOP = -22
# Values counted at a time: what fits into the cache is twice as fast.
CHUNK = 2**19

Seen = tuple[float, float, Tensor]


def seen(x: Tensor) -> Seen:
    """Return minimum, maximum and histogram of ``x``.

    Args:
        x: finite values, any floating-point dtype, any shape with at least one element.

    Returns:
        minimum and maximum, and the counts: int64 ``(BINS,)``, from the most negative bin to the most positive, zero in the middle.
    """
    x = x.detach().float()
    low, high = (float(end) for end in torch.aminmax(x))
    first = (top_of(low, high) - OCTAVES + EXPONENT_BIAS) * BINS_PER_OCTAVE
    negative, positive = _count_codes(x).chunk(2)
    zero = negative[:first].sum() + positive[:first].sum()
    window = slice(first, first + BINS_PER_SIGN)
    return low, high, torch.cat([negative[window].flip(0), zero.reshape(1), positive[window]])


def _count_codes(x: Tensor) -> Tensor:
    """Return how many values have each sign, exponent and first bits of the mantissa.

    The bits of a negative number are a negative integer: counts of negative values come first, either sign's in order of magnitude.
    """
    total = torch.zeros(2 * CODES_PER_SIGN, dtype=torch.int64, device=x.device)
    for bits in torch.split(x.contiguous().view(torch.int32).flatten(), CHUNK):
        codes = (bits >> (FLOAT_MANTISSA_BITS - MANTISSA_BITS)).add_(CODES_PER_SIGN)
        total += torch.bincount(codes, minlength=2 * CODES_PER_SIGN)
    return total


def merge(parts: Sequence[Seen]) -> Seen:
    """Return minimum, maximum and histogram of all values that the parts have seen.

    Args:
        parts: at least one, as returned by :func:`seen` or by this function.
    """
    low, high = min(part[0] for part in parts), max(part[1] for part in parts)
    total = torch.zeros_like(parts[0][2])
    for part_low, part_high, counts in parts:
        total += _move_up(counts, top_of(low, high) - top_of(part_low, part_high))
    return low, high, total


def top_of(low: float, high: float) -> int:
    """Return the exponent ``e`` of the bins for values in [low, high]: magnitudes lie below ``2**e``."""
    return max(math.frexp(max(abs(low), abs(high)))[1], LOWEST_TOP)


def _move_up(counts: Tensor, octaves: int) -> Tensor:
    """Return the counts in bins that end ``octaves`` higher; the lowest bins become zero."""
    if octaves == 0:
        return counts
    lost = min(octaves * BINS_PER_OCTAVE, BINS_PER_SIGN)
    kept = BINS_PER_SIGN - lost
    centre = slice(kept, BINS - kept)
    moved = torch.zeros_like(counts)
    moved[lost:BINS_PER_SIGN] = counts[:kept]
    moved[BINS_PER_SIGN] = counts[centre].sum()
    moved[BINS_PER_SIGN + 1 : BINS - lost] = counts[BINS - kept :]
    return moved


@dataclass(frozen=True)
class Density:
    """The distribution that a histogram stands for, uniform in each bin; a bin of no width is a point.

    Args:
        left: lower ends of the bins, float64 ``(n,)``, rising.
        width: of the bins.
        count: values in each bin; the first and the last are positive.
    """

    left: Tensor
    width: Tensor
    count: Tensor

    @staticmethod
    def of(counts: Tensor, low: float, high: float) -> "Density":
        """Return the density of a histogram as it is, with zeros as a point.

        An outermost bin that is fuller than its neighbour is a point at the extreme: activations that are clamped there, or a lone value.

        Args:
            counts: as from :func:`seen`, at least one of them positive.
            low: the smallest value.
            high: the largest value.
        """
        left, right, count = _bins(counts, top_of(low, high))
        left, right = left.clamp(low, high), right.clamp(low, high)
        first, last = (int(index) for index in count.nonzero().flatten()[[0, -1]])
        if first < min(last, BINS_PER_SIGN) and count[first] > count[first + 1]:
            right[first] = left[first]
        if last > max(first, BINS_PER_SIGN) and count[last] > count[last - 1]:
            left[last] = right[last]
        return Density(left, right - left, count)._cut(first, last)

    @staticmethod
    def smooth(counts: Tensor, low: float, high: float) -> "Density":
        """Return the density without zeros and points, in 16 bins an octave; the outermost bin of either sign is joined to its neighbour.

        Args:
            counts: as from :func:`seen`, one besides the middle positive.
            low: the smallest value.
            high: the largest value.
        """
        left, right, count = _bins(counts, top_of(low, high), joined=BINS_PER_OCTAVE // SMOOTH_BINS_PER_OCTAVE)
        middle = len(count) // 2
        count[middle] = 0.0
        first, last = (int(index) for index in count.nonzero().flatten()[[0, -1]])
        if first < middle - 1:
            left[first + 1] = low
            count[first + 1] += count[first]
            first, last = first + 1, max(first + 1, last)
        if last > middle + 1:
            right[last - 1] = high
            count[last - 1] += count[last]
            first, last = min(first, last - 1), last - 1
        return Density(left, right - left, count)._cut(first, last)

    def _cut(self, first: int, last: int) -> "Density":
        kept = slice(first, last + 1)
        return Density(self.left[kept], self.width[kept], self.count[kept])

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bin that ``x`` lies in or behind, and the share of the bin that is at most ``x``; shape of ``x``."""
        index = torch.searchsorted(self.left, x, right=True).sub_(1).clamp_(min=0)
        inside, width = x - self.left[index], self.width[index]
        share = torch.where(width > 0, inside / width, (inside >= 0).double())
        return index, share.clamp_(0.0, 1.0)

    def below(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many values are at most ``x``, and their sum; float64, shape of ``x``."""
        index, share = self.place(x.double())
        width = self.width[index] * share
        count = self.count[index] * share
        sums = cumulated(self.count * (self.left + self.width / 2))[index] + count * (self.left[index] + width / 2)
        return cumulated(self.count)[index] + count, sums

    def squares(self) -> float:
        """Return the sum of the squares of all values."""
        right = self.left + self.width
        return float((self.count * (self.left**2 + self.left * right + right**2) / 3).sum())

    def quantile(self, share: float) -> float:
        """Return the value that this share of all values does not exceed; ``share`` in [0, 1]."""
        before = cumulated(self.count)
        target = share * before[-1]
        index = min(int(torch.searchsorted(before[1:], target)), len(self.count) - 1)
        inside = float((target - before[index]) / self.count[index].clamp(min=1.0))
        return float(self.left[index] + self.width[index] * min(inside, 1.0))


def cumulated(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... values, ``(n + 1,)`` for ``(n,)``."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _bins(counts: Tensor, top: int, joined: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return lower ends, upper ends and counts, float64, with ``joined`` bins of either sign made one and zero in the middle."""
    mantissas = 1 + torch.arange(0, BINS_PER_OCTAVE, joined, dtype=torch.float64) / BINS_PER_OCTAVE
    octaves = 2.0 ** torch.arange(top - OCTAVES, top, dtype=torch.float64)
    ends = torch.cat([(octaves[:, None] * mantissas).flatten(), torch.tensor([2.0**top], dtype=torch.float64)])
    zero = torch.zeros(1, dtype=torch.float64)
    negative, middle, positive = torch.split(counts.cpu().double(), [BINS_PER_SIGN, 1, BINS_PER_SIGN])
    count = torch.cat([negative.view(-1, joined).sum(1), middle, positive.view(-1, joined).sum(1)])
    return torch.cat([-ends.flip(0)[:-1], zero, ends[:-1]]), torch.cat([-ends.flip(0)[1:], zero, ends[1:]]), count
