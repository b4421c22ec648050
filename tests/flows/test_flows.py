import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from qat_lightning import (
    QAT,
    CalibrationError,
    Call,
    ConfigurationError,
    DynamicPTQ,
    StaticPTQ,
    UnsupportedModelError,
    calibrate,
    convert,
    load_quantized,
    measure_parity,
    prepare,
    quantize_dynamic,
    save_quantized,
)
from qat_lightning.backend import engine, supported_backends
from qat_lightning.core import int8_plan_of
from qat_lightning.flows import get_flow
from qat_lightning.observers import apply_phase
from qat_lightning.schedule import IDLE, Phase
from tests.nets import BranchingNet, FunctionalNet, ManyInputs, MappingInput, ModuleNet, Recurrent, TrainingBranch

LEARNING = Phase(fake_quant=True, observers=True, bn_frozen=False)
IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CALL = Call((IMAGES,), {})


class Activations(nn.Module):
    """Activations, pools and norms that have int8 kernels of their own, or none: 2 layers with weights."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Hardswish(), nn.GELU(), nn.AvgPool2d(2))
        self.norm, self.fc, self.gate = nn.LayerNorm(8), nn.Linear(8, 4), nn.Sigmoid()

    def forward(self, x):
        return self.gate(self.fc(self.norm(torch.flatten(self.body(x), 1))))


class Tutorial(nn.Module):
    """Stubs, FloatFunctional and fusable triples, as the eager-mode tutorial writes them: 2 layers with weights."""

    def __init__(self):
        super().__init__()
        from torch.ao.nn.quantized import FloatFunctional
        from torch.ao.quantization import DeQuantStub, QuantStub

        self.quant, self.dequant, self.skip_add = QuantStub(), DeQuantStub(), FloatFunctional()
        self.conv1, self.bn1, self.relu = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2 = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(self.quant(x))))
        return self.dequant(self.skip_add.add(x, self.conv2(x)))


def quantize(net, recipe, call):
    """Return the fake-quantized and the int8 network after a few steps of training or one of calibration."""
    if isinstance(recipe, StaticPTQ):
        prepared = calibrate(prepare(net, recipe, example=call), [call])
        return prepared, convert(prepared)
    prepared = prepare(net, recipe, example=call).train()
    apply_phase(prepared, LEARNING)
    for _ in range(3):
        call.run(prepared)
    apply_phase(prepared.eval(), IDLE)
    return prepared, convert(prepared)


def names(int8):
    return {layer.layer for layer in get_flow(int8_plan_of(int8).flow).layers(int8, int8_plan_of(int8))}


FLOWS = ["fx", "eager", "pt2e"]
NETWORKS = [
    ("fx", ModuleNet, 4),
    ("eager", ModuleNet, 4),
    ("fx", FunctionalNet, 4),
    ("eager", BranchingNet, 2),
    ("fx", Activations, 2),
    ("eager", Activations, 2),
    ("eager", Tutorial, 2),
    ("fx", Tutorial, 2),
    ("pt2e", ModuleNet, 4),
    ("pt2e", FunctionalNet, 4),
    ("pt2e", BranchingNet, 2),
    ("pt2e", Activations, 2),
]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("flow", "build", "count"), NETWORKS, ids=[f"{flow}-{build.__name__}" for flow, build, _ in NETWORKS])
@pytest.mark.parametrize("kind", [QAT, StaticPTQ])
@pytest.mark.parametrize("backend", supported_backends())
def test_int8_computes_what_was_simulated(flow, build, count, kind, backend):
    net, call = build().eval(), Call((IMAGES,), {})
    prepared, int8 = quantize(net, kind(flow=flow, backend=backend), call)
    parity = measure_parity(prepared, int8, [call])
    assert len(names(int8)) == count and len(parity) >= count
    assert max(layer.max_steps for layer in parity) <= 1
    assert int8(IMAGES).shape == net(IMAGES).shape


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("build", [ModuleNet, Activations])
def test_static_quantization_stays_close_to_float(flow, build):
    net = build().eval()
    _, int8 = quantize(net, StaticPTQ(flow=flow), Call((IMAGES,), {}))
    with torch.no_grad():
        assert (int8(IMAGES) - net(IMAGES)).abs().max() < 0.05 * net(IMAGES).abs().max()


@pytest.mark.parametrize("backend", supported_backends())
@pytest.mark.parametrize("flow", FLOWS)
def test_dynamic_quantization(flow, backend):
    net, x = Recurrent().eval(), torch.randn(4, 5, 8)
    int8 = quantize_dynamic(net, DynamicPTQ(flow=flow, backend=backend))
    assert names(int8) == ({"fc"} if flow == "pt2e" else {"lstm", "gru", "fc"})
    with torch.no_grad():
        assert (int8(x) - net(x)).abs().max() < 0.05


@pytest.mark.parametrize("net", [nn.Linear(8, 4), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))], ids=["layer", "sequence"])
@pytest.mark.parametrize("flow", FLOWS)
def test_single_layers_and_sequences_are_targets(net, flow):
    call = Call((torch.randn(6, 8),), {})
    prepared, int8 = quantize(net, QAT(flow=flow), call)
    assert int8(*call.args).shape == (6, 4)
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [call])) <= 1


@pytest.mark.parametrize("recipe", [QAT(), StaticPTQ()], ids=["qat", "ptq"])
def test_several_inputs_token_ids_and_keywords(recipe):
    x, ids = torch.randn(6, 8), torch.randint(0, 10, (6,))
    call = Call((x, ids), {"mask": torch.rand(6, 8)})
    prepared, int8 = quantize(ManyInputs(), recipe, call)
    output = call.run(int8)
    assert output["logits"].shape == (6, 4) and torch.equal(output["rest"][1], ids)
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [call])) <= 1


@pytest.mark.parametrize("recipe", [QAT(), QAT(flow="eager"), StaticPTQ()], ids=lambda recipe: f"{recipe.name}-{recipe.flow}")
def test_a_mapping_in_and_a_tuple_out(recipe):
    x = torch.randn(6, 8)
    hidden, logits = quantize(MappingInput(), recipe, Call(({"x": x},), {}))[1]({"x": x})
    assert hidden.shape == (6, 8) and logits.shape == (6, 4) and not logits.is_quantized


def test_optional_arguments_keep_their_default_without_an_example():
    x, ids = torch.randn(6, 8), torch.randint(0, 10, (6,))
    prepared = prepare(ManyInputs(), QAT())
    for module in (prepared, copy.deepcopy(prepared)):
        assert module(x, ids=ids, mask=None)["logits"].shape == (6, 4)
        with pytest.raises(UnsupportedModelError, match=r"mask=None.*example_input_array"):
            module(x, ids, mask=x)


@pytest.mark.parametrize("flow", FLOWS)
def test_plain_attributes_survive(flow):
    prepared, _ = quantize(ModuleNet(), QAT(flow=flow), Call((IMAGES,), {}))
    assert (prepared.width, copy.deepcopy(prepared).width, convert(prepared).width) == (8, 8, 8)


@pytest.mark.parametrize("flow", FLOWS)
def test_prepare_shares_nothing_with_the_users_module(flow):
    net = ModuleNet()
    before = copy.deepcopy(net.state_dict())
    prepared, _ = quantize(net, QAT(flow=flow), Call((IMAGES,), {}))
    torch.optim.SGD(prepared.parameters(), lr=1.0).zero_grad()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("flow", FLOWS)
def test_a_prepared_module_is_float_until_its_phase_says_otherwise(flow):
    net = ModuleNet().eval()
    with torch.no_grad():
        assert torch.allclose(prepare(net, QAT(flow=flow), CALL).eval()(IMAGES), net(IMAGES), atol=1e-5)


@pytest.mark.parametrize("flow", FLOWS)
def test_state_dicts_fit_from_the_start(flow):
    prepared, _ = quantize(ModuleNet(), QAT(flow=flow), Call((IMAGES,), {}))
    fresh = prepare(ModuleNet(), QAT(flow=flow), CALL).eval()
    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == {
        name: tensor.shape for name, tensor in prepared.state_dict().items()
    }
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh(IMAGES), prepared(IMAGES))


@pytest.mark.parametrize("flow", FLOWS)
def test_preparing_leaves_the_random_numbers_alone(flow):
    net, state = ModuleNet(), torch.get_rng_state()
    convert(calibrate(prepare(net, StaticPTQ(flow=flow), CALL), [IMAGES]))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"fc": None}, {"conv1", "conv2", "hidden"}),
        ({"conv*": None}, {"hidden", "fc"}),
        ({nn.Conv2d: None}, {"hidden", "fc"}),
        ({nn.Conv2d: None, "conv2": {}}, {"conv2", "hidden", "fc"}),
    ],
)
def test_overrides_keep_layers_in_float(flow, overrides, expected):
    prepared, int8 = quantize(ModuleNet(), QAT(flow=flow, overrides=overrides), Call((IMAGES,), {}))
    assert names(int8) == expected
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [IMAGES])) <= 1


@pytest.mark.parametrize("flow", FLOWS)
def test_overrides_change_the_granularity(flow):
    prepared = prepare(ModuleNet(), QAT(flow=flow, overrides={"conv1": {"per_channel": False}}), CALL)
    assert [prepared.get_submodule(name).weight_fake_quant.scale.numel() for name in ("conv1", "conv2")] == [1, 8]


@pytest.mark.parametrize("recipe", [QAT(), StaticPTQ()], ids=["qat", "ptq"])
def test_functional_dropout_is_off_in_evaluation(recipe):
    prepared, _ = quantize(FunctionalNet(), recipe, Call((IMAGES,), {}))
    assert torch.equal(prepared(IMAGES), prepared(IMAGES))


def test_functional_dropout_is_on_in_training():
    prepared = prepare(FunctionalNet(), QAT()).train()
    assert not torch.equal(prepared(IMAGES), prepared(IMAGES))


class ByMode(nn.Module):
    """What functions are told of the mode: a residual branch that training drops, and attention with dropout."""

    def __init__(self):
        super().__init__()
        self.conv, self.qkv, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 24), nn.Linear(8, 4)
        self.depth = StochasticDepth(0.5, "row")

    def forward(self, x):
        x = self.conv(x)
        x = (x + self.depth(F.relu(x))).flatten(2).transpose(1, 2)
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        return self.fc(F.scaled_dot_product_attention(q, k, v, dropout_p=0.9 if self.training else 0.0).mean(1))


@pytest.mark.parametrize("flow", ["fx", "pt2e"])
def test_functions_that_are_told_of_the_mode_follow_it(flow):
    torch.manual_seed(0)
    net = ByMode()
    prepared = prepare(net, QAT(flow=flow), example=CALL).train()
    assert not torch.equal(prepared(IMAGES), prepared(IMAGES))
    with torch.no_grad():
        assert torch.allclose(prepared.eval()(IMAGES), net.eval()(IMAGES), atol=1e-5)
    apply_phase(prepared, LEARNING)
    prepared.train()(IMAGES)
    apply_phase(prepared.eval(), IDLE)
    int8 = convert(prepared)
    assert torch.equal(int8(IMAGES), int8(IMAGES))
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [CALL])) <= 1


@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_a_layer_whose_weight_is_read_stays_in_float(flow, caplog):
    net = ByMode().eval()
    with caplog.at_level(logging.WARNING):
        int8 = quantize_dynamic(net, DynamicPTQ(flow=flow))
    assert names(int8) == {"fc"} and "stay in float" in caplog.text
    with torch.no_grad():
        assert (int8(IMAGES) - net(IMAGES)).abs().max() < 0.05 * net(IMAGES).abs().max()


def test_a_branch_on_training_cannot_be_trained_in_fx():
    with pytest.raises(UnsupportedModelError, match=r"TrainingBranch.forward branches on `self.training`.*Use flow='eager'"):
        prepare(TrainingBranch(), QAT())
    assert quantize(TrainingBranch(), StaticPTQ(), Call((torch.randn(4, 8),), {}))[1] is not None


def test_what_fx_cannot_trace_is_named():
    net = nn.Sequential(BranchingNet(), nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match=r"module '0' \(BranchingNet\) at .*nets.py:\d+: \"if x.shape.*Use flow='eager'"):
        prepare(net, QAT())
    assert names(quantize(net, QAT(overrides={"0": None}), Call((IMAGES,), {}))[1]) == {"1"}


def test_what_eager_cannot_run_is_named():
    with pytest.raises(UnsupportedModelError, match=r"'(add|cat)' on int8 tensors in FunctionalNet at .*nets.py:\d+: .*Use flow='fx'"):
        prepare(FunctionalNet(), QAT(flow="eager"))


@pytest.mark.parametrize(
    "batches", [[], [torch.full((2, 1, 8, 8), torch.nan)], [torch.full((2, 1, 8, 8), torch.inf)]], ids=["none", "nan", "inf"]
)
def test_calibration_data_that_teaches_nothing(batches):
    with pytest.raises(CalibrationError, match=r"no batch|NaN or infinite"):
        calibrate(prepare(ModuleNet(), StaticPTQ()), batches)


def test_nan_that_the_network_makes():
    net = ModuleNet().eval()
    net.hidden.weight.data.fill_(torch.nan)
    with pytest.raises(CalibrationError, match=r"observer 'activation_post_process_\d+' has seen NaN"):
        calibrate(prepare(net, StaticPTQ()), [IMAGES])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: convert(ModuleNet()), "ModuleNet was not prepared: call prepare"),
        (lambda: prepare(ModuleNet(), DynamicPTQ()), "use quantize_dynamic"),
        (lambda: quantize_dynamic(ModuleNet(), QAT()), "Expected a DynamicPTQ"),
        (lambda: prepare(nn.ReLU(), QAT()), "Nothing to quantize"),
        (lambda: prepare(ModuleNet(), QAT(overrides={"*": None})), "Nothing to quantize"),
        (lambda: quantize_dynamic(nn.Sequential(nn.Conv2d(1, 1, 1))), "Nothing to quantize.*Linear, LSTM or GRU"),
        (lambda: prepare(ModuleNet(), QAT(overrides={"fcc": None})), r"the key 'fcc', which matches no module.*'fc'"),
    ],
)
def test_wrong_uses(run, message):
    with pytest.raises(ConfigurationError, match=message):
        run()


@pytest.mark.parametrize("flow", FLOWS)
def test_relu6_behind_a_wide_convolution_has_the_grid_it_was_given(flow):
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 1))
    with torch.no_grad():
        net[0].weight.copy_(30 * torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(0)))
    prepared, int8 = quantize(net, StaticPTQ(flow=flow), Call((IMAGES,), {}))
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [IMAGES])) <= 1


@pytest.mark.parametrize("kind", [QAT, StaticPTQ])
@pytest.mark.parametrize("factor", [4, 0.3, -2.0, 0])
def test_a_product_with_a_number_is_exact(factor, kind):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            return self.fc(torch.maximum(x, x * factor) * factor)

    prepared, int8 = quantize(Scaled(), kind(), Call((IMAGES,), {}))
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [IMAGES])) <= 1


@pytest.mark.skipif("fbgemm" not in supported_backends(), reason="needs the engine whose kernels overflow")
@pytest.mark.parametrize("flow", FLOWS)
def test_a_copy_has_the_kernels_of_the_original(flow):
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, groups=8)).eval()
    for layer in net:
        nn.init.ones_(layer.weight)
    x = IMAGES.abs().clamp(min=2)
    int8 = convert(calibrate(prepare(net, StaticPTQ(flow=flow), Call((x,), {})), [x]))
    holder = nn.ModuleList([int8])
    with engine("fbgemm"):
        copied = copy.deepcopy(copy.deepcopy(holder))[0]
    assert torch.equal(copied(x), int8(x)) and int8_plan_of(copied) == int8_plan_of(int8)
    assert copied is not int8 and not {id(child) for child in copied.modules()} & {id(child) for child in int8.modules()}


def test_dynamic_quantization_of_torchs_transformer(tmp_path):
    def build():
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    net, x = build(), torch.randn(4, 5, 16)
    int8 = quantize_dynamic(net)
    assert {"layers.0.linear1", "layers.1.linear2"} <= names(int8)
    with torch.inference_mode():
        assert (int8(x) - net(x)).abs().max() < 0.1
        assert torch.equal(load_quantized(save_quantized(int8, tmp_path / "int8"), build())(x), int8(x))
