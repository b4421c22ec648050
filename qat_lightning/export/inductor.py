"""int8 models compiled for this machine by Inductor, whose passes for x86 come from torchao (https://github.com/pytorch/ao)."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat_lightning.affine import widest_weight
from qat_lightning.backend import exact_products
from qat_lightning.deprecation import silence
from qat_lightning.errors import ConfigurationError
from qat_lightning.export.packages import importing
from qat_lightning.export.reference import ReferenceModule, reference_of
from qat_lightning.program.execution import Run

if TYPE_CHECKING:
    from qat_lightning.serving import ServedModel

Compiled = Callable[..., tuple[Tensor, ...]]


def compile_int8(module: nn.Module, example: Any = None) -> "ServedModel":
    """Return an int8 module compiled by ``torch.compile``, its layers on oneDNN's int8 kernels.

    It compiles for the sizes of the example at once, which takes half a minute, and for others when they come. On processors without VNNI
    it warns of a model without ``weight_bits=7``, whose sums overflow there.

    Args:
        module: from :func:`convert` or ``QuantizationCallback.quantized_module``, quantized statically with any flow.
        example: inputs of the module: a tensor, a tuple of positional or a mapping of keyword arguments. None: one sample of the size that
            the module was calibrated with.

    Returns:
        a function that takes what the module took. Sums may be rounded to the neighbouring step where the module rounds to the other.

    Raises:
        ConfigurationError: torchao is missing or does not fit this torch, there is no C++ compiler, the module is not int8, or nobody saw
            a call of it.
        UnsupportedModelError: names the operator that cannot be compiled.
    """
    from qat_lightning.recorded import record_program
    from qat_lightning.serving import ServedModel

    _register_passes()
    recorded = record_program(module, example, quantized=True)
    run = _by_size(reference_of(recorded.program, recorded.weights, recorded.tensors, signed=False))
    run(recorded.tensors)
    if not exact_products(widest_weight(recorded.weights)):
        warnings.warn(
            "The int8 kernels of Inductor overflow on this CPU, which has none of VNNI and AMX: outputs may be wrong. Quantize with "
            "weight_bits=7 for it.",
            stacklevel=2,
        )
    return ServedModel(recorded.program, run, "inductor", recorded.entry)


def _register_passes() -> None:
    """Import what tells Inductor of int8 kernels."""
    with importing("torchao", "inductor", "Compiled int8", "https://github.com/pytorch/ao/issues/2919"):
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer  # noqa: F401


def _by_size(reference: ReferenceModule) -> Run:
    """Return a function that compiles once for each size of its inputs."""
    compiled: dict[tuple[torch.Size, ...], Compiled] = {}

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        sizes = tuple(tensor.shape for tensor in tensors)
        # Graphs for inference mode are others.
        with torch.inference_mode(mode=False), torch.no_grad():
            if sizes not in compiled:
                compiled[sizes] = _compile(reference, tensors)
            return compiled[sizes](*tensors)

    return run


def _compile(reference: ReferenceModule, tensors: Sequence[Tensor]) -> Compiled:
    from torch._dynamo.exc import BackendCompilerFailed  # takes seconds to import

    # freezing: weights become constants, which the kernels get in their own layout. As an option of torch.compile it comes too late.
    with silence(), torch._inductor.config.patch(freezing=True):
        exported = torch.export.export(reference, tuple(tensors)).module()
        compiled: Compiled = torch.compile(exported, dynamic=False)
        try:
            compiled(*tensors)
        except BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigurationError(f"torch.compile fails here, it needs a C++ compiler such as g++: {reason}.") from error
    return compiled
