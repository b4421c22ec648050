import logging

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from qat_lightning import (
    QAT,
    CheckpointError,
    ConfigurationError,
    QuantizationCallback,
    StaticPTQ,
    When,
    adopt_checkpoints,
    load_float_weights,
)
from qat_lightning.core import plan_of
from qat_lightning.observers import fake_quants
from tests.nets import QUIET, Images, ModuleNet, Plain, fit
from tests.test_callback import IMAGES, Late, same, snapshot

# What Lightning says when a second Trainer writes into a folder or reads without the first one's callbacks, which is the point here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

FLOWS = pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])

# --- weights from files ------------------------------------------------------------------------------------------------------


class Model(LightningModule):
    def __init__(self, late=False, width=3):
        super().__init__()
        self.width = width
        self.net = None if late else self.build()

    def build(self):
        return nn.Sequential(nn.Linear(2, self.width), nn.BatchNorm1d(self.width))

    def configure_model(self):
        if self.net is None:
            self.net = self.build()


def save(content, folder):
    torch.save(content, folder / "weights.pt")
    return folder / "weights.pt"


@pytest.mark.parametrize(
    "content",
    [
        lambda model: {"state_dict": model.state_dict(), "epoch": 3},
        lambda model: model.state_dict(),
        lambda model: model.net.state_dict(),
        lambda model: {"state_dict": model.net.state_dict()},
        lambda model: {name: value for name, value in model.net.state_dict().items() if "num_batches" not in name},
    ],
    ids=["lightning checkpoint", "module", "bare network", "wrapped bare network", "no batch counters"],
)
@pytest.mark.parametrize("late", [False, True], ids=["built in __init__", "built in configure_model"])
def test_every_kind_of_file(content, late, tmp_path):
    source, model = Model(), Model(late)
    load_float_weights(model, save(content(source), tmp_path))
    torch.testing.assert_close(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: Model(width=4).state_dict(), r"other shapes: net\.0\.weight is \(4, 2\), expected \(3, 2\)"),
        (lambda: {"net.0.weight": torch.zeros(3, 2)}, r"missing: net\.0\.bias"),
        (lambda: {**Model().state_dict(), "net.9.weight": torch.zeros(1)}, r"not in the model: net\.9\.weight"),
        (lambda: {f"other.{i}": torch.zeros(1) for i in range(9)}, "and 4 more"),
        (lambda: {}, "no state dict"),
        (lambda: {"state_dict": None}, "no state dict"),
        (lambda: torch.zeros(3), "no state dict"),
        (lambda: {"net": Model().net}, "weights alone"),
    ],
)
def test_what_does_not_fit_is_named(content, message, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        load_float_weights(Model(), save(content(), tmp_path))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigurationError, match="no file"):
        load_float_weights(Model(), tmp_path / "none.ckpt")


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half an archive"])
def test_broken_file(content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ConfigurationError, match="weights alone"):
        load_float_weights(Model(), tmp_path / "weights.pt")


# --- checkpoints of QAT ------------------------------------------------------------------------------------------------------


class Adopting(Plain):
    def __init__(self, net=None):
        super().__init__(net)
        adopt_checkpoints(self)


class LateAdopting(Late):
    def __init__(self):
        super().__init__()
        adopt_checkpoints(self)


def trained(recipe, folder, module=None, checkpoint=None, **arguments):
    """Return module, callback and Trainer of a fit whose checkpoints lie in ``folder``."""
    callback = QuantizationCallback(recipe, **arguments)
    checkpoint = checkpoint or ModelCheckpoint(folder, filename="best", monitor="val/loss", save_last=True)
    module, trainer = fit(callback, module, watching=[checkpoint], enable_checkpointing=True)
    return module, callback, trainer


def float_run(folder):
    """Return module and checkpoint of a float fit."""
    module, trainer = fit(ModelCheckpoint(folder, filename="float"), enable_checkpointing=True, max_epochs=3)
    return module, trainer.checkpoint_callback.best_model_path


@pytest.mark.sampled(1)
@FLOWS
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole checkpoints", "save_weights_only"])
def test_every_stage_loads_every_checkpoint(flow, weights_only, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss", save_last=True, save_weights_only=weights_only)
    module, _, trainer = trained(QAT(flow=flow), tmp_path, checkpoint=checkpoint)
    after = module.net.eval()(IMAGES)
    for ckpt_path in ("best", "last", tmp_path / "last.ckpt"):
        for stage in (trainer.test, trainer.validate, trainer.predict):
            stage(module, Images(), ckpt_path=ckpt_path, weights_only=True)
    fresh = Plain()
    other = Trainer(callbacks=[QuantizationCallback(QAT(flow=flow))], **QUIET)
    for stage in (other.test, other.validate, other.predict):
        stage(fresh, Images(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(fresh.net.eval()(IMAGES), after)


@pytest.mark.sampled(1)
@FLOWS
@pytest.mark.parametrize(("kind", "taken"), [(Plain, Adopting), (Late, LateAdopting)])
def test_load_from_checkpoint_with_one_line(flow, kind, taken, tmp_path):
    module, _, _ = trained(QAT(flow=flow), tmp_path, kind())
    loaded = taken.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert same(loaded.net.state_dict(), module.net.state_dict())
    assert torch.equal(loaded.net.eval()(IMAGES), module.net.eval()(IMAGES))


@FLOWS
def test_a_loaded_module_does_not_learn_from_what_it_runs(flow, tmp_path):
    """The checkpoint is of the middle of training, when observers were on."""
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trained(QAT(flow=flow, freeze_observers=None), tmp_path, checkpoint=checkpoint)
    loaded = Adopting.load_from_checkpoint(tmp_path / "step=4.ckpt", weights_only=True)
    before = snapshot(loaded)
    for mode in (True, False):
        loaded.net.train(mode)(100 * IMAGES)
    ranges = [name for name in before if name.endswith(("min_val", "scale"))]
    assert len(ranges) > 10 and all(torch.equal(before[name], loaded.state_dict()[name]) for name in ranges)


def test_a_module_that_adopts_reads_float_checkpoints_too(tmp_path):
    module, path = float_run(tmp_path)
    loaded = Adopting.load_from_checkpoint(path, weights_only=True)
    assert type(loaded.net) is ModuleNet and same(loaded.state_dict(), module.state_dict())


@FLOWS
def test_an_adopted_module_is_tested_without_a_callback_and_trained_with_one(flow, tmp_path):
    module, _, _ = trained(QAT(flow=flow), tmp_path)
    loaded = Adopting()
    Trainer(**QUIET).test(loaded, Images(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(loaded.net.eval()(IMAGES), module.net.eval()(IMAGES))
    callback = QuantizationCallback(QAT(flow=flow))
    fit(callback, loaded.train(), max_epochs=1)
    assert callback.report.parity_passed


@FLOWS
def test_a_float_checkpoint_starts_qat_by_either_way(flow, tmp_path, caplog):
    source, path = float_run(tmp_path)
    seed_everything(1)
    by_argument = Plain()
    fit(QuantizationCallback(QAT(flow=flow), init_from=path), by_argument, max_epochs=1)
    seed_everything(1)
    by_path, callback = Plain(), QuantizationCallback(QAT(flow=flow))
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    with caplog.at_level(logging.WARNING):
        trainer.fit(by_path, Images(), ckpt_path=path, weights_only=True)
    assert "of a float run: its weights are taken" in caplog.text
    assert trainer.global_step == 6 and callback.report.parity_passed
    assert same(by_path.state_dict(), by_argument.state_dict())
    assert not torch.equal(by_path.net.fc.weight, source.net.fc.weight)


@FLOWS
def test_float_weights_reach_the_prepared_module_unchanged(flow, tmp_path):
    source, path = float_run(tmp_path)
    module, _ = fit(QuantizationCallback(QAT(flow=flow), init_from=path), Plain(lr=0.0), limit_train_batches=1, max_epochs=1)
    for quant in fake_quants(module):
        quant.disable_fake_quant()
    load_float_weights(source, path)
    module.load_state_dict(source.state_dict())
    torch.testing.assert_close(module.net.eval()(IMAGES), source.net.eval()(IMAGES))


@FLOWS
def test_nobody_is_locked_in(flow, tmp_path, caplog):
    module, _, _ = trained(QAT(flow=flow), tmp_path)
    back = Plain()
    with caplog.at_level(logging.INFO, logger="qat_lightning"):
        load_float_weights(back, tmp_path / "last.ckpt")
    assert "fake-quant dropped, BatchNorm unfused" in caplog.text
    for quant in fake_quants(module):
        quant.disable_fake_quant()
    assert type(back.net) is ModuleNet
    torch.testing.assert_close(back.net.eval()(IMAGES), module.net.eval()(IMAGES))
    other = QuantizationCallback(QAT(flow="eager" if flow == "fx" else "fx"), init_from=tmp_path / "last.ckpt")
    fit(other, max_epochs=1)
    assert other.report.parity_passed


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (QAT(flow="eager"), {}, r"written by recipe 'qat', flow 'fx', backend 'x86', but 'net' is prepared by recipe 'qat', flow 'eager'"),
        (StaticPTQ(), {}, r"written by recipe 'qat', flow 'fx', backend 'x86' for 'net', which recipe 'ptq' here leaves in float"),
        ("dynamic", {}, "recipe 'dynamic' here leaves in float"),
        (QAT(overrides={"fc": None}), {}, "'fc' has 8-bit inputs and 8-bit weights per channel there and stays float here"),
        (QAT(activation_bits=7), {}, "'conv1' has 8-bit inputs and 8-bit weights per channel there and has 7-bit inputs"),
        (QAT(), {"modules": ["net.conv1"]}, "for 'net'"),
    ],
)
def test_the_recipe_that_wrote_a_checkpoint_is_named(recipe, arguments, message, tmp_path):
    trained(QAT(), tmp_path)
    trainer = Trainer(max_epochs=4, callbacks=[QuantizationCallback(recipe, **arguments)], **QUIET)
    with pytest.raises(CheckpointError, match=message):
        trainer.fit(Plain(), Images(), ckpt_path=tmp_path / "last.ckpt")


def test_another_backend_takes_the_checkpoint_over(tmp_path):
    trained(QAT(), tmp_path)
    callback = QuantizationCallback(QAT(backend="qnnpack"))
    Trainer(max_epochs=3, callbacks=[callback], **QUIET).fit(Plain(), Images(), ckpt_path=tmp_path / "last.ckpt")
    assert {layer.engine for layer in callback.report.layers} == {"qnnpack"} and callback.report.parity_passed


def test_a_plan_that_is_none_is_refused(tmp_path):
    trained(QAT(), tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["state_dict"]["net.quantization_plan"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="no plan that this version reads"):
        Adopting.load_from_checkpoint(tmp_path / "last.ckpt")


# --- best or last ------------------------------------------------------------------------------------------------------------


class Worsening(Plain):
    """Its validation loss is best after the second of three epochs."""

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])
        self.log("val/loss", float((self.current_epoch - 1) ** 2))


def convert(recipe, folder, choice, monitor="val/loss", **arguments):
    module, callback = Worsening(), QuantizationCallback(recipe, convert=choice)
    checkpoint = ModelCheckpoint(folder, filename="{epoch}", monitor=monitor, save_top_k=1 if monitor else -1)
    fit(callback, module, watching=[checkpoint], enable_checkpointing=True, max_epochs=3, num_sanity_val_steps=0, **arguments)
    return module, callback


@pytest.mark.sampled
@pytest.mark.parametrize(
    "recipe",
    [QAT(freeze_observers=None), QAT(flow="eager", freeze_observers=None), StaticPTQ(calibration_batches=2)],
    ids=["fx", "eager", "ptq"],
)
@pytest.mark.parametrize(
    ("choice", "monitor", "checkpoint"),
    [("best", "val/loss", "epoch=1.ckpt"), (None, "val/loss", "epoch=1.ckpt"), ("last", "val/loss", None), (None, None, None)],
)
def test_which_weights_become_int8(recipe, choice, monitor, checkpoint, tmp_path):
    module, callback = convert(recipe, tmp_path, choice, monitor)
    state = module.state_dict() if checkpoint is None else torch.load(tmp_path / checkpoint, weights_only=True)["state_dict"]
    assert callback.report.checkpoint == checkpoint
    assert callback.converted_checkpoint == (None if checkpoint is None else tmp_path / checkpoint)
    weight = dict(callback.quantized_module.net.named_modules())["fc"].weight().dequantize()
    half_steps = state["net.fc.weight"].abs().amax(1) / 127 / 2
    assert ((weight - state["net.fc.weight"]).abs().amax(1) <= 1.001 * half_steps).all()
    assert callback.report.parity_passed


def test_without_a_model_checkpoint_the_last_weights_are_converted():
    callback = QuantizationCallback("qat")
    fit(callback, max_epochs=1)
    assert callback.report.checkpoint is None


def test_best_needs_a_model_checkpoint():
    with pytest.raises(ConfigurationError, match="the Trainer writes none"):
        fit(QuantizationCallback("qat", convert="best"))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("choice", ["best", None])
def test_a_checkpoint_from_before_fake_quant_is_not_converted(choice, tmp_path, caplog):
    _, callback = convert(QAT(start=When(epoch=2)), tmp_path, choice)
    assert callback.report.checkpoint is None
    assert "was written before fake-quant began" in caplog.text


def test_a_best_checkpoint_that_is_gone_costs_nothing(tmp_path, caplog):
    class Losing(ModelCheckpoint):
        def on_train_end(self, trainer, pl_module):
            (tmp_path / "best.ckpt").unlink()

    _, callback, _ = trained(QAT(), tmp_path, checkpoint=Losing(tmp_path, filename="best", monitor="val/loss"))
    assert callback.report.checkpoint is None
    assert "the final weights are" in caplog.text


def test_adopting_changes_nothing_by_itself():
    assert plan_of(Adopting().net) is None


def test_the_home_folder_has_a_short_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = Plain()
    torch.save(source.state_dict(), tmp_path / "float.pt")
    module = Plain()
    load_float_weights(module, "~/float.pt")
    assert torch.equal(module.net.fc.weight, source.net.fc.weight)
