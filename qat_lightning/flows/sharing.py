"""Layers that a graph calls several times: each call gets a module of its own, over the same parameters.

Torch's fuser and converter go by modules. Of a convolution that is called twice, they would fuse what follows one call into both, and
give both the output range of the first.
"""

import copy
import itertools
import re
from dataclasses import replace

from torch import fx, nn

from qat_lightning.plan import Plan

_SUFFIX = "_call"


def unshare(module: fx.GraphModule) -> None:
    """Give the second and every later call of a layer a copy that shares its parameters and buffers.

    Args:
        module: changed in place; its copies are named ``conv_call2``, ``conv_call3``, ... beside ``conv``.
    """
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op != "call_module" or not _has_own_range(module.get_submodule(node.target)):
            continue
        name = str(node.target)
        calls[name] = calls.get(name, 0) + 1
        if calls[name] > 1:
            taken = dict(module.named_modules())
            node.target = next(twin for number in itertools.count(calls[name]) if (twin := f"{name}{_SUFFIX}{number}") not in taken)
            module.add_submodule(node.target, _twin(module.get_submodule(name)))
    module.recompile()


def original(name: str) -> str:
    """Return the name of the layer that a module is, or is a copy of."""
    return re.sub(rf"{_SUFFIX}\d+$", "", name)


def with_copies(plan: Plan, module: nn.Module) -> Plan:
    """Return the plan with an entry for each copy in ``module`` of a layer or float module that it names."""
    copies = {name: original(name) for name, _ in module.named_modules() if original(name) != name}
    layers = {name: plan.layers[own] for name, own in copies.items() if own in plan.layers}
    floats = [name for name, own in copies.items() if own in plan.float_modules]
    return replace(plan, layers={**layers, **plan.layers}, float_modules=(*plan.float_modules, *floats))


def _has_own_range(module: nn.Module) -> bool:
    """Whether the module has tensors, is one whose int8 form keeps the range of its output, or a ReLU, which becomes part of a layer."""
    from torch.ao.quantization import get_default_static_quant_module_mappings  # names of copies are needed without torch.ao, too

    tensors = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
    return tensors or type(module) is nn.ReLU or type(module) in get_default_static_quant_module_mappings()


def _twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})
