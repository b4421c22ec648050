import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import nn
from torch.nn.utils import prune

from qat_lightning import QAT, ConfigurationError, QuantizationCallback
from tests.nets import QUIET, ModuleNet, Plain, fit
from tests.test_averaging import Deterministic, Ordered
from tests.test_callback import same


def zeros(net):
    return {name: tensor == 0 for name, tensor in net.state_dict().items() if tensor.dim() > 1}


def pruned(**arguments):
    """Return a module after a float fit that has pruned half of its convolutions' weights."""
    module = Plain()
    parameters = [(module.net.conv1, "weight"), (module.net.conv2, "weight")]
    fit(ModelPruning("l1_unstructured", parameters_to_prune=parameters, amount=0.5, **arguments), module)
    return module


@pytest.mark.parametrize("flow", ["fx", "eager"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_of_a_pruned_network_are_kept(flow, optimizer):
    class Trained(Plain):
        def configure_optimizers(self):
            return optimizer(self.parameters(), lr=0.01, weight_decay=0.01)

    module = Trained(pruned().net)
    before = zeros(module.net)
    callback = QuantizationCallback(QAT(flow=flow))
    fit(callback, module)
    after = {name: tensor == 0 for name, tensor in module.net.state_dict().items() if name in before}
    assert sum(int(mask.sum()) for mask in before.values()) > 250
    assert all(torch.equal(after[name], mask) for name, mask in before.items())
    int8 = dict(callback.quantized_module.net.named_modules())["conv2"].weight().int_repr()
    assert (int8[before["conv2.weight"]] == 0).all()


def test_zeros_learn_again_when_told_to():
    module = pruned()
    before = zeros(module.net)["conv2.weight"]
    fit(QuantizationCallback(QAT(keep_zeros=False)), module)
    assert (module.net.conv2.weight[before] != 0).any()


def test_a_weight_that_begins_at_zero_is_not_pruned():
    module = Plain()
    nn.init.zeros_(module.net.fc.weight)
    fit(QuantizationCallback("qat"), module)
    assert (module.net.fc.weight != 0).any()


def test_zeros_are_kept_in_training_only():
    module = pruned()
    fit(QuantizationCallback("qat"), module)
    assert not module.net.conv1.weight._backward_hooks


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_a_resumed_run_keeps_the_zeros_it_began_with(flow, tmp_path):
    """Half of a layer that begins at zero learns only after the checkpoint: its zeros are not those of pruning."""

    class Slow(Plain):
        def on_before_optimizer_step(self, optimizer):
            if self.trainer.current_epoch == 0:
                self.net.fc.weight.grad[0] = 0

    def build():
        seed_everything(1)
        module = Slow(Deterministic())
        with torch.no_grad():
            module.net.fc.weight.zero_()
            module.net.conv2.weight[:, :2] = 0
        return module

    first = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, _ = fit(QuantizationCallback(QAT(flow=flow)), build(), Ordered(), [first], enable_checkpointing=True)
    resumed = build()
    trainer = Trainer(**{**QUIET, "max_epochs": 2, "callbacks": [QuantizationCallback(QAT(flow=flow))]})
    trainer.fit(resumed, Ordered(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert (whole.net.fc.weight[0] != 0).any() and (whole.net.conv2.weight[:, :2] == 0).all()
    assert same(whole.state_dict(), resumed.state_dict())


def test_pruning_in_the_same_fit_is_refused():
    with pytest.raises(ConfigurationError, match="Prune in a fit before"):
        fit(QuantizationCallback("qat"), watching=[ModelPruning("l1_unstructured", amount=0.5)])


@pytest.mark.parametrize("hook", [lambda layer: prune.l1_unstructured(layer, "weight", 0.5), nn.utils.spectral_norm])
def test_weights_that_a_hook_computes_are_refused(hook):
    net = ModuleNet()
    hook(net.conv1)
    with pytest.raises(ConfigurationError, match=r"weight of 'net\.conv1' is computed from .*'weight_orig'"):
        fit(QuantizationCallback("qat"), Plain(net))
