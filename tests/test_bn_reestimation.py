"""Running statistics of BatchNorm, measured anew."""

import copy

import pytest
import torch
from torch import nn

from qat_lightning import QAT, CalibrationError, QuantizationCallback, convert, measure_parity, prepare, reestimate_batch_norm
from qat_lightning.observers import apply_phase
from qat_lightning.plan import Call
from qat_lightning.schedule import IDLE
from tests.flows.test_flows import quantize
from tests.nets import Images, ModuleNet, Plain, fit

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


@FLOWS
def test_nothing_else_changes(flow):
    torch.manual_seed(0)
    prepared, _ = quantize(ModuleNet(), QAT(flow=flow), Call((BATCHES[0],), {}))
    prepared.train()
    before, random = copy.deepcopy(prepared.state_dict()), torch.get_rng_state()
    modes = {name: child.training for name, child in prepared.named_modules()}
    momenta = [norm.momentum for norm in prepared.modules() if isinstance(norm, nn.BatchNorm2d)]
    reestimate_batch_norm(prepared, BATCHES)
    changed = {name for name, tensor in prepared.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.endswith(("running_mean", "running_var", "weight_fake_quant.scale")) for name in changed)
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


def test_without_batch_norm_nothing_happens():
    net = nn.Sequential(nn.Linear(2, 2)).eval()
    assert reestimate_batch_norm(net, []) is net


def test_without_a_batch_it_is_refused():
    with pytest.raises(CalibrationError, match="got no batch"):
        reestimate_batch_norm(prepare(ModuleNet(), QAT()), [])
    with pytest.raises(ValueError, match="`bn_reestimation_batches` to be at least 0"):
        QAT(bn_reestimation_batches=-1)
