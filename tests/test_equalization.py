"""Cross-layer equalization: another network that computes the same."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from qat_lightning import (
    CalibrationError,
    ConfigurationError,
    QuantizationCallback,
    StaticPTQ,
    UnsupportedModelError,
    calibrate,
    equalize,
    prepare,
)
from qat_lightning.recipe import EQUALIZATIONS
from tests.nets import FunctionalNet, Images, ManyInputs, Plain, fit

RULES = pytest.mark.parametrize("rule", EQUALIZATIONS)
WIDTH = 4


def norm(layer):
    """Give a BatchNorm statistics and scales that differ by channel."""
    with torch.no_grad():
        layer.weight.copy_(0.2 + 2 * torch.rand(layer.num_features) ** 3)
        layer.bias.copy_(torch.randn(layer.num_features))
        layer.running_mean.copy_(torch.randn(layer.num_features))
        layer.running_var.copy_(0.1 + torch.rand(layer.num_features))
    return layer


def block(groups, kernel, has_norm, activation):
    conv = nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, groups=groups, bias=not has_norm)
    return nn.Sequential(conv, norm(nn.BatchNorm2d(WIDTH)) if has_norm else nn.Identity(), activation())


class Chain(nn.Module):
    """Blocks that are added to what came before, concatenated with it, shuffled or neither; then pooling and a linear layer."""

    def __init__(self, blocks, joins):
        super().__init__()
        self.stem, self.blocks, self.joins = block(1, 1, True, nn.ReLU), nn.ModuleList(blocks), joins
        self.merge = nn.ModuleList(nn.Conv2d(2 * WIDTH, WIDTH, 1) for _ in blocks)
        self.head, self.last = nn.Linear(WIDTH, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        for one, merge, join in zip(self.blocks, self.merge, self.joins, strict=True):
            y = one(x)
            if join == "add":
                y = F.relu(y + x)
            elif join == "cat":
                y = merge(torch.cat([x, y], 1))
            elif join == "shuffle":
                y = y.view(y.shape[0], 2, WIDTH // 2, y.shape[2], y.shape[3]).transpose(1, 2).reshape(y.shape)
            elif join == "pad":
                y = F.pad(F.max_pool2d(y, 2, 1), (0, 1, 0, 1)) * 0.5
            elif join == "gate":
                y = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
            x = y
        return self.last(F.relu(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))))


BLOCKS = st.tuples(
    st.sampled_from([1, 2, WIDTH]),
    st.sampled_from([1, 3]),
    st.booleans(),
    st.sampled_from([nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.SiLU]),
    st.sampled_from(["", "add", "cat", "shuffle", "pad", "gate"]),
)


@settings(max_examples=20)
@given(st.lists(BLOCKS, min_size=1, max_size=4), st.sampled_from(EQUALIZATIONS), st.integers(0, 99))
def test_the_function_stays(blocks, rule, seed):
    torch.manual_seed(seed)
    net = Chain([block(*one[:4]) for one in blocks], [one[4] for one in blocks]).eval()
    batches = [3 * torch.randn(2, WIDTH, 5, 5) for _ in range(2)]
    changed = equalize(net, batches, rule)
    assert changed.state_dict().keys() == net.state_dict().keys()
    with torch.no_grad():
        for batch in batches:
            expected = net(batch)
            torch.testing.assert_close(changed(batch), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def badly_scaled(activation):
    """Channels of very different range, as folding BatchNorm leaves them in depthwise networks."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 1), norm(nn.BatchNorm2d(16)), activation()),
        *(nn.Conv2d(16, 16, 3, groups=16, bias=False), norm(nn.BatchNorm2d(16)), activation(), nn.Conv2d(16, 8, 1)),
    ).eval()
    with torch.no_grad():
        factors = torch.logspace(-2, 1, 16)
        for before, after in ((net[1], net[3]), (net[4], net[6])):
            before.weight *= factors
            before.bias *= factors
            after.weight /= factors.reshape(-1, 1, 1, 1) if after.groups > 1 else factors.reshape(1, -1, 1, 1)
    return net, [torch.randn(8, 3, 8, 8) for _ in range(4)]


def ranges(net, batches, layers):
    """Return the range of each channel behind some layers of a sequence."""
    with torch.no_grad():
        return [net[: layer + 1](torch.cat(batches)).abs().amax((0, 2, 3)) for layer in layers]


def evenness(values):
    """Return the mean range as a share of the largest one."""
    return float((values / values.max()).mean())


def sqnr(net, reference, batches, **options):
    prepared = calibrate(prepare(net, StaticPTQ(**options)), batches)
    with torch.no_grad():
        signal = torch.cat([reference(batch) for batch in batches])
        noise = torch.cat([prepared(batch) for batch in batches]) - signal
    return float(10 * torch.log10(signal.square().mean() / noise.square().mean()))


@RULES
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_badly_scaled_network_recovers(rule, per_channel):
    net, batches = badly_scaled(nn.ReLU)
    before, after = ranges(net, batches, [2, 5]), ranges(equalize(net, batches, rule), batches, [2, 5])
    assert all(evenness(two) > 1.3 * evenness(one) for one, two in zip(before, after, strict=True))
    lost = sqnr(net, net, batches, per_channel=per_channel)
    assert sqnr(equalize(net, batches, rule), net, batches, per_channel=per_channel) > lost + 10


@RULES
def test_relu6_keeps_what_it_clips(rule):
    net, batches = badly_scaled(nn.ReLU6)
    inputs = net[:2](torch.cat(batches)).amax((0, 2, 3))
    clipped = inputs >= 6
    assert clipped.any() and not clipped.all()
    changed = equalize(net, batches, rule)
    torch.testing.assert_close(changed[1].weight[clipped], net[1].weight[clipped], rtol=0, atol=0)
    assert changed[:2](torch.cat(batches)).amax((0, 2, 3))[~clipped].max() < 6
    assert (changed[1].weight[~clipped] != net[1].weight[~clipped]).any()


@pytest.mark.parametrize(("activation", "moved"), [(nn.ReLU, True), (nn.ReLU6, True), (nn.Identity, True), (nn.SiLU, False)])
@pytest.mark.parametrize("behind", ["bias", "norm", "padding"])
def test_high_biases_are_absorbed(activation, moved, behind):
    torch.manual_seed(0)
    last = nn.Conv2d(8, 4, 3, padding=1 if behind == "padding" else 0, bias=behind != "norm")
    net = nn.Sequential(nn.Conv2d(3, 8, 1), activation(), last, norm(nn.BatchNorm2d(4)) if behind == "norm" else nn.Identity()).eval()
    with torch.no_grad():
        net[0].weight *= 0.1
        net[0].bias.copy_(torch.tensor([-2.0, 0, 0, 0, 2, 2.5, 3, 3.5]))
    batches = [torch.rand(4, 3, 6, 6)]
    changed = equalize(net, batches)
    kept = equalize(net, batches, absorb=False)
    torch.testing.assert_close(changed(batches[0]), net(batches[0]), rtol=1e-4, atol=1e-5)
    lowest = [one[:2](batches[0]).amin((0, 2, 3))[4:].min() for one in (changed, kept)]
    assert (lowest[0] < 1e-5 < lowest[1]) if moved and behind != "padding" else torch.equal(changed[0].bias, kept[0].bias)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, again=None):
        x = self.two(F.relu(self.one(x)))
        return self.out(F.relu(self.one(x)) + (0 if again is None else again))


class Weighted(Twice):
    def forward(self, x):
        return self.out(F.relu(self.two(F.relu(F.linear(x, self.one.weight))))) + self.one(x).sum()


class Tied(Twice):
    def __init__(self):
        super().__init__()
        self.two.weight = self.one.weight


@pytest.mark.parametrize("kind", [Twice, Weighted])
def test_layers_that_are_used_twice_are_left_alone(kind):
    net, x = kind().eval(), torch.randn(9, 4)
    with torch.no_grad():
        net.one.weight[0] *= 20
    changed = equalize(net, [x])
    assert torch.equal(changed.one.weight, net.one.weight)
    torch.testing.assert_close(changed(x), net(x))


def test_tied_weights_stay_tied():
    net, x = Tied().eval(), torch.randn(9, 4)
    changed = equalize(net, [x])
    assert changed.one.weight is changed.two.weight and torch.equal(changed.one.weight, net.one.weight)


def test_what_is_multiplied_by_itself_is_left_alone():
    class Square(Twice):
        def forward(self, x):
            y = self.one(x)
            return self.out(y * y)

    net, x = Square().eval(), torch.randn(9, 4)
    torch.testing.assert_close(equalize(net, [x])(x), net(x))


def test_the_module_itself_and_its_kind_stay():
    net, batches = badly_scaled(nn.ReLU)
    before = copy.deepcopy(net.state_dict())
    changed = equalize(net.train(), batches)
    assert net.training and not changed.training and type(changed) is type(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_inputs_of_any_signature():
    net = ManyInputs().eval()
    call = {"x": torch.randn(5, 8), "ids": torch.randint(10, (5,)), "mask": torch.rand(5, 8)}
    changed = equalize(net, [call])
    torch.testing.assert_close(changed(**call)["logits"], net(**call)["logits"])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_named_or_left_alone():
    with pytest.raises(UnsupportedModelError, match=r"cannot trace Branching at .*x\.sum\(\) > 0"):
        equalize(Branching(), [torch.randn(2, 4)])
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), Branching()).eval()
    x = torch.randn(9, 4)
    with torch.no_grad():
        net[0].weight[0] *= 20
    changed = equalize(net, [x], opaque=["3"])
    assert not torch.equal(changed[0].weight, net[0].weight) and torch.equal(changed[3].fc.weight, net[3].fc.weight)
    torch.testing.assert_close(changed(x), net(x))


def test_no_data_and_nan():
    with pytest.raises(CalibrationError, match="no batch"):
        equalize(nn.Linear(2, 2), [])
    with pytest.raises(CalibrationError, match="batch 1 holds NaN"):
        equalize(nn.Linear(2, 2), [torch.ones(1, 2), torch.full((1, 2), torch.nan)])


def test_settings_are_checked():
    with pytest.raises(ValueError, match="Expected argument `rule` to be one of"):
        equalize(nn.Linear(2, 2), [], "mean")
    with pytest.raises(ValueError, match="Expected argument `equalize` to be one of"):
        StaticPTQ(equalize=True)
    with pytest.raises(ValueError, match="`equalize` only with flow='fx'"):
        StaticPTQ(equalize="weights", flow="eager")
    with pytest.raises(ConfigurationError, match=r"prepare what equalize\(module, batches, rule='weights'\) returns"):
        prepare(nn.Linear(2, 2), StaticPTQ(equalize="weights"))


class Once(Images):
    """Calibration batches that can be read once."""

    def calibration_dataloader(self):
        return iter(super().val_dataloader())


@RULES
def test_the_callback_equalizes_the_int8_copy(rule):
    module = Plain(FunctionalNet())
    with torch.no_grad():
        module.net.conv1.weight[0] *= 30
        module.net.bn1.weight[0] *= 30
    before = copy.deepcopy(module.state_dict())
    callback = QuantizationCallback(StaticPTQ(equalize=rule, overrides={"net.fc": None}))
    fit(callback, module, Once(), max_epochs=0)
    assert callback.report.parity_passed and callback.report.quantized_modules == 3
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    expected, found = (one.eval()(Images().images).detach() for one in (module.net, callback.quantized_module.net))
    torch.testing.assert_close(found, expected, atol=0.1 * float(expected.abs().max()), rtol=0)
    assert not torch.equal(callback.quantized_module.net.fc.weight, module.net.fc.weight)


@RULES
def test_a_channel_that_is_nearly_dead_stays_small(rule):
    net, batches = badly_scaled(nn.ReLU)
    with torch.no_grad():
        net[1].weight[3], net[1].bias[3] = 1e-20, 0.5
    before, after = (ranges(one, batches, [2])[0] for one in (net, equalize(net, batches, rule, absorb=False)))
    assert after[3] <= 1.01 * before.max()


def test_inputs_without_a_batch_dimension():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(4)
    torch.testing.assert_close(equalize(net, [x])(x), net(x))
