"""Backends: what the torch build supports, and which kernel runs a layer without saturating.

An engine multiplies uint8 activations with int8 weights. Kernels built on ``vpmaddubsw`` add two products in 16 bits, which
overflows once activations use all 8 bits; the remedy of ``torch.ao`` is to give every activation 7 bits, which costs accuracy
everywhere. Here each layer is tried on the real kernel instead, at extreme values, and keeps 8 bits wherever some engine of this
machine computes it right. Packed weights remember the engine that packed them, so one model can mix engines.
"""

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from qat_lightning.affine import weight_limits
from qat_lightning.deprecation import quiet
from qat_lightning.errors import ConfigurationError
from qat_lightning.recipe import ACTIVATION_BITS, BACKENDS, WEIGHT_BITS, BackendName, check_choice

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU)

# Flags of Linux, for x86 and for ARM.
INT8_FEATURES = ("avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
# Of these, the features of processors whose sums of products of uint8 and int8 do not saturate.
EXACT_FEATURES = ("avx512_vnni", "avx_vnni", "amx_int8", "asimd")


@dataclass(frozen=True)
class Kernel:
    """The kernel that runs a layer.

    Args:
        engine: the engine that packs the layer's weights.
        activation_bits: value range of the layer's input, 8 or 7 bits.
        weight_bits: value range of the layer's weights, 8 or 7 bits.
    """

    engine: BackendName
    activation_bits: int
    weight_bits: int = 8

    def __post_init__(self) -> None:
        """Check the value ranges."""
        check_choice("activation_bits", self.activation_bits, ACTIVATION_BITS)
        check_choice("weight_bits", self.weight_bits, WEIGHT_BITS)


@dataclass(frozen=True)
class LayerShape:
    """What decides which kernel an engine picks for a layer."""

    kind: Literal["linear", "conv"]
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...] = ()
    groups: int = 1
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @staticmethod
    def of(layer: nn.Module) -> "LayerShape | None":
        """Return the shape of a convolution or linear layer, None for any other layer."""
        if isinstance(layer, nn.Linear):
            return LayerShape("linear", layer.in_features, layer.out_features)
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            size, dilation = tuple(layer.kernel_size), tuple(layer.dilation)
            return LayerShape(
                kind="conv",
                in_channels=layer.in_channels,
                out_channels=layer.out_channels,
                kernel_size=size,
                groups=layer.groups,
                stride=tuple(layer.stride),
                padding=_numeric_padding(layer.padding, size, dilation),
                dilation=dilation,
            )
        return None


def fallback_engines(shape: LayerShape | None) -> tuple[BackendName, ...]:
    """Return the engines of this machine to try where the backend's own kernel saturates, fastest first.

    On an AMD EPYC with AVX2 qnnpack took 0.6 to 0.95 of onednn's time for a depthwise convolution, and 1.6 to 2.4 times as long for others.
    It rounds as ONNX Runtime does.
    """
    depthwise = shape is not None and 1 < shape.groups == shape.in_channels
    ordered: tuple[BackendName, ...] = ("qnnpack", "onednn") if depthwise else ("onednn", "qnnpack")
    return tuple(name for name in ordered if name in supported_backends())


def supported_backends() -> tuple[str, ...]:
    """Return the backends this build of torch has."""
    return tuple(name for name in BACKENDS if name in torch.backends.quantized.supported_engines)


def check_backend(backend: BackendName) -> None:
    """Refuse a backend that this build of torch lacks.

    Raises:
        ConfigurationError: names the ones it has.
    """
    if backend not in supported_backends():
        raise ConfigurationError(
            f"Backend {backend!r} is not part of this build of torch {torch.__version__} on {platform.machine()}: "
            f"choose one of {supported_backends()}."
        )


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Make ``name`` torch's quantized engine for the time of the block."""
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


def choose_kernel(
    backend: BackendName, shape: LayerShape | None, activation_bits: int | Literal["auto"], per_channel: bool, weight_bits: int = 8
) -> Kernel:
    """Return the engine and value range for a layer: full 8 bits wherever some kernel computes them right.

    Args:
        backend: the engine to prefer.
        shape: the layer; None for one that has no probe and is left to the backend.
        activation_bits: 7 or 8 are taken as they are, on the backend's own kernel; ``"auto"`` probes.
        per_channel: whether the layer's weights have one scale per output channel.
        weight_bits: 7 or 8.
    """
    if activation_bits != "auto":
        return Kernel(backend, activation_bits, weight_bits)
    if shape is None:
        return Kernel(backend, 8, weight_bits)
    candidates = dict.fromkeys((backend, *fallback_engines(shape)))
    for candidate in candidates:
        kernel = Kernel(candidate, 8, weight_bits)
        error = kernel_error(kernel, shape, per_channel)
        if error is not None and error <= 1:
            return kernel
    return Kernel(backend, 7, weight_bits)


@functools.cache
def kernel_error(kernel: Kernel, shape: LayerShape, per_channel: bool) -> int | None:
    """Return how many quantization steps the kernel is off at extreme inputs; None if it cannot run the layer.

    Every weight is at an end of its range and every input at the top of its range, which is where sums of products overflow.
    """
    x, weight = _extreme_values(shape, kernel)
    with torch.inference_mode(), quiet():
        sums = _reference(shape, x.double(), weight.double())
        scale = float(sums.abs().max()) / 127
        expected = torch.round(sums / scale) + 128
        try:
            with engine(kernel.engine):
                got = _run_kernel(shape, x, weight, per_channel, scale)
        except RuntimeError:
            return None
    return int((got - expected).abs().max())


def _extreme_values(shape: LayerShape, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Return an input at the top of its range and weights at both ends of theirs, by output channel."""
    _, largest = weight_limits(kernel.weight_bits)
    weight = torch.full((shape.out_channels, shape.in_channels // shape.groups, *shape.kernel_size), float(largest))
    weight[::2] = -largest
    # Engines pick some kernels only from a few rows and columns on, hence twice the receptive field.
    spatial = tuple(2 * d * (size - 1) + 2 for size, d in zip(shape.kernel_size, shape.dilation, strict=True))
    return torch.full((1, shape.in_channels, *spatial), float(2**kernel.activation_bits - 1)), weight


def _reference(shape: LayerShape, x: Tensor, weight: Tensor) -> Tensor:
    if shape.kind == "linear":
        return nn.functional.linear(x, weight)
    convolution = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(shape.kernel_size) - 1]
    return convolution(x, weight, None, shape.stride, shape.padding, shape.dilation, shape.groups)


def _run_kernel(shape: LayerShape, x: Tensor, weight: Tensor, per_channel: bool, scale: float) -> Tensor:
    """Run the layer in int8, zero point 128, and return its integers."""
    channels = shape.out_channels
    quantized_x = torch.quantize_per_tensor(x, 1.0, 0, torch.quint8)
    if per_channel:
        ones, zeros = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.int64)
        quantized_weight = torch.quantize_per_channel(weight, ones, zeros, 0, torch.qint8)
    else:
        quantized_weight = torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8)
    bias = torch.zeros(channels)
    ops = torch.ops.quantized
    if shape.kind == "linear":
        output = ops.linear(quantized_x, ops.linear_prepack(quantized_weight, bias), scale, 128)
    else:
        name = f"conv{len(shape.kernel_size)}d"
        geometry = (list(shape.stride), list(shape.padding), list(shape.dilation), shape.groups)
        packed = getattr(ops, f"{name}_prepack")(quantized_weight, bias, *geometry)
        output = getattr(ops, name)(quantized_x, packed, scale, 128)
    return cast(Tensor, output.int_repr().int())


def _numeric_padding(padding: str | tuple[int, ...], size: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    if padding == "valid":
        return (0,) * len(size)
    if padding == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(size, dilation, strict=True))
    return tuple(int(p) for p in padding)


@dataclass(frozen=True)
class Cpu:
    """A processor.

    Args:
        name: as its maker calls it.
        capability: the widest instruction set torch uses on it, e.g. ``"AVX512"``.
        features: what it has of the instructions that int8 kernels choose by.
    """

    name: str
    capability: str
    features: tuple[str, ...]


def this_cpu() -> Cpu:
    """Return the processor of this machine; its features are known on Linux alone."""
    features = f"{_cpuinfo('flags')} {_cpuinfo('Features')}".split()
    return Cpu(
        name=_cpuinfo("model name") or platform.processor() or platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        features=tuple(name for name in INT8_FEATURES if name in features),
    )


def exact_products(weight_bits: int) -> bool:
    """Whether sums of products of 8-bit activations and weights of so many bits are exact in the fastest kernels of this processor."""
    return weight_bits == 7 or bool({*this_cpu().features} & {*EXACT_FEATURES})


def cpu_name() -> str:
    """Return the processor's name and the widest instruction set torch uses on it."""
    cpu = this_cpu()
    return f"{cpu.name} ({cpu.capability})"


def _cpuinfo(key: str) -> str:
    """Return what Linux says of the first processor, empty where it says nothing."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
