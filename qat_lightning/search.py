"""Finds a small set of layers that must stay in float for a score to reach a bound; pure, whatever evaluates a set."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Evaluate: TypeAlias = Callable[[frozenset[str]], float]


@dataclass(frozen=True)
class Found:
    """The outcome of a search.

    Args:
        kept: the layers that stay in float, in the order of the ranking.
        score: with these.
        met: whether the score reaches the bound; else ``kept`` is the best set that was evaluated.
        all_int8: the score with every layer in int8.
        trials: how many sets were evaluated.
    """

    kept: tuple[str, ...]
    score: float
    met: bool
    all_int8: float
    trials: int


def fewest_in_float(ranking: Sequence[str], evaluate: Evaluate, required: float) -> Found:
    """Find the fewest layers in float with which the score is at least ``required``.

    First the shortest beginning of the ranking that will do, by doubling and bisection; then each of its layers, the least sensitive
    first, returns to int8 if the score allows. Every set that is returned as sufficient has been evaluated. Where a layer in float never
    lowers the score, no layer of the result can be left out; where also losses add up and the ranking is theirs, none is smaller.

    Args:
        ranking: names of the layers, the most sensitive first. At least one of them remains in int8.
        evaluate: returns the score, higher is better, with these layers in float; NaN counts as minus infinity.
        required: the bound.
    """
    scores: dict[frozenset[str], float] = {}

    def reaches(kept: Sequence[str]) -> bool:
        chosen = frozenset(kept)
        if chosen not in scores:
            score = evaluate(chosen)
            scores[chosen] = -math.inf if math.isnan(score) else score
        return scores[chosen] >= required

    count = _shortest_prefix(len(ranking) - 1, lambda length: reaches(ranking[:length]))
    if count is None:
        best = max(scores, key=lambda kept: (scores[kept], -len(kept)))
    else:
        kept = list(ranking[:count])
        for layer in reversed(ranking[:count]):
            without = [other for other in kept if other != layer]
            kept = without if reaches(without) else kept
        best = frozenset(kept)
    return Found(
        kept=tuple(layer for layer in ranking if layer in best),
        score=scores[best],
        met=count is not None,
        all_int8=scores[frozenset()],
        trials=len(scores),
    )


def _shortest_prefix(longest: int, enough: Callable[[int], bool]) -> int | None:
    """Return the smallest length up to ``longest`` that is enough, supposing that more is never less; None where none is."""
    low, high = -1, 0  # low is not enough
    while not enough(high):
        if high >= longest:
            return None
        low, high = high, min(max(2 * high, 1), longest)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
