import pytest
import torch
from torch import nn

from qat_lightning import (
    QAT,
    Call,
    DynamicPTQ,
    QuantizationCallback,
    StaticPTQ,
    calibrate,
    convert,
    load_float_weights,
    load_quantized,
    measure_parity,
    prepare,
    quantize_dynamic,
    save_quantized,
)
from tests.nets import Plain, fit

IMAGES = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FLOWS = pytest.mark.parametrize("flow", ["fx", "eager", "pt2e"])


class Twice(nn.Module):
    """A convolution that is called twice: with a ReLU behind it, then without."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.relu = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def body(self, x):
        return self.conv(self.relu(self.conv(x)))

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.body(self.stem(x))), 1))


class TwoNorms(Twice):
    """One convolution, two BatchNorms of different scale."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        nn.init.constant_(self.one.weight, 3.0)
        nn.init.constant_(self.two.bias, 1.0)

    def body(self, x):
        return self.two(self.conv(self.relu(self.one(self.conv(x)))))


class Block(Twice):
    """A block that is called twice, and grows what it is given."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.conv, nn.BatchNorm2d(8), nn.ReLU())
        nn.init.constant_(self.block[1].weight, 2.0)

    def body(self, x):
        return self.block(self.block(x) * 4)


class TwoNames(Twice):
    """One convolution under two names."""

    def __init__(self):
        super().__init__()
        self.same = self.conv

    def body(self, x):
        return self.same(self.relu(self.conv(x)))


NETS = pytest.mark.parametrize("build", [Twice, TwoNorms, Block, TwoNames])


@NETS
@FLOWS
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_before_fake_quant_nothing_changes(build, flow, training):
    if (build, flow) == (Block, "eager"):
        pytest.skip("a functional product")
    net = build().train(training)
    prepared = prepare(net, QAT(flow=flow), Call((IMAGES,), {})).train(training)
    ours, own = prepared(IMAGES), net(IMAGES)
    torch.testing.assert_close(ours, own)
    ours.square().sum().backward()
    own.square().sum().backward()
    expected = sorted(float(p.grad.norm()) for p in net.parameters())
    assert sorted(float(p.grad.norm()) for p in prepared.parameters()) == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.sampled
@NETS
@pytest.mark.parametrize("overrides", [{}, {"conv": {"per_channel": False, "engine": "qnnpack"}}, {"conv": None}], ids=str)
def test_each_call_has_its_own_range(build, overrides, tmp_path):
    net = build().eval()
    prepared = calibrate(prepare(net, StaticPTQ(overrides=overrides)), [IMAGES])
    int8 = convert(prepared)
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [IMAGES])) <= 1
    with torch.no_grad():
        assert (int8(IMAGES) - net(IMAGES)).abs().max() < 0.1 * net(IMAGES).abs().max()
        assert torch.equal(load_quantized(save_quantized(int8, tmp_path / "int8"), build())(IMAGES), int8(IMAGES))


@pytest.mark.sampled
@NETS
def test_qat_of_shared_layers_survives_its_checkpoint(build, tmp_path):
    callback = QuantizationCallback(QAT(calibration_batches=2))
    module, trainer = fit(callback, Plain(build()))
    assert callback.report.parity_passed
    trainer.save_checkpoint(tmp_path / "qat.ckpt")
    again = Plain(build())
    load_float_weights(again, tmp_path / "qat.ckpt")
    weight = again.net.conv.weight
    copies = [layer.weight for layer in module.net.modules() if hasattr(layer, "weight_fake_quant") and layer.weight.shape == weight.shape]
    assert len(copies) > 1 and len({id(copy) for copy in copies}) == 1 and torch.equal(weight, copies[0])
    fit(QuantizationCallback(QAT(), init_from=tmp_path / "qat.ckpt"), Plain(build()), max_epochs=1)


def test_a_dynamic_layer_that_is_called_twice():
    class Lines(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu = nn.Linear(8, 8), nn.ReLU()

        def forward(self, x):
            return self.fc(self.relu(self.fc(x)))

    net, x = Lines().eval(), torch.randn(4, 8)
    with torch.no_grad():
        assert (quantize_dynamic(net, DynamicPTQ(flow="fx"))(x) - net(x)).abs().max() < 0.05


@pytest.mark.parametrize("recipe", [QAT, StaticPTQ])
@pytest.mark.parametrize("flow", ["fx", "pt2e"])
def test_one_relu_behind_a_layer_and_an_addition(flow, recipe):
    class Residual(nn.Module):
        """The block of torchvision's ResNets."""

        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.relu = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += x
            return self.relu(out)

    net = Residual().eval()
    prepared = calibrate(prepare(net, recipe(flow=flow), Call((IMAGES,), {})), [IMAGES])
    int8 = convert(prepared)
    assert max(layer.max_steps for layer in measure_parity(prepared, int8, [IMAGES])) <= 1
    with torch.no_grad():
        assert (int8(IMAGES) - net(IMAGES)).abs().max() < 0.05 * net(IMAGES).abs().max()
