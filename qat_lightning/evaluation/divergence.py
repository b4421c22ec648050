"""How far the outputs of two models are apart, without labels.

The relative squared error of an output is the energy of its error over the energy of the output itself, over all batches::

    divergence = sum (y_hat - y)^2 / sum y^2        SQNR = 10 log10 (1 / divergence)  in dB

the signal-to-quantization-noise ratio of Lin, Talathi, Annapureddy 2016 (arXiv:1511.06393, section 3). Where a model returns several
tensors, the divergence is the mean over them: any structure of tensors has one.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_lightning.errors import CalibrationError, ConfigurationError

Outputs: TypeAlias = list[list[Tensor]]


class Energy:
    """Energy of a signal and of the noise on it, summed in double precision over as many tensors as are added."""

    def __init__(self) -> None:
        self.signal = 0.0
        self.noise = 0.0

    def add(self, reference: Tensor, value: Tensor) -> None:
        """Add a tensor without and with noise, of the same shape."""
        self.signal += float(reference.double().square().sum())
        self.noise += float((value.double() - reference.double()).square().sum())

    @property
    def ratio(self) -> float:
        """Noise over signal; 0 without noise."""
        if self.noise == 0:
            return 0.0
        return self.noise / self.signal if self.signal > 0 else math.inf

    @property
    def sqnr_db(self) -> float:
        """Signal over noise in decibel; infinite without noise."""
        if self.ratio == 0:
            return math.inf
        return -10 * math.log10(self.ratio) if math.isfinite(self.ratio) else -math.inf


def divergence(reference: Outputs, outputs: Outputs) -> float:
    """Return the relative squared error of ``outputs``, the mean over the tensors that a batch gives.

    Args:
        reference: per batch, the tensors that the float model returned.
        outputs: the same of the other model.
    """
    energies: dict[int, Energy] = {}
    for expected, found in zip(reference, outputs, strict=True):
        for index, (one, other) in enumerate(zip(expected, found, strict=True)):
            energies.setdefault(index, Energy()).add(one, other)
    return sum(energy.ratio for energy in energies.values()) / len(energies)


def outputs_of(targets: Mapping[str, nn.Module], batches: Iterable[Any], run: Callable[[Any], Any]) -> Outputs:
    """Return what the targets return while ``run`` runs each batch: the floating-point tensors, in order of the calls.

    Args:
        targets: modules by name.
        batches: whatever ``run`` takes.
        run: runs one batch through the targets.

    Raises:
        ConfigurationError: they return no floating-point tensor.
        CalibrationError: they return NaN or infinity.
    """
    outputs: Outputs = []
    for batch in batches:
        found: list[Tensor] = []
        with torch.inference_mode(), _hooked(targets.values(), found):
            run(batch)
        outputs.append(found)
    if not all(outputs):
        raise ConfigurationError(
            f"{sorted(targets) if any(targets) else 'The module'} returns no floating-point tensor, so that outputs cannot be compared: "
            f"quantize the part that computes scores, not what chooses among them, or give a metric."
        )
    if not all(torch.isfinite(leaf).all() for found in outputs for leaf in found):
        raise CalibrationError("The outputs hold NaN or infinite values and cannot be compared: check the data and the float model.")
    return outputs


@contextmanager
def _hooked(modules: Iterable[nn.Module], found: list[Tensor]) -> Iterator[None]:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        leaves: Sequence[Any] = pytree.tree_leaves(output)
        found.extend(leaf.detach().float().clone() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
