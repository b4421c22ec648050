"""The classes of BatchNorm layers, which Lightning's ``sync_batchnorm`` replaces and torch.ao fuses and converts by.

During a fit each is a SyncBatchNorm, after it a class of Lightning's own that stands for every number of dimensions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.running import clone


def batch_norms(module: nn.Module) -> dict[str, type[nn.Module]]:
    """Return the class of each BatchNorm by its name in ``module``."""
    return {name: type(child) for name, child in module.named_modules(remove_duplicate=False) if isinstance(child, _BatchNorm)}


def with_batch_norms(module: nn.Module, classes: Mapping[str, type[nn.Module]]) -> nn.Module:
    """Return ``module`` where each BatchNorm has its class, else a copy where it has."""
    if batch_norms(module) == classes:
        return module
    module = clone(module)
    restore_batch_norms(module, classes)
    return module


def restore_batch_norms(module: nn.Module, classes: Mapping[str, type[nn.Module]]) -> None:
    """Give each BatchNorm its class back, which Lightning's ``sync_batchnorm`` has replaced: torch.ao fuses and converts by class.

    Args:
        module: changed in place; parameters and buffers stay the same tensors.
        classes: from :func:`batch_norms` of the module as it was.
    """
    for name, kind in classes.items():
        child: Any = module.get_submodule(name)
        if type(child) is not kind:
            module.set_submodule(name, _as(kind, child))


def _as(kind: Any, norm: Any) -> nn.Module:
    with torch.device("meta"):
        twin: nn.Module = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    vars(twin).update(_parameters=norm._parameters, _buffers=norm._buffers)
    if hasattr(norm, "qconfig"):
        vars(twin)["qconfig"] = norm.qconfig
    return twin.train(norm.training)
