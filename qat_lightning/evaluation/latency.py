"""Latency, on one thread unless told otherwise, interleaved: a busy neighbour slows all candidates alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

WARM_UP = 3


def interleaved_medians(
    candidates: Sequence[Callable[[], Any]], repeats: int = 50, budget_s: float = 5.0, threads: int = 1
) -> tuple[float, ...]:
    """Return the median time of each candidate in milliseconds.

    Args:
        candidates: what to time; they take turns.
        repeats: rounds at most.
        budget_s: no further round is begun after this time, in seconds; at least five are run.
        threads: of torch.
    """
    times: list[list[float]] = [[] for _ in candidates]
    with _threads(threads), torch.inference_mode():
        for _ in range(WARM_UP):
            for candidate in candidates:
                candidate()
        deadline = time.perf_counter() + budget_s
        for done in range(repeats):
            if done >= 5 and time.perf_counter() > deadline:
                break
            for candidate, record in zip(candidates, times, strict=True):
                begin = time.perf_counter()
                candidate()
                record.append(1e3 * (time.perf_counter() - begin))
    return tuple(statistics.median(record) for record in times)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(count)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
