import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_lightning.histogram import BINS, BINS_PER_SIGN, OCTAVES, Density, merge, seen

VALUES = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30)


def tensors(values):
    return torch.tensor(values, dtype=torch.float32)


def same(one, other):
    return one[:2] == other[:2] and torch.equal(one[2], other[2])


@settings(max_examples=40)
@given(st.lists(VALUES, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_batches_in_any_order_and_grouping_make_the_histogram_of_all_values(batches, random):
    whole = seen(torch.cat([tensors(batch) for batch in batches]))
    random.shuffle(batches)
    streamed = seen(tensors(batches[0]))
    for batch in batches[1:]:
        streamed = merge([streamed, seen(tensors(batch))])
    cut = random.randrange(len(batches) + 1)
    halves = [merge([seen(tensors(batch)) for batch in half]) for half in (batches[:cut], batches[cut:]) if half]
    assert same(streamed, whole) and same(merge(halves), whole)


@given(VALUES)
def test_every_value_is_counted_once_near_itself(values):
    low, high, counts = seen(tensors(values))
    assert (low, high) == (min(values), max(values)) and counts.shape == (BINS,) and int(counts.sum()) == len(values)
    density, smallest = Density.of(counts, low, high), max(abs(low), abs(high), 2.0**-23) * 2.0**-OCTAVES
    for value in values:
        near = abs(value) / 256 + 2 * smallest
        above, below = (density.below(torch.tensor(value + offset, dtype=torch.float64))[0] for offset in (near, -near))
        assert below <= sum(other < value for other in values) + 1e-6
        assert above >= sum(other <= value for other in values) - 1e-6


@given(VALUES, st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise_from_minimum_to_maximum(values, one, other):
    low, high, counts = seen(tensors(values))
    density = Density.of(counts, low, high)
    first, second = (density.quantile(share) for share in sorted((one, other)))
    tiny = max(abs(low), abs(high), 2.0**-22) * 2.0**-19  # what counts as zero
    assert low - tiny <= first <= second <= high + tiny


def test_memory_does_not_grow_and_values_are_not_lost_when_the_range_does():
    total = seen(torch.tensor([1.0, -1.0]))
    for octave in range(0, 60, 7):
        total = merge([total, seen(torch.full((3,), 2.0**octave))])
    counts = total[2]
    assert counts.shape == (BINS,) and int(counts.sum()) == 2 + 3 * 9
    assert int(counts[BINS_PER_SIGN]) == 2 + 3 * 6  # what is a millionth of the largest counts as zero
    assert not counts[:BINS_PER_SIGN].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_layouts_count_as_their_values(dtype):
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same(seen(x), seen(x.float())) and same(seen(x.permute(2, 0, 1)[::2]), seen(x[..., ::2].contiguous()))


def test_more_values_than_are_counted_at_a_time(monkeypatch):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = seen(x)
    monkeypatch.setattr("qat_lightning.histogram.CHUNK", 64)
    assert same(seen(x), whole)


def test_density_has_the_moments_of_the_values():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).double()
    low, high, counts = seen(x)
    density = Density.of(counts, low, high)
    number, total = density.below(torch.tensor([0.7]))
    assert float(number) == pytest.approx(int((x <= 0.7).sum()), rel=1e-3)
    assert float(total) == pytest.approx(float(x[x <= 0.7].sum()), rel=1e-3)
    assert density.squares() == pytest.approx(float((x**2).sum()), rel=1e-3)


@pytest.mark.parametrize(("values", "place"), [([6.0] * 9 + [0.0, 1.0], 6.0), ([-1.3] * 9 + [0.0, 1.0], -1.3), ([2.7] * 4, 2.7)])
def test_a_peak_at_an_extreme_is_a_point(values, place):
    low, high, counts = seen(tensors(values))
    before, at = Density.of(counts, low, high).below(torch.tensor([place - 1e-5, place + 1e-6]))[0]
    assert float(at - before) == pytest.approx(values.count(place))
