"""The float model as teacher of its quantized self."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from qat_lightning import QAT, ConfigurationError, QuantizationCallback, When
from qat_lightning.distillation import Distillation
from tests.nets import QUIET, Disturb, Images, ManyInputs, Plain, fit
from tests.test_callback import same
from tests.test_warm_start import FIXED, Still, trained_net, untrained_net

FLOWS = pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])


class Mislabelled(Still):
    """Every label is wrong."""

    def __init__(self, **options):
        super().__init__(**options)
        self.labels = (self.labels + 1) % 4


def students(flow, share, data=None, module=None, seed=1, watching=(), **trainer):
    """Train a net that was trained in float; return the module and its distance from the float net on the training images."""
    net = trained_net()
    images = Still().images
    expected = copy.deepcopy(net).eval()(images)
    module = module or Plain(lr=0.02)
    module.net = net.train()
    seed_everything(seed)
    recipe = QAT(flow=flow, distillation=share, per_channel=False, activation_bits=7, **FIXED)  # much to learn
    callback = QuantizationCallback(recipe)
    fit(callback, module, data or Still(), watching, **{"max_epochs": 3, **trainer})
    with torch.no_grad():
        return module, float((module.net.eval()(images) - expected).square().mean())


@given(share=st.floats(0, 1), scale=st.floats(0.01, 100), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_gradient_is_a_blend(share, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = nn.Linear(3, 2).train(), nn.Linear(3, 2)
    for layer in (student, teacher):
        layer.weight.data.normal_(generator=generator)
    x = torch.randn(5, 3, generator=generator)
    blended = Distillation({"net": student}, {"net": teacher}, share, lambda: scale)
    (scale * student(x).square().sum()).backward()
    blended.stop()
    got, student.weight.grad = student.weight.grad, None
    output, wanted = student(x), teacher(x).detach()
    loss = (1 - share) * output.square().sum() + share * (output - wanted).square().mean() / wanted.square().mean()
    (scale * loss).backward()
    # In single precision, of gradients that may cancel.
    largest = (scale * (1 + 1 / wanted.square().mean()) * (1 + output.detach().abs().max()) * x.abs().sum()).item()
    torch.testing.assert_close(got, student.weight.grad, rtol=1e-4, atol=1e-6 * largest)


@FLOWS
def test_the_teacher_needs_no_labels(flow):
    taught, near = students(flow, 1.0)
    mistaught, also_near = students(flow, 1.0, Mislabelled())
    assert same(taught.state_dict(), mistaught.state_dict())
    _, far = students(flow, 0.0, Mislabelled())
    assert also_near == near < far / 10


class Unlabelled(Still):
    """Images alone."""

    def loader(self):
        return DataLoader(self.images, batch_size=self.batch_size)

    val_dataloader = loader


class WithoutLoss(Plain):
    """Runs the network, and has nothing to compare the output with."""

    def training_step(self, batch, batch_idx):
        return 0 * self.net(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.net(batch)

    def predict_step(self, batch, batch_idx=0):
        return self.net(batch)


@FLOWS
def test_without_labels_it_learns_the_same(flow):
    labelled, _ = students(flow, 1.0, watching=[Disturb()])
    unlabelled, _ = students(flow, 1.0, Unlabelled(), WithoutLoss(lr=0.02), watching=[Disturb()])
    assert same(labelled.net.state_dict(), unlabelled.net.state_dict())
    assert not torch.equal(unlabelled.net.fc.weight, trained_net().fc.weight)


@FLOWS
def test_the_student_learns(flow):
    (_, before), (_, after) = (students(flow, 1.0, module=Plain(lr=lr), watching=[Disturb()], max_epochs=5) for lr in (0.0, 0.003))
    assert after < before / 3


def test_gradient_accumulation_is_a_larger_batch():
    whole, _ = students("fx", 1.0, Still(batch_size=32), watching=[Disturb()], max_epochs=1)
    parts, _ = students("fx", 1.0, Still(batch_size=16), watching=[Disturb()], max_epochs=1, accumulate_grad_batches=2)
    start = trained_net().fc.weight.detach()
    moved = (whole.net.fc.weight - start).detach().abs().max()
    assert moved > 1e-4
    torch.testing.assert_close(whole.net.fc.weight, parts.net.fc.weight, rtol=0, atol=0.2 * float(moved))


class ByHand(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}], ids=str)
def test_distillation_and_what_else_trainers_do(options):
    _, near = students("fx", 1.0, Mislabelled(), **options)
    _, far = students("fx", 0.0, Mislabelled(), **options)
    assert near < far / 5


def test_manual_optimization():
    _, near = students("fx", 1.0, Mislabelled(), ByHand())
    _, far = students("fx", 0.0, Mislabelled(), ByHand())
    assert near < far / 10


class Structured(Plain):
    """Mapping and tuple out, token ids in."""

    def __init__(self):
        super().__init__(ManyInputs())
        self.example_input_array = {"x": torch.randn(2, 5, 8), "ids": torch.ones(2, 5, dtype=torch.long), "mask": torch.ones(2, 5, 8)}

    def forward(self, x, ids, mask):
        return self.net(x, ids, mask=mask)

    def training_step(self, batch, batch_idx):
        x, ids = batch[0].flatten(1)[:, :40].reshape(-1, 5, 8), torch.ones(len(batch[0]), 5, dtype=torch.long)
        out = self.net(x, ids, mask=torch.ones(len(x), 5, 8))
        return out["logits"].square().mean() + out["rest"][0].square().mean()

    validation_step = training_step


def test_any_signature():
    module = Structured()
    callback = QuantizationCallback(QAT(distillation=0.5))
    fit(callback, module, max_epochs=2)
    assert callback.report.parity_passed


@FLOWS
def test_a_resumed_run_has_its_teacher(flow, tmp_path):
    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    recipe = QAT(flow=flow, distillation=1.0, **FIXED)
    whole = Plain(trained_net(), lr=0.02)
    fit(QuantizationCallback(recipe), whole, Still(), [Save()], max_epochs=2)
    resumed = Plain(untrained_net(), lr=0.02)
    Trainer(max_epochs=2, callbacks=[QuantizationCallback(recipe)], **QUIET).fit(
        resumed, Still(), ckpt_path=tmp_path / "one.ckpt", weights_only=True
    )
    assert same(whole.state_dict(), resumed.state_dict())


@FLOWS
def test_the_teacher_is_the_net_as_it_is_when_fake_quant_begins(flow):
    class Teachers(Callback):
        def on_train_end(self, trainer, pl_module):
            (callback,) = (other for other in trainer.callbacks if isinstance(other, QuantizationCallback))
            (self.teacher,) = callback.state_dict()["teachers"].values()

    module, watch = Plain(), Teachers()
    start = module.net.fc.weight.clone()
    recipe = QAT(flow=flow, distillation=1.0, start=When(epoch=1), freeze_observers=When(epoch=2))
    fit(QuantizationCallback(recipe), module, watching=[watch], max_epochs=3)
    assert not torch.equal(watch.teacher["fc.weight"], start)
    assert not torch.equal(watch.teacher["fc.weight"], module.net.fc.weight)


def test_without_a_float_model_there_is_no_teacher():
    module, _ = fit(QuantizationCallback("qat"), max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"\['net'\] were prepared by another callback.*`distillation=0`"):
        Trainer(max_epochs=1, callbacks=[QuantizationCallback(QAT(distillation=0.5))], **QUIET).fit(module, Images())


def test_nothing_is_left_behind():
    module, _ = students("fx", 1.0, max_epochs=1)
    assert not any("Distillation" in str(hook) for hook in module.net._forward_hooks.values())
