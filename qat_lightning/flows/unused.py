"""Layers that forward never calls: a graph has no node for them, yet checkpoints and optimizers of the float network know them."""

from torch import Tensor, fx, nn


def keep_unused(prepared: fx.GraphModule, module: nn.Module) -> None:
    """Give ``prepared`` the tensors of ``module`` that its graph has no use for, under their names.

    The graph gets a node for each: a copy of a graph has what its nodes name and nothing else.

    Args:
        prepared: made from ``module``, whose tensors it shares; changed in place.
        module: float.
    """
    known = {id(tensor) for tensor in prepared.state_dict(keep_vars=True).values()}
    spare = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    first = next(iter(prepared.graph.nodes))
    for name, tensor in spare.items():
        if id(tensor) not in known:
            _register(prepared, name, tensor)
            with prepared.graph.inserting_before(first):
                prepared.graph.get_attr(name)
    prepared.recompile()


def drop_unused(prepared: fx.GraphModule) -> None:
    """Undo :func:`keep_unused`: an int8 module needs none of it."""
    for node in list(prepared.graph.nodes):
        if node.op == "get_attr" and not node.users:
            prepared.graph.erase_node(node)
    prepared.recompile()


def _register(module: nn.Module, name: str, tensor: Tensor) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if not isinstance(getattr(module, parent, None), nn.Module):
            module.add_module(parent, nn.Module())
        module = getattr(module, parent)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(last, tensor)
    else:
        module.register_buffer(last, tensor)
