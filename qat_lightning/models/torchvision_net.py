"""Torchvision's classification networks, for any number of classes and channels, with weights from a file or from torchvision."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from qat_lightning.checkpoint import read_state_dict
from qat_lightning.errors import ConfigurationError


def torchvision_net(name: str, num_classes: int = 1000, weights: str | None = None, in_channels: int = 3) -> nn.Module:
    """Return a network of ``torchvision.models``.

    Args:
        name: as torchvision knows it, e.g. ``"mobilenet_v2"``.
        num_classes: length of the output; the last layer is new where it differs from that of the weights.
        weights: a file with a state dict or Lightning checkpoint, or the name of torchvision's weights, e.g. ``"IMAGENET1K_V1"``,
            which are downloaded; None starts from random ones.
        in_channels: channels of the image; a first convolution for grey images sums the weights over the colours.

    Raises:
        ConfigurationError: an unknown name, or weights that are neither a file nor a name, or do not fit.
    """
    if name not in list_models(module=torchvision.models):
        raise ConfigurationError(f"Expected argument `name` to be a classification model of torchvision, but got {name!r}.")
    named = None if weights is None or _is_file(weights) else _named_weights(name, weights)
    net: nn.Module = get_model(name, weights=named)
    if num_classes != 1000:
        _replace_last_linear(net, num_classes)
    if in_channels != 3:
        _replace_first_convolution(net, in_channels)
    if weights is not None and named is None:
        _load(net, Path(weights))
    return net


def _is_file(weights: str) -> bool:
    return Path(weights).suffix != "" or "/" in weights or Path(weights).exists()


def _named_weights(name: str, weights: str) -> object:
    known = get_model_weights(name)
    names = [*known.__members__, "DEFAULT"]
    if weights not in names:
        raise ConfigurationError(f"Expected argument `weights` of {name} to be a file or one of {names}, but got {weights!r}.")
    return known[weights] if weights != "DEFAULT" else known.DEFAULT


def _replace_last_linear(net: nn.Module, num_classes: int) -> None:
    path, last = [(path, child) for path, child in net.named_modules() if isinstance(child, nn.Linear)][-1]
    net.set_submodule(path, nn.Linear(last.in_features, num_classes, bias=last.bias is not None))


def _replace_first_convolution(net: nn.Module, in_channels: int) -> None:
    path, first = next((path, child) for path, child in net.named_modules() if isinstance(child, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        first.out_channels,
        kernel_size=_pair(first.kernel_size),
        stride=_pair(first.stride),
        padding=first.padding if isinstance(first.padding, str) else _pair(first.padding),
        bias=first.bias is not None,
    )
    with torch.no_grad():
        grey: Tensor = first.weight.sum(1, keepdim=True) / in_channels
        new.weight.copy_(grey.expand_as(new.weight))
    net.set_submodule(path, new)


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    return size[0], size[1]


def _load(net: nn.Module, file: Path) -> None:
    weights = read_state_dict(file)
    # A checkpoint of a LightningModule names the network, as `net.features.0.weight`.
    prefix = next((name.partition(".")[0] + "." for name in weights if name.partition(".")[2] in net.state_dict()), "")
    inside = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    try:
        net.load_state_dict(inside)
    except RuntimeError as error:
        raise ConfigurationError(f"The weights in {file} do not fit {type(net).__name__}: {error}") from error
