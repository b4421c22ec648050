import json

import pytest

from qat_lightning.report import LayerParity, LayerReport, Measurement, Report

CONTRACT = {"recipe", "flow", "backend", "model", "data", "torch", "cpu", "quantized_modules", "float", "int8", "parity"}
COLUMN = {"accuracy", "size_bytes", "latency_ms"}


def make_report(**changes):
    values = {
        "recipe": "qat",
        "flow": "fx",
        "backend": "x86",
        "quantized_modules": 2,
        "float32": Measurement(accuracy=0.98, size_bytes=4_000_000, latency_ms=3.0),
        "fake_quant": Measurement(accuracy=0.979),
        "int8": Measurement(accuracy=0.978, size_bytes=1_000_000, latency_ms=1.5),
        "parity": (LayerParity(layer="a", max_steps=0, differing=0.0), LayerParity(layer="b", max_steps=1, differing=0.25)),
        "layers": (
            LayerReport(layer="a", engine="x86", activation_bits=8, per_channel=True, scale=0.5, zero_point=3),
            LayerReport(layer="b", engine="onednn", activation_bits=8, per_channel=True),
        ),
        "model": "resnet20",
        "data": "digits",
        "torch": "2",
        "cpu": "some cpu",
    }
    return Report(**{**values, **changes})


def test_json_holds_the_contract(tmp_path):
    make_report().save(tmp_path)
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved.keys() >= CONTRACT | {"fake_quant"}
    assert saved["float"].keys() == saved["int8"].keys() == COLUMN
    assert saved["fake_quant"] == {"accuracy": 0.979}
    assert saved["parity"].keys() >= {"max_steps", "passed"}
    assert (saved["parity"]["max_steps"], saved["parity"]["passed"]) == (1, True)
    assert isinstance(saved["quantized_modules"], int)


def test_only_qat_has_a_fake_quant_column():
    assert "fake_quant" not in make_report(recipe="ptq", fake_quant=None).to_dict()


def test_markdown_is_what_is_saved_and_holds_every_figure(tmp_path):
    report = make_report()
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text == report.to_markdown()
    for part in ("qat (fx, x86): resnet20 on digits", "0.9800", "0.9790", "0.9780", "4.000", "1.000", "2.00 x", "passed", "1 x onednn"):
        assert part in text


@pytest.mark.parametrize(
    ("parity", "steps", "passed", "sentence"),
    [
        (None, None, None, "not compared"),
        ((), None, None, "not compared"),
        ((LayerParity(layer="a", max_steps=0, differing=0.0),), 0, True, "passed"),
        ((LayerParity(layer="a", max_steps=1, differing=0.1),), 1, True, "passed"),
        ((LayerParity(layer="a", max_steps=1, differing=0.1), LayerParity(layer="b", max_steps=2, differing=0.1)), 2, False, "FAILED at b"),
    ],
)
def test_parity_passes_up_to_one_step(parity, steps, passed, sentence):
    report = make_report(parity=parity)
    assert (report.max_steps, report.parity_passed) == (steps, passed)
    assert sentence in report.to_markdown()


def test_scalars_for_a_summary():
    scalars = make_report().scalars()
    assert scalars["int8/acc"] == 0.978
    assert scalars["int8/size_mb"] == 1.0
    assert scalars["float/latency_ms"] == 3.0
    assert scalars["int8/speedup"] == 2.0
    assert all(isinstance(value, float) for value in scalars.values())


def test_unmeasured_figures_are_left_out():
    report = make_report(float32=Measurement(), fake_quant=None, int8=Measurement(), parity=None)
    assert report.speedup is None
    assert report.scalars() == {"int8/quantized_modules": 2.0}
    assert "| accuracy | - | - | - |" in report.to_markdown()


@pytest.mark.parametrize("column", ["float32", "fake_quant", "int8"])
def test_with_accuracy_changes_one_figure(column):
    before = make_report(fake_quant=None)
    after = before.with_accuracy(column, 0.5)
    assert getattr(after, column).accuracy == 0.5
    assert after.int8.size_bytes == before.int8.size_bytes
