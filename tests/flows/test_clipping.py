"""ReLU6 and its kin as saturation of the layer in front of them."""

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning import QAT, StaticPTQ, calibrate, convert, measure_parity, prepare
from qat_lightning.backend import supported_backends
from qat_lightning.plan import Call
from tests.flows.test_flows import quantize

INPUTS = 6 * torch.randn(32, 3, 10, 10, generator=torch.Generator().manual_seed(0))

CLIPS = {
    "relu6": (nn.ReLU6(), (0.0, 6.0)),
    "functional relu6": (F.relu6, (0.0, 6.0)),
    "hardtanh": (nn.Hardtanh(-1, 2), (-1.0, 2.0)),
    "functional hardtanh": (lambda x: F.hardtanh(x, 0.0, 3.0), (0.0, 3.0)),
    "hardtanh's own limits": (F.hardtanh, (-1.0, 1.0)),
    "clamp": (lambda x: torch.clamp(x, min=-0.5, max=4), (-0.5, 4.0)),
    "method": (lambda x: x.clamp(0, 2), (0.0, 2.0)),
    "behind an identity": (nn.Sequential(nn.Identity(), nn.ReLU6()), (0.0, 6.0)),
}
OTHERS = {
    "zero outside": lambda x: x.clamp(1, 2),
    "one side": lambda x: x.clamp(max=2),
}


class Clipped(nn.Module):
    """A convolution with BatchNorm and wide outputs, clipped, and a second convolution."""

    def __init__(self, clip, norm=True):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.bn, self.clip, self.last = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            clip,
            nn.Conv2d(6, 2, 1),
        )
        if norm:
            self.bn.running_var.fill_(0.5)

    def forward(self, x):
        return self.last(self.clip(self.bn(self.conv(x))))


class WithoutNorm(Clipped):
    def __init__(self, clip):
        super().__init__(clip)
        del self.bn

    def forward(self, x):
        return self.last(self.clip(self.conv(x)))


def limits(prepared):
    return [module.limits for module in prepared.modules() if getattr(module, "limits", None) is not None]


def check(net, recipe, expected):
    prepared, int8 = quantize(net, recipe, Call((INPUTS,), {}))
    assert limits(prepared) == expected
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [INPUTS])) <= 1
    return prepared, int8


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", [StaticPTQ(), QAT()], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("norm", [True, False], ids=["bn", "no bn"])
@pytest.mark.parametrize(("clip", "expected"), CLIPS.values(), ids=CLIPS)
def test_fx_leaves_a_clip_to_saturation(clip, expected, norm, recipe):
    net = Clipped(clip, norm).eval()
    wanted = net(INPUTS)
    assert torch.allclose(prepare(net, recipe).eval()(INPUTS), wanted, atol=1e-4)  # nothing is rounded yet, and clipped all the same
    _, int8 = check(net.train(isinstance(recipe, QAT)), recipe, [expected])
    kinds = [type(int8.get_submodule(node.target)).__name__ for node in int8.graph.nodes if node.op == "call_module"]
    assert kinds == ["ConvReLU2d" if expected[0] == 0 else "Conv2d", "Conv2d"]


@pytest.mark.parametrize("recipe", [StaticPTQ(flow="eager"), QAT(flow="eager")], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("norm", [True, False], ids=["bn", "no bn"])
def test_eager_leaves_a_relu6_to_saturation(norm, recipe):
    net = (Clipped if norm else WithoutNorm)(nn.ReLU6())
    wanted = net.eval()(INPUTS)
    assert torch.allclose(prepare(net, recipe).eval()(INPUTS), wanted, atol=1e-4)
    _, int8 = check(net.train(isinstance(recipe, QAT)), recipe, [(0.0, 6.0)])
    assert type(int8.conv).__name__ == "ConvReLU2d"


def test_ranges_end_at_the_limit():
    for observer in ("minmax", "histogram", "moving_average"):
        prepared = calibrate(prepare(Clipped(nn.ReLU6()).eval(), StaticPTQ(observer=observer)), [INPUTS])
        (fake_quant,) = (module for module in prepared.modules() if getattr(module, "limits", None) is not None)
        assert 5 < float(fake_quant.scale) * 255 <= 6.0001 and int(fake_quant.zero_point) == 0


def test_int8_is_nearer_than_with_the_wide_range():
    inputs = 4 * INPUTS
    near, wide = (
        Clipped(nn.ReLU6()).eval(),
        Clipped(nn.Sequential(nn.MaxPool2d(1), nn.ReLU6())).eval(),
    )  # the pool keeps the clip from its layer
    wanted = near(inputs).detach()
    prepared = [calibrate(prepare(net, StaticPTQ(observer="minmax")), [inputs]) for net in (near, wide)]
    errors = [float((convert(one)(inputs) - wanted).square().mean()) for one in prepared]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("backend", supported_backends())
@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_seven_bits_keep_their_clip(flow, backend):
    """A kernel saturates at 255 steps, which is twice the limit of a range of 127."""
    net = Clipped(nn.ReLU6()).eval()
    _, int8 = check(net, StaticPTQ(flow=flow, backend=backend, activation_bits=7), [])
    assert (int8(INPUTS) - net(INPUTS)).abs().max() < 0.2 * net(INPUTS).abs().max()


@pytest.mark.parametrize("clip", OTHERS.values(), ids=OTHERS)
def test_other_clips_stay(clip):
    check(Clipped(clip).eval(), StaticPTQ(), [])


class Adds(Clipped):
    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.last(self.clip(operator.add(x, x.flip(0))))


class Forked(Clipped):
    """What is clipped is used unclipped, too."""

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.last(self.clip(x)) + x[:, :2]


class Twice(Clipped):
    """One ReLU6 behind two layers."""

    def forward(self, x):
        return self.clip(self.last(self.clip(self.bn(self.conv(x)))))


class FloatLayer(Clipped):
    """A clip behind a layer that stays float."""


@pytest.mark.parametrize(
    ("net", "options", "expected"),
    [(Adds, {}, [(0.0, 6.0)]), (Forked, {}, []), (Twice, {}, [(0.0, 6.0)] * 2), (FloatLayer, {"overrides": {"conv": None}}, [])],
)
@pytest.mark.parametrize("recipe", [StaticPTQ, QAT], ids=lambda recipe: recipe.name)
def test_what_else_stands_around_a_clip(net, options, expected, recipe):
    module = net(nn.ReLU6()).train(recipe is QAT)
    _, int8 = check(module, recipe(**options), expected)
    reference = module.eval()(INPUTS)
    assert (int8(INPUTS) - reference).abs().max() < 0.15 * reference.abs().max() or recipe is QAT


class Hard(nn.Module):
    def __init__(self, fork):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last, self.fork = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1), fork

    def forward(self, x):
        x = self.conv(x)
        y = F.hardswish(x) * F.hardsigmoid(x)
        return self.last(y + x if self.fork else y)


def test_inputs_of_hardswish_and_hardsigmoid_end_where_these_are_constant():
    check(Hard(False).eval(), StaticPTQ(), [(-3.0, float("inf"))])
    check(Hard(True).eval(), StaticPTQ(), [])


def test_a_clip_learns_as_before():
    """The gradient of what is clipped is zero, with and without rounding."""
    prepared = prepare(Clipped(nn.ReLU6()), QAT()).train()
    for phase in (False, True):
        for module in prepared.modules():
            if hasattr(module, "limits"):
                module.enable_fake_quant(phase)
                module.enable_observer(phase)
        prepared.conv.weight.grad = None
        prepared.conv.bn.bias.data.fill_(100.0)  # everything is above the limit
        prepared(INPUTS).sum().backward()
        assert prepared.conv.bn.bias.grad is None or not prepared.conv.bn.bias.grad.any()
