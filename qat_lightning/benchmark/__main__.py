"""Latency of networks in float, quantized by this package, and quantized by other tools: ``python -m qat_lightning.benchmark``.

    python -m qat_lightning.benchmark --net torchvision.models:resnet18 torchvision.models:mobilenet_v2 --batch 1 16 --plot speed.png

Each candidate is a process of its own that builds once; then they take turns, a few calls each, so that a busy neighbour slows all
alike. Same weights, same images, one thread unless told otherwise. Figures are medians, and ratios of them within one run.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from qat_lightning.backend import cpu_name
from qat_lightning.benchmark.candidates import CANDIDATES, DEFAULTS
from qat_lightning.benchmark.worker import Task, ask

CALLS = 3


@dataclass(frozen=True)
class Row:
    """One candidate on one network and batch size.

    Args:
        net: the network.
        batch: images of a call.
        candidate: its name on the command line.
        median_ms: of a call; None where it failed or is not installed.
        size_bytes: of the file that holds it.
        peak_bytes: largest memory of its process, quantization included.
        runtime: what ``auto`` has chosen.
        remark: why there are no figures.
    """

    net: str
    batch: int
    candidate: str
    median_ms: float | None = None
    size_bytes: int | None = None
    peak_bytes: int | None = None
    runtime: str | None = None
    remark: str = ""


class Worker:
    """A process that holds one candidate.

    Args:
        task: what it builds.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.times: list[float] = []
        command = [sys.executable, "-m", "qat_lightning.benchmark.worker"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.peak = 0
        try:
            self.first = self._ask(ask(task))
        except RuntimeError:
            self.close()
            raise

    def take_turn(self) -> None:
        """Time a few calls."""
        answer = self._ask(f"{CALLS}\n")
        self.times += answer["milliseconds"]
        self.peak = answer["peak_bytes"]

    def row(self) -> Row:
        """Return what was measured."""
        blank = Row(self.task.net, self.task.batch, self.task.candidate)
        return replace(
            blank,
            median_ms=statistics.median(self.times),
            size_bytes=self.first["size_bytes"],
            peak_bytes=self.peak,
            runtime=self.first["runtime"],
        )

    def _ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None and self.process.stderr is not None
        with contextlib.suppress(BrokenPipeError):  # what it wrote before it ended says why
            self.process.stdin.write(line)
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        while answer and not answer.startswith("{"):  # tools print what they like
            answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError((self.process.stderr.read().strip().splitlines() or ["it ended without a word"])[-1])
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def _workers(tasks: Sequence[Task], failed: list[Row]) -> Iterator[list[Worker]]:
    workers: list[Worker] = []
    try:
        for task in track(tasks, f"{tasks[0].net}, batch {tasks[0].batch}: building", console=Console(stderr=True)):
            blank = Row(task.net, task.batch, task.candidate)
            missing = [package for package in CANDIDATES[task.candidate].packages if importlib.util.find_spec(package) is None]
            if missing:
                failed.append(replace(blank, remark=f"not installed: {', '.join(missing)}"))
                continue
            try:
                workers.append(Worker(task))
            except RuntimeError as error:
                failed.append(replace(blank, remark=str(error)))
        yield workers
    finally:
        for worker in workers:
            worker.close()


def measure(tasks: Sequence[Task], rounds: int) -> list[Row]:
    """Return a row for each task; they take turns.

    Args:
        tasks: candidates for the same network and batch size.
        rounds: how many turns each has, of three calls or more.
    """
    failed: list[Row] = []
    with _workers(tasks, failed) as workers:
        for _ in track(range(rounds), "timing", console=Console(stderr=True)):
            for worker in workers:
                worker.take_turn()
        rows = [*(worker.row() for worker in workers), *failed]
    order = [task.candidate for task in tasks]
    return sorted(rows, key=lambda row: order.index(row.candidate))


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the table of one network and batch size."""
    timed = {row.candidate: row.median_ms for row in rows if row.median_ms is not None}
    peers = [ms for name, ms in timed.items() if name.startswith("peer-")]
    best, float_ms = min(peers, default=None), timed.get("float")
    lines = [
        f"### {rows[0].net}, batch {rows[0].batch}\n",
        "| | ms | images/s | float / it | it / best peer | MB | peak MB |\n|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_line(row, float_ms, best) for row in rows)])


def _line(row: Row, float_ms: float | None, best: float | None) -> str:
    name = CANDIDATES[row.candidate].name + (f" ({row.runtime})" if row.candidate.startswith("auto") else "")
    if row.median_ms is None or row.size_bytes is None or row.peak_bytes is None:
        return f"| {name} | {row.remark} | | | | | |"
    ratio = "" if float_ms is None else f"{float_ms / row.median_ms:.2f}"
    against = "" if best is None else f"{row.median_ms / best:.2f}"
    sizes = f"{row.size_bytes / 1e6:.2f} | {row.peak_bytes / 1e6:.0f}"
    return f"| {name} | {row.median_ms:.2f} | {1e3 * row.batch / row.median_ms:.0f} | {ratio} | {against} | {sizes} |"


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw the medians relative to the float network, and the throughput of networks that were timed with several batch sizes.

    Args:
        rows: of all networks and batch sizes.
        path: of the PNG.
    """
    from matplotlib import pyplot

    batches = {net: sorted({row.batch for row in rows if row.net == net}) for net in dict.fromkeys(row.net for row in rows)}
    several = [net for net, sizes in batches.items() if len(sizes) > 2]
    groups = [(net, batch) for net, sizes in batches.items() for batch in (sizes if net not in several else sizes[:1])]
    names = list(dict.fromkeys(row.candidate for row in rows if row.median_ms is not None))
    colours = {name: f"C{index}" for index, name in enumerate(names)}
    figure, panels = pyplot.subplots(
        1 + len(several), figsize=(max(7, 1.6 * len(groups)), 4.5 * (1 + len(several))), layout="constrained", squeeze=False
    )
    _draw_speed_up(panels[0, 0], rows, groups, colours)
    for axes, net in zip(panels[1:, 0], several, strict=True):
        _draw_throughput(axes, [row for row in rows if row.net == net], colours)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_speed_up(axes: Any, rows: Sequence[Row], groups: Sequence[tuple[str, int]], colours: Mapping[str, str]) -> None:
    """Draw a group of bars for each network and batch size."""
    names = [name for name in colours if name != "float"]
    for index, name in enumerate(names):
        heights = [_speed_up(rows, group, name) for group in groups]
        places = [place + 0.8 * index / len(names) for place in range(len(groups))]
        axes.bar(places, heights, 0.8 / len(names), label=CANDIDATES[name].name, color=colours[name])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(
        [place + 0.4 for place in range(len(groups))],
        [f"{net.partition(':')[2]}\nbatch {batch}" for net, batch in groups],
        fontsize="small",
    )
    axes.set_ylabel("times as fast as float, eager")
    axes.legend(fontsize="small")


def _draw_throughput(axes: Any, rows: Sequence[Row], colours: Mapping[str, str]) -> None:
    """Draw the images a second of one network against the batch size, a line for each candidate."""
    for name, colour in colours.items():
        points = sorted((row.batch, 1e3 * row.batch / row.median_ms) for row in rows if row.candidate == name and row.median_ms)
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=CANDIDATES[name].name, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch size")
    axes.set_ylabel("images a second")
    axes.set_title(rows[0].net.partition(":")[2])
    axes.legend(fontsize="small")


def _speed_up(rows: Sequence[Row], group: tuple[str, int], name: str) -> float:
    found = {row.candidate: row.median_ms for row in rows if (row.net, row.batch) == group}
    own, float_ms = found.get(name), found.get("float")
    return float_ms / own if own and float_ms else 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--net", nargs="+", required=True, help="module:callable that returns the network; append =VALUE for one integer argument"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="images of a call")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--data", help="folder of images by class for the calibration; else normal numbers")
    parser.add_argument("--calibration", type=int, default=32, help="images for the calibration")
    parser.add_argument(
        "--candidates", nargs="+", choices=list(CANDIDATES), default=list(DEFAULTS), metavar="NAME", help=", ".join(CANDIDATES)
    )
    parser.add_argument("--rounds", type=int, default=15, help=f"turns of {CALLS} calls or more")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument(
        "--plot", type=Path, help="draw them here, as PNG, with three batch sizes or more also the throughput; needs the extra `plot`"
    )
    chosen = parser.parse_args(arguments)
    rows: list[Row] = []
    print(f"{cpu_name()}, {chosen.threads} thread(s), {chosen.size}x{chosen.size}\n")
    for net in chosen.net:
        for batch in chosen.batch:
            settings = (net, batch, chosen.size, chosen.data, chosen.calibration, chosen.threads)
            found = measure([Task(candidate, *settings) for candidate in chosen.candidates], chosen.rounds)
            print(to_markdown(found) + "\n", flush=True)
            rows += found
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if chosen.plot:
        save_plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
