"""BatchNorm and activations behind a layer that stays in float stay there with it.

Between the two the output would be rounded on a grid of its own, and that of a layer before its ReLU6 is wide: the layer would lose more by
leaving int8 than it gains.
"""

import copy
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from qat_lightning.flows.clipping import BATCH_NORMS, limits_of_node
from qat_lightning.plan import STATIC_LAYERS, Plan

# As modules, whose names a qconfig mapping can tell apart.
ACTIVATIONS: dict[Any, type[nn.Module]] = {
    F.hardswish: nn.Hardswish,
    F.hardsigmoid: nn.Hardsigmoid,
    F.silu: nn.SiLU,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    "tanh": nn.Tanh,
}
ACTIVATION_TYPES = (nn.Hardtanh, nn.ELU, nn.LeakyReLU, nn.GELU, nn.Mish, *ACTIVATIONS.values())


def followers(module: fx.GraphModule, plan: Plan) -> list[str]:
    """Return the names of the modules that stay in float with the layer in front of them.

    Args:
        module: the traced float module; functional activations behind such layers become modules.
        plan: names what stays in float.
    """
    names = []
    for node in list(module.graph.nodes):
        if node.op != "call_module" or node.target not in plan.float_modules:
            continue
        if not isinstance(module.get_submodule(node.target), STATIC_LAYERS):
            continue
        while (follower := _follower(module, node)) is not None:
            node = follower
            names.append(str(node.target))
    module.recompile()
    return names


def _follower(module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """Return the node of an activation or BatchNorm that alone takes the output of ``node``, as a module that is called once."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    called = module.get_submodule(str(user.target)) if user.op == "call_module" else None
    if called is None:
        if (limits := limits_of_node(module, user)) is not None:
            return _replaced(module, user, nn.Hardtanh(*limits))
        return _replaced(module, user, ACTIVATIONS[user.target]()) if user.target in ACTIVATIONS else None
    calls = sum(node.op == "call_module" and node.target == user.target for node in module.graph.nodes)
    if calls == 1:
        return user if isinstance(called, (*ACTIVATION_TYPES, *BATCH_NORMS)) else None
    # Other layers share it.
    return _replaced(module, user, copy.deepcopy(called)) if isinstance(called, ACTIVATION_TYPES) else None


def _replaced(module: fx.GraphModule, node: fx.Node, activation: nn.Module) -> fx.Node:
    name = f"{node.name}_in_float"
    module.add_submodule(name, activation.train(module.training))
    with module.graph.inserting_after(node):
        replacement = module.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
    node.replace_all_uses_with(replacement)
    module.graph.erase_node(node)
    return replacement
