"""Cross-layer equalization and high-bias absorption (Nagel et al. 2019, arXiv:1906.04721): other weights, the same function.

A channel between two layers may be divided by any ``s > 0`` in front and multiplied by it behind, through whatever commutes with a
positive scale: ReLU, pooling, padding with zeros, reshapes, additions and concatenations of channels that are scaled alike. Only values
of parameters change (with BatchNorm in front its weight and bias), so that names, shapes and checkpoints stay as they are.

ReLU6 and hardtanh commute with a scale as long as a channel stays below the cap before and after. Channels that reach it on the data
keep scale 1, others stay a third below it: `CAP_MARGIN`. For data beyond these ranges the function changes by what is clipped.
"""

import copy
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat_lightning.calibration import refuse_nan
from qat_lightning.core import as_call
from qat_lightning.distributed import Processes, merge_extremes
from qat_lightning.equalization.graph import ChannelGraph
from qat_lightning.equalization.labels import Layer, Site
from qat_lightning.errors import CalibrationError
from qat_lightning.plan import Call
from qat_lightning.recipe import EQUALIZATIONS, EqualizationName, check_choice

# How far above the largest value that the data showed the cap of a scaled channel lies.
CAP_MARGIN = 1.5
# Scales lie between 1/64 and 64: a channel that is nearly dead on the data may be alive on others.
LARGEST_SCALE = 64.0
SMALLEST_RANGE = 1e-6
# Scaling the input of a layer changes the range of its weight, and so the scale of its output: rounds until both have settled.
ROUNDS = 20


def equalize(
    module: nn.Module, batches: Iterable[Any], rule: EqualizationName = "weights", absorb: bool = True, opaque: Collection[str] = ()
) -> nn.Module:
    """Return a copy of ``module`` in eval mode that computes the same with ranges of channels that differ less.

    Args:
        module: any module that torch.fx can trace; it is not changed.
        batches: inputs of the module, without labels: a tensor, a tuple of positional arguments or a mapping of keyword arguments each.
        rule: ``"weights"`` gives each channel the same range of weights in front and behind (Nagel et al. 2019, equation 11), as far as
            its values stay below the largest ones of other channels; for weights with one scale per tensor, or very uneven ones.
            ``"activations"`` gives the channels of a tensor the same range; for weights with one scale per channel.
        absorb: take what a channel never falls below out of it, and into the bias behind (section 4.1.3 there, which puts
            ``beta - 3 gamma`` of BatchNorm in place of the minimum over the data).
        opaque: names of submodules that are left alone, such as those that cannot be traced.

    Raises:
        ValueError: no such rule.
        CalibrationError: no batch, or NaN or infinite values.
        UnsupportedModelError: the module cannot be traced; names the line.
    """
    check_choice("rule", rule, EQUALIZATIONS)
    copied = copy.deepcopy(module).eval()
    equalizer: Equalizer | None = None
    for index, batch in enumerate(batches):
        refuse_nan(batch, index)
        call = as_call(batch)
        equalizer = equalizer or Equalizer(copied, call, opaque)
        equalizer.observe(call)
    if equalizer is None:
        raise CalibrationError("Equalization got no batch: give it at least one, unlabelled, such as those for calibration.")
    equalizer.apply(rule, absorb)
    return copied


class Equalizer:
    """Measures the ranges of a module's channels on calls, then changes its parameters.

    Args:
        module: in eval mode; changed in place by :meth:`apply`.
        call: shows the shapes.
        opaque: names of submodules that are left alone.

    Raises:
        UnsupportedModelError: the module cannot be traced; names the line.
    """

    def __init__(self, module: nn.Module, call: Call, opaque: Collection[str] = ()) -> None:
        self._graph = ChannelGraph(module, call, opaque)

    def observe(self, call: Call) -> None:
        """Widen the ranges by those of a call."""
        self._graph.observe(call)

    def merge(self, processes: Processes) -> None:
        """Take the ranges that all processes have seen together."""
        sites = self._graph.sites
        for site, (low, high) in zip(sites, merge_extremes([(site.low, site.high) for site in sites], processes), strict=True):
            site.low, site.high = low, high

    def apply(self, rule: EqualizationName, absorb: bool = True) -> None:
        """Scale the channels by ``rule`` and take constants out of them where ``absorb`` says so; see :func:`equalize`."""
        channels = _Channels(self._graph)
        if rule == "weights":
            for _ in range(ROUNDS):
                # What a dead BatchNorm leaves of a channel would be blown up beyond all others.
                channels.scale(channels.weight_scales().maximum(channels.activation_scales()))
        else:
            channels.scale(channels.activation_scales())
        if absorb:
            channels.shift()


class _Channels:
    """The classes of a graph, numbered from 0, and one more at the end for all that is pinned."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.producers, self.consumers, self.sites = graph.producers, graph.consumers, graph.sites
        layers = [*self.producers, *self.consumers]
        indices, numbers = graph.classes.indices([*(layer.labels for layer in layers), *(site.labels for site in self.sites)])
        self.count = len(numbers)
        self._index = dict(zip(map(id, [*layers, *self.sites]), (index % (self.count + 1) for index in indices), strict=True))
        self._fixed = {numbers[root] for label in graph.classes.unshiftable if (root := graph.classes.find(label)) in numbers}
        self._reached = self._largest((site, _share_of_cap(site.low, site.high, site.bounds)) for site in self.sites if site.kind == "clip")
        self._range = self._largest((site, torch.maximum(site.high, -site.low)) for site in self.sites if site.kind == "read")
        # One scale for all that reaches the cap, and for what is dead or has no scale of its own.
        self._free = (self._reached < 1) & (self._range > SMALLEST_RANGE)
        self._free[-1] = False

    def weight_scales(self) -> Tensor:
        """Return ``sqrt(r1 / r2)``: the ranges of the weights in front and behind become ``sqrt(r1 r2)``."""
        front = self._largest((layer, _effective(*_in_front(layer)).flatten(1).amax(1)) for layer in self.producers)
        behind = self._largest((layer, _columns(layer.module, _effective(layer.module, layer.norm))) for layer in self.consumers)
        return torch.where((front > 0) & (behind > 0), front / behind, 1.0).sqrt()

    def activation_scales(self) -> Tensor:
        """Return the range of each channel as a share of the largest one of the tensors it is part of."""
        largest = self._range.clone()
        largest[-1] = 0  # of what is pinned, each site knows its own
        for site in self.sites:
            if site.kind == "read":
                index = self._index[id(site)]
                together = torch.maximum(site.high, -site.low).amax().maximum(largest[index].amax())
                largest[index] = largest[index].maximum(together)
                largest[-1] = 0
        return self._range / largest.clamp(min=SMALLEST_RANGE)

    def scale(self, scales: Tensor) -> None:
        """Divide each channel by its scale, as far as its cap allows."""
        scales = scales.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)
        scales = torch.where(self._reached > 0, scales.maximum((CAP_MARGIN * self._reached).clamp(max=1)), scales)
        scales = torch.where(self._free, scales, 1.0)
        with torch.no_grad():
            for layer in self.producers:
                _scale_outputs(layer.module, scales[self._index[id(layer)]])
            for layer in self.consumers:
                _scale_inputs(layer.module, scales[self._index[id(layer)]])
        for site in self.sites:
            own = scales[self._index[id(site)]]
            site.low, site.high = site.low / own, site.high / own
        self._reached, self._range = self._reached / scales, self._range / scales

    def shift(self) -> None:
        """Take the smallest magnitude out of channels that never change their sign, and into the bias of the layers that read them."""
        shifts = self._shifts()
        with torch.no_grad():
            for layer in self.producers:
                if layer.module.bias is not None:
                    layer.module.bias -= shifts[self._index[id(layer)]].to(layer.module.bias)
            for layer in self.consumers:
                _absorb(layer, shifts[self._index[id(layer)]])

    def _shifts(self) -> Tensor:
        """Return the constant of each class: with an activation between only a positive one, which the activation never sees change."""
        bent = [site for site in self.sites if site.kind != "read"]
        low, high = (
            -self._largest(((site, -site.low) for site in self.sites), -torch.inf),
            self._largest(((site, site.high) for site in self.sites), -torch.inf),
        )
        smallest = torch.where(low > 0, low, high.clamp(max=0))
        floor = -self._largest(((site, -site.low) for site in bent), -torch.inf)
        shifts = torch.where(floor < torch.inf, floor.clamp(min=0), smallest)
        writers = sum((torch.bincount(self._index[id(layer)], minlength=self.count + 1) for layer in self.producers), torch.zeros(()))
        shifts = torch.where((writers == 1) & (self._reached < 1) & shifts.isfinite(), shifts, 0.0)
        shifts[[*self._fixed, self.count]] = 0.0
        return shifts

    def _largest(self, values: Iterable[tuple[Layer | Site, Tensor]], start: float = 0.0) -> Tensor:
        """Return the largest value of each class."""
        found = torch.full((self.count + 1,), start)
        for owner, value in values:
            np.maximum.at(found.numpy(), self._index[id(owner)].numpy(), value.detach().float().cpu().numpy())
        return found


def _share_of_cap(low: Tensor, high: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Return how far the range of each channel goes to the bounds of a clip: from 1 on it is clipped."""
    shares = [side.clamp(min=0) / bound if bound else torch.zeros_like(side) for side, bound in ((high, bounds[1]), (-low, -bounds[0]))]
    return torch.maximum(*shares)


def _in_front(layer: Layer) -> tuple[Any, Any]:
    """Return layer and BatchNorm that write the channels; of a BatchNorm that follows no layer, itself."""
    return (layer.module, None) if layer.source is None else (layer.source, layer.module)


def _effective(module: Any, norm: Any) -> Tensor:
    """Return the magnitudes of a weight with BatchNorm folded into it, of shape (out, ...)."""
    weight: Tensor = module.weight.detach().float().abs()
    if norm is None:
        return weight
    factor = (
        norm.weight.detach().abs() / torch.sqrt(norm.running_var + norm.eps) if norm.affine else 1 / torch.sqrt(norm.running_var + norm.eps)
    )
    return weight * _rows(factor, weight)


def _rows(vector: Tensor, weight: Tensor) -> Tensor:
    """Return one value for each output channel, to be broadcast over the weight."""
    return vector.to(weight).reshape([-1] + [1] * (weight.dim() - 1))


def _grouped(module: Any, weight: Tensor) -> Tensor:
    """Return the weight as (groups, outputs of a group, inputs of a group, rest)."""
    groups = getattr(module, "groups", 1)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _columns(module: Any, weight: Tensor) -> Tensor:
    """Return the largest value of the weight at each input channel."""
    return _grouped(module, weight).amax((1, 3)).flatten()


def _scale_outputs(module: Any, scales: Tensor) -> None:
    module.weight.copy_(module.weight / _rows(scales, module.weight))
    if module.bias is not None:
        module.bias.copy_(module.bias / scales.to(module.bias))


def _scale_inputs(module: Any, scales: Tensor) -> None:
    grouped = _grouped(module, module.weight)
    scaled = grouped * scales.to(grouped).reshape(grouped.shape[0], 1, -1, 1)
    module.weight.copy_(scaled.reshape(module.weight.shape))


def _absorb(layer: Layer, shifts: Tensor) -> None:
    """Add to the output what the inputs have lost; a BatchNorm behind subtracts its mean from it again."""
    grouped = _grouped(layer.module, layer.module.weight)
    lost = (grouped.sum(3) * shifts.to(grouped).reshape(grouped.shape[0], 1, -1)).sum(2).flatten()
    if layer.norm is not None:
        layer.norm.running_mean -= lost
    elif layer.module.bias is not None:
        layer.module.bias += lost
