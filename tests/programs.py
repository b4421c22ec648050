"""Python programs in processes of their own that need not import PyTorch: forks of one that has.

``Programs`` starts that process, ``python -m tests.programs``, and talks to it: a line of JSON each way.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    """How a program ended, and what it has written."""

    returncode: int
    stdout: str
    stderr: str


class Programs:
    """A context in which programs can be run."""

    def __enter__(self):
        self.process = None
        return self

    def __exit__(self, *_):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()

    def run(self, *words, cwd, **environment):
        """Run ``python WORDS`` in a folder: a file with its arguments, or ``-c CODE``; ``environment`` is added to this process's."""
        if self.process is None:
            command = [sys.executable, "-m", "tests.programs"]
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with tempfile.TemporaryDirectory() as folder:
            task = {"words": [str(word) for word in words], "cwd": str(cwd), "environment": {**os.environ, **environment}, "folder": folder}
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            code = int(self.process.stdout.readline())
            return Finished(code, *(Path(folder, name).read_text() for name in ("stdout", "stderr")))


def main():
    import matplotlib  # noqa: F401
    import torch

    import qat_lightning.app
    import qat_lightning.benchmark  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints on import is no answer
    for line in sys.stdin:
        task = json.loads(line)
        pid = os.fork()
        if not pid:
            become(**task)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        answers.flush()


def become(words, cwd, environment, folder):
    """Be the program, and end as it does."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    forget_exit_handlers()
    code = 0
    try:
        run(words, cwd)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if not isinstance(error.code, int | None):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def forget_exit_handlers():
    """Leave to the first process what it does when it ends, e.g. to remove the folder that wandb has made."""
    atexit._clear()
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False
    atexit.register(weakref.finalize._exitfunc)


def run(words, cwd):
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], cwd
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
