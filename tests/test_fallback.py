import logging

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qat_lightning import (
    QAT,
    ConfigurationError,
    DynamicPTQ,
    QuantizationCallback,
    QuantizationError,
    StaticPTQ,
    calibrate,
    convert,
    load_quantized,
    prepare,
    quantize_within,
    refine,
    save_quantized,
)
from qat_lightning.report import Fallback
from tests.evaluation.test_sensitivity import fragile_chain, inputs
from tests.nets import QUIET, Images, ModuleNet, Plain

BOUND = 0.1


def fragile_net():
    """Four balanced classes in float, and a layer `b` whose int8 weights are zero but for a useless one."""
    net = fragile_chain()
    with torch.no_grad():
        logits = net(torch.cat(inputs(net, 20)))
        net.c.weight /= logits.std(0)[:, None]
        net.c.bias.copy_((net.c.bias - logits.mean(0)) / logits.std(0))
    return net


class Fragile(Plain):
    """A LightningModule whose labels are what its network says in float; `logs` names its validation metric."""

    def __init__(self, logs="val/acc"):
        super().__init__(fragile_net())
        self.logs = logs

    def validation_step(self, batch, batch_idx):
        self.accuracy(self.net(batch[0]), batch[1])
        if self.logs:
            self.log(self.logs, self.accuracy)

    def loader(self):
        x = torch.cat(inputs(self.net, 20))
        return DataLoader(TensorDataset(x, fragile_net()(x).argmax(1)), batch_size=32)

    train_dataloader = val_dataloader = test_dataloader = loader


def quantized(recipe, module=None, **arguments):
    """Quantize at once; returns the callback, the float module and its Trainer."""
    callback, module = QuantizationCallback(recipe, **arguments), Fragile() if module is None else module
    trainer = Trainer(max_epochs=0, callbacks=[callback], **QUIET)
    trainer.fit(module)
    return callback, module, trainer


@pytest.fixture(scope="module")
def static():
    """One callback, module and Trainer for the tests that only look at them."""
    return quantized(StaticPTQ(max_accuracy_drop=BOUND))


@pytest.mark.parametrize(
    "recipe", [None, StaticPTQ(max_accuracy_drop=BOUND, flow="eager"), DynamicPTQ(max_accuracy_drop=BOUND)], ids=["fx", "eager", "dynamic"]
)
def test_fragile_layer_stays_in_float(recipe, static, tmp_path):
    callback, module, _ = static if recipe is None else quantized(recipe)
    found = callback.report.fallback
    assert (found.kept, found.met, found.metric, found.layers) == (("net.b",), True, "val/acc", 3)
    assert found.float32 == 1.0
    assert found.all_int8 < 1 - BOUND <= found.int8
    assert found.added_ms is not None
    assert [layer.layer for layer in callback.report.layers] == ["net.a", "net.c"]
    # What was judged is what is delivered, and what an artifact brings back.
    cpu = Trainer(**QUIET)
    (metrics,) = cpu.validate(callback.quantized_module, verbose=False)
    assert metrics["val/acc"] == found.int8
    save_quantized(callback.quantized_module, tmp_path, callback.report)
    loaded, x = load_quantized(tmp_path, Fragile()), inputs(module.net)[0]
    assert torch.equal(loaded.net(x), callback.quantized_module.net(x))


def test_no_layer_stays_in_float_where_int8_is_good_enough(caplog):
    callback, _, _ = quantized(StaticPTQ(max_accuracy_drop=1))
    found = callback.report.fallback
    assert (found.kept, found.met, found.trials, found.added_bytes) == ((), True, 1, 0)
    assert callback.report.quantized_modules == 3
    assert "- kept in float: none, val/acc 1.0000 in float" in callback.report.to_markdown()


def test_report_says_what_and_why(static):
    callback, _, trainer = static
    report = callback.report
    assert report.fallback.added_bytes > 0
    assert "- kept in float: net.b; val/acc 1.0000 in float" in report.to_markdown()
    assert "max_accuracy_drop=0.1 is met" in report.to_markdown()
    assert Fallback(**{**report.to_dict()["fallback"]}) == report.fallback
    # The Trainer of the fit knows nothing of the trials.
    assert trainer.state.fn == "fit" and "val/acc" not in trainer.callback_metrics


def test_without_a_metric_outputs_are_compared(caplog):
    callback, _, _ = quantized(StaticPTQ(max_accuracy_drop=BOUND), Fragile(logs=None))
    found = callback.report.fallback
    assert (found.metric, found.kept, found.met, found.float32) == ("agreement of outputs", ("net.b",), True, 1.0)
    assert found.all_int8 < 1 - BOUND


@pytest.mark.parametrize(("wanted", "used"), [("val/score", "val/score"), ("val/f1", "agreement of outputs")])
def test_metric_by_name(wanted, used, caplog):
    callback, _, _ = quantized(StaticPTQ(max_accuracy_drop=BOUND), Fragile(logs="val/score"), metric=wanted)
    assert callback.report.fallback.metric == used
    assert ("The validation logs no 'val/f1', only ['val/score']" in caplog.text) == (wanted == "val/f1")


def test_conversion_on_request_keeps_the_same_layers(static):
    callback, module, _ = static
    first = callback.report.fallback
    callback.convert(module)
    assert (callback.report.fallback.kept, callback.report.fallback.int8) == (first.kept, first.int8)


# --- without a Trainer -------------------------------------------------------------------------------------------------------


def agreement(net, data):
    labels = net(data).argmax(1)
    return lambda module: float((module(data).argmax(1) == labels).float().mean())


@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_function_on_modules(flow):
    net = fragile_net()
    score = agreement(net, torch.cat(inputs(net, 20)))
    int8, found = quantize_within(net, StaticPTQ(flow=flow, max_accuracy_drop=BOUND), inputs(net), score, "top-1")
    assert (found.kept, found.metric, found.int8) == (("b",), "top-1", score(int8))
    calibrated = calibrate(prepare(net, StaticPTQ(flow=flow, overrides={"b": None})), inputs(net))
    by_hand = convert(refine(calibrated, inputs(net)))
    assert torch.equal(int8(inputs(net)[0]), by_hand(inputs(net)[0]))


def test_impossible_bound_gives_the_best_that_was_found(caplog):
    net = fragile_net()
    score = agreement(net, torch.cat(inputs(net, 20)))

    def strict(module):
        return 2.0 if type(module) is type(net) else score(module)

    int8, found = quantize_within(net, StaticPTQ(max_accuracy_drop=0.0), inputs(net), strict)
    assert (found.met, found.float32, found.int8) == (False, 2.0, score(int8))
    assert "b" in found.kept and found.int8 > found.all_int8
    assert any(record.levelno == logging.WARNING and "NOT MET" in record.message for record in caplog.records)


def test_a_module_that_is_one_layer():
    _, found = quantize_within(nn.Linear(8, 4), StaticPTQ(max_accuracy_drop=0.0), inputs(nn.Linear(8, 4)), lambda module: 0.0)
    assert (found.kept, found.met, found.layers) == ((), True, 1)


def test_batch_norm_stays_in_float_with_its_convolution():
    net = ModuleNet().eval()
    int8 = convert(calibrate(prepare(net, StaticPTQ(flow="eager", overrides={"conv1": None, "conv2": None})), inputs(net)))
    assert not any("BatchNorm" in type(child).__name__ and type(child).__module__.startswith("torch.ao") for child in int8.modules())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StaticPTQ(max_accuracy_drop=-0.1), ValueError, r"`max_accuracy_drop`.*\[0, 1\].*-0\.1"),
        (lambda: DynamicPTQ(max_accuracy_drop=5), ValueError, r"a fraction such as 0\.005, but got 5"),
        (lambda: StaticPTQ(max_accuracy_drop=True), TypeError, "`max_accuracy_drop`.*True"),
        (lambda: QuantizationCallback("ptq", metric=1), TypeError, "`metric`.*1"),
        (lambda: quantize_within(nn.Linear(2, 2), StaticPTQ(), [], len), ConfigurationError, "max_accuracy_drop, such as"),
        (lambda: quantize_within(nn.Linear(2, 2), QAT(), [], len), ConfigurationError, "StaticPTQ or DynamicPTQ"),
    ],
)
def test_wrong_values(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_several_processes_are_refused():
    trainer = Trainer(**QUIET, devices=2, strategy="ddp")
    with pytest.raises(ConfigurationError, match=r"one process, but this Trainer uses 2.*max_epochs=0"):
        QuantizationCallback(StaticPTQ(max_accuracy_drop=BOUND)).setup(trainer, Fragile(), "fit")


# --- sensitivity of a LightningModule ----------------------------------------------------------------------------------------


def test_sensitivity_of_a_module_after_its_fit(static):
    callback, module, _ = static
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = callback.measure_sensitivity(module)
    assert (found.metric, found.metric_float, found.ranked()[0].layer) == ("val/acc", 1.0, "net.b")
    assert found.metric_int8 < 1 - BOUND <= found.ranked()[0].metric_all_but
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert callback.measure_sensitivity(module, use_metric=False).metric is None


def test_sensitivity_of_quantization_aware_training():
    callback, module = QuantizationCallback(QAT()), Plain()
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(module, Images())
    found = callback.measure_sensitivity(module)
    assert {row.layer for row in found.rows} == {"net.conv1", "net.conv2", "net.hidden", "net.fc"}
    assert found.metric is None and 0 < found.divergence < 0.5


def test_sensitivity_is_refused_where_nothing_is_simulated():
    callback, module, _ = quantized(DynamicPTQ())
    with pytest.raises(ConfigurationError, match="use StaticPTQ or QAT"):
        callback.measure_sensitivity(module)
    with pytest.raises(QuantizationError, match=r"give measure_sensitivity\(\) the module that was fitted"):
        callback.measure_sensitivity(callback.quantized_module)
