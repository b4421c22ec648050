"""Other tools' post-training quantization, each with its own defaults for accuracy, as functions from images to logits."""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.evaluation import serialized_bytes
from qat_lightning.openvino_run import compile_openvino
from qat_lightning.recipe import BACKENDS
from qat_lightning.runtimes import RuntimeName, open_onnx

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quantized:
    """What a tool makes of a network.

    Args:
        run: images to logits.
        size_bytes: of the file that holds it.
    """

    run: Run
    size_bytes: int


@dataclass(frozen=True)
class Peer:
    """A tool.

    Args:
        name: for the table.
        packages: that must be installed.
        quantize: takes the float network and batches of images.
    """

    name: str
    packages: tuple[str, ...]
    quantize: Callable[[nn.Module, Sequence[Tensor]], Quantized]


def torch_fx(engine: str, traced: bool = False) -> Callable[[nn.Module, Sequence[Tensor]], Quantized]:
    """Return FX graph mode of torch.ao with the engine's default qconfig, as it is or traced and frozen."""

    def quantize(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
        from torch.ao.quantization import get_default_qconfig_mapping
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            previous, torch.backends.quantized.engine = torch.backends.quantized.engine, engine
            try:
                prepared = prepare_fx(net, get_default_qconfig_mapping(engine), (batches[0],))
                with torch.inference_mode():
                    for batch in batches:
                        prepared(batch)
                int8 = convert_fx(prepared)
            finally:
                torch.backends.quantized.engine = previous
            size = serialized_bytes(int8)
            if traced:
                with torch.no_grad():
                    int8 = torch.jit.freeze(torch.jit.trace(int8, (batches[0],), check_trace=False))  # type: ignore[no-untyped-call]
        return Quantized(int8, size)

    return quantize


def onnxruntime(method: str) -> Callable[[nn.Module, Sequence[Tensor]], Quantized]:
    """Return ``quantize_static`` with per-channel weights and a calibration method."""

    def quantize(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
        from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self.batches = iter(batches)

            def get_next(self) -> Any:
                batch = next(self.batches, None)
                return None if batch is None else {"x": batch.numpy()}

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path, cleaned, int8 = (str(Path(folder) / name) for name in ("float.onnx", "cleaned.onnx", "int8.onnx"))
            torch.onnx.export(net, (batches[0],), path, input_names=["x"], dynamic_axes={"x": {0: "n"}}, dynamo=False)
            quant_pre_process(path, cleaned)
            quantize_static(cleaned, int8, Reader(), per_channel=True, calibrate_method=CalibrationMethod[method])
            content = Path(int8).read_bytes()
        return _opened("onnxruntime", content, len(content))

    return quantize


def nncf_openvino(fast: bool, any_batch: bool = True) -> Callable[[nn.Module, Sequence[Tensor]], Quantized]:
    """Return NNCF on OpenVINO's graph, with its preset for mixed activations.

    Args:
        fast: fast bias correction, which is the default, or accurate.
        any_batch: whether the model takes batches of any size, or those of the size that is timed alone.
    """

    def quantize(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
        import nncf
        import openvino

        model = openvino.convert_model(net, example_input=batches[0])
        model.reshape({0: [-1, *batches[0].shape[1:]]})
        options = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(batches), "fast_bias_correction": fast}
        quantized = nncf.quantize(model, _dataset(nncf, batches), **options)
        if not any_batch:
            quantized.reshape({0: list(batches[0].shape)})
        return _compiled(quantized)

    return quantize


def nncf_torch(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
    """Quantize with NNCF on torch's graph, and run in OpenVINO."""
    import nncf
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = nncf.quantize(net, _dataset(nncf, batches), preset=nncf.QuantizationPreset.MIXED, subset_size=len(batches))
        model = openvino.convert_model(quantized, example_input=batches[0])
    return _compiled(model)


def _dataset(nncf: Any, batches: Sequence[Tensor]) -> Any:
    return nncf.Dataset(list(batches), lambda batch: batch)


def _compiled(model: Any) -> Quantized:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        core = openvino.Core()
        compiled = compile_openvino(core, core.read_model(path), torch.get_num_threads())
    return Quantized(_of_one_image(compiled), size)


def _opened(runtime: RuntimeName, content: bytes, size: int) -> Quantized:
    return Quantized(_of_one_image(open_onnx(runtime, content)), size)


def _of_one_image(run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]) -> Run:
    return lambda images: run([images])[0]


def pt2e_inductor(net: nn.Module, batches: Sequence[Tensor]) -> Quantized:
    """Quantize with torchao's PT2E for x86, and compile with Inductor."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        sizes = ({0: torch.export.Dim.AUTO},)
        exported = torch.export.export(net, (batches[0],), strict=True, dynamic_shapes=sizes).module()
        prepared = prepare_pt2e(exported, X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config()))
        for batch in batches:
            prepared(batch)
        int8 = convert_pt2e(prepared)
        size = serialized_bytes(int8)
        torch._inductor.config.freezing = True
        return Quantized(torch.compile(int8, dynamic=False), size)


PEERS: dict[str, Peer] = {
    **{f"torch-{engine}": Peer(f"torch FX defaults, {engine}", (), torch_fx(engine)) for engine in BACKENDS},
    **{
        f"onnxruntime-{method.lower()}": Peer(f"ONNX Runtime static, {method}", ("onnx", "onnxruntime"), onnxruntime(method))
        for method in ("MinMax", "Entropy", "Percentile")
    },
    "torch-x86-traced": Peer("torch FX defaults, x86, traced and frozen", (), torch_fx("x86", traced=True)),
    "pt2e-inductor": Peer("torchao PT2E, Inductor", ("torchao",), pt2e_inductor),
    "nncf-openvino": Peer("NNCF, OpenVINO", ("nncf", "openvino"), nncf_openvino(fast=True)),
    "nncf-openvino-fixed": Peer("NNCF, OpenVINO, one batch size", ("nncf", "openvino"), nncf_openvino(fast=True, any_batch=False)),
    "nncf-openvino-accurate": Peer("NNCF, OpenVINO, accurate bias correction", ("nncf", "openvino"), nncf_openvino(fast=False)),
    "nncf-torch": Peer("NNCF, torch", ("nncf", "openvino"), nncf_torch),
}
"""By the name on the command line."""
