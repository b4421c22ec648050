"""The parity gate: what to do about an int8 model that computes something else than what was trained."""

import warnings
from collections.abc import Mapping
from typing import Literal, TypeAlias

from torch import nn

from qat_lightning.backend import LayerShape, kernel_error
from qat_lightning.errors import ParityError
from qat_lightning.plan import Plan
from qat_lightning.report import LayerParity, Report

ParityAction: TypeAlias = Literal["error", "warn", "off"]
PARITY_ACTIONS: tuple[ParityAction, ...] = ("error", "warn", "off")


def check_parity(report: Report, plans: Mapping[str, Plan], floats: Mapping[str, nn.Module], action: ParityAction) -> None:
    """Refuse, or warn of, a model with a layer more than one quantization step away from its simulation.

    Args:
        report: of the conversion.
        plans: of its targets.
        floats: the targets before quantization, to try their kernels; may lack some.
        action: what to do.

    Raises:
        ParityError: names the layer, the difference and the likely cause.
    """
    failed = [layer for layer in report.parity or () if layer.max_steps > 1]
    if not failed or action == "off":
        return
    worst = max(failed, key=lambda layer: layer.max_steps)
    others = f" ({len(failed)} of {len(report.parity or ())} layers differ)" if len(failed) > 1 else ""
    message = (
        f"int8 and fake-quant differ by {worst.max_steps} quantization steps at {worst.layer!r}, where rounding explains 1{others}. "
        f"{_likely_cause(worst, plans, floats)}"
    )
    if action == "error":
        raise ParityError(f"{message} The int8 model is made nevertheless: `quantized_module`; parity='warn' takes it as it is.")
    warnings.warn(message, stacklevel=2)


def _likely_cause(failed: LayerParity, plans: Mapping[str, Plan], floats: Mapping[str, nn.Module]) -> str:
    for target, plan in plans.items():
        layer = failed.layer.removeprefix(target).removeprefix(".")
        if layer not in plan.layers or target not in floats:
            continue
        kernel, per_channel = plan.layers[layer].kernel, plan.layers[layer].per_channel
        shape = LayerShape.of(floats[target].get_submodule(layer))
        error = None if shape is None else kernel_error(kernel, shape, per_channel)
        if error is not None and error > 1:
            return (
                f"Likely cause: the {kernel.engine} kernel of this layer saturates with {kernel.activation_bits}-bit inputs "
                f"(off by {error} steps at extreme values). Leave `activation_bits` and `engine` to the probe, "
                f'or set overrides={{"{layer}": {{"engine": "qnnpack"}}}}.'
            )
    return (
        "Likely cause: an operation whose int8 kernel computes by another formula than its simulation. "
        f'Keep it in float with overrides={{"{failed.layer}": None}}, or try the other flow.'
    )
