"""Zeros of pruned weights, kept through quantization-aware training."""

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)


def nonzero(prepared: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Return which entries are not zero, by the name of the weight, for the weights that have both.

    A weight that is zero as a whole is freshly initialised, not pruned, and is left out.

    Args:
        prepared: prepared modules by qualified name.
    """
    masks = {name: weight.detach() != 0 for name, weight in _weights(prepared)}
    return {name: mask for name, mask in masks.items() if bool(mask.any()) and not bool(mask.all())}


def keep_zeros(prepared: Mapping[str, nn.Module], masks: Mapping[str, Tensor]) -> list[RemovableHandle]:
    """Give weights no gradient where they are to stay zero, so that they do under any optimizer.

    Args:
        prepared: prepared modules by qualified name.
        masks: from :func:`nonzero`, when training began.

    Returns:
        the handles that end it.
    """
    pruned = [(weight, masks[name].to(weight.device)) for name, weight in _weights(prepared) if name in masks]
    if pruned:
        count = sum(int((~mask).sum()) for _, mask in pruned)
        log.info("%d zeros in the weights of %d pruned layers are kept.", count, len(pruned))
    return [weight.register_hook(_masking(mask)) for weight, mask in pruned]  # type: ignore[no-untyped-call]


def _weights(prepared: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for target, module in prepared.items():
        for path, layer in module.named_modules():
            weight = getattr(layer, "weight", None)
            if hasattr(layer, "weight_fake_quant") and isinstance(weight, nn.Parameter) and weight.requires_grad:
                yield ".".join(part for part in (target, path, "weight") if part), weight


def _masking(kept: Tensor) -> Callable[[Tensor], Tensor]:
    def mask(gradient: Tensor) -> Tensor:
        # Not a product: zero times infinity is NaN.
        return torch.where(kept, gradient, torch.zeros_like(gradient))

    return mask
