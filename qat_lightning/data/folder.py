"""Images in folders, one per class."""

from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Subset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from qat_lightning.data.base import SplitData, split_indices
from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import check_choice, check_count


class ImageFolderData(SplitData):
    """``root/train`` and ``root/test``, and ``root/val`` where there is one, with a folder per class in each.

    Args:
        root: folder of the data.
        num_classes: number of class folders.
        image_size: side of the square that is cropped from the centre; None takes images as they are.
        resize_size: shorter side of an image before it is cropped, e.g. 256 for 224; None: ``image_size``.
        mean: of each channel, for pixels in [0, 1].
        std: of each channel, for pixels in [0, 1].
        augment: ``"none"``, or ``"crop_flip"``: shifted by up to four pixels where ``image_size`` is None, else randomly resized crops.
        batch_size: samples per batch.
        num_workers: processes that load data.
        seed: of the split.
        val_fraction: part of the training data held out where there is no ``root/val``.
        in_channels: 3; torchvision loads every image in colour.

    Raises:
        ValueError: an unknown augmentation, or a size out of range.
        TypeError: a size that is no integer.
        ConfigurationError: a missing or empty folder, or classes that differ between the folders.
    """

    def __init__(
        self,
        root: str | Path,
        num_classes: int,
        image_size: int | None = None,
        resize_size: int | None = None,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
        augment: Literal["none", "crop_flip"] = "crop_flip",
        batch_size: int = 64,
        num_workers: int = 2,
        seed: int = 0,
        val_fraction: float = 0.1,
        in_channels: int = 3,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, num_classes)
        check_choice("augment", augment, ("none", "crop_flip"))
        if image_size is not None:
            check_count("image_size", image_size, minimum=1)
        if resize_size is not None:
            check_count("resize_size", resize_size, minimum=image_size or 1)
            if image_size is None:
                raise ConfigurationError(f"`resize_size={resize_size}` needs `image_size`, to which images are cropped afterwards.")
        if in_channels != 3:
            raise ConfigurationError(f"`in_channels={in_channels}`: images are loaded in colour, with 3 channels.")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.resize_size = image_size if resize_size is None else resize_size
        self.normalize = T.Compose([T.ToTensor(), T.Normalize(list(mean), list(std))])
        self.augment = augment
        self.val_fraction = val_fraction
        self.in_channels = in_channels

    def setup(self, stage: str) -> None:
        """Find the images and split the training data where there is no ``root/val``."""
        evaluation, training = self._evaluation(), self._training()
        evaluated = self._folder("train", evaluation)
        augmented = self._folder("train", training)
        self.test_set = self._folder("test", evaluation, evaluated.classes)
        self._check_classes(evaluated.classes, str(self.root / "train"))
        if (self.root / "val").is_dir():
            self.train_set, self.calibration_set, self.val_set = augmented, evaluated, self._folder("val", evaluation, evaluated.classes)
            return
        train, val = split_indices(len(evaluated), self.val_fraction, self.seed)
        self.train_set, self.calibration_set, self.val_set = Subset(augmented, train), Subset(evaluated, train), Subset(evaluated, val)

    def _folder(self, name: str, transform: Any, classes: list[str] | None = None) -> ImageFolder:
        try:
            folder = ImageFolder(self.root / name, transform)
        except FileNotFoundError as error:
            raise ConfigurationError(f"`root={self.root}` needs a folder {name!r} with a folder of images per class: {error}") from error
        if classes is not None and folder.classes != classes:
            raise ConfigurationError(f"{self.root}: train has the classes {classes}, but {name} has {folder.classes}.")
        return folder

    def _evaluation(self) -> Any:
        resize = [] if self.image_size is None else [T.Resize(self.resize_size), T.CenterCrop(self.image_size)]
        return T.Compose([*resize, self.normalize])

    def _training(self) -> Any:
        if self.augment == "none":
            return self._evaluation()
        if self.image_size is None:
            return T.Compose([T.Lambda(_shift), T.RandomHorizontalFlip(), self.normalize])
        return T.Compose([T.RandomResizedCrop(self.image_size, scale=(0.35, 1.0)), T.RandomHorizontalFlip(), self.normalize])


def _shift(image: Any) -> Any:
    """Shift by up to four pixels, at any size."""
    return T.RandomCrop((image.height, image.width), padding=4)(image)
