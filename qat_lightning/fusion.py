"""Finds the groups of modules that the eager flow fuses, from the data flow where the module can be traced."""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

from torch import fx, nn

from qat_lightning.errors import ConfigurationError

Group: TypeAlias = tuple[str, ...]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RELU = (nn.ReLU, nn.ReLU6)
PATTERNS: tuple[tuple[tuple[type[nn.Module], ...], ...], ...] = (
    (_CONV, _BN, _RELU),
    (_CONV, _BN),
    (_CONV, _RELU),
    ((nn.Linear,), _RELU),
    ((nn.BatchNorm2d, nn.BatchNorm3d), (nn.ReLU,)),
)
"""Longest first, so that a convolution takes its ReLU along. A ReLU6 is one whose clip at 6 the saturation of int8 makes."""


class _LayerTracer(fx.Tracer):
    """Traces down to the layers of torch; a module that cannot be traced is left as one node."""

    def call_module(self, m: nn.Module, forward, args, kwargs):  # type: ignore[no-untyped-def]
        before = set(self.graph.nodes)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            for node in reversed([node for node in self.graph.nodes if node not in before]):
                self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)


def find_groups(module: nn.Module) -> list[Group]:
    """Return the groups of qualified names to fuse, each in data-flow order.

    Two modules belong together when the second takes the output of the first, nothing else does, and neither is called twice.
    Where the module as a whole cannot be traced, the children of each ``nn.Sequential`` are looked at instead.
    """
    try:
        graph = _LayerTracer().trace(module)
    except Exception:  # the user's forward may raise anything when it is given a proxy
        chains = list(_sequential_chains(module))
    else:
        chains = list(_chains(graph))
    return [group for chain in chains for group in _match(module, chain)]


def check_groups(module: nn.Module, groups: Sequence[Group]) -> None:
    """Refuse a group that names a missing module or whose types cannot be fused.

    Raises:
        ConfigurationError: names the group.
    """
    modules = dict(module.named_modules())
    seen: set[str] = set()
    for group in groups:
        missing = [name for name in group if name not in modules]
        if missing:
            raise ConfigurationError(f"`fuse` names {missing[0]!r} in {list(group)}, but {type(module).__name__} has no such module.")
        types = [type(modules[name]) for name in group]
        if not any(_fits(pattern, types) for pattern in PATTERNS):
            raise ConfigurationError(
                f"`fuse` has the group {list(group)} of types {[kind.__name__ for kind in types]}, which cannot be fused: "
                f"use Conv-BN, Conv-BN-ReLU, Conv-ReLU, Linear-ReLU (with ReLU or ReLU6) or BN-ReLU."
            )
        twice = seen.intersection(group)
        if twice:
            raise ConfigurationError(f"`fuse` names {sorted(twice)[0]!r} in two groups; a module can be fused once.")
        seen.update(group)


def _chains(graph: fx.Graph) -> Iterator[list[str]]:
    """Yield the longest runs of modules that feed each other and nothing else."""
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    follows = {node: _only_user(node, calls) for node in graph.nodes}
    continued = set(follows.values())
    for node in graph.nodes:
        if node.op != "call_module" or node in continued or calls[node.target] > 1:
            continue
        chain, current = [], node
        while current is not None:
            chain.append(str(current.target))
            current = follows[current]
        yield chain


def _only_user(node: fx.Node, calls: dict[str, int]) -> fx.Node | None:
    """Return the module that alone takes the output of ``node``, itself a module; None if there is no such pair."""
    if node.op != "call_module" or calls[str(node.target)] > 1 or len(node.users) != 1:
        return None
    user = next(iter(node.users))
    alone = user.op == "call_module" and calls[str(user.target)] == 1 and user.args == (node,) and not user.kwargs
    return user if alone else None


def _sequential_chains(module: nn.Module) -> Iterator[list[str]]:
    for path, child in module.named_modules():
        if isinstance(child, nn.Sequential):
            yield [f"{path}.{name}".strip(".") for name, _ in child.named_children()]


def _match(module: nn.Module, chain: Sequence[str]) -> Iterator[Group]:
    index = 0
    types = [type(module.get_submodule(name)) for name in chain]
    while index < len(chain):
        length = next((len(pattern) for pattern in PATTERNS if _fits(pattern, types[index : index + len(pattern)])), 0)
        if length:
            yield tuple(chain[index : index + length])
        index += length or 1


def _fits(pattern: tuple[tuple[type[nn.Module], ...], ...], types: Sequence[type[nn.Module]]) -> bool:
    if len(types) != len(pattern) or any(kind not in kinds for kind, kinds in zip(types, pattern, strict=True)):
        return False
    dimensions = {kind.__name__[-2:] for kind in types if kind.__name__[-2:] in ("1d", "2d", "3d")}
    return len(dimensions) <= 1
