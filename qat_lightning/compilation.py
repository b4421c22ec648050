"""Modules that ``torch.compile`` has wrapped: fake-quant, tracing and int8 need what is inside."""

import copy
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import nn
from torch._dynamo import OptimizedModule

WRAPPER = "_orig_mod."

T = TypeVar("T")


def uncompile(module: nn.Module) -> list[str]:
    """Take the submodules of ``module``, and a LightningModule itself, out of ``torch.compile``, in place.

    Returns:
        the names of what was compiled; "" for the module itself.
    """
    found = list(_unwrap_children(module))
    if isinstance(module, LightningModule) and module._compiler_ctx is not None:
        to_uncompiled(module)
        found.append("")
    return found


def inside(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, and any other as it is."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def uncompiled_copy(module: nn.Module) -> nn.Module:
    """Return a deep copy of ``module`` that nothing in is compiled."""
    copied = copy.deepcopy(inside(module))
    copied._compiled_call_impl = None
    list(_unwrap_children(copied))
    return copied


def plain_names(state: Mapping[str, T]) -> dict[str, T]:
    """Return a state dict with the names it would have if nothing had been compiled."""
    return {name.replace(WRAPPER, ""): value for name, value in state.items()}


def rename_plainly(state: MutableMapping[str, Any]) -> None:
    """Give a state dict, in place, the names it would have if nothing had been compiled."""
    plain = plain_names(state)
    state.clear()
    state.update(plain)


def read_plain_names(module: nn.Module) -> None:
    """Let ``module``, which is compiled no longer, load state dicts that were saved while it was."""
    module.register_load_state_dict_pre_hook(_rename)  # type: ignore[no-untyped-call]


def _unwrap_children(module: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        bare = inside(child)
        if bare is not child or bare._compiled_call_impl is not None:
            bare._compiled_call_impl = None
            module._modules[name] = bare
            yield prefix + name
        yield from _unwrap_children(bare, f"{prefix}{name}.")


def _rename(module: nn.Module, state: MutableMapping[str, Any], *_: Any) -> None:
    rename_plainly(state)
