"""Models that ``train.py`` offers ready-made."""

from qat_lightning.models.bert import BertNet
from qat_lightning.models.classifier import Classifier
from qat_lightning.models.layers import Add
from qat_lightning.models.lstm import RowLSTM
from qat_lightning.models.resnet import CifarResNet
from qat_lightning.models.torchvision_net import torchvision_net

__all__ = ["Add", "BertNet", "CifarResNet", "Classifier", "RowLSTM", "torchvision_net"]
