"""How often another runtime rounds a layer otherwise than torch does, each layer alone: ``python -m benchmarks.rounding``.

    python -m benchmarks.rounding --net my_package.models:MyNet --data images --size 160 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5

Every int8 operator of the model gets the integers that torch has given it, in torch and in the other runtime. Where these differ, the exact
value that was rounded is computed in double precision: an integer kernel that multiplies its sum by a float32 has as much right to
round it up as another has to round it down if it lies within a few float32 roundings of the border between two steps.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import add_case_arguments, case_of, ours
from qat_lightning.export import program_to_onnx
from qat_lightning.export.graph import integers_and_scales
from qat_lightning.input_spec import InputSpec
from qat_lightning.program import compile_program
from qat_lightning.program.execution import quantized_weight, run_all
from qat_lightning.program.nodes import Node, Packed, Program, Ref, leaves
from qat_lightning.recorded import Recorded, record_program
from qat_lightning.runtimes import open_onnx, require_runtime


@dataclass(frozen=True)
class Difference:
    """Where two runtimes differ in one operator.

    Args:
        op: its name.
        elements: of its output.
        differing: of these.
        most_steps: that one of them differs by.
        border: largest distance of their exact values from the border between two steps, in steps; None where it was not computed.
    """

    op: str
    elements: int
    differing: int
    most_steps: int
    border: float | None


def measure(recorded: Recorded, tensors: Sequence[Tensor], runtime: str, bits: int) -> Iterator[Difference]:
    """Yield the difference of each int8 operator of a program."""
    program, weights = recorded.program, recorded.weights
    values = run_all(program, weights, tensors)
    for node in program.nodes:
        used = [leaf.value for leaf in leaves(node.args) if isinstance(leaf, Ref)]
        if used and all(value in values and values[value].is_quantized for value in [*used, node.outputs[0]]):
            inputs = {value: values[value] for value in used}
            yield _difference(program, weights, node, inputs, values[node.outputs[0]].q_scale(), runtime, bits)


def _difference(
    program: Program, weights: Mapping[str, Tensor], node: Node, inputs: Mapping[int, Tensor], scale: float, runtime: str, bits: int
) -> Difference:
    alone = _alone(program, node, inputs)
    tensors = [tensor.dequantize() for tensor in inputs.values()]
    (native,) = compile_program(alone, weights)(tensors)
    content = program_to_onnx(alone, weights, tensors)
    (other,) = open_onnx(require_runtime(runtime), content, bits=bits)(tensors)
    steps = ((other - native) / scale).round().abs()
    differing = steps > 0
    exact = _exact(program, weights, node, next(iter(inputs.values())))
    border = None if exact is None or not differing.any() else float(((exact / scale)[differing] % 1 - 0.5).abs().max())
    return Difference(node.op, steps.numel(), int(differing.sum()), int(steps.max()), border)


def _alone(program: Program, node: Node, inputs: Mapping[int, Tensor]) -> Program:
    """Return a program of one operator, from real numbers to real numbers."""
    count = len(inputs)
    quantize = [
        Node("aten::quantize_per_tensor", (Ref(index), tensor.q_scale(), tensor.q_zero_point(), 13), (count + index,))
        for index, tensor in enumerate(inputs.values())
    ]
    renamed = {value: count + index for index, value in enumerate(inputs)}
    nodes = [
        *quantize,
        Node(node.op, _renamed(node.args, renamed), (2 * count,)),
        Node("aten::dequantize.self", (Ref(2 * count),), (2 * count + 1,)),
    ]
    specs = tuple(InputSpec(f"args[{index}]", "float32", (None, *tensor.shape[1:])) for index, tensor in enumerate(inputs.values()))
    return replace(program, inputs=specs, nodes=tuple(nodes), outputs=(2 * count + 1,), structure=0)


def _renamed(argument: Any, names: Mapping[int, int]) -> Any:
    """Return an argument with other references."""
    if isinstance(argument, tuple):
        return tuple(_renamed(item, names) for item in argument)
    return Ref(names[argument.value]) if isinstance(argument, Ref) else argument


def _exact(program: Program, weights: Mapping[str, Tensor], node: Node, x: Tensor) -> Tensor | None:
    """Return what a convolution computes before it is rounded."""
    packed = next((argument for argument in node.args if isinstance(argument, Packed)), None)
    layer = None if packed is None else program.layers[packed.layer]
    if layer is None or not layer.kind.startswith("conv"):
        return None
    weight, scale = integers_and_scales(quantized_weight(weights, layer.weight))
    real = weight.double() * scale.double().reshape(-1, *[1] * (weight.dim() - 1))
    bias = None if layer.bias is None else weights[layer.bias].double()
    integers = (x.int_repr().double() - x.q_zero_point()) * x.q_scale()
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    convolved: Tensor = getattr(functional, layer.kind)(integers, real, bias, *geometry)
    return convolved


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--backend", default="x86")
    parser.add_argument("--runtime", default="onnxruntime")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=32, help="that go through the layers")
    chosen = parser.parse_args(arguments)
    case = case_of(chosen)
    recorded = record_program(ours(case, backend=chosen.backend, weight_bits=chosen.weight_bits))
    images = torch.cat(case.calibration)[: chosen.images]
    found = list(measure(recorded, [images], chosen.runtime, chosen.weight_bits))
    print("| operator | times | elements | that differ, per million | most steps | from the border at most |\n|---|---|---|---|---|---|")
    for op in dict.fromkeys(difference.op for difference in found):
        print(_row(op, [difference for difference in found if difference.op == op]))


def _row(op: str, those: Sequence[Difference]) -> str:
    elements, differing = sum(one.elements for one in those), sum(one.differing for one in those)
    borders = [one.border for one in those if one.border is not None]
    border = f"{max(borders):.1e}" if borders else ""
    return f"| {op} | {len(those)} | {elements} | {1e6 * differing / elements:.2f} | {max(one.most_steps for one in those)} | {border} |"


if __name__ == "__main__":
    main()
