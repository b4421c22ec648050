"""Calls of any signature as lists of tensors: what a program takes and gives."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_lightning.errors import ConfigurationError, UnsupportedModelError, shorten
from qat_lightning.input_spec import InputSpec, leaves
from qat_lightning.plan import Call
from qat_lightning.signature import Signature, describe

PRIMITIVES = (bool, int, float, str, type(None))


class FlatModule(nn.Module):
    """A module that takes the tensors of a call and returns those of its result.

    Args:
        module: any module.
        call: how it is called; what is no tensor in it stays as it is.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self.leaves, self.spec = pytree.tree_flatten((call.args, call.kwargs))
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.structure: Any = None
        self.train(module.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result."""
        given = iter(tensors)
        filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(filled, self.spec)
        found: list[Tensor] = []
        self.structure = _structure(self.module(*args, **kwargs), found)
        return tuple(found)


def describe_call(call: Call) -> Signature:
    """Return what a call consists of."""
    signature = describe([call])
    assert signature is not None
    return signature


def fixed_arguments(call: Call) -> dict[str, Any]:
    """Return the arguments of a call that are no tensors, by name.

    Raises:
        UnsupportedModelError: one that JSON cannot hold.
    """
    found = {name: leaf for name, leaf in leaves(call.args, call.kwargs) if not isinstance(leaf, Tensor)}
    for name, leaf in found.items():
        if not isinstance(leaf, PRIMITIVES):
            raise UnsupportedModelError(f"The argument {name} is a {type(leaf).__name__}: a program keeps numbers, texts and None alone.")
    return found


def tensors_of(call: Call, inputs: Sequence[InputSpec], fixed: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of a call in the order of a program's inputs.

    Raises:
        ConfigurationError: names the argument that is missing, unknown, of another type, dtype or shape, or has another value.
    """
    given = dict(leaves(call.args, call.kwargs))
    expected = [spec.name for spec in inputs]
    if unknown := [name for name in given if name not in expected and name not in fixed]:
        raise ConfigurationError(
            f"The int8 model takes {shorten(expected)}, but got {shorten(unknown)}, too: call it as it was called before."
        )
    for name, value in fixed.items():
        if name in given and (type(given[name]) is not type(value) or given[name] != value):
            raise ConfigurationError(f"The int8 model was recorded with {name}={value!r}, but got {given[name]!r}: load it with its class.")
    return [_checked(spec, given.get(spec.name)) for spec in inputs]


def _checked(spec: InputSpec, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ConfigurationError(
            f"Expected {spec.name} to be a tensor of {spec.dtype}, but got {'nothing' if value is None else type(value).__name__}."
        )
    dtype, shape = str(value.dtype).removeprefix("torch."), spec.shape or ()
    fits = len(shape) == value.dim() and all(size in (None, own) for size, own in zip(shape, value.shape, strict=True))
    if dtype != spec.dtype or not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ConfigurationError(
            f"Expected {spec.name} to be {spec.dtype} of shape ({sizes}), but got {dtype} of shape {tuple(value.shape)}."
        )
    return value


def example_tensors(inputs: Sequence[InputSpec], size: int = 1) -> list[Tensor]:
    """Return tensors that a program admits: normal numbers, or zeros where the dtype is none of numbers with a fraction.

    Args:
        inputs: of the program.
        size: of the dimensions that may vary.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for spec in inputs:
        shape, dtype = [size if one is None else one for one in spec.shape or ()], getattr(torch, spec.dtype)
        made.append(torch.randn(shape, generator=generator).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype))
    return made


def nested(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the result that ``structure`` describes."""
    kind, content = structure["kind"], structure["content"]
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: nested(item, tensors) for key, item in content.items()}
    if kind in ("tuple", "list"):
        items = [nested(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


def check_structure(structure: Any, count: int) -> None:
    """Check a structure from a file.

    Raises:
        ValueError: it is none, or names a tensor that is not there.
    """
    if not isinstance(structure, dict) or sorted(structure) != ["content", "kind"]:
        raise ValueError("`structure` has a part that is none")
    kind, content = structure["kind"], structure["content"]
    children: Mapping[str, Callable[[], Any]] = {"dict": lambda: content.values(), "tuple": lambda: content, "list": lambda: content}
    if kind == "tensor" and type(content) is int and 0 <= content < count:
        return
    if kind == "value" and isinstance(content, PRIMITIVES):
        return
    if kind not in children or not isinstance(content, dict if kind == "dict" else list):
        raise ValueError("`structure` has a part that is none")
    for item in children[kind]():
        check_structure(item, count)


def _structure(result: Any, found: list[Tensor]) -> dict[str, Any]:
    if isinstance(result, Tensor):
        found.append(result)
        return {"kind": "tensor", "content": len(found) - 1}
    if isinstance(result, Mapping):
        return {"kind": "dict", "content": {str(key): _structure(item, found) for key, item in result.items()}}
    if isinstance(result, tuple | list):
        kind = "tuple" if isinstance(result, tuple) else "list"
        return {"kind": kind, "content": [_structure(item, found) for item in result]}
    if isinstance(result, PRIMITIVES):
        return {"kind": "value", "content": result}
    raise UnsupportedModelError(
        f"The module returns a {type(result).__name__}: a program returns tensors, numbers, and containers of these."
    )
