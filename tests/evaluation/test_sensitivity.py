import importlib.util
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from qat_lightning import QAT, CalibrationError, Call, ConfigurationError, StaticPTQ, calibrate, convert, measure_sensitivity, prepare
from qat_lightning.evaluation import LayerSensitivity, Sensitivity
from qat_lightning.observers import fake_quants
from tests.nets import FunctionalNet, ManyInputs, ModuleNet

FLOWS = ("fx", "eager", "pt2e")


class Chain(nn.Module):
    """Three layers in a row; the weights of the middle one hold a value that takes all levels from the others."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.relu1, self.b, self.relu2, self.c = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.relu2(self.b(self.relu1(self.a(x)))))


def fragile_chain():
    """In each row of `b` one weight of 100 on an input that is always zero."""
    net = Chain().eval()
    with torch.no_grad():
        net.a.weight[0], net.a.bias[0] = 0.0, -1.0
        net.b.weight[:, 0] = 100.0
    return net


def inputs(net, count=3):
    generator = torch.Generator().manual_seed(1)
    shape = (16, 1, 8, 8) if isinstance(net, ModuleNet | FunctionalNet) else (16, 8)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def example_of(net):
    return Call((inputs(net)[0],), {}) if isinstance(net, ModuleNet | FunctionalNet | Chain) else None


def calibrated(net, recipe):
    return calibrate(prepare(net.eval(), recipe, example_of(net)), inputs(net))


def relative_error(reference, value):
    reference, value = reference.detach().double(), value.detach().double()
    return float((value - reference).square().sum() / reference.square().sum())


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("recipe", [StaticPTQ, QAT])
def test_fragile_layer_is_found(flow, recipe):
    net = fragile_chain()
    found = measure_sensitivity(calibrated(net, recipe(flow=flow)), inputs(net))
    rows = {row.layer: row for row in found.rows}
    assert [*rows] == ["a", "b", "c"]
    assert found.ranked()[0].layer == "b"
    assert rows["b"].only > 10 * max(rows["a"].only, rows["c"].only)
    assert rows["b"].all_but < found.divergence / 10 < rows["a"].all_but
    assert rows["b"].sqnr_db < 10 < 20 < min(rows["a"].sqnr_db, rows["c"].sqnr_db)


def test_flows_agree():
    net = fragile_chain()
    fx, eager, pt2e = (measure_sensitivity(calibrated(net, StaticPTQ(flow=flow)), inputs(net)) for flow in FLOWS)
    assert fx == eager
    # Its grids differ from theirs in the last bits.
    for one, other in zip(fx.rows, pt2e.rows, strict=True):
        assert one.layer == other.layer and other.all_but == pytest.approx(one.all_but, rel=0.2)


@pytest.mark.parametrize("layer", ["a", "b", "c"])
@pytest.mark.parametrize("recipe", [StaticPTQ, QAT])
def test_all_but_is_the_override_and_only_is_the_override_of_all_others(layer, recipe):
    net, others = Chain().eval(), [name for name in "abc" if name != layer]
    found = {row.layer: row for row in measure_sensitivity(calibrated(net, recipe()), inputs(net)).rows}[layer]
    for kept, expected in (([layer], found.all_but), (others, found.only)):
        overridden = calibrated(net, recipe(overrides=dict.fromkeys(kept)))
        outputs = [torch.cat([module(x) for x in inputs(net)]) for module in (net, overridden)]
        assert relative_error(*outputs) == pytest.approx(expected)


@pytest.mark.parametrize("flow", FLOWS)
def test_residual_and_functional_networks(flow):
    for net in (ModuleNet(), FunctionalNet())[: 1 if flow == "eager" else 2]:
        found = measure_sensitivity(calibrated(net, StaticPTQ(flow=flow)), inputs(net))
        layers = {name for name, layer in net.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        assert {row.layer for row in found.rows} == layers
        assert all(0 < row.only < 1e-2 and 0 < row.all_but < 1e-2 and row.sqnr_db > 20 for row in found.rows)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("recipe", [StaticPTQ, QAT])
def test_module_is_left_as_it_was(flow, recipe):
    net = ModuleNet()
    prepared = calibrated(net, recipe(flow=flow)).train()
    quants = list(fake_quants(prepared))
    quants[0].enable_fake_quant(False)
    quants[1].enable_observer(True)
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    modes = [module.training for module in prepared.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in prepared.modules()]

    def failing(module):
        raise ArithmeticError

    measure_sensitivity(prepared, inputs(net))
    with pytest.raises(ArithmeticError):
        measure_sensitivity(prepared, inputs(net), metric=failing)
    after = prepared.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], value) for name, value in state.items())
    assert [module.training for module in prepared.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in prepared.modules()] == hooks


def test_metric_sees_the_switched_module():
    net = fragile_chain()
    prepared, data = calibrated(net, StaticPTQ()), torch.cat(inputs(net))
    expected = net(data)
    found = measure_sensitivity(prepared, inputs(net), lambda module: 1 - relative_error(expected, module(data)), "agreement")
    assert found.metric_float == 1.0
    assert found.metric_int8 == pytest.approx(1 - found.divergence)
    for row in found.rows:
        assert (row.metric_only, row.metric_all_but) == (pytest.approx(1 - row.only), pytest.approx(1 - row.all_but))
    assert "agreement: 1.0000 in float" in found.to_markdown()


def test_any_structure_of_outputs():
    net, generator = ManyInputs().eval(), torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 8, generator=generator), torch.arange(4) + i) for i in range(3)]
    found = measure_sensitivity(calibrate(prepare(net, StaticPTQ()), batches), batches)
    assert {row.layer for row in found.rows} == {"a", "b", "fc"}
    assert all(row.only > 0 for row in found.rows)


def test_cost_is_two_runs_a_layer():
    net, runs = Chain(), []
    prepared = calibrated(net, StaticPTQ())
    prepared.register_forward_pre_hook(lambda *_: runs.append(1))
    measure_sensitivity(prepared, inputs(net))
    # Tracing, the float outputs, everything in int8, and two for each layer.
    assert len(runs) == 1 + 3 * (2 + 2 * 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: (Chain(), inputs(Chain())), ConfigurationError, "was not prepared"),
        (lambda: (prepare(Chain().eval(), StaticPTQ()), inputs(Chain())), CalibrationError, "seen no data"),
        (lambda: (calibrated(Chain(), StaticPTQ()), []), CalibrationError, "no batch"),
        (lambda: (calibrated(Chain(), StaticPTQ()), [torch.full((2, 8), math.inf)]), CalibrationError, "NaN or infinite"),
        (lambda: (calibrated(Choice(), StaticPTQ(flow="eager")), inputs(Chain())), ConfigurationError, "no floating-point tensor"),
    ],
    ids=["float", "uncalibrated", "empty", "infinite", "integers"],
)
def test_what_cannot_be_measured(make, error, message):
    with pytest.raises(error, match=message):
        measure_sensitivity(*make())


class Choice(Chain):
    def forward(self, x):
        return super().forward(x).argmax(1)


ROWS = (
    LayerSensitivity(layer="a", sqnr_db=math.inf, only=0.0, all_but=0.5, metric_only=0.9, metric_all_but=0.5),
    LayerSensitivity(layer="b", sqnr_db=12.34, only=0.25, all_but=0.125, metric_only=0.6, metric_all_but=0.8),
)
FOUND = Sensitivity(rows=ROWS, divergence=0.375, metric="val/acc", metric_float=0.9, metric_int8=0.5)


def test_table_json_and_markdown(tmp_path):
    FOUND.save(tmp_path, plot=False)
    saved = json.loads((tmp_path / "sensitivity.json").read_text())
    assert (saved["metric"], saved["metric_float"], saved["metric_int8"], saved["divergence"]) == ("val/acc", 0.9, 0.5, 0.375)
    assert saved["layers"][0] == {
        "layer": "a", "sqnr_db": None, "only": 0.0, "all_but": 0.5, "metric_only": 0.9, "metric_all_but": 0.5
    }  # fmt: skip
    assert FOUND.table() == [["b", 12.34, 0.25, 0.125, 0.6, 0.8], ["a", None, 0.0, 0.5, 0.9, 0.5]]
    markdown = (tmp_path / "sensitivity.md").read_text()
    assert "| b | 12.3 | 0.25 | 0.125 | 0.6000 | 0.8000 |\n| a | inf | 0 | 0.5 | 0.9000 | 0.5000 |" in markdown
    assert [len(column._cells) for column in FOUND.to_rich().columns] == [2] * len(FOUND.columns())


def test_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    FOUND.plot(tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install \"qat-lightning\[plot\]\""):
        FOUND.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sensitivity.json", "sensitivity.md"}


@pytest.mark.parametrize("flow", FLOWS)
def test_calibrated_qat_has_the_ranges_it_saw(flow):
    net = Chain().eval()
    prepared = calibrated(net, QAT(flow=flow))
    x = torch.cat(inputs(net))
    for module in (prepared, convert(prepared)):
        assert relative_error(net(x), module(x)) < 1e-2


class Twice(nn.Module):
    """One layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(functional.relu(self.a(functional.relu(self.a(x)))))


def test_layer_that_is_called_twice_has_one_row():
    net = Twice()
    found = measure_sensitivity(calibrated(net, StaticPTQ()), inputs(net))
    rows = {row.layer: row for row in found.rows}
    assert [*rows] == ["a", "b"]
    overridden = calibrated(net, StaticPTQ(overrides={"a": None}))
    outputs = [torch.cat([module(x) for x in inputs(net)]) for module in (net, overridden)]
    assert relative_error(*outputs) == pytest.approx(rows["a"].all_but)
