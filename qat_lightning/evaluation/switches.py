"""Switches the fake-quant of single layers of a prepared module on and off, by what an int8 model would round.

A layer rounds its weight, its input and its output: whichever int8 kernel runs it reads integers and writes integers. A grid between two
layers belongs to both. So:

- *only* a layer: its weight and the grids that it reads or writes, as if ``overrides`` kept all else in float;
- *all but* a layer: everything except its weight and the grids that nobody else reads or writes, as with ``overrides={layer: None}``.

Every layer at once, with the grids that only additions and other operations without weights touch, is the whole model. Who reads and
writes a grid is seen in one run, the same way in every flow.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from qat_lightning.core import plan_of
from qat_lightning.flows.sharing import original
from qat_lightning.modes import evaluating
from qat_lightning.observers import fake_quants


class Switches:
    """The fake-quants of the layers of prepared modules.

    Args:
        targets: prepared modules by name.
        run: runs one batch through all of them.

    Attributes:
        layers: the layers with weights, by qualified name; several modules where a flow has copied a layer that is called several times.
        inputs: of each layer, the grids that it reads.
    """

    def __init__(self, targets: Mapping[str, nn.Module], run: Callable[[], Any]) -> None:
        self.layers = layers_of(targets)
        weights = {id(layer.weight_fake_quant) for copies in self.layers.values() for layer in copies}
        self._all = list({id(quant): quant for module in targets.values() for quant in fake_quants(module)}.values())
        # What follows another grid, behind dropout, rounds nothing itself.
        self._grids = [quant for quant in self._all if id(quant) not in weights and hasattr(quant, "scale")]
        self.inputs: dict[str, list[Any]] = {name: [] for name in self.layers}
        self._touching: dict[int, set[str]] = {id(quant): set() for quant in self._grids}
        # Grids that an operation without weights reads or writes.
        self._operations: set[int] = set()
        self.none()
        self._trace(run)

    def none(self) -> None:
        """Compute in float."""
        self._switch(lambda layer: False, lambda grid: False)

    def all(self) -> None:
        """Round everything."""
        self._switch(lambda layer: True, lambda grid: True)

    def only(self, name: str) -> None:
        """Round the weight of one layer, and what it reads and writes."""
        self._switch(lambda layer: layer == name, lambda grid: name in self._touching[grid])

    def all_but(self, name: str) -> None:
        """Round everything but the weight of one layer, and what only it reads or writes."""
        self._switch(lambda layer: layer != name, lambda grid: grid in self._operations or self._touching[grid] != {name})

    def _switch(self, layers: Callable[[str], bool], grids: Callable[[int], bool]) -> None:
        for name, copies in self.layers.items():
            for layer in copies:
                layer.weight_fake_quant.enable_fake_quant(layers(name))
        for quant in self._grids:
            quant.enable_fake_quant(grids(id(quant)))

    # --- who touches which grid ----------------------------------------------------------------------------------------

    def _trace(self, run: Callable[[], Any]) -> None:
        sources = _Sources()
        handles = [handle for name, copies in self.layers.items() for layer in copies for handle in self._watch_layer(name, layer, sources)]
        handles += [handle for quant in self._grids for handle in self._watch_grid(quant, sources)]
        try:
            with torch.inference_mode(), sources:
                run()
        finally:
            for handle in handles:
                handle.remove()

    def _watch_layer(self, name: str, layer: nn.Module, sources: "_Sources") -> Iterator[Any]:
        def reads(module: nn.Module, args: Any, kwargs: Any) -> None:
            read = sources.of((args, kwargs))
            found = [quant for quant in self._grids if id(quant) in read]
            for quant in found:
                self._touching[id(quant)].add(name)
            self.inputs[name].extend(quant for quant in found if all(quant is not known for known in self.inputs[name]))

        yield layer.register_forward_pre_hook(reads, with_kwargs=True)
        # Before eager mode's own hook, which runs the layer's grid.
        yield layer.register_forward_hook(lambda module, args, output: sources.marked(output, name), prepend=True)

    def _watch_grid(self, quant: nn.Module, sources: "_Sources") -> Iterator[Any]:
        def writes(module: nn.Module, args: Any) -> None:
            for source in sources.of(args) - {id(quant)}:
                if isinstance(source, str):
                    self._touching[id(quant)].add(source)
                else:
                    self._operations |= {source, id(quant)}

        yield quant.register_forward_pre_hook(writes)
        yield quant.register_forward_hook(lambda module, args, output: sources.marked(output, id(quant)))


@contextmanager
def untouched(targets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Switch observers off and put modules in eval mode for the time of the block; switches and modes are then as they were."""
    quants = [quant for module in targets.values() for quant in fake_quants(module)]
    switches = [(bool(quant.fake_quant_enabled[0]), bool(quant.observer_enabled[0])) for quant in quants]
    with ExitStack() as stack:
        for module in targets.values():
            stack.enter_context(evaluating(module))
        try:
            for quant in quants:
                quant.enable_observer(False)
            yield
        finally:
            for quant, (rounds, observes) in zip(quants, switches, strict=True):
                quant.enable_fake_quant(rounds)
                quant.enable_observer(observes)


class _Sources(TorchFunctionMode):
    """Knows which layers and grids each tensor was computed from; a layer or grid starts anew."""

    def __init__(self) -> None:
        super().__init__()
        self._known: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if sources := self.of((args, kwargs)):
            for leaf in _tensors(args[0] if func is Tensor.__setitem__ else result):
                self._known[leaf] = self.of(leaf) | sources
        return result

    def of(self, values: Any) -> frozenset[Any]:
        """Return the sources of the tensors in ``values``: names of layers, identities of grids."""
        return frozenset[Any]().union(*(self._known.get(leaf, frozenset()) for leaf in _tensors(values)))

    def marked(self, output: Any, source: Any) -> Any:
        """Return ``output`` as coming from ``source`` alone."""

        def mark(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            alias = leaf.view_as(leaf)  # grids that are off return the very tensor they were given
            self._known[alias] = frozenset({source})
            return alias

        return pytree.tree_map(mark, output)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def layers_of(targets: Mapping[str, nn.Module]) -> dict[str, list[Any]]:
    """Return the layers with weights of prepared modules, under the names that plans and overrides know."""
    found: dict[str, list[Any]] = {}
    for target, module in targets.items():
        plan = plan_of(module)
        for name, layer in module.named_modules():
            if hasattr(layer, "weight_fake_quant"):
                names = (name, original(name), original(name).removeprefix("wrapped").removeprefix("."))
                own = next((known for known in names if plan is not None and known in plan.layers), name)
                found.setdefault(f"{target}.{own}".strip("."), []).append(layer)
    return found
