import copy
import re

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader
from torchmetrics import Metric

from qat_lightning import (
    QAT,
    CalibrationError,
    ConfigurationError,
    DynamicPTQ,
    QuantizationCallback,
    StaticPTQ,
    UnsupportedModelError,
    When,
)
from qat_lightning.backend import LayerShape, choose_kernel
from qat_lightning.core import int8_plan_of, plan_of
from qat_lightning.observers import fake_quants
from tests.nets import QUIET, BranchingAddition, BranchingNet, FunctionalNet, Images, ManyInputs, ModuleNet, Plain, Recurrent, fit

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
QUICK_PTQ = StaticPTQ(calibration_batches=2)
BATCHES = 6  # of 16 images in an epoch


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def snapshot(module):
    return copy.deepcopy(module.state_dict())


# --- schedule ----------------------------------------------------------------------------------------------------------------


class Watch(Callback):
    """Records before each training batch what is on; attach it after the quantization."""

    def __init__(self):
        self.fake_quant, self.observers, self.bn_frozen = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        quants = list(fake_quants(pl_module))
        self.fake_quant.append({bool(quant.fake_quant_enabled[0]) for quant in quants})
        self.observers.append({bool(quant.observer_enabled[0]) for quant in quants})
        self.bn_frozen.append({not child.training for child in pl_module.modules() if isinstance(child, _BatchNorm)})


class TwoOptimizers(Plain):
    """Manual optimization of two networks by turns, as in a GAN."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        logits = self.net(batch[0])
        for optimizer, loss in ((first, self.loss(logits, batch[1])), (second, self.critic(logits.detach()).square().mean())):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.01) for net in (self.net, self.critic)]


MOMENTS = {
    "epoch": (When(epoch=1), {}, BATCHES),
    "step": (When(step=4), {}, 4),
    "step after an epoch": (When(step=8), {}, 8),
    "fraction of epochs": (When(fraction=0.5), {}, BATCHES),
    "fraction within an epoch": (When(fraction=0.25), {}, 3),
    "fraction of fewer batches": (When(fraction=0.5), {"limit_train_batches": 3}, 3),
    "fraction of steps": (When(fraction=0.5), {"max_epochs": -1, "max_steps": 8}, 4),
    "fraction of what ends first": (When(fraction=0.5), {"max_epochs": 10, "max_steps": 8}, 4),
    "accumulated step": (When(step=2), {"accumulate_grad_batches": 2}, 4),
    "accumulated fraction of steps": (When(fraction=0.5), {"accumulate_grad_batches": 2, "max_steps": 4, "max_epochs": -1}, 4),
    "accumulated fraction of epochs": (When(fraction=0.25), {"accumulate_grad_batches": 3}, 3),
    "validation in between": (When(step=5), {"val_check_interval": 2}, 5),
    "validation after the freeze": (When(step=1), {"val_check_interval": 2}, 1),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("when", "trainer", "first"), MOMENTS.values(), ids=MOMENTS)
def test_a_moment_falls_on_its_batch(when, trainer, first):
    watch = Watch()
    fit(QuantizationCallback(QAT(freeze_observers=when, freeze_bn=when, start=when)), **trainer, watching=[watch])
    count = len(watch.observers)
    assert count > first
    assert watch.observers == [{index < first} for index in range(count)]
    assert watch.bn_frozen == watch.fake_quant == [{index >= first} for index in range(count)]


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_moments_are_independent(flow):
    watch, recipe = Watch(), QAT(flow=flow, start=When(step=2), freeze_bn=When(step=4), freeze_observers=When(step=7))
    fit(QuantizationCallback(recipe), watching=[watch])
    firsts = [values.index({True}) for values in (watch.fake_quant, watch.bn_frozen)]
    assert [*firsts, watch.observers.index({False})] == [2, 4, 7]


def test_bn_may_be_frozen_from_the_start():
    watch = Watch()
    module, _ = fit(QuantizationCallback(QAT(freeze_bn=When(epoch=0))), watching=[watch])
    assert watch.bn_frozen == [{True}] * 12 and int(module.net.conv1.bn.num_batches_tracked) == 0


def test_without_moments_everything_stays_on():
    watch = Watch()
    fit(QuantizationCallback(QAT(freeze_bn=None, freeze_observers=None)), watching=[watch])
    assert watch.observers == watch.fake_quant == [{True}] * 12 and watch.bn_frozen == [{False}] * 12


def test_steps_count_both_optimizers():
    watch = Watch()
    module, _ = fit(QuantizationCallback(QAT(freeze_observers=When(step=4), freeze_bn=None)), TwoOptimizers(), watching=[watch])
    assert watch.observers == [{index < 2} for index in range(12)]
    assert plan_of(module.net) is not None and plan_of(module.critic) is not None


def test_a_fraction_needs_an_end():
    with pytest.raises(ConfigurationError, match=r"`freeze_bn=When\(fraction=0.5\)` needs a run whose end is known"):
        fit(QuantizationCallback("qat"), max_epochs=-1)


def test_epochs_and_steps_need_no_end():
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch >= 1

    watch = Watch()
    recipe = QAT(freeze_observers=When(epoch=1), freeze_bn=When(step=3))
    fit(QuantizationCallback(recipe), max_epochs=-1, watching=[watch, Stop()])
    assert watch.observers.index({False}) == BATCHES and watch.bn_frozen.index({True}) == 3


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_frozen_is_frozen(flow):
    class Keep(Callback):
        states = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            names = re.compile(r"running_|min_val|max_val|scale|zero_point")
            state = {name: value for name, value in snapshot(pl_module).items() if names.search(name) and "weight_fake" not in name}
            self.states = (*self.states, state)

    keep, when = Keep(), When(epoch=1)
    fit(QuantizationCallback(QAT(flow=flow, freeze_observers=when, freeze_bn=when)), watching=[keep])
    assert not same(keep.states[1], keep.states[BATCHES]) and len(keep.states[0]) > 10
    assert same(keep.states[BATCHES], keep.states[-1])


# --- evaluation teaches nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_sanity_check_and_validation_leave_ranges_alone(flow):
    class Compare(Callback):
        checks = 0

        def on_validation_start(self, trainer, pl_module):
            self.before = snapshot(pl_module)

        def on_validation_end(self, trainer, pl_module):
            assert same(self.before, snapshot(pl_module))
            self.checks += 1

    compare = Compare()
    fit(QuantizationCallback(QAT(flow=flow)), num_sanity_val_steps=2, watching=[compare])
    assert compare.checks == 3


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_evaluation_leaves_ranges_alone(flow, stage):
    callback = QuantizationCallback(QAT(flow=flow, freeze_observers=None, freeze_bn=None))
    module, trainer = fit(callback, max_epochs=1)
    before = snapshot(module.net)
    getattr(trainer, stage)(module, Images())
    assert same(before, module.net.state_dict())


# --- the end of a fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_the_trained_module_can_be_trained_again(flow):
    callback = QuantizationCallback(QAT(flow=flow))
    module, _ = fit(callback, max_epochs=1)
    first, weights = callback.quantized_module, snapshot(module.net)
    watch = Watch()
    fit(callback, module, max_epochs=1, watching=[watch])
    assert not same(weights, module.net.state_dict()) and callback.quantized_module is not first
    assert watch.observers[0] == {True} and watch.bn_frozen[0] == {False}


def test_another_callback_takes_a_prepared_module_over():
    module, _ = fit(QuantizationCallback("qat"), max_epochs=1)
    callback = QuantizationCallback("qat")
    fit(callback, module, max_epochs=1)
    assert callback.report.quantized_modules == 4 and callback.report.float32.latency_ms is None


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_the_trained_module_can_be_saved_and_restored(flow, tmp_path):
    callback = QuantizationCallback(QAT(flow=flow))
    module, trainer = fit(callback, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = Plain()
    Trainer(callbacks=[QuantizationCallback(QAT(flow=flow))], **QUIET).test(restored, Images(), ckpt_path=tmp_path / "last.ckpt")
    assert same(restored.net.state_dict(), module.net.state_dict())
    assert torch.equal(restored.net.eval()(IMAGES), module.net.eval()(IMAGES))


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_a_resumed_run_ends_where_the_whole_one_does(flow, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    class Ordered(Images):
        train_dataloader = Images.loader

    def build():
        seed_everything(3)
        net = ModuleNet()
        net.drop.p = 0.0
        return Plain(net)

    recipe = QAT(flow=flow, freeze_observers=When(fraction=0.5), freeze_bn=When(step=10), start=When(step=3))
    whole, _ = fit(QuantizationCallback(recipe), build(), Ordered(), max_epochs=3, watching=[Save()])
    resumed = build()
    trainer = Trainer(max_epochs=3, callbacks=[QuantizationCallback(recipe)], **QUIET)
    trainer.fit(resumed, Ordered(), ckpt_path=tmp_path / "first.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())


RECIPES = {
    "qat fx": QAT(),
    "qat eager": QAT(flow="eager"),
    "ptq fx": QUICK_PTQ,
    "ptq eager": StaticPTQ(flow="eager", calibration_batches=2),
    "dynamic fx": DynamicPTQ(flow="fx"),
    "dynamic eager": DynamicPTQ(),
}


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_quantized_module_runs_under_a_trainer(recipe):
    callback = QuantizationCallback(recipe)
    module, _ = fit(callback)
    int8 = callback.quantized_module
    assert type(int8) is Plain and int8 is not module and not int8.training and int8_plan_of(int8.net) is not None
    trainer = Trainer(callbacks=[callback], **QUIET)
    metrics = {**trainer.validate(int8, Images(), verbose=False)[0], **trainer.test(int8, Images(), verbose=False)[0]}
    predictions = torch.cat(trainer.predict(int8, Images()))
    assert metrics.keys() == {"val/loss", "test/acc"} and all(tensor.device.type == "cpu" for tensor in int8.parameters())
    # Batch by batch: dynamic quantization takes its ranges from each.
    assert torch.equal(predictions, torch.cat([int8.net(batch[0]) for batch in Images().loader()])) and not predictions.is_quantized
    assert metrics["test/acc"] == pytest.approx((predictions.argmax(1) == Images().labels).float().mean().item())


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_int8_is_as_accurate_as_what_was_trained(flow):
    seed_everything(0)
    callback = QuantizationCallback(QAT(flow=flow))
    module, trainer = fit(callback, max_epochs=6)
    trainer.test(module, Images(), verbose=False)
    trainer.test(callback.quantized_module, Images(), verbose=False)
    report = callback.report
    assert report.fake_quant.accuracy > 0.8 and abs(report.int8.accuracy - report.fake_quant.accuracy) <= 0.02
    assert report.max_steps <= 1 and report.parity_passed


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_report_of_a_fit(recipe):
    callback = QuantizationCallback(recipe)
    fit(callback, max_epochs=1)
    report = callback.report
    layers = {"net.hidden", "net.fc"} | (set() if recipe.name == "dynamic" else {"net.conv1", "net.conv2"})
    assert (report.recipe, report.flow, report.backend) == (recipe.name, recipe.flow, "x86")
    assert {layer.layer for layer in report.layers} == layers and report.quantized_modules == len(layers)
    assert report.int8.size_bytes > 0 and report.float32.size_bytes > 0 and report.float32.latency_ms > 0 and report.int8.latency_ms > 0
    assert report.parity is None if recipe.name == "dynamic" else {layer.layer for layer in report.parity} > layers
    assert (report.fake_quant, report.int8.accuracy, report.float32.accuracy) == (None, None, None) and report.torch == torch.__version__


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", [QUICK_PTQ, StaticPTQ(flow="eager"), DynamicPTQ()], ids=["ptq", "ptq eager", "dynamic"])
def test_recipes_without_training_leave_float_training_alone(recipe):
    seed_everything(1)
    alone = Plain()
    Trainer(max_epochs=2, **QUIET).fit(alone, Images())
    seed_everything(1)
    with_callback, _ = fit(QuantizationCallback(recipe))
    assert same(alone.state_dict(), with_callback.state_dict()) and type(with_callback.net) is ModuleNet


@pytest.mark.parametrize("recipe", [QUICK_PTQ, DynamicPTQ()], ids=["ptq", "dynamic"])
def test_no_epoch_is_enough_without_training(recipe):
    callback, module = QuantizationCallback(recipe), Plain().eval()
    before = snapshot(module)
    fit(callback, module, max_epochs=0)
    assert same(before, module.state_dict())
    assert (callback.quantized_module.net(IMAGES) - module.eval().net(IMAGES)).abs().max() < 0.1


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", [QAT(), QAT(flow="eager"), QUICK_PTQ], ids=["qat", "qat eager", "ptq"])
def test_batch_norm_is_folded_into_int8(recipe):
    callback = QuantizationCallback(recipe)
    fit(callback, max_epochs=1)
    assert not any(isinstance(child, _BatchNorm) for child in callback.quantized_module.modules())


@pytest.mark.sampled
@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("freeze", [None, When(epoch=1)])
def test_weight_scales_are_those_of_the_weights_that_are_rounded(flow, freeze):
    net = ModuleNet()
    for layer in (net.bn1, net.bn2):
        torch.nn.init.uniform_(layer.weight, 0.2, 3.0)
        layer.running_var.uniform_(0.1, 0.3)
    module, _ = fit(QuantizationCallback(QAT(flow=flow, freeze_observers=freeze)), Plain(net, lr=0.0), max_epochs=2)
    weights = [child.weight_fake_quant for child in module.modules() if hasattr(child, "weight_fake_quant")]
    kept = [child.scale.clone() for child in weights]
    if freeze is None:  # else BatchNorm has moved since
        for child in weights:
            child.enable_observer()
        module.net.eval()(IMAGES)
    raw = module.net.conv1.weight.detach().flatten(1).abs().amax(1) / 127
    assert len(kept) == 4 and not torch.allclose(kept[0], raw, rtol=0.1)
    assert all(torch.equal(scale, child.scale) for scale, child in zip(kept, weights, strict=True))


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_value_ranges_are_reported(flow):
    recipe = QAT(flow=flow, activation_bits=8, overrides={"fc": {"activation_bits": 7, "per_channel": False}})
    callback = QuantizationCallback(recipe, parity="off")  # on processors without VNNI, kernels of x86 overflow with 8 bits
    fit(callback, max_epochs=1)
    bits = {layer.layer: (layer.activation_bits, layer.per_channel) for layer in callback.report.layers}
    assert bits == {"net.conv1": (8, True), "net.conv2": (8, True), "net.hidden": (8, True), "net.fc": (7, False)}


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("recipe", [QAT, StaticPTQ])
def test_quantization_under_mixed_precision(flow, recipe, monkeypatch):
    rounded, round_weights = set(), torch.fake_quantize_per_channel_affine
    monkeypatch.setattr(
        torch, "fake_quantize_per_channel_affine", lambda x, *arguments: rounded.add(x.dtype) or round_weights(x, *arguments)
    )
    callback, outputs = QuantizationCallback(recipe(flow=flow)), set()

    class Watching(Plain):
        def training_step(self, batch, batch_idx):
            outputs.add(self.net(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    module, _ = fit(callback, Watching(), precision="bf16-mixed")
    assert outputs == {torch.bfloat16} and rounded == {torch.float32}
    assert callback.report.parity_passed
    ranges = [buffer for quant in fake_quants(module) for buffer in quant.buffers() if buffer.is_floating_point()]
    assert {buffer.dtype for buffer in ranges} <= {torch.float32}


def test_quantization_with_averaged_weights():
    callback = QuantizationCallback("qat")
    fit(callback, watching=[EMAWeightAveraging(decay=0.9)])
    assert callback.report.parity_passed


def test_nothing_to_see_before_the_end_of_a_fit():
    for name in ("report", "quantized_module"):
        with pytest.raises(RuntimeError, match=r"made at the end of trainer\.fit"):
            getattr(QuantizationCallback("qat"), name)


# --- what is quantized -------------------------------------------------------------------------------------------------------


class TwoNets(Plain):
    def __init__(self):
        super().__init__(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()))
        self.heads = nn.ModuleList([nn.Linear(144, 4), nn.Linear(144, 4)])
        self.tail = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4), nn.ReLU())})

    def logits(self, x):
        x = self.net(x)
        return self.tail["body"](self.heads[0](x) + self.heads[1](x))

    def training_step(self, batch, batch_idx):
        return self.loss(self.logits(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


ALL = {"net.0", "heads.0", "heads.1", "tail.body.0"}
CHOICES = [
    (None, ALL),
    (["net"], {"net.0"}),
    (["heads.1"], {"heads.1"}),
    (("net", "tail.body"), {"net.0", "tail.body.0"}),
    (["net.0"], {"net.0"}),
]


@pytest.mark.sampled
@pytest.mark.parametrize(("modules", "expected"), CHOICES)
@pytest.mark.parametrize("recipe", [QAT(), QAT(flow="eager"), QUICK_PTQ], ids=["qat", "qat eager", "ptq"])
def test_modules_choose_what_is_quantized(recipe, modules, expected):
    callback = QuantizationCallback(recipe, modules=modules)
    fit(callback, TwoNets(), max_epochs=1)
    assert {layer.layer for layer in callback.report.layers} == expected
    assert callback.report.parity_passed


def test_overrides_may_name_the_target():
    callback = QuantizationCallback(QAT(backend="onednn", overrides={"net.fc": None, "conv*": {"engine": "qnnpack"}}))
    fit(callback, max_epochs=1)
    engines = {layer.layer: layer.engine for layer in callback.report.layers}
    hidden = choose_kernel("onednn", LayerShape("linear", 32, 16), "auto", per_channel=True).engine
    assert engines == {"net.conv1": "qnnpack", "net.conv2": "qnnpack", "net.hidden": hidden}


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", [QAT(), QAT(flow="eager"), QUICK_PTQ], ids=["qat", "qat eager", "ptq"])
def test_metrics_and_losses_are_left_alone(recipe):
    class Perceptual(Metric):
        def __init__(self):
            super().__init__()
            self.features = nn.Linear(4, 4)
            self.add_state("total", torch.zeros(()))

        def update(self, x):
            self.total += self.features(x).mean()

        def compute(self):
            return self.total

    module = Plain()
    module.perceptual = Perceptual()
    callback = QuantizationCallback(recipe)
    fit(callback, module, max_epochs=1)
    for one in (module, callback.quantized_module):
        assert type(one.perceptual) is Perceptual and type(one.perceptual.features) is nn.Linear and type(one.loss) is nn.CrossEntropyLoss
    assert callback.report.quantized_modules == 4


class Late(Plain):
    """Builds its network in ``configure_model``, as sharded strategies want it."""

    def __init__(self):
        super().__init__(nn.Identity())

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = ModuleNet()


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_networks_built_in_configure_model(recipe, tmp_path):
    callback = QuantizationCallback(recipe)
    module, trainer = fit(callback, Late(), max_epochs=1)
    assert callback.report.quantized_modules == (2 if recipe.name == "dynamic" else 4)
    assert "configure_model" not in vars(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    restored = Late()
    Trainer(callbacks=[QuantizationCallback(recipe)], **QUIET).test(restored, Images(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert same(restored.state_dict(), module.state_dict())


class Tokens(LightningModule):
    """A network of several inputs, called by keyword, on batches that are mappings."""

    example_input_array = None

    def __init__(self):
        super().__init__()
        self.net = ManyInputs()

    def forward(self, x, ids, mask):
        return self.net(x, ids=ids, mask=mask)["logits"]

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch["x"], batch["ids"], batch["mask"]), batch["label"])

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def token_loader():
    rows = [{"x": torch.randn(8), "ids": torch.tensor(i % 10), "mask": torch.rand(8), "label": torch.tensor(i % 4)} for i in range(32)]
    return DataLoader(rows, batch_size=8)


@pytest.mark.parametrize(
    "recipe", [QAT(), QUICK_PTQ, DynamicPTQ(), DynamicPTQ(flow="fx")], ids=lambda recipe: f"{recipe.name}-{recipe.flow}"
)
def test_several_inputs_by_keyword(recipe):
    callback, module = QuantizationCallback(recipe), Tokens()
    module.example_input_array = (torch.randn(2, 8), torch.tensor([1, 2]), torch.rand(2, 8))
    fit(callback, module, token_loader(), max_epochs=1)
    assert callback.report.quantized_modules == 3
    assert Trainer(**QUIET).test(callback.quantized_module, token_loader(), verbose=False)[0]["test/loss"] > 0


@pytest.mark.parametrize("recipe", [QAT(), QUICK_PTQ], ids=["qat", "ptq"])
def test_an_optional_tensor_without_an_example_is_explained(recipe):
    with pytest.raises(UnsupportedModelError, match=r"mask=None.*is called with mask of type Tensor.*example_input_array"):
        fit(QuantizationCallback(recipe), Tokens(), token_loader(), max_epochs=1)


class Sequences(LightningModule):
    def __init__(self):
        super().__init__()
        self.reader = Recurrent()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.reader(batch[0].squeeze(1)), batch[1])

    validation_step = training_step

    def predict_step(self, batch, batch_idx=0):
        return self.reader(batch[0].squeeze(1))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_recurrent_networks_are_quantized_dynamically(flow):
    callback = QuantizationCallback(DynamicPTQ(flow=flow))
    fit(callback, Sequences())
    assert {layer.layer for layer in callback.report.layers} == {"reader.lstm", "reader.gru", "reader.fc"}
    assert callback.report.int8.size_bytes < callback.report.float32.size_bytes


# --- refused before it is too late -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [QAT(flow="eager"), StaticPTQ(flow="eager")], ids=["qat", "ptq"])
def test_what_no_trace_shows_fails_at_the_first_batch(recipe):
    class Count(Callback):
        batches = 0

        def on_train_batch_end(self, *args):
            self.batches += 1

    count = Count()
    with pytest.raises(UnsupportedModelError, match=r"flow='eager' cannot run 'net' in int8: at .*nets.py:\d+: .*x \+ x.*Use flow='fx'"):
        fit(QuantizationCallback(recipe), Plain(BranchingAddition()), watching=[count])
    assert count.batches == 0


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("net", "flow", "message"),
    [
        (BranchingNet, "fx", r"cannot trace .*BranchingNet.* at .*nets.py:\d+.*Use flow='eager'"),
        (FunctionalNet, "eager", r"cannot run '(add|cat)'.*FunctionalNet at .*nets.py:\d+.*Use flow='fx'"),
    ],
)
@pytest.mark.parametrize("kind", [QAT, StaticPTQ])
def test_what_a_flow_cannot_do_is_known_before_training(kind, net, flow, message):
    module = Plain(net())
    before = snapshot(module)
    with pytest.raises(UnsupportedModelError, match=message):
        fit(QuantizationCallback(kind(flow=flow)), module)
    assert same(before, module.state_dict()) and type(module.net) is net


# --- calibration -------------------------------------------------------------------------------------------------------------


class Narrow(Images):
    """Training images that differ from those for calibration, which lie within one."""

    def calibration_dataloader(self):
        return DataLoader([(image.clamp(-1, 1), label) for image, label in zip(self.images, self.labels, strict=True)], batch_size=16)


def input_range(module):
    """Return the real interval that the input of the int8 network covers."""
    x = module.net.input_stub(torch.zeros(1))
    return 255 * x.q_scale()


LABELLED = (IMAGES.clamp(-0.5, 0.5), torch.zeros(8).long())
CALIBRATIONS = {
    "training data": ({}, Images(), Images().images.max() - Images().images.min()),
    "calibration_dataloader": ({}, Narrow(), 2.0),
    "calibration_data": ({"calibration_data": [LABELLED]}, Narrow(), 1.0),
}


@pytest.mark.sampled
@pytest.mark.parametrize(("arguments", "data", "width"), CALIBRATIONS.values(), ids=CALIBRATIONS)
def test_where_calibration_data_comes_from(arguments, data, width):
    callback = QuantizationCallback(StaticPTQ(flow="eager", observer="minmax"), **arguments)
    fit(callback, data=data, max_epochs=0)
    assert input_range(callback.quantized_module) == pytest.approx(float(width), rel=1e-3)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.parametrize("recipe", ["qat", "ptq"])
def test_a_module_that_only_trains_is_calibrated_by_its_training_step(recipe):
    class Minimal(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ModuleNet()

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callback = QuantizationCallback(recipe)
    fit(callback, Minimal(), max_epochs=1, limit_val_batches=0)
    assert callback.report.parity_passed and callback.report.quantized_modules == 4


def test_bare_tensors_go_to_predict_step():
    class Predicts(Plain):
        def predict_step(self, batch, batch_idx=0):
            return self.net(batch)

    callback = QuantizationCallback(QUICK_PTQ, calibration_data=[IMAGES])
    fit(callback, Predicts(), max_epochs=0)
    assert callback.report.parity_passed


def test_calibration_data_may_be_read_once():
    callback = QuantizationCallback("ptq", calibration_data=iter([LABELLED] * 3))
    fit(callback, max_epochs=0)
    assert callback.report.parity_passed and callback.report.int8.latency_ms > 0


def test_calibration_takes_as_many_batches_as_it_is_told():
    seen = []

    def batches():
        for index in range(50):
            seen.append(index)
            yield LABELLED

    fit(QuantizationCallback(StaticPTQ(calibration_batches=3), calibration_data=batches()), max_epochs=0)
    assert 3 <= len(seen) <= 6


def test_calibration_step_can_be_overridden():
    class Custom(QuantizationCallback):
        def calibration_step(self, module, batch):
            module.net(batch["pixels"])

    callback = Custom(QUICK_PTQ, calibration_data=[{"pixels": IMAGES}])
    fit(callback, max_epochs=0)
    assert callback.report.parity_passed and callback.report.int8.latency_ms > 0


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no batch"),
        ([(torch.full_like(IMAGES, torch.nan), LABELLED[1])], "NaN or infinite"),
        ([(torch.full_like(IMAGES, torch.inf), LABELLED[1])], "NaN or infinite"),
    ],
    ids=["none", "nan", "inf"],
)
def test_calibration_data_that_teaches_nothing(data, message):
    with pytest.raises(CalibrationError, match=message):
        fit(QuantizationCallback("ptq", calibration_data=data), max_epochs=0)
