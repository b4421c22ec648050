"""Empirical bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2)."""

import torch

from qat_lightning.layerwise import LayerCase, bias_of, channel_axis, pre_activation


def correct_bias(case: LayerCase) -> None:
    """Shift the bias by the mean error of each output channel, measured in front of the activation.

    Rounding shifts the mean of what a layer gives, most of all in depthwise layers with few weights per channel; the layers behind
    would add these shifts up. A layer without a bias is left as it is.
    """
    bias = bias_of(case.layer)
    if bias is None:
        return
    total, count = torch.zeros_like(bias, dtype=torch.float64), 0
    for x, float_x in zip(case.inputs, case.float_inputs, strict=True):
        error = pre_activation(case.twin, float_x) - pre_activation(case.layer, x)
        by_channel = error.movedim(channel_axis(case.layer), 0).flatten(1)
        total += by_channel.double().sum(1)
        count += by_channel.shape[1]
    if count:
        bias.data += (total / count).to(bias)
