"""What only the flow that exports has: everything that all flows share is tested with the others."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from qat_lightning import (
    QAT,
    Call,
    ConfigurationError,
    DynamicPTQ,
    QuantizationCallback,
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
from qat_lightning.flows.quantized_layers import Int8Layer
from qat_lightning.input_spec import rebuild, tensors_of
from qat_lightning.observers import apply_phase, freeze_bn
from qat_lightning.schedule import IDLE
from tests.flows.test_flows import IMAGES, LEARNING, names, quantize
from tests.nets import BranchingNet, FunctionalNet, Images, ManyInputs, MappingInput, ModuleNet, Plain, TrainingBranch, fit

CALL = Call((IMAGES,), {})


class MobileBlock(nn.Module):
    """BatchNorm and dropout as MobileNetV3 sets them, activations in place, stochastic depth and a squeeze: 5 layers with weights."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.act, self.depth = nn.Hardswish(inplace=True), StochasticDepth(0.5, "row")
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 4))

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        y = F.relu6(self.bn2(self.depthwise(x)), inplace=True)
        scale = self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)), inplace=True))
        y = self.depth(y * torch.sigmoid(scale))
        y += x
        return self.head(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


def modules_of(module, kind):
    return [child for child in module.modules() if isinstance(child, kind)]


def test_settings_of_batch_norm_and_dropout_survive():
    prepared = prepare(MobileBlock(), QAT(flow="pt2e"), CALL)
    for module in (prepared, copy.deepcopy(prepared).eval().train()):
        assert {(norm.eps, norm.momentum) for norm in modules_of(module, nn.BatchNorm2d)} == {(1e-3, 0.01)}
        assert [drop.p for drop in modules_of(module, nn.Dropout)] == [0.2]
        assert [depth.p for depth in modules_of(module, StochasticDepth)] == [0.5]


def test_train_and_eval_mode_are_those_of_the_network():
    net = MobileBlock()
    prepared = prepare(net, QAT(flow="pt2e"), CALL)
    for mode in (True, False):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            ours = prepared.train(mode)(IMAGES)
            torch.manual_seed(3)
            torch.testing.assert_close(ours, net.train(mode)(IMAGES), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(modules_of(prepared, nn.BatchNorm2d)[0].running_var, net.bn.running_var)


@pytest.mark.parametrize("kind", [QAT, StaticPTQ])
def test_int8_is_near_to_float(kind):
    net = MobileBlock()
    for _ in range(30):
        net.train()(IMAGES)
    prepared, int8 = quantize(net.eval(), kind(flow="pt2e"), CALL)
    assert names(int8) == {"conv", "depthwise", "squeeze", "excite", "head.1"}
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [CALL])) <= 1
    with torch.no_grad():
        torch.testing.assert_close(int8(IMAGES), prepared(IMAGES), rtol=0, atol=0.02)
        if kind is StaticPTQ:
            assert (int8(IMAGES) - net(IMAGES)).abs().max() < 0.05 * net(IMAGES).abs().max()


def test_batch_norm_freezes_and_learns():
    prepared = prepare(MobileBlock(), QAT(flow="pt2e"), CALL).train()
    apply_phase(prepared, LEARNING)
    norm = modules_of(prepared, nn.BatchNorm2d)[0]
    freeze_bn(prepared, frozen=True)
    before = norm.running_mean.clone()
    prepared.eval().train()(IMAGES)
    assert torch.equal(norm.running_mean, before)
    freeze_bn(prepared, frozen=False)
    prepared(IMAGES)
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("build", [ModuleNet, FunctionalNet, MobileBlock])
def test_batches_of_any_size(build):
    prepared, int8 = quantize(build().eval(), StaticPTQ(flow="pt2e"), Call((IMAGES[:1],), {}))
    with torch.no_grad():
        for size in (1, 3, 16):
            assert prepared(IMAGES[:size]).shape == int8(IMAGES[:size]).shape == (size, 4)


def test_images_of_another_size_where_nothing_depends_on_it():
    assert quantize(ModuleNet().eval(), StaticPTQ(flow="pt2e"), CALL)[1](torch.randn(2, 1, 12, 10)).shape == (2, 4)


def test_images_of_another_size_where_something_may():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(x.reshape(x.shape[0], 8, 8))

    prepared = prepare(Reshaped(), StaticPTQ(flow="pt2e"), CALL)
    with pytest.raises(
        UnsupportedModelError, match=r"args\[0\] of shape \(any, 1, 8, 8\), but is called with shape \(16, 4, 4, 4\).*example_input"
    ):
        prepared(torch.randn(16, 4, 4, 4))


def test_a_branch_on_the_size_of_the_batch_is_kept_to_its_side():
    prepared = prepare(BranchingNet(), StaticPTQ(flow="pt2e"), CALL)
    with pytest.raises(UnsupportedModelError, match=r"shape \(0 to 1000, 1, 8, 8\)"):
        prepared(torch.randn(1001, 1, 8, 8))


def test_a_branch_on_training_cannot_be_trained():
    call = Call((torch.randn(4, 8),), {})
    with pytest.raises(UnsupportedModelError, match=r"TrainingBranch.forward branches on `self.training`.*Use flow='eager'"):
        prepare(TrainingBranch(), QAT(flow="pt2e"), call)
    assert quantize(TrainingBranch(), StaticPTQ(flow="pt2e"), call)[1] is not None


def test_what_cannot_be_exported_is_named():
    class Choosing(BranchingNet):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(UnsupportedModelError, match=r"cannot export Choosing at .*test_pt2e.py:\d+: \"return super.*Use flow='eager'"):
        prepare(Choosing(), StaticPTQ(flow="pt2e"), CALL)


def test_without_an_example():
    with pytest.raises(ConfigurationError, match=r"'ModuleNet', for which it needs an example.*example=Call"):
        prepare(ModuleNet(), QAT(flow="pt2e"))


@pytest.mark.parametrize("kind", [QAT, StaticPTQ])
def test_several_inputs_token_ids_and_keywords(kind):
    x, ids = torch.randn(6, 8), torch.randint(0, 10, (6,))
    call = Call((x, ids), {"mask": torch.rand(6, 8)})
    prepared, int8 = quantize(ManyInputs(), kind(flow="pt2e"), call)
    output = call.run(int8)
    assert output["logits"].shape == (6, 4) and torch.equal(output["rest"][1], ids)
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [call])) <= 1
    for module in (prepared, copy.deepcopy(prepared)):
        with pytest.raises(UnsupportedModelError, match="the tensors"):
            module(x, ids)


def test_a_mapping_in_and_a_tuple_out():
    x = torch.randn(6, 8)
    hidden, logits = quantize(MappingInput(), StaticPTQ(flow="pt2e"), Call(({"x": x},), {}))[1]({"x": x})
    assert hidden.shape == (6, 8) and logits.shape == (6, 4)


def test_attention_is_trained_and_computed():
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    call = Call((torch.randn(4, 5, 16),), {})
    prepared, int8 = quantize(net, StaticPTQ(flow="pt2e"), call)
    assert {"linear1", "linear2"} <= names(int8)
    with torch.no_grad():
        assert (call.run(int8) - call.run(net)).abs().max() < 0.2
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [call])) <= 1


def test_weights_are_integers():
    int8 = quantize(ModuleNet(), QAT(flow="pt2e"), CALL)[1]
    stored = [layer.weight.int8 for layer in modules_of(int8, Int8Layer)]
    assert len(stored) == 4 and all(weight.dtype == torch.int8 for weight in stored)
    assert not any(name.startswith("bn") for name in int8.state_dict())


def test_reflected_padding_is_added_once():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()).eval()
    _, int8 = quantize(net, StaticPTQ(flow="pt2e"), CALL)
    with torch.no_grad():
        assert (int8(IMAGES) - net(IMAGES)).abs().max() < 0.05 * net(IMAGES).abs().max()


@pytest.mark.parametrize(
    "setting", [{"per_channel": False}, {"activation_bits": 7}, {"weight_bits": 7}, {"observer": "minmax"}, None], ids=str
)
def test_overrides(setting):
    prepared, int8 = quantize(ModuleNet(), StaticPTQ(flow="pt2e", overrides={"conv2": setting}), CALL)
    assert names(int8) == ({"conv1", "conv2", "hidden", "fc"} if setting else {"conv1", "hidden", "fc"})
    if setting == {"weight_bits": 7}:
        assert int(int8.get_submodule("conv2").weight.int8.abs().max()) == 63
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [CALL])) <= 1


def test_an_artifact_is_rebuilt_from_its_plan(tmp_path):
    int8 = quantize(MobileBlock(), QAT(flow="pt2e"), CALL)[1]
    again = load_quantized(save_quantized(int8, tmp_path / "int8"), MobileBlock())
    assert torch.equal(again(IMAGES), int8(IMAGES)) and names(again) == names(int8)


def test_the_example_comes_from_the_first_batch():
    class Counting(Images):
        read = 0

        def train_dataloader(self):
            self.read += 1
            return super().train_dataloader()

    data, callback = Counting(batch_size=20), QuantizationCallback(QAT(flow="pt2e", calibration_batches=2), parity="error")
    module, trainer = fit(callback, data=data)
    assert data.read == 2 and callback.report.quantized_modules == 4  # the last batch has 16
    (result,) = trainer.test(module, data, verbose=False)
    (again,) = trainer.test(callback.quantized_module, data, verbose=False)
    assert result["test/acc"] == pytest.approx(again["test/acc"], abs=0.03)


def test_reading_the_example_draws_no_random_numbers():
    def weights(**settings):
        torch.manual_seed(0)
        module = Plain()
        module.example_input_array = settings.get("example")
        return fit(QuantizationCallback(QAT(flow="pt2e")), module, max_epochs=1)[0].net.fc.weight

    assert torch.equal(weights(), weights()) and torch.isfinite(weights()).all()


def test_a_generator_of_batches_is_not_read_for_an_example():
    class Streaming(Images):
        def train_dataloader(self):
            return iter(list(self.loader()))

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    with pytest.raises(ConfigurationError, match="Set `example_input_array`"):
        fit(QuantizationCallback(QAT(flow="pt2e")), data=Streaming())


def test_dynamic_linear_layers_need_no_example():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(5, 8)
    int8 = quantize_dynamic(net, DynamicPTQ(flow="pt2e"))
    with torch.no_grad():
        assert (int8(x) - net(x)).abs().max() < 0.02 * net(x).abs().max()
        assert torch.equal(int8(x[:0]), net(x[:0]))


def test_code_that_looks_into_a_dynamic_layer():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return F.linear(x, self.fc.weight, self.fc.bias)

    net, x = Looking(), torch.randn(5, 8)
    with torch.no_grad():
        assert (quantize_dynamic(net, DynamicPTQ(flow="pt2e"))(x) - net(x)).abs().max() < 0.02


def test_an_activation_that_is_written_into_is_refused():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            x = self.conv(x)
            x[:, 0] += 1
            return x

    with pytest.raises(UnsupportedModelError, match=r"written into in parts, at .*test_pt2e.py:\d+: \"x\[:, 0\] \+= 1\".*torch.cat"):
        prepare(Writing(), QAT(flow="pt2e"), CALL)


def test_int8_is_one_graph_for_torch_compile():
    int8 = quantize(ModuleNet().eval(), StaticPTQ(flow="pt2e"), CALL)[1]
    with torch.no_grad():
        assert torch.equal(torch.compile(int8, backend="eager", fullgraph=True)(IMAGES), int8(IMAGES))


def test_examples_are_rebuilt_from_their_description():
    args, kwargs = (torch.zeros(4, 3), {"a": torch.zeros(4, 2, dtype=torch.int64)}), {"m": (torch.zeros(2, 4), torch.zeros(()))}
    specs = tensors_of(args, kwargs)
    again = rebuild(specs)
    assert again[0][1]["a"].dtype == torch.int64 and again[1]["m"][0].shape == (2, 4) and tensors_of(*again) == specs


WITHOUT_TORCH_AO = """
import sys, importlib.abc
import torch, lightning.pytorch, torchvision, torchmetrics, torch.export
for name in [name for name in sys.modules if name.startswith(("torch.ao.quantization", "qat_lightning"))]:
    del sys.modules[name]
del torch.ao.quantization
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch.ao.quantization"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from torch import nn
import qat_lightning as ql
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
call = ql.Call((torch.randn(4, 1, 4, 4),), {})
prepared = ql.calibrate(ql.prepare(net, ql.StaticPTQ(flow="pt2e"), call), [call])
int8 = ql.convert(prepared)
assert max(layer.max_steps for layer in ql.measure_parity(prepared, int8, [call])) <= 1
ql.refine(prepared, [call])
ql.prepare(net, ql.QAT(flow="pt2e"), call).train()(*call.args)
ql.quantize_dynamic(net, ql.DynamicPTQ(flow="pt2e"))
for flow in ("fx", "eager"):
    try:
        ql.prepare(net, ql.QAT(flow=flow))
    except ql.ConfigurationError as error:
        assert "flow='pt2e'" in str(error), error
    else:
        raise AssertionError(flow)
"""


def test_nothing_needs_torch_ao_quantization(programs, tmp_path):
    finished = programs.run("-c", WITHOUT_TORCH_AO, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr


def test_idle_conversion_of_a_module_in_train_mode():
    prepared = prepare(MobileBlock(), QAT(flow="pt2e"), CALL).train()
    apply_phase(prepared, LEARNING)
    prepared(IMAGES)
    apply_phase(prepared, IDLE)
    int8 = convert(prepared)
    assert prepared.training and torch.equal(int8(IMAGES), int8(IMAGES))


def test_calibration_sees_every_grid():
    prepared = calibrate(prepare(MobileBlock(), StaticPTQ(flow="pt2e"), CALL), [IMAGES])
    assert all(quant.activation_post_process.min_val <= quant.activation_post_process.max_val for quant in grids(prepared))


def grids(prepared):
    return [child for name, child in prepared.named_modules() if name.startswith("activation_post_process_") and "." not in name]
