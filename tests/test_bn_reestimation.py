"""Running statistics of BatchNorm, measured anew."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from qat_lightning import QAT, CalibrationError, QuantizationCallback, convert, measure_parity, prepare, reestimate_batch_norm
from qat_lightning.observers import apply_phase
from qat_lightning.plan import Call
from qat_lightning.schedule import IDLE, Phase
from tests.flows.test_flows import quantize
from tests.nets import QUIET, Images, ModuleNet, Plain, fit

FLOWS = pytest.mark.parametrize("flow", ["fx", "eager"])
BATCHES = list(Images().images.split(40))  # the last one is smaller


def test_statistics_are_those_of_all_values():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    with torch.no_grad():
        values = net[0](torch.cat(BATCHES)).movedim(1, 0).flatten(1)
    reestimate_batch_norm(net, BATCHES)
    torch.testing.assert_close(net[1].running_mean, values.mean(1))
    torch.testing.assert_close(net[1].running_var, values.var(1))


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5), offset=st.floats(-1e8, 1e8), scale=st.floats(0.1, 100))
@settings(max_examples=30, deadline=None)
def test_a_large_mean_costs_no_digits(sizes, offset, scale):
    generator = torch.Generator().manual_seed(len(sizes))
    batches = [torch.randn(size, 3, generator=generator, dtype=torch.float64) * scale + offset for size in sizes]
    norm = reestimate_batch_norm(nn.BatchNorm1d(3).double().eval(), batches)
    torch.testing.assert_close(norm.running_mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(norm.running_var, torch.cat(batches).var(0), rtol=1e-5, atol=0)


class TwiceByKeyword(nn.Module):
    """A BatchNorm that is called twice, by keyword, behind dropout."""

    def __init__(self):
        super().__init__()
        self.drop, self.bn = nn.Dropout(0.5), nn.BatchNorm2d(1)

    def forward(self, x):
        return self.bn(input=self.drop(x)) + self.bn(input=3 * x)


def test_all_calls_count_and_dropout_is_off():
    net = reestimate_batch_norm(TwiceByKeyword(), BATCHES)
    values = torch.cat([image for batch in BATCHES for image in (batch, 3 * batch)])
    torch.testing.assert_close(net.bn.running_var, values.var().reshape(1))
    assert net.bn.num_batches_tracked == 0 and net.drop.training


@FLOWS
@pytest.mark.parametrize("observers", [True, False], ids=["observers on", "frozen"])
def test_nothing_else_changes(flow, observers):
    torch.manual_seed(0)
    prepared, _ = quantize(ModuleNet(), QAT(flow=flow), Call((BATCHES[0],), {}))
    apply_phase(prepared.train(), Phase(fake_quant=True, observers=observers, bn_frozen=False))
    if not observers:
        for parameter in prepared.parameters():  # as an optimizer that goes on behind the freeze
            parameter.data *= 1.2
    before, random = copy.deepcopy(prepared.state_dict()), torch.get_rng_state()
    modes = {name: child.training for name, child in prepared.named_modules()}
    momenta = [norm.momentum for norm in prepared.modules() if isinstance(norm, nn.BatchNorm2d)]
    reestimate_batch_norm(prepared, BATCHES)
    changed = {name for name, tensor in prepared.state_dict().items() if not torch.equal(tensor, before[name])}
    fused = {f"{name.removesuffix('.bn.running_var')}.weight_fake_quant.scale" for name in changed if name.endswith(".bn.running_var")}
    assert len(fused) == 2 and fused <= changed
    assert all(name.endswith(("running_mean", "running_var")) for name in changed - fused)
    assert {name: child.training for name, child in prepared.named_modules()} == modes
    assert [norm.momentum for norm in prepared.modules() if isinstance(norm, nn.BatchNorm2d)] == momenta
    assert torch.equal(torch.get_rng_state(), random)


@FLOWS
def test_the_first_layer_of_qat_has_the_statistics_of_its_rounded_weights(flow):
    torch.manual_seed(0)
    prepared, _ = quantize(ModuleNet(), QAT(flow=flow), Call((BATCHES[0],), {}))
    layer = prepared.conv1
    values = []
    handle = layer.bn.register_forward_pre_hook(lambda module, args: values.append(args[0]))
    apply_phase(prepared.eval(), IDLE)
    with torch.no_grad():
        for batch in BATCHES:
            prepared(batch)
    handle.remove()
    reestimate_batch_norm(prepared, BATCHES)
    values = torch.cat(values).movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.bn.running_mean, values.mean(1))
    torch.testing.assert_close(layer.bn.running_var, values.var(1))
    int8 = convert(prepared)
    assert max(entry.max_steps for entry in measure_parity(prepared, int8, BATCHES)) <= 1


@FLOWS
def test_frozen_integers_stay(flow):
    torch.manual_seed(0)
    prepared, _ = quantize(ModuleNet(), QAT(flow=flow), Call((BATCHES[0],), {}))
    apply_phase(prepared.eval(), IDLE)
    prepared.conv1.weight.data *= 0.9  # the range is that of the weights before
    before = convert(prepared).conv1.weight()
    after = convert(reestimate_batch_norm(prepared, BATCHES)).conv1.weight()
    assert before.int_repr().abs().max() < 120
    # A weight on the border of two integers may go over it by the last bit.
    assert (before.int_repr() != after.int_repr()).float().mean() < 0.02
    assert not torch.equal(before.q_per_channel_scales(), after.q_per_channel_scales())


@FLOWS
def test_the_recipe_measures_before_the_conversion(flow):
    def outputs(count):
        torch.manual_seed(0)
        callback = QuantizationCallback(QAT(flow=flow, bn_reestimation_batches=count))
        module, _ = fit(callback, Plain(), max_epochs=1)
        assert callback.report.parity_passed
        with torch.inference_mode():
            return callback.quantized_module.net(BATCHES[0]), module.net.state_dict()

    (plain, weights), (again, same_weights) = outputs(0), outputs(4)
    assert not torch.equal(plain, again)
    assert all(torch.equal(tensor, same_weights[name]) for name, tensor in weights.items())  # the trained module is left alone


class TwoTargets(Plain):
    """Two networks whose layers have the same names."""

    def __init__(self):
        LightningModule.__init__(self)
        self.one, self.other, self.loss, self.lr = ModuleNet(), ModuleNet(), nn.CrossEntropyLoss(), 0.02

    def net(self, x):
        return self.one(x) + self.other(x)


class ReadOnce(Images):
    """Batches that can be read once only."""

    def train_dataloader(self):
        return iter([[images, labels] for images, labels in self.loader()])


def biases(module, data=None, count=4):
    torch.manual_seed(0)
    callback = QuantizationCallback(QAT(freeze_bn=None, bn_reestimation_batches=count))
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(module, data or Images())
    layers = dict(callback.quantized_module.named_modules())
    return {name: layers[f"{name}.conv1"].bias() for name in ("one", "other")}


def test_all_targets_are_measured():
    torch.manual_seed(0)
    module = TwoTargets()
    before, after = (biases(copy.deepcopy(module), count=count) for count in (0, 4))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_whose_data_can_be_read_once_keeps_its_statistics(caplog):
    torch.manual_seed(0)
    module = TwoTargets()
    before, after = (biases(copy.deepcopy(module), ReadOnce(), count) for count in (0, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "BatchNorm keeps its statistics. Give `calibration_data`" in caplog.text


def test_without_batch_norm_nothing_happens():
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    assert reestimate_batch_norm(net, []) is net


def test_without_a_batch_it_is_refused():
    with pytest.raises(CalibrationError, match="got no batch"):
        reestimate_batch_norm(prepare(ModuleNet(), QAT()), [])


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        (torch.full((4, 1, 8, 8), torch.nan), "batch 1 holds NaN"),
        (torch.full((4, 1, 8, 8), 3e38), "BatchNorm '1' was given NaN or infinite"),
        (torch.randn(1, 1, 3, 3), r"BatchNorm '1' was given a single value per channel, shape \(1, 3, 1, 1\)"),
    ],
    ids=["NaN", "overflow", "single value"],
)
def test_batches_that_cannot_be_measured_change_nothing(spoilt, message):
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    net[0].weight.data.fill_(1)
    with pytest.raises(CalibrationError, match=message):
        reestimate_batch_norm(net, [BATCHES[0], spoilt])
    assert torch.equal(net[1].running_var, torch.ones(3)) and net[1].track_running_stats and net[1].training


def test_the_number_of_batches_is_checked():
    with pytest.raises(ValueError, match="`bn_reestimation_batches` to be at least 0"):
        QAT(bn_reestimation_batches=-1)
