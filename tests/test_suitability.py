import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from qat_lightning import (
    QAT,
    ConfigurationError,
    QuantizationCallback,
    StaticPTQ,
    UnsupportedModelError,
    calibrate,
    convert,
    load_float_weights,
    load_quantized,
    measure_parity,
    prepare,
    save_quantized,
)
from qat_lightning.observers import apply_phase
from qat_lightning.schedule import IDLE, Phase
from tests.nets import Images, Plain, fit

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FLOWS = pytest.mark.parametrize("flow", ["fx", "eager"])

LAYERS = {
    "PReLU": nn.PReLU,
    "PReLU of channels": lambda: nn.PReLU(8),
    "ELU": nn.ELU,
    "LeakyReLU": nn.LeakyReLU,
    "Hardswish": nn.Hardswish,
    "Sigmoid": nn.Sigmoid,
    "Softmax": lambda: nn.Softmax(1),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "InstanceNorm": lambda: nn.InstanceNorm2d(8, affine=True),
    "BatchNorm without scale and shift": lambda: nn.BatchNorm2d(8, affine=False),
    "same padding": lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2),
    "valid padding": lambda: nn.Conv2d(8, 8, 3, padding="valid"),
    "reflected padding": lambda: nn.Conv2d(8, 8, 3, padding="same", padding_mode="reflect"),
}


class Around(nn.Module):
    """A layer between a convolution and a linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.conv, self.layer, self.pool, self.fc = nn.Conv2d(1, 8, 3, padding=1), layer, nn.AdaptiveAvgPool2d(2), nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.layer(self.conv(x))), 1))


def trained(net, recipe):
    prepared = prepare(net, recipe).train()
    apply_phase(prepared, Phase(fake_quant=True, observers=True, bn_frozen=False))
    for _ in range(2):
        prepared(IMAGES)
    apply_phase(prepared.eval(), IDLE)
    return prepared


@pytest.mark.sampled
@FLOWS
@pytest.mark.parametrize("recipe", [QAT, StaticPTQ])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_of_torch_are_simulated_converted_and_loaded(layer, recipe, flow, tmp_path):
    net = Around(layer()).eval()
    recipe = recipe(flow=flow)
    prepared = trained(net, recipe) if isinstance(recipe, QAT) else calibrate(prepare(net, recipe), [IMAGES])
    int8 = convert(prepared)
    assert max(entry.max_steps for entry in measure_parity(prepared, int8, [IMAGES])) <= 1
    with torch.no_grad():
        expected = int8(IMAGES)
        assert torch.equal(load_quantized(save_quantized(int8, tmp_path / "int8"), Around(layer()))(IMAGES), expected)
        if isinstance(recipe, StaticPTQ):
            assert (expected - net(IMAGES)).abs().max() < 0.1 * net(IMAGES).abs().max()


@FLOWS
def test_what_was_added_to_batch_norm_stays_out_of_training(flow):
    net = Around(nn.BatchNorm2d(8, affine=False))
    prepared = prepare(net, QAT(flow=flow))
    assert sum(p.numel() for p in prepared.parameters() if p.requires_grad) == sum(p.numel() for p in net.parameters())
    prepared.load_state_dict(net.state_dict())  # the names of the float network still fit


REFUSED = {
    "circular padding": (lambda: nn.Conv2d(8, 8, 3, padding_mode="circular"), r"'layer' has padding_mode='circular'.*'layer': None"),
    "uneven padding": (lambda: nn.Conv2d(8, 8, 4, padding="same"), r"'layer' has padding='same' with kernel size \(4, 4\)"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), r"weight of 'layer' is computed from \['original0'"),
    "no running statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), "'layer' is a BatchNorm2d with track_running_stats"),
}


@FLOWS
@pytest.mark.parametrize(("layer", "message"), REFUSED.values(), ids=REFUSED)
def test_layers_that_cannot_be_quantized_are_named(layer, message, flow):
    with pytest.raises(ConfigurationError, match=message):
        prepare(Around(layer()), QAT(flow=flow))


@FLOWS
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("name", ["circular padding", "uneven padding"])
def test_they_may_stay_float(name, flow):
    net = Around(REFUSED[name][0]()).eval()
    prepared = calibrate(prepare(net, StaticPTQ(flow=flow, overrides={"layer": None})), [IMAGES])
    assert max(entry.max_steps for entry in measure_parity(prepared, convert(prepared), [IMAGES])) <= 1


class Swish(nn.Module):
    def forward(self, x):
        return nn.functional.hardswish(x)


@FLOWS
@pytest.mark.parametrize("layer", [nn.Hardswish, nn.LeakyReLU, lambda: nn.LayerNorm([8, 8, 8]), Swish])
def test_a_module_without_weights_that_is_to_stay_float_does(layer, flow):
    prepared = calibrate(prepare(Around(layer()).eval(), StaticPTQ(flow=flow, overrides={"layer": None})), [IMAGES])
    int8, seen = convert(prepared), []
    assert type(int8.layer) is type(layer())
    int8.layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    int8(IMAGES)
    assert len(seen) == 1 and not seen[0].is_quantized


class Spare(Plain):
    """A layer that forward never calls, as pretrained networks have."""

    def __init__(self):
        super().__init__(Around(nn.ReLU()))
        self.net.spare = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize("recipe", [QAT(), QAT(flow="eager", overrides={"spare": None})], ids=["fx", "eager"])
def test_checkpoints_know_layers_that_are_never_called(recipe, tmp_path):
    original = Spare()
    torch.save(original.state_dict(), tmp_path / "float.pt")
    callback = QuantizationCallback(recipe, init_from=tmp_path / "float.pt")
    module, trainer = fit(callback, Spare(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    module.load_state_dict(original.state_dict())
    trainer.test(Spare(), Images(), ckpt_path=tmp_path / "qat.ckpt", verbose=False)
    back = Spare()
    load_float_weights(back, tmp_path / "qat.ckpt")
    assert torch.equal(back.net.spare[0].weight, original.net.spare[0].weight)
    assert callback.quantized_module.net(IMAGES).shape == (8, 4)


class OwnLinear(nn.Linear):
    pass


class Chunked(nn.Module):
    def forward(self, x):
        one, two = x.chunk(2, 1)
        return torch.cat([nn.functional.relu(one), torch.split(two, 2, 1)[0], two], 1)[:, :8]


def functional():
    net = Around(nn.Conv2d(8, 8, 1))
    net.fc = OwnLinear(32, 4)
    return net


@pytest.mark.parametrize("recipe", [QAT(), StaticPTQ()], ids=["qat", "ptq"])
def test_functions_with_weights_stay_float(recipe, tmp_path, caplog):
    callback = QuantizationCallback(recipe)
    fit(callback, Plain(functional()), max_epochs=1)
    assert callback.report.quantized_modules == 2 and callback.report.parity_passed
    assert "stay in float, from 'linear' at" in caplog.text
    loaded = load_quantized(save_quantized(callback.quantized_module, tmp_path / "int8"), Plain(functional()))
    assert torch.equal(loaded.net(IMAGES), callback.quantized_module.net(IMAGES))


@pytest.mark.parametrize("recipe", [QAT(), StaticPTQ()], ids=["qat", "ptq"])
def test_parts_of_a_tensor(recipe):
    callback = QuantizationCallback(recipe)
    fit(callback, Plain(Around(Chunked())), max_epochs=1)
    assert callback.report.parity_passed


@FLOWS
def test_ranges_of_qat_without_training(flow):
    net = Around(nn.ReLU()).eval()
    prepared = calibrate(prepare(net, QAT(flow=flow)), [IMAGES])
    with torch.no_grad():
        assert (convert(prepared)(IMAGES) - net(IMAGES)).abs().max() < 0.05 * net(IMAGES).abs().max()


def test_a_star_in_the_signature_is_named():
    class Star(Around):
        def forward(self, *xs):
            return super().forward(xs[0])

    with pytest.raises(UnsupportedModelError, match=r"Star\.forward, which takes \*args.*flow='eager'"):
        prepare(Star(nn.ReLU()), QAT())
    assert prepare(Star(nn.ReLU()), QAT(flow="eager")) is not None
