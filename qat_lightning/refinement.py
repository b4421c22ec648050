"""Refinement after calibration: what the layers compute in int8 is brought near to what they computed in float.

Layers are visited in the order in which they run. Each gets what the layers in front of it, refined already, give in int8, so that it
makes up for their errors, too. Inputs suffice; labels are not needed.
"""

from collections.abc import Sequence

from torch import nn

from qat_lightning.adaround import round_weights
from qat_lightning.bias_correction import correct_bias
from qat_lightning.flows import get_flow
from qat_lightning.layerwise import LayerCase
from qat_lightning.plan import Call, Plan
from qat_lightning.recipe import AdaRound

SAMPLES = 256
"""How many calibration samples a refinement of a LightningModule gets; more changed nothing that was measured."""


def refine_layers(
    prepared: nn.Module, plan: Plan, calls: Sequence[Call], bias_correction: bool, adaround: AdaRound | None, progress: bool
) -> None:
    """Refine the layers of a module that post-training quantization has calibrated; its weights and biases change.

    Args:
        prepared: in eval mode, on the CPU.
        plan: by which it was prepared.
        calls: a call of the module for each batch.
        bias_correction: see :mod:`qat_lightning.bias_correction`.
        adaround: see :mod:`qat_lightning.adaround`; None rounds weights to nearest.
        progress: show a progress bar.
    """

    def visit(case: LayerCase) -> None:
        if adaround is not None:
            round_weights(case, adaround)
        if bias_correction:
            correct_bias(case)

    if calls and (bias_correction or adaround is not None):
        get_flow(plan.flow).walk(prepared, calls, visit, progress)
