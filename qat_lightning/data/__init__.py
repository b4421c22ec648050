"""Data that ``train.py`` offers ready-made."""

from qat_lightning.data.digits import DigitsData
from qat_lightning.data.folder import ImageFolderData
from qat_lightning.data.sst2 import SST2Data
from qat_lightning.data.torchvision_data import TorchvisionData

__all__ = ["DigitsData", "ImageFolderData", "SST2Data", "TorchvisionData"]
