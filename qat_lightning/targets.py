"""Finds the submodules of a LightningModule that are quantized, and captures how they are called."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.loss import _Loss
from torchmetrics import Metric, MetricCollection

from qat_lightning.core import int8_plan_of, plan_of
from qat_lightning.errors import ConfigurationError
from qat_lightning.plan import Call, detach_call, quantizable_layers
from qat_lightning.recipe import Recipe

# Containers without a forward of their own: what they hold is called.
_LISTS = (nn.ModuleList, nn.ModuleDict)
_LEFT_ALONE = (Metric, MetricCollection, _Loss)


def find_targets(root: nn.Module, recipe: Recipe, modules: Sequence[str] | None) -> dict[str, nn.Module]:
    """Return the submodules to quantize by qualified name.

    Args:
        root: the LightningModule.
        recipe: decides which layers count.
        modules: names the user chose; None takes every child that holds layers to quantize, metrics and losses left out.

    Raises:
        ConfigurationError: an unknown name, one module inside another, a module that is left alone or holds nothing to quantize.
    """
    if modules is None:
        targets = {name: child for name, child in _children(root) if _is_target(child, recipe)}
        if not targets:
            raise ConfigurationError(
                f"Nothing to quantize: no child of {type(root).__name__} holds a layer that recipe {recipe.name!r} quantizes; "
                f"its children are {[name for name, _ in root.named_children()]}. Build the network in __init__ or configure_model, "
                f"or name submodules with `modules`. Subclasses of torch's layers do not count: torch swaps its own alone."
            )
    else:
        targets = {name: _named(root, name, recipe) for name in modules}
    _refuse_overlap(targets)
    return targets


def already(root: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the prepared and the int8 submodules of ``root`` by qualified name."""
    modules = dict(root.named_modules())
    prepared = {name: child for name, child in modules.items() if plan_of(child) is not None}
    int8 = {name: child for name, child in modules.items() if int8_plan_of(child) is not None}
    return prepared, int8


def concerns(name: str, modules: Sequence[str] | None) -> bool:
    """Whether a submodule is one of those chosen, lies in one or holds one; None chooses all."""
    return modules is None or any(f"{name}.".startswith(f"{chosen}.") or f"{chosen}.".startswith(f"{name}.") for chosen in modules)


def refuse_shared_parts(root: nn.Module, modules: Sequence[str] | None) -> None:
    """Refuse to prepare what lies in, or holds, a module that is prepared already.

    Args:
        root: the LightningModule.
        modules: names to prepare; None for what nobody has prepared.

    Raises:
        ConfigurationError: names both.
    """
    for prepared in already(root)[0]:
        shared = next((name for name in modules or () if concerns(prepared, [name])), None)
        if shared is not None:
            raise ConfigurationError(
                f"The modules to quantize overlap: {shared!r}, of `modules`, and {prepared!r}, which another QuantizationCallback or an "
                f"earlier fit has prepared. Give callbacks modules of their own, or use a fresh LightningModule."
            )


class CallRecorder:
    """Keeps the arguments that modules are called with, from its making until ``stop``.

    Args:
        targets: modules by name.
        limit: how many calls of each are kept.
    """

    def __init__(self, targets: Mapping[str, nn.Module], limit: int = 1) -> None:
        self._calls: dict[str, list[Call]] = {name: [] for name in targets}
        self._limit = limit
        # Before the hooks that a prepared module has of its own, which change the arguments.
        self._handles = [
            target.register_forward_pre_hook(self._hook(name), prepend=True, with_kwargs=True) for name, target in targets.items()
        ]

    def stop(self) -> dict[str, list[Call]]:
        """Stop recording and return the calls of each module."""
        for handle in self._handles:
            handle.remove()
        return self._calls

    def _hook(self, name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            if len(self._calls[name]) < self._limit:
                self._calls[name].append(detach_call(Call(args, kwargs)))

        return keep


def capture_calls(targets: Mapping[str, nn.Module], run: Callable[[], Any], limit: int = 1) -> dict[str, list[Call]]:
    """Return the first calls that each target receives while ``run`` runs."""
    recorder = CallRecorder(targets, limit)
    try:
        run()
    finally:
        calls = recorder.stop()
    return calls


def _children(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in root.named_children():
        if isinstance(child, _LISTS):
            yield from _children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _is_target(child: nn.Module, recipe: Recipe) -> bool:
    return not isinstance(child, _LEFT_ALONE) and next(quantizable_layers(child, recipe), None) is not None


def _named(root: nn.Module, name: str, recipe: Recipe) -> nn.Module:
    modules: dict[str, nn.Module] = dict(root.named_modules())
    if not isinstance(name, str) or name not in modules or not name:
        names = [known for known in modules if known]
        close = difflib.get_close_matches(str(name), names, n=3) or [known for known, _ in root.named_children()]
        raise ConfigurationError(f"`modules` names {name!r}, which {type(root).__name__} does not have. Names are e.g. {close}.")
    child: nn.Module = modules[name]
    if isinstance(child, _LISTS):
        inside = [f"{name}.{key}" for key, _ in child.named_children()]
        raise ConfigurationError(
            f"`modules` names {name!r}, a {type(child).__name__}, which is never called itself. Name what it holds: {inside}."
        )
    if not _is_target(child, recipe):
        raise ConfigurationError(
            f"Nothing to quantize: `modules` names {name!r} ({type(child).__name__}), "
            f"which holds no layer that recipe {recipe.name!r} quantizes."
        )
    return child


def _refuse_overlap(targets: Mapping[str, nn.Module]) -> None:
    for outer, module in targets.items():
        inside = {id(child) for child in module.modules()}
        for inner, other in targets.items():
            if inner != outer and id(other) in inside:
                raise ConfigurationError(
                    f"The modules to quantize overlap: {inner!r} is part of {outer!r}. Name one of them with modules=[{outer!r}]."
                )
