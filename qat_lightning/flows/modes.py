"""Arguments that differ between training and evaluation, which a trace would fix for good: ``training=self.training`` and the like."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

Place = int | str


class ByMode(nn.Module):
    """Calls a function with the arguments of its mode.

    Args:
        function: of the graph.
        training: arguments by position or name, in training.
        evaluation: the same in evaluation.
    """

    def __init__(self, function: Any, training: Mapping[Place, Any], evaluation: Mapping[Place, Any]) -> None:
        super().__init__()
        self.function, self.of_training, self.of_evaluation = function, training, evaluation

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function gives; arguments in the places of those that differ are not used."""
        own = self.of_training if self.training else self.of_evaluation
        positional = [own.get(place, value) for place, value in enumerate(args)]
        return self.function(*positional, **{place: own.get(place, value) for place, value in kwargs.items()})

    def extra_repr(self) -> str:
        """Return what a print of the module shows."""
        return f"{getattr(self.function, '__name__', self.function)}, training: {self.of_training}, evaluation: {self.of_evaluation}"


@dataclass(frozen=True)
class Differing:
    """A call in a graph of the training mode whose constants are others in evaluation.

    Args:
        node: the call.
        training: the constants by position or name.
        evaluation: the same in evaluation.
    """

    node: fx.Node
    training: Mapping[Place, Any]
    evaluation: Mapping[Place, Any]


def differing_calls(training: fx.Graph, evaluation: fx.Graph) -> Iterator[Differing]:
    """Yield the calls of functions whose constants differ in two graphs of the same operations."""
    for one, other in zip(training.nodes, evaluation.nodes, strict=True):
        if one.op != "call_function":
            continue
        own, others = _places(one), _places(other)
        places = [place for place in own if place in others and _is_constant(own[place]) and own[place] != others[place]]
        if places:
            yield Differing(one, {place: own[place] for place in places}, {place: others[place] for place in places})


def follow_mode(module: fx.GraphModule, call: Differing) -> None:
    """Let a call take the constants of its mode, in place."""
    node, name = call.node, f"{call.node.name}_by_mode"
    module.add_submodule(name, ByMode(node.target, call.training, call.evaluation).train(module.training))
    args = tuple(None if place in call.training else value for place, value in enumerate(node.args))
    kwargs = {place: None if place in call.training else value for place, value in node.kwargs.items()}
    with module.graph.inserting_after(node):
        replacement = module.graph.call_module(name, args, kwargs)
    replacement.meta = dict(node.meta)
    node.replace_all_uses_with(replacement)
    module.graph.erase_node(node)


def _places(node: fx.Node) -> dict[Place, Any]:
    places: dict[Place, Any] = dict(enumerate(node.args))
    places.update(node.kwargs)
    return places


def _is_constant(value: Any) -> bool:
    return isinstance(value, bool | int | float | str) or value is None
