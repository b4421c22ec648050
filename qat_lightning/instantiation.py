"""From configs to objects, with an allowlist of what a config may name: a config is data, and may come from someone else."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException

from qat_lightning.errors import ConfigurationError, QuantizationError

BUILT_IN_TARGETS = (
    "qat_lightning",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.transforms",
    "torchvision.datasets",
    "torchmetrics",
    # Not all of lightning.pytorch: its loaders of checkpoints unpickle whatever address a config gives them.
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
)
"""Modules, and names in them, whose public classes and functions a ``_target_`` may name."""

# Their messages are sentences; those of others, such as KeyError, need the name of the error to make sense.
PLAIN_ERRORS = (TypeError, ValueError, OSError, QuantizationError, MisconfigurationException)


def find_targets(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the value of every ``_target_`` in a resolved config, at any depth.

    Args:
        config: nested dicts, lists and values.
        path: where ``config`` lies in the whole.
    """
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield path, config["_target_"]
        for key, value in config.items():
            yield from find_targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(config, Sequence) and not isinstance(config, str | bytes):
        for index, value in enumerate(config):
            yield from find_targets(value, f"{path}[{index}]")


def check_targets(config: Any, allowed_targets: Sequence[str] = ()) -> None:
    """Refuse a config that names anything outside the allowlist; nothing outside it is imported to find out.

    Both the dotted path and the module that the object was defined in must lie under an allowed name, so that a detour
    through an import of an allowed module (``torch.nn.modules.module.torch.hub.load``) leads nowhere.

    Args:
        config: nested dicts, lists and values.
        allowed_targets: packages, modules or full names to allow beyond :data:`BUILT_IN_TARGETS`.

    Raises:
        ConfigurationError: names the place, the target and how to allow it.
    """
    if isinstance(allowed_targets, str) or not all(isinstance(name, str) and name for name in allowed_targets):
        raise ConfigurationError(f"Expected `allowed_targets` to be a list of names such as [my_package], but got {allowed_targets!r}.")
    targets = list(find_targets(config))
    for path, target in targets:
        _check_name(path, target, allowed_targets)
    for path, target in targets:
        _check_object(path, target, allowed_targets)


def build(config: Any, key: str, **objects: Any) -> Any:
    """Return the object that a checked config describes.

    Args:
        config: a mapping with a ``_target_``.
        key: where it lies in the whole config, for messages.
        objects: arguments that replace those of the config; they are passed on as they are, not copied.

    Raises:
        ConfigurationError: the config has no ``_target_``, or the class or function refused its arguments.
    """
    if not isinstance(config, Mapping) or "_target_" not in config:
        raise ConfigurationError(f"Expected `{key}` to be a mapping with a `_target_`, but got {config!r}.")
    try:
        return instantiate({**config, "_partial_": True}, _convert_="all")(**objects)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        reason = cause if isinstance(cause, PLAIN_ERRORS) else repr(cause)
        raise ConfigurationError(f"`{key}` ({config['_target_']}): {reason}") from error


def make_importable(folder: str) -> None:
    """Let a ``_target_`` name a module in ``folder``; installed modules of the same name win."""
    if os.path.abspath(folder) not in map(os.path.abspath, sys.path):
        sys.path.append(folder)


def _check_name(path: str, target: Any, allowed_targets: Sequence[str]) -> None:
    if not isinstance(target, str) or target == "???":
        raise ConfigurationError(f"Expected `{path}._target_` to be the full name of a class or function, but got {target!r}.")
    if _lies_under(target, allowed_targets):
        return
    if not _lies_under(target, BUILT_IN_TARGETS) or any(part.startswith("_") for part in target.split(".")):
        raise _refusal(path, target, target)


def _check_object(path: str, target: str, allowed_targets: Sequence[str]) -> None:
    try:
        found = get_object(target)
    except (ImportError, ValueError, InstantiationException) as error:
        raise ConfigurationError(f"`{path}._target_={target}` cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigurationError(f"Expected `{path}._target_` to name a class or function, but {target} is {found!r}.")
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    home = f"{module}.{name}"
    if module is not None and _lies_under(home, allowed_targets):
        return
    # Methods are left out: LightningModule.load_from_checkpoint, for one, unpickles.
    if not isinstance(name, str) or "." in name or not _lies_under(home, BUILT_IN_TARGETS):
        raise _refusal(path, target, home)


def _lies_under(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _refusal(path: str, target: str, home: str) -> ConfigurationError:
    package = home.partition(".")[0]
    comes_from = "" if home == target else f", which is {home},"
    return ConfigurationError(
        f"`{path}._target_={target}`{comes_from} is not on the list of what a config may name: {', '.join(BUILT_IN_TARGETS)}. "
        f"If you trust it, add its package: 'allowed_targets=[{package}]'."
    )
