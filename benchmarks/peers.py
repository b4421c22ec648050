"""Other tools' post-training quantization, each with its own defaults for accuracy, as functions from images to logits."""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.recipe import BACKENDS

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """A tool.

    Args:
        name: for the table.
        packages: that must be installed.
        quantize: float network and batches of images to a function.
    """

    name: str
    packages: tuple[str, ...]
    quantize: Callable[[nn.Module, Sequence[Tensor]], Run]


def torch_fx(engine: str) -> Callable[[nn.Module, Sequence[Tensor]], Run]:
    """Return FX graph mode of torch.ao with the engine's default qconfig."""

    def quantize(net: nn.Module, batches: Sequence[Tensor]) -> Run:
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
                int8: Run = convert_fx(prepared)
            finally:
                torch.backends.quantized.engine = previous
        return int8

    return quantize


def onnxruntime(method: str) -> Callable[[nn.Module, Sequence[Tensor]], Run]:
    """Return ``quantize_static`` with per-channel weights and a calibration method."""

    def quantize(net: nn.Module, batches: Sequence[Tensor]) -> Run:
        import onnxruntime
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
            session = onnxruntime.InferenceSession(int8)
        return lambda images: torch.from_numpy(session.run(None, {"x": images.numpy()})[0])

    return quantize


def nncf_openvino(fast: bool) -> Callable[[nn.Module, Sequence[Tensor]], Run]:
    """Return NNCF on OpenVINO's graph, with its preset for mixed activations and its fast (default) or accurate bias correction."""

    def quantize(net: nn.Module, batches: Sequence[Tensor]) -> Run:
        import nncf
        import openvino

        model = openvino.convert_model(net, example_input=batches[0])
        model.reshape({0: [-1, *batches[0].shape[1:]]})
        options = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(batches), "fast_bias_correction": fast}
        return _compiled(openvino, nncf.quantize(model, _dataset(nncf, batches), **options))

    return quantize


def nncf_torch(net: nn.Module, batches: Sequence[Tensor]) -> Run:
    """Quantize with NNCF on torch's graph, and run in OpenVINO."""
    import nncf
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = nncf.quantize(net, _dataset(nncf, batches), preset=nncf.QuantizationPreset.MIXED, subset_size=len(batches))
        model = openvino.convert_model(quantized, example_input=batches[0])
    return _compiled(openvino, model)


def _dataset(nncf: Any, batches: Sequence[Tensor]) -> Any:
    return nncf.Dataset(list(batches), lambda batch: batch)


def _compiled(openvino: Any, model: Any) -> Run:
    # Without the hint, CPUs with AMX run in bfloat16 what is not int8: an error that has nothing to do with quantization.
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(next(_values(compiled(images.numpy()))))


def _values(outputs: Any) -> Iterator[Any]:
    return iter(outputs.values())


PEERS: dict[str, Peer] = {
    **{f"torch-{engine}": Peer(f"torch FX defaults, {engine}", (), torch_fx(engine)) for engine in BACKENDS},
    **{
        f"onnxruntime-{method.lower()}": Peer(f"ONNX Runtime static, {method}", ("onnx", "onnxruntime"), onnxruntime(method))
        for method in ("MinMax", "Entropy", "Percentile")
    },
    "nncf-openvino": Peer("NNCF, OpenVINO", ("nncf", "openvino"), nncf_openvino(fast=True)),
    "nncf-openvino-accurate": Peer("NNCF, OpenVINO, accurate bias correction", ("nncf", "openvino"), nncf_openvino(fast=False)),
    "nncf-torch": Peer("NNCF, torch", ("nncf", "openvino"), nncf_torch),
}
"""By the name on the command line."""
