"""What a quantized model costs."""

from qat_lightning.evaluation.latency import interleaved_medians
from qat_lightning.evaluation.size import serialized_bytes

__all__ = ["interleaved_medians", "serialized_bytes"]
