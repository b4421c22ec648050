"""What a module was called with, as a description that JSON can hold."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from qat_lightning.plan import Call, detach_call


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


Signature: TypeAlias = tuple[InputSpec, ...]


def describe(calls: Sequence[Call]) -> Signature | None:
    """Return what the calls have in common; None where there is no call."""
    signature: Signature | None = None
    for call in calls:
        signature = widen(signature, call)
    return signature


def widen(signature: Signature | None, call: Call) -> Signature:
    """Return a signature that admits one call more; a call with other arguments than the first leaves it as it is."""
    own = tuple(_spec(name, leaf) for name, leaf in named_leaves(call))
    if signature is None:
        return own
    if [(spec.name, spec.dtype) for spec in own] != [(spec.name, spec.dtype) for spec in signature]:
        return signature
    return tuple(_common(one, other) for one, other in zip(signature, own, strict=True))


def named_leaves(call: Call) -> list[tuple[str, Any]]:
    """Return the arguments of a call, or the leaves of those that are containers, under their names."""
    sides = (("args", call.args), ("kwargs", call.kwargs))
    return [(f"{kind}{pytree.keystr(path)}", leaf) for kind, values in sides for path, leaf in pytree.tree_flatten_with_path(values)[0]]


def _spec(name: str, leaf: Any) -> InputSpec:
    if not isinstance(leaf, Tensor):
        return InputSpec(name, type(leaf).__name__, None)
    return InputSpec(name, str(leaf.dtype).removeprefix("torch."), (None, *leaf.shape[1:]) if leaf.dim() else ())


def _common(one: InputSpec, other: InputSpec) -> InputSpec:
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return one
    return replace(one, shape=tuple(size if size == also else None for size, also in zip(one.shape, other.shape, strict=True)))


def batch_size(batch: Any) -> int:
    """Return the number of samples: the first dimension of the first tensor."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0), 0)


def first_of_batch(batch: Any) -> Any:
    """Return a batch of the first sample: every tensor whose first dimension is the batch size is cut."""
    size = batch_size(batch)

    def cut(leaf: Any) -> Any:
        return leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size else leaf

    return pytree.tree_map(cut, batch)


def first_of_call(call: Call) -> Call:
    """Return a copy of the call with the first sample of its batch."""
    args, kwargs = first_of_batch((call.args, call.kwargs))
    return detach_call(Call(args, kwargs))
