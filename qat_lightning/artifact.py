"""Saves and loads an int8 model: a folder with its weights and a manifest in JSON. Nothing in it is code."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_lightning.backend import check_backend, cpu_name
from qat_lightning.core import convert_planned, int8_plan_of, prepare_planned
from qat_lightning.deprecation import quiet
from qat_lightning.errors import ArtifactError
from qat_lightning.flows import Flow, get_flow
from qat_lightning.plan import Plan
from qat_lightning.recipe import DynamicPTQ
from qat_lightning.targets import already

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.pt"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def save_quantized(module: nn.Module, folder: str | Path) -> Path:
    """Write an int8 model to ``folder``, whole or not at all.

    Args:
        module: ``QuantizationCallback.quantized_module``, or any module with int8 submodules from :func:`convert`.
        folder: is made or replaced.

    Returns:
        the folder.

    Raises:
        ArtifactError: the module is not quantized, or ``folder`` exists and is no artifact.
    """
    folder = Path(folder)
    _, targets = already(module)
    if not targets:
        raise ArtifactError(f"{type(module).__name__} holds no int8 module: save `callback.quantized_module` after `trainer.fit`.")
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST).is_file())):
        raise ArtifactError(f"{folder} exists and is no saved int8 model: it is not overwritten. Choose another folder.")
    manifest = {
        "format": FORMAT,
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "targets": {name: _plan_of(target).to_dict() for name, target in targets.items()},
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        staging.chmod(0o755)
        with quiet():
            torch.save(_flow_of(targets).portable_state(module), staging / WEIGHTS)
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return folder


def load_quantized(folder: str | Path, model: ModuleT) -> ModuleT:
    """Return ``model`` with its structure swapped for int8 and the weights of ``folder``.

    Args:
        folder: from :func:`save_quantized`.
        model: a fresh float model of the class that was quantized; it is used up.

    Raises:
        ArtifactError: a folder that is missing, incomplete, of a newer format, or does not fit ``model``.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    model.cpu().eval()
    for name, values in manifest["targets"].items():
        plan = _read_plan(values, folder)
        check_backend(plan.backend)
        if name not in dict(model.named_modules()):
            raise ArtifactError(f"{folder} was saved from a model with a submodule {name!r}, which {type(model).__name__} does not have.")
        int8 = _rebuild(model.get_submodule(name), plan, folder)
        if name:
            model.set_submodule(name, int8)
        else:
            return _load_weights(folder, cast(ModuleT, int8), type(model).__name__).eval()
    return _load_weights(folder, model, type(model).__name__).eval()


def _rebuild(target: nn.Module, plan: Plan, folder: Path) -> nn.Module:
    """Return the int8 structure of a float module, its weights yet to be loaded."""
    try:
        return convert_planned(target if plan.recipe == DynamicPTQ.name else prepare_planned(target, plan), plan)
    except Exception as error:  # torch.ao raises whatever it stumbles over in a module of another class
        raise ArtifactError(f"{folder} was saved from another model than {type(target).__name__}: {error}") from error


def _load_weights(folder: Path, model: ModuleT, name: str) -> ModuleT:
    _, targets = already(model)
    try:
        with quiet():
            weights = torch.load(folder / WEIGHTS, weights_only=True, map_location="cpu")
            flow = _flow_of(targets)
            _check_shapes(flow.portable_state(model), weights)
            flow.load_portable_state(model, weights)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {WEIGHTS}: the artifact is incomplete.") from None
    except Exception as error:
        raise ArtifactError(f"The weights in {folder} do not fit {name}: {error}") from error
    for target in targets.values():
        plan = _plan_of(target)
        get_flow(plan.flow).pack(target, plan)
    return model


def _check_shapes(expected: dict[str, Any], weights: dict[str, Any]) -> None:
    """Packed weights take any shape; compare them here, as ``load_state_dict`` compares others."""
    for key, value in expected.items():
        shapes = [
            [tuple(leaf.shape) for leaf in pytree.tree_leaves(side) if isinstance(leaf, Tensor)] for side in (value, weights.get(key))
        ]
        # Scales of a layer start as single numbers and are saved so.
        if key in weights and shapes[0] != shapes[1] and any(len(shape) > 1 for shape in shapes[0]):
            raise RuntimeError(f"size mismatch for {key}: the artifact has {shapes[1]}, the model {shapes[0]}")


def _read_plan(values: Any, folder: Path) -> Plan:
    try:
        return Plan.from_dict(values)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{folder / MANIFEST} describes no plan that this version reads: {error!r}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is no int8 model saved by save_quantized.") from None
    except ValueError as error:
        raise ArtifactError(f"{folder / MANIFEST} is no JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("targets"), dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{folder / MANIFEST} is not of format {FORMAT}, the one this version of qat_lightning reads.")
    return manifest


def _flow_of(targets: dict[str, nn.Module]) -> Flow:
    return get_flow(_plan_of(next(iter(targets.values()))).flow)


def _plan_of(target: nn.Module) -> Plan:
    plan = int8_plan_of(target)
    assert plan is not None
    return plan


def _replace(staging: Path, folder: Path) -> None:
    """Put ``staging`` in the place of ``folder``; the old one is moved aside first, and back if that fails."""
    if not folder.exists():
        staging.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    folder.rename(aside / "old")
    try:
        staging.rename(folder)
    except BaseException:
        (aside / "old").rename(folder)
        raise
    shutil.rmtree(aside)
