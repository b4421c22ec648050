"""Scikit-learn's bundled scans of handwritten digits: real data, no download."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, TensorDataset

from qat_lightning.data.base import SplitData
from qat_lightning.errors import ConfigurationError

TEST_SAMPLES, VALIDATION_SAMPLES = 450, 135


class DigitsData(SplitData):
    """1,797 digits of 8x8 pixels (UCI ML handwritten digits): 1,212 to train, 135 to validate, 450 to test, stratified.

    Args:
        batch_size: samples per batch.
        num_workers: processes that load data; the data lies in memory.
        seed: of the split into training and validation data; the test set is always the same.
        augment: shift training images by up to one pixel.
        in_channels: 1.
        num_classes: 10.
        width: pixels of a row, 8.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        augment: bool = True,
        in_channels: int = 1,
        num_classes: int = 10,
        width: int = 8,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, num_classes)
        if (in_channels, width) != (1, 8):
            raise ConfigurationError(f"The digits have 1 channel and 8 pixels a row, not `in_channels={in_channels}` and `width={width}`.")
        self.augment = augment
        self.in_channels = in_channels
        self.width = width

    def setup(self, stage: str) -> None:
        """Load and split; images are float32 ``(1, 8, 8)`` in [-1, 1]."""
        bunch = load_digits()
        self._check_classes(bunch.target_names, "the digits data")
        images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
        labels = torch.from_numpy(bunch.target).long()
        rest, test = train_test_split(range(len(labels)), test_size=TEST_SAMPLES, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=VALIDATION_SAMPLES, stratify=labels[rest], random_state=self.seed)
        self.calibration_set = TensorDataset(images[train], labels[train])
        self.train_set = _Shifted(images[train], labels[train]) if self.augment else self.calibration_set
        self.val_set = TensorDataset(images[val], labels[val])
        self.test_set = TensorDataset(images[test], labels[test])


class _Shifted(Dataset[tuple[Tensor, Tensor]]):
    """Images shifted by up to one pixel, anew each time; what enters is background."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.padded = pad(images, (1, 1, 1, 1), value=-1.0)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row, column = torch.randint(0, 3, (2,)).tolist()
        height, width = self.padded.shape[-2] - 2, self.padded.shape[-1] - 2
        return self.padded[index, :, row : row + height, column : column + width], self.labels[index]
