"""What a module was called with, as a description that JSON can hold."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from qat_lightning.input_spec import InputSpec, leaves, spec_of
from qat_lightning.plan import Call

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
