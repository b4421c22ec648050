"""What can go wrong, as exceptions whose message names the thing, what was wrong and the way out."""


class QuantizationError(RuntimeError):
    """Base of every error this package raises about a model, its data or its configuration."""


class ConfigurationError(QuantizationError, ValueError):
    """A setting that is wrong by itself or does not fit the model, the trainer or another setting."""


class UnsupportedModelError(QuantizationError):
    """A model that the chosen flow cannot trace, fuse, convert or run in int8."""


class CalibrationError(QuantizationError):
    """Data from which no activation range can be learnt: none, NaN or infinite."""


class ArtifactError(QuantizationError):
    """A saved int8 model that cannot be written or read."""
