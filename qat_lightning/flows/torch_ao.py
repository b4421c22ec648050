"""What the eager and fx flows share of ``torch.ao.quantization``: fake-quant modules, qconfigs and the packing of int8 weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import (
    FakeQuantize,
    FakeQuantizeBase,
    FusedMovingAvgObsFakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    default_dynamic_qconfig,
    per_channel_dynamic_qconfig,
)

from qat_lightning.affine import QParams, round_weight, weight_limits, weight_scale
from qat_lightning.backend import engine
from qat_lightning.deprecation import quiet
from qat_lightning.flows.clipping import Limits
from qat_lightning.flows.range_observers import ACTIVATION_OBSERVERS
from qat_lightning.flows.sharing import original
from qat_lightning.observers import fake_quants, measure_weights
from qat_lightning.parity import Reference
from qat_lightning.plan import LayerPlan, Plan
from qat_lightning.report import LayerReport
from qat_lightning.tensors import with_grid

# Torch keeps the scale of their int8 forms, and the weight of PReLU's, out of the state dict, and PReLU's kernel wants other weights.
STATELESS_TYPES: tuple[type[nn.Module], ...] = (nn.PReLU, nn.ELU)
KERNEL_PACKAGES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def _round(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``x`` rounded to the grid as int8 kernels do it: even one whose range has 7 bits lets outliers use the eighth."""
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, 0, 255).to(x.dtype)


class LimitedFakeQuantize:
    """What the fake-quants of activations share: the limits of a clip that saturation makes, see :mod:`qat_lightning.flows.clipping`."""

    limits: Limits | None = None

    def clip(self, x: Tensor) -> Tensor:
        """Return ``x`` within the limits, if there are any."""
        return x if self.limits is None else x.clamp(*self.limits)


class TrainingFakeQuantize(LimitedFakeQuantize, FusedMovingAvgObsFakeQuantize):
    """Fake-quant of activations during training: torch's fused module, computed in float32 whatever the precision.

    The qparams in use are those the forward pass rounded with. Torch computes them a second time for the conversion, by a formula
    that differs in the last bit, enough to move a value by a step.
    """

    calibration: str | None = None
    """How its range is calibrated before training; None: as those of all others."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid, in the dtype of ``x``; integers pass through."""
        if not x.is_floating_point():
            return x
        if self.observer_enabled[0]:
            return super().forward(self.clip(x.float())).to(x.dtype)
        return _round(x, self.scale, self.zero_point) if self.fake_quant_enabled[0] else self.clip(x)

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        if self.fake_quant_enabled[0]:
            return self.scale, self.zero_point
        return super().calculate_qparams()

    def twin(self, observer: str) -> "CalibratedFakeQuantize":
        """Return a fake-quant of the same value range that is calibrated by ``observer``, unless a layer's override says otherwise."""
        observer = self.calibration or observer
        own = self.activation_post_process
        settings = {"quant_min": own.quant_min, "quant_max": own.quant_max, "dtype": self.dtype, "qscheme": self.qscheme}
        twin: CalibratedFakeQuantize = _constructor(CalibratedFakeQuantize, observer=ACTIVATION_OBSERVERS[observer], **settings)()
        twin.limits = self.limits
        return twin.to(self.scale.device)

    def take_range(self, twin: "CalibratedFakeQuantize") -> None:
        """Take over the range of a calibrated twin; one that has seen nothing has none."""
        observer = twin.activation_post_process
        if observer.min_val > observer.max_val:
            return
        twin.freeze_range()
        self.scale.copy_(twin.scale)
        self.zero_point.copy_(twin.zero_point)
        low = (observer.quant_min - twin.zero_point) * twin.scale
        high = (observer.quant_max - twin.zero_point) * twin.scale
        self.activation_post_process.min_val.copy_(low.squeeze())
        self.activation_post_process.max_val.copy_(high.squeeze())

    def freeze_range(self) -> None:
        """Compute scale and zero point from what the observer has seen while fake-quant was off."""
        self.follow_observer()

    def follow_observer(self) -> None:
        """Set scale and zero point for the range that the observer holds, by the formula of the forward pass."""
        observer, on = self.activation_post_process, torch.ones_like(self.observer_enabled)
        torch.fused_moving_avg_obs_fake_quant(
            observer.min_val.reshape(1),
            on,
            on,
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            0.0,  # the weight of the values given, so that the range stays as it is
            observer.quant_min,
            observer.quant_max,
            self.ch_axis,
        )


class WeightFakeQuantize(FakeQuantize):
    """Symmetric fake-quant of weights: the scale puts the largest magnitude, of a channel or of the tensor, on 127, with 7 bits on 63.

    Torch's fused module follows weights by a moving average, which lags behind, and gives a channel whose weights all have one sign
    (frequent in depthwise layers) a zero point of -128, which the conversion to int8 then replaces by 0.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` rounded to the grid, in the dtype of ``x``."""
        if self.observer_enabled[0]:
            self.measure(x.detach())
        if not self.fake_quant_enabled[0]:
            return x
        return round_weight(x, self.scale, self.zero_point, self._axis, self.integer_range)

    def measure(self, weight: Tensor) -> None:
        """Set the scale for ``weight``, of any shape with channels at ``ch_axis``."""
        scale = weight_scale(weight, self._axis, self.integer_range[1])
        if self.scale.shape == scale.shape:
            self.scale.copy_(scale)  # in place: averages and state dicts hold the tensor
        else:
            self.scale, self.zero_point = scale, torch.zeros_like(scale, dtype=torch.int32)

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        return self.scale, self.zero_point

    @property
    def integer_range(self) -> tuple[int, int]:
        """The smallest and the largest integer."""
        return self.activation_post_process.quant_min, self.activation_post_process.quant_max

    @property
    def _axis(self) -> int | None:
        return self.ch_axis if self.is_per_channel else None


class CalibratedFakeQuantize(LimitedFakeQuantize, FakeQuantize):
    """Fake-quant of activations whose range is computed once, by ``freeze_range``, after the observer has seen all calibration data.

    Torch's own searches the best range anew in every forward pass, which takes most of the time with a histogram.
    """

    range_frozen = False
    saw_no_number = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, rounded to the grid where fake-quant is on; integers pass through."""
        if not x.is_floating_point():
            return x
        if self.observer_enabled[0]:
            self._observe(self.clip(x.detach().float()))
        if not self.fake_quant_enabled[0]:
            return self.clip(x)
        return _round(x, self.scale, self.zero_point)

    def _observe(self, x: Tensor) -> None:
        # The extremes are NaN where a value is, and cost a tenth of looking at each.
        if x.numel() == 0 or torch.stack(torch.aminmax(x)).isfinite().all():
            self.activation_post_process(x)
        else:
            self.saw_no_number = True

    def freeze_range(self) -> None:
        """Compute scale and zero point from what the observer has seen."""
        scale, zero_point = self.activation_post_process.calculate_qparams()
        self.scale = scale.float().reshape(-1)
        self.zero_point = zero_point.to(torch.int32).reshape(-1)
        self.range_frozen = True

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        if not self.range_frozen:
            self.freeze_range()
        return self.scale, self.zero_point


class FollowingFakeQuantize(FakeQuantizeBase):
    """Takes the place of fake-quant behind an operation that moves no integer in int8: dropout in evaluation, a product with a number.

    Its output has the integers of its input, on the same or on a scaled grid. A range of its own, which training gives it in torch,
    would round in the simulation what int8 does not round.

    Args:
        source: the fake-quant in front of the operation.
        factor: the number, not 0.
    """

    def __init__(self, source: Any, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        # In a list, so that it is not registered as a submodule a second time.
        self.sources = [source]
        self.dtype, self.qscheme, self.ch_axis, self.is_dynamic = source.dtype, source.qscheme, source.ch_axis, False
        self.quant_min, self.quant_max = source.quant_min, source.quant_max

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the source, for integers that a negative factor has mirrored."""
        scale, zero_point = self.sources[0].calculate_qparams()
        return scale * abs(self.factor), zero_point if self.factor > 0 else 255 - zero_point


def _constructor(fake_quant: Any, **settings: Any) -> Any:
    return fake_quant.with_args(**settings)


def activation_fake_quant(plan: Plan) -> Any:
    """Return the constructor of the fake-quant of activations, uint8 with full range."""
    settings = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8, "qscheme": torch.per_tensor_affine}
    if plan.observer is None:
        return _constructor(TrainingFakeQuantize, observer=MovingAverageMinMaxObserver, **settings)
    return _constructor(CalibratedFakeQuantize, observer=ACTIVATION_OBSERVERS[plan.observer], **settings)


def weight_fake_quant(per_channel: bool, bits: int) -> Any:
    """Return the constructor of the fake-quant of weights, int8 and symmetric."""
    low, high = weight_limits(bits)
    if per_channel:
        return _constructor(
            WeightFakeQuantize,
            observer=PerChannelMinMaxObserver,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
            quant_min=low,
            quant_max=high,
        )
    settings = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric, "quant_min": low, "quant_max": high}
    return _constructor(WeightFakeQuantize, observer=MinMaxObserver, **settings)


def static_qconfig(plan: Plan, per_channel: bool = True, weight_bits: int = 8) -> QConfig:
    """Return the qconfig of a layer, or of what has no weight."""
    return QConfig(activation=activation_fake_quant(plan), weight=weight_fake_quant(per_channel, weight_bits))


def dynamic_qconfig(plan: LayerPlan) -> QConfig:
    """Return the qconfig of a layer that is quantized dynamically."""
    return per_channel_dynamic_qconfig if plan.per_channel else default_dynamic_qconfig


def initialize(prepared: nn.Module) -> None:
    """Give every weight its scale, so that no buffer grows later, and switch everything off."""
    measure_weights(prepared)
    for fake_quant in fake_quants(prepared):
        fake_quant.disable_observer()
        fake_quant.disable_fake_quant()


def grid_of(fake_quant: Any) -> tuple[float, int]:
    """Return scale and zero point of a fake-quant of activations."""
    scale, zero_point = fake_quant.calculate_qparams()
    return float(scale.flatten()[0]), int(zero_point.flatten()[0])


def reference_of(fake_quant: Any, output: Tensor) -> Reference:
    """Return what an activation fake-quant gave, with the grid it lies on."""
    qparams = QParams(*grid_of(fake_quant), q_min=0, q_max=255)
    return Reference(output.detach().float().clone(), qparams)  # an activation behind it may work in place


def planned_layer(plan: Plan, name: str) -> LayerPlan | None:
    """Return the plan of the layer, also where the module has been given a parent or is the copy for a second call."""
    own = original(name).removeprefix("wrapped").removeprefix(".")
    return plan.layers.get(name) or plan.layers.get(own)


def pack(int8: nn.Module, plan: Plan) -> None:
    """Pack the weights of each layer, within their value range, with the engine that its plan names.

    See :class:`qat_lightning.flows.base.Flow`.
    """
    for name, layer in kernel_modules(int8):
        planned = planned_layer(plan, name)
        with quiet(), engine(planned.kernel.engine if planned else plan.backend):
            if hasattr(layer, "_all_weight_values"):
                layer.set_weight_bias(_recurrent_weights(layer))
            else:
                weight, bias = layer._weight_bias()
                layer.set_weight_bias(_limited(weight, planned.kernel.weight_bits) if planned else weight, bias)


def _limited(weight: Tensor, bits: int) -> Tensor:
    """Return a quantized weight whose integers have no more bits: torch's conversion saturates at eight."""
    low, high = weight_limits(bits)
    integers = weight.int_repr()
    limited = integers.clamp(low, high)
    return weight if torch.equal(integers, limited) else with_grid(weight, limited)


def portable_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict with tensors alone; see :class:`qat_lightning.flows.base.Flow`."""
    state = model.state_dict()  # changed in place: a copy would lose the versions that torch attaches to it
    for name, layer in _recurrent_modules(model):
        for key in _packed_names(state, name):
            del state[key]
        state.update({f"{name}.{key}": tensor for key, tensor in _recurrent_weights(layer).items()})
    return state


def load_portable_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Load what :func:`portable_state` returned, which is used up; see :class:`qat_lightning.flows.base.Flow`."""
    for name, layer in _recurrent_modules(model):
        layer.set_weight_bias({key: state.pop(f"{name}.{key}") for key in _recurrent_weights(layer)})
        own = model.state_dict()
        state.update({key: own[key] for key in _packed_names(own, name)})
    model.load_state_dict(state)


def _recurrent_weights(layer: Any) -> dict[str, Tensor]:
    """Return weights and biases in one mapping, as ``set_weight_bias`` takes them; torch gives them in two."""
    weights = layer._weight_bias()
    return {**weights["weight"], **weights["bias"]}


def _packed_names(state: dict[str, Any], layer: str) -> list[str]:
    return [key for key in state if key.startswith(f"{layer}._all_weight_values.")]


def _recurrent_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers whose packed weights torch keeps in its state dict as objects, which only a pickle could hold."""
    for name, layer in kernel_modules(model):
        if hasattr(layer, "_all_weight_values"):
            yield name, layer


def kernel_modules(int8: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that hold packed int8 weights."""
    for name, child in int8.named_modules():
        if type(child).__module__.startswith(KERNEL_PACKAGES) and _has_int8_weight(child):
            yield name, child


def layer_reports(int8: nn.Module, plan: Plan) -> Iterator[LayerReport]:
    """Yield how each module with packed weights runs."""
    for name, layer in kernel_modules(int8):
        planned = planned_layer(plan, name)
        scale, zero_point = getattr(layer, "scale", None), getattr(layer, "zero_point", None)
        yield LayerReport(
            layer=name,
            engine=planned.kernel.engine if planned else plan.backend,
            activation_bits=planned.kernel.activation_bits if planned else 8,
            weight_bits=planned.kernel.weight_bits if planned else 8,
            per_channel=planned.per_channel if planned else True,
            scale=None if scale is None or plan.recipe == "dynamic" else float(scale),
            zero_point=None if zero_point is None or plan.recipe == "dynamic" else int(zero_point),
        )


def limit_activation(fake_quant: nn.Module, bits: int) -> None:
    """Give the output of ``fake_quant`` fewer bits, for a kernel that saturates with all eight."""
    if isinstance(fake_quant, TrainingFakeQuantize | CalibratedFakeQuantize):
        fake_quant.activation_post_process.quant_max = 2**bits - 1


def choose_observer(fake_quant: Any, observer: str | None) -> None:
    """Have the range of ``fake_quant`` calibrated by the observer of that name; None leaves it as it is."""
    if observer is None:
        return
    if isinstance(fake_quant, TrainingFakeQuantize):
        fake_quant.calibration = observer
    elif isinstance(fake_quant, CalibratedFakeQuantize):
        own: Any = fake_quant.activation_post_process
        settings = {"quant_min": own.quant_min, "quant_max": own.quant_max, "dtype": fake_quant.dtype, "qscheme": fake_quant.qscheme}
        fake_quant.activation_post_process = ACTIVATION_OBSERVERS[observer](**settings).to(own.min_val.device)


def _has_int8_weight(module: nn.Module) -> bool:
    # The packed parameters of a linear layer are a module of their own, without ``weight``.
    return (hasattr(module, "_weight_bias") and hasattr(module, "weight")) or hasattr(module, "_all_weight_values")
