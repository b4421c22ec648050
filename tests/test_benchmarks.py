"""The benchmarks run from end to end, small; their figures are made elsewhere."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import accuracy, dynamic, overhead, qat, rounding
from qat_lightning import StaticPTQ, calibrate, convert, prepare
from qat_lightning.recorded import record_program
from tests.nets import FunctionalNet


def tiny():
    """Return the network that the benchmark is told to measure."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


@pytest.fixture
def images(tmp_path):
    for part in ("train", "test"):
        for label, shade in (("dark", 40), ("light", 200)):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (12, 12), (shade, shade + index, shade)).save(folder / f"{index}.png")
    return tmp_path


def test_accuracy(images, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "WORKERS", 0)
    arguments = ["--net", "tests.test_benchmarks:tiny", "--data", str(images), "--calibration", "8", "--backends", "x86", "--ablation"]
    accuracy.main([*arguments, "--peers", "torch-x86", "--json", str(images / "rows.json")])
    rows = json.loads((images / "rows.json").read_text())
    assert [row["method"] for row in rows] == [
        "float",
        "qat_lightning, x86",
        "... without bias correction",
        "... nor histogram, minima and maxima",
        "... one weight scale per tensor",
        "... weights of 7 bits",
        "torch FX defaults, x86",
    ]
    assert rows[0]["drop"] == 0 and all(0 <= row["top1"] <= 100 and row["error"] < 0.1 for row in rows)
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)


def test_a_tool_that_is_not_installed_has_a_row(images, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "WORKERS", 0)
    monkeypatch.setitem(accuracy.PEERS, "other", accuracy.Peer("Other", ("no_such_package",), lambda net, batches: net))
    accuracy.main(["--net", "tests.test_benchmarks:tiny", "--data", str(images), "--backends", "--peers", "other"])
    assert "| Other | not installed: no_such_package |" in capsys.readouterr().out


@pytest.fixture
def forked(programs, monkeypatch):
    """The runs that a benchmark starts need not import PyTorch."""
    monkeypatch.setattr("benchmarks.runs.subprocess.run", lambda command, cwd, **_: programs.run(*command[1:], cwd=cwd))


def test_qat(tmp_path, capsys, forked):
    arguments = [
        "--seeds",
        "3",
        "--out",
        str(tmp_path),
        "--",
        "debug=fast",
        "trainer.accelerator=cpu",
        "model.net.depth=8",
        "quant.float_epochs=0",
    ]
    qat.main(arguments)
    (row,) = json.loads((tmp_path / "qat.json").read_text())
    assert row["name"] == qat.DEFAULTS and 0 <= row["int8"][0] <= 100
    assert json.loads((tmp_path / "variant0-seed3" / "report.json").read_text())["recipe"] == "qat"
    (tmp_path / "variant0-seed3" / "config.yaml").unlink()
    qat.main(arguments)  # what is done is not done again
    assert not (tmp_path / "variant0-seed3" / "config.yaml").exists() and capsys.readouterr().out.count(qat.DEFAULTS) == 2


def test_qat_that_fails_is_shown(tmp_path, forked):
    with pytest.raises(SystemExit, match=r"(?s)no_such.*status 1"):
        qat.main(["--out", str(tmp_path), "--", "no_such=1"])


def test_dynamic(tmp_path, capsys, forked):
    dynamic.main(
        ["--seeds", "0", "--models", "lstm", "--backends", "x86", "--out", str(tmp_path), "--", "debug=fast", "trainer.accelerator=cpu"]
    )
    row, *_, wide_lstm, wide_bert = capsys.readouterr().out.splitlines()[2:]
    size, expected = (float(column) for column in row.split("|")[6:8])
    assert row.startswith("| lstm, x86 |") and size == pytest.approx(expected, abs=0.01)
    assert wide_lstm.startswith("| LSTM, width 512, 32 steps, x86 |") and wide_bert.startswith("| 2 BERT layers, width 768")
    assert (tmp_path / "sentences" / "train.tsv").read_text().startswith("sentence\tlabel\n")


def test_overhead(tmp_path, capsys):
    arguments = ["--net", "tests.test_benchmarks:tiny", "--size", "12", "--batch", "4", "--batches", "2", "--epochs", "1"]
    overhead.main([*arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(rows) == list(overhead.PHASES) and all(row["callback"] > 0 < row["by hand"] for row in rows.values())
    assert "| both frozen |" in capsys.readouterr().out.splitlines()[-1]


def test_rounding(images, capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "WORKERS", 0)
    arguments = ["--net", "tests.test_benchmarks:tiny", "--data", str(images), "--calibration", "8", "--images", "4"]
    rounding.main(arguments)
    rows = {line.split(" ")[1]: line for line in capsys.readouterr().out.splitlines()[2:]}
    assert rows.keys() >= {"quantized::conv2d_relu.new", "aten::adaptive_avg_pool2d", "quantized::linear"}
    assert rows["quantized::conv2d_relu.new"].startswith("| quantized::conv2d_relu.new | 1 | 400 |")
    assert rows["quantized::linear"].startswith("| quantized::linear | 1 | 8 | 0.00 | 0 |")

    # A runtime that adds a step is seen, and its values are anywhere between the borders.
    monkeypatch.setattr(rounding, "open_onnx", lambda *_, **__: lambda tensors: (torch.full((4, 4, 5, 5), 100.0),))
    found = rounding.measure(recorded_block(), [torch.randn(4, 3, 12, 12)], "onnxruntime", bits=8)
    (difference,) = found
    assert difference.differing == difference.elements == 400 and difference.most_steps > 100 and difference.border > 0.4


def recorded_block():
    net = tiny()[:3].eval()
    return record_program(convert(calibrate(prepare(net, StaticPTQ()), [torch.randn(4, 3, 12, 12)])))


def test_rounding_of_operators_with_several_inputs():
    images = torch.randn(4, 1, 8, 8)
    recorded = record_program(convert(calibrate(prepare(FunctionalNet().eval(), StaticPTQ()), [images])))
    found = {difference.op: difference for difference in rounding.measure(recorded, [images], "onnxruntime", bits=8)}
    assert found.keys() >= {"quantized::add", "aten::cat", "quantized::hardswish"}
    assert all(difference.most_steps <= 1 for difference in found.values())
