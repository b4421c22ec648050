import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat_lightning import QAT, ConfigurationError, When
from qat_lightning.schedule import Horizon, Progress, check_reachable, phase

MOMENTS = st.one_of(
    st.none(),
    st.builds(lambda n: When(epoch=n), st.integers(0, 20)),
    st.builds(lambda n: When(step=n), st.integers(0, 200)),
    st.builds(lambda n: When(fraction=n), st.floats(0, 0.99)),
)
RECIPES = st.builds(lambda a, b, c: QAT(freeze_observers=a, freeze_bn=b, start=c), MOMENTS, MOMENTS, MOMENTS)


def walk(horizon, epochs, batches, accumulation=1):
    """Yield the progress before each batch of a run."""
    for batch in range(epochs * batches):
        epoch, within, step = batch // batches, batch % batches, batch // accumulation
        yield Progress(epoch, step, horizon.fraction(epoch, within, step))


@given(recipe=RECIPES, batches=st.integers(1, 12), accumulation=st.integers(1, 4))
def test_what_is_frozen_stays_frozen(recipe, batches, accumulation):
    horizon = Horizon(max_epochs=8, max_steps=None, batches_per_epoch=batches)
    phases = [phase(recipe, progress) for progress in walk(horizon, 8, batches, accumulation)]
    for earlier, later in pairwise(phases):
        assert later.bn_frozen >= earlier.bn_frozen
        assert later.observers <= earlier.observers
        assert later.fake_quant >= earlier.fake_quant


@given(fraction=st.floats(0, 0.99), epochs=st.integers(1, 10), batches=st.integers(1, 20))
def test_a_fraction_falls_where_it_says(fraction, epochs, batches):
    horizon = Horizon(max_epochs=epochs, max_steps=None, batches_per_epoch=batches)
    frozen = [phase(QAT(freeze_bn=When(fraction=fraction)), progress).bn_frozen for progress in walk(horizon, epochs, batches)]
    first = frozen.index(True) if True in frozen else len(frozen)
    assert first == pytest.approx(math.ceil(fraction * epochs * batches), abs=1)


@pytest.mark.parametrize(
    ("horizon", "expected"),
    [
        (Horizon(10, None, 4), 0.525),
        (Horizon(10, 100, 4), 0.525),
        (Horizon(10, 25, 4), 0.84),
        (Horizon(None, 42, None), 0.5),
        (Horizon(10, None, None), 0.5),
    ],
)
def test_fraction_is_of_the_limit_that_comes_first(horizon, expected):
    assert horizon.fraction(epoch=5, batch=1, step=21) == pytest.approx(expected)


def test_fraction_of_an_endless_run_is_unknown():
    assert math.isnan(Horizon(None, None, 4).fraction(1, 1, 1))


@pytest.mark.parametrize(
    ("argument", "when", "horizon", "message"),
    [
        (
            "freeze_bn",
            When(epoch=10),
            Horizon(10, None, 4),
            r"`freeze_bn=When\(epoch=10\)` is never reached: training ends after 10 epochs",
        ),
        ("freeze_observers", When(step=50), Horizon(None, 50, 4), r"`freeze_observers=When\(step=50\)` is never reached"),
        ("start", When(epoch=3), Horizon(2, None, 4), r"`start=When\(epoch=3\)` is never reached"),
        ("freeze_bn", When(fraction=0.5), Horizon(None, None, 4), "neither max_epochs nor max_steps"),
    ],
)
def test_moments_after_the_end_are_refused(argument, when, horizon, message):
    settings = {"freeze_bn": None, "freeze_observers": None, argument: when}
    with pytest.raises(ConfigurationError, match=message):
        check_reachable(QAT(**settings), horizon)
