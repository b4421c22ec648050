"""Layers written so that every flow can quantize them."""

from torch import Tensor, nn


class Add(nn.Module):
    """The residual addition as a module: eager mode swaps it for its int8 operation, the fx flow traces through it.

    Args:
        relu: clip the sum at zero, in one operation in int8.
    """

    def __init__(self, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a + b``; both have the same shape."""
        return nn.functional.relu(a + b) if self.relu else a + b
