"""Layers that torch.ao takes for granted and users write otherwise: what has no int8 kernel is refused by name, the rest is rewritten."""

from collections.abc import Iterable
from typing import cast

from torch import nn, ones, zeros
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from qat_lightning.backend import CONVOLUTIONS, RECURRENT
from qat_lightning.errors import ConfigurationError

PADDING_MODES = ("zeros", "reflect")


def refuse_layer(path: str, layer: nn.Module) -> None:
    """Refuse a layer that is to be quantized and cannot be.

    Args:
        path: qualified name, for the message.
        layer: of a type that the recipe quantizes.

    Raises:
        ConfigurationError: a weight that a hook computes, or padding without an int8 kernel; names the layer and the way out.
    """
    if "weight" not in layer._parameters and not isinstance(layer, RECURRENT):
        _refuse_computed(path, layer._parameters)
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return
    if layer.padding_mode not in PADDING_MODES:
        raise ConfigurationError(
            f"{path!r} has padding_mode={layer.padding_mode!r}, for which torch has no int8 kernel, only for {PADDING_MODES}. Keep the "
            f"layer in float with overrides={{{path!r}: None}}, or pad in a layer of its own before it."
        )
    if layer.padding == "same" and any(total % 2 for total in _same_padding(layer)):
        raise ConfigurationError(
            f"{path!r} has padding='same' with kernel size {layer.kernel_size}, which pads one side more than the other; int8 kernels do "
            f"not. Keep the layer in float with overrides={{{path!r}: None}}, or pad in a layer of its own before it."
        )


def refuse_module(path: str, module: nn.Module) -> None:
    """Refuse a module that static quantization would stumble over later.

    Args:
        path: qualified name, for the message.
        module: any, not to be kept in float.

    Raises:
        ConfigurationError: a weight that a parametrization computes, or BatchNorm without running statistics.
    """
    if is_parametrized(module, "weight") and isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        _refuse_computed(path, cast(nn.Module, module.parametrizations)["weight"]._parameters)  # type: ignore[index]
    if isinstance(module, _BatchNorm) and not module.track_running_stats:
        raise ConfigurationError(
            f"{path!r} is a {type(module).__name__} with track_running_stats=False: it normalises by the batch, in evaluation too, and "
            f"int8 has only constants to fold it into. Use running statistics, GroupNorm or LayerNorm."
        )


def _refuse_computed(path: str, sources: Iterable[str]) -> None:
    """Quantization would take the weight as it is now and leave the parameters behind it out of training."""
    raise ConfigurationError(
        f"The weight of {path!r} is computed from {sorted(sources)} (pruning, weight or spectral norm). Make it a parameter first, e.g. "
        f'torch.nn.utils.prune.remove(layer, "weight"), remove_weight_norm(layer) or parametrize.remove_parametrizations(layer, "weight"), '
        f"or keep the layer in float."
    )


def adapt(module: nn.Module) -> None:
    """Rewrite what torch.ao cannot fuse or pack, without a change of what is computed.

    Padding that is given as a word becomes numbers; BatchNorm without scale and shift gets constant ones, which stay out of training.

    Args:
        module: float, changed in place.
    """
    for child in module.modules():
        if isinstance(child, nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(child.padding, str):
            totals = _same_padding(child) if child.padding == "same" else (0,) * len(child.kernel_size)
            if not any(total % 2 for total in totals):
                child.padding = tuple(total // 2 for total in totals)
        if isinstance(child, _BatchNorm) and not child.affine and child.running_mean is not None:
            like = child.running_mean
            child.affine = True
            child.weight = nn.Parameter(ones(child.num_features, device=like.device, dtype=like.dtype), requires_grad=False)
            child.bias = nn.Parameter(zeros(child.num_features, device=like.device, dtype=like.dtype), requires_grad=False)


def _same_padding(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    """Return how many zeros ``padding="same"`` adds along each axis, both sides together."""
    return tuple(dilation * (size - 1) for size, dilation in zip(layer.kernel_size, layer.dilation, strict=True))
