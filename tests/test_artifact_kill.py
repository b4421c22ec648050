"""A process that saves an artifact is killed at every step of it."""

import subprocess
import sys

STEPS = 20
SCRIPT = """
import os, resource, signal, sys, warnings
from pathlib import Path
import torch
from torch import nn
from qat_lightning import load_quantized, quantize_dynamic, save_quantized

torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(4, 8)
old, new = (quantize_dynamic(nn.Linear(8, 4)) for _ in range(2))
folder = Path(sys.argv[1])
steps = 0


def kill_at(step):
    # Steps are the calls into the operating system and the methods of files.
    def count(frame, event, function):
        global steps
        if event != "c_call" or function.__name__ == "fspath":
            return
        if function.__module__ == "posix" or type(getattr(function, "__self__", None)).__module__ == "_io":
            steps += 1
            if steps == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def kill_in_file_at(size):
    # The kernel ends the process in the middle of a write, with the first part of it written.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def dies(kill, argument):
    child = os.fork()
    if child == 0:
        kill(argument)
        save_quantized(new, folder)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return status != 0


def outcome():
    y = load_quantized(folder, nn.Linear(8, 4))(x)
    assert torch.equal(y, old(x)) or torch.equal(y, new(x))
    return "old" if torch.equal(y, old(x)) else "new"


save_quantized(old, folder)
largest = max(path.stat().st_size for path in folder.iterdir())
for size in range(0, largest, largest // 12):
    assert dies(kill_in_file_at, size)
    print("bytes", size, outcome())
step = 1
while dies(kill_at, step):
    found = outcome()
    print("step", step, found)
    if found == "new":
        save_quantized(old, folder)
    step += 1
assert outcome() == "new"
assert len(list(folder.iterdir())) == 2, "leftovers of the killed"
"""


def test_a_kill_at_any_step_leaves_the_old_artifact_or_the_new_one(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path / "int8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    steps = [outcome for kind, _, outcome in outcomes if kind == "step"]
    assert len(steps) >= STEPS and steps == sorted(steps, reverse=True)  # old up to one step, new from there on
    assert {"old", "new"} == set(steps) and {outcome for kind, _, outcome in outcomes if kind == "bytes"} == {"old"}
