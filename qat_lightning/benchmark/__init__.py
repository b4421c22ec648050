"""Latency of a network in float, quantized by this package, and quantized by other tools: ``python -m qat_lightning.benchmark``."""
