"""BatchNorm layers that Lightning's ``sync_batchnorm`` replaces for the time of a fit, and never puts back as they were.

Its SyncBatchNorm lacks the hooks of the layer, by which the eager flow rounds the output; what it leaves behind after the fit is of
a class of its own, which torch.ao neither fuses nor converts.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_lightning.running import clone

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Return each BatchNorm by its name in ``module``."""
    return {name: child for name, child in module.named_modules(remove_duplicate=False) if isinstance(child, _BatchNorm)}


def pass_hooks_on(module: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Give what has replaced a BatchNorm the hooks of that layer.

    Args:
        module: whose layers have been replaced.
        originals: from :func:`batch_norms` before.
    """
    for name, child in _replaced(module, originals):
        vars(child).update({hooks: vars(originals[name])[hooks] for hooks in HOOKS})


def with_batch_norms(module: nn.Module, originals: Mapping[str, nn.Module]) -> nn.Module:
    """Return ``module`` where no BatchNorm has been replaced, else a copy in which they are put back."""
    if not _replaced(module, originals):
        return module
    module = clone(module)
    put_back(module, originals)
    return module


def put_back(module: nn.Module, originals: Mapping[str, nn.Module]) -> None:
    """Replace what has replaced a BatchNorm by a copy of that layer, with the parameters and buffers of today.

    Args:
        module: changed in place.
        originals: from :func:`batch_norms` before.
    """
    for name, child in _replaced(module, originals):
        layer = copy.deepcopy(originals[name])
        vars(layer).update(_parameters=child._parameters, _buffers=child._buffers, _modules=child._modules)
        module.set_submodule(name, layer.train(child.training))


def _replaced(module: nn.Module, originals: Mapping[str, nn.Module]) -> list[tuple[str, Any]]:
    return [(name, child) for name, child in batch_norms(module).items() if name in originals and type(child) is not type(originals[name])]
