"""Which function translates which operator."""

from collections.abc import Callable
from typing import Any, TypeAlias

from qat_lightning.export.graph import OnnxGraph
from qat_lightning.program.nodes import Node

Translate: TypeAlias = Callable[[OnnxGraph, Node, list[Any]], None]
"""Takes the graph, the node of the program, and its arguments with values in place of references."""

TRANSLATIONS: dict[str, Translate] = {}


def translates(*ops: str) -> Callable[[Translate], Translate]:
    """Register a function for operators, by name with or without overload."""

    def register(function: Translate) -> Translate:
        for op in ops:
            TRANSLATIONS[op] = function
        return function

    return register


def find_translation(op: str) -> Translate | None:
    """Return the function for an operator."""
    return TRANSLATIONS.get(op) or TRANSLATIONS.get(op.partition(".")[0])
