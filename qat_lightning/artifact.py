"""Saves and loads an int8 model: a folder with its weights and a manifest in JSON. Nothing in it is code."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qat_lightning.backend import check_backend, cpu_name
from qat_lightning.core import convert_planned, int8_plan_of, prepare_planned
from qat_lightning.deprecation import quiet
from qat_lightning.errors import ArtifactError
from qat_lightning.flows import get_flow
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
            torch.save(module.state_dict(), staging / WEIGHTS)
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
        plan = Plan.from_dict(values)
        check_backend(plan.backend)
        if name not in dict(model.named_modules()):
            raise ArtifactError(f"{folder} was saved from a model with a submodule {name!r}, which {type(model).__name__} does not have.")
        float_target = model.get_submodule(name)
        prepared = float_target if plan.recipe == DynamicPTQ.name else prepare_planned(float_target, plan)
        int8 = convert_planned(prepared, plan)
        if not name:
            model = int8  # type: ignore[assignment]
        else:
            model.set_submodule(name, int8)
    _load_weights(folder, model)
    return model.eval()


def _load_weights(folder: Path, model: nn.Module) -> None:
    try:
        with quiet():
            weights = torch.load(folder / WEIGHTS, weights_only=True, map_location="cpu")
            model.load_state_dict(weights)
    except FileNotFoundError:
        raise ArtifactError(f"{folder} has no {WEIGHTS}: the artifact is incomplete.") from None
    except Exception as error:
        raise ArtifactError(f"The weights in {folder} do not fit {type(model).__name__}: {error}") from error
    _, targets = already(model)
    for target in targets.values():
        plan = _plan_of(target)
        get_flow(plan.flow).pack(target, plan)


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
