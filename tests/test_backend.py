import logging

import pytest
import torch
from torch import nn

from qat_lightning import QAT, ConfigurationError, DynamicPTQ, QuantizationCallback, StaticPTQ, calibrate, convert, measure_parity, prepare
from qat_lightning.backend import Cpu, Kernel, LayerShape, check_backend, choose_kernel, cpu_name, engine, kernel_error, supported_backends
from qat_lightning.core import int8_plan_of
from qat_lightning.flows.torch_ao import kernel_modules
from qat_lightning.observers import apply_phase
from qat_lightning.schedule import IDLE, Phase
from tests.nets import fit

LAYERS = {
    "linear": nn.Linear(64, 64),
    "conv": nn.Conv2d(16, 16, 3, padding=1),
    "depthwise": nn.Conv2d(128, 128, 3, padding=1, groups=128),
    "strided depthwise": nn.Conv2d(64, 64, 5, 2, padding=2, groups=64),
    "same padding": nn.Conv2d(8, 8, 3, padding="same"),
    "conv1d": nn.Conv1d(16, 16, 3),
    "conv3d": nn.Conv3d(4, 8, 3),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("backend", supported_backends())
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("weight_bits", [7, 8])
def test_the_chosen_kernel_is_right_at_extreme_values(backend, layer, per_channel, weight_bits):
    shape = LayerShape.of(layer)
    kernel = choose_kernel(backend, shape, "auto", per_channel, weight_bits)
    assert kernel_error(kernel, shape, per_channel) <= 1
    if weight_bits == 7:
        assert kernel == Kernel(backend, 8, 7)  # no sum overflows, so that each backend can take its own kernels


@pytest.mark.parametrize("backend", supported_backends())
def test_a_depthwise_layer_computes_what_was_simulated_at_the_top_of_its_range(backend):
    layer = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1, groups=128, bias=False))
    nn.init.constant_(layer[0].weight, 0.5)
    batches = [torch.rand(2, 128, 8, 8) * 0.1 + 0.9]
    prepared = calibrate(prepare(layer, StaticPTQ(backend=backend, observer="minmax")), batches)
    int8 = convert(prepared)
    assert max(entry.max_steps for entry in measure_parity(prepared, int8, batches)) <= 1
    assert (int8(batches[0]) - layer(batches[0])).abs().max() < 0.05


@pytest.mark.parametrize(("setting", "bits"), [("auto", 8), (7, 7), (8, 8)])
def test_the_value_range_can_be_set(setting, bits):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    batches = [torch.randn(4, 1, 8, 8)]
    int8 = convert(calibrate(prepare(net, StaticPTQ(activation_bits=setting)), batches))
    scale = int8(batches[0]) is not None and int8.get_submodule("0").scale
    reference = convert(calibrate(prepare(net, StaticPTQ(activation_bits=8)), batches)).get_submodule("0").scale
    assert {layer.kernel.activation_bits for layer in int8_plan_of(int8).layers.values()} == {bits}
    assert scale / reference == pytest.approx(2 if bits == 7 else 1, rel=0.2)


@pytest.mark.parametrize("flow", ["fx", "eager"])
@pytest.mark.parametrize("recipe", [QAT, StaticPTQ])
def test_weights_of_seven_bits_stay_within_them_also_when_they_grow(flow, recipe):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)).eval()
    batches = [torch.randn(4, 1, 8, 8)]
    prepared = prepare(net, recipe(flow=flow, weight_bits=7, overrides={"4": {"weight_bits": 8}}))
    if recipe is StaticPTQ:
        calibrate(prepared, batches)
    else:
        apply_phase(prepared, Phase(fake_quant=True, observers=True, bn_frozen=True))
        prepared(batches[0])
        apply_phase(prepared, IDLE)
    with torch.no_grad():
        for name, parameter in prepared.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(1.5)  # as training does behind frozen ranges
    int8 = convert(prepared)
    assert max(entry.max_steps for entry in measure_parity(prepared, int8, batches)) <= 1
    ends = {name.removeprefix("wrapped."): layer.weight().int_repr().aminmax() for name, layer in kernel_modules(int8)}
    limits = {name: (int(low), int(high)) for name, (low, high) in ends.items()}
    assert all(low >= -64 and high <= 63 for low, high in (limits["0"], limits["2"]))
    assert {*limits["0"]} & {-64, 63} and max(map(abs, limits["4"])) > 64


def test_dynamic_quantization_has_eight_bits():
    with pytest.raises(ValueError, match="`weight_bits` to be 8 in dynamic"):
        DynamicPTQ(weight_bits=7)
    with pytest.raises(ValueError, match="no `weight_bits` in `overrides"):
        DynamicPTQ(overrides={"fc": {"weight_bits": 7}})


def test_a_layer_can_be_given_another_engine():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    overrides = {"0": {"engine": "onednn"}, "1": {"engine": "qnnpack"}}
    int8 = convert(calibrate(prepare(net, StaticPTQ(overrides=overrides)), [torch.randn(4, 8)]))
    assert [int8_plan_of(int8).layers[name].kernel.engine for name in ("0", "1")] == ["onednn", "qnnpack"]


def test_a_backend_that_torch_lacks_is_refused(monkeypatch):
    monkeypatch.setattr("qat_lightning.backend.supported_backends", lambda: ("qnnpack",))
    with pytest.raises(ConfigurationError, match=r"'x86' is not part of this build.*\('qnnpack',\)"):
        check_backend("x86")
    with pytest.raises(ConfigurationError, match="'x86' is not part"):
        prepare(nn.Sequential(nn.Linear(2, 2)), QAT())


def test_the_engine_is_put_back():
    before = torch.backends.quantized.engine
    with engine("qnnpack"):
        assert torch.backends.quantized.engine == "qnnpack"
    assert torch.backends.quantized.engine == before


def test_seven_bits_where_no_engine_is_right(monkeypatch):
    monkeypatch.setattr("qat_lightning.backend.kernel_error", lambda *args: 56)
    assert choose_kernel("fbgemm", LayerShape.of(nn.Linear(4, 4)), "auto", True).activation_bits == 7


def test_the_fastest_engine_that_is_right_is_taken(monkeypatch):
    monkeypatch.setattr("qat_lightning.backend.kernel_error", lambda kernel, *_: 56 if kernel.engine == "fbgemm" else 0)
    layers = {"qnnpack": nn.Conv2d(8, 8, 3, groups=8), "onednn": nn.Conv2d(8, 8, 3, groups=2)}
    for engine_name, layer in layers.items():
        assert choose_kernel("fbgemm", LayerShape.of(layer), "auto", True).engine == engine_name


def test_a_processor_whose_fastest_kernels_overflow_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr("qat_lightning.backend.this_cpu", lambda: Cpu(name="an old CPU", capability="AVX2", features=("avx2",)))
    errors = {("onednn", 8): 0, ("onednn", 7): 0, ("x86", 7): 0}
    monkeypatch.setattr("qat_lightning.backend.kernel_error", lambda kernel, *_: errors.get((kernel.engine, kernel.weight_bits), 56))
    for bits, told in ((8, True), (7, False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fit(QuantizationCallback(QAT(weight_bits=bits)), max_steps=1)
        assert ("4 of 4 layers run on another engine than the backend's" in caplog.text) == told


def test_the_processor_has_a_name():
    assert cpu_name().endswith(")")
