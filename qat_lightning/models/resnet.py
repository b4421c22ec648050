"""ResNet for small images, written so that every flow can quantize it."""

import torch
from torch import Tensor, nn

from qat_lightning.models.layers import Add


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44, ... of He et al. 2015 (arXiv:1512.03385, section 4.2), with 1x1 convolutions on the shortcuts.

    Args:
        depth: 6n + 2.
        in_channels: channels of the image.
        num_classes: length of the output.

    Raises:
        ValueError: a depth of another form.
    """

    def __init__(self, depth: int = 20, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"Expected argument `depth` to be 6n + 2, e.g. 20, 32, 44 or 56, but got {depth}.")
        self.stem = nn.Sequential(*_conv_bn(in_channels, 16, 3, 1), nn.ReLU())
        stages: list[nn.Module] = []
        channels = 16
        for stage, width in enumerate((16, 32, 64)):
            for block in range(blocks):
                stages.append(_BasicBlock(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for images ``(N, in_channels, H, W)``."""
        logits: Tensor = self.fc(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv_bn(in_channels, out_channels, 3, stride), nn.ReLU(), *_conv_bn(out_channels, out_channels, 3, 1))
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(in_channels, out_channels, 1, stride))
        self.add = Add(relu=True)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.add(self.body(x), self.shortcut(x))
        return total


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)
