"""int8 models in files of ExecuTorch, run by its own runtime."""

import sys

import pytest
import torch

from qat_lightning import (
    ConfigurationError,
    StaticPTQ,
    UnsupportedModelError,
    calibrate,
    convert,
    export_executorch,
    prepare,
    quantize_dynamic,
)
from qat_lightning.export import packages
from tests.nets import FunctionalNet, Recurrent

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def int8():
    torch.manual_seed(0)
    return convert(calibrate(prepare(FunctionalNet().eval(), StaticPTQ(backend="qnnpack")), [IMAGES]))


@pytest.mark.filterwarnings("ignore")  # what ExecuTorch says on import
def test_its_runtime_computes_the_same_within_a_step(int8, tmp_path):
    path = export_executorch(int8, tmp_path / "model.pte", IMAGES)
    from executorch.runtime import Runtime

    (found,) = Runtime.get().load_program(path).load_method("forward").execute([IMAGES])
    expected = int8(IMAGES)
    assert (found - expected).abs().max() <= 1.01 * expected.unique().diff().min()


def test_a_package_that_is_missing_is_named(int8, tmp_path, monkeypatch):
    def missing(name):
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "version", missing)
    with pytest.raises(ConfigurationError, match=r'needs the package executorch: pip install "qat-lightning\[executorch\]"'):
        export_executorch(int8, tmp_path / "model.pte")
    assert not list(tmp_path.iterdir())


def test_versions_that_do_not_fit_are_named(int8, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.backends.xnnpack.partition.xnnpack_partitioner", None)
    monkeypatch.setattr(packages, "version", lambda name: "0.1")
    with pytest.raises(ConfigurationError, match=r"executorch 0\.1 cannot be imported with torch .*install the versions that fit"):
        export_executorch(int8, tmp_path / "model.pte")


def test_what_it_cannot_carry_is_named(tmp_path):
    with pytest.raises(UnsupportedModelError):
        export_executorch(quantize_dynamic(Recurrent()), tmp_path / "model.pte", torch.randn(2, 3, 8))
