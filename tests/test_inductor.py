"""int8 models compiled by Inductor."""

import sys
import warnings

import pytest
import torch
from torch import nn

from qat_lightning import (
    ConfigurationError,
    UnsupportedModelError,
    compile_int8,
    quantize_dynamic,
)
from qat_lightning.backend import Cpu
from qat_lightning.export import inductor, packages
from tests.nets import FunctionalNet, static_int8

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def static(flow, **options):
    torch.manual_seed(0)
    return static_int8(FunctionalNet(), IMAGES, flow=flow, **options)


@pytest.mark.parametrize("flow", ["fx", "pt2e"])
def test_compiled_int8_runs_on_int8_kernels_and_computes_the_same_within_a_step(flow):
    int8 = static(flow, weight_bits=7)  # exact on every processor
    torch._dynamo.utils.counters.clear()
    compiled = compile_int8(int8, IMAGES)
    found = torch._dynamo.utils.counters["inductor"]
    assert found["qconv_weight_prepack_matcher_count"] == 3 and found["qlinear_weight_prepack_matcher_count"] == 1
    for images in (IMAGES, IMAGES[:3]):
        expected = int8(images)
        assert (compiled(images) - expected).abs().max() <= 1.01 * expected.unique().diff().min()


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(name):
        raise packages.PackageNotFoundError(name)

    monkeypatch.setattr(packages, "version", missing)
    with pytest.raises(ConfigurationError, match=r'needs the package torchao: pip install "qat-lightning\[inductor\]"'):
        compile_int8(static("fx"))


def test_versions_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantizer", None)
    monkeypatch.setattr(packages, "version", lambda name: "0.1")
    with pytest.raises(ConfigurationError, match=r"torchao 0\.1 cannot be imported with torch .*install the versions that fit"):
        compile_int8(static("fx"))


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    with pytest.raises(ConfigurationError, match=r"torch.compile fails here, it needs a C\+\+ compiler such as g\+\+"):
        compile_int8(static("fx", weight_bits=7))


def test_a_processor_on_which_sums_overflow_is_a_warning(monkeypatch):
    monkeypatch.setattr("qat_lightning.backend.this_cpu", lambda: Cpu(name="an old CPU", capability="AVX2", features=("avx2",)))
    monkeypatch.setattr(inductor, "_compile", lambda reference, tensors: reference)
    with pytest.warns(UserWarning, match="Inductor overflow on this CPU.*weight_bits=7"):
        compile_int8(static("fx"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_int8(static("fx", weight_bits=7))


def test_what_is_not_static_int8_is_refused():
    with pytest.raises(ConfigurationError, match="holds no int8 module"):
        compile_int8(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(UnsupportedModelError, match="linear_dynamic"):
        compile_int8(quantize_dynamic(nn.Sequential(nn.Linear(4, 4))), torch.randn(1, 4))
