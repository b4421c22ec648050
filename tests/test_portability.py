"""Artifacts that were saved on another machine. This machine plays the other one: what the manifest says of it is changed."""

import warnings

import pytest
import torch
from torch import nn

from qat_lightning import ArtifactError, StaticPTQ, calibrate, convert, load_quantized, prepare, save_quantized
from qat_lightning.backend import Cpu
from tests.mutations import read_manifest, sign_manifest
from tests.nets import ModuleNet

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["fx", "eager"])
def saved(request, tmp_path):
    # 7 bits: kernels of processors without VNNI overflow with 8.
    recipe = StaticPTQ(flow=request.param, backend="fbgemm", activation_bits=7, overrides={"fc": {"engine": "qnnpack"}})
    int8 = convert(calibrate(prepare(ModuleNet().eval(), recipe), [IMAGES]))
    return int8, save_quantized(int8, tmp_path / "int8")


def change(folder, **values):
    sign_manifest(folder, {**read_manifest(folder), **values})


def test_the_same_machine_gives_no_warning(saved):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        load_quantized(saved[1], ModuleNet())
    assert [warning.message for warning in caught if warning.category is UserWarning] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cpu": {"name": "Z80", "capability": "DEFAULT", "features": []}}, "saved with another CPU or torch: CPU 'Z80' there, '"),
        ({"torch": "2.11.0"}, "torch '2.11.0' there, '"),
    ],
)
def test_another_cpu_or_torch_is_told(values, message, saved):
    int8, folder = saved
    change(folder, **values)
    with pytest.warns(UserWarning, match=message) as caught:
        loaded = load_quantized(folder, ModuleNet())
    assert torch.equal(loaded(IMAGES), int8(IMAGES))
    assert caught[0].filename == __file__


def test_other_instructions_are_told(saved, monkeypatch):
    here = Cpu(name="a CPU", capability="Z80", features=("mmx",))
    monkeypatch.setattr("qat_lightning.portability.this_cpu", lambda: here)
    with pytest.warns(UserWarning, match="instruction set of torch '.*' there, 'Z80' here; CPU features '.*' there, 'mmx' here"):
        load_quantized(saved[1], ModuleNet())


def test_an_engine_that_is_missing_is_replaced(saved, monkeypatch):
    int8, folder = saved
    monkeypatch.setattr("qat_lightning.portability.supported_backends", lambda: ("onednn", "qnnpack"))
    message = "saved for fbgemm, which this build of torch lacks: 'conv1', 'conv2', 'hidden' run on other engines"
    with pytest.warns(UserWarning, match=message):
        loaded = load_quantized(folder, ModuleNet())
    plan = read_manifest(save_quantized(loaded, folder.parent / "again"))["targets"][""]["plan"]
    engines = {name: layer["kernel"]["engine"] for name, layer in plan["layers"].items()}
    assert plan["backend"] == "onednn" and engines == {"conv1": "onednn", "conv2": "onednn", "hidden": "onednn", "fc": "qnnpack"}
    assert (loaded(IMAGES) - int8(IMAGES)).abs().max() <= 2 * output_step(int8)


def output_step(int8: nn.Module) -> float:
    return float(int8.get_submodule("fc").scale)


def test_no_engine_computes_a_layer_right(saved, monkeypatch):
    monkeypatch.setattr("qat_lightning.portability.supported_backends", lambda: ("qnnpack",))
    monkeypatch.setattr("qat_lightning.portability.kernel_error", lambda *args: 85)
    with pytest.raises(
        ArtifactError, match=r"Layer 'conv1' was saved for 'fbgemm', .* none of \('qnnpack',\) computes it with 7-bit inputs"
    ):
        load_quantized(saved[1], ModuleNet())


def test_a_kernel_that_overflows_here_is_named(saved, monkeypatch):
    int8, folder = saved
    monkeypatch.setattr("qat_lightning.portability.kernel_error", lambda kernel, *args: 85 if kernel.engine == "qnnpack" else 0)
    with pytest.warns(UserWarning, match="the kernels of 'fc' overflow on this CPU"):
        loaded = load_quantized(folder, ModuleNet())
    assert torch.equal(loaded(IMAGES), int8(IMAGES))
