"""What can go wrong, as exceptions whose message names the thing, what was wrong and the way out."""


class QuantizationError(RuntimeError):
    """Base of every error this package raises about a model, its data or its configuration."""


class ConfigurationError(QuantizationError, ValueError):
    """A setting that is wrong by itself or does not fit the model, the trainer or another setting."""


class UnsupportedModelError(QuantizationError):
    """A model that the chosen flow cannot trace, fuse, convert or run in int8."""


class CalibrationError(QuantizationError):
    """Data from which no activation range can be learnt: none, NaN or infinite."""


class CheckpointError(QuantizationError):
    """A checkpoint that another recipe or flow has written, or that holds no weights of the model."""


class ParityError(QuantizationError):
    """An int8 model that computes something else than the fake-quantized one it was made from."""


class ArtifactError(QuantizationError):
    """A saved int8 model that cannot be written or read."""


SHOWN_NAMES = 5


def shorten(names: list[str]) -> str:
    """Return the first few names of a list for a message, and how many more there are."""
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
