import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf

from qat_lightning import QAT, DynamicPTQ, StaticPTQ, When
from qat_lightning.instantiation import build, check_targets
from qat_lightning.recipe import BACKENDS, FLOWS

CONF = Path(__file__).parents[1] / "conf"
APP_FIELDS = {"modules", "float_epochs", "lr", "convert", "parity", "metric", "sensitivity"}
RECIPES = {"qat": QAT, "ptq": StaticPTQ, "dynamic": DynamicPTQ}
# What differs from the defaults of the dataclass: on the command line, quantization-aware training always follows a float model.
AT_ONCE = When(fraction=0.0)
DEFAULTS = {"qat": {"distillation": 1.0, "freeze_bn": AT_ONCE, "freeze_observers": AT_ONCE}, "ptq": {}, "dynamic": {}}
FILES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.rglob("*.yaml"))

# What a config leaves to the user.
MISSING = {
    "data.root": "images",
    "data.num_classes": "10",
    "model.net._target_": "torch.nn.Flatten",
}

# What goes only with one another.
PAIRS = {"bert": "data=sst2", "sst2": "model=bert"}


def compose_plain(overrides, folder="run"):
    """Compose as ``train.py`` does, with whatever the configs leave to the user filled in."""
    missing = missing_keys(OmegaConf.to_container(compose_raw(overrides, folder), resolve=False))
    return OmegaConf.to_container(compose_raw([*overrides, *(f"{key}={MISSING[key]}" for key in missing)], folder), resolve=True)


def missing_keys(config, prefix=""):
    """Return the keys left to the user; interpolations that point to them are not followed."""
    values = config.items() if isinstance(config, dict) else ()
    own = [f"{prefix}{key}" for key, value in values if value == "???"]
    return own + [key for name, value in values for key in missing_keys(value, f"{prefix}{name}.")]


def compose_raw(overrides, folder):
    hydra = [f"hydra.runtime.output_dir={folder}", f"hydra.runtime.cwd={folder}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [*overrides, *hydra], return_hydra_config=True)
    HydraConfig.instance().cfg = None
    HydraConfig.instance().set_config(cfg)
    return OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])


def override_for(file):
    group, _, name = file.rpartition("/")
    if group == "quant":
        return [f"+quant={name}"]
    if name in PAIRS:
        return [f"{group}={name}", PAIRS[name]]
    if group == "quant/backend":
        return ["+quant=qat", f"quant/backend={name}"]
    return [f"{group}={name}"] if group else []


def recipe_of(config):
    return build({name: value for name, value in config["quant"].items() if name not in APP_FIELDS}, "quant")


@pytest.mark.sampled(12)
@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_to_allowed_targets(file):
    check_targets(compose_plain(override_for(file)))


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(("experiment/", "sweep/", "debug/"))])
def test_experiments_are_headed_by_their_command(file):
    group, _, name = file.rpartition("/")
    head = (CONF / f"{file}.yaml").read_text().splitlines()[:2]
    assert head[0] == "# @package _global_"
    assert head[1].startswith("# python train.py ") and f"{group}={name}" in head[1]


@pytest.mark.parametrize("file", FILES)
def test_every_setting_has_a_comment(file):
    lines = (CONF / f"{file}.yaml").read_text().splitlines()
    settings = [(above, line) for above, line in itertools.pairwise(["", *lines]) if re.match(r"[a-z]\w*: *\S|[a-z]\w*:$", line)]
    sections = ("defaults:", "trainer:", "callbacks:", "hydra:", "net:")
    assert [line for above, line in settings if not above.startswith("#") and not line.startswith(sections)] == []


@pytest.mark.sampled
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("spelling", ["quant/backend={}", "quant.backend={}"])
def test_config_instantiates_to_the_recipe(name, flow, backend, spelling):
    config = compose_plain([f"+quant={name}", spelling.format(backend), f"quant.flow={flow}"])
    assert recipe_of(config) == RECIPES[name](flow=flow, backend=backend, **DEFAULTS[name])


@pytest.mark.parametrize("name", RECIPES)
def test_config_spells_every_field_with_its_default(name):
    config = compose_plain([f"+quant={name}"])
    assert recipe_of(config) == RECIPES[name](**DEFAULTS[name])
    assert {field.name for field in dataclasses.fields(RECIPES[name])} == set(config["quant"]) - APP_FIELDS - {"_target_"}


def test_moments_change_from_the_command_line():
    changes = ["quant.freeze_observers.fraction=null", "quant.freeze_observers.epoch=3", "quant.freeze_bn=null"]
    recipe = recipe_of(compose_plain(["+quant=qat", *changes]))
    assert (recipe.freeze_observers.epoch, recipe.freeze_bn) == (3, None)


def test_default_has_no_recipe():
    assert "quant" not in compose_plain([])


def test_experiment_and_command_line_choose_the_backend():
    assert compose_plain(["experiment=digits_qat_qnnpack"])["quant"]["backend"] == "qnnpack"
    assert compose_plain(["experiment=digits_qat_qnnpack", "quant/backend=fbgemm"])["quant"]["backend"] == "fbgemm"


@pytest.mark.sampled
@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(("model/", "data/"))])
def test_every_model_and_data_module_is_built(file):
    if "bert" in file or "sst2" in file:
        pytest.importorskip("transformers")
    config = compose_plain(override_for(file))
    assert isinstance(build(config["model"], "model"), LightningModule)
    assert hasattr(build(config["data"], "data"), "calibration_dataloader")


@pytest.mark.parametrize("logger", ["wandb", "csv"])
def test_every_logger_is_built(logger, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert build(compose_plain([f"logger={logger}"], tmp_path)["logger"], "logger").save_dir == str(tmp_path)
