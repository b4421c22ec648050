"""Switches of fake-quant, observers and BatchNorm statistics, by duck typing: torch.ao's and torchao's modules alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.errors import CalibrationError
from qat_lightning.schedule import Phase


def apply_phase(module: nn.Module, phase: Phase) -> None:
    """Switch fake-quant, observers and BatchNorm statistics of a prepared module.

    Args:
        module: the prepared module, in train or eval mode.
        phase: what is to be on; BatchNorm is frozen or not only in train mode, eval mode freezes it anyway.
    """
    if not phase.observers:
        follow_weights(module)
    for fake_quant in fake_quants(module):
        fake_quant.enable_fake_quant(phase.fake_quant)
        fake_quant.enable_observer(phase.observers)
    if module.training:
        freeze_bn(module, phase.bn_frozen)


def switch_observers_off(module: nn.Module) -> None:
    """Stop observers from learning; fake-quant stays as it is, on weights as the last optimizer step has left them."""
    follow_weights(module)
    for fake_quant in fake_quants(module):
        fake_quant.enable_observer(False)


@contextmanager
def observers_off(module: nn.Module) -> Iterator[None]:
    """Stop observers from learning for the time of the block."""
    enabled = [(fake_quant, fake_quant.observer_enabled.clone()) for fake_quant in fake_quants(module)]
    switch_observers_off(module)
    try:
        yield
    finally:
        for fake_quant, before in enabled:
            fake_quant.observer_enabled.copy_(before)


def freeze_bn(module: nn.Module, frozen: bool) -> None:
    """Let BatchNorm, fused into a convolution or not, use its running statistics and stop updating them, or learn them again."""
    fused: set[int] = set()
    layers: list[Any] = [child for child in module.modules() if hasattr(child, "freeze_bn_stats") and hasattr(child, "bn")]
    for layer in layers:
        layer.freeze_bn_stats() if frozen else layer.update_bn_stats()
        fused.add(id(layer.bn))
    for child in module.modules():
        if isinstance(child, _BatchNorm) and id(child) not in fused:
            child.train(not frozen)


def fake_quants(module: nn.Module) -> Iterator[Any]:
    """Yield the fake-quant modules."""
    for child in module.modules():
        if hasattr(child, "enable_fake_quant") and hasattr(child, "enable_observer"):
            yield child


def measure_weights(module: nn.Module) -> None:
    """Give the fake-quant of every weight the scale of the weight as it is."""
    for fake_quant, weight in _weights(module):
        fake_quant.measure(weight)


def follow_weights(module: nn.Module) -> None:
    """Measure the weights whose observers are on: an optimizer step has changed them since the forward pass that did."""
    for fake_quant, weight in _weights(module):
        if fake_quant.observer_enabled[0]:
            fake_quant.measure(weight)


@contextmanager
def keeping_integers(module: nn.Module) -> Iterator[None]:
    """Let the scales of fused weights follow what the block does to the statistics of BatchNorm.

    A weight scale, frozen or not, keeps its ratio to the largest weight that it is for: per channel, the rounded integers are the same.
    """
    before = [(fake_quant, fake_quant.scale.clone(), _measured(fake_quant, weight)) for fake_quant, weight in _weights(module)]
    yield
    for (fake_quant, scale, largest), (_, weight) in zip(before, _weights(module), strict=True):
        fake_quant.scale.copy_(scale * (_measured(fake_quant, weight) / largest))


def _measured(fake_quant: Any, weight: Tensor) -> Tensor:
    """Return the scale that ``weight`` would be given."""
    own = fake_quant.scale.clone()
    fake_quant.measure(weight)
    measured: Tensor = fake_quant.scale.clone()
    fake_quant.scale.copy_(own)
    return measured


def _weights(module: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """Yield each fake-quant of weights, and what it rounds: of a fused BatchNorm, the weight scaled by it."""
    for layer in module.modules():
        fake_quant, weight = getattr(layer, "weight_fake_quant", None), getattr(layer, "weight", None)
        if hasattr(fake_quant, "measure") and isinstance(weight, Tensor):
            yield fake_quant, weight.detach() * _folded_scale(layer, weight.dim())


def _folded_scale(layer: Any, dims: int) -> Tensor | float:
    norm = getattr(layer, "bn", None)
    if norm is None:
        return 1.0
    # In the order of operations of torch's fused layers, for the same last bit.
    scale: Tensor = norm.weight.detach() / torch.sqrt(norm.running_var + norm.eps)
    return scale.reshape([-1] + [1] * (dims - 1))


def freeze_ranges(module: nn.Module) -> None:
    """Compute scale and zero point of every observer that waits for the end of its calibration."""
    for child in fake_quants(module):
        if hasattr(child, "freeze_range"):
            child.freeze_range()
        elif hasattr(child, "follow_observer"):  # of QAT: its scale follows the observer only while fake-quant is on
            child.follow_observer()


def check_ranges(module: nn.Module, name: str) -> None:
    """Refuse observers that saw nothing, NaN or infinity.

    Args:
        module: a prepared module after training or calibration.
        name: its name, for the message.

    Raises:
        CalibrationError: names the first such observer.
    """
    count, empty, broken = 0, [], []
    for path, child in module.named_modules():
        observer = getattr(child, "activation_post_process", None)
        low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
        if not hasattr(child, "enable_observer") or hasattr(child, "measure") or not isinstance(low, Tensor):
            continue
        assert isinstance(high, Tensor)
        count += 1
        if getattr(child, "saw_no_number", False):
            broken.append(path)
        elif _is_empty(low, high):
            empty += [] if getattr(child, "may_stay_empty", False) else [path]
        elif not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            broken.append(path)
    if broken:
        raise CalibrationError(
            f"{name}: the observer {broken[0]!r} has seen NaN or infinite activations ({len(broken)} such observers). "
            f"Check the data and the float model: run the model in float on the same batches and look for NaN."
        )
    if empty:
        bypassed = " Nothing of it was run: a method other than forward, or a reference kept elsewhere, bypasses the module."
        raise CalibrationError(
            f"{name}: the observer {empty[0]!r} has seen no data ({len(empty)} observers in all), so it has no range. "
            f"Train or calibrate with at least one batch that runs this part of the model, or keep it in float with `overrides`."
            + (bypassed if len(empty) == count else "")
        )


def _is_empty(low: Tensor, high: Tensor) -> bool:
    return low.numel() == 0 or bool(torch.isinf(low).all() and (low > high).all())
