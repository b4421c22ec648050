"""int8 models in formats of other runtimes."""

from qat_lightning.export.executorch import export_executorch
from qat_lightning.export.inductor import compile_int8
from qat_lightning.export.onnx import export_onnx, program_to_onnx

__all__ = ["compile_int8", "export_executorch", "export_onnx", "program_to_onnx"]
