"""Loads thousands of damaged and forged int8 models: ``python -m benchmarks.fuzz_artifacts`` in the root of the repository.

Each is refused with an error of this package, or loads and computes what the original does; other values only where checksums were
forged along with the weights or the plan. Anything else fails the run: another exception, a crash, a hang, more memory, code that runs.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qat_lightning import (
    DynamicPTQ,
    QuantizationError,
    StaticPTQ,
    calibrate,
    convert,
    load_quantized,
    prepare,
    quantize_dynamic,
    save_quantized,
)
from qat_lightning.recipe import FlowName
from tests.mutations import MUTATIONS, Mutation
from tests.nets import ModuleNet, Recurrent

SECONDS = 20
MEMORY = 2**30
BATCH = 100
CODE_RAN = 99
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
FORBIDDEN = ("os.", "subprocess.", "socket.", "pickle.", "ctypes.", "shutil.")
HARMLESS = ("os.listdir", "os.scandir")
Task: TypeAlias = tuple[str, Mutation, int]
GOOD = ("refused", "same outputs", "other outputs, forged", "fails when run, forged")


def static(flow: FlowName) -> nn.Module:
    """Return a small network in int8."""
    return convert(calibrate(prepare(ModuleNet().eval(), StaticPTQ(flow=flow)), [IMAGES]))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Tensor]] = {
    "fx": (ModuleNet, lambda: static("fx"), IMAGES),
    "eager": (ModuleNet, lambda: static("eager"), IMAGES),
    "dynamic": (Recurrent, lambda: quantize_dynamic(Recurrent().eval(), DynamicPTQ()), SEQUENCES),
}


class Original:
    """A saved model, and what it computes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.build, quantize, self.x = MODELS[name]
        self.folder = save_quantized(quantize(), folder / name)
        self.y = self.run(self.load(self.folder))

    def load(self, folder: Path) -> nn.Module:
        """Load an artifact into a fresh network."""
        return load_quantized(folder, self.build())

    def run(self, loaded: nn.Module) -> Tensor:
        """Return the outputs of a loaded network."""
        with torch.inference_mode():
            outputs: Tensor = loaded(self.x)
        return outputs


def judge(original: Original, mutation: Mutation, seed: int, folder: Path) -> str:
    """Return what became of one mutated artifact."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original.folder, folder / "int8")
    mutation.apply(folder / "int8", Random(seed))
    with watched():
        try:
            loaded = original.load(folder / "int8")
        except QuantizationError:
            return "refused"
        except BaseException as error:
            return told(error)
        try:
            y = original.run(loaded)
        except Exception as error:  # what torch says of activations that are no numbers
            return "fails when run, forged" if mutation.signed else told(error)
    if torch.equal(y, original.y):
        return "same outputs"
    return "other outputs, forged" if mutation.signed else "OTHER OUTPUTS"


def told(error: BaseException) -> str:
    """Return type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


class watched:
    """Ends the process at once where anything is run, imported, unpickled or written in the block."""

    active = False

    def __enter__(self) -> None:
        signal.alarm(SECONDS)
        watched.active = True

    def __exit__(self, *_: object) -> None:
        watched.active = False
        signal.alarm(0)

    @staticmethod
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        """Look at an audit event of Python."""
        if not watched.active:
            return
        imports = event == "import" and arguments[0] not in sys.modules
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if imports or writes or (event.startswith(FORBIDDEN) and event not in HARMLESS):
            os.write(2, f"{event} {arguments}\n"[:300].encode())
            os._exit(CODE_RAN)


def run_child(tasks: Sequence[Task], originals: dict[str, Original], folder: Path, pipe: int) -> None:
    """Judge the tasks one by one, under limits, write a line for each, and end the process."""
    try:
        # What is mapped already counts; torch maps gigabytes.
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        sys.addaudithook(watched.hook)
        for name, mutation, seed in tasks:
            outcome = judge(originals[name], mutation, seed, folder)
            os.write(pipe, json.dumps(outcome).encode() + b"\n")
    except BaseException:
        traceback.print_exc()
    finally:  # without the clean-up that is the parent's
        os._exit(0)


def outcomes(tasks: Sequence[Task], originals: dict[str, Original], folder: Path) -> Iterator[str]:
    """Yield what becomes of each task, judged in child processes; one that ends early has lost its task."""
    done = 0
    while done < len(tasks):
        batch = tasks[done : done + BATCH]
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            run_child(batch, originals, folder, writing)
        os.close(writing)
        with os.fdopen(reading) as lines:
            judged = [json.loads(line) for line in lines]
        _, status = os.waitpid(child, 0)
        if len(judged) < len(batch):
            judged.append(cause_of_death(status))
        yield from judged
        done += len(judged)


def cause_of_death(status: int) -> str:
    """Return how a child ended that did not finish."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "HANG" if number == signal.SIGALRM else f"CRASH: {signal.Signals(number).name}"
    return "CODE RAN" if os.waitstatus_to_exitcode(status) == CODE_RAN else f"EXIT {os.waitstatus_to_exitcode(status)}"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="how many artifacts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = list(MODELS)
    tasks = [(names[i % len(names)], MUTATIONS[i // len(names) % len(MUTATIONS)], arguments.seed + i) for i in range(arguments.count)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        originals = {name: Original(name, folder / "originals") for name in names}
        counts: Counter[tuple[str, str]] = Counter()
        for (name, mutation, seed), outcome in zip(tasks, outcomes(tasks, originals, folder / "mutated"), strict=True):
            counts[mutation.name, outcome] += 1
            if outcome not in GOOD:
                print(f"FAILED: {name} {mutation.name} seed={seed}: {outcome}", flush=True)
    print(table(counts))
    bad = sum(count for (_, outcome), count in counts.items() if outcome not in GOOD)
    print(f"{arguments.count} artifacts, {bad} of them neither refused nor loaded as they should be.")
    return 1 if bad else 0


def table(counts: Counter[tuple[str, str]]) -> str:
    """Return the outcomes of each mutation as Markdown."""
    lines = [f"| mutation | {' | '.join(GOOD)} | anything else |", "|---|---|---|---|---|---|"]
    for mutation in MUTATIONS:
        good = [counts[mutation.name, outcome] for outcome in GOOD]
        rest = sum(count for (name, _), count in counts.items() if name == mutation.name) - sum(good)
        lines.append(f"| {mutation.name} | {' | '.join(map(str, good))} | {rest} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
