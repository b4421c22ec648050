"""Padding in ONNX files: convolutions do what nothing else reads."""

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from qat_lightning import export_onnx, load_quantized, save_quantized
from tests.nets import static_int8

IMAGES = torch.randn(8, 3, 17, 16, generator=torch.Generator().manual_seed(0))


class Padded(nn.Module):
    """A convolution on a padded image, and one on padded activations."""

    def __init__(self, image=(0, 1, 0, 1), inside=(1, 2, 0, 1), value=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.inside, self.value = image, inside, value
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.last = nn.Linear(8, 4)

    def between(self, x):
        return functional.pad(x, self.inside, value=self.value)

    def forward(self, x):
        x = self.first(functional.pad(x, self.image)).relu()
        return self.last(self.second(self.between(x)).mean((2, 3)))


class ReadTwice(Padded):
    """The padded activations go to a sum, too."""

    def between(self, x):
        padded = super().between(x)
        return padded + padded.mean((2, 3), keepdim=True)


def exported(net, tmp_path, flow):
    with torch.no_grad():
        int8 = static_int8(net, IMAGES, flow=flow, weight_bits=7)
    export_onnx(int8, tmp_path / "model.onnx")
    return int8, onnx.load(tmp_path / "model.onnx").graph


def kinds(graph):
    return [node.op_type for node in graph.node]


@pytest.mark.parametrize("flow", ["fx", "pt2e"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_convolutions_pad(flow, runtime, tmp_path):
    int8, graph = exported(Padded(), tmp_path, flow)
    assert "Pad" not in kinds(graph)
    pads = [list(attribute.ints) for node in graph.node for attribute in node.attribute if attribute.name == "pads"]
    assert pads == [[1, 1, 2, 2], [0, 1, 1, 2]]  # top, left, bottom, right
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    step = int8(IMAGES).unique().diff().min()
    served = load_quantized(save_quantized(int8, tmp_path / "int8"), runtime=runtime)
    assert (served(IMAGES) - int8(IMAGES)).abs().max() <= 2.01 * step


def test_what_is_padded_between_layers_is_not_quantized_twice(tmp_path):
    padded, plain = (exported(net, tmp_path, "fx")[1] for net in (Padded(), Padded(inside=(0, 0, 0, 0))))
    assert kinds(padded) == kinds(plain)


@pytest.mark.parametrize(
    "net",
    [Padded(value=1.0), Padded(inside=(-1, 1, 0, 0)), Padded(inside=(0, 0, 0, 0, 0, 8)), ReadTwice()],
    ids=["no zeros", "cut", "channels", "read by others"],
)
def test_other_padding_stays(net, tmp_path):
    if net.inside == (0, 0, 0, 0, 0, 8):
        net.second = nn.Conv2d(16, 8, 3)
    int8, graph = exported(net, tmp_path, "fx")
    assert kinds(graph).count("Pad") == 1  # that of the image is gone
    step = int8(IMAGES).unique().diff().min()
    served = load_quantized(save_quantized(int8, tmp_path / "int8"), runtime="onnxruntime")
    assert (served(IMAGES) - int8(IMAGES)).abs().max() <= 2.01 * step
