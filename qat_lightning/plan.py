"""Which layers of a module are quantized, and how: a recipe made concrete for one module on this machine, in primitives only."""

import difflib
import fnmatch
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_lightning.backend import (
    CONVOLUTIONS,
    RECURRENT,
    Kernel,
    LayerShape,
    check_backend,
    choose_kernel,
)
from qat_lightning.decoding import decode
from qat_lightning.errors import ConfigurationError
from qat_lightning.input_spec import InputSpec, tensors_of
from qat_lightning.recipe import (
    OBSERVERS,
    QAT,
    BackendName,
    DynamicPTQ,
    FlowName,
    LayerOverride,
    OverrideKey,
    Recipe,
    StaticPTQ,
    check_choice,
)
from qat_lightning.suitability import refuse_layer, refuse_module

STATIC_LAYERS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
DYNAMIC_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *RECURRENT)
RECIPES = (QAT.name, StaticPTQ.name, DynamicPTQ.name)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized.

    Args:
        kernel: what runs it.
        per_channel: one weight scale per output channel.
        observer: how calibration chooses the range of its output; None: as for everything else.
    """

    kernel: Kernel
    per_channel: bool
    observer: str | None = None

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        check_choice("observer", self.observer, (None, *OBSERVERS))


@dataclass(frozen=True)
class Plan:
    """How one module is quantized. Names of layers are relative to the module.

    Args:
        recipe: name of the recipe.
        flow: name of the flow.
        backend: the engine for everything that ``layers`` does not name.
        layers: the layers to quantize.
        float_modules: modules that stay float, with all they contain.
        fuse: groups of modules that the eager flow fuses; None discovers them.
        observer: how static quantization chooses activation ranges; None in the other recipes.
        constants: arguments of ``forward`` that keep their default value, so that tracing may branch on them.
        example: the tensors in a call of the module, for the pt2e flow; None in the others.
    """

    recipe: str
    flow: FlowName
    backend: BackendName
    layers: Mapping[str, LayerPlan]
    float_modules: tuple[str, ...] = ()
    fuse: tuple[tuple[str, ...], ...] | None = None
    observer: str | None = None
    constants: tuple[str, ...] = ()
    example: tuple[InputSpec, ...] | None = None

    def __post_init__(self) -> None:
        """Check what the types leave open."""
        check_choice("recipe", self.recipe, RECIPES)
        check_choice("observer", self.observer, OBSERVERS if self.recipe == StaticPTQ.name else (None,))

    def keep_float(self, names: Iterable[str]) -> "Plan":
        """Return the plan with these layers in float, as ``overrides={name: None}`` would have made it."""
        kept = set(names)
        layers = {name: layer for name, layer in self.layers.items() if name not in kept}
        return replace(self, layers=layers, float_modules=tuple(_outermost({*self.float_modules, *kept})))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Plan":
        """Return the plan that ``to_dict`` described and JSON has held since.

        Raises:
            ValueError: names the key that is missing, unknown or has a wrong value.
        """
        return decode(Plan, values)


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module) -> Any:
        """Call ``module`` with them."""
        return module(*self.args, **self.kwargs)


def make_plan(module: nn.Module, recipe: Recipe, name: str = "", example: Call | None = None) -> Plan:
    """Resolve ``recipe`` for ``module``: which layers, which kernels.

    Args:
        module: the module to quantize; it is not changed.
        recipe: what to do.
        name: qualified name of the module in its parent; overrides may use names with or without it.
        example: a call of the module; decides which optional arguments are tensors. None: they keep their defaults.

    Raises:
        ConfigurationError: the backend is not in this build of torch, or a layer cannot be quantized; see :mod:`.suitability`.
    """
    check_backend(recipe.backend)
    settings = {path: _setting(path, child, module, name, recipe.overrides) for path, child in module.named_modules()}
    for path, child in module.named_modules() if not isinstance(recipe, DynamicPTQ) else ():
        if settings[path] is not None:
            refuse_module(f"{name}.{path}".strip("."), child)
    layers = {}
    for path, child in quantizable_layers(module, recipe):
        override = settings[path]
        if override is not None:
            refuse_layer(f"{name}.{path}".strip("."), child)
            layers[path] = _plan_layer(child, recipe, override)
    return Plan(
        recipe=recipe.name,
        flow=recipe.flow,
        backend=recipe.backend,
        layers=layers,
        float_modules=tuple(_outermost(path for path, override in settings.items() if override is None)),
        fuse=_own_groups(module, name, recipe),
        observer=recipe.observer if isinstance(recipe, StaticPTQ) else None,
        constants=constant_arguments(module, example),
        example=_example_of(module, recipe, name, example),
    )


def quantizable_layers(module: nn.Module, recipe: Recipe) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and layer of what the recipe can quantize in ``module``, overrides aside."""
    types = STATIC_LAYERS if not isinstance(recipe, DynamicPTQ) else (nn.Linear,) if recipe.flow == "pt2e" else DYNAMIC_LAYERS
    for path, child in module.named_modules():
        if type(child) in types:
            yield path, child


def check_overrides(recipe: Recipe, targets: Mapping[str, nn.Module]) -> None:
    """Refuse an override that matches nothing in the targets.

    Raises:
        ConfigurationError: names the key and the closest module names.
    """
    modules = [(f"{name}.{path}".strip("."), path, child) for name, target in targets.items() for path, child in target.named_modules()]
    for key in recipe.overrides:
        if any(_matches(key, full, path, child) for full, path, child in modules):
            continue
        names = [full for full, _, _ in modules if full]
        short = difflib.get_close_matches(str(key), [path for _, path, _ in modules], n=3)
        close = difflib.get_close_matches(str(key), names, n=3) or [full for full, path, _ in modules if path in short] or names[:5]
        raise ConfigurationError(
            f"`overrides` has the key {key!r}, which matches no module of {sorted(targets)}. "
            f"Use a qualified name, a glob or a module type; names are e.g. {close}."
        )


def check_fuse(recipe: Recipe, targets: Mapping[str, nn.Module]) -> None:
    """Refuse a group of ``fuse`` that lies in none of the targets.

    Raises:
        ConfigurationError: names the group and the first module that is missing.
    """
    found = {group for name, target in targets.items() for group in _named_groups(target, name, recipe)}
    for group in recipe.fuse or ():
        if tuple(group) not in found:
            known = {full for name, target in targets.items() for path, _ in target.named_modules() for full in (path, f"{name}.{path}")}
            missing = next((module for module in group if module not in known), None)
            reason = f"there is no module {missing!r}" if missing else "its modules lie in several modules that are quantized one by one"
            raise ConfigurationError(f"`fuse` has the group {list(group)}, but {reason} in {sorted(targets) or 'the module'}.")


def _own_groups(module: nn.Module, name: str, recipe: Recipe) -> tuple[tuple[str, ...], ...] | None:
    return None if recipe.fuse is None else tuple(_named_groups(module, name, recipe).values())


def _named_groups(module: nn.Module, name: str, recipe: Recipe) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return the groups of ``fuse`` that lie in the module, as the user wrote them and by names relative to the module."""
    names = {path for path, _ in module.named_modules()}
    groups = {}
    for group in recipe.fuse or ():
        relative = tuple(part if part in names else part.removeprefix(f"{name}.") for part in group)
        if names.issuperset(relative):
            groups[tuple(group)] = relative
    return groups


def needs_example(recipe: Recipe) -> bool:
    """Whether the module is exported, for which it is called once."""
    return recipe.flow == "pt2e" and not isinstance(recipe, DynamicPTQ)


def _example_of(module: nn.Module, recipe: Recipe, name: str, example: Call | None) -> tuple[InputSpec, ...] | None:
    """Return what the pt2e flow exports the module with; dynamic quantization swaps layers and exports nothing."""
    if not needs_example(recipe):
        return None
    if example is None:
        raise ConfigurationError(
            f"flow='pt2e' exports {name or type(module).__name__!r}, for which it needs an example of how it is called: there is no batch "
            f"to take one from, or `calibration_step` does not call it. Set `example_input_array` on the LightningModule, leave the module "
            f"out with `modules`, or use flow='fx'; without a Trainer, pass one: prepare(module, recipe, example=Call((x,), {{}}))."
        )
    bound = inspect.signature(module.forward).bind(*example.args, **example.kwargs)
    bound.apply_defaults()
    return tensors_of(bound.args, bound.kwargs)


def _plan_layer(layer: nn.Module, recipe: Recipe, override: LayerOverride) -> LayerPlan:
    per_channel = recipe.per_channel if override.per_channel is None else override.per_channel
    bits = recipe.activation_bits if override.activation_bits is None else override.activation_bits
    weight_bits = recipe.weight_bits if override.weight_bits is None else override.weight_bits
    if override.engine is not None:
        return LayerPlan(Kernel(override.engine, 8 if bits == "auto" else bits, weight_bits), per_channel, override.observer)
    if isinstance(recipe, DynamicPTQ):
        # The dynamic kernels choose the range of their inputs themselves: 7 bits, but for qnnpack.
        bits = 8 if recipe.backend == "qnnpack" or recipe.flow == "pt2e" else 7
        return LayerPlan(Kernel(recipe.backend, bits), per_channel and type(layer) not in RECURRENT)
    if recipe.flow == "pt2e":  # computes in float between grids, where nothing overflows
        return LayerPlan(Kernel(recipe.backend, 8 if bits == "auto" else bits, weight_bits), per_channel, override.observer)
    return LayerPlan(choose_kernel(recipe.backend, LayerShape.of(layer), bits, per_channel, weight_bits), per_channel, override.observer)


def _setting(path: str, child: nn.Module, root: nn.Module, root_name: str, overrides: Mapping[OverrideKey, Any]) -> LayerOverride | None:
    """Return the last override that matches the module or one that contains it."""
    parts = path.split(".") if path else []
    chain = [("", root)] + [(".".join(parts[: i + 1]), root.get_submodule(".".join(parts[: i + 1]))) for i in range(len(parts))]
    setting: LayerOverride | None = LayerOverride()
    for key, value in overrides.items():
        if any(_matches(key, f"{root_name}.{part}".strip("."), part, module) for part, module in chain):
            setting = value
    return setting


def _matches(key: OverrideKey, full: str, path: str, module: nn.Module) -> bool:
    if isinstance(key, type):
        return isinstance(module, key)
    return any(name and fnmatch.fnmatchcase(name, key) for name in (full, path))


def _outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths that lie in none of the others."""
    kept: list[str] = []
    for path in sorted(paths):
        if not any(parent == "" or path.startswith(f"{parent}.") for parent in kept):
            kept.append(path)
    return kept


def constant_arguments(module: nn.Module, example: Call | None) -> tuple[str, ...]:
    """Return the arguments of ``forward`` that are left at their default, or are no tensors in the example."""
    signature = inspect.signature(module.forward)
    if example is not None:
        bound = signature.bind(*example.args, **example.kwargs).arguments
        tensors = {key for key, value in bound.items() if any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))}
    else:
        tensors = {key for key, parameter in signature.parameters.items() if parameter.default is inspect.Parameter.empty}
    optional = (key for key, parameter in signature.parameters.items() if parameter.default is not inspect.Parameter.empty)
    return tuple(key for key in optional if key not in tensors)


def detach_call(call: Call) -> Call:
    """Return the call with every tensor detached and copied, so that nothing later changes it."""

    def freeze(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf

    args, kwargs = pytree.tree_map(freeze, (call.args, call.kwargs))
    return Call(args, kwargs)
