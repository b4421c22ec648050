"""Float weights from a file into a model, before anything is trained."""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from qat_lightning.errors import ConfigurationError

SHOWN_NAMES = 5


def load_float_weights(model: LightningModule, path: str | Path) -> None:
    """Load a Lightning checkpoint or a state dict, of the model or of one of its children, e.g. of the bare network.

    Args:
        model: changed in place; a network built in ``configure_model`` is built first.
        path: the file; only tensors and primitives are unpickled.

    Raises:
        ConfigurationError: no such file, no state dict in it, or weights of other names or shapes.
    """
    weights = read_state_dict(Path(path))
    model.configure_model()
    target = _best_match(model, weights)
    problem = _describe_mismatch(target.state_dict(), weights)
    if problem:
        raise ConfigurationError(f"The weights in `ckpt_path={path}` do not fit {type(target).__name__}: {problem}.")
    target.load_state_dict(weights, strict=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file.

    Raises:
        ConfigurationError: no such file, or no state dict in it.
    """
    if not path.is_file():
        raise ConfigurationError(f"`ckpt_path={path}` is not a file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error) or "the file is empty.").splitlines()[0]
        raise ConfigurationError(
            f"`ckpt_path={path}` cannot be read as weights alone: {reason} Save a state dict: torch.save(model.state_dict(), FILE)."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigurationError(f"`ckpt_path={path}` holds no state dict: expected names with tensors, or a mapping with a `state_dict`.")
    return dict(weights)


def _best_match(model: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """Return the model or the child that shares most names with the weights."""
    return max(_candidates(model), key=lambda module: len(weights.keys() & module.state_dict().keys()))


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    yield from model.children()


def _describe_mismatch(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    shapes = [
        f"{name} is {tuple(got[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in got and got[name].shape != tensor.shape
    ]
    # Checkpoints older than PyTorch 0.4.1 have no batch counters, which only an average over all batches needs.
    missing = [name for name in expected if name not in got and not name.endswith("num_batches_tracked")]
    parts = {"missing": missing, "not in the model": [name for name in got if name not in expected], "other shapes": shapes}
    return "; ".join(f"{title}: {_shorten(names)}" for title, names in parts.items() if names)


def _shorten(names: list[str]) -> str:
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
