"""What a quantized model costs, and which of its layers int8 hurts."""

from qat_lightning.evaluation.latency import interleaved_medians
from qat_lightning.evaluation.sensitivity import LayerSensitivity, Sensitivity, measure_sensitivity
from qat_lightning.evaluation.size import serialized_bytes

__all__ = ["LayerSensitivity", "Sensitivity", "interleaved_medians", "measure_sensitivity", "serialized_bytes"]
