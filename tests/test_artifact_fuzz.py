"""Damage and forgery at random; ``benchmarks/fuzz_artifacts.py`` tries thousands, each in a process that is watched."""

import shutil
import tempfile
import warnings
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_lightning import ArtifactError, load_quantized, save_quantized
from tests.mutations import MUTATIONS
from tests.test_artifact import CASES


@pytest.fixture(scope="module", params=["fx", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("eager", "dynamic eager"))])
def saved(request, tmp_path_factory):
    build, quantize, x = CASES[request.param]
    int8 = quantize(build().eval())
    return build, save_quantized(int8, tmp_path_factory.mktemp("fuzz") / "int8"), x, int8(x)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32))
def test_a_mutated_artifact_is_refused_or_computes_the_same(saved, mutation, seed):
    build, folder, x, y = saved
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mutated = shutil.copytree(folder, Path(temporary) / "int8")
        mutation.apply(mutated, Random(seed))
        try:
            loaded = load_quantized(mutated, build())
        except ArtifactError:
            return
    # A forger may choose values; damage may not.
    assert mutation.signed or torch.equal(loaded(x), y)
