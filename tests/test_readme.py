"""Every code block of the README runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from qat_lightning.models import CifarResNet

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in BASH[2:] for line in block.splitlines() if line]
NETWORK = """
from torch import nn

class MyNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
"""


def test_set_up_commands_come_first():
    # The continuous integration runs these two as they are.
    assert [block.strip().split(" && ")[-1] for block in BASH[:2]] == [".venv/bin/python train.py +quant=qat", ".venv/bin/python -m pytest"]


@pytest.mark.parametrize("code", PYTHON)
def test_python_block(code, tmp_path, programs):
    quiet = "import warnings\nwarnings.filterwarnings('ignore')\n"
    done = programs.run("-c", quiet + code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.sampled
@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path, programs):
    _make_what_the_commands_name(tmp_path)
    words = shlex.split(command, comments=True)
    assert words[:2] == ["python", "train.py"]
    # Small, and last, so that it wins over nothing that the README sets.
    arguments = [*words[2:], *(["debug=fast"] if "trainer.max_epochs=0" not in words else ["logger=csv"])]
    if not any(word.startswith("model=") for word in words):
        arguments.append("model.net.depth=8")
    done = programs.run(ROOT / "train.py", *arguments, cwd=tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr


def test_sample_output_has_the_report_of_today():
    sample = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert sample is not None
    headings = (
        "# int8 by qat",
        "| accuracy",
        "| size (MB)",
        "| latency (ms)",
        "- quantized modules",
        "- converted weights",
        "- speed-up",
        "- parity",
        "- kernels",
    )
    assert all(heading in sample[1] for heading in headings)


def _make_what_the_commands_name(folder):
    torch.save(CifarResNet(depth=8, in_channels=1).state_dict(), folder / "float.ckpt")
    (folder / "my_package.py").write_text(NETWORK)
    for name in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (8, 8), (25 * index, 100, 200)).save(folder / "images" / name / f"{index}.png")
