"""An int8 model without its class, run by whichever runtime is fastest on this machine."""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qat_lightning.affine import weight_bits, widest_weight
from qat_lightning.backend import Kernel, LayerShape, cpu_name
from qat_lightning.core import as_call
from qat_lightning.errors import ArtifactError
from qat_lightning.files import write_atomically
from qat_lightning.folder import MANIFEST, read_file
from qat_lightning.input_spec import InputSpec
from qat_lightning.manifest import Manifest
from qat_lightning.plan import Call, LayerPlan
from qat_lightning.portability import differences, engine_notes, fit_to_machine
from qat_lightning.program.calling import check_structure, example_tensors, nested, tensors_of
from qat_lightning.program.execution import Run, compile_program
from qat_lightning.program.nodes import PackedLayer, Program
from qat_lightning.runtimes import RuntimeName, Timing, installed_runtimes, measure, open_onnx, require_runtime, saturates
from qat_lightning.tensors import check_grids

log = logging.getLogger(__name__)

AUTO = "auto"
MOST_TIMINGS = 15


class ServedModel:
    """An int8 model that needs no code of its training: call it as the model was called.

    Args:
        program: what it takes and gives.
        run: runs it on tensors.
        runtime: name of what runs it.
        entry: name of the submodule that it computes in the model that was saved; empty for the model itself.
    """

    def __init__(self, program: Program, run: Run, runtime: str, entry: str) -> None:
        self._program, self._run = program, run
        self.runtime, self.entry = runtime, entry

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What it is called with: names, dtypes and shapes, None for a size that may vary."""
        return self._program.inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the int8 model gives.

        Raises:
            ConfigurationError: names the argument that does not fit.
        """
        tensors = tensors_of(Call(args, kwargs), self._program.inputs, self._program.fixed)
        with torch.inference_mode():
            return nested(self._program.structure, self._run(tensors))

    def __repr__(self) -> str:
        """Return runtime and inputs."""
        inputs = ", ".join(f"{spec.name}: {spec.dtype}{list(spec.shape or ())}" for spec in self.inputs).replace("None", "*")
        return f"ServedModel(runtime={self.runtime!r}, {inputs})"


def open_served(folder: Path, manifest: Manifest, runtime: str, example: Any) -> ServedModel:
    """Return the model of an artifact, run by a runtime.

    Args:
        folder: of the artifact.
        manifest: of the artifact.
        runtime: name of the runtime, or ``"auto"`` for the fastest of those that are installed and compute it right on this processor.
        example: what ``"auto"`` times; None: one sample of the size that the model was called with.

    Raises:
        ArtifactError: the folder has no program for the runtime, or a file that is missing, altered or forged.
        ConfigurationError: the runtime is not installed, or the example does not fit.
        ValueError: no runtime has that name.
    """
    chosen = None if runtime == AUTO else require_runtime(runtime)
    program, weights = _read_program(folder, manifest)
    program, notes = _fitted(program, manifest, weights)
    bits = widest_weight(weights)
    for note in [*differences(manifest), *notes]:
        warnings.warn(f"{folder}: {note}", stacklevel=3)
    if chosen is None:
        chosen, run = _fastest(folder, manifest, program, weights, bits, example)
    else:
        run = _open(folder, manifest, program, weights, bits, chosen)
        if saturates(chosen, bits):
            warnings.warn(
                f"{folder}: the int8 kernels of {chosen} overflow on this CPU, which has none of VNNI and AMX: its outputs may be wrong. "
                f'Use runtime="onnxruntime", runtime="torch" or runtime="auto", which does not, or quantize with weight_bits=7.',
                stacklevel=3,
            )
    return ServedModel(program, run, chosen, manifest.entry)


def _read_program(folder: Path, manifest: Manifest) -> tuple[Program, dict[str, Tensor]]:
    """Return torch's program and the weights it names, relative to the submodule that it computes."""
    found = manifest.file("program")
    if found is None:
        raise ArtifactError(
            f"{folder} holds weights alone: load it with its class, load_quantized(folder, model), or save it anew with an `example` of "
            f"its inputs."
        )
    try:
        program = Program.from_json(read_file(folder, *found))
        check_structure(program.structure, len(program.outputs))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / found[0]} cannot be used: {error}") from error
    prefix = f"{manifest.entry}." if manifest.entry else ""
    try:
        weights = safetensors.torch.load(read_file(folder, *manifest.weights))
        check_grids(weights)
    except Exception as error:  # safetensors raises whatever it stumbles over
        raise error if isinstance(error, ArtifactError) else ArtifactError(f"The weights in {folder} cannot be used: {error}") from error
    return program, {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _fitted(program: Program, manifest: Manifest, weights: Mapping[str, Tensor]) -> tuple[Program, list[str]]:
    """Return the program with other engines where this machine lacks those it names, and warnings."""
    own = next(iter(manifest.targets.values())).plan
    layers = {name: _plan_of(layer, weights) for name, layer in program.layers.items()}
    shapes = {name: _shape(layer, weights) for name, layer in program.layers.items()}
    plan = replace(own, layers=layers)
    fitted = fit_to_machine(plan, shapes)
    moved = {name: replace(layer, engine=fitted.layers[name].kernel.engine) for name, layer in program.layers.items()}
    return replace(program, layers=moved), engine_notes(plan, fitted, shapes)


def _plan_of(layer: PackedLayer, weights: Mapping[str, Tensor]) -> LayerPlan:
    scale, integers = weights.get(f"{layer.weight}.scale"), weights.get(f"{layer.weight}.int8")
    bits = 8 if integers is None else weight_bits(integers)
    return LayerPlan(Kernel(layer.engine, layer.activation_bits, bits), per_channel=scale is not None and scale.dim() > 0)


def _shape(layer: PackedLayer, weights: Mapping[str, Tensor]) -> LayerShape | None:
    """Return what decides which kernel runs a layer; None where its weights are missing, which packing will tell."""
    weight = weights.get(f"{layer.weight}.int8")
    if weight is None or weight.dim() < 2:
        return None
    if layer.kind.startswith("linear"):
        return LayerShape("linear", weight.shape[1], weight.shape[0])
    geometry = {"groups": layer.groups, "stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return LayerShape("conv", weight.shape[1] * layer.groups, weight.shape[0], tuple(weight.shape[2:]), **geometry)  # type: ignore[arg-type]


def _open(folder: Path, manifest: Manifest, program: Program, weights: Mapping[str, Tensor], bits: int, runtime: RuntimeName) -> Run:
    if runtime == "torch":
        try:
            return compile_program(program, weights)
        except ValueError as error:
            raise ArtifactError(f"The program in {folder} cannot run: {error}") from error
    found = manifest.file("model")
    if found is None:
        raise ArtifactError(
            f'{folder} holds no ONNX model, which {runtime} needs: use runtime="torch", or save it anew with the package onnx.'
        )
    try:
        return open_onnx(runtime, read_file(folder, *found), bits=bits)
    except ArtifactError:
        raise
    except Exception as error:  # runtimes raise types of their own
        raise ArtifactError(f"{folder / found[0]} cannot be opened by {runtime}: {error}") from error


def _fastest(
    folder: Path, manifest: Manifest, program: Program, weights: Mapping[str, Tensor], bits: int, example: Any
) -> tuple[RuntimeName, Run]:
    """Return the fastest runtime; what was timed on this machine before, with inputs of this size, is not timed again."""
    tensors = example_tensors(program.inputs) if example is None else tensors_of(as_call(example), program.inputs, program.fixed)
    candidates: list[RuntimeName] = [
        name for name in installed_runtimes() if name == "torch" or (manifest.file("model") is not None and not saturates(name, bits))
    ]
    machine, shapes = f"{cpu_name()}, {' '.join(candidates)}", tuple(tuple(tensor.shape) for tensor in tensors)
    this_case = (machine, torch.get_num_threads(), shapes)
    known = [timing for timing in manifest.timings if (timing.machine, timing.threads, timing.shapes) == this_case]
    if known and (fastest := known[-1].fastest) in candidates:
        return fastest, _open(folder, manifest, program, weights, bits, fastest)
    runs = {name: _open(folder, manifest, program, weights, bits, name) for name in candidates}
    timing = Timing(*this_case, milliseconds=measure(runs, tensors))
    _keep(folder, manifest, timing)
    return timing.fastest, runs[timing.fastest]


def _keep(folder: Path, manifest: Manifest, timing: Timing) -> None:
    """Write what was measured to the manifest, where it can be written."""
    try:
        write_atomically(folder / MANIFEST, replace(manifest, timings=(*manifest.timings[-MOST_TIMINGS:], timing)).to_json())
    except OSError as error:
        log.info("The timings of the runtimes are not kept: %s", error)
