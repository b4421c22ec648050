import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import OmegaConf

from qat_lightning.app import run
from qat_lightning.errors import ArtifactError, ConfigurationError, QuantizationError

ROOT = Path(__file__).parents[1]
QUICK = ["debug=fast", "trainer.accelerator=cpu"]
SMALL = ["model.net.depth=8"]
CONTRACT = {"recipe", "flow", "backend", "model", "data", "torch", "cpu", "quantized_modules", "float", "int8", "parity"}


def run_app(folder, *overrides):
    """Run what ``python train.py OVERRIDES hydra.run.dir=FOLDER`` runs, in this process."""
    folder.mkdir(exist_ok=True)
    hydra = [f"hydra.runtime.output_dir={folder}", f"hydra.runtime.cwd={folder}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        # A sweep's own mode would win over a default, not over an override.
        mode = [] if any(override.startswith("hydra.mode=") for override in overrides) else ["hydra.mode=RUN"]
        small = [] if any(override.split("=")[0] in ("model", "model._target_") for override in overrides) else SMALL
        cfg = compose("config", [*QUICK, *small, *overrides, *mode, *hydra], return_hydra_config=True)
    HydraConfig.instance().cfg = None
    HydraConfig.instance().set_config(cfg)
    return run(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]))


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


def logged_names(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return set(next(csv.reader(file)))


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    return folder, run_app(folder, "trainer.max_epochs=1")


def test_float_training_writes_checkpoints_and_no_report(float_run):
    folder, accuracy = float_run
    assert 0 <= accuracy <= 1
    assert (folder / "checkpoints" / "float" / "last.ckpt").is_file()
    assert not (folder / "report.json").exists()
    assert {"float/train/loss", "float/val/acc", "float/test/acc"} <= logged_names(folder)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("overrides", "recipe", "flow", "backend"),
    [
        (["+quant=qat", "quant.float_epochs=1", "quant.lr=0.001"], "qat", "fx", "x86"),
        (["+quant=qat", "quant.float_epochs=0", "quant.flow=eager", "quant/backend=qnnpack"], "qat", "eager", "qnnpack"),
        (["+quant=ptq", "trainer.max_epochs=1", "quant.calibration_batches=2"], "ptq", "fx", "x86"),
        (["+quant=ptq", "trainer.max_epochs=0", "quant.calibration_batches=2", "quant/backend=onednn"], "ptq", "fx", "onednn"),
        (["+quant=dynamic", "trainer.max_epochs=0", "model=lstm"], "dynamic", "eager", "x86"),
    ],
)
def test_recipes_from_the_command_line(overrides, recipe, flow, backend, tmp_path):
    accuracy = run_app(tmp_path, *overrides)
    report = read_report(tmp_path)
    assert report.keys() >= CONTRACT
    assert (report["recipe"], report["flow"], report["backend"]) == (recipe, flow, backend)
    assert (report["model"], report["data"]) == ("lstm" if recipe == "dynamic" else "resnet20", "digits")
    assert report["quantized_modules"] > 0
    assert ("fake_quant" in report) == (recipe == "qat")
    assert report["int8"]["accuracy"] == accuracy
    assert report["int8"]["size_bytes"] < report["float"]["size_bytes"]
    for name in ("report.md", "config.yaml"):
        assert (tmp_path / name).is_file()
    assert json.loads((tmp_path / "int8" / "manifest.json").read_text())["metrics"]["int8/acc"] == accuracy


def test_sensitivity_and_fallback_from_the_command_line(tmp_path):
    run_app(tmp_path, "+quant=ptq", "trainer.max_epochs=0", "quant.max_accuracy_drop=1", "quant.sensitivity=divergence")
    fallback = read_report(tmp_path)["fallback"]
    assert (fallback["metric"], fallback["kept"], fallback["met"]) == ("val/acc", [], True)
    sensitivity = json.loads((tmp_path / "sensitivity.json").read_text())
    assert sensitivity["metric"] is None
    assert len(sensitivity["layers"]) == fallback["layers"] == 10
    assert "| net.blocks.2.body.3 |" in (tmp_path / "sensitivity.md").read_text()
    assert (tmp_path / "sensitivity.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_phases_of_qat_stay_apart(tmp_path):
    run_app(tmp_path, "+quant=qat", "quant.float_epochs=1")
    expected = {"float/train/loss", "float/test/acc", "qat/train/loss", "qat/val/acc", "qat/test/acc", "int8/test/acc", "int8/acc"}
    assert expected <= logged_names(tmp_path)
    assert {path.parent.name for path in tmp_path.glob("checkpoints/*/last.ckpt")} == {"float", "qat"}
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert config.quant.float_epochs == 1


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("choice", "share"),
    [([], 0.02), (["quant.distillation=0.5"], 0.01), (["quant.distillation=0"], 0.01), (["quant.lr=0.005"], 0.1)],
)
def test_learning_rate_of_qat(choice, share, tmp_path):
    run_app(tmp_path, "+quant=qat", "quant.float_epochs=0", "model.lr=0.05", *choice)
    checkpoint = torch.load(tmp_path / "checkpoints" / "qat" / "last.ckpt", weights_only=True)
    (group,) = checkpoint["optimizer_states"][0]["param_groups"]
    assert group["initial_lr"] == pytest.approx(share * 0.05)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("recipe", "choice", "checkpoint"),
    [("qat", [], None), ("qat", ["quant.convert=best"], "best.ckpt"), ("ptq", [], "best.ckpt"), ("ptq", ["quant.convert=last"], None)],
)
def test_which_epoch_becomes_int8(recipe, choice, checkpoint, tmp_path):
    run_app(tmp_path, f"+quant={recipe}", *choice)
    report = read_report(tmp_path)
    assert report["checkpoint"] == checkpoint
    simulated = report.get("fake_quant", report["float"])["accuracy"]
    assert abs(report["int8"]["accuracy"] - simulated) <= 0.05


@pytest.mark.sampled(1)
@pytest.mark.parametrize("part", ["checkpoint", "network"])
def test_float_weights_from_a_file_need_no_training(part, float_run, tmp_path):
    folder, accuracy = float_run
    path = folder / "checkpoints" / "float" / "last.ckpt"
    if part == "network":
        weights = torch.load(path, weights_only=True)["state_dict"]
        path = tmp_path / "net.pt"
        torch.save({name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}, path)
    run_app(tmp_path, "+quant=qat", f"ckpt_path={path}")
    assert read_report(tmp_path)["float"]["accuracy"] == accuracy
    assert not (tmp_path / "checkpoints" / "float").exists()


def test_unknown_metric_costs_the_accuracy_not_the_model(tmp_path):
    with pytest.warns(UserWarning, match=r"logs no 'test/f1'.*metric=NAME"):
        assert run_app(tmp_path, "+quant=ptq", "trainer.max_epochs=0", "metric=test/f1") is None
    assert read_report(tmp_path)["int8"]["accuracy"] is None
    assert (tmp_path / "int8" / "manifest.json").is_file()


@pytest.mark.sampled(16)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+quant=qat", "quant.flow=jit"], r"`quant`.*`flow`.*'jit'"),
        (["+quant=qat", "quant.backend=tpu"], r"`quant`.*`backend`.*'tpu'"),
        (["+quant=qat", "quant.freeze_bn.epoch=1"], r"`quant`.*exactly one of"),
        (["+quant=qat", "quant.freeze_bn.fraction=2"], r"`fraction`.*\[0, 1\)"),
        (["+quant=qat", "quant.fuse=[[a,b]]"], "only with flow='eager'"),
        (["+quant=qat", "+quant.epochs=3"], r"`quant`.*epochs"),
        (["+quant=qat", "quant.float_epochs=-1"], r"`quant\.float_epochs`.*-1"),
        (["+quant=qat", "quant.float_epochs=2.5"], r"`quant\.float_epochs`.*2\.5"),
        (["seed=dice"], "`seed`.*'dice'"),
        (["+quant=qat", "quant.modules=[nett]"], "nett"),
        (["+quant=qat", "quant.freeze_bn.fraction=null", "quant.freeze_bn.epoch=30"], "freeze_bn"),
        (["+quant=qat", "quant.modules=net"], r"`quant`.*`modules`"),
        (["+quant=qat", "quant.modules=[]"], r"`quant`.*`modules`"),
        (["+quant=qat", "quant.lr=0"], r"`quant\.lr`.*positive"),
        (["+quant=qat", "quant.lr=fast"], r"`quant\.lr`.*positive"),
        (["+quant=qat", "trainer.max_epochs=0"], r"\+quant=ptq trainer\.max_epochs=0"),
        (["+quant=qat", "quant.distillation=2"], r"`quant`.*`distillation`.*2"),
        (["+quant=qat", "quant.convert=first"], r"`quant`.*`convert`.*'first'"),
        (["+quant=qat", "quant.parity=null"], r"`quant`.*`parity`.*None"),
        (["+quant=ptq", "quant.parity=fail"], r"`quant`.*`parity`.*'fail'"),
        (["+quant=ptq", "quant.observer=mode"], r"`observer`.*'mode'"),
        (["+quant=ptq", "quant.max_accuracy_drop=2"], r"`max_accuracy_drop`.*\[0, 1\]"),
        (["+quant=ptq", "quant.metric=1"], r"`quant`.*`metric`"),
        (["+quant=ptq", "quant.sensitivity=all"], r"`quant\.sensitivity`.*'all'"),
        (["+quant=dynamic", "+quant.sensitivity=divergence"], r"`quant\.sensitivity`.*\+quant=ptq"),
        (["+quant=ptq", "quant.calibration_batches=0"], r"`calibration_batches`.*at least 1"),
        (["+quant._target_=torch.nn.ReLU"], "to be a Recipe"),
        (["+quant=dynamic", "quant._target_=qat_lightning.StaticPTQ", "+quant.start=1"], "start"),
        (["ckpt_path=none.ckpt"], "There is no file none.ckpt"),
        (["model._target_=os.system"], r"os\.system.*allowed_targets=\[os\]"),
        (["model._target_=torch.nn.NoSuchLayer"], "cannot be imported"),
        (["+model.bogus=1"], r"`model`.*bogus"),
        (["data._target_=torch.nn.Flatten"], "data"),
        (["model={_target_:torch.nn.Flatten}"], "model"),
        (["logger={_target_:os.system}"], r"`logger\._target_=os\.system`"),
        (["+trainer.bogus=1"], r"`trainer`.*bogus"),
        (["trainer.max_epochs=-3"], r"`trainer`.*max_epochs"),
        (["trainer.accelerator=abacus"], r"`trainer`.*abacus"),
        (["trainer.precision=3"], r"`trainer`.*3"),
        (["+trainer.callbacks.2._target_=os.system"], "callbacks"),
        (["allowed_targets=my_package"], "allowed_targets"),
        (["data=imagefolder"], r"`data\.root` has no value"),
        (["model.lr=-1"], r"`model`.*`lr` to be positive, but got -1"),
        (["model.label_smoothing=2"], r"`model`.*`label_smoothing`"),
        (["seed=${nowhere}"], "nowhere"),
        (["hydra.mode=MULTIRUN", "trainer.devices=2"], "one process per run"),
    ],
    ids=" ".join,
)
def test_bad_input_is_named_before_training(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: pytest.fail("training started"))
    with pytest.raises((QuantizationError, HydraException), match=f"(?s){message}"):
        run_app(tmp_path, *overrides)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_folder_of_others_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", lambda *_, **__: pytest.fail("training started"))
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "notes.txt").touch()
    with pytest.raises(ArtifactError, match="int8 exists and is no saved int8 model"):
        run_app(tmp_path, "+quant=ptq")


@pytest.mark.parametrize(
    "override", ["quant=qat", "+quant=qta", "quant/backend=x86", "model=resnet21", "trainer.max_epoch=3", "sed=1", "quant.flow=fx"]
)
def test_hydra_names_typos(override, tmp_path):
    with pytest.raises((ConfigCompositionException, HydraException)):
        run_app(tmp_path, override)


def test_weights_of_another_shape(float_run, tmp_path):
    weights = torch.load(float_run[0] / "checkpoints" / "float" / "last.ckpt", weights_only=True)["state_dict"]
    torch.save(
        {name: value.repeat(2, *[1] * (value.dim() - 1)) if value.dim() else value for name, value in weights.items()}, tmp_path / "w"
    )
    with pytest.raises(ConfigurationError, match="other shapes"):
        run_app(tmp_path / "run", f"ckpt_path={tmp_path}/w")


def test_command_line_with_a_module_of_the_current_folder(tmp_path, programs):
    (tmp_path / "own.py").write_text("from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))\n")
    own = ["model.net={_target_: own.net}", "trainer.max_epochs=0"]
    line = [ROOT / "train.py", "debug=fast", "trainer.accelerator=cpu", f"hydra.run.dir={tmp_path}/run", *own]
    refused = programs.run(*line, cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith("ConfigurationError: `model.net._target_=own.net`")
    assert "'allowed_targets=[own]'" in refused.stderr and "Traceback" not in refused.stderr
    assert "Traceback" in programs.run(*line, cwd=tmp_path, HYDRA_FULL_ERROR="1").stderr


def test_command_line_end_to_end(tmp_path, programs):
    settings = ["debug=fast", "trainer.accelerator=cpu", "trainer.max_epochs=0", "logger=wandb", f"hydra.run.dir={tmp_path}/run"]
    finished = programs.run(ROOT / "train.py", "+quant=ptq", *settings, cwd=tmp_path, WANDB_MODE="offline")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "run" / "report.md").read_text() in finished.stdout
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
