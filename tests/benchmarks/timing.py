"""How the benchmarks of this folder take the time, and write their tables."""

import time
from collections.abc import Callable
from statistics import median

import torch


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return median(taken[1:])


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names: str) -> str:
    """Its head."""
    return row(*names) + "\n" + "|---" * len(names) + "|"
