"""A look at what the policy says: a table to read, a file to keep."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_ext.core import masked_sum
from trl_ext.types import Experience, as_text


def completions_frame(
    experience: Experience, names: list[str], step: int, extra: Sequence[dict[str, list[Any]]] = ()
) -> pd.DataFrame:
    """One row per completion: step, prompt, completion, score, each function's score, KL (nats), tokens, ended.

    Args:
        extra: each process's further columns, as reward functions gave them to `log_extra`; kept where they hold one
            entry per completion.
    """
    rollout, scores = experience.rollout, experience.scores
    kl = experience.score_pass.logprobs - experience.score_pass.ref_logprobs
    frame = pd.DataFrame(
        {
            "step": step,
            "prompt": [as_text(prompt) for prompt in rollout.prompts],
            "completion": [as_text(completion) for completion in rollout.completions],
            "score": scores.total.tolist(),
            **{f"reward/{name}": scores.by_function[:, i].tolist() for i, name in enumerate(names)},
            "kl": masked_sum(kl, rollout.completion_mask, dim=1).tolist(),
            "tokens": rollout.lengths.tolist(),
            "ended": rollout.has_eos.tolist(),
        }
    )
    for column in sorted({name for process in extra for name in process}):
        values = [value for process in extra for value in process.get(column, [])]
        if len(values) == len(frame):
            frame[column] = values
    return frame


def save_completions(frame: pd.DataFrame, output_dir: str, step: int) -> Path:
    """Write `frame` as completions/completions_<step>.parquet under `output_dir`, the layout of TRL's own trainers."""
    folder = Path(output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    frame.to_parquet(path)
    return path


def track_completions(frame: pd.DataFrame, trackers: Sequence[str]) -> None:
    """Give wandb and trackio, where the run reports to them, the completions as a table, as TRL's GRPOTrainer does."""
    for name in ("wandb", "trackio"):
        if name in trackers:
            tracker = import_module(name)
            if name == "trackio" or tracker.run is not None:
                tracker.log({"completions": tracker.Table(dataframe=frame)})


def print_completions(frame: pd.DataFrame, rows: int, title: str) -> None:
    """Print the first `rows` completions with their scores, by function where there are several, and KL."""
    functions = [name for name in frame.columns if name.startswith("reward/")]
    numbers = {"score": "Score", "kl": "KL"}
    if len(functions) > 1:
        numbers = {"score": "Score", **{name: name.removeprefix("reward/") for name in functions}, "kl": "KL"}
    table = Table(title=title, show_lines=True)
    table.add_column("Prompt")
    table.add_column("Completion")
    for heading in numbers.values():
        table.add_column(heading, justify="right")
    for row in frame.head(rows).to_dict("records"):
        table.add_row(Text(row["prompt"]), Text(row["completion"]), *(f"{row[name]:.2f}" for name in numbers))
    Console().print(table)
