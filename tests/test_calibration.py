"""Calibration through the public functions and the callback: its methods, single layers, and batches of every kind."""

from collections import UserDict

import pytest
import torch
from torch import nn

from qat_lightning import QAT, CalibrationError, QuantizationCallback, StaticPTQ, When, calibrate, convert, prepare
from qat_lightning.recipe import OBSERVERS
from tests.nets import ModuleNet, Plain, fit

FLOWS = pytest.mark.parametrize("flow", ["fx", "eager"])
METHODS = pytest.mark.parametrize("observer", OBSERVERS)
FIXED = {"freeze_observers": When(epoch=0), "freeze_bn": When(epoch=0)}
LAYERS = ("conv1", "conv2", "hidden", "fc")


def images(number=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 1, 8, 8, generator=generator) ** 3  # heavy tails, so that methods differ


def net():
    torch.manual_seed(0)
    return ModuleNet().eval()


def ranges(module, batches, flow="fx", **options):
    """Return scale and zero point of each layer of ``net``, and of the module's input as ``""``."""
    prepared = calibrate(prepare(module, StaticPTQ(flow=flow, **options)), batches)
    names = ("input_stub.activation_post_process", "activation_post_process_0")
    first = next(child for name, child in prepared.named_modules() if name in names)
    int8 = convert(prepared)
    found = {name: int8.get_submodule(name) for name in LAYERS if isinstance(module, ModuleNet)}
    return {"": (float(first.scale), int(first.zero_point))} | {name: (layer.scale, layer.zero_point) for name, layer in found.items()}


def identity():
    layer = nn.Linear(1, 1)
    layer.weight.data.fill_(1.0)
    return nn.Sequential(layer)


def input_range(observer, *batches, **options):
    """Return the interval that the input of a layer may lie in."""
    scale, zero_point = ranges(identity(), [batch.reshape(-1, 1) for batch in batches], observer=observer, **options)[""]
    top = 127 if options.get("activation_bits") == 7 else 255
    return -zero_point * scale, (top - zero_point) * scale


# --- methods -----------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@METHODS
@pytest.mark.parametrize("bits", [7, 8])
def test_ranges_lie_on_the_bits_of_the_layer(observer, bits):
    low, high = input_range(observer, torch.linspace(-1, 2, 3000), activation_bits=bits)
    assert (low, high) == (pytest.approx(-1, abs=0.02), pytest.approx(2, abs=0.02))
    low, high = input_range(observer, torch.linspace(1, 2, 3000), activation_bits=bits)
    assert low == 0 and high == pytest.approx(2, abs=0.03)
    low, high = input_range(observer, torch.linspace(-2, -1, 3000), activation_bits=bits)
    assert high == 0 and low == pytest.approx(-2, abs=0.03)


@pytest.mark.sampled
@pytest.mark.parametrize("observer", [name for name in OBSERVERS if name != "moving_average"])
def test_batches_in_any_order_give_the_same_ranges(observer):
    quiet, loud = images(32, 1) / 1000, images(32, 2) * 50
    whole = ranges(net(), [torch.cat([quiet, loud])], observer=observer)
    nothing = torch.zeros(0, 1, 8, 8)
    assert ranges(net(), [quiet, nothing, loud], observer=observer) == ranges(net(), [loud, quiet], observer=observer)
    assert ranges(net(), [quiet, loud], observer=observer)[""] == whole[""]


@METHODS
@pytest.mark.parametrize("value", [0.0, -3.0])
def test_constant_inputs(observer, value):
    low, high = input_range(observer, torch.full((64,), value))
    assert low <= value <= high + 1e-6 and low <= 0 <= high


@pytest.mark.parametrize(("observer", "highest"), [("histogram", 60), ("percentile", 6), ("entropy", 20)])
def test_a_lone_outlier_does_not_set_the_range(observer, highest):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x[7] = 70.0
    low, high = input_range(observer, *x.split(50_000))
    assert 3 < high < highest and -6 < low < -2.5
    assert input_range("minmax", *x.split(50_000))[1] == pytest.approx(70, rel=0.01)


@pytest.mark.sampled
@METHODS
def test_activations_in_half_precision(observer):
    prepared, x = prepare(net(), StaticPTQ(observer=observer)), images(32)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(prepared, [x])
    expected = ranges(net(), [x], observer=observer)
    assert convert(prepared).conv1.scale == pytest.approx(expected["conv1"][0], rel=0.05)


@METHODS
def test_memory_does_not_grow_with_batches(observer):
    prepared, sizes = prepare(net(), StaticPTQ(observer=observer)), []
    for number in (1, 4):
        calibrate(prepared, images(8 * number).split(8))
        sizes.append({name: tensor.shape for name, tensor in prepared.state_dict().items()})
    assert sizes[0] == sizes[1]


@METHODS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_is_refused(observer, bad):
    broken = net()
    broken.conv2.bias = nn.Parameter(torch.full((8,), bad))
    with pytest.raises(CalibrationError, match="has seen NaN or infinite activations"):
        calibrate(prepare(broken, StaticPTQ(observer=observer)), [images(8)])


@METHODS
def test_empty_batches_alone_are_no_calibration(observer):
    with pytest.raises(CalibrationError, match="has seen no data"):
        calibrate(prepare(net(), StaticPTQ(observer=observer)), [torch.zeros(0, 1, 8, 8)])


@pytest.mark.sampled
@METHODS
def test_a_calibrated_module_survives_its_state_dict(observer):
    recipe = StaticPTQ(observer=observer)
    prepared, fresh = calibrate(prepare(net(), recipe), [images()]), prepare(net(), recipe)
    fresh.load_state_dict(prepared.state_dict())
    x = images(8, seed=3)
    assert torch.equal(convert(fresh)(x), convert(prepared)(x))


# --- single layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "key", "chosen"),
    [("fx", "conv1", {"conv1"}), ("eager", "conv*", {"conv1", "conv2"}), ("fx", nn.Linear, {"hidden", "fc"})],
)
def test_a_layer_has_a_method_of_its_own(flow, key, chosen):
    batches = images().split(16)
    default, other = (ranges(net(), batches, flow, observer=observer) for observer in ("histogram", "moving_average"))
    mixed = ranges(net(), batches, flow, observer="histogram", overrides={key: {"observer": "moving_average"}})
    assert all(default[name] != other[name] for name in LAYERS)
    assert mixed == {name: other[name] if name in chosen else value for name, value in default.items()}


@FLOWS
def test_a_layer_has_a_method_of_its_own_in_qat(flow):
    batches = [(batch, torch.zeros(16, dtype=torch.int64)) for batch in images().split(16)]

    def trained(**options):
        callback = QuantizationCallback(QAT(flow=flow, calibration_batches=4, **FIXED, **options), calibration_data=batches)
        fit(callback, Plain(net().train(), lr=0.0), max_epochs=1)
        return {layer.layer: (layer.scale, layer.zero_point) for layer in callback.report.layers}

    default, other = trained(), trained(observer="minmax")
    mixed = trained(overrides={"net.conv1": {"observer": "minmax"}})
    assert mixed["net.conv1"] == other["net.conv1"] != default["net.conv1"] and mixed["net.fc"] == default["net.fc"]


# --- batches -----------------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x, weight):
        return self.fc(x.flatten(1)) * weight


KINDS = {
    "tuple": lambda x, weight: (x, weight),
    "list": lambda x, weight: [x, weight],
    "dict": lambda x, weight: {"x": x, "weight": weight},
    "mapping": lambda x, weight: UserDict(weight=weight, x=x),  # as a tokenizer returns
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_every_kind_are_arguments(kind):
    module, x, weight = TwoInputs().eval(), images(), torch.tensor(2.0)
    found = [ranges(module, [batch(part, weight) for part in x.split(16)]) for batch in (KINDS[kind], KINDS["tuple"])]
    assert found[0] == found[1]


class AnyBatch(Plain):
    """Takes its images out of whatever a loader gives."""

    def validation_step(self, batch, batch_idx):
        self.net(batch["images"] if isinstance(batch, dict) else batch[0])

    def predict_step(self, batch, batch_idx=0):
        return self.net(batch)


def test_the_callback_takes_batches_of_every_kind():
    found = []
    for kind in (lambda x: x, lambda x: (x, None), lambda x: {"images": x, "names": ["a"] * len(x)}):
        callback = QuantizationCallback(StaticPTQ(), calibration_data=[kind(part) for part in images().split(16)])
        fit(callback, AnyBatch(net()), max_epochs=0)
        found.append([(layer.layer, layer.scale, layer.zero_point) for layer in callback.report.layers])
    assert found[0] and found[1:] == found[:-1]
