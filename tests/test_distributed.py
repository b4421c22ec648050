"""DDP with two real processes, on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning import QAT, QuantizationCallback, StaticPTQ, When
from tests.nets import Plain, fit
from tests.two_processes import CALIBRATION, FLOWS, FRACTIONS, OBSERVERS, STEPS, TWO_BATCHES, calibration, ranges, taught, training

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PATIENCE = 120  # seconds: a deadlock fails

pytestmark = [pytest.mark.parametrize("flow", FLOWS), pytest.mark.first_flow]


def run(*arguments, folder=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, thorough):
    """Where both processes have run, with what one process has found in ``single``."""
    folder, flows = tmp_path_factory.mktemp("ddp"), FLOWS if thorough else ["fx"]
    single = {flow: training(flow, checkpoint=folder / f"{flow}-single.ckpt")[0] for flow in flows}
    torch.save(single, folder / "single.pt")
    finished = run(*TORCHRUN, "-m", "tests.two_processes", folder, *flows)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each process has found."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def extremes(quants):
    return {name: value for name, value in quants.items() if name.endswith(("min_val", "max_val")) and "weight_fake" not in name}


def first(quants):
    """Return the state of the fake-quant of the network's input."""
    chosen = {name: value for name, value in quants.items() if re.match(r"net\.(input_stub|activation_post_process_0)\.", name)}
    assert len(chosen) > 5
    return chosen


# --- ranges ------------------------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_one_process_that_saw_all_data(flow, found):
    ours, theirs, single = found[0][flow]["ranges"], found[1][flow]["ranges"], ranges(flow)
    assert len(ours) == len(theirs) == len(single) == STEPS
    for mine, other, alone in zip(ours, theirs, single, strict=True):
        assert same(mine, other)
        assert same(first(mine), first(alone))
        assert extremes(mine).keys() == extremes(alone).keys() and len(extremes(alone)) >= 8
        for name, value in extremes(alone).items():
            # In the first batch each process rounds with the range of its own part.
            torch.testing.assert_close(mine[name], value, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("name", "options"),
    [("ranges, late start", {"start": When(step=STEPS - 1)}), ("ranges, gradients of two batches", TWO_BATCHES)],
    ids=["late start", "gradients of two batches"],
)
def test_ranges_without_rounding_are_equal_to_the_last_bit(flow, name, options, found):
    single = ranges(flow, **options)
    for mine, other, alone in zip(found[0][flow][name], found[1][flow][name], single, strict=True):
        assert same(mine, other)
        if "start" in options:
            assert same(extremes(mine), extremes(alone))
        else:
            assert same(first(mine), first(alone))


def test_processes_start_from_the_same_corrected_biases(flow, found):
    (before, ours), (_, theirs) = (process[flow]["biases"] for process in found)
    assert len(ours) == 3 and all(map(torch.equal, ours, theirs))
    assert not any(map(torch.equal, before, ours))


def test_a_fast_development_run_ends(flow, found):
    assert [process[flow]["fast"] for process in found] == [1, 1]


def test_averaged_weights_have_the_shared_ranges_in_either_order(flow, found):
    first_listed, last_listed = found[0][flow]["averages"]
    assert first(first_listed) and same(first_listed, last_listed)
    assert all(same(first_listed, averaged) for averaged in found[1][flow]["averages"])


# --- training ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["training", "resumed"])
def test_processes_end_with_equal_parameters_and_ranges(flow, which, found):
    ours, theirs = (process[flow][which]["end"] for process in found)
    learnt = {name: value for name, value in ours.items() if not re.search(r"running_|num_batches", name)}
    assert learnt and all(torch.equal(value, theirs[name]) for name, value in learnt.items())
    assert not same(ours, found[0][flow][which]["start"])


def test_the_teacher_teaches_all_processes_the_same(flow, found):
    (start, ours), (_, mislabelled) = found[0][flow]["taught"]
    for other in (mislabelled, *(after for _, after in found[1][flow]["taught"])):
        assert all(torch.equal(one, two) for one, two in zip(ours, other, strict=True))
    _, whole = taught(flow, 0, batch_size=32)  # what one process learns from both parts of each batch
    before, one, two = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (start, ours, whole))
    # The error is relative to the teacher's mean square, which each process has of its own part.
    assert 0 < (one - two).norm() < 0.1 * (two - before).norm()


def test_only_rank_zero_converts(flow, found):
    ours, theirs = (process[flow] for process in found)
    assert (ours["conversions"], theirs["conversions"]) == (1, 0)
    assert ours["training"]["int8"] == "Plain" and ours["training"]["parity"]
    assert "The report lies on rank zero, and this process is rank 1" in theirs["training"]["error"]
    assert "trainer.is_global_zero" in theirs["training"]["error"]


def test_the_int8_module_is_tested_on_rank_zero_alone(flow, found):
    assert 0 <= found[0]["test"]["test/acc"] <= 1 and "test" not in found[1]


def test_rehearsals_leave_random_numbers_alone(flow, found):
    assert all(all(process[flow][which]["undisturbed"]) for process in found for which in ("training", "resumed"))


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def test_one_process_resumes_what_two_have_trained(flow, folder, found):
    path = folder / f"{flow}-ddp.ckpt"
    resumed, _ = training(flow, resume=path)
    assert same(resumed["start"], torch.load(path, weights_only=False)["state_dict"])
    # Six batches an epoch, of which each of two processes gets three.
    assert found[0][flow]["training"]["observers"] == [True] * 5 + [False]
    assert resumed["observers"] == [True] * 3 + [False] * 3 and resumed["bn_frozen"] == [True] * 6
    assert resumed["parity"]


def test_two_processes_resume_what_one_has_trained(flow, folder, found):
    saved = torch.load(folder / f"{flow}-single.ckpt", weights_only=False)["state_dict"]
    for process in found:
        assert same(process[flow]["resumed"]["start"], saved)
        assert process[flow]["resumed"]["observers"] == [True, True, False] and process[flow]["resumed"]["bn_frozen"] == [True] * 3
    assert found[0][flow]["resumed"]["parity"]


# --- calibration -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("observer", OBSERVERS)
def test_calibration_is_split_and_merged(flow, observer, found):
    ours, theirs, single = *(process[flow][observer] for process in found), calibration(flow, observer)
    assert same(ours["quants"], theirs["quants"])
    # Rank zero goes on to run its batches again, to correct biases and compare, and a single image for the report.
    first = int(flow == "pt2e")  # the example of an export
    assert (len(ours["pixels"]), len(theirs["pixels"])) == (first + 3 + 4, first + 2)
    assert {*ours["pixels"], *theirs["pixels"]} == {*single["pixels"]}
    if observer == "moving_average":
        return
    assert same(ours["quants"], single["quants"]) and ours["layers"] == single["layers"]
    assert any(name.endswith("histogram") for name in ours["quants"]) == (observer != "minmax")


def test_moving_averages_are_weighted_by_batches(flow, found):
    merged = extremes(found[0][flow]["moving_average"]["quants"])
    # Each process has had every second of five batches.
    ours, theirs = (calibration(flow, "moving_average", data=CALIBRATION[rank::2])["quants"] for rank in (0, 1))
    assert merged
    for name, value in merged.items():
        torch.testing.assert_close(value, (3 * ours[name] + 2 * theirs[name]) / 5)


def test_a_process_without_a_batch_loses_nothing(flow, found):
    ours, theirs = (process[flow]["one batch"] for process in found)
    assert len(theirs["pixels"]) == int(flow == "pt2e") and len(ours["layers"]) == 3


def test_training_data_are_split_by_their_sampler(flow, found):
    ours, theirs = (set(process[flow]["training data"]["pixels"]) for process in found)
    if flow == "pt2e":  # each has read an example of its own before
        assert len(ours) in (2, 3) and len(theirs) in (2, 3)
        return
    assert len(ours) == len(theirs) == 2 and not ours & theirs


def test_no_process_waits_for_one_that_has_failed(flow, found):
    assert found[0][flow]["failure"].startswith(
        "QuantizationError: The process of rank 1 has failed: CalibrationError: Calibration batch 0"
    )
    assert found[1][flow]["failure"].startswith("CalibrationError: Calibration batch 0 holds NaN")


def test_every_process_knows_that_one_has_diverged(flow, found):
    ours, theirs = (process[flow]["divergence"] for process in found)
    assert ours == theirs and "has seen NaN or infinite activations" in ours


# --- synchronized BatchNorm --------------------------------------------------------------------------------------------------


class Synchronized(SingleDeviceStrategy):
    """Replaces BatchNorm as DDP does with ``sync_batchnorm=True``; torch wants a GPU for the synchronization itself."""

    def setup(self, trainer):
        self.model = TorchSyncBatchNorm().apply(self.model)
        super().setup(trainer)

    def teardown(self):
        TorchSyncBatchNorm().revert(self.lightning_module)
        super().teardown()


class OneOnItsOwn(nn.Sequential):
    """A BatchNorm behind a convolution, and one that nothing can be fused with."""

    def __init__(self):
        super().__init__(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
        )


class Classes(Callback):
    """Keeps what kinds of BatchNorm are trained."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained = {type(child) for child in pl_module.modules() if isinstance(child, _BatchNorm)}


RECIPES = {"qat": lambda flow: QAT(flow=flow, **FRACTIONS), "ptq": lambda flow: StaticPTQ(flow=flow, calibration_batches=2)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_synchronized_batch_norm_trains_and_converts_like_any_other(flow, recipe):
    ends = []
    for strategy in ("auto", Synchronized(device="cpu")):
        seed_everything(3)
        callback, classes = QuantizationCallback(RECIPES[recipe](flow)), Classes()
        module, _ = fit(callback, Plain(OneOnItsOwn()), watching=[classes], strategy=strategy)
        assert classes.trained == {nn.BatchNorm2d if strategy == "auto" else nn.SyncBatchNorm}
        assert {type(child) for child in module.modules() if isinstance(child, _BatchNorm)} == {nn.BatchNorm2d}
        assert callback.report.parity_passed
        ends.append((module.state_dict(), callback.report.layers))
    (plain, layers), (synchronized, others) = ends
    assert same(plain, synchronized) and layers == others


def test_checkpoints_of_synchronized_batch_norm_fit_any_other(flow, tmp_path):
    training(flow, checkpoint=tmp_path / "synchronized.ckpt", strategy=Synchronized(device="cpu"))
    training(flow, checkpoint=tmp_path / "plain.ckpt")
    for name, strategy in (("synchronized", "auto"), ("plain", Synchronized(device="cpu"))):
        resumed, _ = training(flow, resume=tmp_path / f"{name}.ckpt", strategy=strategy)
        assert same(resumed["start"], torch.load(tmp_path / f"{name}.ckpt", weights_only=False)["state_dict"]) and resumed["parity"]


# --- the command line --------------------------------------------------------------------------------------------------------

PTQ = ["+quant=ptq", "trainer.max_epochs=0", "quant.calibration_batches=2"]
LAUNCHES = {  # the first by Lightning's own launcher
    "fx": [ROOT / "train.py", *PTQ],
    "pt2e": [*TORCHRUN, ROOT / "train.py", *PTQ, "quant.flow=pt2e"],
    "eager": [*TORCHRUN, ROOT / "train.py", "+quant=qat", "quant.float_epochs=1", "quant.flow=eager"],
}


def test_command_line(flow, tmp_path):
    ddp = ["debug=fast", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", f"hydra.run.dir={tmp_path}/run"]
    finished = run(*LAUNCHES[flow], *ddp, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr[-5000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["int8"]["accuracy"] is not None and report["float"]["accuracy"] is not None and report["parity"]["passed"]
    assert finished.stdout.count("# int8 by") == 1 and (tmp_path / "run" / "int8" / "manifest.json").is_file()
    assert report["recipe"] == ("qat" if flow == "eager" else "ptq")
