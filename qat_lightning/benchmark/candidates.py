"""What is timed: the float network, this package by runtime, and the peers."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qat_lightning.artifact import load_quantized, save_quantized
from qat_lightning.backend import exact_products
from qat_lightning.benchmark.peers import PEERS, Quantized
from qat_lightning.core import calibrate, convert, prepare, refine
from qat_lightning.evaluation import serialized_bytes
from qat_lightning.export import compile_int8
from qat_lightning.plan import Call
from qat_lightning.recipe import FlowName, StaticPTQ

Make = Callable[[nn.Module, Sequence[Tensor]], Quantized]


@dataclass(frozen=True)
class Candidate:
    """A way to run a network.

    Args:
        name: for the table.
        packages: that must be installed.
        make: takes the float network and calibration batches; the first batch has the size that is timed.
        ours: whether it is this package.
    """

    name: str
    packages: tuple[str, ...]
    make: Make
    ours: bool = False


def _float(compiled: bool) -> Make:
    def make(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
        return Quantized(torch.compile(net) if compiled else net, serialized_bytes(net))

    return make


def _quantize(net: nn.Module, recipe: StaticPTQ, batches: Sequence[Tensor]) -> nn.Module:
    return convert(refine(calibrate(prepare(net, recipe, example=Call((batches[0],), {})), batches), batches))


def _ours(runtime: str | None, weight_bits: int = 8) -> Make:
    """Return static quantization by this package; without a runtime the plain module."""

    def make(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
        int8 = _quantize(net, StaticPTQ(weight_bits=weight_bits), batches)
        if runtime is None:
            return Quantized(int8, serialized_bytes(int8))
        with tempfile.TemporaryDirectory() as folder:
            save_quantized(int8, folder, example=batches[0])
            served = load_quantized(folder, runtime=runtime, example=batches[0])
            kind = "weights-*" if served.runtime == "torch" else "model-*"
            return Quantized(served, next(Path(folder).glob(kind)).stat().st_size)

    return make


def _compiled(flow: FlowName) -> Make:
    """Return static quantization by this package, compiled by Inductor."""

    def make(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
        with torch.inference_mode(mode=False):
            int8 = _quantize(net, StaticPTQ(flow=flow), batches)
            return Quantized(compile_int8(int8, batches[0]), serialized_bytes(int8))

    return make


CANDIDATES: Mapping[str, Candidate] = {
    "float": Candidate("float, eager", (), _float(compiled=False)),
    "float-compiled": Candidate("float, torch.compile", (), _float(compiled=True)),
    "plain": Candidate("qat_lightning, the module itself", (), _ours(None), ours=True),
    "torch": Candidate("qat_lightning, torch", (), _ours("torch"), ours=True),
    "onnxruntime": Candidate("qat_lightning, ONNX Runtime", ("onnx", "onnxruntime"), _ours("onnxruntime"), ours=True),
    "openvino": Candidate("qat_lightning, OpenVINO", ("onnx", "openvino"), _ours("openvino"), ours=True),
    "auto": Candidate("qat_lightning, auto", ("onnx",), _ours("auto"), ours=True),
    "fx-compiled": Candidate("qat_lightning, fx, compiled", ("torchao",), _compiled("fx"), ours=True),
    "pt2e-compiled": Candidate("qat_lightning, pt2e, compiled", ("torchao",), _compiled("pt2e"), ours=True),
    **{
        f"{runtime}-7bit": Candidate(f"qat_lightning, {name}, 7-bit weights", packages, _ours(runtime, weight_bits=7), ours=True)
        for runtime, name, packages in (
            ("torch", "torch", ()),
            ("onnxruntime", "ONNX Runtime", ("onnx", "onnxruntime")),
            ("openvino", "OpenVINO", ("onnx", "openvino")),
            ("auto", "auto", ("onnx",)),
        )
    },
    **{f"peer-{name}": Candidate(peer.name, peer.packages, peer.quantize) for name, peer in PEERS.items()},
}
"""By the name on the command line."""
DEFAULTS = (
    *("float", "plain", "torch", "onnxruntime", "openvino", "auto"),
    # The peers give weights 7 bits of themselves where 8 overflow.
    *(() if exact_products(weight_bits=8) else ("auto-7bit",)),
    *("peer-torch-x86", "peer-torch-x86-traced", "peer-onnxruntime-minmax", "peer-nncf-openvino"),
)
