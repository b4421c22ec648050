import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qat_lightning.affine import choose_qparams
from qat_lightning.histogram import Density, seen
from qat_lightning.range_search import entropy_range, least_squares_range, percentile_range, squared_error

SEARCHES = pytest.mark.parametrize("search", [least_squares_range, percentile_range, entropy_range])
BITS = pytest.mark.parametrize("q_max", [255, 127])
ACTIVATIONS = {
    "gaussian": lambda x: x,
    "relu": F.relu,
    "relu6": lambda x: F.relu6(4 * x),
    "silu": lambda x: F.silu(3 * x),
    "hardswish": lambda x: F.hardswish(3 * x),
    "uniform": lambda x: torch.erf(x),
    "heavy tails": lambda x: x**5,
    "negative": lambda x: -x.abs() - 3,
    "outlier": lambda x: torch.cat([x, torch.tensor([40.0])]),
}


def samples(number=20_000, seed=0):
    return torch.randn(number, generator=torch.Generator().manual_seed(seed))


def chosen(search, x, q_max=255):
    low, high, counts = seen(x)
    return search(counts, low, high, 0, q_max)


def quantized(x, low, high, q_max):
    qparams = choose_qparams(low, high, 0, q_max)
    return torch.fake_quantize_per_tensor_affine(x, qparams.scale, qparams.zero_point, 0, q_max)


def error(x, low, high, q_max):
    return float(((quantized(x, low, high, q_max) - x).double() ** 2).mean())


@SEARCHES
@given(values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20), q_max=st.sampled_from([255, 127]))
def test_ranges_hold_zero_and_lie_on_their_grid(search, values, q_max):
    low, high = chosen(search, torch.tensor(values, dtype=torch.float32), q_max)
    qparams = choose_qparams(low, high, 0, q_max)
    assert low <= 0 <= high and qparams.scale >= 2.0**-23
    assert -qparams.zero_point * qparams.scale == pytest.approx(low, rel=1e-9, abs=1e-12)
    assert (q_max - qparams.zero_point) * qparams.scale == pytest.approx(high, rel=1e-9, abs=1e-12)
    if qparams.scale > 2.0**-22:
        assert min(*values, 0.0) - qparams.scale <= low and high <= max(*values, 0.0) + qparams.scale


@SEARCHES
@pytest.mark.parametrize("value", [0.0, 1.3, -0.7, 1e-9])
def test_a_constant_is_kept(search, value):
    x = torch.full((100,), value)
    low, high = chosen(search, x)
    assert error(x, low, high, 255) <= 1e-14


@BITS
@pytest.mark.parametrize("name", ACTIVATIONS)
@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 300.0]))
def test_least_squares_is_no_worse_than_minmax_or_any_other_range(name, q_max, seed, scale):
    x = ACTIVATIONS[name](samples(seed=seed)) * scale
    found = error(x, *chosen(least_squares_range, x, q_max), q_max)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    assert found <= 1.01 * error(x, low, high, q_max)
    for share in torch.rand(30, 2, generator=torch.Generator().manual_seed(seed)).tolist():
        assert found <= 1.02 * error(x, low * share[0], high * share[1], q_max)


@BITS
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_error_of_the_histogram_is_that_of_the_values(name, q_max):
    x = ACTIVATIONS[name](samples())
    low, high, counts = seen(x)
    for share in (1.0, 0.6, 0.2):
        qparams = choose_qparams(low * share, high * share, 0, q_max)
        grid = (torch.tensor([value], dtype=torch.float64) for value in (qparams.scale, qparams.zero_point))
        expected = float(((quantized(x, low * share, high * share, q_max) - x).double() ** 2).sum())
        assert float(squared_error(Density.of(counts, low, high), *grid, 0, q_max)) == pytest.approx(expected, rel=0.03)


def test_an_asymmetric_range_is_clipped_on_its_long_side():
    x = torch.cat([samples(300_000).clamp(min=-1.0), torch.tensor([9.0])])
    low, high = chosen(least_squares_range, x)
    assert low == pytest.approx(-1.0, abs=0.05) and high < 7.0


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_percentile_leaves_out_its_share(name):
    x = ACTIVATIONS[name](samples(200_000))
    low, high = chosen(percentile_range, x)
    step = (high - low) / 255
    assert float(((x < low - step) | (x > high + step)).float().mean()) <= 1e-4
    if name in ("gaussian", "heavy tails", "silu"):
        assert float(((x < low) | (x > high)).float().mean()) > 0
        assert float(((x < low + step) | (x > high - step)).float().mean()) >= 5e-5


def test_few_values_have_no_percentile():
    x = samples(500)
    low, high = chosen(percentile_range, x)
    assert (low, high) == (pytest.approx(float(x.min()), abs=0.02), pytest.approx(float(x.max()), abs=0.02))


@BITS
def test_entropy_keeps_what_has_no_tail(q_max):
    for x in (samples().uniform_(-1, 2, generator=torch.Generator().manual_seed(0)), F.relu6(9 * samples()), samples(5)):
        low, high = chosen(entropy_range, x, q_max)
        step = (high - low) / q_max
        assert (low, high) == (pytest.approx(min(float(x.min()), 0.0), abs=step), pytest.approx(float(x.max()), abs=step))


@BITS
@pytest.mark.parametrize("outlier", [100.0, 1e4])
def test_entropy_clips_outliers_and_keeps_the_rest(q_max, outlier):
    x = torch.cat([samples(100_000), torch.tensor([outlier])])
    for values in (x, x.relu(), F.silu(x)):
        low, high = chosen(entropy_range, values, q_max)
        assert 3 < high < 40
        assert low == pytest.approx(float(values.min()), abs=high / 100)


def test_entropy_of_one_sign_uses_every_integer_for_it():
    x = samples(100_000).abs()
    assert chosen(entropy_range, x)[0] == 0 and chosen(entropy_range, -x)[1] == 0
    assert chosen(entropy_range, x)[1] == pytest.approx(-chosen(entropy_range, -x)[0], rel=1e-6)
