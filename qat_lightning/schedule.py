"""When fake-quant, observers and BatchNorm statistics are on: a pure function of the recipe and the trainer's progress.

Nothing is remembered between calls, so a resumed run is in the phase that the uninterrupted one would be in.
"""

import math
from dataclasses import dataclass

from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import QAT, When


@dataclass(frozen=True)
class Progress:
    """How far a training run has come.

    Args:
        epoch: epochs completed.
        step: optimizer steps made, those of every optimizer counted.
        fraction: part of the run that is over, in [0, 1]; NaN where the run has no known end.
    """

    epoch: int
    step: int
    fraction: float


@dataclass(frozen=True)
class Horizon:
    """Where a training run ends.

    Args:
        max_epochs: epochs the run has at most; None: no limit.
        max_steps: optimizer steps the run has at most, those of every optimizer counted; None: no limit.
        batches_per_epoch: None where the loader does not tell.
    """

    max_epochs: int | None
    max_steps: int | None
    batches_per_epoch: int | None

    def fraction(self, epoch: int, batch: int, step: int) -> float:
        """Return the part of the run that is over, by the limit that comes first; NaN where there is no limit.

        Args:
            epoch: epochs completed.
            batch: batches seen in the current epoch.
            step: optimizer steps made.
        """
        parts = []
        if self.max_epochs:
            within = batch / self.batches_per_epoch if self.batches_per_epoch else 0.0
            parts.append((epoch + min(within, 1.0)) / self.max_epochs)
        if self.max_steps:
            parts.append(step / self.max_steps)
        return min(max(parts), 1.0) if parts else math.nan


@dataclass(frozen=True)
class Phase:
    """What is on."""

    fake_quant: bool
    observers: bool
    bn_frozen: bool


IDLE = Phase(fake_quant=True, observers=False, bn_frozen=False)


def reached(when: When, progress: Progress) -> bool:
    """Whether the moment has come."""
    if when.epoch is not None:
        return progress.epoch >= when.epoch
    if when.step is not None:
        return progress.step >= when.step
    assert when.fraction is not None  # a When has exactly one of the three
    return progress.fraction >= when.fraction


def phase(recipe: QAT, progress: Progress) -> Phase:
    """Return what is on during a training step at this progress."""
    return Phase(
        fake_quant=recipe.start is None or reached(recipe.start, progress),
        observers=recipe.freeze_observers is None or not reached(recipe.freeze_observers, progress),
        bn_frozen=recipe.freeze_bn is not None and reached(recipe.freeze_bn, progress),
    )


def check_reachable(recipe: QAT, horizon: Horizon) -> None:
    """Refuse a schedule with a moment that this run never reaches.

    Raises:
        ConfigurationError: observers that never learn, a moment at or after the end of training, or a fraction of a run without an end.
    """
    frozen_at_once = recipe.freeze_observers is not None and not any(vars(recipe.freeze_observers).values())
    if frozen_at_once and not recipe.calibration_batches:
        raise ConfigurationError(
            f"`freeze_observers={recipe.freeze_observers}` freezes the ranges before the observers have seen any data: "
            f"use a later moment, or calibrate them with `calibration_batches`."
        )
    for argument in ("start", "freeze_bn", "freeze_observers"):
        when = getattr(recipe, argument)
        if when is None:
            continue
        if when.fraction is not None and not (horizon.max_epochs or horizon.max_steps):
            raise ConfigurationError(
                f"`{argument}={when}` needs a run whose end is known, but the Trainer has neither max_epochs nor max_steps: "
                f"set one of them, or use When(epoch=...) or When(step=...)."
            )
        for unit, limit in (("epoch", horizon.max_epochs), ("step", horizon.max_steps)):
            moment = getattr(when, unit)
            if moment is not None and limit is not None and moment >= limit:
                raise ConfigurationError(
                    f"`{argument}={when}` is never reached: training ends after {limit} {unit}s (the last one is number {limit - 1}). "
                    f"Use an earlier {unit}, When(fraction=...), or None for 'never'."
                )
