"""``python -m qat_lightning.benchmark`` with real processes."""

import json

import pytest
from PIL import Image

from qat_lightning.benchmark.__main__ import Row, main, save_plot

NET = "tests.nets:ColourNet"


def test_candidates_take_turns_and_are_compared(tmp_path, capsys):
    figures, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    main(
        [
            *("--net", NET, "--batch", "2", "--size", "8", "--rounds", "2", "--calibration", "4"),
            *("--candidates", "float", "onnxruntime", "peer-torch-x86", "--json", str(figures), "--plot", str(plot)),
        ]
    )
    rows = {row["candidate"]: row for row in json.loads(figures.read_text())}
    assert set(rows) == {"float", "onnxruntime", "peer-torch-x86"}
    assert all(row["median_ms"] > 0 and row["size_bytes"] > 0 and row["peak_bytes"] > 0 and not row["remark"] for row in rows.values())
    table = capsys.readouterr().out
    assert "qat_lightning, ONNX Runtime |" in table and f"### {NET}, batch 2" in table and plot.read_bytes().startswith(b"\x89PNG")


def test_a_candidate_that_fails_is_told(capsys):
    main(["--net", "tests.nets:Nothing", "--size", "8", "--rounds", "1", "--candidates", "float"])
    assert "has no attribute 'Nothing'" in capsys.readouterr().out


def test_unknown_candidates_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--net", NET, "--candidates", "tflite"])
    assert "invalid choice: 'tflite'" in capsys.readouterr().err


def test_several_batch_sizes_have_a_plot_of_the_throughput(tmp_path):
    rows = [Row(NET, batch, name, median_ms=batch * ms) for batch in (1, 4, 16) for name, ms in (("float", 2.0), ("torch", 1.0))]
    save_plot(rows[:4], tmp_path / "few.png")
    save_plot([*rows, Row(NET, 64, "torch", remark="failed")], tmp_path / "more.png")
    with Image.open(tmp_path / "few.png") as few, Image.open(tmp_path / "more.png") as more:
        assert more.height == 2 * few.height and more.width == few.width
