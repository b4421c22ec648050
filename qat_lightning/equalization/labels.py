"""Labels of channels: those with the same label must be scaled together for a network to compute the same.

Every channel that a layer puts out gets a label. Labels travel through the graph in tensors of the shape of the activations, so that
reshapes, concatenations, splits and channel shuffles move them as they move values. Where two values are added, their labels become one.
What reaches an operation that does not commute with a positive scale is pinned: it keeps scale 1.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

# What a padded zero carries: it may have any scale.
NOTHING = 0
# What cannot be scaled.
PINNED = 1


@dataclass
class Layer:
    """A layer whose weight the channels of a class scale.

    Args:
        module: convolution, linear layer or BatchNorm.
        labels: of its output channels, or of its input channels.
        norm: the BatchNorm behind a consumer that nothing else reads, or None.
        source: the layer in front of a BatchNorm that nothing else reads, or None.
    """

    module: Any
    labels: Tensor
    norm: Any = None
    source: Any = None


@dataclass
class Site:
    """A value of the graph whose range matters.

    Args:
        node: that reads it.
        value: the node it comes from.
        axis: along which its channels lie.
        labels: of the channels.
        kind: ``"read"`` by a layer or an addition, so that it is quantized; ``"clip"`` and ``"rectify"`` in front of an activation.
        bounds: of the clip.
    """

    node: fx.Node
    value: fx.Node
    axis: int
    labels: Tensor
    kind: str
    bounds: tuple[float, float] = (-torch.inf, torch.inf)
    low: Tensor = field(default_factory=lambda: torch.tensor(torch.inf))
    high: Tensor = field(default_factory=lambda: torch.tensor(-torch.inf))

    def observe(self, value: Tensor) -> None:
        """Widen the range of each channel to that of ``value``."""
        channels = value.detach().float().movedim(self.axis, 0)
        channels = channels.reshape(len(channels), -1)
        self.low = torch.minimum(self.low, channels.amin(1).cpu())
        self.high = torch.maximum(self.high, channels.amax(1).cpu())


class Classes:
    """Labels that have become one, as a union-find forest."""

    def __init__(self) -> None:
        self._parents = [NOTHING, PINNED]
        self.unshiftable: set[int] = set()

    def new(self, count: int) -> Tensor:
        """Return as many new labels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count, dtype=torch.float64)

    def find(self, label: int) -> int:
        """Return the label that stands for the class."""
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def join(self, one: Tensor, other: Tensor) -> None:
        """Make one class of the labels at the same place of two tensors; zeros fit everything."""
        shape = np.broadcast_shapes(one.shape, other.shape)
        one, other = _narrow(one.broadcast_to(shape), other.broadcast_to(shape))
        differ = (one != other) & (one != NOTHING) & (other != NOTHING)
        for first, second in set(zip(one[differ].long().tolist(), other[differ].long().tolist(), strict=True)):
            low, high = sorted((self.find(first), self.find(second)))
            self._parents[high] = low  # the smaller label stands for the class, so that pinned stays pinned

    def pin(self, labels: Tensor) -> None:
        """Let the labels keep scale 1."""
        self.join(labels, torch.tensor(float(PINNED), dtype=torch.float64))

    def forbid_shift(self, labels: Tensor) -> None:
        """Let no constant be taken out of these channels."""
        self.unshiftable.update(map(int, np.unique(_narrow(labels)[0].numpy())))

    def vector(self, labels: Tensor, axis: int) -> Tensor:
        """Return one label for each place along an axis; those that differ along the other axes become one class."""
        rows = _narrow(labels, keep=axis)[0].movedim(axis, 0)
        rows = rows.reshape(len(rows), -1)
        high = rows.amax(1)
        low = torch.where(rows == NOTHING, high.unsqueeze(1), rows).amin(1)
        for row in (high != low).nonzero().flatten().tolist():
            self.join(rows[row], high[row])
        return high

    def axis(self, labels: Tensor) -> int:
        """Return the axis along which the labels differ; the last one of several."""
        rows = _narrow(labels)[0]
        return next((axis for axis in reversed(range(rows.dim())) if bool((rows != rows.narrow(axis, 0, 1)).any())), rows.dim() - 1)

    def indices(self, labels: Iterable[Tensor]) -> tuple[list[Tensor], dict[int, int]]:
        """Number the classes that are free from 0; returns the number of each label, -1 for the others, and the numbers by root."""
        numbers: dict[int, int] = {}
        found = []
        for tensor in labels:
            roots = [self.find(label) for label in tensor.long().tolist()]
            found.append(torch.tensor([-1 if root in (NOTHING, PINNED) else numbers.setdefault(root, len(numbers)) for root in roots]))
        return found, numbers


def _narrow(*tensors: Tensor, keep: int | None = None) -> tuple[Tensor, ...]:
    """Return tensors of one shape without the repetitions that all have along an axis."""
    kept = None if keep is None else keep % max(tensors[0].dim(), 1)
    for axis in range(tensors[0].dim()):
        if axis != kept and tensors[0].shape[axis] > 1 and all(tensor.stride(axis) == 0 for tensor in tensors):
            tensors = tuple(tensor.narrow(axis, 0, 1) for tensor in tensors)
    return tensors


def spread(vector: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """Return labels along an axis as a tensor of that shape."""
    axis %= len(shape)
    return vector.reshape([-1 if index == axis else 1 for index in range(len(shape))]).expand(shape)
