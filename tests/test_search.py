import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning.search import fewest_in_float

LAYERS = tuple("abcdefgh")
LOSSES = st.lists(st.integers(0, 100), min_size=1, max_size=len(LAYERS))


def additive(losses):
    return lambda kept: -sum(loss for layer, loss in losses.items() if layer not in kept)


def smallest_size(layers, evaluate, required):
    sizes = (len(kept) for size in range(len(layers)) for kept in combinations(layers, size) if evaluate(frozenset(kept)) >= required)
    return next(sizes, None)


@given(LOSSES, st.integers(-500, 0))
def test_losses_that_add_up_give_the_minimum(values, required):
    losses = dict(zip(LAYERS, values, strict=False))
    ranking = sorted(losses, key=lambda layer: -losses[layer])
    found = fewest_in_float(ranking, additive(losses), required)
    smallest = smallest_size(losses, additive(losses), required)
    assert found.met == (smallest is not None)
    if found.met:
        assert len(found.kept) == smallest


@given(LOSSES, st.permutations(LAYERS), st.integers(-500, 0))
def test_with_a_wrong_ranking_no_layer_can_be_left_out(values, order, required):
    losses = dict(zip(LAYERS, values, strict=False))
    ranking = [layer for layer in order if layer in losses]
    evaluate = additive(losses)
    found = fewest_in_float(ranking, evaluate, required)
    if found.met:
        assert all(evaluate(frozenset(found.kept) - {layer}) < required for layer in found.kept)


@given(st.lists(st.floats(0, 1), min_size=2**5, max_size=2**5), st.floats(0, 1))
def test_whatever_the_evaluator_says_the_bound_is_kept(scores, required):
    layers, asked = LAYERS[:5], []

    def evaluate(kept):
        asked.append(kept)
        return scores[sum(2**index for index, layer in enumerate(layers) if layer in kept)]

    found = fewest_in_float(layers, evaluate, required)
    assert found.score == evaluate(frozenset(found.kept))
    assert found.all_int8 == evaluate(frozenset())
    assert found.met == (found.score >= required)
    assert found.trials == len(set(asked))
    assert len(found.kept) < len(layers)
    if not found.met:
        assert found.score == max(map(evaluate, set(asked)))


@pytest.mark.parametrize(("fragile", "trials"), [(0, 1), (1, 2), (3, 7)])
def test_few_fragile_layers_cost_few_trials(fragile, trials):
    names = [f"layer{index}" for index in range(100)]
    losses = {name: 1 if index < fragile else 0 for index, name in enumerate(names)}
    found = fewest_in_float(names, additive(losses), 0)
    assert found.kept == tuple(names[:fragile])
    assert found.trials == trials


def test_nan_never_reaches_a_bound():
    found = fewest_in_float(["a", "b"], lambda kept: 1.0 if kept else math.nan, 0.5)
    assert (found.kept, found.all_int8) == (("a",), -math.inf)
