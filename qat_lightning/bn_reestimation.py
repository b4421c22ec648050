"""BatchNorm re-estimation: running statistics measured anew, over all batches alike.

What BatchNorm has learnt as running statistics is an average of the last training batches, while weights and rounding were still moving;
in quantization-aware training that costs accuracy where channels are few (Nagel et al. 2022, arXiv:2203.11086, section 5.1). Measured
again over many batches with fixed weights, as in precise BatchNorm (Wu and Johnson 2021, arXiv:2105.07576), they fit what int8 computes.
Post-training quantization folds BatchNorm into the layers: there bias correction plays this part, or re-estimate the float module before.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.errors import CalibrationError
from qat_lightning.observers import measure_weights, switch_observers_off


def reestimate(modules: Sequence[nn.Module], batches: Iterable[Any], step: Callable[[Any], Any]) -> None:
    """Set the running statistics of every BatchNorm to mean and variance of its inputs; nothing else changes.

    While it is measured, BatchNorm normalises with each batch's own statistics, as in training.

    Args:
        modules: float, or prepared for QAT, with fake-quant as it is; without BatchNorm nothing happens.
        batches: whatever ``step`` takes.
        step: runs one batch through the modules.

    Raises:
        CalibrationError: no batch.
    """
    norms = [norm for module in modules for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.running_mean is not None]
    if not norms:
        return
    for module in modules:
        switch_observers_off(module)
    moments = [_Moments() for _ in norms]
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _measuring(norms, moments):
        count = 0
        for batch in batches:
            step(batch)
            count += 1
    if not count:
        raise CalibrationError("BatchNorm re-estimation got no batch: give it at least one of the training data.")
    for norm, moment in zip(norms, moments, strict=True):
        moment.put(norm)
    for module in modules:
        measure_weights(module)


class _Moments:
    """Sums over all that one BatchNorm was given, by channel."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        by_channel = args[0].detach().movedim(1, 0).flatten(1).double() if args[0].dim() > 1 else args[0].double().unsqueeze(1)
        self.count += by_channel.shape[1]
        self.sum = self.sum + by_channel.sum(1)
        self.squares = self.squares + by_channel.square().sum(1)

    def put(self, norm: Any) -> None:
        """Set the running statistics; those of a BatchNorm that saw less than two values stay."""
        if self.count < 2:
            return
        mean = self.sum / self.count
        variance = (self.squares / self.count - mean**2).clamp(min=0) * (self.count / (self.count - 1))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


@contextmanager
def _measuring(norms: Sequence[Any], moments: Sequence[_Moments]) -> Iterator[None]:
    """Let BatchNorm use the statistics of batches, with momentum 0, by which its running ones stay, and watch its inputs."""
    before = [(norm.training, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    handles = [norm.register_forward_pre_hook(moment.add) for norm, moment in zip(norms, moments, strict=True)]
    for norm in norms:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, (training, momentum, tracked) in zip(norms, before, strict=True):
            norm.training, norm.momentum = training, momentum
            norm.num_batches_tracked.copy_(tracked)
