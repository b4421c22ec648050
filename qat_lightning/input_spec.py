"""The arguments of a call, leaf by leaf, as a description that JSON can hold."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# What a network may be called with in a description that comes from a stranger.
MOST_ELEMENTS = 2**31
BATCH = 5
"""Samples of a rebuilt call. Tracing takes equal sizes for the same size, so it is one that is seldom another dimension."""


@dataclass(frozen=True)
class InputSpec:
    """One argument of a call, or one leaf of it where it is a container.

    Args:
        name: e.g. ``args[0]`` or ``kwargs['mask']``.
        dtype: e.g. ``"float32"``; the type of what is no tensor.
        shape: size of each dimension, None for one that may vary: the first, and those that differed between calls. None: no tensor.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        if any(size is not None and size < 0 for size in self.shape or ()):
            raise ValueError(f"shape is {self.shape}, which has a negative size")


def leaves(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the leaves of a call with their names."""
    if not kwargs and all(isinstance(arg, Tensor) for arg in args):  # as below, in a tenth of the time
        return [(f"args[{index}]", arg) for index, arg in enumerate(args)]
    sides: tuple[tuple[str, Any], ...] = (("args", args), ("kwargs", dict(kwargs)))
    return [(f"{kind}{pytree.keystr(path)}", leaf) for kind, values in sides for path, leaf in pytree.tree_flatten_with_path(values)[0]]


def spec_of(name: str, leaf: Any) -> InputSpec:
    """Return the description of a leaf; the first dimension of a tensor may vary."""
    if not isinstance(leaf, Tensor):
        return InputSpec(name, type(leaf).__name__, None)
    return InputSpec(name, str(leaf.dtype).removeprefix("torch."), (None, *leaf.shape[1:]) if leaf.dim() else ())


def tensors_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[InputSpec, ...]:
    """Return the descriptions of the tensors in a call, in which the first dimension varies where it is that of the first tensor."""
    found = [(name, leaf) for name, leaf in leaves(args, kwargs) if isinstance(leaf, Tensor)]
    size = next((leaf.shape[0] for _, leaf in found if leaf.dim()), None)
    return tuple(
        spec_of(name, leaf)
        if leaf.dim() and leaf.shape[0] == size
        else InputSpec(name, str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))
        for name, leaf in found
    )


def rebuild(specs: tuple[InputSpec, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call, arguments and keyword arguments, of zeros that :func:`tensors_of` describes as ``specs``.

    Raises:
        ValueError: a name, dtype or shape that no call has.
    """
    root: dict[str, Any] = {"args": {}, "kwargs": {}}
    for spec in specs:
        kind, *keys = _keys(spec.name)
        place = root.get(kind)
        for key in keys[:-1]:
            place = place.setdefault(key, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or not keys:
            raise ValueError(f"{spec.name!r} names no argument")
        place[keys[-1]] = _zeros(spec)
    return _ordered(root["args"]), {str(key): _nested(value) for key, value in root["kwargs"].items()}


def _keys(name: str) -> list[Any]:
    kind, *rest = re.split(r"(?=\[)", name)
    keys: list[Any] = [kind]
    for part in rest:
        match = re.fullmatch(r"\[(?:(\d+)|'([^']*)')\]", part)
        if match is None:
            raise ValueError(f"{name!r} names no argument")
        keys.append(int(match[1]) if match[1] is not None else match[2])
    return keys


def _nested(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if any(isinstance(key, str) for key in value):
        return {key: _nested(item) for key, item in value.items()}
    return _ordered(value)


def _ordered(items: Mapping[Any, Any]) -> tuple[Any, ...]:
    if sorted(items) != list(range(len(items))):
        raise ValueError(f"arguments {sorted(items)} leave gaps")
    return tuple(_nested(items[index]) for index in range(len(items)))


def _zeros(spec: InputSpec) -> Tensor:
    dtype = getattr(torch, spec.dtype, None)
    shape = [BATCH if size is None else size for size in spec.shape or ()]
    elements = 1
    for size in shape:
        elements *= size
    if not isinstance(dtype, torch.dtype) or spec.shape is None or elements > MOST_ELEMENTS:
        raise ValueError(f"{spec.name!r} is no tensor of a dtype and size that a network could be called with")
    return torch.zeros(shape, dtype=dtype)
