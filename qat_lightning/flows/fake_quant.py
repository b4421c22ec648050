"""Fake-quant and observers without ``torch.ao``, for the pt2e flow: what the names of :mod:`qat_lightning.observers` stand for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.affine import choose_qparams, round_weight, weight_limits, weight_scale
from qat_lightning.flows.clipping import Limits
from qat_lightning.histogram import BINS, merge, seen
from qat_lightning.range_search import RangeSearch, entropy_range, least_squares_range, percentile_range

ACTIVATION_MAX = 255
AVERAGING_CONSTANT = 0.01
"""Weight of a batch in a moving average of minima and maxima, the default of PyTorch's observers."""


def round_activation(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``x`` rounded to the grid of uint8, in its dtype; a range of 7 bits lets outliers use the eighth, as int8 kernels do."""
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero_point, 0, ACTIVATION_MAX).to(x.dtype)


# --- observers ---------------------------------------------------------------------------------------------------------------


class MinMaxObserver(nn.Module):
    """Keeps the minimum and maximum of all that it has seen.

    Args:
        quant_max: largest integer of the range, whose smallest is 0.
    """

    min_val: Tensor
    max_val: Tensor
    quant_min = 0

    def __init__(self, quant_max: int = ACTIVATION_MAX) -> None:
        super().__init__()
        self.quant_max = quant_max
        self.register_buffer("min_val", torch.tensor(torch.inf))
        self.register_buffer("max_val", torch.tensor(-torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        """Watch ``x``, values of any shape; returns it."""
        if x.numel():
            # In place: state dicts hold these very tensors.
            self.watch(*torch.aminmax(x.detach().float()))
        return x

    def watch(self, low: Tensor, high: Tensor) -> None:
        """Take the extremes of a batch in."""
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))

    def range(self) -> Limits:
        """Return the range to cover."""
        return float(self.min_val), float(self.max_val)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point; 1 and 0 where nothing was seen."""
        device = self.min_val.device
        if self.min_val > self.max_val:
            return torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)
        qparams = choose_qparams(*self.range(), self.quant_min, self.quant_max)
        return torch.tensor([qparams.scale], device=device), torch.tensor([qparams.zero_point], dtype=torch.int32, device=device)


class MovingAverageObserver(MinMaxObserver):
    """Keeps the moving average of the minima and maxima of batches."""

    averaging_constant = AVERAGING_CONSTANT

    def watch(self, low: Tensor, high: Tensor) -> None:
        """Take the extremes of a batch in; the first are the average themselves."""
        first = bool(self.min_val > self.max_val)
        self.min_val.copy_(low if first else self.min_val + self.averaging_constant * (low - self.min_val))
        self.max_val.copy_(high if first else self.max_val + self.averaging_constant * (high - self.max_val))


class HistogramObserver(MinMaxObserver):
    """Keeps minimum, maximum and a histogram of all that it has seen, of fixed size, and chooses a range from them.

    Args:
        search: chooses it.
        quant_max: as for :class:`MinMaxObserver`.
    """

    histogram: Tensor

    def __init__(self, search: RangeSearch, quant_max: int = ACTIVATION_MAX) -> None:
        super().__init__(quant_max)
        self.search = search
        self.register_buffer("histogram", torch.zeros(BINS, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Watch ``x``, finite values of any shape; returns it."""
        if x.numel():
            parts = [seen(x)]
            if self.min_val <= self.max_val:
                parts.append((float(self.min_val), float(self.max_val), self.histogram))
            low, high, histogram = merge(parts)
            self.min_val.fill_(low)
            self.max_val.fill_(high)
            self.histogram.copy_(histogram)
        return x

    def range(self) -> Limits:
        """Return the range that ``search`` chooses."""
        return self.search(self.histogram, float(self.min_val), float(self.max_val), self.quant_min, self.quant_max)


OBSERVERS: dict[str, Callable[[int], MinMaxObserver]] = {
    "histogram": lambda quant_max: HistogramObserver(least_squares_range, quant_max),
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": lambda quant_max: HistogramObserver(percentile_range, quant_max),
    "entropy": lambda quant_max: HistogramObserver(entropy_range, quant_max),
}


# --- fake-quant --------------------------------------------------------------------------------------------------------------


class FakeQuantize(nn.Module):
    """What all fake-quants have: switches, scale and zero point in buffers that never grow.

    Args:
        channels: how many scales there are.
    """

    scale: Tensor
    zero_point: Tensor
    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("observer_enabled", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(channels))
        self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switch rounding on or off."""
        self.fake_quant_enabled.fill_(int(enabled))

    def enable_observer(self, enabled: bool = True) -> None:
        """Switch the observer on or off."""
        self.observer_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        """Switch rounding off."""
        self.enable_fake_quant(False)

    def disable_observer(self) -> None:
        """Switch the observer off."""
        self.enable_observer(False)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        return self.scale, self.zero_point


class WeightFakeQuantize(FakeQuantize):
    """Symmetric fake-quant of weights: the scale puts the largest magnitude, of an output channel or the tensor, on 127, with 7 bits on 63.

    Args:
        weight: whose scale it begins with; channels in the first dimension.
        per_channel: one scale per output channel.
        bits: value range, 7 or 8.
    """

    def __init__(self, weight: Tensor, per_channel: bool, bits: int) -> None:
        super().__init__(weight.shape[0] if per_channel else 1)
        self._axis, self.integer_range = 0 if per_channel else None, weight_limits(bits)
        self.to(weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        """Return ``weight`` rounded to the grid, in its dtype."""
        if self.observer_enabled[0]:
            self.measure(weight.detach())
        if not self.fake_quant_enabled[0]:
            return weight
        return round_weight(weight, self.scale, self.zero_point, self._axis, self.integer_range)

    def measure(self, weight: Tensor) -> None:
        """Set the scale for ``weight``."""
        self.scale.copy_(weight_scale(weight, self._axis, self.integer_range[1]))

    def integers(self, weight: Tensor) -> Tensor:
        """Return the int8 integers of ``weight``, in its shape."""
        scale = self.scale.reshape(-1, *[1] * (weight.dim() - 1))
        # As PyTorch's kernels do it: multiplied by the reciprocal.
        return torch.round(weight.detach().float() * (1.0 / scale)).clamp(*self.integer_range).to(torch.int8)


class ActivationFakeQuantize(FakeQuantize):
    """What fake-quants of activations share, uint8 per tensor.

    Args:
        observer: watches the activations.
    """

    limits: Limits | None = None
    """Between which a ReLU or another clip, that the graph has no node for, keeps the activation."""

    def __init__(self, observer: MinMaxObserver) -> None:
        super().__init__()
        self.activation_post_process = observer

    def clip(self, x: Tensor) -> Tensor:
        """Return ``x`` within the limits, if there are any."""
        if self.limits is None:
            return x
        low, high = self.limits
        return torch.relu(x) if (low, high) == (0.0, float("inf")) else x.clamp(low, high)

    def extra_repr(self) -> str:
        """Return what a print of the module shows."""
        return f"limits={self.limits}"


class CalibratedFakeQuantize(ActivationFakeQuantize):
    """Fake-quant whose range is computed once, by ``freeze_range``, after the observer has seen all calibration data."""

    saw_no_number = False
    range_frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, clipped, and rounded to the grid where fake-quant is on."""
        x = self.clip(x)
        if self.observer_enabled[0]:
            self._observe(x.detach().float())
        return round_activation(x, self.scale, self.zero_point) if self.fake_quant_enabled[0] else x

    def _observe(self, x: Tensor) -> None:
        if x.numel() == 0 or torch.stack(torch.aminmax(x)).isfinite().all():
            self.activation_post_process(x)
        else:
            self.saw_no_number = True

    def freeze_range(self) -> None:
        """Compute scale and zero point from what the observer has seen."""
        scale, zero_point = self.activation_post_process.calculate_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.range_frozen = True

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero point."""
        if not self.range_frozen:
            self.freeze_range()
        return self.scale, self.zero_point


class TrainingFakeQuantize(ActivationFakeQuantize):
    """Fake-quant during training: the range follows the batches by a moving average, in float32 whatever the precision."""

    calibration: str | None = None
    """How its range is calibrated before training; None: as those of all others."""

    activation_post_process: MinMaxObserver

    def __init__(self, observer: MinMaxObserver | None = None) -> None:
        super().__init__(MovingAverageObserver() if observer is None else observer)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` clipped and rounded to the grid, in its dtype."""
        x = self.clip(x)
        if self.observer_enabled[0] and x.numel():
            return self._fused(x.float(), AVERAGING_CONSTANT).to(x.dtype)
        return round_activation(x, self.scale, self.zero_point) if self.fake_quant_enabled[0] else x

    def _fused(self, x: Tensor, averaging_constant: float, rounding: Tensor | None = None) -> Tensor:
        observer = self.activation_post_process
        rounded: Tensor = torch.fused_moving_avg_obs_fake_quant(
            x,
            torch.ones_like(self.observer_enabled),
            self.fake_quant_enabled if rounding is None else rounding,
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            averaging_constant,
            observer.quant_min,
            observer.quant_max,
            0,
        )
        return rounded

    def follow_observer(self) -> None:
        """Set scale and zero point for the range that the observer holds, by the formula of the forward pass."""
        # The values given weigh nothing, so that the range stays as it is.
        self._fused(self.activation_post_process.min_val.reshape(1), 0.0, torch.ones_like(self.observer_enabled))

    def freeze_range(self) -> None:
        """Compute scale and zero point from what the observer has seen while fake-quant was off."""
        self.follow_observer()

    def twin(self, observer: str) -> CalibratedFakeQuantize:
        """Return a fake-quant of the same value range that is calibrated by ``observer``, unless a layer's override says otherwise."""
        twin = CalibratedFakeQuantize(OBSERVERS[self.calibration or observer](self.activation_post_process.quant_max))
        twin.limits = self.limits
        return twin.to(self.scale.device)

    def take_range(self, twin: CalibratedFakeQuantize) -> None:
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


def limit_bits(fake_quant: Any, bits: int) -> None:
    """Give the output of ``fake_quant`` fewer bits."""
    if isinstance(fake_quant, ActivationFakeQuantize):
        fake_quant.activation_post_process.quant_max = 2**bits - 1


def choose_observer(fake_quant: Any, observer: str | None) -> None:
    """Have the range of ``fake_quant`` calibrated by the observer of that name; None leaves it as it is."""
    if observer is None:
        return
    if isinstance(fake_quant, TrainingFakeQuantize):
        fake_quant.calibration = observer
    elif isinstance(fake_quant, CalibratedFakeQuantize):
        own = fake_quant.activation_post_process
        fake_quant.activation_post_process = OBSERVERS[observer](own.quant_max).to(own.min_val.device)
