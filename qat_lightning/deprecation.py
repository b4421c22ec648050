"""Silences what PyTorch says about its own quantization and a user of this package can do nothing about."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGES = (
    # torch.ao still ships with every torch this package admits, and stays behind the flows.
    "torch.ao.quantization is deprecated",
    "torch.quantize_per_tensor, torch.quantize_per_channel and other quantized tensor creation functions",
    "TypedStorage is deprecated",
    # Said of observers that the plan leaves without data on purpose: a dry run, or a layer that stays float.
    "must run observer before calling",
    "QConfig must specify a FixedQParams",
    "Please use quant_min and quant_max",
    # Said of recurrent layers by the code of torch.ao, and of every dynamic layer by that of qnnpack.
    "To copy construct from a tensor, it is recommended",
    "Currently, qnnpack incorrectly ignores reduce_range",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore these warnings for the time of the block, and no others."""
    with warnings.catch_warnings():
        for message in MESSAGES:
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield


@contextmanager
def silence() -> Iterator[None]:
    """Keep all warnings and the log of other packages that are built on torch.ao from the user for the time of the block."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
