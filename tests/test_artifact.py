import hashlib
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import qat_lightning
from qat_lightning import (
    QAT,
    ArtifactError,
    Call,
    DynamicPTQ,
    QuantizationCallback,
    Report,
    StaticPTQ,
    calibrate,
    convert,
    load_quantized,
    prepare,
    quantize_dynamic,
    save_quantized,
)
from qat_lightning.backend import LayerShape, choose_kernel
from tests.mutations import Malicious, read_manifest, sign_manifest, sign_weights, weights_of
from tests.nets import BranchingNet, FunctionalNet, ManyInputs, ModuleNet, Plain, Recurrent, fit, static_int8

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SEQUENCES = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


def static(net, **settings):
    return static_int8(net, IMAGES, **settings)


CASES = {
    "fx": (ModuleNet, lambda net: static(net, flow="fx"), IMAGES),
    "eager": (ModuleNet, lambda net: static(net, flow="eager"), IMAGES),
    "pt2e": (ModuleNet, lambda net: static(net, flow="pt2e"), IMAGES),
    "pt2e functional": (FunctionalNet, lambda net: static(net, flow="pt2e", overrides={"conv2": {"per_channel": False}}), IMAGES),
    "dynamic pt2e": (Recurrent, lambda net: quantize_dynamic(net, DynamicPTQ(flow="pt2e")), SEQUENCES),
    "fx functional": (FunctionalNet, lambda net: static(net), IMAGES),
    "eager untraceable": (BranchingNet, lambda net: static(net, flow="eager"), IMAGES),
    "overrides": (ModuleNet, lambda net: static(net, overrides={"fc": None, "conv1": {"engine": "qnnpack", "per_channel": False}}), IMAGES),
    "qnnpack": (ModuleNet, lambda net: static(net, backend="qnnpack", flow="eager"), IMAGES),
    "dynamic fx": (Recurrent, lambda net: quantize_dynamic(net, DynamicPTQ(flow="fx")), SEQUENCES),
    "dynamic eager": (Recurrent, lambda net: quantize_dynamic(net, DynamicPTQ(flow="eager")), SEQUENCES),
    "dynamic layer": (lambda: nn.Linear(8, 4), lambda net: quantize_dynamic(net), SEQUENCES),
}
FRESH_PROCESS = """
import sys, torch
from pathlib import Path
from qat_lightning import load_quantized
from tests import nets
for folder in map(Path, sys.argv[1:]):
    model = getattr(nets, (folder / "class").read_text())()
    torch.save(load_quantized(folder / "int8", model)(torch.load(folder / "x.pt")), folder / "y.pt")
"""


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save_quantized(static(ModuleNet().eval()), tmp_path_factory.mktemp("pristine") / "int8")


@pytest.fixture
def artifact(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "int8")


@pytest.mark.sampled
@pytest.mark.parametrize(("build", "quantize", "x"), CASES.values(), ids=CASES)
def test_a_loaded_model_computes_the_same_bits(build, quantize, x, tmp_path):
    int8 = quantize(build().eval())
    loaded = load_quantized(save_quantized(int8, tmp_path / "int8"), build())
    assert torch.equal(loaded(x), int8(x)) and not loaded.training
    again = load_quantized(save_quantized(loaded, tmp_path / "again"), build())
    assert torch.equal(again(x), int8(x))


def test_a_fresh_process_computes_the_same_bits(tmp_path, programs):
    expected = {}
    for name in CASES.keys() - {"dynamic layer"}:
        build, quantize, x = CASES[name]
        int8, folder = quantize(build().eval()), tmp_path / name
        save_quantized(int8, folder / "int8")
        torch.save(x, folder / "x.pt")
        (folder / "class").write_text(build.__name__)
        expected[folder] = int8(x)
    finished = programs.run("-c", FRESH_PROCESS, *expected, cwd=Path(__file__).parents[1])
    assert finished.returncode == 0, finished.stderr
    assert all(torch.equal(torch.load(folder / "y.pt"), y) for folder, y in expected.items())


@pytest.mark.sampled
@pytest.mark.parametrize("recipe", [QAT(), QAT(flow="eager"), QAT(flow="pt2e"), StaticPTQ(calibration_batches=2), DynamicPTQ()])
def test_the_quantized_module_of_a_callback(recipe, tmp_path):
    callback = QuantizationCallback(recipe)
    fit(callback, max_epochs=1)
    loaded = load_quantized(save_quantized(callback.quantized_module, tmp_path / "deep" / "int8"), Plain())
    assert isinstance(loaded, Plain)
    assert torch.equal(loaded.net(IMAGES), callback.quantized_module.net(IMAGES))


def test_several_inputs_and_an_example(tmp_path):
    x, ids = torch.randn(6, 8), torch.randint(0, 10, (6,))
    int8 = convert(calibrate(prepare(ManyInputs(), StaticPTQ()), [(x, ids)]))
    loaded = load_quantized(save_quantized(int8, tmp_path / "int8"), ManyInputs())
    assert torch.equal(loaded(x, ids=ids)["logits"], int8(x, ids=ids)["logits"])


def test_a_folder_holds_weights_programs_and_a_manifest_and_nothing_else(artifact):
    manifest = read_manifest(artifact)
    assert {path.name for path in artifact.iterdir()} == {"manifest.json", "model.onnx", *manifest["files"]}
    for name, entry in manifest["files"].items():
        content = (artifact / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        assert entry["sha256"][:16] == name.partition("-")[2].partition(".")[0]
    assert sorted(name.partition("-")[0] for name in manifest["files"]) == ["model", "program", "weights"]
    assert (artifact / "model.onnx").read_bytes() == next(artifact.glob("model-*")).read_bytes()
    assert manifest["format_version"] == 3 and manifest["package"] == qat_lightning.__version__ and manifest["torch"] == torch.__version__
    assert manifest["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability() and manifest["metrics"] == {}
    plan = manifest["targets"][""]["plan"]
    assert (plan["recipe"], plan["flow"], plan["backend"]) == ("ptq", "fx", "x86")
    kernel = choose_kernel("x86", LayerShape.of(nn.Conv2d(1, 8, 3, padding=1)), "auto", per_channel=True)
    assert plan["layers"]["conv1"] == {"kernel": vars(kernel), "per_channel": True, "observer": None}
    assert manifest["targets"][""]["inputs"] == [{"name": "args[0]", "dtype": "float32", "shape": [None, 1, 8, 8]}]


def test_weights_are_integers_scales_and_zero_points(artifact):
    tensors = safetensors.torch.load_file(next(artifact.glob("weights-*")))
    assert tensors["conv1.weight.int8"].dtype == torch.int8 and tensors["conv1.weight.int8"].shape == (8, 1, 3, 3)
    assert tensors["conv1.weight.scale"].shape == tensors["conv1.weight.zero_point"].shape == (8,)
    assert tensors["fc._packed_params._packed_params.weight.int8"].dtype == torch.int8
    assert tensors["fc._packed_params._packed_params.bias"].dtype == torch.float32


def test_the_inputs_of_a_network_are_kept(tmp_path):
    calls = [Call((torch.randn(size, 8),), {"ids": torch.zeros(size, dtype=torch.long), "mask": None}) for size in (6, 3)]
    int8 = convert(calibrate(prepare(ManyInputs(), StaticPTQ()), calls))
    expected = [
        {"name": "args[0]", "dtype": "float32", "shape": [None, 8]},
        {"name": "kwargs['ids']", "dtype": "int64", "shape": [None]},
        {"name": "kwargs['mask']", "dtype": "NoneType", "shape": None},
    ]
    folder = save_quantized(int8, tmp_path / "int8")
    assert read_manifest(folder)["targets"][""]["inputs"] == expected
    again = save_quantized(load_quantized(folder, ManyInputs()), tmp_path / "again")
    assert read_manifest(again)["targets"][""]["inputs"] == expected


def test_a_report_and_a_callback_fill_the_manifest(tmp_path):
    callback = QuantizationCallback(QAT())
    fit(callback, max_epochs=1)
    report = callback.report.with_accuracy("int8", 0.5)
    manifest = read_manifest(save_quantized(callback.quantized_module, tmp_path / "int8", report))
    assert manifest["metrics"] == report.scalars() and manifest["metrics"]["int8/acc"] == 0.5
    assert manifest["targets"]["net"]["inputs"] == [{"name": "args[0]", "dtype": "float32", "shape": [None, 1, 8, 8]}]


def test_a_figure_that_is_no_number_is_left_out(tmp_path):
    report = Report(recipe="ptq", flow="fx", backend="x86", quantized_modules=4).with_accuracy("int8", float("nan"))
    assert read_manifest(save_quantized(static(ModuleNet().eval()), tmp_path, report))["metrics"] == {"int8/quantized_modules": 4.0}


class WithExtraState(ModuleNet):
    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        pass


def test_state_that_is_no_tensor_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ArtifactError, match=r"'_extra_state', a dict; an artifact holds dense tensors alone"):
        save_quantized(static(WithExtraState().eval(), flow="eager"), tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_tensors_that_share_memory_are_saved(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.fc, self.head = nn.Embedding(4, 8), nn.Linear(8, 8), nn.Linear(8, 4, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(self.fc(self.emb(ids)))

    ids = torch.arange(4)
    int8 = quantize_dynamic(Tied().eval(), DynamicPTQ(overrides={"head": None}))
    assert torch.equal(load_quantized(save_quantized(int8, tmp_path), Tied())(ids), int8(ids))


def test_an_artifact_is_replaced(artifact):
    other = static(ModuleNet().eval(), flow="eager")
    save_quantized(other, artifact)
    assert torch.equal(load_quantized(artifact, ModuleNet())(IMAGES), other(IMAGES))
    assert [path.name for path in artifact.parent.iterdir()] == ["int8"]


def test_an_empty_folder_is_used(tmp_path):
    assert load_quantized(save_quantized(static(ModuleNet().eval()), tmp_path), ModuleNet())(IMAGES).shape == (8, 4)


def test_files_of_others_in_an_artifact_are_left_alone(artifact):
    (artifact / "README").write_text("mine")
    save_quantized(static(ModuleNet().eval(), flow="eager"), artifact)
    assert (artifact / "README").read_text() == "mine" and len(list(artifact.iterdir())) == 6


def test_what_a_kill_has_left_is_removed(tmp_path):
    old = ("weights-0123456789abcdef.safetensors", "program-0123456789abcdef.json", "model-0123456789abcdef.onnx", ".model.onnx.00000000")
    for name in (*old, ".manifest.json.a_b1c2d3", ".weights-0123456789abcdef.safetensors.abcdefgh"):
        (tmp_path / name).write_bytes(b"part")
    with pytest.raises(ArtifactError, match=r"has no manifest\.json"):
        load_quantized(tmp_path, ModuleNet())
    save_quantized(static(ModuleNet().eval()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", "model.onnx", *read_manifest(tmp_path)["files"]}


@pytest.mark.parametrize("foreign", ["folder", "file", "manifest"])
def test_what_is_no_artifact_is_not_overwritten(foreign, tmp_path):
    path = tmp_path / "mine"
    file = {"folder": path / "thesis.tex", "file": path, "manifest": path / "manifest.json"}[foreign]
    file.parent.mkdir(exist_ok=True)
    file.write_text("precious")
    with pytest.raises(ArtifactError, match="mine exists and is no saved int8 model: it is not overwritten"):
        save_quantized(static(ModuleNet().eval()), path)
    assert file.read_text() == "precious" and [entry.name for entry in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("module", [ModuleNet(), Plain(), prepare(ModuleNet(), QAT())], ids=["float", "LightningModule", "prepared"])
def test_only_int8_models_are_saved(module, tmp_path):
    with pytest.raises(ArtifactError, match="holds no int8 module"):
        save_quantized(module, tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_a_failed_save_leaves_the_old_artifact(artifact, monkeypatch):
    before = {path: path.read_bytes() for path in artifact.iterdir()}
    monkeypatch.setattr("qat_lightning.manifest.json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_quantized(static(ModuleNet().eval()), artifact)
    assert {path: path.read_bytes() for path in artifact.iterdir()} == before


def sign(change):
    """Return a damage that changes the manifest and makes its checksum fit."""

    def damage(folder):
        manifest = read_manifest(folder)
        change(manifest)
        sign_manifest(folder, manifest)

    return damage


def rename_weights(name):
    """Return a damage that names another file, which exists."""

    def change(manifest):
        manifest["files"] = {name: next(iter(manifest["files"].values()))}

    return sign(change)


def link_weights(folder):
    weights_of(folder).rename(folder.parent / "elsewhere")
    (folder / next(iter(read_manifest(folder)["files"]))).symlink_to(folder.parent / "elsewhere")


def pipe_for_weights(folder):
    path = weights_of(folder)
    path.unlink()
    os.mkfifo(path)


def grow_weights(folder):
    path = weights_of(folder)
    os.truncate(path, 2**40)  # sparse: takes no space
    manifest = read_manifest(folder)
    manifest["files"][path.name]["bytes"] = 2**40
    sign_manifest(folder, manifest)


def change_tensor(name, change):
    def damage(folder):
        tensors = safetensors.torch.load_file(weights_of(folder))
        tensors[name] = change(tensors[name])
        sign_weights(folder, safetensors.torch.save(tensors))

    return damage


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


FOREIGN = "manifest.json cannot be used: it was not written by save_quantized"
NOT_DESCRIBED = r"safetensors is not the file that manifest.json describes .* it is truncated or altered"
DAMAGES = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), r"has no manifest.json: it is no int8 model"),
    "no weights": (lambda folder: weights_of(folder).unlink(), r"has no weights-\w{16}.safetensors: the artifact is incomplete"),
    "truncated weights": (lambda folder: os.truncate(weights_of(folder), 1000), NOT_DESCRIBED),
    "altered weights": (lambda folder: flip_last_byte(weights_of(folder)), NOT_DESCRIBED),
    "truncated manifest": (lambda folder: os.truncate(folder / "manifest.json", 1000), "manifest.json cannot be used: it is no JSON"),
    "altered manifest": (
        lambda folder: (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace("x86", "onednn")),
        "its own `sha256` does not match: it was altered or damaged",
    ),
    "empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "it is no JSON"),
    "deep manifest": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "it is nested too deep"),
    "large manifest": (lambda folder: os.truncate(folder / "manifest.json", 2**40), "at most 4000000 belong there"),
    "foreign list": (lambda folder: (folder / "manifest.json").write_text("[]"), FOREIGN),
    "foreign object": (lambda folder: (folder / "manifest.json").write_text('{"name": "web app", "format_version": 2}'), FOREIGN),
    "first format": (lambda folder: (folder / "manifest.json").write_text('{"format": 1, "targets": {}}'), FOREIGN),
    "newer": (sign(lambda manifest: manifest.update(format_version=4)), r"written by a newer version of qat_lightning: .* Upgrade"),
    "older": (sign(lambda manifest: manifest.update(format_version=2)), "its format version is 2; this version of qat_lightning reads 3"),
    "_target_": (sign(lambda manifest: manifest.update(_target_="os.system")), "`_target_` is no key that this version knows"),
    "_target_ in a plan": (
        sign(lambda manifest: manifest["targets"][""]["plan"].update(_target_="os.system")),
        r"`targets..plan._target_` is no key",
    ),
    "class as flow": (
        sign(lambda manifest: manifest["targets"][""]["plan"].update(flow="os")),
        r"plan.flow` must be one of \('fx', 'eager', 'pt2e'\)",
    ),
    "missing key": (sign(lambda manifest: manifest.pop("cpu")), "`cpu` is missing"),
    "negative size": (sign(lambda manifest: next(iter(manifest["files"].values())).update(bytes=-1)), "bytes is -1, less than none"),
    "no hash": (sign(lambda manifest: next(iter(manifest["files"].values())).update(sha256="")), "sha256 is '', which is no SHA-256"),
    "no target": (sign(lambda manifest: manifest.update(targets={})), "there must be one, or several with names"),
    "no files": (sign(lambda manifest: manifest.update(files={})), "there must be one of weights"),
    "path upwards": (rename_weights("../elsewhere"), "their names must come from their SHA-256"),
    "absolute path": (rename_weights("/etc/passwd"), "their names must come from their SHA-256"),
    "link": (link_weights, "is no regular file but a link, a folder, a pipe or a device"),
    "pipe": (pipe_for_weights, "is no regular file but a link, a folder, a pipe or a device"),
    "huge file": (grow_weights, "it has 1099511627776 bytes, and at most"),
    "pickle": (lambda folder: sign_weights(folder, pickle.dumps(Malicious(folder / "owned"))), "weights in .* do not fit ModuleNet"),
    "huge header": (lambda folder: sign_weights(folder, b"\xff" * 7 + b"\x00{}"), "do not fit ModuleNet: .*[Hh]eader"),
    "scale": (change_tensor("conv1.scale", lambda scale: scale * 0), "conv1.scale holds a value that is no positive number"),
    "weight scale": (change_tensor("conv1.weight.scale", lambda scale: scale * math.nan), "conv1.weight.scale holds a value"),
    "zero point": (change_tensor("_zero_point_0", lambda zero_point: zero_point - 1000), "_zero_point_0 holds a value outside 0 to 255"),
    "weight zero point": (change_tensor("conv1.weight.zero_point", lambda zeros: zeros + 1), "zero_point holds a value outside 0 to 0"),
    "dtype": (change_tensor("conv1.bias", lambda bias: bias.double()), "dtype mismatch for conv1.bias"),
    "shape": (change_tensor("conv1.bias", lambda bias: bias[:1]), "size mismatch for conv1.bias"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_malicious_artifacts_are_refused_by_name(damage, message, artifact):
    damage(artifact)
    with pytest.raises(ArtifactError, match=re.compile(message, re.DOTALL)):
        load_quantized(artifact, ModuleNet())
    assert not (artifact / "owned").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": {}, "float_modules": ["__class__"]}, "it has no submodule '__class__'"),
        ({"float_modules": ["fc", "fc"]}, "a module is named twice"),
        ({"fuse": [[]]}, "a group to fuse is empty"),
        ({"constants": ["os"]}, "its forward has no optional argument 'os'"),
        (
            {"layers": {"pool": {"kernel": {"engine": "x86", "activation_bits": 8}, "per_channel": True, "observer": None}}},
            "it has no layer 'pool'",
        ),
        ({"fuse": [["conv1", "fc"]], "flow": "eager"}, "was saved from another model than ModuleNet"),
    ],
)
def test_a_plan_that_does_not_fit_the_model(change, message, artifact):
    sign(lambda manifest: manifest["targets"][""]["plan"].update(change))(artifact)
    with pytest.raises(ArtifactError, match=message):
        load_quantized(artifact, ModuleNet())


def test_a_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere has no manifest\.json"):
        load_quantized(tmp_path / "nowhere", ModuleNet())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(8, 4), "saved from another model than Linear: it has no layer 'conv1' that recipe 'ptq' quantizes"),
        (lambda: BranchingNet(), "saved from another model than BranchingNet: it has no layer 'conv1'"),
        (lambda: static(ModuleNet().eval()), "saved from another model than GraphModule: it has no layer 'conv1'"),
    ],
    ids=["layer", "network", "int8 already"],
)
def test_a_model_of_another_class(model, message, artifact):
    with pytest.raises(ArtifactError, match=message):
        load_quantized(artifact, model())


def test_a_model_of_another_width(artifact):
    wider = ModuleNet()
    wider.fc = nn.Linear(16, 9)
    with pytest.raises(ArtifactError, match=re.compile("do not fit ModuleNet.*size mismatch", re.DOTALL)):
        load_quantized(artifact, wider)


def test_a_model_without_the_target(tmp_path):
    callback = QuantizationCallback(StaticPTQ(calibration_batches=1))
    fit(callback, max_epochs=0)
    folder = save_quantized(callback.quantized_module, tmp_path / "int8")
    with pytest.raises(ArtifactError, match="a submodule 'net', which ModuleNet does not have"):
        load_quantized(folder, ModuleNet())
