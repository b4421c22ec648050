"""Training runs that are killed and resumed, each in a process of its own; started by test_resume.py.

Torch is imported once, and every run is a fork: `python -m tests.killed_run FOLDER` leaves a folder for each.
"""

import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from qat_lightning import QAT, QuantizationCallback, When
from tests.nets import QUIET, Images, Plain

EPOCHS, BATCHES = 4, 7
STEPS = EPOCHS * BATCHES
MOMENTS = {"start": When(step=7), "freeze_bn": When(step=13), "freeze_observers": When(fraction=0.7)}
KINDS = ("float", "fx", "eager", "pt2e")


@dataclass(frozen=True)
class Kill:
    """Where a run ends: in a hook, once the trainer has made so many optimizer steps; ``saves`` names what writes its checkpoints."""

    saves: str
    hook: str
    step: int

    def __str__(self):
        return f"{self.saves}-{self.hook}-{self.step}"


# PyTorch's thread pool does not survive every fork ("Invalid thread pool!"), and aborts: that says nothing of the run.
ATTEMPTS = 3

HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")
# Before, at and after each moment of the schedule (7, 13, 20), each checkpoint (every third step) and each end of an epoch (7, 14, 21).
SWEPT = (4, 5, 6, 7, 8, 10, 12, 13, 14, 16, 19, 20, 21, 23, 25)
KILLS = [
    *(Kill("steps", HOOKS[step % 3], step) for step in SWEPT),
    *(Kill("steps", "on_validation_batch_start", step) for step in (11, 18)),
    *(Kill("steps", "write", step) for step in (6, 21)),
    *(Kill("accumulated", hook, step) for hook, step in (("on_train_batch_end", 8), ("on_train_batch_start", 14))),
    *(Kill("validation", "on_train_batch_end", step) for step in (12, 20)),
    *(Kill("epoch", "on_train_batch_end", step) for step in (8, 25)),
]
FEW = KILLS[::3]


def kills_of(kind, thorough=True):
    """Return where runs of a kind are killed.

    Where those in float are exact, a difference of the others is not Lightning's. The fake-quant of pt2e is switched and stored by the code
    of fx's. What is not thorough trusts in fx for eager, too.
    """
    if kind == "fx":
        return KILLS if thorough else FEW
    if kind == "eager" and thorough:
        return KILLS
    return FEW if thorough else FEW[:: len(FEW) // 2]


class Resumable:
    """Batches in another order each epoch; a checkpoint holds how many have been given, as Lightning wants it of a loader."""

    def __init__(self, data):
        self.data, self.epoch, self.given = data, 0, 0
        self.sampler = self  # where Lightning looks for ``set_epoch``

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return BATCHES

    def __iter__(self):
        order = torch.randperm(len(self.data.labels), generator=torch.Generator().manual_seed(self.epoch))
        for chosen in order.chunk(BATCHES)[self.given :]:
            self.given = (self.given + 1) % BATCHES
            yield self.data.images[chosen], self.data.labels[chosen]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


class Data(Images):
    def train_dataloader(self):
        return Resumable(self)


class Module(Plain):
    """With dropout, whose noise is that of the step, a schedule of the learning rate and an input that the summary runs."""

    def __init__(self):
        super().__init__()
        self.example_input_array = 100 * torch.ones(1, 1, 8, 8)

    def forward(self, x):
        return self.net(x)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(self.trainer.global_step)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Killer(Callback):
    def __init__(self, kill):
        self.kill = kill
        setattr(self, kill.hook, self.strike)

    def strike(self, trainer, *args):
        if trainer.global_step >= self.kill.step:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(trainer, step):
    """Die when half of last.ckpt is in its file."""
    write = LocalFileOpener.write

    def half(self, content):
        if trainer.global_step < step or not self.path.endswith("last.ckpt"):
            return write(self, content)
        write(self, content[: len(content) // 2])
        self.f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    LocalFileOpener.write = half


def saving(saves, folder):
    """Return the callbacks that write the checkpoints: always the best one, and last.ckpt as ``saves`` says."""
    best = {"filename": "best", "monitor": "val/loss"}
    if saves in ("steps", "accumulated"):
        return [ModelCheckpoint(folder, filename="step", every_n_train_steps=3, save_last=True), ModelCheckpoint(folder, **best)]
    if saves == "validation":
        return [ModelCheckpoint(folder, **best, save_last=True)]
    return [ModelCheckpoint(folder, filename="epoch", save_on_train_epoch_end=True, save_last=True), ModelCheckpoint(folder, **best)]


def train(kind, folder, saves, kill=None, resume=False):
    """Train, and unless killed save what came out."""
    tempfile.tempdir = str(folder)
    seed_everything(1 if resume else 0)  # weights of another seed: nothing but the checkpoint may matter
    quantization = (
        None
        if kind == "float"
        else QuantizationCallback(QAT(flow=kind, **MOMENTS), convert="last" if saves == "steps" else "best", parity="error")
    )
    callbacks = [*([quantization] if quantization else []), *saving(saves, folder)]
    if kill is not None and kill.hook != "write":
        callbacks.append(Killer(kill))
    settings = {**QUIET, "enable_checkpointing": True, "enable_model_summary": True, "val_check_interval": 4, "limit_val_batches": 2}
    settings["accumulate_grad_batches"] = 2 if saves == "accumulated" else 1
    trainer = Trainer(max_epochs=EPOCHS, callbacks=callbacks, **settings)
    if kill is not None and kill.hook == "write":
        kill_while_writing(trainer, kill.step)
    module = Module()
    trainer.fit(module, Data(), ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    torch.save(outcome(module, trainer, quantization), folder / "outcome.pt")


def outcome(module, trainer, quantization):
    """Return all that a run has made."""
    best = next(callback for callback in trainer.checkpoint_callbacks if callback.monitor)
    result = {
        "batches": trainer.fit_loop.epoch_loop.total_batch_idx + 1,
        "state": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "best": torch.load(best.best_model_path, weights_only=True)["state_dict"],
        "best score": best.best_model_score,
    }
    if quantization is not None:
        int8 = quantization.quantized_module.net
        result["int8"] = int8(Images().images)
        result["qparams"] = [(layer.layer, layer.scale, layer.zero_point) for layer in quantization.report.layers]
        result["converted"] = str(quantization.report.checkpoint)[:4]  # without the version that Lightning may add
    return result


def launch(function, *args, **kwargs):
    """Run a function in a fork, and return its process."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*args, **kwargs)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def end(pid):
    """Return how a process ended: 0, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_unless_aborted(function, *args, **kwargs):
    """Run a function in a fork, and again where PyTorch has aborted it; return how the last one ended."""
    for _ in range(ATTEMPTS):
        ended = end(launch(function, *args, **kwargs))
        if ended != -signal.SIGABRT:
            break
    return ended


def train_anew(kind, folder, kill):
    """Train in a folder that holds nothing of an attempt before, until killed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    train(kind, folder, kill.saves, kill=kill)


def sweep(kind, folder, kills):
    """Train whole runs of a kind, then kill and resume others."""
    for saves in dict.fromkeys(kill.saves for kill in kills):
        whole = folder / saves
        whole.mkdir(parents=True)
        if kind == "pt2e":  # autograd refuses forks of a process that has exported
            end_unless_aborted(train, kind, whole, saves)
        else:
            train(kind, whole, saves)  # not in a fork: what is imported and probed on first use is there for all forks
    gc.freeze()
    for kill in kills:
        run = folder / str(kill)
        ended = end_unless_aborted(train_anew, kind, run, kill)
        (run / "killed").write_text(str(ended))
        end_unless_aborted(train, kind, run, kill.saves, resume=True)


def main(folder, thorough):
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for process in [launch(sweep, kind, folder / kind, kills_of(kind, thorough)) for kind in KINDS]:
        end(process)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--thorough" in sys.argv)
