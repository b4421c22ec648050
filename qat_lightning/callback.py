"""The callback: Lightning's hooks, wired to the functions of this package."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from qat_lightning.averaging import copy_anew, keep_ranges, measure_averaged
from qat_lightning.backend import exact_products
from qat_lightning.batch_norm import batch_norms, pass_hooks_on, put_back, with_batch_norms
from qat_lightning.calibration import length_of
from qat_lightning.checkpoint import ConvertedWeights, best_checkpoint, has_checkpoints, load_best, load_into_built, refuse_unprepared
from qat_lightning.compilation import read_plain_names, uncompile
from qat_lightning.conversion import Baseline, quantize_copy, rehearse
from qat_lightning.core import plan_of, prepare_planned, require_layers
from qat_lightning.distillation import Distillation
from qat_lightning.distributed import ALONE, Processes, fail_together, synchronize_ranges
from qat_lightning.environment import check_callbacks, check_trainer, counted_horizon_of, horizon_of, loss_scale_of, progress_of
from qat_lightning.errors import CalibrationError, ConfigurationError, QuantizationError
from qat_lightning.evaluation import Sensitivity, serialized_bytes
from qat_lightning.fallback import max_drop_of
from qat_lightning.gate import PARITY_ACTIONS, ParityAction, check_parity
from qat_lightning.measuring import keep_accuracy, sensitivity_of
from qat_lightning.observers import apply_phase, freeze_bn, switch_observers_off
from qat_lightning.plan import Plan, check_fuse, check_overrides, make_plan, needs_example
from qat_lightning.pruning import keep_zeros, nonzero
from qat_lightning.recipe import QAT, Recipe, check_choice, parse_recipe
from qat_lightning.report import Report
from qat_lightning.running import (
    attached,
    calibration_batches,
    calls_in_step,
    clone,
    evaluation_step,
    example_calls,
    first_batch,
    to_device,
    trainer_of,
)
from qat_lightning.schedule import Phase, check_reachable, phase
from qat_lightning.state import float_weights, plans_in
from qat_lightning.targets import CallRecorder, already, concerns, find_targets, refuse_shared_parts
from qat_lightning.validation import Validation, accuracy_name
from qat_lightning.warm_start import learnt_nothing, start_from_calibration

log = logging.getLogger(__name__)

NO_BASELINE = Baseline(targets={}, size_bytes=0)

# In a checkpoint: which weights were not zero when training began. After a resume others may be zero by chance.
NONZERO = "quantization_nonzero"


class QuantizationCallback(Callback):
    """Quantizes the submodules of any LightningModule during ``trainer.fit``.

    With :class:`QAT`, fake-quant is inserted at setup, observers and BatchNorm statistics freeze on schedule, and at the end of the fit
    a CPU copy is converted to int8. With :class:`StaticPTQ` and :class:`DynamicPTQ` the model trains in float and a copy is quantized
    at the end, or at once with ``max_epochs=0``. The trained module itself is never converted: it stays trainable and checkpointable.
    Under DDP, ranges are those of the data of all processes, and rank zero converts.

    Args:
        recipe: what to do, or the name of a recipe with its defaults: ``"qat"``, ``"ptq"``, ``"dynamic"``.
        modules: names of the submodules to quantize; None takes every child with layers to quantize, but no metric and no loss.
            Callbacks with different names may share a Trainer.
        calibration_data: batches for static quantization, as the datamodule would give them, labels are not needed; None takes
            ``datamodule.calibration_dataloader()`` where there is one, else the training batches. Of an iterator, as many batches are
            kept as the recipe needs.
        init_from: file with float weights to start from: a checkpoint of a float or a QAT run, or a state dict. They are loaded when the
            module is prepared for its first fit.
        convert: which weights become int8: ``"best"``, those of ModelCheckpoint's best checkpoint, or ``"last"``, the final ones.
            None: best where a ModelCheckpoint monitors a metric, else last.
        parity: what to do when int8 and fake-quant differ by more than one quantization step at a layer: ``"error"``, ``"warn"``, or
            ``"off"``, which does not compare them.
        metric: the validation metric that ``max_accuracy_drop`` of the recipe bounds, as ``validation_step`` logs it, higher is better.
            None: the first named ``acc`` or ``accuracy``; where there is none, the agreement of int8's outputs with the float model's.

    Raises:
        ValueError: unknown recipe, weights to convert or parity action.
        TypeError: a value of another type.

    Example::

        quantization = QuantizationCallback(QAT(backend="x86"))
        trainer = Trainer(max_epochs=10, callbacks=[quantization])
        trainer.fit(model, datamodule)
        trainer.test(quantization.quantized_module, datamodule)
    """

    def __init__(
        self,
        recipe: Recipe | str = "qat",
        modules: Sequence[str] | None = None,
        calibration_data: Iterable[Any] | None = None,
        init_from: str | Path | None = None,
        convert: ConvertedWeights | None = None,
        parity: ParityAction = "warn",
        metric: str | None = None,
    ) -> None:
        self._recipe = parse_recipe(recipe)
        if isinstance(modules, str) or not (modules is None or isinstance(modules, Sequence)):
            raise TypeError(f"Expected argument `modules` to be a list of names or None, but got {modules!r}.")
        if modules is not None and not modules:
            raise ValueError("Expected argument `modules` to name at least one module, but got an empty list; None takes every child.")
        if isinstance(calibration_data, Tensor):
            raise TypeError("Expected argument `calibration_data` to be an iterable of batches, but got a Tensor: one batch is [tensor].")
        if calibration_data is not None and (not isinstance(calibration_data, Iterable) or isinstance(calibration_data, str)):
            raise TypeError(f"Expected argument `calibration_data` to be an iterable of batches or None, but got {calibration_data!r}.")
        if init_from is not None and not isinstance(init_from, str | Path):
            raise TypeError(f"Expected argument `init_from` to be a path or None, but got {init_from!r}.")
        if metric is not None and not isinstance(metric, str):
            raise TypeError(f"Expected argument `metric` to be the name of a logged metric or None, but got {metric!r}.")
        check_choice("convert", convert, ("best", "last", None))
        check_choice("parity", parity, PARITY_ACTIONS)
        self._modules = modules
        if isinstance(calibration_data, Iterator):  # it can be read once, and is needed at the beginning and at the end
            calibration_data = list(islice(calibration_data, max(getattr(self._recipe, "calibration_batches", 0), 1)))
        self._calibration_data = calibration_data
        self._init_from = init_from
        self._convert = convert
        self._parity: ParityAction = parity
        self._metric = metric
        self._baseline = NO_BASELINE
        self._baseline_of: int | None = None
        self._plans: dict[str, Plan] = {}
        self._phase: Phase | None = None
        self._rehearsed = False
        self._recorder: CallRecorder | None = None
        self._nonzero: dict[str, Tensor] | None = None
        self._zeros: list[RemovableHandle] = []
        self._distillation: Distillation | None = None
        self._refusal: RemovableHandle | None = None
        self._converted: Path | None = None
        self._batch_norms: dict[str, nn.Module] = {}
        self._processes = ALONE
        self._quantized: LightningModule | None = None
        self._report: Report | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self._recipe

    @property
    def quantized_module(self) -> LightningModule:
        """The int8 copy of the LightningModule, on the CPU; under DDP on rank zero alone.

        Raises:
            QuantizationError: no fit has ended yet and nothing was converted, or this process is not rank zero.
        """
        if self._quantized is None:
            raise QuantizationError(self._why_none("quantized module"))
        return self._quantized

    @property
    def report(self) -> Report:
        """What became of size, latency and parity, and of accuracy where ``trainer.test`` has measured it; under DDP on rank zero alone.

        Raises:
            QuantizationError: no fit has ended yet and nothing was converted, or this process is not rank zero.
        """
        if self._report is None:
            raise QuantizationError(self._why_none("report"))
        return self._report

    @property
    def converted_checkpoint(self) -> Path | None:
        """The checkpoint whose weights became int8; None where it was the final weights."""
        return self._converted

    def _why_none(self, what: str) -> str:
        if self._processes.rank:
            return f"The {what} lies on rank zero, and this process is rank {self._processes.rank}: ask for it if trainer.is_global_zero."
        return f"There is no {what} yet: it is made at the end of trainer.fit."

    def calibration_step(self, module: LightningModule, batch: Any) -> None:
        """Run one calibration batch through ``module``; override it for a module that needs something else.

        Args:
            module: the LightningModule in eval mode, its logging switched off.
            batch: from the calibration data, on the device of ``module``.
        """
        evaluation_step(module, batch)

    # --- preparation -----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prepare the module for every stage, before weights are restored and optimizers are made."""
        prepared, int8 = already(pl_module)
        if int8 and stage == "fit":
            raise ConfigurationError(f"{type(pl_module).__name__} is in int8 and cannot be trained: fit the module it was made from.")
        if int8:
            return
        check_trainer(trainer)
        if not isinstance(self._recipe, QAT) and any(concerns(name, self._modules) for name in prepared):
            raise ConfigurationError(
                f"{type(pl_module).__name__} was prepared for QAT, but this callback has recipe {self._recipe.name!r}: use a fresh module."
            )
        if stage == "fit" and isinstance(self._recipe, QAT) and not getattr(trainer, "fast_dev_run", False):
            check_reachable(self._recipe, horizon_of(trainer))
            check_callbacks(trainer, self._recipe)
        self._processes = Processes.of(trainer)
        if self._processes.count > 1 and max_drop_of(self._recipe) is not None:
            raise ConfigurationError(
                f"`max_accuracy_drop` makes and measures int8 models in one process, but this Trainer uses {self._processes.count}: train "
                f"without it, then quantize with Trainer(devices=1, max_epochs=0) from the checkpoint."
            )
        if self._convert == "best" and stage == "fit" and not has_checkpoints(trainer):
            raise ConfigurationError(
                "convert='best' takes the best checkpoint, but the Trainer writes none: add ModelCheckpoint(monitor=...), or use 'last'."
            )
        _uncompile(pl_module)
        self._refuse_other_checkpoints(pl_module)
        if is_overridden("configure_model", pl_module):
            self._prepare_after_configure_model(trainer, pl_module, stage)
        else:
            self._prepare(trainer, pl_module, stage)
            self._batch_norms = batch_norms(pl_module)

    def _refuse_other_checkpoints(self, pl_module: LightningModule) -> None:
        """Name the recipe that wrote a checkpoint where torch would only list missing keys."""
        if self._refusal is not None:
            self._refusal.remove()
        self._refusal = refuse_unprepared(pl_module, self._recipe, self._modules)

    def _prepare_after_configure_model(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let ``configure_model``, which runs after setup and before weights are restored, prepare what it has built."""
        build = pl_module.configure_model  # the user's, or what another callback has made of it

        def configure_model() -> None:  # not functools.wraps: Lightning would look through it and skip the hook
            vars(pl_module).pop("configure_model", None)
            build()
            self._prepare(trainer, pl_module, stage)
            self._batch_norms = batch_norms(pl_module)

        vars(pl_module)["configure_model"] = configure_model

    def _prepare(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _uncompile(pl_module)  # what configure_model has built
        self._phase, self._rehearsed, self._nonzero = None, False, None
        adopted = self._adopted(pl_module)
        is_qat = isinstance(self._recipe, QAT)
        if is_qat:
            self._plans = adopted
        missing = None if self._modules is None else [name for name in self._modules if name not in adopted]
        if self._baseline_of != id(pl_module):
            self._baseline, self._baseline_of = NO_BASELINE, id(pl_module)
        if (adopted and not missing) or not (is_qat or stage == "fit"):
            return
        if self._init_from is not None and stage == "fit" and not adopted:
            load_into_built(pl_module, self._init_from)
        refuse_shared_parts(pl_module, missing)
        fresh = find_targets(pl_module, self._recipe, missing)
        if self._calibration_data is not None and length_of(self._calibration_data) == 0:
            raise CalibrationError("`calibration_data` has no batch: give it at least one, or None for the training data.")
        check_overrides(self._recipe, fresh)
        check_fuse(self._recipe, fresh)
        plans = self._make_plans(trainer, pl_module, fresh)
        size = serialized_bytes(pl_module)
        floats = {name: clone(fresh[name]).cpu().eval() for name in plans}
        self._baseline = Baseline(targets=floats, size_bytes=size)
        for name, plan in plans.items():
            rehearse(name, floats[name], plan)
        if is_qat:
            for name, plan in plans.items():
                pl_module.set_submodule(name, prepare_planned(fresh[name], plan))
            copy_anew(trainer, pl_module)
        self._plans = {**adopted, **plans}
        layers = sum(len(plan.layers) for plan in plans.values())
        log.info("%d layers of %s will run in int8 (recipe %s, flow %s).", layers, sorted(plans), self._recipe.name, self._recipe.flow)
        _advise_on_kernels(plans)

    def _adopted(self, pl_module: LightningModule) -> dict[str, Plan]:
        """Return the plans of the targets that an earlier fit or a checkpoint has prepared."""
        return {name: plan for name, target in self._prepared(pl_module).items() if (plan := plan_of(target)) is not None}

    def _prepared(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        """Return the prepared modules that are this callback's."""
        prepared, _ = already(pl_module)
        return {name: target for name, target in prepared.items() if self._modules is None or name in self._modules}

    def _make_plans(self, trainer: Trainer, pl_module: LightningModule, targets: dict[str, nn.Module]) -> dict[str, Plan]:
        examples = example_calls(pl_module, targets)
        if needs_example(self._recipe) and examples.keys() != targets.keys():
            batch = first_batch(trainer, self._calibration_data)
            if batch is not None:
                examples = {**calls_in_step(pl_module, targets, batch, trainer, self.calibration_step), **examples}
        plans = {name: make_plan(target, self._recipe, name, examples.get(name)) for name, target in targets.items()}
        require_layers(plans)
        return {name: plan for name, plan in plans.items() if plan.layers}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rounding of BatchNorm layers that ``sync_batchnorm`` has replaced since setup."""
        pass_hooks_on(pl_module, self._batch_norms)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over which zeros the run keeps; of a float run the weights alone: its optimizers know other parameters."""
        self._nonzero = checkpoint.get(NONZERO)
        training = trainer.state.fn == TrainerFn.FITTING and already(pl_module)[0]
        if not training or any(True for _ in plans_in(checkpoint["state_dict"])):
            return
        checkpoint.update(optimizer_states=[], lr_schedulers=[], callbacks={})
        checkpoint.pop("loops", None)
        log.warning("The checkpoint is of a float run: its weights are taken; epochs, optimizers and schedulers start anew.")

    # --- schedule --------------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a step that this run never reaches, now that its batches are counted."""
        if isinstance(self._recipe, QAT) and not getattr(trainer, "fast_dev_run", False):
            check_reachable(self._recipe, counted_horizon_of(trainer))
        self._release_zeros()
        if isinstance(self._recipe, QAT) and self._recipe.keep_zeros:
            prepared = self._prepared(pl_module)
            self._nonzero = nonzero(prepared) if self._nonzero is None else self._nonzero
            self._zeros = keep_zeros(prepared, self._nonzero)

    def _release_zeros(self) -> None:
        for handle in self._zeros:
            handle.remove()
        self._zeros = []

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the phase: Lightning has put the module, BatchNorm included, in train mode."""
        self._phase = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enter the phase that the trainer's progress calls for."""
        if isinstance(self._recipe, QAT):
            wanted = phase(self._recipe, progress_of(trainer, batch_idx))
            if wanted.fake_quant:
                self._begin(trainer, pl_module, self._recipe, wanted)
            self._enter(pl_module, wanted)
        if not self._rehearsed:
            self._recorder = CallRecorder({name: pl_module.get_submodule(name) for name in self._plans})

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Share ranges with the other processes, and after the first batch run an int8 copy: better to fail now than after a night."""
        if self._processes.count > 1 and self._phase is not None and self._phase.observers:
            synchronize_ranges(pl_module.get_submodule(name) for name in self._plans)
        keep_ranges(trainer, pl_module)
        if self._recorder is None:
            return
        calls, self._recorder, self._rehearsed = self._recorder.stop(), None, True
        module = with_batch_norms(pl_module, self._batch_norms)
        for name, plan in self._plans.items():
            if calls[name]:
                rehearse(name, module.get_submodule(name), plan, calls[name][0])

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Correct what an average over the epoch has made of the ranges."""
        keep_ranges(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the ranges of averaged weights, which take the place of the module's own, and add which weights were not zero."""
        keep_ranges(trainer, pl_module)
        if self._nonzero is not None:
            checkpoint.setdefault(NONZERO, {}).update(self._nonzero)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch observers off: they learn from training data alone."""
        self._leave(pl_module)
        keep_ranges(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch observers off."""
        self._leave(pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch observers off."""
        self._leave(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch observers off, and let BatchNorm learn again should the module be trained further."""
        self._leave(pl_module)
        self._release_zeros()
        self._stop_teaching()
        for target in self._prepared(pl_module).values():
            freeze_bn(target, frozen=False)
        keep_ranges(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a module that was interrupted as after a fit, to be tested, converted or trained on."""
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        vars(pl_module).pop("configure_model", None)
        self._leave(pl_module)
        self._release_zeros()
        self._stop_teaching()
        for target in self._prepared(pl_module).values():
            freeze_bn(target, frozen=False)
            if not target.training:  # interrupted in a validation
                target.eval()

    def _stop_teaching(self) -> None:
        if self._distillation is not None:
            self._distillation.stop()
            self._distillation = None

    def _begin(self, trainer: Trainer, pl_module: LightningModule, recipe: QAT, wanted: Phase) -> None:
        """Calibrate where fake-quant begins now, as the state dict tells, so that a resumed run does not do it again; and teach."""
        targets = {name: pl_module.get_submodule(name) for name in self._plans}
        fresh = [name for name, target in targets.items() if learnt_nothing(target)]
        if recipe.distillation:  # the teacher is the float model, before its biases are corrected
            for name in self._baseline.targets.keys() & fresh:
                self._baseline.targets[name].load_state_dict(float_weights(targets[name]), strict=False)
        if fresh and recipe.calibration_batches:
            self._calibrate(trainer, pl_module, recipe, wanted, {name: self._plans[name] for name in fresh})
        if recipe.distillation and self._distillation is None:
            self._distillation = Distillation(targets, self._baseline.targets, recipe.distillation, lambda: loss_scale_of(trainer))

    def _calibrate(self, trainer: Trainer, pl_module: LightningModule, recipe: QAT, wanted: Phase, plans: dict[str, Plan]) -> None:
        batches = calibration_batches(trainer, self._calibration_data)
        if length_of(batches) == 0:
            if not wanted.observers:
                raise CalibrationError(
                    f"`freeze_observers={recipe.freeze_observers}` freezes the ranges before the observers have seen any data, since the "
                    f"training batches can be read once only: give `calibration_data`, or freeze them later."
                )
            log.warning("The training batches can be read once only: ranges begin with the first one. Give `calibration_data` for better.")
        else:
            start_from_calibration(pl_module, plans, recipe, wanted, trainer, batches, self.calibration_step, self._batch_norms)

    @property
    @override
    def state_key(self) -> str:
        """Tell apart the callbacks of different submodules in a checkpoint."""
        return self._generate_state_key(modules=None if self._modules is None else list(self._modules))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the teachers of a distillation, which a resumed run could not have from anywhere else."""
        teaching = isinstance(self._recipe, QAT) and bool(self._recipe.distillation)
        return {"teachers": {name: target.state_dict() for name, target in self._baseline.targets.items()}} if teaching else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the teachers of the run that is resumed."""
        for name, weights in state_dict.get("teachers", {}).items():
            if name in self._baseline.targets:
                self._baseline.targets[name].load_state_dict(weights)

    def _enter(self, pl_module: LightningModule, wanted: Phase) -> None:
        if wanted == self._phase:
            return
        for target in self._prepared(pl_module).values():
            apply_phase(target, wanted)
        self._phase = wanted

    def _leave(self, pl_module: LightningModule) -> None:
        for target in self._prepared(pl_module).values():
            switch_observers_off(target)
        self._phase = None

    # --- conversion ------------------------------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the int8 copy and the report; the trained module is left as it is."""
        put_back(pl_module, self._batch_norms)
        measure_averaged(trainer, pl_module)
        copied, path = self._copy(trainer, pl_module)
        self._quantize(copied, trainer, self._batches(trainer), path, self._processes)

    def convert(self, pl_module: LightningModule, batches: Iterable[Any] | None = None) -> LightningModule:
        """Convert a module as it is now, without a fit that ends: half-trained after an error or an interrupt, or between two fits.

        Args:
            pl_module: prepared by a fit of this callback, or by a checkpoint of QAT; it is not changed and can be trained on.
            batches: as for ``calibration_data``; None: these, or else the training data of the Trainer that last ran ``pl_module``.

        Returns:
            the int8 copy on the CPU, which is ``quantized_module`` from now on; ``report`` is of it, too.

        Raises:
            QuantizationError: no fit has prepared the module, or it is in int8.
            CalibrationError: there are no batches, or the observers have seen none.
            ParityError: as at the end of a fit, with ``parity="error"``.
        """
        self._require_plans(pl_module, "convert")
        trainer = trainer_of(pl_module)
        batches = self._batches(trainer) if batches is None else batches
        if length_of(batches) == 0:
            raise CalibrationError("There is no batch to calibrate or compare int8 with: give some, as in convert(module, batches).")
        self._quantize(clone(pl_module).cpu().eval(), trainer, batches, None, ALONE)
        return self.quantized_module

    def measure_sensitivity(self, pl_module: LightningModule, batches: Iterable[Any] | None = None, use_metric: bool = True) -> Sensitivity:
        """Measure what int8 does at each layer of a module as it is now; see :func:`qat_lightning.measure_sensitivity`.

        Args:
            pl_module: as for :meth:`convert`, not changed either.
            batches: as for :meth:`convert`; some of them serve to compare outputs.
            use_metric: run the validation data for each layer, twice, and add the callback's ``metric``; False compares outputs alone.

        Raises:
            QuantizationError: no fit has prepared the module, it is in int8, or the recipe is dynamic.
            CalibrationError: there are no batches, or the observers have seen none.
        """
        self._require_plans(pl_module, "measure_sensitivity")
        trainer = trainer_of(pl_module)
        copied = clone(pl_module).cpu().eval()
        validation = Validation.of(trainer, copied) if use_metric else None
        batches = self._batches(trainer) if batches is None else batches
        return sensitivity_of(copied, self._plans, self._recipe, batches, self._step(trainer), validation, self._metric)

    def _require_plans(self, pl_module: LightningModule, method: str) -> None:
        if isinstance(self._recipe, QAT):
            self._plans = self._adopted(pl_module)
        if not self._plans or not self._plans.keys() <= dict(pl_module.named_modules()).keys() or already(pl_module)[1]:
            raise QuantizationError(
                f"{type(pl_module).__name__} is not prepared by recipe {self._recipe.name!r}, so there is nothing to convert: call "
                f"trainer.fit with this callback first, and give {method}() the module that was fitted; an int8 one is converted already."
            )

    def _step(self, trainer: Trainer | None) -> Callable[[nn.Module, Any], None]:
        """Return what runs a batch through a copy of the module."""

        def step(module: nn.Module, batch: Any) -> None:
            assert isinstance(module, LightningModule)
            with attached(module, trainer):
                self.calibration_step(module, to_device(module, batch))

        return step

    def _batches(self, trainer: Trainer | None) -> Iterable[Any]:
        if trainer is None:
            return self._calibration_data if self._calibration_data is not None else ()
        return calibration_batches(trainer, self._calibration_data)

    def _quantize(
        self, copied: LightningModule, trainer: Trainer | None, batches: Iterable[Any], path: Path | None, processes: Processes
    ) -> None:
        """Turn a copy of the trained module into the int8 module, and report; ``path`` is where its weights come from."""
        plans, fallback = self._plans, None
        if (max_drop := max_drop_of(self._recipe)) is not None:
            validation = Validation.of(trainer, copied)
            choice, batches = keep_accuracy(copied, plans, self._recipe, batches, self._step(trainer), validation, self._metric, max_drop)
            plans, fallback = choice.plans, choice.fallback
        with attached(copied, trainer):

            def step(batch: Any) -> None:
                self.calibration_step(copied, to_device(copied, batch))

            compare = self._parity != "off"
            report = quantize_copy(copied, plans, self._recipe, batches, step, self._baseline, compare, processes)
        self._converted = path
        with fail_together(processes):
            if report is not None:
                self._report = replace(report, checkpoint=None if path is None else path.name, fallback=fallback)
                self._quantized = copied
                self._share(copied, trainer)
                check_parity(self._report, plans, self._baseline.targets, self._parity)

    def _share(self, quantized: LightningModule, trainer: Trainer | None) -> None:
        """Exchange int8 submodules with other callbacks, so that the int8 module of each has those of all."""
        for other in trainer.callbacks if trainer is not None else ():  # type: ignore[attr-defined]
            if isinstance(other, QuantizationCallback) and other is not self and other._quantized is not None:
                for name in self._plans:
                    other._quantized.set_submodule(name, quantized.get_submodule(name))
                for name in other._plans:
                    quantized.set_submodule(name, other._quantized.get_submodule(name))

    def _copy(self, trainer: Trainer, pl_module: LightningModule) -> tuple[LightningModule, Path | None]:
        """Return a copy on the CPU with the weights to convert, and the checkpoint they come from."""
        path = None if self._convert == "last" else best_checkpoint(trainer, monitored=self._convert is None)
        copied = clone(pl_module).cpu().eval()
        if path is None or not load_best(copied, path):
            return clone(pl_module).cpu().eval(), None
        return copied, path

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the accuracy that a test has measured, of the fake-quantized or of the int8 model."""
        name = accuracy_name(trainer.callback_metrics)
        if self._report is None or name is None:
            return
        accuracy = trainer.callback_metrics[name]
        prepared, int8 = already(pl_module)
        if int8:
            self._report = self._report.with_accuracy("int8", float(accuracy))
        elif prepared:
            self._report = self._report.with_accuracy("fake_quant", float(accuracy))


def _advise_on_kernels(plans: Mapping[str, Plan]) -> None:
    """Tell of layers that another engine runs because that of the backend overflows, where 7 bits would avoid it."""
    layers = [(plan.backend, layer.kernel) for plan in plans.values() for layer in plan.layers.values()]
    moved = [kernel for backend, kernel in layers if kernel.engine != backend and not exact_products(kernel.weight_bits)]
    if moved:
        log.info(
            "%d of %d layers run on another engine than the backend's, whose kernels overflow on this processor, which has no VNNI. If the "
            "int8 model is for such processors, weight_bits=7 lets it use them.",
            *(len(moved), len(layers)),
        )


def _uncompile(pl_module: LightningModule) -> None:
    compiled = [repr(name) if name else type(pl_module).__name__ for name in uncompile(pl_module)]
    if compiled:
        read_plain_names(pl_module)
        log.warning(
            "%s runs without torch.compile from now on, for training and conversion change it. To keep the speed of float training, "
            "attach the QuantizationCallback in a second fit. Compile `quantized_module` or the trained module afterwards.",
            ", ".join(compiled),
        )
