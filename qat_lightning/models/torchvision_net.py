"""Torchvision's classification networks, for any number of classes and channels, with weights from a file or from torchvision."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from qat_lightning.checkpoint import read_state_dict
from qat_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)

# Networks with heads that are for training alone, and the names of these.
AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}


def torchvision_net(name: str, num_classes: int = 1000, weights: str | None = None, in_channels: int = 3) -> nn.Module:
    """Return a network of ``torchvision.models``.

    Args:
        name: as torchvision knows it, e.g. ``"mobilenet_v2"``.
        num_classes: length of the output; the last layer is new where it differs from that of the weights.
        weights: a file with a state dict or Lightning checkpoint, or the name of torchvision's weights, e.g. ``"IMAGENET1K_V1"``,
            which are downloaded; None starts from random ones.
        in_channels: channels of the image; a first convolution for another number takes the sum of the weights over the colours.
            Auxiliary heads, of GoogLeNet and Inception, are left out.

    Raises:
        ConfigurationError: an unknown name, or weights that are neither a file nor a name, or do not fit.
    """
    if name not in list_models(module=torchvision.models):
        raise ConfigurationError(f"Expected argument `name` to be a classification model of torchvision, but got {name!r}.")
    named = None if weights is None or _is_file(weights) else _named_weights(name, weights)
    # Where weights are new, so is what they begin with: torchvision asks for a decision.
    options = {"init_weights": True} if named is None and name in AUXILIARY else {}
    net: nn.Module = get_model(name, weights=named, **options)
    if name in AUXILIARY:
        _remove_auxiliary_heads(net, AUXILIARY[name])
    if weights is not None and named is None:
        _load(net, Path(weights).expanduser())
        if _last_layer(net)[1].weight.shape[0] != num_classes:
            log.warning("%s has another number of classes than %d: the last layer is new.", weights, num_classes)
    _fit(net, num_classes, in_channels)
    return net


def _is_file(weights: str) -> bool:
    return Path(weights).suffix != "" or "/" in weights or Path(weights).exists()


def _remove_auxiliary_heads(net: nn.Module, heads: Sequence[str]) -> None:
    """Leave the network with one output in training, too."""
    net.aux_logits = False  # type: ignore[assignment]
    for head in heads:
        setattr(net, head, None)


def _fit(net: nn.Module, num_classes: int, in_channels: int) -> None:
    """Replace the last layer and the first convolution where they have other sizes."""
    _, last = _last_layer(net)
    if last.weight.shape[0] != num_classes:
        _replace_last_layer(net, num_classes)
    if _first_convolution(net)[1].in_channels != in_channels:
        _replace_first_convolution(net, in_channels)


def _last_layer(net: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the last linear layer, or the last convolution of a network that has none (SqueezeNet)."""
    layers = [(path, child) for path, child in net.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    return next((entry for entry in reversed(layers) if isinstance(entry[1], nn.Linear)), layers[-1])


def _first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((path, child) for path, child in net.named_modules() if isinstance(child, nn.Conv2d))


def _named_weights(name: str, weights: str) -> object:
    known = get_model_weights(name)
    names = [*known.__members__, "DEFAULT"]
    if weights not in names:
        raise ConfigurationError(f"Expected argument `weights` of {name} to be a file or one of {names}, but got {weights!r}.")
    return known[weights] if weights != "DEFAULT" else known.DEFAULT


def _replace_last_layer(net: nn.Module, num_classes: int) -> None:
    path, last = _last_layer(net)
    bias = last.bias is not None
    if isinstance(last, nn.Linear):
        net.set_submodule(path, nn.Linear(last.in_features, num_classes, bias=bias))
    else:
        net.set_submodule(path, nn.Conv2d(last.in_channels, num_classes, kernel_size=1, bias=bias))


def _replace_first_convolution(net: nn.Module, in_channels: int) -> None:
    path, first = _first_convolution(net)
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
    heads = tuple(f"{head}." for heads in AUXILIARY.values() for head in heads)
    inside = {name: tensor for name, tensor in inside.items() if not name.startswith(heads)}
    last, first = (inside.get(f"{path}.weight") for path in (_last_layer(net)[0], _first_convolution(net)[0]))
    if last is not None and first is not None and first.dim() == 4:
        _fit(net, last.shape[0], first.shape[1])
    try:
        net.load_state_dict(inside)
    except RuntimeError as error:
        raise ConfigurationError(f"The weights in {file} do not fit {type(net).__name__}: {error}") from error
