"""Learned rounding: AdaRound (Nagel et al. 2020, arXiv:2004.10568), layer by layer, with inputs that need no labels.

Rounding every weight to the nearest integer is not what keeps a layer's output nearest to float: errors of weights with correlated
inputs add up or cancel. For each layer it is learnt which weights are rounded up and which down, such that the output behind the
activation, with the rounded inputs that the layer will get, is nearest to that of the float layer with float inputs.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from qat_lightning.files import write_atomically
from qat_lightning.layerwise import LayerCase, channel_axis, pre_activation
from qat_lightning.recipe import AdaRound

# Of the rectified sigmoid (equation 23 of the paper), which reaches 0 and 1.
STRETCH = (-0.1, 1.1)
# The regularizer's exponent falls along a cosine: large it lets weights move freely, small it drives them to 0 or 1.
EXPONENTS = (20.0, 2.0)
# Part of the iterations without a regularizer.
WARM_UP = 0.2
SMALLEST_ERROR = 1e-20


def round_weights(case: LayerCase, settings: AdaRound) -> None:
    """Put the weights of a layer on the integers that are learnt for it; one that cannot be learnt is left to rounding to nearest.

    Left are convolutions in three dimensions and those whose padding is not zero.

    Raises:
        OSError: the folder of the settings cannot be written.
    """
    problem = _Problem.of(case, settings.samples)
    if problem is None:
        return
    file = _file(case, problem, settings)
    steps = _read(file, problem.nearest)
    if steps is None:
        with torch.enable_grad():
            steps = problem.best(_learn(problem, settings))
        if file is not None:
            write_atomically(file, safetensors.torch.save({"steps": steps.to(torch.int16)}))
    problem.put(steps)


def _learn(problem: "_Problem", settings: AdaRound) -> Tensor:
    """Return the integers of the weights."""
    low, high = STRETCH
    down = problem.position.floor()
    rest = (problem.position - down).clamp(0.01, 0.99)
    alpha = (-torch.log((high - low) / (rest - low) - 1)).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=settings.lr)
    unit = problem.error(problem.nearest).mean().clamp(min=SMALLEST_ERROR)
    for step in range(settings.iterations):
        up = (torch.sigmoid(alpha) * (high - low) + low).clamp(0, 1)
        loss = problem.error((down + up).clamp(*problem.steps)).mean() / unit
        progress = step / settings.iterations
        if progress >= WARM_UP:
            phase = (progress - WARM_UP) / (1 - WARM_UP)
            exponent = EXPONENTS[1] + 0.5 * (EXPONENTS[0] - EXPONENTS[1]) * (1 + math.cos(phase * math.pi))
            loss = loss + settings.regularization * (1 - (2 * up - 1).abs().pow(exponent)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return (down + (alpha.detach() >= 0)).clamp(*problem.steps)


def _file(case: LayerCase, problem: "_Problem", settings: AdaRound) -> Path | None:
    """Return where the layer is kept, under a name that changes with all that its rounding depends on."""
    if settings.folder is None:
        return None
    digest = hashlib.sha256(repr((case.name, replace(settings, folder=None))).encode())
    for tensor in (problem.position, problem.scale, problem.x, problem.wanted):
        digest.update(tensor.contiguous().numpy().tobytes())
    return Path(settings.folder).expanduser() / f"{digest.hexdigest()[:32]}.safetensors"


class _Problem:
    """The rounding of one layer as a regression: patches of its input, and the outputs wanted for them.

    Args:
        case: the layer.
        x: patches, ``(groups, samples, inputs of a channel)``.
        wanted: outputs of the float layer behind its activation, ``(groups, samples, channels of the group)``.
    """

    def __init__(self, case: LayerCase, x: Tensor, wanted: Tensor) -> None:
        layer = case.layer
        self.layer, self.limits, self.x, self.wanted = layer, case.limits, x, wanted
        weight = layer.weight.detach()
        self.groups = x.shape[0]
        scale = layer.weight_fake_quant.scale.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
        self.scale, self.position = self._grouped(scale), self._grouped(weight / scale)
        largest = layer.weight_fake_quant.integer_range[1]
        self.steps = (-largest, largest)
        self.nearest = self.position.round().clamp(*self.steps)
        bias = torch.zeros(weight.shape[0]) if layer.bias is None else layer.bias.detach()
        self.bias = bias.reshape(self.groups, 1, -1)

    @staticmethod
    def of(case: LayerCase, samples: int) -> "_Problem | None":
        """Return the problem of a layer, None for one that cannot be learnt."""
        layer = case.layer
        linear = isinstance(layer, nn.Linear)
        if not linear and (not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.padding_mode != "zeros"):
            return None
        per_batch = max(1, samples // max(len(case.inputs), 1))
        pairs = [_sample(case, index, per_batch) for index in range(len(case.inputs))]
        x, wanted = torch.cat([x for x, _ in pairs]), torch.cat([wanted for _, wanted in pairs])
        groups = 1 if linear else layer.groups
        by_group = [tensor.reshape(len(tensor), groups, -1).transpose(0, 1).contiguous() for tensor in (x, wanted.clamp(*case.limits))]
        return _Problem(case, *by_group)

    def error(self, steps: Tensor) -> Tensor:
        """Return the mean squared error of each output channel, ``(groups, channels of the group)``."""
        output = (self.x @ (steps * self.scale).transpose(1, 2) + self.bias).clamp(*self.limits)
        return (output - self.wanted).square().mean(1)

    def best(self, steps: Tensor) -> Tensor:
        """Return for each output channel the better of ``steps`` and rounding to nearest."""
        with torch.no_grad():
            better = self.error(steps) < self.error(self.nearest)
        return torch.where(better.unsqueeze(-1), steps, self.nearest)

    def put(self, steps: Tensor) -> None:
        """Set the weight of the layer."""
        self.layer.weight.data.copy_((steps * self.scale).reshape(self.layer.weight.shape))

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)


def _sample(case: LayerCase, index: int, count: int) -> tuple[Tensor, Tensor]:
    """Return input patches ``(samples, inputs)`` and float outputs ``(samples, channels)`` at about ``count`` positions of one batch."""
    layer, x = case.layer, case.inputs[index]
    output = pre_activation(case.twin, case.float_inputs[index]).movedim(channel_axis(layer), -1)
    generator = torch.Generator().manual_seed(index)
    if isinstance(layer, nn.Linear):
        x, output = x.flatten(0, -2), output.flatten(0, -2)
        chosen = torch.randperm(len(x), generator=generator)[:count]
        return x[chosen], output[chosen]
    positions = math.prod(output.shape[1:-1])
    chosen = torch.randperm(positions, generator=generator)[: math.ceil(count / len(x))]
    patches = torch.cat(list(_patches(layer, x, [divmod(int(place), output.shape[-2]) for place in chosen])))
    return patches, output.flatten(1, -2)[:, chosen].transpose(0, 1).flatten(0, 1)


def _patches(layer: Any, x: Tensor, places: list[tuple[int, int]]) -> Iterator[Tensor]:
    """Yield what a convolution multiplies with its weight at each place of its output, ``(N, inputs)``."""
    flat = x.dim() == 3  # a convolution in one dimension is one in two, with a single row
    x = x.unsqueeze(2) if flat else x
    (k_h, k_w), (s_h, s_w), (d_h, d_w) = (
        (1, *value) if flat else tuple(value) for value in (layer.kernel_size, layer.stride, layer.dilation)
    )
    padded = F.pad(x, _padding(layer, flat))
    for row, column in places:
        top, left = row * s_h, column * s_w
        yield padded[:, :, top : top + (k_h - 1) * d_h + 1 : d_h, left : left + (k_w - 1) * d_w + 1 : d_w].flatten(1)


def _padding(layer: Any, flat: bool) -> list[int]:
    """Return the padding as ``F.pad`` takes it: left, right, top, bottom."""
    sides = list(layer._reversed_padding_repeated_twice)
    return [*sides, 0, 0] if flat else sides


def _read(file: Path | None, like: Tensor) -> Tensor | None:
    """Return the integers that an earlier run has kept, None where there are none that fit."""
    if file is None or not file.is_file():
        return None
    try:
        steps = safetensors.torch.load_file(file)["steps"]
    except (SafetensorError, OSError, KeyError):
        return None
    return steps.to(like) if steps.shape == like.shape else None
