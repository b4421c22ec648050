"""Size of a model as it is stored."""

import io
from typing import IO, cast

import torch
from torch import nn

from qat_lightning.deprecation import quiet


class _Counter(io.RawIOBase):
    """Counts what is written to it."""

    def __init__(self) -> None:
        self.count = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        length = memoryview(data).nbytes  # type: ignore[arg-type]
        self.count += length
        return length


def serialized_bytes(module: nn.Module) -> int:
    """Return the size of the saved state dict; packed int8 weights are no parameters, so counting those would give zero."""
    counter = _Counter()
    with quiet():
        torch.save(module.state_dict(), cast(IO[bytes], counter))
    return counter.count
