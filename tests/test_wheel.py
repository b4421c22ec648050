import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PRIMARY = """
hydra:
  searchpath: [pkg://qat_lightning.conf]
defaults:
  - model: resnet20
  - data: digits
  - trainer: default
  - logger: csv
  - _self_
trainer:
  max_epochs: 3
"""

SCRIPT = """
import json, sys
import hydra, qat_lightning

@hydra.main(version_base="1.3", config_path="configs", config_name="primary")
def main(cfg):
    print(json.dumps({"package": qat_lightning.__file__, "model": cfg.model._target_, "epochs": cfg.trainer.max_epochs,
                      "backend": cfg.quant.backend, "flow": cfg.quant.flow}))

main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_config_and_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"qat_lightning/conf/{path.relative_to(ROOT / 'conf').as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "qat_lightning").rglob("*.py")}
    assert configs | modules <= names
    assert not any(name.startswith(("tests/", "conf/")) for name in names)


def test_another_project_composes_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "primary.yaml").write_text(PRIMARY)
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "train.py", "+quant=qat", "quant/backend=qnnpack", "quant.flow=eager"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert Path(found.pop("package")).is_relative_to(tmp_path / "site")
    assert found == {"model": "qat_lightning.models.Classifier", "epochs": 3, "backend": "qnnpack", "flow": "eager"}
