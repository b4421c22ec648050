"""MNIST, Fashion-MNIST and CIFAR-10 by torchvision, downloaded on first use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from torchvision import datasets
from torchvision import transforms as T

from qat_lightning.data.base import SplitData, split_indices
from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import check_choice


@dataclass(frozen=True)
class _Facts:
    """A data set's class, and mean and standard deviation of its training pixels."""

    load: Callable[..., Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    flip: bool


FACTS = {
    "mnist": _Facts(datasets.MNIST, (0.1307,), (0.3081,), 28, flip=False),
    "fashion_mnist": _Facts(datasets.FashionMNIST, (0.2860,), (0.3530,), 28, flip=True),
    "cifar10": _Facts(datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 32, flip=True),
}


class TorchvisionData(SplitData):
    """A data set of torchvision.

    Args:
        dataset: ``"mnist"``, ``"fashion_mnist"`` or ``"cifar10"``.
        root: folder for the files.
        download: fetch them where they are missing.
        batch_size: samples per batch.
        num_workers: processes that load data.
        seed: of the split.
        val_fraction: part of the training data held out for validation.
        augment: random crops, and flips where a mirrored image is still one of its class.
        in_channels: channels of the images.
        num_classes: 10.
        width: pixels of a row.

    Raises:
        ValueError: an unknown data set.
    """

    def __init__(
        self,
        dataset: str,
        root: str | Path,
        download: bool = True,
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 0,
        val_fraction: float = 0.1,
        augment: bool = True,
        in_channels: int = 3,
        num_classes: int = 10,
        width: int = 32,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, num_classes)
        check_choice("dataset", dataset, tuple(FACTS))
        self.facts = FACTS[dataset]
        if (in_channels, width) != (len(self.facts.mean), self.facts.size):
            raise ConfigurationError(
                f"{dataset} has {len(self.facts.mean)} channels and {self.facts.size} pixels a row, not {in_channels} and {width}."
            )
        self.root = Path(root).expanduser()
        self.download = download
        self.val_fraction = val_fraction
        self.augment = augment
        self.in_channels = in_channels
        self.width = width

    def prepare_data(self) -> None:
        """Download what is missing."""
        self._load(train=True, transform=None, download=self.download)
        self._load(train=False, transform=None, download=self.download)

    def setup(self, stage: str) -> None:
        """Split the training data."""
        plain = T.Compose([T.ToTensor(), T.Normalize(self.facts.mean, self.facts.std)])
        flips = [T.RandomHorizontalFlip()] if self.facts.flip else []
        augmented = T.Compose([T.RandomCrop(self.facts.size, padding=self.facts.size // 8), *flips, plain]) if self.augment else plain
        evaluated = self._load(train=True, transform=plain)
        self._check_classes(evaluated.classes, type(evaluated).__name__)
        train, val = split_indices(len(evaluated), self.val_fraction, self.seed)
        self.train_set = Subset(self._load(train=True, transform=augmented), train)
        self.calibration_set, self.val_set = Subset(evaluated, train), Subset(evaluated, val)
        self.test_set = self._load(train=False, transform=plain)

    def _load(self, train: bool, transform: Any, download: bool = False) -> Any:
        try:
            return self.facts.load(self.root, train=train, transform=transform, download=download)
        except RuntimeError as error:
            raise ConfigurationError(f"`root={self.root}` does not hold the data, and it was not downloaded: {error}") from error
