"""Saves and loads an int8 model: a folder with its weights and a manifest in JSON. Nothing in it is code."""

import hashlib
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, overload

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import qat_lightning
from qat_lightning.backend import this_cpu
from qat_lightning.core import convert_planned, inputs_of, int8_plan_of, prepare_planned, record_inputs
from qat_lightning.decoding import shown
from qat_lightning.deprecation import quiet
from qat_lightning.errors import ArtifactError, ConfigurationError
from qat_lightning.flows import Flow, get_flow
from qat_lightning.folder import read_file, read_manifest, refuse_foreign, write_files
from qat_lightning.manifest import FileEntry, FileKind, Manifest, TargetEntry, file_name
from qat_lightning.plan import DYNAMIC_LAYERS, STATIC_LAYERS, Plan
from qat_lightning.portability import differences, engine_notes, fit_to_machine, shapes_in
from qat_lightning.recipe import DynamicPTQ
from qat_lightning.recorded import ProgramName, make_programs
from qat_lightning.report import Report
from qat_lightning.serving import AUTO, ServedModel, open_served
from qat_lightning.targets import already
from qat_lightning.tensors import check_grids, check_same_layout, from_plain, to_plain

# A channel of one float weight becomes an integer, a scale, a zero point and a bias: 25 bytes for 4. The room is for the header.
EXPANSION = 8
ROOM = 16_000_000
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def save_quantized(
    module: nn.Module,
    folder: str | Path,
    report: Report | None = None,
    example: Any = None,
    programs: Sequence[ProgramName] | None = None,
) -> Path:
    """Write an int8 model to ``folder``; a kill at any moment leaves the artifact that was there, or the new one.

    Args:
        module: ``QuantizationCallback.quantized_module``, or any module with int8 submodules from :func:`convert`.
        folder: is made where there is none; of an artifact, the files are replaced and others are left alone.
        report: e.g. ``QuantizationCallback.report``, whose figures the manifest keeps.
        example: inputs of ``module`` that programs are recorded with: a tensor, a tuple of positional or a mapping of keyword arguments.
            None: they compute the only int8 submodule, as it was called when it was calibrated.
        programs: what the folder holds to be loaded without the class of the module: ``"torch"`` for its own kernels, ``"onnx"`` for other
            runtimes, which needs the package ``onnx``. None: what can be made of it; a warning in the log says why one could not.

    Returns:
        the folder.

    Raises:
        ArtifactError: the module is not quantized or has state besides tensors, or ``folder`` exists and is no artifact.
        ConfigurationError: a program that is named cannot be made: nobody saw a call of the module, or a package is missing.
        UnsupportedModelError: a program that is named cannot hold the module; names the operator or the line.
        ValueError: no program has that name.
    """
    folder = Path(folder)
    _, targets = already(module)
    if not targets:
        raise ArtifactError(f"{type(module).__name__} holds no int8 module: save `callback.quantized_module` after `trainer.fit`.")
    refuse_foreign(folder)
    with quiet():
        weights = _serialize(to_plain(_flow_of(targets).portable_state(module)))
    entry, made = make_programs(module, example, programs)
    contents: dict[FileKind, bytes] = {"weights": weights, **made}
    files = {kind: FileEntry(hashlib.sha256(content).hexdigest(), len(content)) for kind, content in contents.items()}
    manifest = _describe(targets, files, entry, report)
    write_files(folder, manifest, {file_name(kind, files[kind].sha256): content for kind, content in contents.items()})
    return folder


@overload
def load_quantized(folder: str | Path, model: ModuleT) -> ModuleT: ...


@overload
def load_quantized(folder: str | Path, *, runtime: str = ..., example: Any = ...) -> ServedModel: ...


def load_quantized(folder: str | Path, model: ModuleT | None = None, *, runtime: str = AUTO, example: Any = None) -> ModuleT | ServedModel:
    """Return the int8 model of ``folder``: with its class a module, without it a function that a runtime of this machine computes.

    Nothing in the folder is trusted or unpickled. A warning tells of another CPU or torch than the model was saved with, of engines
    that this machine lacks, and of kernels that overflow here.

    Args:
        folder: from :func:`save_quantized`.
        model: a fresh float model of the class that was quantized; it is used up. None: the program is loaded, which needs no class.
        runtime: without ``model``: ``"torch"``, ``"onnxruntime"``, ``"openvino"``, or ``"auto"``, which times those that are installed,
            takes the fastest, and keeps the figures in the manifest for the next time. All use as many threads as torch does now.
        example: without ``model``: inputs of the size that ``"auto"`` is to time; None: one sample as the model was called.

    Returns:
        ``model`` with its structure swapped for int8, or a :class:`ServedModel`.

    Raises:
        ArtifactError: a folder that is missing, incomplete, altered, of another format, does not fit ``model``, or holds no program.
        ConfigurationError: a runtime that is not installed, or a setting that goes without ``model`` alone.
        ValueError: no runtime has that name.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if model is None:
        return open_served(folder, manifest, runtime, example)
    if runtime != AUTO or example is not None:
        raise ConfigurationError("`runtime` and `example` are for a model without its class: leave out `model`, or leave them out.")
    return _load_into(model, folder, manifest)


def _load_into(model: ModuleT, folder: Path, manifest: Manifest) -> ModuleT:
    """Return ``model`` with its structure swapped for int8 and the weights of ``folder``."""
    limit = ROOM + EXPANSION * sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    weights = read_file(folder, *manifest.weights, limit)
    kind = type(model).__name__
    notes = differences(manifest)
    model.cpu().eval()
    for name, entry in manifest.targets.items():
        target = _find_target(model, name, entry.plan, folder)
        shapes = shapes_in(target, entry.plan)
        plan = fit_to_machine(entry.plan, shapes)
        notes += engine_notes(entry.plan, plan, shapes)
        int8 = _rebuild(target, plan, folder)
        record_inputs(int8, entry.inputs)
        if name:
            model.set_submodule(name, int8)
        else:
            model = cast(ModuleT, int8)
    _load_weights(weights, model, folder, kind)
    for note in notes:
        warnings.warn(f"{folder}: {note}", stacklevel=3)
    return model.eval()


# --- saving ------------------------------------------------------------------------------------------------------------------


def _serialize(plain: dict[str, Tensor]) -> bytes:
    # Copies, because the format knows no two tensors with the same memory.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in plain.items()}
    try:
        return safetensors.torch.save(copies)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"The weights cannot be written as safetensors: {error!r}. Keep such tensors out of the state dict.") from error


def _describe(targets: dict[str, nn.Module], files: Mapping[FileKind, FileEntry], entry: str, report: Report | None) -> Manifest:
    figures = report.scalars() if report is not None else {}
    return Manifest(
        package=qat_lightning.__version__,
        torch=torch.__version__,
        cpu=this_cpu(),
        targets={name: TargetEntry(_plan_of(target), inputs_of(target)) for name, target in targets.items()},
        metrics={name: figure for name, figure in figures.items() if math.isfinite(figure)},
        files={file_name(kind, described.sha256): described for kind, described in files.items()},
        entry=entry,
        timings=(),
    )


# --- loading -----------------------------------------------------------------------------------------------------------------


def _find_target(model: nn.Module, name: str, plan: Plan, folder: Path) -> nn.Module:
    """Return the submodule that is to become int8, which has all that the plan names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ArtifactError(f"{folder} was saved from a model with a submodule {shown(name)}, which {type(model).__name__} does not have.")
    target: nn.Module = modules[name]
    try:
        _check_plan(plan, target)
    except ValueError as error:
        raise ArtifactError(f"{folder} was saved from another model than {type(target).__name__}: {error}.") from None
    return target


def _rebuild(target: nn.Module, plan: Plan, folder: Path) -> nn.Module:
    """Return the int8 structure of a float module, its weights yet to be loaded."""
    try:
        return convert_planned(target if plan.recipe == DynamicPTQ.name else prepare_planned(target, plan), plan)
    except Exception as error:  # torch.ao raises whatever it stumbles over in a module of another class
        raise ArtifactError(f"{folder} was saved from another model than {type(target).__name__}: {error!r}") from error


def _check_plan(plan: Plan, target: nn.Module) -> None:
    """Check that whatever a plan names exists.

    Raises:
        ValueError: names what does not.
    """
    modules = dict(target.named_modules(remove_duplicate=False))
    types = DYNAMIC_LAYERS if plan.recipe == DynamicPTQ.name else STATIC_LAYERS
    for name in plan.layers:
        if type(modules.get(name)) not in types:
            raise ValueError(f"it has no layer {shown(name)} that recipe {plan.recipe!r} quantizes")
    fused = [name for group in plan.fuse or () for name in group]
    for names in (plan.float_modules, fused):
        for name in names:
            if name not in modules:
                raise ValueError(f"it has no submodule {shown(name)}")
    if len({*plan.float_modules}) < len(plan.float_modules) or len({*fused}) < len(fused) or () in (plan.fuse or ()):
        raise ValueError("a module is named twice, or a group to fuse is empty")
    parameters = inspect.signature(target.forward).parameters
    for name in plan.constants:
        if name not in parameters or parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"its forward has no optional argument {shown(name)}")


def _load_weights(content: bytes, model: nn.Module, folder: Path, kind: str) -> None:
    """Check the weights and load them; ``kind`` is the class the user gave, for messages."""
    _, targets = already(model)
    flow = _flow_of(targets)
    try:
        with quiet():
            template = flow.portable_state(model)
            plain = safetensors.torch.load(content)
            check_same_layout(to_plain(template), plain)
            for name in targets:
                check_grids({key: tensor for key, tensor in plain.items() if key.startswith(f"{name}." if name else "")})
            for key, value in from_plain(template, plain).items():
                template[key] = value
            flow.load_portable_state(model, template)
        for target in targets.values():
            plan = _plan_of(target)
            get_flow(plan.flow).pack(target, plan)
    except Exception as error:  # torch raises whatever it stumbles over in values that no quantization gives
        raise ArtifactError(f"The weights in {folder} do not fit {kind}: {error}") from error


# --- both --------------------------------------------------------------------------------------------------------------------


def _flow_of(targets: dict[str, nn.Module]) -> Flow:
    return get_flow(_plan_of(next(iter(targets.values()))).flow)


def _plan_of(target: nn.Module) -> Plan:
    plan = int8_plan_of(target)
    assert plan is not None
    return plan
