"""Calibrated ranges and corrected biases when fake-quant begins."""

import copy
import itertools

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from qat_lightning import QAT, CalibrationError, QuantizationCallback, StaticPTQ, When
from qat_lightning.observers import fake_quants, measure_weights
from tests.nets import QUIET, Images, ModuleNet, Plain, fit
from tests.test_callback import IMAGES, LABELLED

FLOWS = pytest.mark.parametrize("flow", ["fx", "eager"])
FIXED = {"freeze_observers": When(epoch=0), "freeze_bn": When(epoch=0)}


def untrained_net():
    net = ModuleNet()
    net.drop.p = 0.0
    return net


def trained_net():
    seed_everything(2)
    return fit(Callback(), Plain(untrained_net()), max_epochs=2)[0].net


def layers(callback):
    return {layer.layer: (layer.scale, layer.zero_point) for layer in callback.report.layers}


class Counting(QuantizationCallback):
    """Keeps the optimizer step at which each batch is calibrated with, those of the report left out."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.steps, self.over = [], False

    def on_train_end(self, trainer, pl_module):
        super().on_train_end(trainer, pl_module)
        self.over = True

    def calibration_step(self, module, batch):
        if not self.over:
            self.steps.append(module.trainer.global_step)
        super().calibration_step(module, batch)


class Still(Images):
    """The same batches in the same order, for calibration and for training."""

    def train_dataloader(self):
        return self.val_dataloader()


@FLOWS
@pytest.mark.parametrize("observer", ["histogram", "minmax"])
def test_qat_begins_with_the_ranges_of_ptq(flow, observer):
    net = trained_net()
    ptq = QuantizationCallback(StaticPTQ(flow=flow, observer=observer, calibration_batches=3))
    fit(ptq, Plain(net), Still(), max_epochs=0)
    qat = QuantizationCallback(QAT(flow=flow, observer=observer, calibration_batches=3, **FIXED))
    fit(qat, Plain(net, lr=0.0), Still(), max_epochs=1)
    assert layers(qat).keys() == layers(ptq).keys() and len(layers(qat)) == 4
    for name, (scale, zero_point) in layers(ptq).items():
        assert layers(qat)[name] == (pytest.approx(scale, rel=1e-3), zero_point)


@FLOWS
def test_nothing_but_ranges_changes(flow):
    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.state = getattr(self, "state", None) or {name: value.clone() for name, value in pl_module.named_parameters()}
            self.norms = [layer.running_mean.clone() for layer in pl_module.modules() if isinstance(layer, nn.BatchNorm2d)]
            self.random = torch.get_rng_state()

    kept = []
    for batches in (0, 3):
        seed_everything(1)
        watch = Keep()
        fit(QuantizationCallback(QAT(flow=flow, calibration_batches=batches)), watching=[watch], max_epochs=1, limit_train_batches=1)
        kept.append(watch)
    without, calibrated = kept
    assert without.norms and all(map(torch.equal, without.norms, calibrated.norms))
    assert all(torch.equal(value, calibrated.state[name]) for name, value in without.state.items())
    assert torch.equal(without.random, calibrated.random)


def deep_net():
    """Return an untrained net whose activations vanish, unless BatchNorm normalises them."""
    torch.manual_seed(0)
    channels = [1, 8, 8, 8, 8, 8, 8]
    blocks = [
        nn.Sequential(nn.Conv2d(one, two, 3, padding=1, bias=False), nn.BatchNorm2d(two), nn.ReLU6())
        for one, two in itertools.pairwise(channels)
    ]
    for block in blocks:
        block[0].weight.data.mul_(0.05)
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@FLOWS
def test_an_untrained_net_gets_the_ranges_it_trains_with(flow):
    found = []
    for batches in (0, 3):
        seed_everything(1)
        callback = QuantizationCallback(QAT(flow=flow, calibration_batches=batches, observer="minmax"))
        module, _ = fit(callback, Plain(deep_net(), lr=0.0), max_epochs=1, limit_train_batches=3)
        found.append([float(quant.scale) for quant in fake_quants(module) if hasattr(quant, "take_range")])
    from_first_batch, calibrated = found
    assert len(calibrated) >= 8
    assert all(one == pytest.approx(two, rel=0.25) for one, two in zip(from_first_batch, calibrated, strict=True))


class WithNormedFeatures(ModuleNet):
    def __init__(self):
        super().__init__()
        self.relu2 = nn.Sequential(nn.BatchNorm1d(16), nn.ReLU())


@FLOWS
def test_single_values_are_refused_where_batch_norm_learns(flow):
    images = Images().images
    one_by_one = [(images[:1], torch.zeros(1, dtype=torch.long))] * 3
    with pytest.raises(CalibrationError, match=r"single value per channel for a BatchNorm that learns.*freeze_bn"):
        fit(QuantizationCallback(QAT(flow=flow), calibration_data=one_by_one), Plain(WithNormedFeatures()), max_epochs=1)
    callback = QuantizationCallback(QAT(flow=flow, freeze_bn=When(epoch=0)), calibration_data=one_by_one)
    fit(callback, Plain(WithNormedFeatures()), max_epochs=1)
    assert callback.report.parity_passed


def mean_errors(flow, **options):
    """Return by how much the mean of each output moves when fake-quant begins, and the callback after a fit that learns nothing."""
    net = trained_net()
    images = Still().images
    expected = copy.deepcopy(net).eval()(images)
    callback = QuantizationCallback(QAT(flow=flow, per_channel=False, activation_bits=7, **{**FIXED, **options}))
    module, _ = fit(callback, Plain(net, lr=0.0), Still(), max_epochs=1)
    with torch.no_grad():
        return (module.net.eval()(images) - expected).mean(0).abs(), callback


@FLOWS
def test_biases_are_corrected_where_batch_norm_is_frozen(flow):
    without, _ = mean_errors(flow, bias_correction=False)
    corrected, callback = mean_errors(flow)
    assert corrected.mean() < 0.5 * without.mean()
    assert callback.report.parity_passed


@FLOWS
def test_biases_are_left_alone_without_calibration(flow):
    without, _ = mean_errors(flow, bias_correction=False, calibration_batches=0, freeze_observers=None)
    same, _ = mean_errors(flow, calibration_batches=0, freeze_observers=None)
    assert torch.equal(without, same)


@FLOWS
def test_the_teacher_keeps_its_biases(flow):
    net = trained_net()
    before = copy.deepcopy(dict(net.named_parameters()))
    callback = QuantizationCallback(QAT(flow=flow, distillation=1.0, activation_bits=7, **FIXED))
    fit(callback, Plain(net, lr=0.0), Still(), max_epochs=1)
    teacher = callback.state_dict()["teachers"]["net"]
    assert len(before) == 10 and all(torch.equal(value, teacher[name]) for name, value in before.items())


@pytest.mark.sampled
@FLOWS
@pytest.mark.parametrize(("start", "steps"), [(None, {0}), (When(step=7), {7}), (When(epoch=1), {6})])
def test_calibration_comes_when_fake_quant_begins(flow, start, steps):
    callback = Counting(QAT(flow=flow, start=start, calibration_batches=4))
    fit(callback, max_epochs=3)
    assert set(callback.steps) == steps and len(callback.steps) == 4


def test_a_resumed_run_and_a_second_fit_calibrate_no_more(tmp_path):
    first = Counting("qat")
    module, trainer = fit(first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Counting("qat")
    Trainer(max_epochs=2, callbacks=[resumed], **QUIET).fit(Plain(), Images(), ckpt_path=tmp_path / "one.ckpt")
    again = Counting("qat")
    Trainer(max_epochs=1, callbacks=[again], **QUIET).fit(module, Images())
    assert first.steps and not resumed.steps and not again.steps


class Grow(Callback):
    """Changes the weights after they were prepared."""

    def on_fit_start(self, trainer, pl_module):
        for layer in pl_module.modules():
            if hasattr(layer, "weight_fake_quant"):
                layer.weight.data *= 3


@FLOWS
def test_weights_that_are_set_after_setup_have_their_own_scales(flow):
    module, _ = fit(QuantizationCallback(QAT(flow=flow, **FIXED)), Plain(lr=0.0), Still(), [Grow()], max_epochs=1)
    before = {name: quant.scale.clone() for name, quant in module.named_modules() if hasattr(quant, "measure")}
    measure_weights(module)
    assert len(before) == 4
    for name, scale in before.items():
        torch.testing.assert_close(scale, module.get_submodule(name).scale)


class Once(Images):
    def train_dataloader(self):
        return iter(super().train_dataloader())


class Persistent(Images):
    def train_dataloader(self):
        return self.loader(num_workers=1, persistent_workers=True, shuffle=True)


class Several(Images):
    def train_dataloader(self):
        return {"one": super().train_dataloader(), "two": super().train_dataloader()}


class First(Plain):
    """Trains and validates on the first of several loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["one"], batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch["one"] if isinstance(batch, dict) else batch, batch_idx)


def test_batches_that_can_be_read_once_are_kept_for_training(caplog):
    callback = Counting("qat")
    _, trainer = fit(callback, data=Once(), max_epochs=1)
    assert not callback.steps and trainer.global_step == 6
    assert "can be read once only" in caplog.text


def test_ranges_are_not_frozen_before_any_data():
    with pytest.raises(CalibrationError, match=r"freeze_observers=When\(epoch=0\).*read once only: give `calibration_data`"):
        fit(QuantizationCallback(QAT(freeze_observers=When(epoch=0))), data=Once(), max_epochs=1)
    callback = QuantizationCallback(QAT(freeze_observers=When(epoch=0)), calibration_data=[LABELLED])
    fit(callback, data=Once(), max_epochs=1)
    assert callback.report.parity_passed


@pytest.mark.sampled(1)
@pytest.mark.filterwarnings("ignore:.*num_workers")
@pytest.mark.parametrize(("data", "module"), [(Persistent, Plain), (Several, First)])
def test_the_training_keeps_its_place(data, module):
    callback = Counting(QAT(calibration_batches=4, start=When(step=2)))
    _, trainer = fit(callback, module(), data(), max_epochs=2)
    assert callback.steps == [2] * 4 and trainer.global_step == 12


def test_no_calibration():
    callback = Counting(QAT(calibration_batches=0))
    fit(callback, max_epochs=1)
    assert not callback.steps and callback.report.parity_passed


def test_what_a_calibration_batch_never_reaches_learns_in_training():
    class Auxiliary(ModuleNet):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(4, 4)

        def forward(self, x):
            out = super().forward(x)
            return self.other(out) if self.training else out

    module = Plain(Auxiliary())
    module.net.other.weight.data.copy_(torch.eye(4))
    fit(QuantizationCallback(QAT(flow="eager", overrides={"other": None})), module, max_epochs=1)
    assert all(quant.scale.isfinite().all() for quant in fake_quants(module) if hasattr(quant, "scale"))


def test_seven_bits_stay_in_parity():
    callback = QuantizationCallback(QAT(flow="eager", activation_bits=7))
    fit(callback, max_epochs=1)
    assert callback.report.max_steps <= 1


def test_nan_before_training_is_named():
    module = Plain()
    module.net.conv2.weight.data[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"net: the observer .* NaN or infinite activations before training"):
        fit(QuantizationCallback("qat"), module, max_epochs=1)


def test_outputs_are_those_of_the_float_net_up_to_rounding():
    net = trained_net()
    expected = net.eval()(IMAGES).detach()
    module = Plain(net.train(), lr=0.0)
    callback = QuantizationCallback(QAT(**FIXED))
    fit(callback, module, max_epochs=1)
    torch.testing.assert_close(callback.quantized_module.net(IMAGES), expected, atol=0.1 * float(expected.abs().max()), rtol=0)


class Streamed(Images):
    """Batches of unknown number."""

    def train_dataloader(self):
        class Stream(IterableDataset):
            def __iter__(stream):
                return iter(zip(self.images, self.labels, strict=True))

        return DataLoader(Stream(), batch_size=16)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("trainer", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 8}], ids=str)
def test_data_without_a_length(trainer):
    callback = QuantizationCallback(QAT())
    fit(callback, data=Streamed(), **trainer)
    assert callback.report.parity_passed


def test_an_iterator_of_calibration_data_serves_beginning_and_end():
    batches = ((Images().images[:8], Images().labels[:8]) for _ in itertools.count())
    callback = QuantizationCallback(QAT(calibration_batches=3), calibration_data=batches)
    fit(callback)
    assert callback.report.parity_passed
