"""Metrics, configs and reports in the loggers of a run; the only module that knows Weights & Biases."""

import netrc
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.loggers import Logger, WandbLogger
from typing_extensions import override

from qat_lightning.evaluation import Sensitivity
from qat_lightning.report import Report

# The public server's name in netrc, whatever address the installed client reaches it by.
PUBLIC_SERVER = "api.wandb.ai"


def wandb_logger(**kwargs: Any) -> WandbLogger:
    """Return a W&B logger that never asks for a key: online when one is configured, offline when none is.

    ``WANDB_MODE``, or the argument ``mode``, overrides that.

    Args:
        kwargs: arguments of Lightning's ``WandbLogger``, e.g. ``project``, ``name``, ``save_dir``, and of ``wandb.init``.
    """
    mode = kwargs.pop("mode", None) or os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")
    return WandbLogger(mode="offline" if mode == "dryrun" else mode, **kwargs)


def has_api_key() -> bool:
    """Whether W&B finds credentials without asking: in the environment, its settings, or netrc (``wandb login``)."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = wandb.setup().settings
    hosts = {urlsplit(settings.base_url).netloc}
    if settings.base_url == wandb.Settings().base_url:
        hosts.add(PUBLIC_SERVER)
    return bool(settings.api_key) or any(_has_netrc_entry(host) for host in hosts)


def _has_netrc_entry(host: str) -> bool:
    files = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    file = next((file for file in files if file.expanduser().is_file()), None)
    if file is None:
        return False
    try:
        return netrc.netrc(file.expanduser()).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False


class PhaseLogger(Logger):
    """Another logger, with a phase of the run before every metric: ``train/loss`` becomes ``float/train/loss``.

    Float training and QAT log the same names at the same steps; with one of these per phase they stay apart in one run.

    Args:
        logger: where the metrics go.
        phase: e.g. ``"float"``.
    """

    def __init__(self, logger: Logger, phase: str) -> None:
        super().__init__()
        self._logger = logger
        self._phase = phase

    @property
    @override
    def name(self) -> str | None:
        """Name of the wrapped logger."""
        return self._logger.name

    @property
    @override
    def version(self) -> int | str | None:
        """Version of the wrapped logger."""
        return self._logger.version

    @property
    @override
    def save_dir(self) -> str | None:
        """Folder of the wrapped logger."""
        return self._logger.save_dir

    @property
    def experiment(self) -> Any:
        """What the wrapped logger logs to."""
        return getattr(self._logger, "experiment", None)

    @override
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log with the phase before each name; Lightning's bare ``epoch`` as well."""
        self._logger.log_metrics({f"{self._phase}/{name}": value for name, value in metrics.items()}, step)

    @override
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Hand the hyperparameters on."""
        self._logger.log_hyperparams(params, *args, **kwargs)

    @override
    def save(self) -> None:
        """Write what the wrapped logger holds back."""
        self._logger.save()

    @override
    def finalize(self, status: str) -> None:
        """Write what the wrapped logger holds back; it stays open for the next phase."""
        self._logger.save()


def log_config(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """Log a resolved config as the hyperparameters of the run."""
    for logger in loggers:
        logger.log_hyperparams(dict(config))
        logger.save()


def log_report(loggers: Iterable[Logger], report: Report, artifact: Path | None = None) -> None:
    """Log a report: its figures everywhere, and in W&B also in the summary, as tables, and the int8 model when online.

    Args:
        loggers: the loggers of the run.
        report: the outcome.
        artifact: folder of the saved int8 model.
    """
    for logger in loggers:
        logger.log_metrics(report.scalars())
        if isinstance(logger, WandbLogger):
            _log_to_wandb(logger.experiment, report, artifact)
        logger.save()


def log_sensitivity(loggers: Iterable[Logger], sensitivity: Sensitivity) -> None:
    """Log the sensitivity of the layers as a table in W&B; other loggers take numbers alone."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            table = wandb.Table(columns=list(sensitivity.columns()), data=sensitivity.table())
            logger.experiment.log({"sensitivity": table})
            logger.save()


def layer_rows(report: Report) -> list[list[Any]]:
    """Return a row per quantized layer, in the columns of :data:`LAYER_COLUMNS`."""
    steps = {layer.layer: layer.max_steps for layer in report.parity or ()}
    return [[*(getattr(layer, str(column)) for column in LAYER_COLUMNS[:-1]), steps.get(layer.layer)] for layer in report.layers]


LAYER_COLUMNS: list[str | int] = ["layer", "engine", "activation_bits", "weight_bits", "per_channel", "scale", "zero_point", "parity_steps"]


def close(loggers: Iterable[Logger], failed: bool = False) -> None:
    """End the run, so that the next one in this process starts its own.

    Args:
        loggers: the loggers of the run.
        failed: whether W&B shows the run as failed.
    """
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, WandbLogger):
            wandb.finish(exit_code=int(failed))


def _log_to_wandb(run: Any, report: Report, artifact: Path | None) -> None:
    run.summary.update(report.scalars())
    run.log(
        {
            "report": wandb.Table(columns=["", "float", "fake-quant", "int8"], data=[list(row) for row in report.rows()]),
            "layers": wandb.Table(columns=LAYER_COLUMNS, data=layer_rows(report)),
        }
    )
    if artifact is not None and not run.offline and not run.disabled:
        model = wandb.Artifact(f"int8-{run.id}", type="model", metadata=report.scalars())
        model.add_dir(str(artifact))
        run.log_artifact(model)
