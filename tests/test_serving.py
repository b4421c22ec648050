"""int8 models without their class: recorded, saved, loaded and served."""

import json
import logging
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves as leaves

from qat_lightning import (
    QAT,
    ArtifactError,
    Call,
    ConfigurationError,
    DynamicPTQ,
    QuantizationCallback,
    ServedModel,
    UnsupportedModelError,
    export_onnx,
    load_quantized,
    quantize_dynamic,
    save_quantized,
)
from qat_lightning.backend import Cpu
from qat_lightning.runtimes import RUNTIMES, saturates
from tests.mutations import read_manifest, sign_manifest
from tests.nets import BranchingNet, FunctionalNet, ManyInputs, MappingInput, ModuleNet, Plain, Recurrent, fit, static_int8

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def programs_of(folder):
    return sorted(name.partition("-")[0] for name in read_manifest(folder)["files"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    int8 = static_int8(FunctionalNet(), IMAGES)
    return int8, save_quantized(int8, tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("backend", ["x86", "onednn", "fbgemm", "qnnpack"])
@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_torch_computes_the_same_bits_with_any_batch_size(flow, backend, tmp_path):
    int8 = static_int8(ModuleNet(), IMAGES, flow=flow, backend=backend)
    served = load_quantized(save_quantized(int8, tmp_path), runtime="torch")
    assert isinstance(served, ServedModel) and served.runtime == "torch"
    for size in (1, 3, 8, 3):
        assert torch.equal(served(IMAGES[:size]), int8(IMAGES[:size]))


# OpenVINO leaves real numbers unrounded between some operations.
@pytest.mark.parametrize(("runtime", "steps"), [("onnxruntime", 1), ("openvino", 4)])
@pytest.mark.parametrize(("net", "flow"), [(ModuleNet, "fx"), (ModuleNet, "eager"), (FunctionalNet, "fx")])
def test_other_runtimes_compute_the_same_within_steps(runtime, steps, net, flow, tmp_path):
    torch.manual_seed(0)
    int8 = static_int8(net(), IMAGES, flow=flow)
    with pytest.warns(UserWarning, match="kernels of openvino overflow on this CPU.*VNNI") if saturates(runtime, bits=8) else nullcontext():
        served = load_quantized(save_quantized(int8, tmp_path), runtime=runtime)
    if saturates(runtime, bits=8):
        return  # it is wrong by tens of steps, as the warning says
    step = int8(IMAGES).unique().diff().min()
    for size in (1, 8):
        assert (served(IMAGES[:size]) - int8(IMAGES[:size])).abs().max() <= (steps + 0.01) * step


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inputs_of_any_strides(runtime, tmp_path):
    x = torch.randn(4, 6, 9, 9, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(392, 64))
    served = load_quantized(save_quantized(static_int8(net, x, weight_bits=7), tmp_path), runtime=runtime)
    expected = served(x)
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(other, x) and not other.is_contiguous()
        for _ in range(5):
            assert torch.equal(served(other), expected)


class Bottleneck(nn.Module):
    """A block of MobileNet with a gate, a sum and a mean, and enough numbers that some lie next to the border between two integers."""

    def __init__(self, pool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.wide, self.depthwise = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 48, 1), nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.gate, self.narrow, self.last = nn.Conv2d(48, 48, 1), nn.Conv2d(48, 8, 1), nn.Linear(8, 4)
        self.pool = pool

    def forward(self, x):
        x = self.first(x)
        wide = self.depthwise(self.wide(x).clamp(0, 6)).relu()
        wide = wide * self.gate(self.pool(wide, True)).relu()
        return self.last(self.pool(x + self.narrow(wide) + self.narrow(wide.relu()), False))


def functional(x, keepdim):
    pooled = nn.functional.adaptive_avg_pool2d(x, 1)
    return pooled if keepdim else torch.flatten(pooled, 1)


POOLS = {
    "method": lambda x, keepdim: x.mean((2, 3), keepdim),
    "function": lambda x, keepdim: torch.mean(x, dim=[-1, -2], keepdim=keepdim),
    "pool": functional,
}


@pytest.mark.parametrize("size", [40, 6, 8])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
def test_onnx_runtime_computes_the_same_bits(backend, pool, size, tmp_path):
    x = torch.randn(32, 4, size, size, generator=torch.Generator().manual_seed(size))
    int8 = static_int8(Bottleneck(POOLS[pool]), x, backend=backend)
    assert torch.equal(load_quantized(save_quantized(int8, tmp_path), runtime="onnxruntime")(x), int8(x))


def test_other_means_are_those_of_torch():
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(6, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.last(
                x.mean(1).mean((1, 2), keepdim=True) + x.mean(2).mean(1, keepdim=True) + x.flatten(2).mean((-2, -1))[:, None, None]
            )

    int8 = static_int8(Means(), IMAGES)
    kept = [node for node in int8.graph.nodes if "mean" in str(node.target)]
    assert len(kept) == 5
    assert int8(IMAGES).shape == (8, 1, 4)


def test_a_fresh_process_needs_no_class(saved, programs):
    int8, folder = saved
    script = f"""
import torch
from qat_lightning import load_quantized
served = load_quantized({str(folder)!r}, runtime="torch")
x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
print(served(x).flatten().tolist())
"""
    found = programs.run("-c", script, cwd=folder.parent)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == int8(IMAGES).flatten().tolist()


def test_auto_takes_the_fastest_and_keeps_the_figures(saved):
    _, folder = saved
    served = load_quantized(folder)
    ((timing),) = read_manifest(folder)["timings"]
    assert set(timing["milliseconds"]) == {name for name in RUNTIMES if not saturates(name, bits=8)} and timing["shapes"] == [[1, 1, 8, 8]]
    assert served.runtime == min(timing["milliseconds"], key=timing["milliseconds"].get)
    forced = read_manifest(folder)
    forced["timings"][0]["milliseconds"] = {"torch": 2.0, "onnxruntime": 1.0}
    sign_manifest(folder, forced)
    assert load_quantized(folder).runtime == "onnxruntime"
    load_quantized(folder, example=IMAGES[:4])
    assert [timing["shapes"] for timing in read_manifest(folder)["timings"]] == [[[1, 1, 8, 8]], [[4, 1, 8, 8]]]


def test_weights_of_seven_bits_need_no_processor_with_exact_sums(monkeypatch, tmp_path):
    monkeypatch.setattr("qat_lightning.backend.this_cpu", lambda: Cpu(name="an old CPU", capability="AVX2", features=("avx2",)))
    torch.manual_seed(0)
    int8 = static_int8(ModuleNet(), IMAGES, weight_bits=7)
    folder = save_quantized(int8, tmp_path)
    load_quantized(folder, example=IMAGES)
    assert set(read_manifest(folder)["timings"][-1]["milliseconds"]) == {*RUNTIMES}
    step = int8(IMAGES).unique().diff().min()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of an overflow
        for runtime in ("onnxruntime", "openvino"):
            assert (load_quantized(folder, runtime=runtime)(IMAGES) - int8(IMAGES)).abs().max() <= 4.01 * step


def test_auto_leaves_out_what_computes_something_else(saved, monkeypatch):
    monkeypatch.setattr("qat_lightning.backend.this_cpu", lambda: Cpu(name="an old CPU", capability="AVX2", features=("avx2",)))
    served = load_quantized(saved[1], example=IMAGES[:2])
    timing = read_manifest(saved[1])["timings"][-1]
    assert served.runtime != "openvino" and set(timing["milliseconds"]) == {"torch", "onnxruntime"}
    with pytest.warns(UserWarning, match="kernels of openvino overflow on this CPU"):
        load_quantized(saved[1], runtime="openvino")


def test_several_inputs_keywords_and_nested_outputs(tmp_path):
    x, ids, mask = torch.randn(4, 8), torch.arange(4), torch.ones(4, 8)
    int8 = static_int8(ManyInputs(), Call((x, ids), {"mask": mask}))
    served = load_quantized(save_quantized(int8, tmp_path), runtime="torch")
    expected, found = int8(x, ids, mask=mask), served(x, ids, mask=mask)
    assert torch.equal(expected["logits"], found["logits"]) and torch.equal(expected["rest"][0], found["rest"][0])
    assert torch.equal(found["rest"][1], ids)
    int8 = static_int8(MappingInput(), Call(({"x": x},), {}))
    served = load_quantized(save_quantized(int8, tmp_path), runtime="torch")
    assert all(torch.equal(one, other) for one, other in zip(int8({"x": x}), served({"x": x}), strict=True))


def test_dynamic_quantization_is_served_by_torch(tmp_path, caplog):
    int8 = quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), DynamicPTQ())
    x = torch.randn(4, 8)
    with caplog.at_level(logging.WARNING):
        save_quantized(int8, tmp_path, example=x)
    assert programs_of(tmp_path) == ["program", "weights"] and "saved without an ONNX model" in caplog.text
    assert torch.equal(load_quantized(tmp_path)(x), int8(x))


class Bidirectional(nn.Module):
    """Returns the states, too."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(12, 4, num_layers=2)

    def forward(self, x, h, c):
        x, states = self.lstm(x, (h, c))
        return self.gru(x), states


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
@pytest.mark.parametrize("flow", ["fx", "eager"])
def test_recurrent_layers_are_served_by_torch(flow, backend, tmp_path, caplog):
    for net, shapes in ((Recurrent(), [(4, 5, 8)]), (Bidirectional(), [(5, 3, 8), (4, 3, 6), (4, 3, 6)])):
        int8 = quantize_dynamic(net.eval(), DynamicPTQ(flow=flow, backend=backend))
        inputs = tuple(torch.randn(shape) for shape in shapes)
        with caplog.at_level(logging.WARNING):
            save_quantized(int8, tmp_path, example=inputs)
        assert "carries what was quantized statically, and not aten::quantized_lstm" in caplog.text
        served, expected = load_quantized(tmp_path)(*inputs), int8(*inputs)
        assert all(torch.equal(one, other) for one, other in zip(leaves(served), leaves(expected), strict=True))


class WithForward(Plain):
    def forward(self, x):
        return self.net(x).softmax(1)


def test_a_callback_gives_what_its_model_is_called_with(tmp_path):
    quantization = QuantizationCallback(QAT())
    module = WithForward()
    fit(quantization, module)
    folder = save_quantized(quantization.quantized_module, tmp_path, quantization.report)
    manifest = read_manifest(folder)
    assert manifest["entry"] == "net" and programs_of(folder) == ["model", "program", "weights"]
    assert torch.equal(load_quantized(folder, runtime="torch")(IMAGES), quantization.quantized_module.net(IMAGES))
    save_quantized(quantization.quantized_module, tmp_path, example=IMAGES)
    assert read_manifest(folder)["entry"] == ""
    assert torch.equal(load_quantized(folder, runtime="torch")(IMAGES), quantization.quantized_module(IMAGES))


def test_what_cannot_be_recorded_is_saved_with_its_class_alone(tmp_path, caplog):
    int8 = static_int8(BranchingNet(), IMAGES, flow="eager")
    with caplog.at_level(logging.WARNING):
        save_quantized(int8, tmp_path)
    assert "saved without a program" in caplog.text and "control flow depends on a tensor" in caplog.text
    assert torch.equal(load_quantized(tmp_path, BranchingNet())(IMAGES), int8(IMAGES))
    with pytest.raises(ArtifactError, match="holds weights alone: load it with its class"):
        load_quantized(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"nets\.py:\d+"):
        save_quantized(int8, tmp_path, programs=["torch"])


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(x.reshape(8, 64))


def test_a_batch_size_that_forward_fixes_is_fixed(tmp_path):
    int8 = static_int8(FixedBatch(), IMAGES)
    served = load_quantized(save_quantized(int8, tmp_path, example=Call((IMAGES,), {}), programs=["torch"]), runtime="torch")
    assert torch.equal(served(IMAGES), int8(IMAGES))
    with pytest.raises(ConfigurationError, match=r"Expected args\[0\] to be float32 of shape \(8, 1, 8, 8\), but got"):
        served(IMAGES[:4])


CALLS = {
    "nothing": (lambda served: served(), r"Expected args\[0\] to be a tensor of float32, but got nothing"),
    "number": (lambda served: served(3), r"Expected args\[0\] to be a tensor of float32, but got int"),
    "dtype": (lambda served: served(IMAGES.double()), r"to be float32 of shape \(any, 1, 8, 8\), but got float64 of shape \(8, 1, 8, 8\)"),
    "shape": (lambda served: served(IMAGES[:, :, :4]), r"but got float32 of shape \(8, 1, 4, 8\)"),
    "more": (lambda served: served(IMAGES, IMAGES), r"takes args\[0\], but got args\[1\], too"),
    "name": (lambda served: served(x=IMAGES), r"got kwargs\['x'\], too"),
}


@pytest.mark.parametrize("case", CALLS)
def test_wrong_calls_are_refused_by_name(case, saved):
    call, message = CALLS[case]
    with pytest.raises(ConfigurationError, match=message):
        call(load_quantized(saved[1], runtime="torch"))


def test_wrong_settings_are_refused(saved, tmp_path, monkeypatch):
    int8, folder = saved
    with pytest.raises(ValueError, match="Expected argument `runtime` to be one of"):
        load_quantized(folder, runtime="tflite")
    with pytest.raises(ConfigurationError, match="are for a model without its class"):
        load_quantized(folder, FunctionalNet(), runtime="torch")
    with pytest.raises(ValueError, match="Expected argument `programs` to be one of"):
        save_quantized(int8, tmp_path, programs=["tflite"])
    with pytest.raises(ConfigurationError, match="Nobody has seen a call"):
        save_quantized(quantize_dynamic(nn.Linear(8, 4)), tmp_path, programs=["torch"])
    monkeypatch.setattr("qat_lightning.runtimes.installed_runtimes", lambda: ("torch",))
    with pytest.raises(ConfigurationError, match=r'runtime=\'openvino\' is not installed: pip install "qat-lightning\[openvino\]"'):
        load_quantized(folder, runtime="openvino")


def forge(folder, change):
    """Change the program and sign it."""
    import hashlib

    path = next(folder.glob("program-*"))
    program = json.loads(path.read_text())
    change(program)
    content = json.dumps(program).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    manifest = read_manifest(folder)
    del manifest["files"][path.name]
    name = f"program-{sha256[:16]}.json"
    (folder / name).write_bytes(content)
    manifest["files"][name] = {"sha256": sha256, "bytes": len(content)}
    sign_manifest(folder, manifest)


def set_node(index, part, value):
    return lambda program: program["nodes"][index].__setitem__(part, value)


FORGERIES = {
    "operator that reads files": (set_node(0, 0, "aten::from_file"), r"`nodes\[0\]` has the operator 'aten::from_file', which no program"),
    "value from nowhere": (set_node(0, 1, [{"value": 99}, 0.1, 0, 13]), "uses value 99, which nothing has given before"),
    "unknown layer": (set_node(1, 1, [{"value": 1}, {"layer": "x"}, 0.1, 0]), "uses layer 'x', which is not described"),
    "too few arguments": (set_node(0, 1, [{"value": 0}]), "takes 4 arguments, not 1"),
    "another type": (set_node(0, 1, [{"value": 0}, "a", 0, 13]), "an argument is a str, and must be a Tensor"),
    "unknown key": (lambda program: program.update(code="import os"), "its keys are not"),
    "unknown argument": (set_node(0, 1, [{"path": "/etc/passwd"}]), "has the argument"),
    "missing weight": (lambda program: next(iter(program["layers"].values())).update(weight="x"), r"the tensor 'x.int8' is missing"),
    "no structure": (lambda program: program.update(structure={"kind": "eval", "content": "1"}), "`structure` has a part that is none"),
    "state of a convolution": (
        lambda program: next(iter(program["layers"].values())).update(hidden_bias="x"),
        "no other layer has the latter",
    ),
    "engine": (lambda program: next(iter(program["layers"].values())).update(engine="cuda"), r"`layers.conv1.engine` must be one of"),
}


@pytest.mark.parametrize("case", FORGERIES)
def test_forged_programs_are_refused_by_name(case, tmp_path):
    change, message = FORGERIES[case]
    folder = save_quantized(static_int8(FunctionalNet(), IMAGES), tmp_path)
    forge(folder, change)
    with pytest.raises(ArtifactError, match=message):
        load_quantized(folder, runtime="torch")


def test_onnx_file(saved, tmp_path):
    onnx = pytest.importorskip("onnx")
    int8, _ = saved
    model = onnx.load(export_onnx(int8, tmp_path / "model.onnx"))
    onnx.checker.check_model(model, full_check=True)
    weights = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".weight")]
    assert len(weights) == 4 and all(tensor.data_type == onnx.TensorProto.INT8 for tensor in weights)
    channels = sum(max(tensor.dims[0], tensor.dims[1]) for tensor in weights)
    carried = sum(len(tensor.raw_data) for tensor in weights) + 9 * channels  # scale, bias and zero point of each channel
    assert (tmp_path / "model.onnx").stat().st_size < carried + 600 * len(weights)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not [node for node in model.graph.node if node.op_type == "Clip"]  # saturation clips


def test_onnx_refuses_what_it_cannot_carry(tmp_path):
    class Unusual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x):
            return torch.cumsum(self.conv(x), 1)

    with pytest.raises(UnsupportedModelError, match=r"ONNX export cannot carry the operator aten::cumsum"):
        export_onnx(static_int8(Unusual(), IMAGES), tmp_path / "model.onnx")
    with pytest.raises(ConfigurationError, match="holds no int8 module"):
        export_onnx(Unusual(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_pt2e_is_served(tmp_path):
    torch.manual_seed(0)
    int8 = static_int8(FunctionalNet(), IMAGES, flow="pt2e")
    folder = save_quantized(int8, tmp_path, programs=["torch", "onnx"])
    served = load_quantized(folder, runtime="torch")
    assert all(torch.equal(served(IMAGES[:size]), int8(IMAGES[:size])) for size in (1, 8))
    difference = (load_quantized(folder, runtime="onnxruntime")(IMAGES) - int8(IMAGES)).abs().max()
    assert difference <= 1.01 * int8(IMAGES).unique().diff().min()
