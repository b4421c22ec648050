"""What a refinement of a calibrated module sees of it: one layer after the other, with what goes into it in int8 and in float."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LayerCase:
    """A layer that is visited. BatchNorm is folded into it, or fused with it in eval mode.

    Args:
        name: of the layer.
        layer: a convolution or linear layer of the prepared module, with a ``weight_fake_quant``.
        twin: the same layer in float.
        inputs: what goes into the layer, rounded, a tensor per batch.
        float_inputs: what goes into the twin.
        limits: between which a ReLU or a clip behind the layer keeps its output.
    """

    name: str
    layer: Any
    twin: Any
    inputs: Sequence[Tensor]
    float_inputs: Sequence[Tensor]
    limits: tuple[float, float]


Visit: TypeAlias = Callable[[LayerCase], None]


def pre_activation(layer: Any, x: Tensor) -> Tensor:
    """Return what a layer of a prepared module gives in front of its activation, BatchNorm included where it is fused with one."""
    if hasattr(layer, "bn"):  # torch's, which scale weight and output by it
        output: Tensor = getattr(layer, "_forward", layer.forward)(x)
        return output
    weight = layer.weight_fake_quant(layer.weight)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    output = layer._conv_forward(x, weight, layer.bias)
    return output


def bias_of(layer: Any) -> Tensor | None:
    """Return the parameter that shifts what a layer gives, channel by channel."""
    bias: Tensor | None = layer.bn.bias if hasattr(layer, "bn") else layer.bias
    return bias


def channel_axis(layer: nn.Module) -> int:
    """Return the dimension of the output channels in the output of a layer."""
    return -1 if isinstance(layer, nn.Linear) else 1
