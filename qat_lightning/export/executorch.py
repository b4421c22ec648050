"""Files of ExecuTorch, whose XNNPACK kernels run int8 on phones: the heir of torch's qnnpack (https://docs.pytorch.org/executorch)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_lightning.deprecation import silence
from qat_lightning.export.packages import importing
from qat_lightning.export.reference import reference_of
from qat_lightning.files import write_atomically
from qat_lightning.program.calling import example_tensors


def export_executorch(module: nn.Module, path: str | Path, example: Any = None) -> Path:
    """Write an int8 module to a file of ExecuTorch; what its XNNPACK backend has an int8 kernel for runs there.

    Args:
        module: from :func:`convert` or ``QuantizationCallback.quantized_module``, quantized statically.
        path: of the file, ``NAME.pte``; it is replaced whole.
        example: inputs of the module: a tensor, a tuple of positional or a mapping of keyword arguments. The file takes tensors of these
            sizes. None: one sample of the size that the module was calibrated with.

    Returns:
        the path. A program of the file takes the tensors of a call one by one, and gives a list of tensors.

    Raises:
        ConfigurationError: ExecuTorch is missing or does not fit this torch, the module is not int8, or nobody saw a call of it.
        UnsupportedModelError: names the operator that the file cannot carry.
    """
    from qat_lightning.recorded import record_program

    exir, partitioner = _import()
    recorded = record_program(module, example, quantized=True)
    reference = reference_of(recorded.program, recorded.weights, recorded.tensors, signed=True)
    tensors = example_tensors(recorded.program.inputs) if example is None else recorded.tensors
    with silence(), torch.no_grad():
        exported = torch.export.export(reference, tuple(tensors))
        lowered = exir.to_edge_transform_and_lower(exported, partitioner=[partitioner()])
        content: bytes = lowered.to_executorch().buffer
    write_atomically(Path(path), content)
    return Path(path)


def _import() -> tuple[Any, Any]:
    with importing("executorch", "executorch", "ExecuTorch export", "https://docs.pytorch.org/executorch/stable/getting-started.html"):
        from executorch import exir
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.kernels import quantized  # noqa: F401 - for what XNNPACK leaves
    return exir, XnnpackPartitioner
