"""BatchNorm scales of zero, as in ``zero_init_residual`` and in channels that training has switched off."""

import pytest
import torch

from qat_lightning import QAT, Call, QuantizationCallback, prepare
from qat_lightning.zero_scales import SMALLEST_SCALE
from tests.nets import ModuleNet, Plain, fit

FLOWS = ("fx", "eager", "pt2e")
WARNING = "BatchNorm scales are zero, in 1 layers"


def with_zeros(channels=slice(0, 3)):
    """Return a network with a BatchNorm that switches channels off."""
    net = ModuleNet()
    with torch.no_grad():
        net.bn2.weight[channels] = 0
    return net


@pytest.mark.sampled
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("channels", [slice(0, 1), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("calibration_batches", [0, 2])
def test_training_from_zero_scales_is_finite_and_converts(flow, channels, calibration_batches):
    callback = QuantizationCallback(QAT(flow=flow, calibration_batches=calibration_batches))
    with pytest.warns(UserWarning, match=WARNING):
        module = fit(callback, Plain(with_zeros(channels)))[0]
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert max(layer.max_steps for layer in callback.report.parity) <= 1


def test_a_branch_that_begins_at_zero_learns():
    def scales(module):
        return next(parameter for name, parameter in module.named_parameters() if name.endswith("conv2.bn.weight")).detach()

    with pytest.warns(UserWarning, match=WARNING):
        module = fit(QuantizationCallback(QAT(calibration_batches=0, freeze_bn=None)), Plain(with_zeros(slice(None))))[0]
    assert not torch.any(scales(module) == SMALLEST_SCALE)


@pytest.mark.parametrize("flow", FLOWS)
def test_float_weights_that_bring_zeros(flow, tmp_path):
    prepared = prepare(ModuleNet(), QAT(flow=flow), Call((torch.zeros(4, 1, 8, 8),), {}))
    with pytest.warns(UserWarning, match=WARNING):
        prepared.load_state_dict(with_zeros().state_dict())
    assert prepared(torch.randn(4, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("flow", FLOWS)
def test_the_network_computes_nearly_the_same(flow):
    images, net = torch.randn(16, 1, 8, 8), with_zeros().eval()
    with pytest.warns(UserWarning, match=WARNING):
        prepared = prepare(net, QAT(flow=flow), Call((images,), {})).eval()
    assert torch.all(net.bn2.weight[:3] == 0), "the network given stays as it is"
    torch.testing.assert_close(prepared(images), net(images), rtol=0, atol=1e-2)
