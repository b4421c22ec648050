"""A state dict of int8 modules as plain tensors, and back: a quantized tensor becomes its integers, scales and zero points."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qat_lightning.decoding import shown
from qat_lightning.errors import ArtifactError, shorten

# A packed linear layer has both in one entry of its state dict.
PACKED_PARTS = ("weight", "bias")
TINY = torch.finfo(torch.float32).tiny
HUGE = torch.finfo(torch.float32).max


def to_plain(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the entries of a state dict as tensors that are not quantized, on the CPU, under names derived from theirs.

    Args:
        state: of a model with int8 modules. ``None`` and dtypes, which the structure has, are left out.

    Returns:
        ``name`` for a plain tensor; ``name.int8``, ``name.scale`` and ``name.zero_point`` for a quantized one, the scale with one
        element per output channel or none at all; the same behind ``name.weight`` and ``name.bias`` for a packed pair.

    Raises:
        ArtifactError: an entry that is no tensor, such as the extra state of a module.
    """
    return {name: tensor for key, value in state.items() for name, tensor in _parts(key, value).items()}


def from_plain(template: Mapping[str, Any], plain: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the entries of ``template`` with the values of ``plain``, which :func:`to_plain` gave for a state dict of this structure."""
    return {key: _assemble(key, value, plain) for key, value in template.items()}


def check_same_layout(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare names, dtypes and shapes.

    Raises:
        ValueError: names tensors that are missing or unknown, or the first of another dtype or shape.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(f"missing are [{shorten(missing)}], unknown are [{shorten([shown(name) for name in unknown])}]")
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype:
            raise ValueError(f"dtype mismatch for {name}: the artifact has {found[name].dtype}, the model {tensor.dtype}")
        if found[name].shape != tensor.shape:
            raise ValueError(f"size mismatch for {name}: the artifact has {tuple(found[name].shape)}, the model {tuple(tensor.shape)}")


def check_grids(tensors: Mapping[str, Tensor]) -> None:
    """Check each pair of a scale and a zero point: kernels trust them.

    Raises:
        ValueError: a scale that is no positive number, a zero point of weights besides 0, or one of activations outside 0 to 255.
    """
    for name, zero_point in tensors.items():
        owner, dot, last = name.rpartition(".")
        scale_name = owner + dot + last.replace("zero_point", "scale")
        if "zero_point" not in last or scale_name not in tensors:
            continue
        scale = tensors[scale_name]
        if not ((scale >= TINY) & (scale <= HUGE)).all():
            raise ValueError(f"{scale_name} holds a value that is no positive number")
        largest = 0 if f"{owner}.int8" in tensors else 255
        if not ((zero_point >= 0) & (zero_point <= largest)).all():
            raise ValueError(f"{name} holds a value outside 0 to {largest}")


def _parts(key: str, value: Any) -> dict[str, Tensor]:
    if isinstance(value, Tensor) and value.is_quantized:
        integers = value.int_repr()
        return {f"{key}.int8": integers, f"{key}.scale": scale_of(value), f"{key}.zero_point": _zero_point(value)}
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return {key: value.detach().cpu()}
    if isinstance(value, tuple) and len(value) == len(PACKED_PARTS):
        pairs = zip(PACKED_PARTS, value, strict=True)
        return {name: tensor for part, item in pairs for name, tensor in _parts(f"{key}.{part}", item).items()}
    if value is None or isinstance(value, torch.dtype):
        return {}
    raise ArtifactError(
        f"The state dict has {key!r}, a {type(value).__name__}; an artifact holds dense tensors alone. "
        f"Return a tensor from get_extra_state, or register a buffer."
    )


def scale_of(value: Tensor) -> Tensor:
    """Return the scale of a quantized tensor: float64, one element per channel, or a scalar for all."""
    return value.q_per_channel_scales() if _is_per_channel(value) else torch.tensor(value.q_scale(), dtype=torch.float64)


def with_grid(like: Tensor, integers: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None) -> Tensor:
    """Return a quantized tensor of the same scheme.

    Args:
        like: per channel or per tensor; gives what is not given.
        integers: that it holds.
        scale: as :func:`scale_of` gives it.
        zero_point: one for each scale.
    """
    scale = scale_of(like) if scale is None else scale
    zero_point = _zero_point(like) if zero_point is None else zero_point
    if _is_per_channel(like):
        return torch._make_per_channel_quantized_tensor(integers, scale, zero_point, like.q_per_channel_axis())
    return torch._make_per_tensor_quantized_tensor(integers, scale.item(), int(zero_point.item()))


def _zero_point(value: Tensor) -> Tensor:
    return value.q_per_channel_zero_points() if _is_per_channel(value) else torch.tensor(value.q_zero_point())


def _is_per_channel(value: Tensor) -> bool:
    return value.qscheme() == torch.per_channel_affine


def _assemble(key: str, template: Any, plain: Mapping[str, Tensor]) -> Any:
    if isinstance(template, tuple):
        return tuple(_assemble(f"{key}.{part}", item, plain) for part, item in zip(PACKED_PARTS, template, strict=True))
    if not isinstance(template, Tensor):
        return template
    if not template.is_quantized:
        return plain[key]
    integers, scale, zero_point = (plain[f"{key}.{part}"] for part in ("int8", "scale", "zero_point"))
    return with_grid(template, integers, scale, zero_point)
