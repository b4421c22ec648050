"""How far runtimes are from torch's int8 kernels on the same model and images: ``python -m benchmarks.runtimes``.

    python -m benchmarks.runtimes --net my_package.models:MyNet --data images --size 160 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --every 3

Quantizes with 256 training images and counts, for the test images, by how many steps of the output's grid the logits differ.
"""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy import Case, add_case_arguments, case_of, ours
from qat_lightning import compile_int8, export_executorch
from qat_lightning.export import program_to_onnx
from qat_lightning.program import compile_program
from qat_lightning.recorded import record_program
from qat_lightning.runtimes import Run, installed_runtimes, open_onnx


def output_scale(case: Case, int8: torch.nn.Module) -> float:
    """Return the size of a step of the logits: the smallest distance of two of them."""
    logits = int8(case.calibration[0])
    values = logits.unique()
    return float(values.diff().min())


def row(name: str, native: Tensor, other: Tensor, labels: Tensor, scale: float) -> str:
    """Return the row of a runtime."""
    steps = ((other - native) / scale).round().abs()
    same = (other.argmax(1) == native.argmax(1)).float().mean()
    within = (steps.amax(1) <= 1).float().mean()
    top1 = (other.argmax(1) == labels).float().mean()
    return f"| {name} | {int(steps.max())} | {steps.mean():.3f} | {100 * within:.1f} | {100 * same:.2f} | {100 * top1:.2f} |"


def open_executorch(int8: torch.nn.Module, image: Tensor) -> Run:
    """Return a function that runs an int8 module in ExecuTorch, image by image."""
    with tempfile.TemporaryDirectory() as folder:
        content = export_executorch(int8, Path(folder) / "model.pte", image).read_bytes()
    print(f"ExecuTorch: {len(content)} bytes", file=sys.stderr)
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(content)
    method = program.load_method("forward")

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        assert program is not None  # the method lives as long as its program
        return (torch.cat([method.execute([one[None]])[0].clone() for one in tensors[0]]),)

    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument("--backend", default="x86")
    parser.add_argument("--flow", default="fx")
    parser.add_argument("--compiled", action="store_true", help="also by Inductor, which takes a minute for each size of batches")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--onnx", type=Path, help="write the ONNX file here, too")
    chosen = parser.parse_args(arguments)
    case = case_of(chosen)
    int8 = ours(case, backend=chosen.backend, flow=chosen.flow, weight_bits=chosen.weight_bits)
    recorded = record_program(int8)
    content = program_to_onnx(recorded.program, recorded.weights, recorded.tensors)
    if chosen.onnx:
        chosen.onnx.write_bytes(content)
    runs: dict[str, Run] = {"torch": compile_program(recorded.program, recorded.weights)}
    runs |= {name: open_onnx(name, content, bits=chosen.weight_bits) for name in installed_runtimes() if name != "torch"}
    if importlib.util.find_spec("executorch") is not None:
        runs["executorch"] = open_executorch(int8, case.calibration[0][:1])
    if chosen.compiled:
        compiled = compile_int8(int8, case.calibration[0])
        runs["inductor"] = lambda tensors: (compiled(*tensors),)
    with torch.inference_mode():
        native, scale = case.run(int8, "native int8")[0], output_scale(case, int8)
        print("| runtime | most steps | mean steps | images within one step (%) | same top-1 (%) | top-1 |\n|---|---|---|---|---|---|")
        for name, run in runs.items():
            logits = case.run(lambda images, run=run: run([images])[0], name)[0]  # type: ignore[misc]
            print(row(name, native, logits, case.labels, scale))


if __name__ == "__main__":
    main()
