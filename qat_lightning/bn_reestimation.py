"""BatchNorm re-estimation: running statistics measured anew, over all batches alike.

What BatchNorm has learnt as running statistics is an average of the last training batches, while weights and rounding were still moving;
in quantization-aware training that costs accuracy where channels are few (Nagel et al. 2022, arXiv:2203.11086, section 5.1). Measured
again over many batches with fixed weights, as in precise BatchNorm (Wu and Johnson 2021, arXiv:2105.07576), they fit what int8 computes.
A network that has trained on after BatchNorm was frozen has learnt to live with the old ones. Post-training quantization folds BatchNorm
into the layers: there bias correction plays this part, or re-estimate the float module before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.calibration import refuse_nan
from qat_lightning.errors import CalibrationError
from qat_lightning.observers import keeping_integers, observers_off


def tracked_norms(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return by full name the BatchNorm layers with running statistics, fused ones included."""
    named = (pair for prefix, module in modules.items() for pair in module.named_modules(prefix=prefix))
    return {name: child for name, child in named if isinstance(child, _BatchNorm) and child.running_mean is not None}


def reestimate(modules: Mapping[str, nn.Module], batches: Iterable[Any], step: Callable[[Any], Any]) -> int:
    """Set the running statistics of every BatchNorm to mean and unbiased variance of its inputs in all batches.

    While it is measured, BatchNorm normalises with each batch's own statistics, as in training; all else is in eval mode, so that
    dropout does not add to the variance. The scales of fused weights move with the weights that they are of, to the same integers.

    Args:
        modules: by name, in eval mode, float, or prepared for QAT, with fake-quant as it is; without BatchNorm nothing happens.
        batches: whatever ``step`` takes; read once, none is kept.
        step: runs one batch through the modules.

    Returns:
        how many batches were read; with none the statistics stay.

    Raises:
        CalibrationError: NaN or infinite values, or a batch with a single value per channel; the statistics stay.
    """
    norms = tracked_norms(modules)
    if not norms:
        return 0
    count, moments = 0, {name: _Moments() for name in norms}
    with torch.no_grad(), torch.random.fork_rng(devices=[]), ExitStack() as switches:
        for module in modules.values():
            switches.enter_context(observers_off(module))
        with _measuring(norms, moments):
            for batch in batches:
                refuse_nan(batch, count)
                step(batch)
                count += 1
        for name, moment in moments.items():
            moment.check(name)
        for module in modules.values():
            switches.enter_context(keeping_integers(module))
        for name, moment in moments.items():
            moment.put(norms[name])
    return count


class _Moments:
    """Mean and squared deviations of all that one BatchNorm was given, by channel (Chan et al. 1979: no difference of large sums)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self.deviations = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Add values of shape [channels, n]."""
        count, mean = values.shape[1], values.mean(1)
        shift, total = mean - self.mean.to(mean), self.count + count
        self.deviations = (values - mean[:, None]).square().sum(1) + self.deviations.to(mean) + shift**2 * (self.count * count / total)
        self.mean = self.mean.to(mean) + shift * (count / total)
        self.count = total

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        if not torch.isfinite(self.deviations).all():
            raise CalibrationError(
                f"BatchNorm {name!r} was given NaN or infinite values, so its statistics cannot be measured. "
                f"Run the model in float on the same batches and look for NaN."
            )

    def put(self, norm: Any) -> None:
        """Set the running statistics; those of a BatchNorm that nothing has run stay."""
        if self.count:
            norm.running_mean.copy_(self.mean)
            norm.running_var.copy_(self.deviations / (self.count - 1))


@contextmanager
def _measuring(norms: Mapping[str, Any], moments: Mapping[str, _Moments]) -> Iterator[None]:
    """Let BatchNorm use the statistics of batches, leave its running ones alone, and watch its inputs."""

    def watch(name: str, norm: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        values = (x if x.dim() > 1 else x[None]).movedim(1, 0).flatten(1).double()
        if values.shape[1] < 2:
            raise CalibrationError(
                f"BatchNorm {name!r} was given a single value per channel, shape {tuple(x.shape)}, which has no variance: "
                f"re-estimate with batches of at least two samples."
            )
        moments[name].add(values)

    before = {name: (norm.training, norm.track_running_stats) for name, norm in norms.items()}
    handles = [norm.register_forward_pre_hook(partial(watch, name), with_kwargs=True) for name, norm in norms.items()]
    for norm in norms.values():
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, norm in norms.items():
            norm.training, norm.track_running_stats = before[name]
