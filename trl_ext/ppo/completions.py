"""A look at what the policy says: a table to read, a file to keep."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_ext.core import masked_sum
from trl_ext.types import Experience, as_text


def completions_table(
    experience: Experience, names: list[str], step: int, extra: Sequence[dict[str, list[Any]]] = ()
) -> pa.Table:
    """One row per completion: step, prompt, completion, score, each function's score, KL (nats), tokens, ended.

    Args:
        extra: each process's further columns, as reward functions gave them to `log_extra`; kept where they hold one
            entry per completion. One of a name that is taken is called "extra/<name>".
    """
    rollout, scores = experience.rollout, experience.scores
    kl = experience.score_pass.logprobs - experience.score_pass.ref_logprobs
    columns = {
        "step": [step] * len(rollout.prompts),
        "prompt": [as_text(prompt) for prompt in rollout.prompts],
        "completion": [as_text(completion) for completion in rollout.completions],
        "score": scores.total.tolist(),
        **{f"reward/{name}": scores.by_function[:, i].tolist() for i, name in enumerate(names)},
        "kl": masked_sum(kl, rollout.completion_mask, dim=1).tolist(),
        "tokens": rollout.lengths.tolist(),
        "ended": rollout.has_eos.tolist(),
    }
    for column in sorted({name for process in extra for name in process}):
        values = [value for process in extra for value in process.get(column, [])]
        if len(values) == len(rollout.prompts):
            columns[f"extra/{column}" if column in columns else column] = _of_one_type(values)
    return pa.table(columns)


def _of_one_type(values: list[Any]) -> pa.Array:
    """A column; as texts, where its values are of types that do not go together."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([None if value is None else str(value) for value in values])


def save_completions(table: pa.Table, output_dir: str, step: int) -> Path:
    """Write `table` as completions/completions_<step>.parquet under `output_dir`, the layout of TRL's own trainers."""
    folder = Path(output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"completions_{step:05d}.parquet"
    pq.write_table(table, path)
    return path


def track_completions(table: pa.Table, trackers: Sequence[str]) -> None:
    """Give wandb and trackio, where the run reports to them, the completions as a table, as TRL's GRPOTrainer does."""
    for name in ("wandb", "trackio"):
        if name in trackers:
            tracker = import_module(name)
            if name == "trackio" or tracker.run is not None:
                tracker.log({"completions": tracker.Table(dataframe=table.to_pandas())})


def print_completions(table: pa.Table, rows: int, title: str) -> None:
    """Print the first `rows` completions with their scores, by function where there are several, and KL."""
    functions = [name for name in table.column_names if name.startswith("reward/")]
    numbers = {"score": "Score", "kl": "KL"}
    if len(functions) > 1:
        numbers = {"score": "Score", **{name: name.removeprefix("reward/") for name in functions}, "kl": "KL"}
    shown = Table(title=title, show_lines=True)
    shown.add_column("Prompt")
    shown.add_column("Completion")
    for heading in numbers.values():
        shown.add_column(heading, justify="right")
    for row in table.slice(0, rows).to_pylist():
        shown.add_row(Text(row["prompt"]), Text(row["completion"]), *(f"{row[name]:.2f}" for name in numbers))
    Console().print(shown)
