"""What is changed in a model for OpenVINO: the same numbers, sooner."""

import numpy
import openvino
import pytest
import torch
from torch import nn

from qat_lightning import export_onnx, load_quantized, save_quantized
from qat_lightning.backend import Cpu
from qat_lightning.openvino_graph import round_in_kernels
from qat_lightning.openvino_kernels import depthwise_on_real_numbers, linear_as_convolutions
from qat_lightning.openvino_run import FIXED_SIZES, compile_openvino, run_with_fixed_sizes
from tests.nets import static_int8

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def read(int8, folder):
    return openvino.Core().read_model(export_onnx(int8, folder / "model.onnx"))


def kinds(graph):
    return [operation.get_type_name() for operation in graph.get_ordered_ops()]


def run(graph, x=IMAGES):
    return compile_openvino(openvino.Core(), graph, threads=1)([x])[0]


class Counting:
    """A core that keeps the models it compiles."""

    def __init__(self):
        self.core, self.compiled = openvino.Core(), []

    def compile_model(self, graph, *arguments):
        self.compiled.append(graph)
        return self.core.compile_model(graph, *arguments)


class Gated(nn.Module):
    """A block of MobileNetV3: hardswish, and a gate of hardsigmoid."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.gate, self.last = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = nn.functional.hardswish(self.conv(x))
        return self.last(x * nn.functional.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))).mean((2, 3))


def test_openvino_rounds_in_its_kernels(tmp_path):
    int8 = static_int8(Gated(), IMAGES, weight_bits=7)
    plain, changed = read(int8, tmp_path), read(int8, tmp_path)
    assert round_in_kernels(changed) == 3 and round_in_kernels(changed) == 0  # two grids, and hardsigmoid itself
    assert {"HSigmoid", "HSwish", "FakeQuantize"} <= {*kinds(changed)} and "HardSigmoid" not in kinds(changed)
    one, other = run(plain), run(changed)
    step = int8(IMAGES).unique().diff().min()
    assert (one - other).abs().max() <= 1.01 * step
    assert (other - int8(IMAGES)).abs().max() <= 2.01 * step
    assert torch.equal(other, load_quantized(save_quantized(int8, tmp_path / "int8"), runtime="openvino")(IMAGES))


class Residual(nn.Module):
    """The output of one convolution goes to a sum alone, that of the other to a convolution too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3, padding=1)
        self.third, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last((x + self.third(self.second(x).relu())).relu())


def test_openvino_rounds_what_it_adds(tmp_path):
    int8 = static_int8(Residual(), IMAGES, weight_bits=7)
    graph = read(int8, tmp_path)
    plain, native = run(graph), int8(IMAGES)
    assert round_in_kernels(graph) == 1  # not the output that a convolution reads as integers
    rounded = run(graph)
    assert (rounded != native).float().mean() < 0.2 * (plain != native).float().mean()


def test_openvino_compiles_for_the_first_sizes_and_then_for_any(tmp_path):
    int8, core = static_int8(Gated(), IMAGES, weight_bits=7), Counting()
    served = run_with_fixed_sizes(core, read(int8, tmp_path), threads=1)
    step = int8(IMAGES).unique().diff().min()
    for size in (1, 8, 1, 2, 3, 5, 8, 4, 6, 7, 5, 1):
        assert (served([IMAGES[:size]])[0] - int8(IMAGES[:size])).abs().max() <= 2.01 * step
    sizes = [str(graph.inputs[0].get_partial_shape()[0]) for graph in core.compiled]
    assert sizes == ["1", "8", "2", "3", "?"] and len(sizes) == FIXED_SIZES + 1
    with pytest.raises(RuntimeError, match=r"[Ss]hape"):
        served([IMAGES[:, :, :5]])


class Linears(nn.Module):
    """Linear layers with what may follow them, on rows and on more dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.rows, self.plain = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 24, bias=False)
        self.hard, self.last, self.head = nn.Linear(24, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.rows(self.tokens(x[:, 0]).relu().mean(1))
        x = nn.functional.hardswish(self.hard(self.plain(x) + x))
        return self.head(torch.softmax(self.last(x), 1))


@pytest.mark.parametrize("flow", ["fx", "pt2e"])
def test_convolutions_compute_linear_layers(flow, tmp_path):
    int8 = static_int8(Linears(), IMAGES, flow=flow, weight_bits=7)
    plain, changed = read(int8, tmp_path), read(int8, tmp_path)
    assert linear_as_convolutions(changed) == kinds(plain).count("MatMul") == 6
    assert "MatMul" not in kinds(changed) and kinds(changed).count("Convolution") == 6
    assert linear_as_convolutions(changed) == 0
    assert torch.equal(run(plain), run(changed))
    assert torch.equal(run(plain, IMAGES[:3]), run(changed, IMAGES[:3]))


def test_other_products_stay(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.key, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = x[:, 0]
            return self.last(torch.softmax(self.key(x) @ x.transpose(1, 2), 2) @ x)

    graph = read(static_int8(Attention(), IMAGES, weight_bits=7, overrides={"last": None}), tmp_path)
    assert kinds(graph).count("MatMul") == 4
    assert linear_as_convolutions(graph) == 1
    assert kinds(graph).count("MatMul") == 3  # of activations, and of a layer in float


class Separable(nn.Module):
    """Depthwise convolutions behind those of one pixel, and one behind an image."""

    def __init__(self, activation=nn.ReLU6, stride=1):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 8, 3, padding=1, groups=1)
        self.narrow, self.deep = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16, stride=stride)
        self.after, self.wide = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.behind, self.activation = nn.Conv2d(16, 16, 3, groups=16), activation()
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.activation(self.deep(self.activation(self.narrow(self.first(x)))))
        return self.last(self.behind(self.wide(self.activation(self.after(x)))).relu()).amax((2, 3))


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.Hardswish, nn.Identity])
def test_small_depthwise_convolutions_read_real_numbers(activation, tmp_path):
    int8 = static_int8(Separable(activation), IMAGES, weight_bits=7)
    changed = read(int8, tmp_path)
    round_in_kernels(changed)
    assert depthwise_on_real_numbers(changed) == 0  # of any size
    changed.reshape({0: [8, 1, 8, 8]})
    plain = changed.clone()
    assert depthwise_on_real_numbers(changed) == 2  # that behind a depthwise one stays
    assert depthwise_on_real_numbers(changed) == 0
    assert round_in_kernels(changed) == 2
    step = int8(IMAGES).unique().diff().min()
    assert (run(plain) - run(changed)).abs().max() <= 1.01 * step
    assert (int8(IMAGES) - run(changed)).abs().max() <= 2.01 * step


@pytest.mark.parametrize(("size", "count"), [([4, 1, 64, 64], 2), ([1, 1, 128, 128], 0), ([10, 1, 64, 64], 0)])
def test_large_depthwise_convolutions_stay(size, count, tmp_path):
    graph = read(static_int8(Separable(), torch.randn(1, 1, 64, 64), weight_bits=7), tmp_path)
    graph.reshape({0: size})
    assert depthwise_on_real_numbers(graph) == count


def test_depthwise_convolutions_with_strides_stay(tmp_path):
    graph = read(static_int8(Separable(stride=2), IMAGES, weight_bits=7), tmp_path)
    graph.reshape({0: [8, 1, 8, 8]})
    assert depthwise_on_real_numbers(graph) == 1


@pytest.mark.parametrize(("features", "faster"), [(("avx2",), True), (("avx2", "avx512_vnni"), False)])
def test_other_kernels_are_for_processors_without_vnni(features, faster, monkeypatch, tmp_path):
    monkeypatch.setattr("qat_lightning.backend.this_cpu", lambda: Cpu(name="a CPU", capability="AVX2", features=features))
    net = nn.Sequential(Separable(), nn.Linear(4, 4))
    int8, core = static_int8(net, IMAGES, weight_bits=7), Counting()
    served = run_with_fixed_sizes(core, read(int8, tmp_path), threads=1)
    step = int8(IMAGES).unique().diff().min()
    assert (served([IMAGES])[0] - int8(IMAGES)).abs().max() <= 2.01 * step
    (graph,) = core.compiled
    assert ("MatMul" in kinds(graph)) is not faster
    assert ("Round" in kinds(graph)) is faster


def test_constants_are_computed():
    from openvino import opset13

    from qat_lightning.openvino_kernels import constant

    integers = opset13.convert(opset13.constant(numpy.array([[1, 2], [3, 4]], dtype=numpy.int8)), "f32")
    scaled = opset13.multiply(opset13.subtract(integers, numpy.float32(1)), numpy.array([[0.5], [2]], dtype=numpy.float32))
    assert constant(opset13.reshape(scaled, [4], False).output(0)).tolist() == [0, 0.5, 4, 6]
    assert constant(opset13.unsqueeze(scaled, [0]).output(0)).shape == (1, 2, 2)
    assert constant(opset13.multiply(scaled, opset13.parameter([2, 2])).output(0)) is None
    assert constant(opset13.exp(scaled).output(0)) is None
