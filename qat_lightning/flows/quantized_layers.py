"""Convolutions and linear layers of the pt2e flow: with fake-quant on their weight, and with a weight in int8."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning.flows.fake_quant import ACTIVATION_MAX, WeightFakeQuantize
from qat_lightning.plan import LayerPlan

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class _WithFakeQuant:
    """What layers with fake-quant on their weight share; mixed into torch's layer, whose parameters they hold.

    With a BatchNorm behind it, which is then its child ``bn``, a layer rounds the weight that int8 will have, scaled by the statistics of
    BatchNorm (Jacob et al. 2018, section 3.2). While BatchNorm learns, the output is divided by that scale again and normalised by the
    statistics of the batch (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2).
    """

    weight_fake_quant: WeightFakeQuantize
    freeze_bn = False

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer computes in front of its activation, BatchNorm included."""
        layer: Any = self
        norm = getattr(layer, "bn", None)
        if norm is None:
            return self.compute(x, self.weight_fake_quant(layer.weight), layer.bias)
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = self.weight_fake_quant(layer.weight * scale.reshape([-1] + [1] * (layer.weight.dim() - 1)))
        if not norm.training:
            offset = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
            return self.compute(x, weight, norm.bias + offset * scale)
        by_channel = [-1] + [1] * (layer.weight.dim() - 2)  # of the output
        output = self.compute(x, weight, None) / scale.reshape(by_channel)
        return cast(Tensor, norm(output if layer.bias is None else output + layer.bias.reshape(by_channel)))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution or product of ``x``."""
        layer: Any = self
        output: Tensor = F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, bias)
        return output

    def freeze_bn_stats(self) -> None:
        """Let BatchNorm use its running statistics and stop updating them."""
        self.freeze_bn = True
        cast(Any, self).bn.eval()

    def update_bn_stats(self) -> None:
        """Let BatchNorm learn."""
        self.freeze_bn = False
        cast(Any, self).bn.train()

    def train(self, mode: bool = True) -> Any:
        """Set train or eval mode; frozen BatchNorm stays frozen."""
        super().train(mode)  # type: ignore[misc]
        if self.freeze_bn:
            cast(Any, self).bn.eval()
        return self


class FakeQuantConv1d(_WithFakeQuant, nn.Conv1d):
    """A convolution with fake-quant on its weight."""


class FakeQuantConv2d(_WithFakeQuant, nn.Conv2d):
    """A convolution with fake-quant on its weight."""


class FakeQuantConv3d(_WithFakeQuant, nn.Conv3d):
    """A convolution with fake-quant on its weight."""


class FakeQuantLinear(_WithFakeQuant, nn.Linear):
    """A linear layer with fake-quant on its weight."""


FAKE_QUANT_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FakeQuantConv1d,
    nn.Conv2d: FakeQuantConv2d,
    nn.Conv3d: FakeQuantConv3d,
    nn.Linear: FakeQuantLinear,
}


def with_fake_quant(layer: nn.Module, planned: LayerPlan, norm: nn.Module | None) -> nn.Module:
    """Return the layer with fake-quant on its weight, its parameters shared with ``layer``.

    Args:
        layer: a convolution or linear layer.
        planned: how its weight is quantized.
        norm: the BatchNorm behind it, which becomes its child; None where there is none.
    """
    kind = FAKE_QUANT_TYPES[type(layer)]
    made: Any = kind.__new__(kind)
    nn.Module.__init__(made)
    geometry = {name: value for name, value in vars(layer).items() if name not in vars(nn.Module())}
    vars(made).update(geometry)
    for name, parameter in layer._parameters.items():
        made.register_parameter(name, parameter)
    if norm is not None:
        made.add_module("bn", norm)
    made.add_module("weight_fake_quant", WeightFakeQuantize(made.weight, planned.per_channel, planned.kernel.weight_bits))
    made.training = layer.training
    return cast(nn.Module, made)


_AS_QUANTIZED_TENSORS: list[bool] = []


@contextmanager
def as_quantized_tensors() -> Iterator[None]:
    """Let int8 modules compute with torch's quantized tensors for the time of the block: a recording then tells where int8 begins."""
    _AS_QUANTIZED_TENSORS.append(True)
    try:
        yield
    finally:
        _AS_QUANTIZED_TENSORS.pop()


# --- int8 --------------------------------------------------------------------------------------------------------------------


class Int8Weight(nn.Module):
    """A weight as integers, symmetric.

    Args:
        integers: int8, output channels first.
        scale: of each channel, or one for all.
    """

    int8: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, integers: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("int8", integers)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros_like(scale, dtype=torch.int32))

    def forward(self) -> Tensor:
        """Return the weight as real numbers, float32."""
        if _AS_QUANTIZED_TENSORS:
            if self.scale.numel() == 1:
                return torch._make_per_tensor_quantized_tensor(self.int8, float(self.scale), 0).dequantize()
            return torch._make_per_channel_quantized_tensor(self.int8, self.scale, self.zero_point, 0).dequantize()
        return self.int8.float() * self.scale.reshape(-1, *[1] * (self.int8.dim() - 1))


class Int8Layer(nn.Module):
    """A convolution or linear layer whose weight is stored in int8.

    Args:
        layer: with fake-quant, in eval mode.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        source: Any = layer
        weight, bias = _folded(source)
        self.weight = Int8Weight(source.weight_fake_quant.integers(weight), source.weight_fake_quant.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.kind = "linear" if isinstance(layer, nn.Linear) else f"conv{weight.dim() - 2}d"
        self.geometry: dict[str, Any] = {}
        self.padding: list[int] = []
        if self.kind != "linear":
            self.geometry = {name: getattr(source, name) for name in ("stride", "padding", "dilation", "groups")}
        if self.kind != "linear" and source.padding_mode != "zeros":
            self.padding, self.padding_mode = list(source._reversed_padding_repeated_twice), source.padding_mode
            self.geometry["padding"] = 0
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the output in front of the activation, float32; ``x`` is float32 on a grid of uint8."""
        if self.padding:
            x = F.pad(x, self.padding, mode=self.padding_mode)
        output: Tensor = getattr(F, self.kind)(x, self.weight(), self.bias, **self.geometry)
        return output

    def extra_repr(self) -> str:
        """Return what a print of the module shows."""
        return f"{self.kind}, {tuple(self.weight.int8.shape)}"


def _folded(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias with BatchNorm in them, in the order of operations of the layer with fake-quant, for the same last bit."""
    norm = getattr(layer, "bn", None)
    if norm is None:
        return layer.weight.detach(), layer.bias
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    offset = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
    return (layer.weight * scale.reshape([-1] + [1] * (layer.weight.dim() - 1))).detach(), norm.bias + offset * scale


class Requantize(nn.Module):
    """Rounds an activation to uint8: what an int8 layer writes and the next one reads.

    Args:
        fake_quant: whose grid and limits it takes.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, fake_quant: Any) -> None:
        super().__init__()
        scale, zero_point = fake_quant.calculate_qparams()
        self.register_buffer("scale", scale.detach().clone().reshape(()))
        self.register_buffer("zero_point", zero_point.detach().clone().reshape(()))
        self.limits = fake_quant.limits
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, float32, clipped and rounded to the grid."""
        if _AS_QUANTIZED_TENSORS:  # whose saturation is the clip
            return torch.quantize_per_tensor(x, self.scale, self.zero_point, torch.quint8).dequantize()
        if self.limits is not None:
            x = x.clamp(*self.limits)
        integers = (x * (1.0 / self.scale)).round_().add_(self.zero_point).clamp_(0, ACTIVATION_MAX).to(torch.uint8)
        return integers.float().sub_(self.zero_point).mul_(self.scale)


class DynamicLinear(nn.Module):
    """A linear layer with a weight in int8 and activations that are rounded to the range they have at each call.

    Args:
        layer: float.
        per_channel: one weight scale per output channel.
        bits: value range of the activations.
    """

    bias: Tensor | None

    def __init__(self, layer: nn.Linear, per_channel: bool, bits: int) -> None:
        super().__init__()
        fake_quant = WeightFakeQuantize(layer.weight, per_channel, bits=8)
        fake_quant.measure(layer.weight)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.quantized_weight = Int8Weight(fake_quant.integers(layer.weight), fake_quant.scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.quant_max = 2**bits - 1
        self.training = layer.training

    @property
    def weight(self) -> Tensor:
        """The weight as real numbers, for code that computes with it past the layer, such as that of attention."""
        return cast(Tensor, self.quantized_weight())

    def forward(self, x: Tensor) -> Tensor:
        """Return the output in the dtype of ``x``."""
        if x.numel() == 0:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        low, high = torch.aminmax(x.detach().float())
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = ((high - low) / self.quant_max).clamp(min=torch.finfo(torch.float32).eps)
        zero_point = torch.round(-low / scale).clamp(0, self.quant_max)
        integers = (torch.round(x.float() / scale) + zero_point).clamp(0, self.quant_max)
        output = F.linear((integers - zero_point) * scale, self.weight, self.bias)
        return output.to(x.dtype)

    def extra_repr(self) -> str:
        """Return what a print of the module shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"
