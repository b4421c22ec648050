"""Resume is exact: what a killed run ends with, once resumed, is what the run that was never killed ends with, bit for bit."""

import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning import QAT, QuantizationCallback, When
from tests.killed_run import KINDS, STEPS, kills_of
from tests.nets import Plain, fit
from tests.test_averaging import Deterministic, Ordered

FLOWS = ("fx", "eager", "pt2e")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, thorough):
    """The folder of all runs, those that were killed and those that were not."""
    folder = tmp_path_factory.mktemp("runs")
    # No GPU: a process whose autograd has seen one cannot be forked.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.killed_run", str(folder), *["--thorough"] * thorough]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    (folder / "errors").write_text(done.stderr)
    return folder


def bits(tensor):
    return tensor.flatten().view(torch.uint8)


def differences(one, other, name=""):
    """Return the names of what is not the same in two nested results, down to the bits of tensors."""
    if isinstance(one, torch.Tensor):
        same = (
            isinstance(other, torch.Tensor) and (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))
        )
        return [] if same else [name]
    if isinstance(one, dict):
        inside = [differences(one[key], other.get(key), f"{name}.{key}") for key in one]
        return [*chain.from_iterable(inside), *(f"{name}.{key}" for key in other.keys() - one.keys())]
    if isinstance(one, list | tuple):
        return [*chain.from_iterable(differences(*pair, name) for pair in zip(one, other, strict=True))]
    return [] if one == other else [f"{name}: {one} and {other}"]


CASES = [
    pytest.param(kind, kill, id=f"{kind}-{kill}", marks=[] if kill in kills_of(kind, thorough=False) else pytest.mark.thorough)
    for kind in KINDS
    for kill in kills_of(kind)
]


@pytest.mark.parametrize(("kind", "kill"), CASES)
def test_a_killed_run_ends_where_the_whole_one_does(kind, kill, runs):
    whole, resumed = runs / kind / kill.saves, runs / kind / str(kill)
    assert (resumed / "killed").read_text() == str(-signal.SIGKILL)
    assert (resumed / "outcome.pt").exists(), (runs / "errors").read_text()[-2000:]
    expected, found = (torch.load(folder / "outcome.pt", weights_only=True) for folder in (whole, resumed))
    assert expected["batches"] == STEPS
    assert kind == "float" or expected["converted"] == ("None" if kill.saves == "steps" else "best")
    assert differences(expected, found) == []


def test_the_comparison_sees_a_bit(runs):
    one = torch.load(runs / "fx" / "steps" / "outcome.pt", weights_only=True)
    assert len([name for name in one["state"] if name.endswith(("scale", "min_val", "num_batches_tracked"))]) > 10
    other = {**one, "int8": torch.nextafter(one["int8"], one["int8"] + 1)}
    assert differences(one, other) == [".int8"]


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("moment", [When(step=3), When(step=8)], ids=str)
def test_checkpoints_and_validation_change_nothing(flow, moment, tmp_path):
    """A range that freezes is that of the weights of the moment, whatever measured them last."""

    def run(*watching, **trainer):
        seed_everything(2)
        recipe = QAT(flow=flow, freeze_observers=moment, freeze_bn=None)
        return fit(QuantizationCallback(recipe), Plain(Deterministic()), Ordered(), watching, **trainer)[0].state_dict()

    alone = run(limit_val_batches=0)
    saved = run(ModelCheckpoint(tmp_path, every_n_train_steps=1), limit_val_batches=0, enable_checkpointing=True)
    validated = run(val_check_interval=1)
    assert differences(alone, saved) == differences(alone, validated) == []
