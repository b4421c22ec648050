"""torch.compile before and after quantization; the backend eager traces, and compiles nothing."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch._dynamo import OptimizedModule

from qat_lightning import (
    QAT,
    CheckpointError,
    QuantizationCallback,
    StaticPTQ,
    adopt_checkpoints,
    calibrate,
    convert,
    load_float_weights,
    prepare,
    quantize_dynamic,
)
from qat_lightning.checkpoint import load_into_built
from tests.nets import QUIET, Images, ModuleNet, Plain, fit
from tests.test_callback import IMAGES, Late, same

pytestmark = [
    # Said by the compiler while it traces, whatever it traces.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
FLOWS = pytest.mark.parametrize("flow", ["fx", "eager"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def compiled(module):
    return torch.compile(module, backend="eager")


def wrapped_child():
    module = Plain()
    module.net = compiled(module.net)
    return module


def wrapped_grandchild():
    net = ModuleNet()
    net.conv1 = compiled(net.conv1)
    return Plain(net)


def compiled_in_place():
    module = Plain()
    module.net.compile(backend="eager")
    return module


def compiled_part_in_place():
    module = Plain()
    module.net.conv1.compile(backend="eager")
    return module


class CompiledLate(Late):
    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            super().configure_model()
            self.net = compiled(self.net)


WAYS = pytest.mark.parametrize(
    "make", [wrapped_child, wrapped_grandchild, compiled_in_place, compiled_part_in_place, CompiledLate, lambda: compiled(Plain())]
)


@pytest.mark.sampled
@FLOWS
@WAYS
@pytest.mark.parametrize("recipe", [QAT, StaticPTQ])
def test_a_compiled_module_is_quantized(make, recipe, flow, caplog):
    torch.manual_seed(0)
    module, callback = make(), QuantizationCallback(recipe(flow=flow))
    trainer = Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    trainer.fit(module, Images())
    assert "runs without torch.compile from now on" in caplog.text
    assert callback.report.quantized_modules == 4 and callback.report.parity_passed
    assert not any(isinstance(child, OptimizedModule) for child in callback.quantized_module.modules())
    trainer.test(callback.quantized_module, Images())


@FLOWS
def test_uncompiled_training_is_the_same(flow):
    torch.manual_seed(0)
    plain, wrapped = Plain(), wrapped_child()
    wrapped.load_state_dict({name.replace("net.", "net._orig_mod."): value for name, value in plain.state_dict().items()})
    for module in (plain, wrapped):
        torch.manual_seed(1)
        fit(QuantizationCallback(QAT(flow=flow)), module, max_epochs=2)
    assert same(plain.state_dict(), wrapped.state_dict())


@FLOWS
def test_what_quantization_returns_can_be_compiled(flow):
    module, callback = Plain(), QuantizationCallback(QAT(flow=flow))
    _, trainer = fit(callback, module, max_epochs=1)
    for net in (module.net.eval(), callback.quantized_module.net):
        expected = net(IMAGES)
        assert torch.equal(compiled(net)(IMAGES), expected)
    (plain,) = trainer.test(callback.quantized_module, Images())
    (whole,) = Trainer(**QUIET).test(compiled(callback.quantized_module), Images())
    assert plain == whole


@FLOWS
def test_a_trained_module_is_compiled_and_trained_further(flow):
    module, callback = Plain(), QuantizationCallback(QAT(flow=flow))
    fit(callback, module, max_epochs=1)
    module.net = compiled(module.net)
    Trainer(max_epochs=1, callbacks=[callback], **QUIET).fit(compiled(module), Images())
    assert callback.report.quantized_modules == 4 and callback.report.parity_passed


@FLOWS
def test_checkpoints_of_compiled_and_of_plain_modules_fit_each_other(flow, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="float")
    source, _ = fit(saving, wrapped_child(), enable_checkpointing=True, max_epochs=1)
    assert any("_orig_mod" in name for name in source.state_dict())
    quantized, callback = wrapped_child(), QuantizationCallback(QAT(flow=flow))
    saving = ModelCheckpoint(tmp_path, filename="qat")
    trainer = Trainer(max_epochs=1, **{**QUIET, "enable_checkpointing": True}, callbacks=[callback, saving])
    trainer.fit(quantized, Images(), ckpt_path=tmp_path / "float.ckpt")
    assert callback.report.parity_passed
    for name in ("float.ckpt", "qat.ckpt"):
        plain, wrapped = Plain(), wrapped_child()
        load_float_weights(plain, tmp_path / name)
        load_into_built(wrapped, tmp_path / name)
        assert same(plain.net.state_dict(), wrapped.net._orig_mod.state_dict())
    adopted = adopt_checkpoints(wrapped_child())
    Trainer(**QUIET).test(adopted, Images(), ckpt_path=tmp_path / "qat.ckpt")
    assert same(adopted.state_dict(), quantized.state_dict())


@FLOWS
def test_functions_take_compiled_modules(flow):
    batches = [IMAGES]
    plain, wrapped = ModuleNet().eval(), compiled(ModuleNet().eval())
    wrapped._orig_mod.load_state_dict(plain.state_dict())
    recipe = StaticPTQ(flow=flow)
    expected = convert(calibrate(prepare(plain, recipe), batches))(IMAGES)
    assert torch.equal(convert(compiled(calibrate(prepare(wrapped, recipe), batches)))(IMAGES), expected)
    assert isinstance(wrapped, OptimizedModule)
    linear = nn.Sequential(nn.Linear(4, 4)).eval()
    data = torch.randn(3, 4)
    assert torch.equal(quantize_dynamic(compiled(linear))(data), quantize_dynamic(linear)(data))


def test_a_plan_for_another_network_is_refused(tmp_path):
    fit(QuantizationCallback("qat"), max_epochs=1, watching=[ModelCheckpoint(tmp_path, filename="qat")], enable_checkpointing=True)
    other = adopt_checkpoints(Plain(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))))
    with pytest.raises(CheckpointError, match="written for a network unlike Sequential"):
        Trainer(**QUIET).test(other, Images(), ckpt_path=tmp_path / "qat.ckpt")
