"""The validation metrics of a copy of a module, on the validation data of a fit, without a change to the Trainer of that fit."""

import copy
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

ACCURACY_NAMES = ("acc", "accuracy")


class Validation:
    """Runs ``validation_step`` on the validation data, with all hooks and metrics, in a Trainer of its own on the CPU.

    Args:
        trainer: in its fit, or after it.
        loaders: its validation loaders, as the user has made them.
    """

    def __init__(self, trainer: Trainer, loaders: Any) -> None:
        self._loaders = loaders
        self._datamodule = _without_setup(trainer.datamodule, loaders)  # type: ignore[attr-defined]
        self._trainer = Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=trainer.limit_val_batches,
        )

    @staticmethod
    def of(trainer: Trainer | None, module: LightningModule) -> "Validation | None":
        """Return the validation of a fit; None where the module or the data have none."""
        if trainer is None or not is_overridden("validation_step", module) or trainer.limit_val_batches == 0:
            return None
        loaders = trainer.val_dataloaders
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        if not loaders and source.instance is not None and source.is_defined():
            loaders = source.dataloader()  # no epoch was trained, so nobody has asked yet
        return Validation(trainer, loaders) if loaders else None

    def batches(self, limit: int) -> list[Any]:
        """Return the first batches, as the loaders give them."""
        return [batch for batch, _, _ in islice(CombinedLoader(self._loaders, "sequential"), limit)]

    def metrics(self, module: LightningModule) -> dict[str, float]:
        """Return what ``module`` logs.

        Args:
            module: float, fake-quantized or int8, on the CPU.
        """
        data: dict[str, Any] = {"dataloaders": self._loaders} if self._datamodule is None else {"datamodule": self._datamodule}
        with torch.random.fork_rng(devices=[]):
            self._trainer.validate(module, verbose=False, **data)
        return {name: float(value) for name, value in self._trainer.callback_metrics.items()}


def accuracy_name(names: Iterable[str]) -> str | None:
    """Return the first name of an accuracy, such as ``val/acc`` or ``val_accuracy``; None where there is none."""
    return next((name for name in names if name.split("/")[-1].split("_")[-1] in ACCURACY_NAMES), None)


def _without_setup(datamodule: LightningDataModule | None, loaders: Any) -> LightningDataModule | None:
    """Return a datamodule with the same transfer hooks whose data are there already; another Trainer may have it."""
    if datamodule is None:
        return None
    copied = copy.copy(datamodule)
    for name in ("prepare_data", "setup", "teardown"):
        vars(copied)[name] = _do_nothing
    vars(copied)["val_dataloader"] = lambda: loaders
    return copied


def _do_nothing(stage: str = "") -> None:
    """Take the place of a hook of the datamodule."""
