"""The LightningModule around the networks that ``train.py`` offers, and around the user's own."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import check_count

WARM_UP = 0.05
"""Part of the run in which the learning rate rises."""

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class Classifier(LightningModule):
    """Trains any network that returns logits.

    Args:
        net: the network; takes what a batch holds besides its labels.
        num_classes: length of the network's output.
        lr: highest learning rate; ``lr`` is also the attribute that Lightning's tuner sets.
        optimizer: called with the parameters and ``lr``; None: SGD with Nesterov momentum 0.9 and weight decay 5e-4.
        cosine: let the learning rate fall to zero along a cosine after a short warm-up; needs a run whose end is known.
        label_smoothing: in [0, 1).

    Raises:
        ValueError: a value out of range.
        TypeError: a value of another type.
    """

    def __init__(
        self,
        net: nn.Module,
        num_classes: int,
        lr: float = 0.1,
        optimizer: OptimizerFactory | None = None,
        cosine: bool = True,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, minimum=2)
        _check_number("lr", lr, "positive", lambda value: value > 0)
        _check_number("label_smoothing", label_smoothing, "in [0, 1)", lambda value: 0 <= value < 1)
        self.num_classes = num_classes
        self.net = net
        self.lr = lr
        self.optimizer = optimizer or _sgd
        self.cosine = cosine
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.train_acc = MulticlassAccuracy(num_classes, average="micro")
        self.val_acc = self.train_acc.clone()
        self.test_acc = self.train_acc.clone()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the network's logits."""
        return self.net(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a labelled batch."""
        return self._step("train", batch, self.train_acc)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._step("val", batch, self.val_acc)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log loss and accuracy."""
        self._step("test", batch, self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        """Return the logits of a batch, labelled or not."""
        logits: Tensor = self._logits(batch)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and its schedule."""
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        if not self.cosine or steps == float("inf"):
            return optimizer
        warm_up = max(1, int(WARM_UP * steps))
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=warm_up),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, int(steps) - warm_up)),
            ],
            milestones=[warm_up],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, stage: str, batch: Any, accuracy: Metric) -> Tensor:
        logits, labels = self._logits(batch), _labels(batch)
        if logits.shape[-1] != self.num_classes:
            raise ConfigurationError(
                f"The network returns {logits.shape[-1]} numbers a sample, but `num_classes={self.num_classes}`: give both the same."
            )
        loss: Tensor = self.loss(logits, labels)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=stage != "train")
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, prog_bar=stage == "val", batch_size=len(labels))
        return loss

    def _logits(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self(**{name: value for name, value in batch.items() if name != "labels"})
        return self(batch if isinstance(batch, Tensor) else batch[0])


def _check_number(argument: str, value: object, wanted: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `{argument}` to be a number, but got {value!r}.")
    if not fits(value):
        raise ValueError(f"Expected argument `{argument}` to be {wanted}, but got {value}.")


def _labels(batch: Any) -> Tensor:
    labels: Tensor = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    return labels


def _sgd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
