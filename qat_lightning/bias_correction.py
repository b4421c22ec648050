"""Empirical bias correction (Nagel et al. 2019, arXiv:1906.04721, section 4.2)."""

import torch

from qat_lightning.layerwise import LayerCase, channel_axis, linear_part


def correct_bias(case: LayerCase) -> None:
    """Shift the bias by the mean error of each output channel, measured in front of the activation.

    Rounding shifts the mean of what a layer gives, most of all in depthwise layers with few weights per channel; the layers behind
    would add these shifts up. A layer without a bias is left as it is.
    """
    layer, twin = case.layer, case.twin
    if layer.bias is None:
        return
    weight = layer.weight_fake_quant(layer.weight)
    total, count = torch.zeros_like(layer.bias, dtype=torch.float64), 0
    for x, float_x in zip(case.inputs, case.float_inputs, strict=True):
        error = linear_part(twin, float_x, twin.weight) - linear_part(layer, x, weight)
        by_channel = error.movedim(channel_axis(layer), 0).flatten(1)
        total += by_channel.double().sum(1)
        count += by_channel.shape[1]
    if count:
        layer.bias.data += (total / count).to(layer.bias)
