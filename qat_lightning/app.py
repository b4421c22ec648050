"""What ``train.py`` does: compose -> check -> build -> train, quantize and test -> report."""

import copy
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_original_cwd
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat_lightning.artifact import save_quantized
from qat_lightning.callback import QuantizationCallback
from qat_lightning.checkpoint import ConvertedWeights, load_float_weights
from qat_lightning.distributed import ALONE, Processes, alone, fail_together
from qat_lightning.errors import ConfigurationError, QuantizationError
from qat_lightning.evaluation.plots import can_plot
from qat_lightning.files import write_atomically
from qat_lightning.folder import refuse_foreign
from qat_lightning.gate import ParityAction
from qat_lightning.instantiation import build, check_targets, make_importable
from qat_lightning.plan import needs_example
from qat_lightning.recipe import QAT, DynamicPTQ, Recipe
from qat_lightning.report import Report
from qat_lightning.tracking import PhaseLogger, close, log_config, log_report, log_sensitivity

log = logging.getLogger(__name__)

# Learning rate of QAT as a share of the float training's.
LR_SHARE_WITH_TEACHER = 0.02
LR_SHARE_WITH_LABELS = 0.01


@dataclass(frozen=True)
class Quantization:
    """The ``quant`` group of the config.

    Args:
        recipe: the recipe.
        modules: submodules to quantize; None: every child with layers to quantize.
        float_epochs: QAT only: epochs of float training before.
        lr: QAT only: learning rate of its epochs; None: a 50th of the model's own, where it has an attribute ``lr`` and the teacher
            gives the whole gradient, a hundredth where labels give a part of it.
        convert: which weights become int8, ``"best"`` or ``"last"``; None: best where a ModelCheckpoint monitors a metric.
        parity: ``"error"``, ``"warn"`` or ``"off"`` where int8 and fake-quant differ by more than one step.
        metric: the validation metric of ``max_accuracy_drop`` and of the sensitivity; None: the first accuracy.
        sensitivity: ``"divergence"`` or ``"metric"`` measures what int8 does at each layer; None does not.
    """

    recipe: Recipe
    modules: list[str] | None
    float_epochs: int
    lr: float | None
    convert: ConvertedWeights | None
    parity: ParityAction
    metric: str | None
    sensitivity: Literal["divergence", "metric"] | None

    def callback(self) -> QuantizationCallback:
        """Return a new callback that carries the recipe out."""
        return QuantizationCallback(self.recipe, modules=self.modules, convert=self.convert, parity=self.parity, metric=self.metric)


@dataclass(frozen=True)
class Run:
    """What every step of a run needs.

    Args:
        config: the resolved config.
        folder: what the run writes goes here.
        model: the model, its weights loaded.
        data: the data.
        loggers: the loggers of the run.
        quantization: None for float training.
        processes: that train together.
    """

    config: dict[str, Any]
    folder: Path
    model: LightningModule
    data: LightningDataModule
    loggers: list[Logger]
    quantization: Quantization | None
    processes: Processes = ALONE

    def trainer(self, phase: str, callbacks: Sequence[Callback] = (), **arguments: Any) -> Trainer:
        """Return a new Trainer for one phase.

        Args:
            phase: goes before the names of metrics, and is the folder of its checkpoints.
            callbacks: before those of the config.
            arguments: of the Trainer, in place of those of the config.
        """
        own = _build_callbacks(self.config["trainer"], phase)
        if arguments.get("enable_checkpointing") is False:
            own = [callback for callback in own if not isinstance(callback, Checkpoint)]
        loggers = [PhaseLogger(logger, phase) for logger in self.loggers]
        trainer = build(self.config["trainer"], "trainer", callbacks=[*callbacks, *own], logger=loggers, **arguments)
        assert isinstance(trainer, Trainer)
        return trainer


@dataclass(frozen=True)
class Outcome:
    """What a run ends with.

    Args:
        accuracy: of the final model, a fraction of the test set; None if the model logs none.
        report: what the quantization did; None for float training, and on any process but rank zero.
    """

    accuracy: float | None = None
    report: Report | None = None


def run(cfg: DictConfig) -> float | None:
    """Train, quantize, test and report as a composed config says.

    Args:
        cfg: the config, composed by Hydra.

    Returns:
        Accuracy of the final model, int8 where there is a recipe, for a Hydra sweeper to maximise; None if the model logs none,
        and where another process has the int8 model.

    Raises:
        QuantizationError: anything wrong with the config, before training where it can be known then.
    """
    _quieten_lightning()
    make_importable(get_original_cwd())
    config = resolve(cfg)
    check_targets(config, config.get("allowed_targets") or ())
    _seed(config.get("seed"))
    this = _build_run(config, Path(HydraConfig.get().runtime.output_dir))
    failed = True
    try:
        log_config(this.loggers, config)
        outcome = _train(this) if this.quantization is None else _quantize(this, this.quantization)
        failed = False
    finally:
        close(this.loggers, failed)
    # After the loggers' own last words, so that it is the last thing on the terminal.
    if outcome.report is not None:
        print(f"\n{outcome.report.to_markdown()}\nAll files of this run: {this.folder}")
    return outcome.accuracy


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Return a config as plain dicts and lists, every interpolation resolved.

    Raises:
        ConfigurationError: a value that is still missing, or an interpolation that leads nowhere.
    """
    if missing := list(_missing_keys(OmegaConf.to_container(cfg, resolve=False))):
        raise ConfigurationError(f"`{missing[0]}` has no value yet: give it one with {missing[0]}=VALUE.")
    try:
        config = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"`{error.full_key}`: {str(error).splitlines()[0]}") from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def _missing_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys left to the user; OmegaConf's own search names what interpolates them instead."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if value == "???":
            yield f"{prefix}{key}"
        yield from _missing_keys(value, f"{prefix}{key}.")


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turn an error about the user's input into its message and exit status 1; ``HYDRA_FULL_ERROR=1`` keeps the traceback."""
    try:
        yield
    except (QuantizationError, MisconfigurationException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise SystemExit(f"{type(error).__name__}: {error}\nSet HYDRA_FULL_ERROR=1 to see where it was raised.") from error


def _quieten_lightning() -> None:
    # A run has several Trainers, and each would introduce itself.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # Lightning 2.6 meets a deprecation of PyTorch 2.15, which no user can act on.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")


def _seed(seed: Any) -> None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32):
        raise ConfigurationError(f"Expected `seed` to be an integer from 0 to 2**32 - 1 or null, but got {seed!r}.")
    seed_everything(seed, workers=True)


def _build_run(config: dict[str, Any], folder: Path) -> Run:
    """Build everything and check what can be checked before training."""
    quantization = _build_quantization(config)
    if quantization is not None:
        refuse_foreign(folder / "int8")
    model = build(config["model"], "model")
    _expect("model", model, LightningModule, "model=custom wraps an nn.Module into one")
    data = build(config["data"], "data")
    _expect("data", data, LightningDataModule, "it needs train, val and test loaders")
    if quantization is not None and quantization.lr is not None and not hasattr(model, "lr"):
        raise ConfigurationError(f"`quant.lr={quantization.lr}` needs a model with an attribute `lr`, which {type(model).__name__} lacks.")
    if (path := config.get("ckpt_path")) is not None:
        load_float_weights(model, path)
    # Without loggers, so that a refused run leaves no trace in them.
    this = Run(config, folder, model, data, [], quantization)
    trainer = this.trainer("float")
    _refuse_parallel_multirun(trainer)
    if trainer.is_global_zero:
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    logger = config.get("logger")
    return replace(this, loggers=[build(logger, "logger")] if logger else [], processes=Processes.of(trainer))


def _build_quantization(config: dict[str, Any]) -> Quantization | None:
    quant = config.get("quant")
    if quant is None:
        return None
    settings = {name: quant.get(name) for name in ("modules", "float_epochs", "lr", "convert", "parity", "metric", "sensitivity")}
    recipe = build({name: value for name, value in quant.items() if name not in settings}, "quant")
    _expect("quant", recipe, Recipe, "use +quant=qat, +quant=ptq or +quant=dynamic")
    epochs, lr = settings["float_epochs"] or 0, settings["lr"]
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ConfigurationError(f"Expected `quant.float_epochs` to be an integer of at least 0, but got {epochs!r}.")
    if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float) or lr <= 0):
        raise ConfigurationError(f"Expected `quant.lr` to be a positive number or null, but got {lr!r}.")
    _check_sensitivity(recipe, settings["sensitivity"])
    if isinstance(recipe, QAT) and config["trainer"].get("max_epochs") == 0:
        raise ConfigurationError(
            "`trainer.max_epochs=0` leaves no epoch for quantization-aware training. To quantize without training: "
            "+quant=ptq trainer.max_epochs=0. To skip the float training before QAT: quant.float_epochs=0."
        )
    parity: Any = settings["parity"] if "parity" in quant else "warn"
    quantization = Quantization(
        recipe, settings["modules"], epochs, lr, settings["convert"], parity, settings["metric"], settings["sensitivity"]
    )
    try:
        quantization.callback()
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"`quant`: {error}") from error
    return quantization


def _check_sensitivity(recipe: Recipe, sensitivity: object) -> None:
    if sensitivity not in (None, "divergence", "metric"):
        raise ConfigurationError(f"Expected `quant.sensitivity` to be divergence, metric or null, but got {sensitivity!r}.")
    if sensitivity is not None and isinstance(recipe, DynamicPTQ):
        raise ConfigurationError("`quant.sensitivity` needs fake-quant, which dynamic quantization has not: use +quant=ptq or +quant=qat.")


def _expect(key: str, value: object, kind: type, hint: str) -> None:
    if not isinstance(value, kind):
        raise ConfigurationError(f"Expected `{key}` to be a {kind.__name__}, but got a {type(value).__name__}; {hint}.")


def _refuse_parallel_multirun(trainer: Trainer) -> None:
    # Lightning starts its other processes with this command line, so that each of them would run the whole sweep.
    processes = trainer.num_devices * trainer.num_nodes
    if HydraConfig.get().mode == RunMode.MULTIRUN and processes > 1:
        raise ConfigurationError(
            f"A Hydra multirun trains with one process per run, but this Trainer uses {processes}: "
            "set trainer.devices=1, or start the runs one by one."
        )


def _build_callbacks(trainer: dict[str, Any], phase: str) -> list[Callback]:
    callbacks = [build(config, f"trainer.callbacks[{index}]") for index, config in enumerate(trainer.get("callbacks") or ())]
    for callback in callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
            callback.dirpath = os.path.join(callback.dirpath, phase)
    return callbacks


def _train(this: Run) -> Outcome:
    """Train and test in float."""
    trainer = this.trainer("float")
    trainer.fit(this.model, datamodule=this.data)
    return Outcome(_test(this, trainer, this.model, verbose=True))


def _quantize(this: Run, quantization: Quantization) -> Outcome:
    """Carry out a recipe and report what became of the model."""
    callback = quantization.callback()
    if isinstance(quantization.recipe, QAT):
        accuracies = _train_quantization_aware(this, quantization, callback)
    else:
        accuracies = _train_and_quantize(this, callback)
    with fail_together(this.processes), alone():
        return _finish(this, callback, accuracies) if this.processes.rank == 0 else Outcome()


def _train_quantization_aware(this: Run, quantization: Quantization, callback: QuantizationCallback) -> dict[str, float | None]:
    _rehearse(this, quantization.callback())
    epochs = quantization.float_epochs if this.config.get("ckpt_path") is None else 0
    trainer = this.trainer("float", max_epochs=epochs)
    if epochs:
        trainer.fit(this.model, datamodule=this.data)
    accuracies = {"float32": _test(this, trainer, this.model)}
    _set_learning_rate(this.model, quantization)
    trainer = this.trainer("qat", [callback])
    trainer.fit(this.model, datamodule=this.data)
    return {**accuracies, "fake_quant": _test(this, trainer, this.model, callback.converted_checkpoint)}


def _set_learning_rate(model: LightningModule, quantization: Quantization) -> None:
    """Set ``model.lr``.

    At a 50th of it a teacher makes a ResNet and a MobileNetV2 better than float in two epochs; what labels teach a trained network at a
    tenth costs a ResNet a quarter of a point.
    """
    own = getattr(model, "lr", None)
    if quantization.lr is not None:
        model.lr = quantization.lr  # type: ignore[assignment]
    elif isinstance(own, float):
        taught = isinstance(quantization.recipe, QAT) and quantization.recipe.distillation == 1
        model.lr = own * (LR_SHARE_WITH_TEACHER if taught else LR_SHARE_WITH_LABELS)  # type: ignore[assignment]


def _rehearse(this: Run, callback: QuantizationCallback) -> None:
    """Set QAT up on a copy: what it refuses is better known before the float training than after."""
    model, trainer = copy.deepcopy(this.model), this.trainer("qat", [callback])
    if needs_example(callback.recipe):  # from the first batch, which this trainer has no fit to get from
        if this.processes.count > 1:
            return
        this.data.prepare_data()
        this.data.setup("fit")
        trainer.strategy._lightning_module = model
        trainer._data_connector.attach_data(model, datamodule=this.data)
    callback.setup(trainer, model, "fit")
    model.configure_model()


def _train_and_quantize(this: Run, callback: QuantizationCallback) -> dict[str, float | None]:
    trainer = this.trainer("float", [callback])
    trainer.fit(this.model, datamodule=this.data)
    return {"float32": _test(this, trainer, this.model, callback.converted_checkpoint)}


def _finish(this: Run, callback: QuantizationCallback, accuracies: dict[str, float | None]) -> Outcome:
    """Save the int8 model, test it, and write the report."""
    # Saved first: nothing that fails from here on costs the model.
    save_quantized(callback.quantized_module, this.folder / "int8", callback.report, programs=())
    accuracies["int8"] = _test(this, _cpu_trainer(this), callback.quantized_module)
    report = callback.report.named(model=_name(this, "model"), data=_name(this, "data"))
    for column, accuracy in accuracies.items():
        if accuracy is not None:
            report = report.with_accuracy(column, accuracy)  # type: ignore[arg-type]
    report.save(this.folder)
    save_quantized(callback.quantized_module, this.folder / "int8", report)
    log_report(this.loggers, report, this.folder / "int8")
    _measure_sensitivity(this, callback)
    return Outcome(accuracies["int8"], report)


def _measure_sensitivity(this: Run, callback: QuantizationCallback) -> None:
    """Measure what int8 does at each layer where the config asks for it, and write and log the table."""
    assert this.quantization is not None
    if this.quantization.sensitivity is None:
        return
    found = callback.measure_sensitivity(this.model, use_metric=this.quantization.sensitivity == "metric")
    found.save(this.folder, plot=can_plot())
    if not can_plot():
        log.warning('There is no sensitivity.png without matplotlib: pip install "qat-lightning[plot]".')
    log_sensitivity(this.loggers, found)


def _cpu_trainer(this: Run) -> Trainer:
    """Return a Trainer that runs int8 models, whose kernels are the processor's."""
    cpu: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true", "plugins": None}
    return this.trainer("int8", enable_checkpointing=False, deterministic=False, **cpu)


def _test(this: Run, trainer: Trainer, model: LightningModule, checkpoint: Path | None = None, verbose: bool = False) -> float | None:
    """Return the accuracy on the test set, of the weights in ``checkpoint`` if given; None if the model logs none."""
    (metrics, *_) = trainer.test(model, datamodule=this.data, ckpt_path=checkpoint, weights_only=True, verbose=verbose)
    name = this.config.get("metric", "test/acc")
    if name not in metrics:
        # No error: it would cost the user a trained model.
        warnings.warn(f"The model logs no {name!r} in its test steps, only {sorted(metrics)}: choose one with metric=NAME.", stacklevel=2)
        return None
    return float(metrics[name])


def _name(this: Run, group: str) -> str:
    """Return what was chosen for a group, or the class where the config was not chosen by name."""
    return str(HydraConfig.get().runtime.choices.get(group) or type(getattr(this, group)).__name__)
