"""What the ready-made datamodules share: loaders, a seeded split, and calibration data without augmentation."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import check_count


class SplitData(LightningDataModule):
    """Training, validation and test data, and the training data once more as evaluation sees it, for calibration.

    A subclass fills the four data sets in ``setup``.

    Args:
        batch_size: samples per batch.
        num_workers: processes that load data.
        seed: of the split and of the order of calibration data.
        num_classes: number of labels; checked against the data.

    Raises:
        ValueError: a count out of range.
        TypeError: a count that is no integer.
    """

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]
    calibration_set: Dataset[Any]

    def __init__(self, batch_size: int, num_workers: int, seed: int, num_classes: int) -> None:
        super().__init__()
        check_count("batch_size", batch_size, minimum=1)
        check_count("num_workers", num_workers, minimum=0)
        check_count("num_classes", num_classes, minimum=1)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.num_classes = num_classes

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled, augmented training batches."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return validation batches."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return test batches."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return test batches."""
        return self._loader(self.test_set)

    def calibration_dataloader(self) -> DataLoader[Any]:
        """Return training batches in evaluation transforms, in an order that depends on the seed alone."""
        return self._loader(self.calibration_set, shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def _loader(self, data: Dataset[Any], **options: Any) -> DataLoader[Any]:
        keep = self.num_workers > 0
        return DataLoader(data, batch_size=self.batch_size, num_workers=self.num_workers, persistent_workers=keep, **options)

    def _check_classes(self, labels: Sequence[Any], source: str) -> None:
        if len(labels) != self.num_classes:
            raise ConfigurationError(
                f"{source} has {len(labels)} classes, but `num_classes={self.num_classes}`: set data.num_classes={len(labels)}."
            )


def split_indices(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of training and validation samples.

    Args:
        count: samples in all.
        fraction: of them for validation, in (0, 1).
        seed: of the permutation.

    Raises:
        ConfigurationError: a fraction that leaves one side empty.
    """
    held_out = int(count * fraction) if isinstance(fraction, int | float) and 0 < fraction < 1 else 0
    if not 0 < held_out < count:
        raise ConfigurationError(f"`val_fraction={fraction}` of {count} samples leaves no validation or no training data: choose e.g. 0.1.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[held_out:], order[:held_out]
