"""Files of ExecuTorch, whose XNNPACK kernels run int8 on phones: the heir of torch's qnnpack (https://docs.pytorch.org/executorch)."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat_lightning.deprecation import silence
from qat_lightning.errors import ConfigurationError
from qat_lightning.export.describing import describe
from qat_lightning.export.reference import ReferenceModule
from qat_lightning.files import write_atomically
from qat_lightning.program.calling import example_tensors

EXTRA = 'pip install "qat-lightning[executorch]"'


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
    described = describe(recorded.program, recorded.weights, recorded.tensors)
    grids = {number: value.grid for number, value in described.items() if value.grid is not None}
    reference = ReferenceModule(recorded.program, recorded.weights, grids).eval()
    tensors = example_tensors(recorded.program.inputs) if example is None else recorded.tensors
    with silence(), torch.no_grad():
        exported = torch.export.export(reference, tuple(tensors))
        lowered = exir.to_edge_transform_and_lower(exported, partitioner=[partitioner()])
        content: bytes = lowered.to_executorch().buffer
    write_atomically(Path(path), content)
    return Path(path)


def _import() -> tuple[Any, Any]:
    try:
        found = version("executorch")
    except PackageNotFoundError:
        raise ConfigurationError(f"ExecuTorch export needs the package executorch: {EXTRA}.") from None
    try:
        with silence():
            from executorch import exir
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.kernels import quantized  # noqa: F401 - for what XNNPACK leaves
    except (ImportError, AttributeError, RuntimeError) as error:
        raise ConfigurationError(
            f"executorch {found} cannot be imported with torch {torch.__version__} ({error}): install the versions that fit each other, "
            f"see https://docs.pytorch.org/executorch/stable/getting-started.html."
        ) from error
    return exir, XnnpackPartitioner
