"""Quantization together with what else a Trainer does: every row of the table trains, freezes on schedule, converts and trains on."""

import copy
import signal
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import nn

from qat_lightning import (
    QAT,
    CalibrationError,
    ConfigurationError,
    QuantizationCallback,
    QuantizationError,
    StaticPTQ,
    When,
    load_quantized,
    save_quantized,
)
from qat_lightning.core import plan_of
from qat_lightning.observers import fake_quants
from tests.nets import QUIET, Images, Plain, fit
from tests.test_callback import IMAGES, TwoOptimizers, Watch, same

FLOWS = pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
# What Lightning says of settings that are the point here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log.*barebones"),
]


def snapshot(module):
    return copy.deepcopy(module.state_dict())


class Learning(Callback):
    """Notes the stages in which ranges of activations have moved; attach it after the quantization."""

    def __init__(self):
        self.before, self.stages = None, set()

    def look(self, trainer, pl_module, *args):
        now = {name: tensor.clone() for name, tensor in pl_module.state_dict().items() if name.endswith(("min_val", "max_val"))}
        if self.before is not None and not same(self.before, now):
            self.stages.add(str(trainer.state.stage))
        self.before = now

    on_fit_start = on_train_batch_start = on_train_batch_end = on_validation_start = on_validation_batch_end = on_validation_end = look
    on_sanity_check_start = on_sanity_check_end = on_train_end = look


class Example(Plain):
    """With an input far outside of the training data, which ModelSummary runs."""

    def __init__(self):
        super().__init__()
        self.example_input_array = 1000 * torch.ones(1, 1, 8, 8)

    def forward(self, x):
        return self.net(x)


class Clipped(Plain):
    """Manual optimization that clips and accumulates by itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx) / 2)
        if batch_idx % 2:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()


class Judged(TwoOptimizers):
    """Both networks run in validation, which is what calibrates."""

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.critic(self.net(batch[0])).mean())


@dataclass
class Row:
    """What a Trainer is given, and what comes of it: training batches in all, and the first with frozen BatchNorm and observers."""

    batches: int
    bn: int
    observers: int
    trainer: dict[str, Any] = field(default_factory=dict)
    module: type = Plain
    recipe: dict[str, Any] = field(default_factory=lambda: {"freeze_bn": When(fraction=0.5), "freeze_observers": When(fraction=0.75)})
    callbacks: Any = lambda folder: []


STEPS = {"freeze_bn": When(step=2), "freeze_observers": When(step=4)}
NEVER = 100
TABLE = {
    "plain": Row(12, 6, 9),
    "fast_dev_run": Row(1, NEVER, NEVER, {"fast_dev_run": True}),
    "fast_dev_run of three": Row(3, 2, NEVER, {"fast_dev_run": 3}, recipe=STEPS),
    "overfit_batches": Row(4, 2, 3, {"overfit_batches": 2}),
    "overfit_batches, a fraction": Row(6, 3, 5, {"overfit_batches": 0.5}),
    "limit_train_batches": Row(4, 2, 3, {"limit_train_batches": 2}),
    "limit_train_batches, a fraction": Row(6, 3, 5, {"limit_train_batches": 0.5}),
    "limit_val_batches": Row(12, 6, 9, {"limit_val_batches": 1, "num_sanity_val_steps": 1}),
    "limit_val_batches, a fraction": Row(12, 6, 9, {"limit_val_batches": 0.5}),
    "no validation": Row(12, 6, 9, {"limit_val_batches": 0}),
    "val_check_interval": Row(12, 6, 9, {"val_check_interval": 0.5}),
    "val_check_interval in batches": Row(12, 6, 9, {"val_check_interval": 4, "check_val_every_n_epoch": None}),
    "max_steps": Row(8, 4, 6, {"max_epochs": -1, "max_steps": 8}),
    "gradient_clip_val": Row(12, 6, 9, {"gradient_clip_val": 0.1}),
    "gradient_clip_algorithm": Row(12, 2, 4, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, recipe=STEPS),
    "accumulate_grad_batches": Row(12, 4, 8, {"accumulate_grad_batches": 2}, recipe=STEPS),
    "accumulate_grad_batches, an uneven rest": Row(12, 6, 12, {"accumulate_grad_batches": 4}, recipe=STEPS | {"freeze_observers": None}),
    "accumulation and clipping": Row(12, 6, 9, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    "two optimizers, by hand": Row(12, 1, 2, module=TwoOptimizers, recipe=STEPS),
    "two optimizers, a fraction": Row(12, 6, 9, module=TwoOptimizers),
    "clipping and accumulation by hand": Row(12, 4, 8, module=Clipped, recipe=STEPS),
    "ModelSummary of an example": Row(
        12, 6, 9, {"enable_model_summary": True}, Example, callbacks=lambda folder: [ModelSummary(max_depth=-1)]
    ),
    "EarlyStopping before a freeze": Row(
        6, NEVER, NEVER, callbacks=lambda folder: [EarlyStopping("val/loss", stopping_threshold=1e9, check_finite=False)]
    ),
    "EarlyStopping after a freeze": Row(
        6, 2, 4, recipe=STEPS, callbacks=lambda folder: [EarlyStopping("val/loss", stopping_threshold=1e9, check_finite=False)]
    ),
    "ModelCheckpoint every n steps": Row(
        12,
        6,
        9,
        {"enable_checkpointing": True},
        callbacks=lambda folder: [ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)],
    ),
    "ModelCheckpoint, monitored within the epoch": Row(
        12,
        6,
        9,
        {"enable_checkpointing": True, "val_check_interval": 0.5},
        callbacks=lambda folder: [ModelCheckpoint(folder, monitor="val/loss", save_last=True)],
    ),
    "RichProgressBar": Row(12, 6, 9, {"enable_progress_bar": True}, callbacks=lambda folder: [RichProgressBar()]),
    "LearningRateMonitor": Row(
        12, 6, 9, {"logger": CSVLogger, "log_every_n_steps": 1}, callbacks=lambda folder: [LearningRateMonitor("step")]
    ),
    "LearningRateFinder": Row(24, 12, 18, {"max_epochs": 4}, callbacks=lambda folder: [LearningRateFinder(num_training_steps=20)]),
    "BatchSizeFinder": Row(24, 12, 18, {}, callbacks=lambda folder: [BatchSizeFinder(init_val=8, max_trials=1, steps_per_trial=2)]),
    "reload_dataloaders_every_n_epochs": Row(12, 6, 9, {"reload_dataloaders_every_n_epochs": 1}),
    "detect_anomaly": Row(12, 6, 9, {"detect_anomaly": True}),
    "barebones": Row(12, 6, 9, {"barebones": True}),
}


@pytest.mark.sampled(8)
@FLOWS
@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_combination(row, flow, tmp_path):
    seed_everything(0)
    callback, watch, learning = QuantizationCallback(QAT(flow=flow, **row.recipe), parity="error"), Watch(), Learning()
    arguments = dict(row.trainer, default_root_dir=tmp_path)
    if flow == "pt2e" and row.module is TwoOptimizers:
        with pytest.raises(ConfigurationError, match=r"exports 'critic', .* `calibration_step` does not call it"):
            fit(callback, row.module(), **arguments)
        return
    if "logger" in arguments:
        arguments["logger"] = arguments["logger"](tmp_path)
    module, _ = fit(callback, row.module(), watching=[watch, learning, *row.callbacks(tmp_path)], **arguments)
    assert watch.bn_frozen == [{index >= row.bn} for index in range(row.batches)]
    assert watch.observers == [{index < row.observers} for index in range(row.batches)]
    assert learning.stages == {"RunningStage.TRAINING"}
    assert close(callback.quantized_module, module)
    trains(module)


def close(int8, module):
    """Whether an int8 module computes what the trained one does, by little."""
    with torch.no_grad():
        expected = module.net.eval()(IMAGES)
    module.train()
    return (int8.net(IMAGES) - expected).abs().max() < 0.1 * expected.abs().max()


def trains(module):
    """Check that a plain step of SGD, no Trainer, learns weights and BatchNorm statistics."""
    before = snapshot(module.net)
    module.net(IMAGES).square().sum().backward()
    torch.optim.SGD(module.net.parameters(), lr=0.01).step()
    after = module.net.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any(name.endswith("conv1.weight") for name in moved) and any(name.endswith("running_mean") for name in moved)
    assert not any(name.endswith(("min_val", "max_val")) for name in moved)
    module.zero_grad()


# --- the Tuner ---------------------------------------------------------------------------------------------------------------


def find_rate(tuner, module, data):
    tuner.lr_find(module, data, num_training=20)


def scale_batch(tuner, module, data):
    tuner.scale_batch_size(module, datamodule=data, init_val=4, max_trials=2, steps_per_trial=2)


@pytest.mark.sampled
@FLOWS
@pytest.mark.parametrize("tune", [find_rate, scale_batch])
@pytest.mark.parametrize("fitted", [False, True], ids=["fresh", "after a fit"])
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_tuner_leaves_weights_and_ranges_as_they_were(tune, flow, fitted, tmp_path):
    callback, module, data = QuantizationCallback(QAT(flow=flow), parity="error"), Plain(), Images()
    if fitted:
        fit(callback, module, max_epochs=1)
    before = snapshot(module)
    weights = [parameter.detach().clone() for parameter in module.parameters()]
    watch = Watch()
    trainer = Trainer(**{**QUIET, "default_root_dir": tmp_path, "max_epochs": 4, "callbacks": [callback, watch]})
    tune(Tuner(trainer), module, data)
    assert (module.lr != 0.02) == (tune is find_rate) and (data.batch_size != 16) == (tune is scale_batch)
    assert all(torch.equal(old, new) for old, new in zip(weights, module.parameters(), strict=True))
    if fitted:
        assert same(before, module.state_dict())
    else:  # prepared by now, and nothing learnt
        assert all(torch.isinf(tensor).all() for name, tensor in module.state_dict().items() if name.endswith("post_process.min_val"))
    trainer.fit(module, data)
    assert watch.observers[0] == watch.fake_quant[0] == {True} and watch.observers[-1] == {False} and watch.bn_frozen[-1] == {True}
    assert close(callback.quantized_module, module)


# --- one after the other -----------------------------------------------------------------------------------------------------


def fitted_again(callback, module, trainer, data):
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data)


def another_trainer(callback, module, trainer, data):
    fit(callback, module, data)


def another_trainer_and_callback(callback, module, trainer, data):
    other = QuantizationCallback(callback.recipe, parity="error")
    fit(other, module, data)
    callback._quantized = other.quantized_module


def a_test_in_between(callback, module, trainer, data):
    assert trainer.test(module, data, verbose=False)[0].keys() == {"test/acc"}
    trainer.test(callback.quantized_module, data, verbose=False)
    another_trainer(callback, module, trainer, data)


def validated_and_predicted(callback, module, trainer, data):
    trainer.validate(module, data, verbose=False)
    assert len(trainer.predict(module, data)) == 6
    fitted_again(callback, module, trainer, data)


@pytest.mark.sampled
@FLOWS
@pytest.mark.parametrize("again", [fitted_again, another_trainer, another_trainer_and_callback, a_test_in_between, validated_and_predicted])
def test_a_fit_may_follow(again, flow):
    seed_everything(0)
    callback, watch, data = QuantizationCallback(QAT(flow=flow), parity="error"), Watch(), Images()
    module, trainer = fit(callback, data=data, watching=[watch])
    first, before = callback.quantized_module, snapshot(module.net)
    again(callback, module, trainer, data)
    assert not same(before, module.net.state_dict())
    assert callback.quantized_module is not first and close(callback.quantized_module, module)
    trains(module)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "recipe", [QAT(), QAT(flow="eager"), QAT(flow="pt2e"), StaticPTQ(calibration_batches=2)], ids=["fx", "eager", "pt2e", "ptq"]
)
def test_a_callback_may_fit_one_module_after_the_other(recipe):
    callback, two, one = QuantizationCallback(recipe, parity="error"), Judged(), Plain()
    for module, layers in ((two, 6), (one, 4), (two, 6), (one, 4)):
        fit(callback, module, max_epochs=1)
        assert callback.report.quantized_modules == layers and close(callback.quantized_module, module)


# --- two callbacks -----------------------------------------------------------------------------------------------------------


class LateTwo(TwoOptimizers):
    """Builds its critic in ``configure_model``."""

    def __init__(self):
        super().__init__()
        self.critic = None

    def configure_model(self):
        if self.critic is None:
            self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


class EachNet(Callback):
    """Records before each batch whether the observers of each network are on."""

    def __init__(self):
        self.seen = {"net": [], "critic": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for name, seen in self.seen.items():
            seen.append({bool(quant.observer_enabled[0]) for quant in fake_quants(pl_module.get_submodule(name))})


class LateJudged(LateTwo):
    validation_step = Judged.validation_step


@pytest.mark.sampled
@FLOWS
@pytest.mark.parametrize("kind", [Judged, LateJudged])
@pytest.mark.parametrize("second", [QAT, StaticPTQ])
def test_two_callbacks_on_different_submodules(second, kind, flow, tmp_path):
    schedule = {"freeze_observers": When(epoch=1), "freeze_bn": None} if second is QAT else {"calibration_batches": 2}
    early = QAT(flow=flow, freeze_observers=When(step=4), freeze_bn=None)
    first = QuantizationCallback(early, modules=["net"], parity="error")
    other = QuantizationCallback(second(flow=flow, **schedule), modules=["critic"], parity="error")
    each = EachNet()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    module, _ = fit(first, kind(), watching=[other, each, checkpoint], enable_checkpointing=True)
    assert each.seen["net"] == [{index < 2} for index in range(12)]
    assert each.seen["critic"] == [{index < 6} if second is QAT else set() for index in range(12)]
    assert plan_of(module.net) is not None and (plan_of(module.critic) is not None) == (second is QAT)
    assert {layer.layer for layer in first.report.layers} == {"net.conv1", "net.conv2", "net.hidden", "net.fc"}
    assert {layer.layer for layer in other.report.layers} == {"critic.0", "critic.2"}
    for number, callback in enumerate((first, other)):
        int8 = callback.quantized_module
        loaded = load_quantized(save_quantized(int8, tmp_path / str(number)), built(kind))
        Trainer(**QUIET).validate(int8, Images(), verbose=False)
        assert torch.equal(loaded.critic(loaded.net(IMAGES)), int8.critic(int8.net(IMAGES)))
    again = Trainer(**{**QUIET, "max_epochs": 3, "callbacks": [first, other]})
    again.fit(built(kind), Images(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert again.current_epoch == 3


def built(kind):
    module = kind()
    module.configure_model()
    return module


# --- interrupted, and converted on request -----------------------------------------------------------------------------------


class Interrupted(Plain):
    """Raises in the middle of a training or a validation step."""

    error: BaseException | None = None
    where, batch = "training_step", 0

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.interrupt("training_step", batch_idx)
        return loss

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.interrupt("validation_step", batch_idx)

    def interrupt(self, where, batch_idx):
        if self.error is not None and (where, batch_idx) == (self.where, self.batch) and not self.trainer.sanity_checking:
            raise self.error


@pytest.fixture
def interrupt_signal():
    """Lightning ignores further interrupts once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(flow, error=ValueError, where="training_step", batch=3, **recipe):
    """Return callback and module of a fit that an error has ended."""
    callback, module = QuantizationCallback(QAT(flow=flow, **recipe), parity="error"), Interrupted()
    module.error, module.where, module.batch = error("half-way"), where, batch
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [callback]})
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(module, Images())
    module.error = None
    return callback, module, trainer


@pytest.mark.sampled
@FLOWS
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(("where", "batch"), [("training_step", 0), ("training_step", 3), ("validation_step", 1)])
def test_a_half_trained_run_is_left_usable(flow, error, where, batch, interrupt_signal):
    callback, module, _ = interrupted(flow, error, where, batch, freeze_bn=When(step=2))
    assert not any(bool(quant.observer_enabled[0]) for quant in fake_quants(module))
    assert all(child.training is (where == "training_step") for child in module.net.modules())
    assert not any(child._forward_pre_hooks and name == "net" and flow == "fx" for name, child in module.named_modules())
    before = snapshot(module)
    int8 = callback.convert(module)
    assert same(before, module.state_dict()) and int8 is callback.quantized_module and callback.report.parity_passed
    assert callback.report.checkpoint is None and callback.report.int8.latency_ms > 0
    assert close(int8, module) and len(Trainer(**QUIET).predict(int8, Images())) == 6
    trains(module)
    watch = Watch()
    fit(callback, module.train(), watching=[watch])
    assert watch.observers[0] == {True} and watch.bn_frozen[0] == {False} and close(callback.quantized_module, module)


@FLOWS
@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*there is no last checkpoint available")
def test_an_interrupted_run_is_resumed(flow, tmp_path):
    recipe, watch = QAT(flow=flow, freeze_observers=When(step=8)), Watch()
    module = Interrupted()
    module.error, module.batch = ValueError("half-way"), 5
    with pytest.raises(ValueError, match="half-way"):
        fit(QuantizationCallback(recipe), module, watching=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True)
    callback, resumed = QuantizationCallback(recipe, parity="error"), Plain()
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [callback, watch]})
    with pytest.warns(UserWarning, match="resuming from a checkpoint that ended before the epoch ended"):
        trainer.fit(resumed, Images(), ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert watch.observers == [{index < 3} for index in range(len(watch.observers))] and len(watch.observers) > 3
    assert close(callback.quantized_module, resumed)


@FLOWS
def test_zeros_are_let_go_after_an_error(flow):
    class Pruned(Interrupted):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.net.conv1.weight[0] = 0
            self.error = ValueError("half-way")

    module = Pruned()
    with pytest.raises(ValueError, match="half-way"):
        fit(QuantizationCallback(QAT(flow=flow)), module)
    assert not module.net.conv1.weight._backward_hooks


def test_an_error_before_the_network_is_built_leaves_nothing_behind():
    class Failing(Callback):
        def setup(self, trainer, pl_module, stage):
            raise ValueError("no setup")

    module, callback = LateJudged(), QuantizationCallback("qat")
    with pytest.raises(ValueError, match="no setup"):
        fit(callback, module, watching=[Failing()])
    assert "configure_model" not in vars(module)
    fit(callback, module, max_epochs=1)
    assert callback.report.quantized_modules == 6


@FLOWS
def test_convert_between_fits(flow):
    callback = QuantizationCallback(QAT(flow=flow))
    module, _ = fit(callback, max_epochs=1)
    at_the_end = callback.quantized_module
    assert torch.equal(callback.convert(module).net(IMAGES), at_the_end.net(IMAGES)) and callback.quantized_module is not at_the_end
    trains(module)
    assert not torch.equal(callback.convert(module).net(IMAGES), at_the_end.net(IMAGES))


@FLOWS
def test_convert_with_batches_and_no_trainer(flow):
    callback, module, trainer = interrupted(flow)
    del trainer
    module.trainer = None
    with pytest.raises(CalibrationError, match=r"no batch to calibrate or compare.*convert\(module, batches\)"):
        callback.convert(module)
    labels = torch.zeros(8, dtype=torch.long)
    assert close(callback.convert(module, iter([(IMAGES, labels)])), module) and callback.report.max_steps <= 1
    other = QuantizationCallback(callback.recipe, calibration_data=[(IMAGES, labels)])
    assert torch.equal(other.convert(module).net(IMAGES), callback.quantized_module.net(IMAGES))


@pytest.mark.parametrize("recipe", [StaticPTQ(calibration_batches=2), StaticPTQ(flow="eager", calibration_batches=2), "dynamic"], ids=str)
def test_convert_without_fake_quant(recipe):
    callback, module = QuantizationCallback(recipe), Interrupted()
    module.error = ValueError("half-way")
    with pytest.raises(ValueError, match="half-way"):
        fit(callback, module)
    assert close(callback.convert(module), module)


@pytest.mark.parametrize("recipe", ["qat", "ptq", "dynamic"])
def test_convert_needs_a_fit(recipe):
    callback = QuantizationCallback(recipe)
    with pytest.raises(QuantizationError, match=r"Plain is not prepared by recipe .*call trainer\.fit"):
        callback.convert(Plain(), [IMAGES])
    fit(callback, max_epochs=1, limit_train_batches=2)
    with pytest.raises(QuantizationError, match="converted already"):
        callback.convert(callback.quantized_module)


def test_convert_names_observers_without_data():
    callback, module = QuantizationCallback("qat"), Plain()
    Trainer(**{**QUIET, "callbacks": [callback]}).validate(module, Images(), verbose=False)
    with pytest.raises(CalibrationError, match="has seen no data"):
        callback.convert(module, [(IMAGES, torch.zeros(8))])
