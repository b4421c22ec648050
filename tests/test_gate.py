import warnings

import pytest
import torch
from torch import nn

from qat_lightning import ParityError, QuantizationCallback, StaticPTQ
from tests.nets import Images, Plain, fit

SATURATING = StaticPTQ(overrides={"1": {"engine": "fbgemm", "activation_bits": 8}})


def extreme():
    """A depthwise convolution whose sums of products overflow 16 bits."""
    net = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Flatten(), nn.Linear(512, 4))
    for layer in net[:2]:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    return Plain(net)


class Bright(Images):
    def __init__(self):
        super().__init__()
        self.images = self.images.abs().clamp(min=2.0)


def quantize(recipe=SATURATING, **arguments):
    callback = QuantizationCallback(recipe, **arguments)
    fit(callback, extreme(), Bright(), max_epochs=0)
    return callback


CAUSE = r"differ by \d+ quantization steps at 'net\.1'.* the fbgemm kernel of this layer saturates with 8-bit inputs"

saturates = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs the engine whose kernels saturate")


@saturates
def test_an_error_names_layer_and_cause_and_loses_nothing():
    callback = QuantizationCallback(SATURATING, parity="error")
    with pytest.raises(ParityError, match=CAUSE):
        fit(callback, extreme(), Bright(), max_epochs=0)
    assert callback.report.max_steps > 1 and not callback.report.parity_passed
    assert callback.quantized_module.net(Bright().images).shape == (96, 4)


@saturates
def test_a_warning_is_the_default():
    with pytest.warns(UserWarning, match=CAUSE):
        quantize()


@saturates
def test_off_compares_nothing():
    with warnings.catch_warnings(record=True) as caught:
        callback = quantize(parity="off")
    assert not any("quantization steps" in str(warning.message) for warning in caught)
    assert callback.report.parity is None and callback.report.parity_passed is None


def test_the_probe_avoids_what_saturates():
    assert quantize(StaticPTQ(), parity="error").report.parity_passed
