import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from qat_lightning import (
    QAT,
    ArtifactError,
    ConfigurationError,
    DynamicPTQ,
    QuantizationCallback,
    StaticPTQ,
    calibrate,
    convert,
    load_quantized,
    prepare,
    quantize_dynamic,
    save_quantized,
)
from tests.nets import BranchingNet, FunctionalNet, ManyInputs, ModuleNet, Plain, Recurrent, fit

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
SEQUENCES = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))


def static(net, **settings):
    return convert(calibrate(prepare(net, StaticPTQ(**settings)), [IMAGES]))


CASES = {
    "fx": (ModuleNet, lambda net: static(net, flow="fx"), IMAGES),
    "eager": (ModuleNet, lambda net: static(net, flow="eager"), IMAGES),
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


@pytest.fixture
def artifact(tmp_path):
    return save_quantized(static(ModuleNet().eval()), tmp_path / "int8")


@pytest.mark.parametrize(("build", "quantize", "x"), CASES.values(), ids=CASES)
def test_a_loaded_model_computes_the_same_bits(build, quantize, x, tmp_path):
    int8 = quantize(build().eval())
    loaded = load_quantized(save_quantized(int8, tmp_path / "int8"), build())
    assert torch.equal(loaded(x), int8(x)) and not loaded.training
    again = load_quantized(save_quantized(loaded, tmp_path / "again"), build())
    assert torch.equal(again(x), int8(x))


def test_a_fresh_process_computes_the_same_bits(tmp_path):
    expected = {}
    for name in ("fx", "eager", "dynamic fx", "dynamic eager"):
        build, quantize, x = CASES[name]
        int8, folder = quantize(build().eval()), tmp_path / name
        save_quantized(int8, folder / "int8")
        torch.save(x, folder / "x.pt")
        (folder / "class").write_text(build.__name__)
        expected[folder] = int8(x)
    subprocess.run([sys.executable, "-c", FRESH_PROCESS, *map(str, expected)], check=True)
    assert all(torch.equal(torch.load(folder / "y.pt"), y) for folder, y in expected.items())


@pytest.mark.parametrize("recipe", [QAT(), QAT(flow="eager"), StaticPTQ(calibration_batches=2), DynamicPTQ()])
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


def test_a_folder_holds_weights_and_a_manifest_and_nothing_else(artifact):
    assert {path.name for path in artifact.iterdir()} == {"manifest.json", "weights.pt"}
    assert [path.name for path in artifact.parent.iterdir()] == ["int8"]
    assert torch.load(artifact / "weights.pt", weights_only=True)
    assert json.loads((artifact / "manifest.json").read_text())["targets"][""]["flow"] == "fx"


def test_an_artifact_is_replaced(artifact):
    other = static(ModuleNet().eval(), flow="eager")
    save_quantized(other, artifact)
    assert torch.equal(load_quantized(artifact, ModuleNet())(IMAGES), other(IMAGES))
    assert [path.name for path in artifact.parent.iterdir()] == ["int8"]


def test_an_empty_folder_is_used(tmp_path):
    assert load_quantized(save_quantized(static(ModuleNet().eval()), tmp_path), ModuleNet())(IMAGES).shape == (8, 4)


@pytest.mark.parametrize("foreign", ["folder", "file"])
def test_what_is_no_artifact_is_not_overwritten(foreign, tmp_path):
    path = tmp_path / "mine"
    file = path / "thesis.tex" if foreign == "folder" else path
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
    before = (artifact / "weights.pt").read_bytes()
    monkeypatch.setattr("qat_lightning.artifact.json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_quantized(static(ModuleNet().eval()), artifact)
    assert (artifact / "weights.pt").read_bytes() == before and [path.name for path in artifact.parent.iterdir()] == ["int8"]


def change_manifest(folder, **values):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **values}))


def rename_backend(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["targets"][""]["backend"] = "abacus"
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), ArtifactError, "has no manifest.json: it is no int8 model"),
        (lambda folder: (folder / "weights.pt").unlink(), ArtifactError, "has no weights.pt: the artifact is incomplete"),
        (lambda folder: (folder / "weights.pt").write_bytes(b"PK"), ArtifactError, "weights in .* do not fit ModuleNet"),
        (lambda folder: (folder / "manifest.json").write_text("{"), ArtifactError, "is no JSON"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{"), ArtifactError, "is no JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), ArtifactError, "not of format 1"),
        (lambda folder: change_manifest(folder, format=99), ArtifactError, "not of format 1"),
        (lambda folder: change_manifest(folder, targets=None), ArtifactError, "not of format 1"),
        (lambda folder: change_manifest(folder, targets={"": {"recipe": "qat"}}), ArtifactError, "manifest.json"),
        (rename_backend, ConfigurationError, "'abacus' is not part of this build"),
    ],
)
def test_damaged_artifacts(damage, error, message, artifact):
    damage(artifact)
    with pytest.raises(error, match=message):
        load_quantized(artifact, ModuleNet())


def test_a_missing_folder(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere has no manifest\.json"):
        load_quantized(tmp_path / "nowhere", ModuleNet())


@pytest.mark.parametrize(
    ("model", "message"),
    [(lambda: nn.Linear(8, 4), "int8"), (lambda: BranchingNet(), "int8")],
    ids=["layer", "network"],
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
