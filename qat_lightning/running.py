"""Copies a LightningModule and runs batches through the copy as the Trainer would, without a Trainer loop around it."""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from qat_lightning.distributed import Processes, alone, own_share
from qat_lightning.modes import evaluating
from qat_lightning.plan import Call
from qat_lightning.targets import capture_calls

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def clone(module: ModuleT) -> ModuleT:
    """Return a deep copy of ``module``; tensors that a forward pass left on it as attributes are copied without their graph."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        for leaf in pytree.tree_leaves({key: value for key, value in vars(child).items() if not key.startswith("_")}):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
                memo[id(leaf)] = leaf.detach().clone()
    copied = copy.deepcopy(module, memo)
    if isinstance(copied, LightningModule):
        copied._metric_attributes = None  # Lightning's cache of metrics by identity, which a copy changes
    return copied


@contextmanager
def attached(module: LightningModule, trainer: Trainer | None) -> Iterator[None]:
    """Give a copied module its trainer for the time of the block, with ``self.log`` switched off: no loop is there to log for.

    Its metrics are reset at the end: a later test of the copy must not count what the block has run.
    """
    module.trainer = trainer
    for name in ("log", "log_dict"):
        vars(module)[name] = _ignore
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            vars(module).pop(name)
        for child in module.modules():
            if isinstance(child, Metric):
                child.reset()
        module.trainer = None


def trainer_of(module: LightningModule) -> Trainer | None:
    """Return the Trainer that last ran the module, None where none has."""
    try:
        return module.trainer
    except RuntimeError:
        return None


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take the place of ``self.log``."""


def to_device(module: LightningModule, batch: Any) -> Any:
    """Return ``batch`` after the transfer hooks of the module and its datamodule, on the device of the module."""
    return module._apply_batch_transfer_handler(batch, device=module.device, dataloader_idx=0)


def evaluation_step(module: LightningModule, batch: Any) -> Any:
    """Run a batch through ``module``: a bare tensor by ``predict_step``, anything else by the first step that the user wrote.

    That of training is the last choice, and none where it makes optimizer steps itself.

    Args:
        module: in eval mode.
        batch: as a dataloader gives it, on the device of the module.
    """
    if isinstance(batch, Tensor):
        return module.predict_step(batch)
    for name in ("validation_step", "test_step", "predict_step", "training_step"):
        if is_overridden(name, module) and (name != "training_step" or module.automatic_optimization):
            step = getattr(module, name)
            parameters = inspect.signature(step).parameters
            # Lightning leaves out the index of the batch, too, where a step takes the batch alone.
            if [parameter.kind for parameter in parameters.values()] == [inspect.Parameter.POSITIONAL_OR_KEYWORD]:
                return step(batch)
            return step(batch, 0, 0) if "dataloader_idx" in parameters else step(batch, 0)
    return module.predict_step(batch)


def calibration_batches(trainer: Trainer, given: Iterable[Any] | None) -> Iterable[Any]:
    """Return the batches for calibration of this process; reading them leaves the loaders of the training alone.

    Args:
        trainer: in its fit, or after it.
        given: what the user has chosen; None takes the datamodule's ``calibration_dataloader`` where it has one, which is for
            evaluation transforms, else the training batches.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if given is None and datamodule is not None and hasattr(datamodule, "calibration_dataloader"):
        given = datamodule.calibration_dataloader()
    if given is not None:
        return own_share(given, Processes.of(trainer))
    # Of these, Lightning has given each process its own.
    loaders = trainer.train_dataloader
    if isinstance(loaders, dict | list | tuple):
        mode = trainer.fit_loop._combined_loader._mode  # type: ignore[union-attr]
        return (batch for batch, _, _ in CombinedLoader(pytree.tree_map(_beside, loaders), mode))
    return () if loaders is None else _beside(loaders)


def _beside(loader: Any) -> Any:
    """Return a loader of the same batches without a position: training may be in the middle of the other one, or save where it is.

    What can be read once only, such as a generator, is kept for the training.
    """
    if isinstance(loader, Iterator):
        return ()
    copied = copy.copy(loader)
    if "_iterator" in vars(copied):
        vars(copied)["_iterator"] = None  # with persistent workers, or a state, the iterator would be started anew
    return copied


def to_cpu_float(call: Call) -> Call:
    """Return the call on the CPU, half-precision tensors as float32: what int8 kernels take."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.cpu().float() if leaf.is_floating_point() else leaf.cpu()

    args, kwargs = pytree.tree_map(move, (call.args, call.kwargs))
    return Call(args, kwargs)


def first_batch(trainer: Trainer, given: Iterable[Any] | None) -> Any:
    """Return a batch to learn from how modules are called, before the loops have their loaders; None where reading one would lose it.

    Args:
        trainer: in its setup, or in any later hook.
        given: as for :func:`calibration_batches`.
    """
    sources = [given] if given is not None else []
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None and hasattr(datamodule, "calibration_dataloader"):
        sources.append(datamodule.calibration_dataloader())
    loops = (trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    with torch.random.fork_rng(devices=[]):  # a shuffled loader draws its order
        for source in sources or (_loader_of(loop) for loop in loops):
            if isinstance(source, Iterable) and not isinstance(source, Iterator):
                return next(iter(source if given is not None else _beside(source)), None)
    return None


def _loader_of(loop: Any) -> Any:
    """Return what a loop will read, None where it is not known yet."""
    source = getattr(loop, "_data_source", None)
    if source is None or source.instance is None or not source.is_defined():
        return None
    loader = source.dataloader()
    if isinstance(loader, Iterable) and not isinstance(loader, Iterator | dict | list | tuple):
        return loader
    return CombinedLoader(loader, "max_size_cycle") if isinstance(loader, dict | list | tuple) and loader else None


def calls_in_step(
    module: LightningModule, targets: Mapping[str, nn.Module], batch: Any, trainer: Trainer, step: Callable[[LightningModule, Any], Any]
) -> dict[str, Call]:
    """Return how ``step`` calls each target while it runs a batch through a copy of the module on the CPU.

    Args:
        module: the LightningModule; it is not changed.
        targets: its modules by name.
        batch: as a loader gives it.
        trainer: in its setup.
        step: runs a batch through a LightningModule.
    """
    copied = clone(module).cpu().eval()
    copies = {name: copied.get_submodule(name) for name in targets}

    def run() -> None:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), alone(), attached(copied, trainer):
            step(copied, to_device(copied, batch))

    return {name: calls[0] for name, calls in capture_calls(copies, run).items() if calls}


def example_calls(module: LightningModule, targets: Mapping[str, nn.Module]) -> dict[str, Call]:
    """Return how ``forward`` of the LightningModule calls each target, where it has an ``example_input_array``."""
    example = module.example_input_array
    if example is None:
        return {}

    def run() -> None:
        with evaluating(module), torch.no_grad():
            if isinstance(example, Mapping):
                module(**example)
            else:
                module(*example) if isinstance(example, tuple) else module(example)

    return {name: calls[0] for name, calls in capture_calls(targets, run).items() if calls}
