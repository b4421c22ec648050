"""What the Trainer tells: whether it can train a quantized model, where the run ends and how far it has come."""

import math
from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import QAT
from qat_lightning.schedule import Horizon, Progress

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


def check_trainer(trainer: Trainer) -> None:
    """Refuse a strategy or a precision under which a quantized model would come out wrong.

    Raises:
        ConfigurationError: names what was given and what to use instead.
    """
    _check_strategy(trainer)
    if trainer.precision not in PRECISIONS:
        raise ConfigurationError(
            f"precision={trainer.precision!r} is not supported: scales need float32 weights. Use one of {PRECISIONS}; "
            f"under the mixed ones fake-quant is computed in float32."
        )


def _check_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, SingleDeviceStrategy):
        return
    if not isinstance(strategy, DDPStrategy) or strategy.restore_checkpoint_after_setup:
        raise ConfigurationError(
            f"{type(strategy).__name__} is not supported: quantization needs every layer whole on each device, and weights that are "
            f"restored before the optimizer is made. Use Trainer(strategy='ddp'), or Trainer(devices=1, strategy='auto')."
        )
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        raise ConfigurationError(
            f"{type(strategy).__name__} with start_method={strategy.launcher._start_method!r} is not supported: the process that called "
            f"trainer.fit never sees the module that its child processes quantize. Use Trainer(strategy='ddp') in a script, where each "
            f"process runs the script; in a notebook Trainer(devices=1, strategy='auto')."
        )


def check_callbacks(trainer: Trainer, recipe: QAT) -> None:
    """Refuse a callback that undoes what the recipe does.

    Raises:
        ConfigurationError: names the callback and the way out.
    """
    if recipe.freeze_bn is not None and any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"StochasticWeightAveraging measures BatchNorm's statistics anew at its end, which `freeze_bn={recipe.freeze_bn}` forbids: "
            f"the network would be left with mean 0 and variance 1. Use freeze_bn=None, or WeightAveraging."
        )
    if any(isinstance(callback, ModelPruning) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ConfigurationError(
            "ModelPruning in the same fit would prune modules that fake-quant has replaced. Prune in a fit before, with "
            "make_pruning_permanent=True (its default): the zeros are then kept, see `keep_zeros`."
        )


def horizon_of(trainer: Trainer) -> Horizon:
    """Return where the run ends."""
    batches = trainer.num_training_batches
    return Horizon(
        max_epochs=trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else None,
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        batches_per_epoch=int(batches) if math.isfinite(batches) and batches > 0 else None,
    )


def counted_horizon_of(trainer: Trainer) -> Horizon:
    """Return where the run ends, with the optimizer steps that its batches allow, where these are known."""
    horizon = horizon_of(trainer)
    automatic = trainer.lightning_module.automatic_optimization
    if horizon.max_steps or not automatic or not horizon.max_epochs or not horizon.batches_per_epoch:
        return horizon
    steps = math.ceil(horizon.batches_per_epoch / trainer.accumulate_grad_batches) * horizon.max_epochs
    return replace(horizon, max_steps=steps)


def progress_of(trainer: Trainer, batch_idx: int) -> Progress:
    """Return how far the run has come before batch ``batch_idx`` of the current epoch."""
    epoch, step = trainer.current_epoch, trainer.global_step
    return Progress(epoch=epoch, step=step, fraction=horizon_of(trainer).fraction(epoch, batch_idx, step))


def loss_scale_of(trainer: Trainer) -> float:
    """Return what Lightning multiplies the gradients of the loss by: for gradient accumulation, and against underflow in float16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    automatic = trainer.lightning_module.automatic_optimization
    accumulated = trainer.accumulate_grad_batches if automatic else 1
    return (1.0 if scaler is None else float(scaler.get_scale())) / accumulated
