"""Observers of ``torch.ao.quantization`` that keep a histogram and choose a range from it, for eager and fx flow."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver, UniformQuantizationObserverBase

from qat_lightning.histogram import BINS, merge, seen
from qat_lightning.range_search import RangeSearch, entropy_range, least_squares_range, percentile_range


class RangeObserver(UniformQuantizationObserverBase):
    """Keeps minimum, maximum and a histogram of all it has seen, of fixed size, and chooses a range from them.

    Args:
        search: chooses it.
        settings: of torch's observers: value range, dtype and scheme.
    """

    min_val: Tensor
    max_val: Tensor
    histogram: Tensor

    def __init__(self, search: RangeSearch, **settings: Any) -> None:
        super().__init__(**settings)
        self.search = search
        self.register_buffer("min_val", torch.tensor(torch.inf))
        self.register_buffer("max_val", torch.tensor(-torch.inf))
        self.register_buffer("histogram", torch.zeros(BINS, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Watch ``x``, finite values of any shape, none of them for an empty batch; returns it."""
        if x.numel():
            parts = [seen(x)]
            if self.min_val <= self.max_val:
                parts.append((float(self.min_val), float(self.max_val), self.histogram))
            low, high, histogram = merge(parts)
            # In place: state dicts hold these very tensors.
            self.min_val.fill_(low)
            self.max_val.fill_(high)
            self.histogram.copy_(histogram)
        return x

    def calculate_qparams(self, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the range that ``search`` chooses; 1 and 0 where nothing was seen."""
        if self.min_val > self.max_val:
            return torch.ones(1), torch.zeros(1, dtype=torch.int32)
        low, high = self.search(self.histogram, float(self.min_val), float(self.max_val), self.quant_min, self.quant_max)
        scale, zero_point = self._calculate_qparams(self.min_val.new_tensor(low), self.min_val.new_tensor(high))
        return scale, zero_point


ACTIVATION_OBSERVERS: dict[str, Any] = {
    "histogram": partial(RangeObserver, least_squares_range),
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageMinMaxObserver,
    "percentile": partial(RangeObserver, percentile_range),
    "entropy": partial(RangeObserver, entropy_range),
}
