import sys

import pytest
import torch
from torch import nn

from qat_lightning.errors import ConfigurationError
from qat_lightning.instantiation import build, check_targets, find_targets, make_importable

ALLOWED = [
    "qat_lightning.QAT",
    "qat_lightning.recipe.QAT",
    "qat_lightning.tracking.wandb_logger",
    "torch.nn.Linear",
    "torch.optim.SGD",
    "torch.optim.lr_scheduler.CosineAnnealingLR",
    "torchvision.models.resnet18",
    "torchvision.transforms.v2.Normalize",
    "torchvision.datasets.FakeData",
    "torchmetrics.classification.MulticlassAccuracy",
    "lightning.pytorch.Trainer",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.loggers.CSVLogger",
]

REFUSED = [
    "os.system",
    "builtins.eval",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "torchvision_evil.models.x",
    "torch.nnx.Linear",
    "qat_lightning_evil.QAT",
    # Detours through what an allowed module imports.
    "torch.nn.modules.module.torch.hub.load",
    "lightning.pytorch.trainer.trainer.os.system",
    "qat_lightning.app.os.system",
    "qat_lightning.app.torch.load",
    "qat_lightning.instantiation.instantiate",
    # Loaders that unpickle.
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "lightning.pytorch.core.saving._load_from_checkpoint",
    "qat_lightning.models.Classifier.load_from_checkpoint",
    # Private names and methods.
    "qat_lightning.tracking._log_to_wandb",
    "torch.nn.Module.load_state_dict",
    # Nothing that can be called.
    "torch.nn",
    "torch.optim.sgd.__all__",
    # Nothing at all.
    "torch.nn.NoSuchLayer",
    "",
    "torch.nn..Linear",
    None,
    3,
    "???",
]


@pytest.mark.parametrize("target", ALLOWED)
def test_built_in_target_is_allowed(target):
    check_targets({"model": {"_target_": target}})


@pytest.mark.parametrize("target", REFUSED)
def test_anything_else_is_refused(target):
    with pytest.raises(ConfigurationError, match="model"):
        check_targets({"model": {"_target_": target}})


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"model": {"net": {"_target_": "os.system"}}}, r"`model\.net\._target_"),
        ({"a": [{"_target_": "torch.nn.ReLU"}, {"_target_": "os.system"}]}, r"`a\[1\]\._target_"),
        ({"a": {"_target_": "torch.nn.ReLU", "_args_": [[{"_target_": "os.system"}]]}}, r"`a\._args_\[0\]\[0\]\._target_"),
        ({"a": {"_target_": "torch.nn.ReLU", "_recursive_": False, "b": {"_target_": "os.system"}}}, r"`a\.b\._target_"),
    ],
)
def test_targets_are_checked_at_any_depth(config, place):
    with pytest.raises(ConfigurationError, match=place):
        check_targets(config)


def test_find_targets_yields_path_and_value():
    config = {"a": {"_target_": "x", "b": [{"_target_": "y"}]}, "text": "_target_"}
    assert list(find_targets(config)) == [("a", "x"), ("a.b[0]", "y")]


@pytest.fixture
def own_package(tmp_path, monkeypatch):
    (tmp_path / "own_package.py").write_text(
        "from os import system\nfrom torch import nn\n\nclass Net(nn.Linear):\n"
        "    @classmethod\n    def small(cls):\n        return cls(1, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_package"
    sys.modules.pop("own_package", None)


def test_refused_module_is_not_imported_and_the_way_out_works(own_package):
    config = {"_target_": f"{own_package}.Net", "in_features": 2, "out_features": 3}
    with pytest.raises(ConfigurationError, match=r"'allowed_targets=\[own_package\]'"):
        check_targets(config)
    assert own_package not in sys.modules
    check_targets(config, [own_package])
    assert build(config, "model").out_features == 3


@pytest.mark.parametrize(("target", "allowed"), [("own_package.Net.small", True), ("own_package.system", False)])
def test_own_package_may_use_methods_but_no_detours(own_package, target, allowed):
    if allowed:
        check_targets({"_target_": target}, [own_package])
        return
    with pytest.raises(ConfigurationError, match="system"):
        check_targets({"_target_": target}, [own_package])


@pytest.mark.parametrize("allowed", ["my_package", [""], [3]])
def test_malformed_allowlist(allowed):
    with pytest.raises(ConfigurationError, match="allowed_targets"):
        check_targets({}, allowed)


def test_build_passes_objects_on_as_they_are():
    layer = nn.Linear(2, 2)
    assert build({"_target_": "torch.nn.Sequential", "_args_": []}, "net") is not None
    optimizer = build({"_target_": "torch.optim.SGD", "lr": 0.5}, "optimizer", params=layer.parameters())
    assert optimizer.param_groups[0]["params"][0] is layer.weight


def test_build_converts_to_plain_containers():
    transform = build({"_target_": "torchvision.transforms.Normalize", "mean": [0.5], "std": [0.5]}, "transform")
    assert type(transform.mean) is list
    assert torch.equal(transform(torch.full((1, 1, 1), 0.5)), torch.zeros(1, 1, 1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "mapping with a `_target_`"),
        ({"lr": 1}, "mapping with a `_target_`"),
        ({"_target_": "torch.nn.Linear", "bogus": 1}, "bogus"),
        ({"_target_": "qat_lightning.QAT", "flow": "jit"}, r"Expected argument `flow`.*'jit'"),
        ({"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Linear"}]}, "in_features"),
    ],
)
def test_build_names_place_and_reason(config, message):
    with pytest.raises(ConfigurationError, match=rf"`part`.*{message}"):
        build(config, "part")


def test_make_importable_appends_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    make_importable(str(tmp_path))
    make_importable(f"{tmp_path}/.")
    assert sys.path.count(str(tmp_path)) == 1
    assert sys.path[-1] == str(tmp_path)
