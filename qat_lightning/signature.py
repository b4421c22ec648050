"""What a module was called with, as a description that JSON can hold."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils import _pytree as pytree

from qat_lightning.input_spec import InputSpec, leaves, spec_of
from qat_lightning.plan import Call, detach_call

Signature: TypeAlias = tuple[InputSpec, ...]


def describe(calls: Sequence[Call]) -> Signature | None:
    """Return what the calls have in common; None where there is no call."""
    signature: Signature | None = None
    for call in calls:
        signature = widen(signature, call)
    return signature


def widen(signature: Signature | None, call: Call) -> Signature:
    """Return a signature that admits one call more; a call with other arguments than the first leaves it as it is."""
    own = tuple(spec_of(name, leaf) for name, leaf in leaves(call.args, call.kwargs))
    if signature is None:
        return own
    if [(spec.name, spec.dtype) for spec in own] != [(spec.name, spec.dtype) for spec in signature]:
        return signature
    return tuple(_common(one, other) for one, other in zip(signature, own, strict=True))


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
