import csv
import json
import math

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger

from qat_lightning.evaluation import LayerSensitivity, Sensitivity
from qat_lightning.report import LayerParity, LayerReport, Measurement, Report
from qat_lightning.tracking import (
    LAYER_COLUMNS,
    PhaseLogger,
    close,
    has_api_key,
    layer_rows,
    log_config,
    log_report,
    log_sensitivity,
    wandb_logger,
)

REPORT = Report(
    recipe="ptq",
    flow="fx",
    backend="x86",
    quantized_modules=2,
    float32=Measurement(accuracy=0.9, size_bytes=4_000_000, latency_ms=2.0),
    int8=Measurement(accuracy=0.875, size_bytes=1_000_000, latency_ms=1.0),
    parity=(LayerParity(layer="conv", max_steps=1, differing=0.1),),
    layers=(
        LayerReport(layer="conv", engine="onednn", activation_bits=8, per_channel=True, scale=0.5, zero_point=7),
        LayerReport(layer="fc", engine="x86", activation_bits=7, per_channel=False),
    ),
)


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    """Neither a key nor a mode from the machine that runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


@pytest.fixture
def csv_logger(tmp_path):
    return CSVLogger(tmp_path, name="csv", version="")


def read_csv(folder):
    with (folder / "csv" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def write_netrc(folder, host):
    path = folder / "home" / ".netrc"
    path.write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    path.chmod(0o600)


@pytest.mark.parametrize(
    ("environment", "mode", "expected"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "k" * 40}, None, "online"),
        ({"WANDB_IDENTITY_TOKEN_FILE": "token"}, None, "online"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "dryrun"}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, None, "disabled"),
        ({"WANDB_MODE": "online"}, "disabled", "disabled"),
    ],
)
def test_mode(environment, mode, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_logger(mode=mode)._wandb_init["mode"] == expected


def test_key_of_wandb_login_is_found(tmp_path):
    assert not has_api_key()
    write_netrc(tmp_path, "api.wandb.ai")
    assert has_api_key()


def test_key_of_another_server_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example")
    write_netrc(tmp_path, "api.wandb.ai")
    assert not has_api_key()
    write_netrc(tmp_path, "wandb.example")
    assert has_api_key()


def test_unreadable_netrc_means_offline(tmp_path):
    (tmp_path / "home" / ".netrc").write_text("machine")
    assert not has_api_key()


def test_phase_goes_before_every_metric(csv_logger, tmp_path):
    for phase in ("float", "qat"):
        PhaseLogger(csv_logger, phase).log_metrics({"val/acc": 0.5}, step=1)
    csv_logger.save()
    rows = read_csv(tmp_path)
    assert [row["float/val/acc"] for row in rows] == ["0.5", ""]
    assert [row["qat/val/acc"] for row in rows] == ["", "0.5"]


def test_phase_logger_forwards_the_rest(csv_logger):
    logger = PhaseLogger(csv_logger, "float")
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert (logger.name, logger.version, logger.save_dir) == (csv_logger.name, csv_logger.version, csv_logger.save_dir)
    assert logger.experiment is csv_logger.experiment
    assert csv_logger.experiment.hparams == {"a": 1}


def test_layer_rows_hold_qparams_and_parity():
    assert LAYER_COLUMNS == ["layer", "engine", "activation_bits", "weight_bits", "per_channel", "scale", "zero_point", "parity_steps"]
    assert layer_rows(REPORT) == [["conv", "onednn", 8, 8, True, 0.5, 7, 1], ["fc", "x86", 7, 8, False, None, None, None]]


def test_csv_gets_config_and_figures(csv_logger, tmp_path):
    log_config([csv_logger], {"seed": 3})
    log_report([csv_logger], REPORT)
    close([csv_logger])
    assert "seed: 3" in (tmp_path / "csv" / "hparams.yaml").read_text()
    assert {name: float(value) for name, value in read_csv(tmp_path)[0].items() if name != "step"} == REPORT.scalars()


def test_wandb_offline_gets_config_summary_and_tables(tmp_path):
    logger = wandb_logger(project="test", save_dir=str(tmp_path))
    artifact = tmp_path / "int8"
    artifact.mkdir()
    log_config([logger], {"seed": 3})
    log_report([logger], REPORT, artifact)
    run = logger.experiment
    assert run.offline
    assert run.config["seed"] == 3
    assert {name: run.summary[name] for name in REPORT.scalars()} == REPORT.scalars()
    close([logger])
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in tmp_path.glob("wandb/*/files/media/table/*.json")}
    assert tables["layers"]["columns"] == LAYER_COLUMNS
    assert tables["layers"]["data"] == layer_rows(REPORT)
    assert tables["report"]["data"] == [list(row) for row in REPORT.rows()]


def test_wandb_gets_the_sensitivity_as_a_table(tmp_path):
    logger = wandb_logger(project="test", save_dir=str(tmp_path))
    row = LayerSensitivity(layer="conv", sqnr_db=math.inf, only=0.25, all_but=0.5)
    log_sensitivity([logger], Sensitivity(rows=(row,), divergence=0.75))
    close([logger])
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/*/files/media/table/sensitivity*.json")]
    assert tables and all(table["data"] == [["conv", None, 0.25, 0.5]] for table in tables)


def test_each_run_gets_its_own(tmp_path):
    ids = []
    for _ in range(2):
        logger = wandb_logger(project="test", save_dir=str(tmp_path))
        ids.append(logger.experiment.id)
        close([logger])
        assert wandb.run is None
    assert ids[0] != ids[1]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


class OnlineRun:
    """What an online run takes; there is no server in a test."""

    id, offline, disabled = "abc", False, False

    def __init__(self):
        self.summary, self.artifacts = {}, []

    def log(self, values, **_):
        pass

    def log_artifact(self, artifact):
        self.artifacts.append(artifact)


def test_artifact_is_logged_when_online(tmp_path):
    logger = wandb_logger(mode="disabled")
    logger._experiment = run = OnlineRun()
    (tmp_path / "int8").mkdir()
    (tmp_path / "int8" / "manifest.json").write_text("{}")
    log_report([logger], REPORT, tmp_path / "int8")
    (artifact,) = run.artifacts
    assert (artifact.name, artifact.type, list(artifact.manifest.entries)) == ("int8-abc", "model", ["manifest.json"])
