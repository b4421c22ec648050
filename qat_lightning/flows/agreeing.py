"""What lets the kernels of all runtimes compute the same integers.

Scales and biases a few millionths from those that were learned or calibrated, for which it does not matter in which order a kernel
multiplies and adds float32; and means of integers that are sums of integers, for a mean of real numbers that lies on a border is rounded by
noise.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import FakeQuantizeBase
from torch.nn import functional as F

from qat_lightning.affine import scale_off_borders, scale_with_reciprocal, settle_layer
from qat_lightning.deprecation import quiet
from qat_lightning.flows.torch_ao import CalibratedFakeQuantize, TrainingFakeQuantize, grid_of, kernel_modules
from qat_lightning.tensors import scale_of, with_grid

ARITHMETIC: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), torch.add),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), torch.mul),
}
RELU = (F.relu, torch.relu, "relu", "relu_", nn.ReLU)


def settle_scales(prepared: fx.GraphModule) -> None:
    """Move the scales of activations: those of sums and products to where no value lies next to a border between two integers.

    Args:
        prepared: a graph with fake-quant; it is changed.
    """
    settled: set[Any] = set()
    for fake_quant in prepared.modules():
        if isinstance(fake_quant, CalibratedFakeQuantize | TrainingFakeQuantize):
            _move(fake_quant, lambda scale, zero_point: scale_with_reciprocal(scale))
    for node in prepared.graph.nodes:
        inputs = [fake_quant_of(prepared, argument) for argument in node.args]
        if node.op not in ("call_function", "call_method") or node.target not in ARITHMETIC or len(inputs) != 2 or None in inputs:
            continue
        for output in _outputs(prepared, node):
            if output not in settled and output not in inputs:
                values = ARITHMETIC[node.target](_values(inputs[0])[:, None], _values(inputs[1]))
                _move(output, functools.partial(scale_off_borders, values))
                settled.add(output)


def _outputs(prepared: fx.GraphModule, node: fx.Node) -> Iterator[Any]:
    """Yield the fake-quants that round what an operation gives, behind a ReLU if there is one."""
    for user in node.users:
        module = prepared.get_submodule(str(user.target)) if user.op == "call_module" else None
        if user.target in RELU or type(module) in RELU:
            yield from _outputs(prepared, user)
        elif isinstance(module, CalibratedFakeQuantize | TrainingFakeQuantize):
            yield module


def fake_quant_of(prepared: fx.GraphModule, argument: Any) -> Any:
    """Return the fake-quant that an argument comes from, else None."""
    if not isinstance(argument, fx.Node) or argument.op != "call_module":
        return None
    module = prepared.get_submodule(str(argument.target))
    return module if isinstance(module, FakeQuantizeBase) else None


def _values(fake_quant: Any) -> Tensor:
    """Return the real numbers of all integers."""
    scale, zero_point = grid_of(fake_quant)
    return (torch.arange(256, dtype=torch.float64) - zero_point) * scale


def _move(fake_quant: Any, chosen: Callable[[float, int], float]) -> None:
    """Give a fake-quant the scale that is chosen by its scale and zero point."""
    scale, zero_point = grid_of(fake_quant)
    if math.isfinite(scale):
        fake_quant.scale = torch.full_like(fake_quant.scale, chosen(scale, zero_point))


def settle_layers(int8: nn.Module, scales: Mapping[str, float]) -> None:
    """Round the bias of each layer to the grid of its products, and its scales to values from which all integer kernels compute alike.

    Other runtimes and qnnpack add an integer bias; see :func:`~qat_lightning.affine.settle_layer`.

    Args:
        int8: its layers are packed anew afterwards.
        scales: of the input of each layer by name.
    """
    for name, layer in kernel_modules(int8):
        if name not in scales or hasattr(layer, "_all_weight_values"):
            continue
        weight, bias = layer._weight_bias()
        scale, bias = settle_layer(scale_of(weight), bias, scales[name], float(layer.scale))
        with quiet():
            layer.set_weight_bias(with_grid(weight, weight.int_repr(), scale.double()), bias)


def average_integers(int8: fx.GraphModule) -> None:
    """Let means over the pixels of an image be sums of integers.

    Args:
        int8: a graph; it is changed.
    """
    for node in int8.graph.nodes:
        if node.op in ("call_function", "call_method") and node.target in (torch.mean, "mean"):
            given = _pixel_mean(*node.args, **node.kwargs)
            if given is not None:
                node.op, node.target, node.args, node.kwargs = "call_function", mean_over_pixels, given, {}
    int8.recompile()


def _pixel_mean(x: Any, dim: Any = None, keepdim: Any = False, **others: Any) -> tuple[Any, ...] | None:
    """Return the arguments of a mean over the last two of four dimensions, None for those of any other."""
    pixels = isinstance(dim, tuple | list) and {axis % 4 if isinstance(axis, int) else None for axis in dim} == {2, 3}
    return (x, tuple(dim), keepdim) if pixels and isinstance(keepdim, bool) and not others else None


def mean_over_pixels(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """Return the mean over the pixels of images of shape (batch, channels, height, width); anything else is averaged by torch."""
    if not x.is_quantized or x.dim() != len("NCHW"):
        return x.mean(dim, keepdim)
    pooled = F.adaptive_avg_pool2d(x, 1)
    return pooled if keepdim else pooled.flatten(1)
