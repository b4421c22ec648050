"""Runs of ``train.py`` whose reports the benchmarks collect."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def train(folder: Path, recipe: str, seed: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Run ``train.py +quant=RECIPE`` in a process of its own and return its report; a run that has one already is not repeated."""
    report = folder / "report.json"
    if not report.is_file():
        command = [sys.executable, "train.py", f"+quant={recipe}", "logger=csv", f"seed={seed}", f"hydra.run.dir={folder.resolve()}"]
        finished = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{' '.join([*command, *overrides])}\nended with status {finished.returncode}:\n{finished.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(report.read_text())
    return found
