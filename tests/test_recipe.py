import copy
import dataclasses
import pickle

import pytest
from torch import nn

from qat_lightning import QAT, DynamicPTQ, LayerOverride, QuantizationCallback, StaticPTQ, When
from qat_lightning.recipe import Recipe, parse_recipe


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: When(), ValueError, "exactly one.*none"),
        (lambda: When(epoch=1, step=2), ValueError, "exactly one.*'epoch': 1, 'step': 2"),
        (lambda: When(epoch=-1), ValueError, "`epoch` to be at least 0, but got -1"),
        (lambda: When(step=1.5), TypeError, "`step` to be an integer, but got 1.5"),
        (lambda: When(epoch=True), TypeError, "`epoch`.*True"),
        (lambda: When(fraction=1.0), ValueError, r"`fraction` to lie in \[0, 1\), but got 1.0"),
        (lambda: When(fraction=-0.1), ValueError, "`fraction`.*-0.1"),
        (lambda: When(fraction="half"), TypeError, "`fraction`.*'half'"),
        (lambda: QAT(flow="graph"), ValueError, r"`flow` to be one of \('fx', 'eager', 'pt2e'\), but got 'graph'"),
        (lambda: QAT(backend="tensorrt"), ValueError, "`backend`.*'tensorrt'"),
        (lambda: QAT(backend=True), ValueError, "`backend`.*True"),
        (lambda: QAT(activation_bits=4), ValueError, "`activation_bits`.*4"),
        (lambda: QAT(per_channel=1), TypeError, "`per_channel` to be a bool, but got 1"),
        (lambda: QAT(freeze_bn=0.5), TypeError, "`freeze_bn` to be a When.*0.5"),
        (lambda: QAT(freeze_observers={"epoch": 1}), TypeError, "`freeze_observers`"),
        (lambda: QAT(calibration_batches=-1), ValueError, "`calibration_batches`.*at least 0"),
        (lambda: QAT(calibration_batches=1.5), TypeError, "`calibration_batches`"),
        (lambda: QAT(observer="mode"), ValueError, "`observer`.*'mode'"),
        (lambda: QAT(distillation=1.5), ValueError, r"`distillation`.*\[0, 1\].*1\.5"),
        (lambda: QAT(distillation=True), TypeError, "`distillation`.*True"),
        (lambda: QAT(start=3), TypeError, "`start`.*3"),
        (lambda: QAT(fuse=[["conv", "bn"]]), ValueError, "`fuse` only with flow='eager'.*flow='fx'"),
        (lambda: QAT(flow="eager", fuse="conv"), TypeError, "`fuse`.*'conv'"),
        (lambda: QAT(flow="eager", fuse=["conv", "bn"]), TypeError, "each group of `fuse`.*'conv'"),
        (lambda: QAT(flow="eager", fuse=[["conv"]]), ValueError, r"at least two modules, but got \['conv'\]"),
        (lambda: QAT(overrides=["fc"]), TypeError, r"`overrides` to be a mapping.*\['fc'\]"),
        (lambda: QAT(overrides={3: None}), TypeError, "keys of `overrides`.*3"),
        (lambda: QAT(overrides={"fc": "float"}), TypeError, r"`overrides\['fc'\]`.*'float'"),
        (lambda: QAT(overrides={"fc": {"bits": 4}}), ValueError, r"`overrides\['fc'\]`.*'bits'"),
        (lambda: QAT(overrides={"fc": {"engine": "gpu"}}), ValueError, "`engine`.*'gpu'"),
        (lambda: StaticPTQ(calibration_batches=0), ValueError, "`calibration_batches`.*0"),
        (lambda: StaticPTQ(calibration_batches=2.0), TypeError, "`calibration_batches`.*2.0"),
        (lambda: StaticPTQ(observer="mse"), ValueError, "`observer` to be one of .*'percentile', 'entropy'.*'mse'"),
        (lambda: QAT(overrides={"fc": {"observer": "mse"}}), ValueError, "`observer`.*'mse'"),
        (lambda: DynamicPTQ(overrides={"fc": {"observer": "minmax"}}), ValueError, r"no `observer` in `overrides\['fc'\]`: dynamic"),
        (lambda: parse_recipe("awq"), ValueError, "`recipe`.*'awq'"),
        (lambda: parse_recipe(QAT), TypeError, "`recipe`"),
    ],
)
def test_wrong_values_name_the_argument_and_what_came(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(("name", "kind"), [("qat", QAT), ("ptq", StaticPTQ), ("dynamic", DynamicPTQ)])
def test_a_name_is_shorthand_for_the_defaults(name, kind):
    assert QuantizationCallback(name).recipe == kind()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda recipe: pickle.loads(pickle.dumps(recipe))])
def test_recipes_can_be_copied(duplicate):
    recipe = QAT(overrides={"fc": None, nn.Linear: {"per_channel": False}}, start=When(epoch=1))
    assert duplicate(recipe) == recipe


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QAT().flow = "eager"
    with pytest.raises(TypeError):
        QAT().overrides["fc"] = None


def test_a_mapping_is_a_layer_override():
    assert QAT(overrides={"fc": {"per_channel": False}}).overrides["fc"] == LayerOverride(per_channel=False)


def test_moments_print_as_they_are_written():
    assert str(When(epoch=3)) == "When(epoch=3)" and isinstance(QAT(), Recipe)
