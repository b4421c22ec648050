"""ONNX export with QDQ nodes: int8 weights and the learned scales, for ONNX Runtime, OpenVINO and others.

The format is that of ONNX's operators QuantizeLinear and DequantizeLinear (https://onnx.ai/onnx/operators/), placed as
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html describes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError, UnsupportedModelError
from qat_lightning.export import layers, operations, shapes
from qat_lightning.export.describing import describe
from qat_lightning.export.graph import OnnxGraph, Value
from qat_lightning.export.padding import fold_padding
from qat_lightning.export.registry import find_translation
from qat_lightning.files import write_atomically
from qat_lightning.program.nodes import Program

__all__ = ["export_onnx", "layers", "operations", "program_to_onnx", "shapes"]

OPSET = 21
IR_VERSION = 10


def export_onnx(module: nn.Module, path: str | Path, example: Any = None) -> Path:
    """Write an int8 module to an ONNX file.

    Args:
        module: from :func:`convert` or ``QuantizationCallback.quantized_module``, quantized statically.
        path: of the file; it is replaced whole.
        example: inputs of the module: a tensor, a tuple of positional or a mapping of keyword arguments. None: what it was called with
            when it was calibrated. The first dimension of each input, and those that differed between calls, may vary.

    Returns:
        the path.

    Raises:
        ConfigurationError: the package ``onnx`` is missing, the module is not int8, or nobody saw a call of it.
        UnsupportedModelError: names the operator or layer that the file cannot carry.
    """
    from qat_lightning.recorded import record_program

    recorded = record_program(module, example, quantized=True)
    content = program_to_onnx(recorded.program, recorded.weights, recorded.tensors)
    write_atomically(Path(path), content)
    return Path(path)


def program_to_onnx(program: Program, weights: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> bytes:
    """Return a program as an ONNX model.

    Args:
        program: of a module that was quantized statically.
        weights: of the model by name.
        tensors: an example of its inputs.

    Raises:
        ConfigurationError: the package ``onnx`` is missing.
        UnsupportedModelError: names the operator or layer that the file cannot carry.
    """
    try:
        import onnx
    except ImportError:
        raise ConfigurationError('ONNX export needs the package onnx: pip install "qat-lightning[onnx]".') from None
    graph = OnnxGraph(program, {**weights, **program.constants}, describe(program, weights, tensors))
    for index, spec in enumerate(program.inputs):
        graph.values[index] = replace(graph.described[index], name=graph.fresh(_input_name(spec.name)))
    for node in program.nodes:
        translate = find_translation(node.op)
        if translate is None:
            raise UnsupportedModelError(
                f"ONNX export cannot carry the operator {node.op}: keep that part out of the module, or serve it with torch."
            )
        translate(graph, node, [graph.resolve(argument) for argument in node.args])
    model = _model(onnx, graph)
    onnx.checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    return content


def _model(onnx: Any, graph: OnnxGraph) -> Any:
    outputs = [_output(onnx, graph, number, index) for index, number in enumerate(graph.program.outputs)]
    fold_padding(graph, {output.name for output in outputs})
    inputs = [_info(onnx, graph.values[index]) for index in range(len(graph.program.inputs))]
    made = onnx.helper.make_graph(graph.nodes, "qat_lightning", inputs, outputs, graph.initializers)
    return onnx.helper.make_model(
        made, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qat_lightning"
    )


def _output(onnx: Any, graph: OnnxGraph, number: int, index: int) -> Any:
    """Return the description of an output, under a name of its own."""
    value = graph.values[number]
    name = graph.fresh(f"output{index}")
    graph.nodes.append(onnx.helper.make_node("Identity", [graph.real(value)], [name]))
    dtype = value.dtype if value.grid is None else torch.float32
    return _info(onnx, Value(name, value.shape, dtype), position=f"{name}_")


def _info(onnx: Any, value: Value, position: str = "") -> Any:
    shape = [
        "batch" if axis == 0 and size is None else f"{value.name}_{axis}" if size is None else size for axis, size in enumerate(value.shape)
    ]
    dtype = onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=value.dtype).numpy().dtype)
    return onnx.helper.make_tensor_value_info(value.name, dtype, shape)


def _input_name(name: str) -> str:
    """Return the name of an input: ``args[0]`` becomes ``args_0``."""
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_").replace("__", "_")
