"""The three recipes and the moments of their schedule, as frozen dataclasses that check every value they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

from torch import nn

FlowName: TypeAlias = Literal["fx", "eager", "pt2e"]
BackendName: TypeAlias = Literal["x86", "fbgemm", "onednn", "qnnpack"]
EqualizationName: TypeAlias = Literal["weights", "activations"]
ObserverName: TypeAlias = Literal["histogram", "minmax", "moving_average", "percentile", "entropy"]

FLOWS: tuple[FlowName, ...] = ("fx", "eager", "pt2e")
BACKENDS: tuple[BackendName, ...] = ("x86", "fbgemm", "onednn", "qnnpack")
EQUALIZATIONS: tuple[EqualizationName, ...] = ("weights", "activations")
OBSERVERS: tuple[ObserverName, ...] = ("histogram", "minmax", "moving_average", "percentile", "entropy")
ACTIVATION_BITS = (7, 8)
WEIGHT_BITS = (7, 8)


def check_choice(argument: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if isinstance(value, bool) or value not in allowed:
        raise ValueError(f"Expected argument `{argument}` to be one of {tuple(allowed)}, but got {value!r}.")


def check_count(argument: str, value: object, minimum: int) -> None:
    """Raise unless ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Expected argument `{argument}` to be an integer, but got {value!r}.")
    if value < minimum:
        raise ValueError(f"Expected argument `{argument}` to be at least {minimum}, but got {value}.")


def _check_switch(argument: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"Expected argument `{argument}` to be a bool, but got {value!r}.")


def _check_share(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `{argument}` to be a number, but got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"Expected argument `{argument}` to lie in [0, 1], but got {value}.")


def _check_drop(value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"Expected argument `max_accuracy_drop` to be a number or None, but got {value!r}.")
    if not 0 <= value <= 1:
        raise ValueError(f"Expected argument `max_accuracy_drop` to lie in [0, 1], a fraction such as 0.005, but got {value}.")


@dataclass(frozen=True, kw_only=True)
class When:
    """A moment of a training run; exactly one argument is given.

    Args:
        epoch: at the start of this epoch, counted from 0.
        step: once the trainer has made this many optimizer steps (``trainer.global_step``, which counts every optimizer).
        fraction: once this part of the run is over, in [0, 1); needs a Trainer with ``max_epochs`` or ``max_steps``.

    Raises:
        ValueError: none or several arguments, a negative count, a fraction outside [0, 1).
        TypeError: a value that is not a number.
    """

    epoch: int | None = None
    step: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Expected exactly one of `epoch`, `step` and `fraction`, but got {given or 'none of them'}.")
        for name in ("epoch", "step"):
            if name in given:
                check_count(name, given[name], minimum=0)
        if self.fraction is not None:
            if isinstance(self.fraction, bool) or not isinstance(self.fraction, int | float):
                raise TypeError(f"Expected argument `fraction` to be a number, but got {self.fraction!r}.")
            if not 0 <= self.fraction < 1:
                raise ValueError(
                    f"Expected argument `fraction` to lie in [0, 1), but got {self.fraction}; use None in place of the When for 'never'."
                )

    def __str__(self) -> str:
        """Return e.g. ``When(epoch=3)``."""
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"When({name}={value})"


@dataclass(frozen=True, kw_only=True)
class AdaRound:
    """Learned rounding of weights, see :mod:`qat_lightning.adaround`.

    Args:
        iterations: optimizer steps per layer.
        samples: positions of a layer's output, drawn from all calibration images, that its error is measured at.
        lr: learning rate of Adam.
        regularization: weight of the term that drives weights to one of their two integers, relative to the error of rounding to nearest.
        folder: layers that are done are kept here, so that an interrupted run goes on where it was; None keeps nothing.

    Raises:
        ValueError: a number that is not positive.
        TypeError: a value of another type.
    """

    iterations: int = 400
    samples: int = 2048
    lr: float = 0.03
    regularization: float = 1.0
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("iterations", "samples"):
            check_count(name, getattr(self, name), minimum=1)
        for name in ("lr", "regularization"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"Expected argument `{name}` to be a number, but got {value!r}.")
            if not 0 < value < float("inf"):
                raise ValueError(f"Expected argument `{name}` to be positive, but got {value}.")
        if self.folder is not None and not isinstance(self.folder, str | Path):
            raise TypeError(f"Expected argument `folder` to be a path or None, but got {self.folder!r}.")


@dataclass(frozen=True, kw_only=True)
class LayerOverride:
    """What one layer does differently from its recipe.

    Args:
        per_channel: one weight scale per output channel (True) or one for the whole tensor (False).
        activation_bits: value range of the layer's input, 7 or 8 bits.
        weight_bits: value range of its weights, 7 or 8 bits.
        engine: the engine whose kernel runs the layer, e.g. ``"qnnpack"``.
        observer: how calibration chooses the range of the layer's output, that of the operations fused with it.
    """

    per_channel: bool | None = None
    activation_bits: int | None = None
    weight_bits: int | None = None
    engine: BackendName | None = None
    observer: ObserverName | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.per_channel is not None:
            _check_switch("per_channel", self.per_channel)
        if self.activation_bits is not None:
            check_choice("activation_bits", self.activation_bits, ACTIVATION_BITS)
        if self.weight_bits is not None:
            check_choice("weight_bits", self.weight_bits, WEIGHT_BITS)
        if self.engine is not None:
            check_choice("engine", self.engine, BACKENDS)
        if self.observer is not None:
            check_choice("observer", self.observer, OBSERVERS)


OverrideKey: TypeAlias = str | type[nn.Module]
Overrides: TypeAlias = Mapping[OverrideKey, LayerOverride | Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe has.

    Args:
        flow: how modules are swapped: ``"fx"`` traces the graph, ``"eager"`` works on modules alone, ``"pt2e"`` exports the graph with
            ``torch.export`` and needs nothing of ``torch.ao``.
        backend: the engine the int8 model is made for.
        overrides: per layer, by qualified name, glob (``"layer1.*"``) or module type: None keeps it in float,
            a :class:`LayerOverride` or a mapping of its arguments changes how it is quantized. The last match wins.
        fuse: eager flow only: the lists of module names to fuse, as in the PyTorch tutorials; None discovers them.
        activation_bits: value range of activations; ``"auto"`` gives each layer the full 8 bits with a kernel that was
            probed not to saturate, and 7 bits where this machine has none.
        weight_bits: value range of weights. 7 is for processors without VNNI: the sums of no kernel overflow then, so that the fastest
            can be taken, also with 8-bit activations.
        per_channel: one weight scale per output channel, where the layer's kernel can run it.

    Raises:
        ValueError: a value outside the allowed ones.
        TypeError: a value of another type.
    """

    name: ClassVar[str]

    flow: FlowName = "fx"
    backend: BackendName = "x86"
    overrides: Overrides = field(default_factory=dict)
    fuse: Sequence[Sequence[str]] | None = None
    activation_bits: int | Literal["auto"] = "auto"
    weight_bits: int = 8
    per_channel: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("flow", self.flow, FLOWS)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("activation_bits", self.activation_bits, ("auto", *ACTIVATION_BITS))
        check_choice("weight_bits", self.weight_bits, WEIGHT_BITS)
        _check_switch("per_channel", self.per_channel)
        object.__setattr__(self, "overrides", MappingProxyType(_parse_overrides(self.overrides)))
        object.__setattr__(self, "fuse", _parse_fuse(self.fuse, self.flow))

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields; a mapping proxy can be neither copied nor pickled."""
        return {**self.__dict__, "overrides": dict(self.overrides)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the fields."""
        self.__dict__.update(state, overrides=MappingProxyType(state["overrides"]))


@dataclass(frozen=True, kw_only=True)
class QAT(Recipe):
    """Quantization-aware training: the network learns with the rounding of int8 in its forward pass (Jacob et al. 2018, arXiv:1712.05877).

    Args:
        freeze_observers: from then on activation and weight ranges stay as they are; None: never.
        freeze_bn: from then on BatchNorm normalises with its running statistics and stops updating them; None: never.
        start: fake-quant begins here, observers watch from the first step; None: at once.
        calibration_batches: how many batches the activation ranges are calibrated with when fake-quant begins, as in post-training
            quantization; 0 for none: ranges start with the first batch.
        observer: how the calibration chooses a range, as in :class:`StaticPTQ`.
            Until observers are frozen, training moves the ranges on by a moving average of minima and maxima.
        bias_correction: shift the bias of each layer by the mean error of its output, too, as in :class:`StaticPTQ`, where BatchNorm is
            frozen when fake-quant begins, or there is none; it takes the batches of the calibration.
        distillation: share of the gradient that comes from the float model in place of the loss, in [0, 1]; see
            :mod:`qat_lightning.distillation`. The float model is the module as it is when it is prepared: leave 0 for an untrained one.
        bn_reestimation_batches: how many batches the statistics of BatchNorm are measured anew with in the copy that is converted; 0: they
            are those that training has left. For runs that freeze BatchNorm late or never. See :mod:`qat_lightning.bn_reestimation`.
        keep_zeros: weights that are exactly zero when training begins, those of a pruned network, stay zero.
    """

    name: ClassVar[str] = "qat"

    freeze_observers: When | None = field(default_factory=lambda: When(fraction=0.6))
    freeze_bn: When | None = field(default_factory=lambda: When(fraction=0.5))
    start: When | None = None
    calibration_batches: int = 32
    observer: ObserverName = "histogram"
    bias_correction: bool = True
    distillation: float = 0.0
    bn_reestimation_batches: int = 0
    keep_zeros: bool = True

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        for argument in ("calibration_batches", "bn_reestimation_batches"):
            check_count(argument, getattr(self, argument), minimum=0)
        check_choice("observer", self.observer, OBSERVERS)
        _check_share("distillation", self.distillation)
        _check_switch("bias_correction", self.bias_correction)
        _check_switch("keep_zeros", self.keep_zeros)
        for argument in ("freeze_observers", "freeze_bn", "start"):
            value = getattr(self, argument)
            if value is not None and not isinstance(value, When):
                raise TypeError(f"Expected argument `{argument}` to be a When such as When(fraction=0.5), or None, but got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class StaticPTQ(Recipe):
    """Static post-training quantization: activation ranges come from a few calibration batches, weights from themselves.

    Args:
        calibration_batches: how many batches the observers see.
        observer: how a range is chosen: ``"histogram"`` (smallest squared error), ``"minmax"``, ``"moving_average"`` (of the minima and
            maxima of batches), ``"percentile"`` (99.99) or ``"entropy"`` (smallest Kullback-Leibler divergence); see
            :mod:`qat_lightning.range_search`. Each takes one pass over the batches, and memory that does not grow with their number.
        equalize: rule by which the channels of each layer get ranges of the same size before anything is rounded, fx flow only; see
            :func:`qat_lightning.equalize`. None: weights stay as they are.
        bias_correction: shift the bias of each layer by the mean error of its output; see :mod:`qat_lightning.bias_correction`.
        adaround: learn which weights are rounded up and which down; None rounds to nearest. See :mod:`qat_lightning.adaround`.
        max_accuracy_drop: keep the fewest layers in float with which int8 loses no more than this on the validation data, a fraction;
            None: all run in int8, whatever that costs. See :mod:`qat_lightning.fallback`.
    """

    name: ClassVar[str] = "ptq"

    calibration_batches: int = 32
    observer: ObserverName = "histogram"
    equalize: EqualizationName | None = None
    bias_correction: bool = True
    adaround: AdaRound | None = None
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        check_count("calibration_batches", self.calibration_batches, minimum=1)
        check_choice("observer", self.observer, OBSERVERS)
        _check_switch("bias_correction", self.bias_correction)
        if self.adaround is not None and not isinstance(self.adaround, AdaRound):
            raise TypeError(
                f"Expected argument `adaround` to be an AdaRound such as AdaRound(iterations=400), or None, but got {self.adaround!r}."
            )
        check_choice("equalize", self.equalize, (*EQUALIZATIONS, None))
        if self.equalize is not None and self.flow != "fx":
            raise ValueError(
                f"Expected argument `equalize` only with flow='fx', which traces the network, but got flow={self.flow!r}. "
                f"Use flow='fx', or equalize=None and qat_lightning.equalize(module, batches) before."
            )
        _check_drop(self.max_accuracy_drop)


@dataclass(frozen=True, kw_only=True)
class DynamicPTQ(Recipe):
    """Dynamic quantization of Linear, LSTM and GRU: int8 weights, activation ranges measured anew at each call.

    The default flow is eager: nothing needs to be traced, so that any ``forward`` works.

    Args:
        max_accuracy_drop: as in :class:`StaticPTQ`.
    """

    name: ClassVar[str] = "dynamic"

    flow: FlowName = "eager"
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        _check_drop(self.max_accuracy_drop)
        if self.weight_bits != 8:
            raise ValueError(f"Expected argument `weight_bits` to be 8 in dynamic quantization, but got {self.weight_bits}.")
        for key, override in self.overrides.items():
            if isinstance(override, LayerOverride) and override.observer is not None:
                raise ValueError(f"Expected no `observer` in `overrides[{key!r}]`: dynamic quantization measures ranges at each call.")
            if isinstance(override, LayerOverride) and override.weight_bits is not None:
                raise ValueError(f"Expected no `weight_bits` in `overrides[{key!r}]`: dynamic quantization has 8.")


RECIPES: dict[str, type[Recipe]] = {recipe.name: recipe for recipe in (QAT, StaticPTQ, DynamicPTQ)}


def parse_recipe(recipe: Recipe | str) -> Recipe:
    """Return ``recipe``, or the recipe of that name with its defaults.

    Raises:
        ValueError: no recipe has that name.
        TypeError: neither a recipe nor a name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        check_choice("recipe", recipe, tuple(RECIPES))
        return RECIPES[recipe]()
    raise TypeError(f"Expected argument `recipe` to be a QAT, StaticPTQ or DynamicPTQ or one of {tuple(RECIPES)}, but got {recipe!r}.")


def _parse_overrides(overrides: Overrides) -> dict[OverrideKey, LayerOverride | None]:
    if not isinstance(overrides, Mapping):
        raise TypeError(f"Expected argument `overrides` to be a mapping from layers to settings, but got {overrides!r}.")
    parsed: dict[OverrideKey, LayerOverride | None] = {}
    for key, value in overrides.items():
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(f"Expected the keys of `overrides` to be module names, globs or module types, but got {key!r}.")
        if value is None or isinstance(value, LayerOverride):
            parsed[key] = value
            continue
        if not isinstance(value, Mapping):
            raise TypeError(f"Expected `overrides[{key!r}]` to be None (stays float) or a mapping, but got {value!r}.")
        unknown = set(value) - set(LayerOverride.__dataclass_fields__)
        if unknown:
            allowed = tuple(LayerOverride.__dataclass_fields__)
            raise ValueError(f"Expected the settings of `overrides[{key!r}]` to be among {allowed}, but got {sorted(map(str, unknown))}.")
        parsed[key] = LayerOverride(**value)
    return parsed


def _parse_fuse(fuse: Sequence[Sequence[str]] | None, flow: FlowName) -> tuple[tuple[str, ...], ...] | None:
    if fuse is None:
        return None
    if flow != "eager":
        raise ValueError(f"Expected argument `fuse` only with flow='eager' (the others find their own groups), but got flow={flow!r}.")
    if isinstance(fuse, str) or not isinstance(fuse, Iterable):
        raise TypeError(f"Expected argument `fuse` to be a list of lists of module names, but got {fuse!r}.")
    groups = []
    for group in fuse:
        if isinstance(group, str) or not all(isinstance(name, str) for name in group):
            raise TypeError(f'Expected each group of `fuse` to be a list of module names such as ["conv1", "bn1"], but got {group!r}.')
        if len(group) < 2:
            raise ValueError(f"Expected each group of `fuse` to name at least two modules, but got {list(group)!r}.")
        groups.append(tuple(group))
    return tuple(groups)
