"""A saved int8 model on another machine: what differs there, and which engines run it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn

from qat_lightning.backend import Kernel, LayerShape, fallback_engines, kernel_error, supported_backends, this_cpu
from qat_lightning.decoding import shown
from qat_lightning.errors import ArtifactError, shorten
from qat_lightning.manifest import Manifest
from qat_lightning.plan import LayerPlan, Plan
from qat_lightning.recipe import BACKENDS, BackendName, DynamicPTQ

Shapes: TypeAlias = Mapping[str, LayerShape | None]


def differences(manifest: Manifest) -> list[str]:
    """Return a warning where processor or torch are not those the model was saved with, else nothing."""
    here = this_cpu()
    pairs = {
        "CPU": (manifest.cpu.name, here.name),
        "instruction set of torch": (manifest.cpu.capability, here.capability),
        "CPU features": (" ".join(manifest.cpu.features), " ".join(here.features)),
        "torch": (manifest.torch, torch.__version__),
    }
    differing = [f"{what} {shown(there)} there, {own!r} here" for what, (there, own) in pairs.items() if there != own]
    if not differing:
        return []
    return [
        f"the int8 model was saved with another CPU or torch: {'; '.join(differing)}. Its outputs may differ from those there by a "
        f"quantization step a layer: measure its accuracy here, or convert it here."
    ]


def shapes_in(module: nn.Module, plan: Plan) -> Shapes:
    """Return the shape of each planned layer of a float module; None for one that the probe does not know."""
    return {name: LayerShape.of(module.get_submodule(name)) for name in plan.layers}


def fit_to_machine(plan: Plan, shapes: Shapes) -> Plan:
    """Return the plan with other engines where this machine lacks the planned ones.

    Args:
        plan: of the artifact.
        shapes: of its layers.

    Raises:
        ArtifactError: no engine of this machine computes a layer right.
    """
    layers = {name: replace(layer, kernel=_kernel(name, layer, _shape(plan, shapes, name))) for name, layer in plan.layers.items()}
    backend = plan.backend if plan.backend in supported_backends() else _by_preference(None)[0]
    return replace(plan, backend=backend, layers=layers)


def engine_notes(saved: Plan, fitted: Plan, shapes: Shapes) -> list[str]:
    """Return warnings of engines that were replaced, and of kernels that overflow on this machine.

    Args:
        saved: the plan of the artifact.
        fitted: what :func:`fit_to_machine` made of it.
        shapes: of its layers.
    """
    notes = []
    moved = [name for name, layer in saved.layers.items() if layer != fitted.layers[name]]
    if moved or saved.backend != fitted.backend:
        lacking = sorted({saved.backend, *(layer.kernel.engine for layer in saved.layers.values())} - {*supported_backends()})
        notes.append(
            f"the int8 model was saved for {', '.join(lacking)}, which this build of torch lacks: {_names(moved)} run on other engines. "
            f"Outputs may differ by a quantization step a layer: measure the accuracy, or convert it here with backend={fitted.backend!r}."
        )
    saturating = [name for name, layer in fitted.layers.items() if _saturates(layer, _shape(fitted, shapes, name))]
    if saturating:
        notes.append(
            f"the kernels of {_names(saturating)} overflow on this CPU with the engine and value range that the int8 model was saved "
            f"with: its outputs may be wrong. Convert it on this machine, on kernels that do not."
        )
    return notes


def _names(layers: list[str]) -> str:
    return shorten([repr(name) for name in layers]) or "functional layers"


def _kernel(name: str, layer: LayerPlan, shape: LayerShape | None) -> Kernel:
    if layer.kernel.engine in supported_backends():
        return layer.kernel
    for engine in _by_preference(shape):
        kernel = replace(layer.kernel, engine=engine)
        if shape is None or _error(replace(layer, kernel=kernel), shape) in (0, 1):
            return kernel
    raise ArtifactError(
        f"Layer {name!r} was saved for {layer.kernel.engine!r}, which this build of torch lacks, and none of {supported_backends()} "
        f"computes it with {layer.kernel.activation_bits}-bit inputs. Quantize the model on this machine."
    )


def _by_preference(shape: LayerShape | None) -> list[BackendName]:
    return [name for name in dict.fromkeys((*fallback_engines(shape), *BACKENDS)) if name in supported_backends()]


def _shape(plan: Plan, shapes: Shapes, name: str) -> LayerShape | None:
    # Dynamic kernels choose the range of their inputs themselves; the pt2e flow computes in float, where nothing overflows.
    return None if plan.recipe == DynamicPTQ.name or plan.flow == "pt2e" else shapes.get(name)


def _saturates(layer: LayerPlan, shape: LayerShape | None) -> bool:
    error = None if shape is None else _error(layer, shape)
    return error is not None and error > 1


def _error(layer: LayerPlan, shape: LayerShape) -> int | None:
    return kernel_error(layer.kernel, shape, layer.per_channel)
