import copy
import os
import re
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.multiprocessing import ProcessRaisedException

from qat_lightning import (
    QAT,
    ArtifactError,
    CalibrationError,
    ConfigurationError,
    DynamicPTQ,
    QuantizationCallback,
    QuantizationError,
    StaticPTQ,
    UnsupportedModelError,
    When,
    calibrate,
    convert,
    prepare,
    quantize_dynamic,
    save_quantized,
)
from tests.nets import QUIET, BranchingNet, FunctionalNet, Images, ModuleNet, Plain, TrainingBranch, fit

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.zeros(8).long()
NEVER = {"freeze_bn": None, "freeze_observers": None}


class Started(Callback):
    """Knows whether a training batch has been run."""

    yes = False

    def on_train_batch_end(self, *args):
        self.yes = True


class Heads(Plain):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 4)])
        self.twin = self.net


# --- arguments ---------------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "unknown recipe": (lambda: QuantizationCallback("awq"), ValueError, r"`recipe` to be one of \('qat', 'ptq', 'dynamic'\).*'awq'"),
    "class of a recipe": (lambda: QuantizationCallback(QAT), TypeError, "`recipe` to be a QAT, StaticPTQ or DynamicPTQ.*QAT"),
    "no recipe": (lambda: QuantizationCallback(None), TypeError, "`recipe`.*None"),
    "modules as a string": (lambda: QuantizationCallback("qat", modules="net"), TypeError, "`modules` to be a list of names.*'net'"),
    "modules as a number": (lambda: QuantizationCallback("qat", modules=3), TypeError, "`modules` to be a list of names.*3"),
    "no modules": (lambda: QuantizationCallback("qat", modules=[]), ValueError, "`modules` to name at least one module"),
    "calibration data as a number": (lambda: QuantizationCallback("ptq", calibration_data=3), TypeError, "`calibration_data`.*3"),
    "one tensor": (
        lambda: QuantizationCallback("ptq", calibration_data=torch.ones(2)),
        TypeError,
        r"got a Tensor: one batch is \[tensor\]",
    ),
    "unknown argument": (lambda: QAT(bits=8), TypeError, "bits"),
    "unknown backend": (
        lambda: QAT(backend="cuda"),
        ValueError,
        r"`backend` to be one of \('x86', 'fbgemm', 'onednn', 'qnnpack'\).*'cuda'",
    ),
    "unknown flow": (lambda: StaticPTQ(flow="jit"), ValueError, "`flow`.*'jit'"),
    "fraction too large": (lambda: When(fraction=1.5), ValueError, "`fraction` to lie in.*1.5"),
    "negative epoch": (lambda: When(epoch=-2), ValueError, "`epoch` to be at least 0, but got -2"),
    "bool for a step": (lambda: When(step=True), TypeError, "`step` to be an integer, but got True"),
    "bool for batches": (lambda: StaticPTQ(calibration_batches=True), TypeError, "`calibration_batches`.*True"),
    "negative batches": (lambda: StaticPTQ(calibration_batches=-1), ValueError, "`calibration_batches`.*-1"),
    "number for a moment": (lambda: QAT(freeze_bn=3), TypeError, "`freeze_bn` to be a When.*3"),
    "fuse with fx": (lambda: QAT(fuse=[["conv1", "bn1"]]), ValueError, "`fuse` only with flow='eager'"),
    "fuse as a flat list": (lambda: QAT(flow="eager", fuse=["conv1", "bn1"]), TypeError, "each group of `fuse`.*'conv1'"),
    "unknown setting of a layer": (lambda: QAT(overrides={"fc": {"dtype": "int4"}}), ValueError, r"`overrides\['fc'\]`.*'dtype'"),
    "three bits": (lambda: QAT(activation_bits=3), ValueError, "`activation_bits`.*3"),
}


@pytest.mark.parametrize(("build", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments(build, error, message):
    with pytest.raises(error, match=message):
        build()


# --- fits --------------------------------------------------------------------------------------------------------------------


def int8_module():
    callback = QuantizationCallback(DynamicPTQ())
    fit(callback, max_epochs=0)
    return callback.quantized_module


def prepared_module():
    module = Plain()
    QuantizationCallback("qat").setup(Trainer(max_epochs=2, **QUIET), module, "fit")
    return module


def qat(**settings):
    return QuantizationCallback(QAT(**{**NEVER, **settings}))


def eager(*groups):
    return qat(flow="eager", fuse=groups)


SETUPS = {
    "unknown module": (lambda: QuantizationCallback("qat", ["nett"]), Plain, {}, r"`modules` names 'nett'.*Names are e\.g\. \['net'"),
    "empty name": (lambda: QuantizationCallback("qat", [""]), Plain, {}, "`modules` names ''"),
    "number for a name": (lambda: QuantizationCallback("qat", [3]), Plain, {}, "`modules` names 3"),
    "one inside another": (lambda: QuantizationCallback("qat", ["net", "net.fc"]), Plain, {}, r"overlap: 'net\.fc' is part of 'net'"),
    "one under two names": (lambda: QuantizationCallback("qat", ["net", "twin"]), Heads, {}, "names 'twin'|overlap"),
    "a loss": (lambda: QuantizationCallback("qat", ["loss"]), Plain, {}, r"Nothing to quantize: `modules` names 'loss'"),
    "a metric": (lambda: QuantizationCallback("qat", ["accuracy"]), Plain, {}, "Nothing to quantize: `modules` names 'accuracy'"),
    "a list of modules": (lambda: QuantizationCallback("qat", ["heads"]), Heads, {}, r"a ModuleList, which is never .*\['heads\.0'\]"),
    "a layer without weights": (lambda: QuantizationCallback("qat", ["net.relu1"]), Plain, {}, r"'net\.relu1' \(ReLU\)"),
    "nothing for qat": (lambda: QuantizationCallback("qat"), lambda: Plain(nn.LSTM(8, 4)), {}, "Nothing to quantize: no child of Plain"),
    "nothing for dynamic": (lambda: QuantizationCallback("dynamic"), lambda: Plain(nn.Conv2d(1, 4, 3)), {}, "Nothing to quantize"),
    "all in float by glob": (lambda: qat(overrides={"*": None}), Plain, {}, "Nothing to quantize.*`overrides` keeps all in float"),
    "all in float by type": (lambda: qat(overrides={nn.Module: None}), Plain, {}, "Nothing to quantize"),
    "override of nothing": (lambda: qat(overrides={"fcc": None}), Plain, {}, r"the key 'fcc', which matches no module.*'net\.fc'"),
    "override of no such type": (lambda: qat(overrides={nn.Conv3d: None}), Plain, {}, "the key .*Conv3d.*matches no module"),
    "override outside": (lambda: QuantizationCallback(QAT(overrides={"net.fc": None}), ["net.conv1"]), Plain, {}, r"the key 'net\.fc'"),
    "fuse an unknown module": (lambda: eager(["conv1", "bn7"]), Plain, {}, r"\['conv1', 'bn7'\], but there is no module 'bn7'"),
    "fuse what cannot be": (lambda: eager(["conv1", "fc"]), Plain, {}, r"types \['Conv2d', 'Linear'\], which cannot be fused"),
    "fuse twice": (lambda: eager(["conv1", "bn1"], ["bn1", "relu1"]), Plain, {}, "'bn1' in two groups"),
    "freeze after the last epoch": (lambda: qat(freeze_bn=When(epoch=2)), Plain, {}, r"`freeze_bn=When\(epoch=2\)` is never reached"),
    "freeze after the last step": (
        lambda: qat(freeze_observers=When(step=9)),
        Plain,
        {"max_steps": 8},
        r"`freeze_observers=When\(step=9\)`",
    ),
    "start after the end": (lambda: qat(start=When(epoch=5)), Plain, {}, r"`start=When\(epoch=5\)` is never reached"),
    "freeze before any data": (
        lambda: qat(freeze_observers=When(epoch=0), calibration_batches=0),
        Plain,
        {},
        r"`freeze_observers=When\(epoch=0\)`.*`calibration_batches`",
    ),
    "fraction without an end": (lambda: QuantizationCallback("qat"), Plain, {"max_epochs": -1}, "needs a run whose end is known"),
    "double precision": (lambda: qat(), Plain, {"precision": "64-true"}, "precision='64-true' is not supported.*'32-true'"),
    "half precision": (lambda: qat(), Plain, {"precision": "bf16-true"}, "precision='bf16-true' is not supported"),
    "an int8 module": (lambda: qat(), int8_module, {}, "Plain is in int8 and cannot be trained"),
    "a prepared module for ptq": (lambda: QuantizationCallback("ptq"), prepared_module, {}, "Plain was prepared for QAT.*recipe 'ptq'"),
    "no calibration data": (lambda: QuantizationCallback("ptq", calibration_data=[]), Plain, {}, "no batch"),
    "what fx cannot trace": (lambda: qat(), lambda: Plain(BranchingNet()), {}, r"cannot trace .*nets\.py:\d+.*flow='eager'"),
    "what eager cannot run": (lambda: qat(flow="eager"), lambda: Plain(FunctionalNet()), {}, r"cannot run .*nets\.py:\d+.*flow='fx'"),
    "a branch on training": (lambda: qat(), lambda: Plain(TrainingBranch()), {}, "branches on `self.training`.*flow='eager'"),
}


@pytest.mark.parametrize(("callback", "module", "trainer", "message"), SETUPS.values(), ids=SETUPS)
def test_refused_before_training(callback, module, trainer, message):
    callback, module, started = callback(), module(), Started()
    before = {name: type(child) for name, child in module.named_modules()}
    with pytest.raises(QuantizationError, match=message):
        fit(callback, module, watching=[started], **trainer)
    assert not started.yes
    assert {name: type(child) for name, child in module.named_modules()} == before


def test_a_freeze_after_the_steps_there_are_is_refused_once_the_batches_are_counted():
    module = Plain()
    before = copy.deepcopy(module.net.fc.weight)
    with pytest.raises(ConfigurationError, match=r"`freeze_bn=When\(step=12\)` is never reached: training ends after 12 steps"):
        fit(qat(freeze_bn=When(step=12)), module)
    assert torch.equal(module.net.fc.weight, before)


@pytest.mark.parametrize("trainer", [{"max_epochs": 0}, {"limit_train_batches": 0}], ids=["no epoch", "no batch"])
@pytest.mark.filterwarnings("ignore:.*limit_train_batches=0")
def test_qat_without_training(trainer):
    with pytest.raises(CalibrationError, match=r"module 'net': the observer .* has seen no data .* at least one batch"):
        fit(qat(), **trainer)


def test_stochastic_weight_averaging_with_frozen_statistics():
    averaging, started = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1), Started()
    with pytest.raises(ConfigurationError, match="StochasticWeightAveraging"):
        fit(qat(freeze_bn=When(epoch=1)), watching=[averaging, started], max_epochs=3)
    assert not started.yes


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("recipe", ["qat", "ptq", "dynamic"])
def test_precisions_that_cannot_quantize(precision, recipe):
    trainer = Trainer(**QUIET, precision=precision)
    with pytest.raises(ConfigurationError, match=r"precision='(bf16|16|64)-true' is not supported.*Use"):
        QuantizationCallback(recipe).setup(trainer, Plain(), "fit")


class ShardedOnCPU(FSDPStrategy):
    """Lightning wants a GPU for FSDPStrategy itself."""


class DeepSpeedOfNoPackage(DeepSpeedStrategy):
    """Lightning wants the package for DeepSpeedStrategy itself."""

    def __init__(self):
        DDPStrategy.__init__(self)

    setup_environment, setup_distributed = DDPStrategy.setup_environment, DDPStrategy.setup_distributed


CHILDREN = r"DDPStrategy with start_method='{}' is not supported.*strategy='ddp'"
STRATEGIES = {
    "ddp_spawn": ("ddp_spawn", CHILDREN.format("spawn")),
    "ddp_fork": ("ddp_fork", CHILDREN.format("fork")),
    "ddp_notebook": ("ddp_notebook", CHILDREN.format("fork")),
    "fsdp": (ShardedOnCPU, r"ShardedOnCPU is not supported.*whole on each device.*strategy='ddp'"),
    "deepspeed": (DeepSpeedOfNoPackage, r"DeepSpeedOfNoPackage is not supported.*strategy='ddp'"),
    "model parallel": (ModelParallelStrategy, r"ModelParallelStrategy is not supported.*strategy='ddp'"),
}


@pytest.fixture
def own_processes():
    """Undo what a launcher leaves behind in this process."""
    with patch.dict(os.environ):
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.sampled
@pytest.mark.parametrize(("strategy", "message"), STRATEGIES.values(), ids=STRATEGIES)
def test_strategies_that_cannot_quantize(strategy, message, own_processes):
    started = Started()
    # A child process hands its error on as text.
    with pytest.raises((ConfigurationError, ProcessRaisedException), match=f"(?s){message}"):
        fit(QuantizationCallback("qat"), watching=[started], devices=1, strategy=strategy if isinstance(strategy, str) else strategy())
    assert not started.yes


def test_a_backend_that_torch_lacks(monkeypatch):
    monkeypatch.setattr("qat_lightning.backend.supported_backends", lambda: ("fbgemm",))
    with pytest.raises(ConfigurationError, match=r"Backend 'qnnpack' is not part of this build of torch.*\('fbgemm',\)"):
        fit(qat(backend="qnnpack"))


# --- at the end of a fit ---------------------------------------------------------------------------------------------------------


class Infinite(Images):
    def calibration_dataloader(self):
        return [(torch.full((4, 1, 8, 8), torch.inf), torch.zeros(4).long())]


class Empty(Images):
    def calibration_dataloader(self):
        return []


@pytest.mark.parametrize(
    ("calibration", "data", "message"),
    [
        ([(torch.full_like(IMAGES, torch.nan), LABELS)], None, "Calibration batch 0 holds NaN or infinite"),
        ([(IMAGES, LABELS), (IMAGES / 0, LABELS)], None, "Calibration batch 1 holds NaN or infinite"),
        (None, Infinite(), "Calibration batch 0 holds NaN or infinite"),
        (None, Empty(), "no batch"),
    ],
    ids=["nan", "inf in the second", "inf from the datamodule", "empty from the datamodule"],
)
def test_calibration_data_that_teaches_nothing(calibration, data, message):
    callback = QuantizationCallback("ptq", calibration_data=calibration)
    with pytest.raises(CalibrationError, match=message):
        fit(callback, data=data, max_epochs=0)
    with pytest.raises(QuantizationError, match="no quantized module yet"):
        _ = callback.quantized_module


@pytest.mark.parametrize("flow", ["fx", "eager"])
@pytest.mark.parametrize("first", [0, 3])
def test_a_network_that_diverged(flow, first):
    class Diverging(Plain):
        def training_step(self, batch, batch_idx):
            images = batch[0] * torch.nan if batch_idx >= first else batch[0]
            return super().training_step((images, batch[1]), batch_idx)

    with pytest.raises(QuantizationError, match=r"'net'.*NaN or infinite"):
        fit(qat(flow=flow), Diverging(), max_epochs=1)


class Parts(ModuleNet):
    """Called by its parts alone, past forward."""

    def features(self, x):
        return self.relu1(self.bn1(self.conv1(x)))


class ByParts(Plain):
    def __init__(self):
        super().__init__(Parts())

    def training_step(self, batch, batch_idx):
        return self.net.features(batch[0]).mean()

    def validation_step(self, batch, batch_idx):
        self.net.features(batch[0])


@pytest.mark.parametrize(
    ("flow", "message"),
    [("fx", "one graph of Parts.forward, so its method 'features' is gone.*`modules`"), ("eager", "has seen no data")],
)
def test_a_module_that_is_called_by_other_methods(flow, message):
    with pytest.raises(QuantizationError, match=message):
        fit(qat(flow=flow), ByParts(), max_epochs=1)
    fit(QuantizationCallback(QAT(flow=flow), modules=["net.conv1"]), ByParts(), max_epochs=1)


def test_a_reference_past_the_module_is_told():
    class Kept(Plain):
        def __init__(self):
            super().__init__()
            self.kept = [self.net]

        def training_step(self, batch, batch_idx):
            return self.kept[0](batch[0]).mean()

    with pytest.raises(CalibrationError, match=r"Nothing of it was run: .* a reference kept elsewhere"):
        fit(qat(calibration_batches=0), Kept(), max_epochs=1)


@pytest.mark.parametrize("modules", [["net.fc"], ["net"]], ids=str)
def test_callbacks_whose_modules_overlap(modules):
    second = QuantizationCallback("qat", modules)
    first = QuantizationCallback("qat", ["net"] if modules == ["net.fc"] else ["net.fc"])
    with pytest.raises(ConfigurationError, match=r"overlap: 'net(\.fc)?', of `modules`, and 'net(\.fc)?', which another"):
        fit(first, watching=[second])


def test_a_part_that_never_runs():
    class Half(ModuleNet):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(4, 4)

        def forward(self, x, spare: bool = False):
            return self.spare(super().forward(x)) if spare else super().forward(x)

    with pytest.raises(CalibrationError, match=r"observer 'spare\.activation_post_process' has seen no data.*`overrides`"):
        fit(qat(flow="eager"), Plain(Half()), max_epochs=1)


# --- functions ---------------------------------------------------------------------------------------------------------------

FUNCTIONS = {
    "convert unprepared": (lambda _: convert(ModuleNet()), ConfigurationError, "ModuleNet was not prepared: call prepare"),
    "prepare for dynamic": (lambda _: prepare(ModuleNet(), "dynamic"), ConfigurationError, r"quantize_dynamic\(module, recipe\)"),
    "prepare by another name": (lambda _: prepare(ModuleNet(), "fp4"), ValueError, "`recipe`.*'fp4'"),
    "dynamic with qat": (lambda _: quantize_dynamic(ModuleNet(), "qat"), ConfigurationError, "Expected a DynamicPTQ recipe, but got QAT"),
    "nothing to prepare": (lambda _: prepare(nn.ReLU(), "qat"), ConfigurationError, "Nothing to quantize"),
    "transposed alone": (lambda _: prepare(nn.ConvTranspose2d(1, 1, 2), "ptq"), ConfigurationError, "Nothing to quantize"),
    "untraceable": (lambda _: prepare(BranchingNet(), "qat"), UnsupportedModelError, r"nets\.py:\d+: \"if x.*flow='eager'"),
    "convert uncalibrated": (lambda _: convert(prepare(ModuleNet(), "ptq")), CalibrationError, "has seen no data"),
    "calibrate unprepared": (lambda _: calibrate(ModuleNet(), [IMAGES]), ConfigurationError, "was not prepared"),
    "calibrate on nothing": (lambda _: calibrate(prepare(ModuleNet(), "ptq"), iter([])), CalibrationError, "no batch"),
    "calibrate on nan": (lambda _: calibrate(prepare(ModuleNet(), "ptq"), [IMAGES * torch.nan]), CalibrationError, "batch 0 holds NaN"),
    "save float": (lambda folder: save_quantized(ModuleNet(), folder / "a"), ArtifactError, "holds no int8 module"),
}


@pytest.mark.parametrize(("run", "error", "message"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_wrong_uses_of_functions(run, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run(tmp_path)


def test_every_error_has_one_base_and_says_what_to_do():
    for error in (ConfigurationError, UnsupportedModelError, CalibrationError, ArtifactError):
        assert issubclass(error, QuantizationError) and issubclass(error, RuntimeError)
    assert issubclass(ConfigurationError, ValueError)
    with pytest.raises(QuantizationError) as caught:
        fit(QuantizationCallback("qat", ["nett"]))
    assert re.search(r"Names are e\.g\.", str(caught.value)) and "\n" not in str(caught.value)
