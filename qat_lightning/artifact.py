"""Saves and loads an int8 model: a folder with its weights and a manifest in JSON. Nothing in it is code."""

import hashlib
import inspect
import math
import re
import warnings
from pathlib import Path
from typing import TypeVar, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import qat_lightning
from qat_lightning.backend import this_cpu
from qat_lightning.core import convert_planned, inputs_of, int8_plan_of, prepare_planned, record_inputs
from qat_lightning.decoding import shown
from qat_lightning.deprecation import quiet
from qat_lightning.errors import ArtifactError
from qat_lightning.files import read_regular, write_atomically
from qat_lightning.flows import Flow, get_flow
from qat_lightning.manifest import FileEntry, Manifest, TargetEntry, is_manifest, weights_name
from qat_lightning.plan import DYNAMIC_LAYERS, STATIC_LAYERS, Plan
from qat_lightning.portability import differences, engine_notes, fit_to_machine
from qat_lightning.recipe import DynamicPTQ
from qat_lightning.report import Report
from qat_lightning.targets import already
from qat_lightning.tensors import check_grids, check_same_layout, from_plain, to_plain

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 4_000_000
# A channel of one float weight becomes an integer, a scale, a zero point and a bias: 25 bytes for 4. The room is for the header.
EXPANSION = 8
ROOM = 16_000_000
# Names that save_quantized gives, while it writes and after.
OWN_NAMES = re.compile(r"(manifest\.json|weights-[0-9a-f]{16}\.safetensors|\.(manifest\.json|weights-[0-9a-f]{16}\.safetensors)\.\w{8})")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def save_quantized(module: nn.Module, folder: str | Path, report: Report | None = None) -> Path:
    """Write an int8 model to ``folder``; a kill at any moment leaves the artifact that was there, or the new one.

    Args:
        module: ``QuantizationCallback.quantized_module``, or any module with int8 submodules from :func:`convert`.
        folder: is made where there is none; of an artifact, the files are replaced and others are left alone.
        report: e.g. ``QuantizationCallback.report``, whose figures the manifest keeps.

    Returns:
        the folder.

    Raises:
        ArtifactError: the module is not quantized or has state besides tensors, or ``folder`` exists and is no artifact.
    """
    folder = Path(folder)
    _, targets = already(module)
    if not targets:
        raise ArtifactError(f"{type(module).__name__} holds no int8 module: save `callback.quantized_module` after `trainer.fit`.")
    refuse_foreign(folder)
    with quiet():
        weights = _serialize(to_plain(_flow_of(targets).portable_state(module)))
    manifest = _describe(targets, weights, report)
    text, (weights_file, _) = manifest.to_json(), manifest.weights
    # The manifest last: until it is replaced, it names the old weights, which are still there.
    write_atomically(folder / weights_file, weights)
    write_atomically(folder / MANIFEST, text)
    _remove_leftovers(folder, keep=weights_file)
    return folder


def load_quantized(folder: str | Path, model: ModuleT) -> ModuleT:
    """Return ``model`` with its structure swapped for int8 and the weights of ``folder``.

    Nothing in the folder is trusted or unpickled. A warning tells of another CPU or torch than the model was saved with, of engines
    that this machine lacks, and of kernels that overflow here.

    Args:
        folder: from :func:`save_quantized`.
        model: a fresh float model of the class that was quantized; it is used up.

    Raises:
        ArtifactError: a folder that is missing, incomplete, altered, of another format, or does not fit ``model``.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    weights = _read_weights(folder, manifest, model)
    kind = type(model).__name__
    notes = differences(manifest)
    model.cpu().eval()
    for name, entry in manifest.targets.items():
        target = _find_target(model, name, entry.plan, folder)
        plan = fit_to_machine(entry.plan, target)
        notes += engine_notes(entry.plan, plan, target)
        int8 = _rebuild(target, plan, folder)
        record_inputs(int8, entry.inputs)
        if name:
            model.set_submodule(name, int8)
        else:
            model = cast(ModuleT, int8)
    _load_weights(weights, model, folder, kind)
    for note in notes:
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    return model.eval()


# --- saving ------------------------------------------------------------------------------------------------------------------


def refuse_foreign(folder: Path) -> None:
    """Refuse to write into anything that is neither an artifact, nor empty, nor what a kill left of a first save.

    Args:
        folder: for :func:`save_quantized`.

    Raises:
        ArtifactError: it holds what is not ours.
    """
    if not folder.exists():
        return
    try:
        ours = is_manifest(read_regular(folder / MANIFEST, MANIFEST_LIMIT))
    except FileNotFoundError:
        ours = all(OWN_NAMES.fullmatch(path.name) for path in folder.iterdir())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ArtifactError(f"{folder} exists and is no saved int8 model: it is not overwritten. Choose another folder.")


def _serialize(plain: dict[str, Tensor]) -> bytes:
    # Copies, because the format knows no two tensors with the same memory.
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in plain.items()}
    try:
        return safetensors.torch.save(copies)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"The weights cannot be written as safetensors: {error!r}. Keep such tensors out of the state dict.") from error


def _describe(targets: dict[str, nn.Module], weights: bytes, report: Report | None) -> Manifest:
    sha256 = hashlib.sha256(weights).hexdigest()
    figures = report.scalars() if report is not None else {}
    return Manifest(
        package=qat_lightning.__version__,
        torch=torch.__version__,
        cpu=this_cpu(),
        targets={name: TargetEntry(_plan_of(target), inputs_of(target)) for name, target in targets.items()},
        metrics={name: figure for name, figure in figures.items() if math.isfinite(figure)},
        files={weights_name(sha256): FileEntry(sha256, len(weights))},
    )


def _remove_leftovers(folder: Path, keep: str) -> None:
    """Remove older weights, and what a kill has left."""
    for path in folder.iterdir():
        if OWN_NAMES.fullmatch(path.name) and path.name not in (MANIFEST, keep) and not path.is_dir():
            path.unlink(missing_ok=True)


# --- loading -----------------------------------------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    try:
        return Manifest.from_json(read_regular(path, MANIFEST_LIMIT))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is no int8 model saved by save_quantized, or an incomplete one.") from None
    except (ArtifactError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be used: {error}") from error


def _read_weights(folder: Path, manifest: Manifest, model: nn.Module) -> bytes:
    """Return the content of the weights, which is that of the manifest and no more than a model of this size needs."""
    name, entry = manifest.weights
    limit = ROOM + EXPANSION * sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    try:
        content = read_regular(folder / name, limit)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {name}: the artifact is incomplete. Copy it anew from where it was saved.") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{folder / name} cannot be used: {error}") from error
    if len(content) != entry.bytes or hashlib.sha256(content).hexdigest() != entry.sha256:
        raise ArtifactError(
            f"{folder / name} is not the file that {MANIFEST} describes ({entry.bytes} bytes, SHA-256 {entry.sha256[:16]}...): it is "
            f"truncated or altered. Copy it anew from where it was saved."
        )
    return content


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
