"""Which fake-quantized value an int8 value is compared with."""

import pytest
import torch
from torch import nn

from qat_lightning import StaticPTQ, calibrate, convert, measure_parity, prepare

# Halves of a tensor keep the grids that they had; torch warns of it, and requantizes right.
pytestmark = pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share")

IMAGES = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class InPlace(nn.Module):
    """An activation that overwrites what fake-quant has returned."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(4, 8, 3), nn.Hardswish(inplace=True), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.act(self.conv(x)))


class Shuffle(nn.Module):
    """Halves that are shuffled: many values of one shape on one grid."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))

    def forward(self, x):
        for conv in self.convs:
            kept, changed = x.chunk(2, dim=1)
            x = torch.cat((kept, conv(changed).relu()), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return x


def parity(net, spoil=lambda int8: None):
    torch.manual_seed(0)
    prepared = calibrate(prepare(net().eval(), StaticPTQ()), [IMAGES])
    int8 = convert(prepared)
    spoil(int8)
    return {layer.layer: layer.max_steps for layer in measure_parity(prepared, int8, [IMAGES])}


def test_no_false_alarm_behind_an_activation_in_place():
    assert max(parity(InPlace).values()) <= 1


def test_no_false_alarm_behind_splits():
    assert max(parity(Shuffle).values()) <= 1


def test_a_wrong_layer_is_named_among_values_of_its_grid():
    def spoil(int8):
        layer = int8.get_submodule("convs.1")
        weight, bias = layer._weight_bias()
        layer.set_weight_bias(weight, bias + 40 * layer.scale)

    found = parity(Shuffle, spoil)
    assert [name for name, steps in found.items() if steps > 1] == ["convs.1"]
