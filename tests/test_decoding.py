import re

import pytest

from qat_lightning.decoding import MAX_DEPTH, parse_json
from qat_lightning.plan import Plan

PLAN = {
    "recipe": "qat",
    "flow": "fx",
    "backend": "x86",
    "layers": {"fc": {"kernel": {"engine": "x86", "activation_bits": 8, "weight_bits": 7}, "per_channel": True, "observer": None}},
    "float_modules": ["head"],
    "fuse": None,
    "observer": None,
    "constants": [],
    "example": None,
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff\xfe{", "utf"),
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("-Infinity", "-Infinity is no number"),
        ("[" * 100_000, "nested too deep"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested too deep"),
        ("9" * 5_000, "digits"),
    ],
)
def test_what_is_no_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_a_plan_survives_json():
    plan = Plan.from_dict(PLAN)
    assert plan.float_modules == ("head",) and plan.layers["fc"].kernel.activation_bits == 8
    assert plan.to_dict() == {**PLAN, "float_modules": ("head",), "constants": ()}


def test_what_an_earlier_version_has_not_written_has_its_default():
    layers = {"fc": {"kernel": {"engine": "x86", "activation_bits": 8}, "per_channel": True, "observer": None}}
    assert Plan.from_dict({**PLAN, "layers": layers}).layers["fc"].kernel.weight_bits == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_target_": "os.system"}, "`_target_` is no key that this version knows"),
        ({"recipe": "magic"}, "Expected argument `recipe` to be one of ('qat', 'ptq', 'dynamic'), but got 'magic'"),
        ({"observer": "minmax"}, "Expected argument `observer` to be one of (None,), but got 'minmax'"),
        ({"flow": "os"}, "`flow` must be one of ('fx', 'eager', 'pt2e'), but is 'os'"),
        ({"layers": []}, "`layers` must be of type dict, but is []"),
        ({"layers": {"fc": {}}}, "`layers.fc.kernel` is missing"),
        ({"layers": {"fc": {**PLAN["layers"]["fc"], "per_channel": 1}}}, "`layers.fc.per_channel` must be of type bool, but is 1"),
        (
            {"layers": {"fc": {"kernel": {"engine": "x86", "activation_bits": 9}, "per_channel": True, "observer": None}}},
            "`layers.fc.kernel`: Expected argument `activation_bits` to be one of (7, 8), but got 9",
        ),
        (
            {"layers": {"fc": {**PLAN["layers"]["fc"], "observer": "mode"}}},
            "`layers.fc`: Expected argument `observer` to be one of (None, 'histogram', 'minmax', "
            "'moving_average', 'percentile', 'entropy'), but got 'mode'",
        ),
        ({"float_modules": ["a", None]}, "`float_modules[1]` must be of type str, but is None"),
        ({"fuse": [["a"], "b"]}, "`fuse[1]` must be of type list, but is 'b'"),
        ({"x" * 1000: 1}, f"`'{'x' * 59}...` is no key"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Plan.from_dict({**PLAN, **changes})
