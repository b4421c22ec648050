"""Bias correction and learned rounding, layer by layer."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qat_lightning import (
    QAT,
    AdaRound,
    CalibrationError,
    ConfigurationError,
    QuantizationCallback,
    StaticPTQ,
    adaround,
    calibrate,
    convert,
    measure_parity,
    prepare,
    refine,
)
from qat_lightning.adaround import _Problem
from qat_lightning.flows import get_flow
from qat_lightning.layerwise import LayerCase
from qat_lightning.plan import Call
from tests.nets import FunctionalNet, Images, ManyInputs, ModuleNet, Plain, fit

FLOWS = pytest.mark.parametrize("flow", ["fx", "eager"])
IMAGES = [Images().images[:64], Images().images[64:]]
COARSE = {"activation_bits": 7, "per_channel": False, "backend": "x86"}
QUICK = AdaRound(iterations=60, samples=512, lr=0.1)


def biased(flow="fx", **options):
    """Return a net whose layers have weights that all have to be rounded the same way, and the net calibrated."""
    torch.manual_seed(0)
    net = ModuleNet().eval()
    for layer in (net.conv1, net.conv2, net.hidden, net.fc):
        flat = layer.weight.data.flatten(1)
        steps = (127 * flat / flat.abs().amax()).floor() + 0.4
        steps[:, 0] = 127
        layer.weight.data = (steps / 127 * flat.abs().amax()).reshape(layer.weight.shape)
    return net, calibrate(prepare(net, StaticPTQ(flow=flow, **COARSE, **options)), IMAGES)


def error(prepared, net):
    with torch.no_grad():
        return torch.cat([prepared(x) - net(x) for x in IMAGES])


@FLOWS
def test_bias_correction_removes_the_mean_error(flow):
    net, prepared = biased(flow)
    before = error(prepared, net)
    after = error(refine(prepared, IMAGES), net)
    assert after.mean(0).abs().max() < 0.2 * before.mean(0).abs().max()
    assert after.square().mean() < 0.5 * before.square().mean()
    assert max(layer.max_steps for layer in measure_parity(prepared, convert(prepared), IMAGES)) <= 1


@FLOWS
def test_learned_rounding_is_nearer_to_float_than_rounding_to_nearest(flow):
    net, prepared = biased(flow)
    before = error(prepared, net).square().mean()
    refine(prepared, IMAGES, bias_correction=False, adaround=QUICK)
    assert error(prepared, net).square().mean() < 0.7 * before
    assert max(layer.max_steps for layer in measure_parity(prepared, convert(prepared), IMAGES)) <= 1


@FLOWS
def test_learned_weights_are_one_of_their_two_integers(flow):
    _, prepared = biased(flow)
    layers = {name: layer for name, layer in prepared.named_modules() if hasattr(layer, "weight_fake_quant")}
    before = {name: layer.weight.detach() / layer.weight_fake_quant.scale for name, layer in layers.items()}
    before = {name: position.clone() for name, position in before.items()}
    refine(prepared, IMAGES, bias_correction=False, adaround=QUICK)
    moved = 0
    for name, layer in layers.items():
        steps = layer.weight.detach() / layer.weight_fake_quant.scale
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert ((steps - before[name]).abs() < 1.001).all()
        moved += int((steps.round() != before[name].round()).sum())
    assert len(layers) == 4 and moved > 0


def case_of(layer, x):
    """Return the case of a lone layer whose inputs are not rounded."""
    prepared = calibrate(prepare(nn.Sequential(layer).eval(), StaticPTQ()), [x])
    cases = []
    get_flow("fx").walk(prepared, [Call((x,), {})], cases.append, False)
    (case,) = cases
    return LayerCase(case.name, case.layer, case.twin, case.float_inputs, case.float_inputs, case.limits)


@given(
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_patches_and_weights_give_the_output_of_the_convolution(dims, kernel, stride, padding, dilation, groups, bias):
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    if padding == 2 and stride == 1 and kernel % 2:
        padding = "same"
    layer = kind(4, 8, kernel, stride, padding, dilation, groups, bias=bias)
    problem = _Problem.of(case_of(layer, torch.randn(3, 4, *[7, 9][:dims])), samples=10_000)
    assert problem.error(problem.position).max() < 1e-9
    assert problem.error(problem.position + 1).max() > 1e-9


def test_a_linear_layer_is_a_regression_too():
    problem = _Problem.of(case_of(nn.Linear(6, 5), torch.randn(3, 4, 6)), samples=100)
    assert problem.x.shape == (1, 12, 6) and problem.error(problem.position).max() < 1e-9


@pytest.mark.parametrize(
    "layer", [nn.Conv3d(1, 2, 1), nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")], ids=lambda layer: type(layer).__name__
)
def test_what_cannot_be_learnt_is_rounded_to_nearest(layer):
    x = torch.randn(2, 1, 4, 4, 4) if isinstance(layer, nn.Conv3d) else torch.randn(2, 1, 4, 4)
    prepared = calibrate(prepare(nn.Sequential(layer).eval(), StaticPTQ()), [x])
    before = copy.deepcopy(dict(prepared.named_parameters()))
    refine(prepared, [x], bias_correction=False, adaround=QUICK)
    assert all(torch.equal(parameter, before[name]) for name, parameter in prepared.named_parameters())


class Stopped(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    kept = AdaRound(iterations=20, samples=256, folder=tmp_path / "rounding")
    learn, learnt = adaround._learn, []

    def count(problem, settings):
        if len(learnt) == 2:
            raise Stopped
        learnt.append(problem)
        return learn(problem, settings)

    _, whole = biased()
    refine(whole, IMAGES, adaround=AdaRound(iterations=20, samples=256))
    monkeypatch.setattr(adaround, "_learn", count)
    with pytest.raises(Stopped):
        refine(biased()[1], IMAGES, adaround=kept)
    learnt.clear()
    _, resumed = biased()
    refine(resumed, IMAGES, adaround=kept)  # the two layers that are left
    assert len(learnt) == 2
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_damaged_file_is_learnt_anew(tmp_path):
    kept = AdaRound(iterations=5, samples=64, folder=tmp_path)
    _, first = biased()
    refine(first, IMAGES, adaround=kept)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4
    for file in files:
        file.write_bytes(file.read_bytes()[:20])
    _, second = biased()
    refine(second, IMAGES, adaround=kept)
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_the_recipe_decides():
    def outcome(**options):
        torch.manual_seed(0)
        callback = QuantizationCallback(StaticPTQ(calibration_batches=2, activation_bits=7, per_channel=False, **options))
        fit(callback, Plain(copy.deepcopy(biased()[0])), max_epochs=0)
        assert callback.report.parity_passed
        with torch.inference_mode():
            return callback.quantized_module.net(IMAGES[0])

    net = biased()[0]
    wanted = net(IMAGES[0]).detach()
    errors = [
        float((outcome(**options) - wanted).square().mean())
        for options in ({"bias_correction": False}, {}, {"bias_correction": False, "adaround": QUICK})
    ]
    assert max(errors[1:]) < 0.7 * errors[0]


@pytest.mark.parametrize("net", [FunctionalNet, ManyInputs], ids=lambda net: net.__name__)
def test_other_networks(net):
    torch.manual_seed(0)
    call = (
        Call((torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.long)), {"mask": torch.ones(4, 5, 8)}) if net is ManyInputs else IMAGES[0]
    )
    prepared = prepare(net().eval(), StaticPTQ(), example=call if net is ManyInputs else None)
    refine(calibrate(prepared, [call]), [call], adaround=AdaRound(iterations=2, samples=32))
    assert max(layer.max_steps for layer in measure_parity(prepared, convert(prepared), [call])) <= 1


class Shared(nn.Module):
    """One layer called twice, and two that share their weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.c.weight = self.b.weight

    def forward(self, x):
        return self.d(self.c(self.b(self.a(self.a(x)))))


@FLOWS
def test_shared_weights_are_left_alone(flow):
    x = torch.randn(16, 8)
    prepared = calibrate(prepare(Shared().eval(), StaticPTQ(flow=flow, per_channel=False)), [x])
    before = copy.deepcopy(dict(prepared.named_parameters()))
    refine(prepared, [x], adaround=QUICK)
    changed = {name for name, parameter in prepared.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"d.weight", "d.bias"}


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"samples": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"regularization": -1.0}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}`"):
        AdaRound(**wrong)


@pytest.mark.parametrize("wrong", [{"iterations": 1.5}, {"lr": "fast"}, {"folder": 3}])
def test_types_of_settings_are_checked(wrong):
    with pytest.raises(TypeError, match=f"`{next(iter(wrong))}`"):
        AdaRound(**wrong)
    with pytest.raises(TypeError, match="`adaround`"):
        StaticPTQ(adaround=True)
    with pytest.raises(TypeError, match="`bias_correction`"):
        StaticPTQ(bias_correction=1)


def test_what_cannot_be_refined_is_named():
    net = ModuleNet().eval()
    with pytest.raises(ConfigurationError, match="was not prepared"):
        refine(net, IMAGES)
    with pytest.raises(ConfigurationError, match="recipe 'qat'"):
        refine(prepare(net, QAT()), IMAGES)
    with pytest.raises(CalibrationError, match="has seen no data"):
        refine(prepare(net, StaticPTQ()), IMAGES)
    with pytest.raises(CalibrationError, match="no batch"):
        refine(calibrate(prepare(net, StaticPTQ()), IMAGES), [])
