import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging

from qat_lightning import QAT, ConfigurationError, QuantizationCallback, When
from qat_lightning.observers import fake_quants
from tests.nets import QUIET, Images, ModuleNet, Plain, fit
from tests.test_callback import IMAGES, same

DECAY = 0.8


class Ordered(Images):
    train_dataloader = Images.loader


class ByHand(Callback):
    """The same average of the parameters, in plain arithmetic."""

    def __init__(self):
        self.average = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        current = {name: tensor.detach().clone() for name, tensor in pl_module.named_parameters()}
        if self.average is None:
            self.average = current
        else:
            self.average = {name: DECAY * tensor + (1 - DECAY) * current[name] for name, tensor in self.average.items()}


class Deterministic(ModuleNet):
    def __init__(self):
        super().__init__()
        self.drop.p = 0.0


def averaged(flow, first, ckpt_path=None, **trainer):
    seed_everything(1)
    quantization, ema = QuantizationCallback(QAT(flow=flow, start=When(step=2)), parity="error"), EMAWeightAveraging(decay=DECAY)
    callbacks = [ema, quantization] if first == "average" else [quantization, ema]
    arguments = {"max_epochs": 2, **QUIET, **trainer, "callbacks": [*callbacks, *trainer.get("callbacks", [])]}
    module = Plain(Deterministic())
    trained = Trainer(**arguments)
    trained.fit(module, Ordered(), ckpt_path=ckpt_path, weights_only=True)
    return module, quantization, trained


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
@pytest.mark.parametrize("first", ["average", "quantization"])
def test_averaged_weights_are_converted(flow, first):
    by_hand = ByHand()
    module, quantization, _ = averaged(flow, first, callbacks=[by_hand])
    for name, tensor in module.named_parameters():
        torch.testing.assert_close(tensor.detach(), by_hand.average[name])
    fc = dict(quantization.quantized_module.net.named_modules())["fc"]
    # A weight that is rounded is at most half a step off, a channel's step its largest weight / 127.
    half_step = by_hand.average["net.fc.weight"].abs().amax() / 127 / 2
    assert (fc.weight().dequantize() - by_hand.average["net.fc.weight"]).abs().max() <= 1.001 * half_step


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_the_order_of_the_callbacks_does_not_matter(flow):
    (one, _, _), (other, _, _) = averaged(flow, "average"), averaged(flow, "quantization")
    assert same(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_ranges_are_those_of_training(flow):
    class Ranges(Callback):
        def on_validation_start(self, trainer, pl_module):
            self.trained = copy.deepcopy([dict(quant.named_buffers()) for quant in self.activations(pl_module)])

        def on_validation_batch_start(self, trainer, pl_module, *_):
            for before, quant in zip(self.trained, self.activations(pl_module), strict=True):
                assert same(before, dict(quant.named_buffers()))
            self.checked = not trainer.sanity_checking

        @staticmethod
        def activations(pl_module):
            return [quant for quant in fake_quants(pl_module) if not hasattr(quant, "measure")]

    ranges = Ranges()
    averaged(flow, "quantization", callbacks=[ranges], limit_val_batches=1)
    assert ranges.checked


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])
def test_an_averaged_run_resumes_exactly(flow, tmp_path):
    def options():
        checkpoint = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        return {"enable_checkpointing": True, "max_epochs": 3, "callbacks": [checkpoint]}

    whole, _, _ = averaged(flow, "average", **options())
    resumed, _, _ = averaged(flow, "average", ckpt_path=tmp_path / "epoch=1.ckpt", **options())
    assert same(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("first", ["average", "quantization"])
def test_stochastic_averages_without_frozen_bn(first):
    seed_everything(1)
    quantization, average = QuantizationCallback(QAT(freeze_bn=None), parity="error"), StochasticWeightAveraging(1e-3)
    callbacks = [quantization, average] if first == "quantization" else [average, quantization]
    module = Plain()
    Trainer(max_epochs=3, callbacks=callbacks, **QUIET).fit(module, Images())
    torch.testing.assert_close(quantization.quantized_module.net(IMAGES), module.net.eval()(IMAGES), atol=0.1, rtol=0)


def test_stochastic_averages_with_frozen_bn_are_refused():
    with pytest.raises(ConfigurationError, match="StochasticWeightAveraging measures BatchNorm's statistics anew"):
        fit(QuantizationCallback("qat"), watching=[StochasticWeightAveraging(1e-3)])
