import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat_lightning import StaticPTQ, affine, backend, calibrate, prepare
from qat_lightning.affine import (
    QParams,
    bias_on_grid,
    choose_qparams,
    dequantize,
    quantize,
    quantize_bias,
    round_weight,
    scale_for_kernels,
    scale_off_borders,
    scale_with_reciprocal,
    settle_layer,
    step_difference,
    weight_limits,
    weight_scale,
)

VALUES = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=64)
SCALES = st.floats(1e-3, 2.0)
RANGES = st.sampled_from([(0, 255, torch.quint8), (0, 127, torch.quint8), (-128, 127, torch.qint8)])


@given(values=VALUES, scale=SCALES, kind=st.sampled_from([(0, 255, torch.quint8), (-128, 127, torch.qint8)]), data=st.data())
def test_equals_torch(values, scale, kind, data):
    q_min, q_max, dtype = kind
    x, qparams = torch.tensor(values), QParams(scale, data.draw(st.integers(q_min, q_max)), q_min, q_max)
    theirs = torch.quantize_per_tensor(x, qparams.scale, qparams.zero_point, dtype)
    assert torch.equal(quantize(x, qparams), theirs.int_repr().long())
    assert torch.equal(dequantize(quantize(x, qparams), qparams), theirs.dequantize())


@given(low=st.floats(-100, 100), high=st.floats(-100, 100), kind=RANGES)
def test_rounding_error_is_half_a_step_inside_the_range(low, high, kind):
    low, high = min(low, high), max(low, high)
    qparams = choose_qparams(low, high, kind[0], kind[1])
    x = torch.linspace(low, high, 101)
    error = (dequantize(quantize(x, qparams), qparams) - x).abs().max().item()
    # The zero point is rounded too, which shifts the ends by up to half a step more.
    assert error <= qparams.scale * 1.01 + 1e-5


@given(low=st.floats(-100, 0), high=st.floats(0, 100), kind=RANGES)
def test_zero_is_exact(low, high, kind):
    qparams = choose_qparams(low, high, kind[0], kind[1])
    assert quantize(torch.zeros(1), qparams).item() == qparams.zero_point
    assert dequantize(torch.tensor([qparams.zero_point]), qparams).item() == 0


@pytest.mark.parametrize("shift", [-3.0, 0.0, 2.0])
def test_equals_the_qparams_of_a_calibrated_model(shift):
    x = torch.randn(64, 8) + shift
    prepared = calibrate(prepare(nn.Sequential(nn.Linear(8, 8)), StaticPTQ(observer="minmax")), [x])
    fake_quant = prepared.get_submodule("activation_post_process_0")
    expected = choose_qparams(x.min().item(), x.max().item(), 0, 255)
    assert fake_quant.scale.item() == pytest.approx(expected.scale, rel=1e-6)
    assert abs(fake_quant.zero_point.item() - expected.zero_point) <= 1
    assert step_difference(prepared.activation_post_process_0(x), x, expected).max() <= 1


@given(seed=st.integers(0, 10**6), shape=st.lists(st.integers(1, 5), min_size=2, max_size=4), bits=st.sampled_from([7, 8]), data=st.data())
def test_weights_are_rounded_to_the_nearest_and_the_largest_stays(seed, shape, bits, data):
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    limits = weight_limits(bits)
    scale = weight_scale(weight, axis, limits[1])
    rounded = round_weight(weight, scale, torch.zeros_like(scale, dtype=torch.int32), axis, limits)
    steps = scale if axis is None else scale.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    assert ((rounded - weight).abs() <= 0.501 * steps).all()
    channels = [weight] if axis is None else weight.unbind(axis)
    assert torch.allclose(torch.stack([channel.abs().max() for channel in channels]), scale * limits[1])
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))  # nothing lies beyond the limits


@pytest.mark.parametrize("interval", [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_refuses_what_is_no_interval(interval):
    with pytest.raises(ValueError, match="finite x_min <= x_max"):
        choose_qparams(*interval, 0, 255)


def test_refuses_an_empty_integer_range():
    with pytest.raises(ValueError, match="q_min < q_max"):
        choose_qparams(0, 1, 3, 3)


def test_worked_example():
    assert doctest.testmod(affine).failed == 0 and doctest.testmod(affine).attempted >= 3


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=64), st.floats(2**-40, 2**-3, width=32))
def test_a_bias_on_the_grid_is_the_same_integer_to_all_kernels(values, scale):
    bias, scale = torch.tensor(values), torch.tensor(scale)
    rounded = bias_on_grid(bias, scale)
    integers = quantize_bias(rounded, scale)
    nearest = quantize_bias(bias, scale).float()
    spacing = (torch.nextafter(nearest.abs(), torch.tensor(torch.inf)) - nearest.abs()).clamp(min=1)
    near = nearest[:, None] + torch.arange(-24, 25) * spacing[:, None]
    possible = ((near * scale / scale == near) & (near.abs() < 2**31)).any(1)  # a few scales have no such integer nearby
    assert torch.equal((rounded / scale)[possible], integers.float()[possible])  # in float32, as fbgemm divides
    assert torch.equal(bias_on_grid(rounded, scale), rounded)
    inside = (bias / scale).abs() < 2**30
    assert ((rounded - bias).abs()[inside] <= torch.maximum(24 * scale, 4e-6 * bias.abs())[inside]).all()


def test_nearly_every_bias_has_such_an_integer():
    generator = torch.Generator().manual_seed(0)
    biases, scales = torch.randn(20000, generator=generator), torch.exp2(-7 - 20 * torch.rand(20000, generator=generator))
    found, nearest = bias_on_grid(biases, scales) / scales, (biases / scales).round() * scales / scales
    assert (found == found.round()).float().mean() > 0.999 and (nearest == nearest.round()).float().mean() < 0.95


def test_products_by_a_scale_are_the_same_by_division_and_by_the_reciprocal():
    generator = torch.Generator().manual_seed(0)
    equal, before = [], []
    for _ in range(300):
        scales = torch.rand(32, generator=generator) * 0.01 + 1e-6
        of_input, of_output = torch.rand(2, generator=generator) + 1e-3
        found = scale_for_kernels(scales, float(of_input), float(of_output))
        assert torch.allclose(found, scales, rtol=4e-6, atol=0)
        for kept, values in ((equal, found), (before, scales)):
            kept.append((values * of_input / of_output == values * of_input * (1 / of_output)).float().mean())
    assert torch.stack(equal).mean() > 0.99 and torch.stack(before).mean() < 0.9


@given(st.floats(2**-30, 2**10, width=32))
def test_a_settled_scale_has_a_reciprocal_and_exact_products(scale):
    settled = torch.tensor(scale_with_reciprocal(scale))
    assert abs(float(settled) / scale - 1) < 2e-4
    for count in (1, 4, 36, 49, 64, 100, 196, 784, 3136):
        assert settled / (settled * count) == 1 / torch.tensor(float(count))


def test_nearly_every_settled_scale_has_an_accurate_reciprocal():
    scales = torch.exp2(-20 * torch.rand(500, generator=torch.Generator().manual_seed(0)))
    settled = torch.tensor([scale_with_reciprocal(float(scale)) for scale in scales])
    errors = ((1 / settled).double() * settled.double() - 1).abs()
    assert (errors <= 2.0**-26).float().mean() > 0.99 and errors.max() < 2.0**-24
    assert (settled / scales - 1).abs().median() < 1e-5


@settings(max_examples=20)
@given(
    scales=st.tuples(*[st.floats(2**-9, 2**-3, width=32)] * 2),
    factor=st.floats(0.5, 2),
    zero_points=st.tuples(*[st.integers(0, 255)] * 3),
    op=st.sampled_from(["add", "mul"]),
)
def test_all_kernels_round_sums_and_products_alike(scales, factor, zero_points, op):
    integers = torch.arange(256)
    reals = [(integers.double() - zero_point) * scale for scale, zero_point in zip(scales, zero_points[:2], strict=True)]
    values = getattr(torch, op)(reals[0][:, None], reals[1])
    before = float(values.abs().max()) / 200 * factor + 1e-6
    scale = scale_off_borders(values, before, zero_points[2])
    assert abs(scale / before - 1) < 3e-4
    results = []
    for engine in ("fbgemm", "qnnpack"):
        with backend.engine(engine):
            inputs = [
                torch._make_per_tensor_quantized_tensor(
                    integers.to(torch.uint8).reshape(shape).expand(256, 256).contiguous(), one, zero_point
                )
                for shape, one, zero_point in zip(((256, 1), (1, 256)), scales, zero_points[:2], strict=True)
            ]
            results.append(getattr(torch.ops.quantized, op)(*inputs, scale, zero_points[2]).int_repr())
    exact = (values / scale).round() + zero_points[2]
    ratios = [torch.tensor(one) / torch.tensor(scale) for one in scales]
    floats = [integers.float() - zero_point for zero_point in zero_points[:2]]
    if op == "add":  # as ONNX Runtime does it
        results.append((floats[0][:, None] * ratios[0] + floats[1] * ratios[1]).round() + zero_points[2])
    assert all(torch.equal(result.double().clamp(0, 255), exact.clamp(0, 255)) for result in results)


def test_a_constant_output_keeps_its_scale():
    assert scale_off_borders(torch.full((4,), 1e9, dtype=torch.float64), 0.5, 0) == 0.5


def test_layers_are_settled():
    generator = torch.Generator().manual_seed(0)
    for per_channel in (True, False):
        scale = torch.rand(256 if per_channel else 1, generator=generator) * 0.01 + 1e-5
        bias = torch.randn(256 if per_channel else 8, generator=generator)
        of_input, of_output = (scale_with_reciprocal(float(value)) for value in torch.rand(2, generator=generator) * 0.05 + 1e-3)
        found, placed = settle_layer(scale, bias, of_input, of_output)
        products = found * torch.tensor(of_input)
        assert torch.equal(placed / products, (placed / products).round())
        assert torch.equal(products / torch.tensor(of_output), products * (1 / torch.tensor(of_output)))
        assert (found / scale - 1).abs().max() < 1e-5 and ((placed - bias).abs() <= (0.51 if per_channel else 25) * products).all()
    assert settle_layer(scale, None, of_input, of_output)[1] is None
