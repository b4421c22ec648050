"""Zeros of pruned weights, kept through quantization-aware training."""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)


def keep_zeros(prepared: nn.Module) -> list[RemovableHandle]:
    """Let weights that are exactly zero get no gradient, so that they stay zero under any optimizer.

    Args:
        prepared: a prepared module. A weight that is zero as a whole is freshly initialised, not pruned, and is left alone.

    Returns:
        the handles that end it.
    """
    handles, count = [], 0
    for weight in _weights(prepared):
        kept = weight.detach() != 0
        if bool(kept.any()) and not bool(kept.all()):
            handles.append(weight.register_hook(_masking(kept)))  # type: ignore[no-untyped-call]
            count += int((~kept).sum())
    if count:
        log.info("%d zeros in the weights of %d pruned layers are kept.", count, len(handles))
    return handles


def _weights(prepared: nn.Module) -> Iterator[nn.Parameter]:
    for layer in prepared.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "weight_fake_quant") and isinstance(weight, nn.Parameter) and weight.requires_grad:
            yield weight


def _masking(kept: Tensor) -> Callable[[Tensor], Tensor]:
    def mask(gradient: Tensor) -> Tensor:
        # Not a product: zero times infinity is NaN.
        return torch.where(kept, gradient, torch.zeros_like(gradient))

    return mask
