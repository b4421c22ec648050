import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qat_lightning import StaticPTQ, calibrate, prepare
from qat_lightning.observers import fake_quants


class Activated(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, activation, shared=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv1, self.bn, self.conv2 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
        self.activation, self.shared = activation, shared

    def forward(self, x):
        x = self.conv2(self.activation(self.bn(self.conv1(x))))
        return self.activation(x) if self.shared else x


class Method(Activated):
    def forward(self, x):
        return self.conv2(self.bn(self.conv1(x)).clamp(0, 6))


@pytest.mark.parametrize(
    ("net", "flow"),
    [
        (Activated(nn.ReLU6()), "fx"),
        (Activated(nn.ReLU6()), "eager"),
        (Activated(nn.Hardswish()), "fx"),
        (Activated(F.relu6), "fx"),
        (Activated(F.hardswish), "fx"),
        (Method(None), "fx"),
    ],
    ids=["ReLU6-fx", "ReLU6-eager", "Hardswish", "relu6", "hardswish", "clamp"],
)
def test_no_grid_between_a_float_layer_and_its_activation(net, flow):
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared = calibrate(prepare(net.eval(), StaticPTQ(flow=flow, overrides={"conv1": None})), [x])
    float_layer = nn.Sequential(net.conv1, net.bn)
    wide = float(float_layer(x).detach().min())
    assert wide < -0.5
    grids = [quant for quant in fake_quants(prepared) if hasattr(quant, "freeze_range")]
    stub = 1 if flow == "eager" else 0  # eager mode rounds its inputs, whoever reads them
    lows = sorted(float(quant.activation_post_process.min_val) for quant in grids)
    assert len(grids) == 2 + stub
    assert not any(low == pytest.approx(wide, rel=1e-3) for low in lows)


def test_activation_that_other_layers_share_stays_int8_for_them():
    net = Activated(nn.Hardswish(), shared=True).eval()
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared = calibrate(prepare(net, StaticPTQ(overrides={"conv1": None})), [x])
    # The input and the output of conv2, and the output of the network.
    assert len([quant for quant in fake_quants(prepared) if hasattr(quant, "freeze_range")]) == 3
    assert torch.nn.functional.mse_loss(prepared(x), net(x)) < 1e-3
