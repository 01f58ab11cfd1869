"""What the benchmarks of this folder share: taking the time, writing tables, keeping records, drawing."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

PALETTE = ["#0072b2", "#56b4e9", "#cc79a7", "#009e73", "#e69f00", "#777777"]


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls, after one that is not counted."""
    return in_turn({"": call}, repeats)[""]


def in_turn(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Medians of calls that take turns, so that a machine that slows down slows all of them."""
    taken = [{name: once(call) for name, call in calls.items()} for _ in range(repeats + 1)]
    return {name: median(one[name] for one in taken[1:]) for name in calls}


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*names: str) -> str:
    """Its head."""
    return row(*names) + "\n" + "|---" * len(names) + "|"


def read(record: Path) -> dict[str, Any]:
    """What an earlier run has measured."""
    return json.loads(record.read_text()) if record.exists() else {}


def write(record: Path, known: dict[str, Any]) -> None:
    """At once and whole: a run that is interrupted goes on from here."""
    unfinished = record.with_suffix(".new")
    unfinished.write_text(json.dumps(known, indent=1))
    unfinished.replace(record)


def panels(rows: int, columns: int, **how: Any) -> tuple[Any, Any]:
    """An empty figure as all of the documentation's are, and its axes, (rows, columns)."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "trl_ext"
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained", **how)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, picture: Path) -> None:
    """The same file from the same numbers."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})


def device_name() -> str:
    """Where this runs."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{named[0].partition(': ')[2] if named else 'CPU'}, {torch.get_num_threads()} threads"
