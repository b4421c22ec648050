"""Records an int8 module as a program, and checks that the program computes the same bits."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from qat_lightning.backend import Kernel
from qat_lightning.core import as_call, example_of, inputs_of, int8_plan_of
from qat_lightning.deprecation import quiet
from qat_lightning.errors import ConfigurationError, UnsupportedModelError
from qat_lightning.export.onnx import program_to_onnx
from qat_lightning.flows import get_flow
from qat_lightning.flows.quantized_layers import as_quantized_tensors
from qat_lightning.manifest import FileKind
from qat_lightning.plan import Call
from qat_lightning.program.calling import FlatModule, describe_call
from qat_lightning.program.execution import Run, compile_program
from qat_lightning.program.nodes import Program
from qat_lightning.program.recording import record
from qat_lightning.recipe import BackendName, check_choice
from qat_lightning.signature import Signature
from qat_lightning.targets import already
from qat_lightning.tensors import to_plain

log = logging.getLogger(__name__)

ProgramName = Literal["torch", "onnx"]
PROGRAMS: tuple[ProgramName, ...] = get_args(ProgramName)


@dataclass(frozen=True)
class Recorded:
    """An int8 module as a program.

    Args:
        entry: name of the submodule that the program computes; empty for the module itself.
        program: what a call of it does.
        weights: of the submodule by name.
        tensors: an example of its inputs.
    """

    entry: str
    program: Program
    weights: Mapping[str, Tensor]
    tensors: Sequence[Tensor]


def record_program(module: nn.Module, example: Any = None, quantized: bool = False) -> Recorded:
    """Return an int8 module as a program that was checked to compute the same bits, also with another batch size.

    Args:
        module: holds int8 submodules, on the CPU in eval mode.
        example: inputs of the module: a tensor, a tuple of positional or a mapping of keyword arguments, or a :class:`Call`. None: the
            program computes the only int8 submodule, as it was called when it was calibrated.
        quantized: let the pt2e flow, whose integers are those of plain tensors, record torch's quantized tensors, as the others do.

    Raises:
        ConfigurationError: the module is not int8, or nobody saw a call of it.
        UnsupportedModelError: what a list of operators cannot hold.
    """
    entry, call, inputs = _entry(module, example)
    owner = module.get_submodule(entry)
    flow = get_flow(_plan(owner).flow)
    with quiet():
        weights = to_plain(flow.portable_state(owner))
    with as_quantized_tensors() if quantized else nullcontext():
        program = record(owner, call, _kernels(owner), inputs)
        checked = _checked(owner, program, weights, call)
    return Recorded(entry, checked, weights, FlatModule(owner, call).tensors)


def make_programs(module: nn.Module, example: Any, names: Sequence[ProgramName] | None) -> tuple[str, dict[FileKind, bytes]]:
    """Return the submodule that programs of an int8 module compute, and the content of their files.

    Args:
        module: as for :func:`record_program`.
        example: as for :func:`record_program`.
        names: which programs; None: those that can be made, and a warning in the log says why others cannot.

    Raises:
        ConfigurationError: a program that is named cannot be made of this module or on this machine.
        UnsupportedModelError: a program that is named cannot hold the module.
        ValueError: no program has that name.
    """
    for name in names or ():
        check_choice("programs", name, PROGRAMS)
    made: dict[FileKind, bytes] = {}
    if names is not None and not names:
        return "", made
    try:
        recorded = record_program(module, example)
        made["program"] = recorded.program.to_json().encode()
        if names is None or "onnx" in names:
            described = recorded if recorded.program.layers else record_program(module, example, quantized=True)
            made["model"] = program_to_onnx(described.program, described.weights, described.tensors)
    except (ConfigurationError, UnsupportedModelError) as error:
        if names is not None:
            raise
        missing = "an ONNX model" if made else "a program: it loads with its class alone"
        log.warning("The int8 model is saved without %s. %s", missing, error)
    return (recorded.entry if made else ""), made


def _entry(module: nn.Module, example: Any) -> tuple[str, Call, Signature | None]:
    """Return the submodule to record, a call of it, and what calls have in common."""
    _, targets = already(module)
    if not targets:
        raise ConfigurationError(f"{type(module).__name__} holds no int8 module: use what convert returned, or callback.quantized_module.")
    if example is not None:
        call = as_call(example)
        return "", call, describe_call(call)
    if len(targets) == 1:
        ((name, target),) = targets.items()
        kept = example_of(target)
        if kept is not None:
            return name, kept, inputs_of(target)
    own = module.example_input_array if isinstance(module, LightningModule) else None
    if own is None:
        raise ConfigurationError(f"Nobody has seen a call of {type(module).__name__}: give one with example=, e.g. example=images[:1].")
    call = as_call(own)
    return "", call, describe_call(call)


def _plan(owner: nn.Module) -> Any:
    _, targets = already(owner)
    plan = int8_plan_of(next(iter(targets.values())))
    assert plan is not None
    return plan


def _kernels(owner: nn.Module) -> dict[str, Kernel]:
    """Return the kernel of each packed layer by its name in ``owner``."""
    _, targets = already(owner)
    kernels: dict[str, Kernel] = {}
    for name, target in targets.items():
        plan = int8_plan_of(target)
        assert plan is not None
        for layer in get_flow(plan.flow).layers(target, plan):
            kernels[f"{name}.{layer.layer}".strip(".")] = Kernel(cast(BackendName, layer.engine), layer.activation_bits, layer.weight_bits)
    return kernels


def _checked(owner: nn.Module, program: Program, weights: Mapping[str, Tensor], call: Call) -> Program:
    """Return the program after comparing it with the module; sizes with which the module does not run are fixed.

    Raises:
        UnsupportedModelError: they differ.
    """
    flat = FlatModule(owner, call).eval()
    run = compile_program(program, weights)
    with torch.inference_mode(), quiet():
        _compare(flat, run, flat.tensors, owner)
        larger = [
            torch.cat([tensor, tensor]) if spec.shape and spec.shape[0] is None else tensor
            for tensor, spec in zip(flat.tensors, program.inputs, strict=True)
        ]
        try:
            flat(*larger)
        except (RuntimeError, ValueError):
            fixed = tuple(replace(spec, shape=tuple(tensor.shape)) for spec, tensor in zip(program.inputs, flat.tensors, strict=True))
            return replace(program, inputs=fixed)
        _compare(flat, run, larger, owner)
    return program


def _compare(flat: FlatModule, run: Run, tensors: Sequence[Tensor], owner: nn.Module) -> None:
    expected = flat(*tensors)
    try:
        same = all(torch.equal(one, other) for one, other in zip(expected, run(tensors), strict=True))
    except (RuntimeError, ValueError) as error:
        same, reason = False, str(error).strip().splitlines()[-1]
    else:
        reason = "its outputs differ"
    if not same:
        raise UnsupportedModelError(
            f"{type(owner).__name__} cannot be recorded: a list of its operators does not compute what it does with inputs of shapes "
            f"{[tuple(tensor.shape) for tensor in tensors]} ({reason}). Its forward may fix a size, or decide by a tensor in Python."
        )
