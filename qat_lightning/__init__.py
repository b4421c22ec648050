"""Quantization-aware training, static and dynamic quantization for PyTorch Lightning: one callback from a float to an int8 model."""

from qat_lightning.artifact import load_quantized, save_quantized
from qat_lightning.callback import QuantizationCallback
from qat_lightning.checkpoint import adopt_checkpoints, load_float_weights
from qat_lightning.core import calibrate, convert, measure_parity, prepare, quantize_dynamic, reestimate_batch_norm, refine
from qat_lightning.equalization import equalize
from qat_lightning.errors import (
    ArtifactError,
    CalibrationError,
    CheckpointError,
    ConfigurationError,
    ParityError,
    QuantizationError,
    UnsupportedModelError,
)
from qat_lightning.evaluation import Sensitivity, measure_sensitivity
from qat_lightning.export import compile_int8, export_executorch, export_onnx
from qat_lightning.fallback import quantize_within
from qat_lightning.plan import Call
from qat_lightning.recipe import QAT, AdaRound, DynamicPTQ, LayerOverride, StaticPTQ, When
from qat_lightning.report import Report
from qat_lightning.serving import ServedModel

__version__ = "0.1.0"

__all__ = [
    "QAT",
    "AdaRound",
    "ArtifactError",
    "CalibrationError",
    "Call",
    "CheckpointError",
    "ConfigurationError",
    "DynamicPTQ",
    "LayerOverride",
    "ParityError",
    "QuantizationCallback",
    "QuantizationError",
    "Report",
    "Sensitivity",
    "ServedModel",
    "StaticPTQ",
    "UnsupportedModelError",
    "When",
    "adopt_checkpoints",
    "calibrate",
    "compile_int8",
    "convert",
    "equalize",
    "export_executorch",
    "export_onnx",
    "load_float_weights",
    "load_quantized",
    "measure_parity",
    "measure_sensitivity",
    "prepare",
    "quantize_dynamic",
    "quantize_within",
    "reestimate_batch_norm",
    "refine",
    "save_quantized",
]
