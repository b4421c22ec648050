"""Runs a model in OpenVINO, with kernels for the sizes that its inputs have.

OpenVINO takes less time for a model whose sizes are fixed: 0.92 of it on two small networks, 0.95 on MobileNetV3-small, with one image
(AMD EPYC with AVX2). So a model that takes any batch is compiled anew for each of the first sizes it is called with.
"""

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qat_lightning.backend import exact_products
from qat_lightning.openvino_graph import round_in_kernels
from qat_lightning.openvino_kernels import depthwise_on_real_numbers, linear_as_convolutions
from qat_lightning.program.execution import Run

FIXED_SIZES = 4
"""How many sizes get kernels of their own; each holds its weights once more."""

Shapes: TypeAlias = tuple[tuple[int, ...], ...]


def open_openvino(content: bytes, threads: int) -> Run:
    """Return a function that runs an ONNX model with QDQ nodes.

    Args:
        content: of the file.
        threads: at most.
    """
    import openvino

    core = openvino.Core()
    return run_with_fixed_sizes(core, core.read_model(content), threads)


def run_with_fixed_sizes(core: Any, graph: Any, threads: int) -> Run:
    """Return a function that compiles a model at the first call with a size, and from the fifth size on for all other sizes at once.

    Args:
        core: an ``openvino.Core``.
        graph: an ``openvino.Model`` as it was read; it is changed.
        threads: at most.
    """
    if not exact_products(8):
        linear_as_convolutions(graph)
    round_in_kernels(graph)
    fixed: dict[Shapes, Run] = {}
    for_any_size = functools.cache(lambda: compile_openvino(core, graph, threads))

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        if shapes not in fixed and len(fixed) < FIXED_SIZES and _takes(graph, shapes):
            fixed[shapes] = compile_openvino(core, _with_sizes(graph, shapes), threads)
        chosen = fixed[shapes] if shapes in fixed else for_any_size()
        return chosen(tensors)

    return run


def compile_openvino(core: Any, graph: Any, threads: int) -> Run:
    """Return a function that runs a model as it is.

    Args:
        core: an ``openvino.Core``.
        graph: an ``openvino.Model``.
        threads: at most.
    """
    import openvino

    # Without the first, processors with AMX compute in bfloat16 what is not int8.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    count = len(request.model_outputs)

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        arrays = [tensor.contiguous().numpy() for tensor in tensors]  # OpenVINO holds their memory, and not them
        for index, array in enumerate(arrays):  # given to ``infer``, they cost 0.15 ms more
            request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
        request.infer()
        # Copied: the next call writes into the same memory.
        return tuple(torch.from_numpy(request.get_output_tensor(index).data.copy()) for index in range(count))

    return run


def _takes(graph: Any, shapes: Shapes) -> bool:
    """Return whether the inputs may have these sizes; where not, OpenVINO says why when it is called."""
    import openvino

    inputs = graph.inputs
    return len(inputs) == len(shapes) and all(
        one.get_partial_shape().compatible(openvino.PartialShape(list(shape))) for one, shape in zip(inputs, shapes, strict=True)
    )


def _with_sizes(graph: Any, shapes: Shapes) -> Any:
    """Return a copy of a model whose inputs have these sizes, with kernels that are faster for them."""
    copied = graph.clone()
    copied.reshape({index: list(shape) for index, shape in enumerate(shapes)})
    if not exact_products(8) and depthwise_on_real_numbers(copied):
        round_in_kernels(copied)
    return copied
