"""Checkpoints into modules of another structure: float weights from any run, and fake-quant for a module that has none yet."""

import logging
import pickle
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat_lightning.compilation import plain_names, rename_plainly, uncompile, uncompiled_copy
from qat_lightning.core import plan_of, prepare_planned
from qat_lightning.errors import CheckpointError, ConfigurationError, QuantizationError, shorten
from qat_lightning.observers import fake_quants
from qat_lightning.plan import Plan
from qat_lightning.recipe import QAT, Recipe
from qat_lightning.state import PreparedState, plans_in, written_by
from qat_lightning.targets import already, concerns

log = logging.getLogger(__name__)

ConvertedWeights: TypeAlias = Literal["best", "last"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def adopt_checkpoints(module: ModuleT) -> ModuleT:
    """Let ``module`` take on the fake-quant structure of any QAT checkpoint that is loaded into it; returns ``module``.

    As a line at the end of a LightningModule's ``__init__`` it makes ``load_from_checkpoint`` and ``trainer.test(ckpt_path=)`` read
    checkpoints of float and of QAT runs alike, with no callback attached.

    Args:
        module: float.
    """
    module.register_load_state_dict_pre_hook(_adopt)  # type: ignore[no-untyped-call]
    return module


def load_float_weights(model: nn.Module, path: str | Path) -> None:
    """Load a Lightning checkpoint or a state dict, of the model or of one of its children, e.g. of the bare network.

    Of the checkpoint of a QAT run the weights are taken: fake-quant is dropped and BatchNorm is a layer of its own again.

    Args:
        model: float, changed in place; a network built in ``configure_model`` is built first.
        path: the file; only tensors and primitives are unpickled.

    Raises:
        ConfigurationError: no such file, no state dict in it, or weights of other names or shapes.
    """
    if isinstance(model, LightningModule):
        model.configure_model()
    load_into_built(model, path)


def load_into_built(model: nn.Module, path: str | Path) -> None:
    """Do what :func:`load_float_weights` does for a model whose networks are there."""
    weights = plain_names(read_state_dict(Path(path).expanduser()))
    target = _best_match(model, weights)
    weights = _drop_fake_quant(target, weights, path)
    own = target.state_dict()
    problem = _describe_mismatch(plain_names(own), weights)
    if problem:
        raise ConfigurationError(f"The weights in {path} do not fit {type(target).__name__}: {problem}.")
    names = plain_names({name: name for name in own})
    target.load_state_dict({names[plain]: value for plain, value in weights.items()}, strict=False)


def refuse_unprepared(module: nn.Module, recipe: Recipe, modules: Sequence[str] | None) -> RemovableHandle:
    """Refuse checkpoints of QAT for submodules that are not prepared for it, by naming the recipe that wrote them.

    Args:
        module: the LightningModule.
        recipe: of the submodules named in ``modules``.
        modules: None: all of them.

    Returns:
        the handle that ends it.
    """
    refuse: Any = partial(_refuse, recipe, modules)
    handle: RemovableHandle = module.register_load_state_dict_pre_hook(refuse)  # type: ignore[no-untyped-call]
    return handle


def _refuse(
    recipe: Recipe, modules: Sequence[str] | None, module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any
) -> None:
    for name, plan in plans_in(state, prefix):
        other_recipe = not isinstance(recipe, QAT) and concerns(name, modules)
        if other_recipe or plan_of(_submodule(module, name, "The checkpoint")) is None:
            raise CheckpointError(
                f"The checkpoint was written by {written_by(plan)} for {name!r}, which recipe {recipe.name!r} here leaves in float. "
                f"Load it with that recipe, or take its weights alone with QuantizationCallback(..., init_from=FILE)."
            )


def has_checkpoints(trainer: Trainer) -> bool:
    """Whether the Trainer may write checkpoints."""
    return bool(trainer.fast_dev_run or any(isinstance(callback, ModelCheckpoint) for callback in trainer.checkpoint_callbacks))  # type: ignore[attr-defined]


def best_checkpoint(trainer: Trainer, monitored: bool) -> Path | None:
    """Return the best checkpoint of the run, by a metric where one is monitored; None where there is none.

    Args:
        trainer: after its fit.
        monitored: only where a metric decides which is best, not merely the time.
    """
    callbacks = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.best_model_path]
    by_metric = [one for one in callbacks if one.monitor is not None]
    found = by_metric if by_metric or monitored else callbacks
    return Path(found[0].best_model_path) if found else None


def load_best(module: LightningModule, path: Path) -> bool:
    """Load the best checkpoint into a copy of the trained module; a message, not an error, where that is not what should become int8.

    Args:
        module: the copy; what is in it after a failure is not to be used.
        path: the checkpoint.

    Returns:
        whether its weights are to be converted.
    """
    try:
        module.load_state_dict(read_state_dict(path), strict=module.strict_loading)
    except (QuantizationError, RuntimeError) as error:
        log.warning("The best checkpoint cannot be converted, the final weights are: %s", error)
        return False
    prepared = already(module)[0].values()
    if not all(bool(child.fake_quant_enabled[0]) for target in prepared for child in fake_quants(target)):
        log.warning("The best checkpoint, %s, was written before fake-quant began: the final weights are converted.", path)
        return False
    return True


def _drop_fake_quant(model: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the weights under the names of a float model."""
    result = dict(weights)
    for name, plan in list(plans_in(weights)):
        prefix = f"{name}." if name else ""
        own = {key.removeprefix(prefix): result.pop(key) for key in list(result) if key.startswith(prefix)}
        state = PreparedState.of(_prepare_as_written(uncompiled_copy(_submodule(model, name, path)), plan, path))
        assert state is not None  # prepare_planned attaches it
        result.update({prefix + key: tensor for key, tensor in state.float_weights(own).items()})
        log.info("%s: float weights of %r taken from QAT (flow %s), fake-quant dropped, BatchNorm unfused.", path, name, plan.flow)
    return result


def _submodule(model: nn.Module, name: str, source: object) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"{source} was written by a model with a submodule {name!r}, which {type(model).__name__} lacks.") from None


def _prepare_as_written(module: nn.Module, plan: Plan, source: object) -> nn.Module:
    unlike = f"{source} was written for a network unlike {type(module).__name__} ({written_by(plan)})"
    if unknown := sorted(plan.layers.keys() - dict(module.named_modules()).keys()):
        raise CheckpointError(f"{unlike}: it has no layers {shorten(unknown)}.")
    try:
        return prepare_planned(module, plan)
    except Exception as error:  # a plan from a file may ask for anything
        raise CheckpointError(f"{unlike}: {type(error).__name__}: {error}") from error


def _adopt(module: nn.Module, state: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    plans = dict(plans_in(state, prefix))
    if plans and uncompile(module):
        rename_plainly(state)
        plans = dict(plans_in(state, prefix))
    for name, plan in plans.items():
        target = _submodule(module, name, "The checkpoint")
        if name and plan_of(target) is None:
            module.set_submodule(name, _prepare_as_written(target, plan, "The checkpoint"))
            log.info("%r takes on the fake-quant of the checkpoint (flow %s).", name, plan.flow)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file.

    Raises:
        ConfigurationError: no such file, or no state dict in it.
    """
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path} to load weights from.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error) or "the file is empty.").splitlines()[0]
        raise ConfigurationError(
            f"{path} cannot be read as weights alone: {reason} Save a state dict: torch.save(model.state_dict(), FILE)."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(weights, Mapping) or not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigurationError(f"{path} holds no state dict: expected names with tensors, or a mapping with a `state_dict`.")
    return dict(weights)


def _best_match(model: nn.Module, weights: Mapping[str, Any]) -> nn.Module:
    """Return the model or the child that shares most names with the weights."""
    return max(_candidates(model), key=lambda module: len(weights.keys() & plain_names(module.state_dict()).keys()))


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
    return "; ".join(f"{title}: {shorten(names)}" for title, names in parts.items() if names)
