"""Traces a module, finds the channels that can be scaled together, and measures their ranges."""

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from qat_lightning.equalization.labeller import MODULES, Labeller
from qat_lightning.equalization.labels import Site
from qat_lightning.errors import UnsupportedModelError
from qat_lightning.flows.blame import line_of_error, short_message
from qat_lightning.plan import Call, constant_arguments


class ChannelGraph:
    """The channels of a module: its layers as producers and consumers of labels, and the sites whose ranges matter.

    Args:
        module: in eval mode.
        call: shows the shapes.
        opaque: names of submodules that are not looked into; their inputs and outputs keep their scale.

    Raises:
        UnsupportedModelError: the module cannot be traced; names the line.
    """

    def __init__(self, module: nn.Module, call: Call, opaque: Collection[str] = ()) -> None:
        self._signature = inspect.signature(module.forward)
        graph = _trace(module, call, opaque)
        labeller = Labeller(graph)
        with torch.no_grad():
            labeller.run(*self._positional(call))
        self.classes = labeller.classes
        self.producers = labeller.producers
        self.consumers = labeller.consumers
        self.sites = labeller.sites
        self._watcher = _Watcher(graph, self.sites)

    def observe(self, call: Call) -> None:
        """Run the module on a call, and let every site see its value."""
        with torch.no_grad():
            self._watcher.run(*self._positional(call))

    def _positional(self, call: Call) -> tuple[Any, ...]:
        bound = self._signature.bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        return (*bound.args, *bound.kwargs.values())


class _Tracer(fx.Tracer):
    def __init__(self, opaque: Collection[str]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self._opaque or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module, call: Call, opaque: Collection[str]) -> fx.GraphModule:
    signature = inspect.signature(module.forward)
    constants = {name: signature.parameters[name].default for name in constant_arguments(module, call)}
    if type(module) in MODULES:  # torch's own modules are leaves of a trace
        module = nn.Sequential(module)
    try:
        return fx.GraphModule(module, _Tracer(opaque).trace(module, concrete_args=constants or None))
    except Exception as error:
        raise UnsupportedModelError(
            f"Equalization cannot trace {type(module).__name__} at {line_of_error(error)}: {short_message(error)}. It needs the graph "
            f"to know what reads each channel: leave it out, or rewrite the line without Python control flow on tensors."
        ) from error


class _Watcher(fx.Interpreter):
    """Shows the values of a run to the sites, each before the node that reads it can change it in place."""

    def __init__(self, module: fx.GraphModule, sites: Collection[Site]) -> None:
        super().__init__(module)
        self._sites: dict[fx.Node, list[Site]] = {}
        for site in sites:
            self._sites.setdefault(site.node, []).append(site)

    def run_node(self, n: fx.Node) -> Any:
        for site in self._sites.get(n, ()):
            site.observe(self.env[site.value])
        return super().run_node(n)
