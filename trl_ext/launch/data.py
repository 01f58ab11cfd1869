"""Rows in: from a file or the Hub, renamed, split, in the columns of what is trained."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from trl import extract_prompt

from trl_ext import demo, feedback
from trl_ext.feedback.converting import middle_of_scale
from trl_ext.feedback.reading import renaming
from trl_ext.feedback.records import key_of

# An answer may well read "None" or "N/A"; only an empty field holds nothing.
CSV = {"path": "csv", "keep_default_na": False, "na_values": [""]}
READERS: dict[str, dict[str, Any]] = {
    ".jsonl": {"path": "json"},
    ".json": {"path": "json"},
    ".csv": CSV,
    ".tsv": {**CSV, "sep": "\t", "quoting": csv.QUOTE_NONE},
    ".parquet": {"path": "parquet"},
}


@dataclass
class DataArguments:
    """Where a recipe's rows come from."""

    dataset: str = field(
        default="demo",
        metadata={"help": "'demo', a file (.jsonl, .json, .csv, .tsv, .parquet), or a dataset on the Hub."},
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; a file is one split."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split, or a further file, to evaluate on; None: eval_rows of the other."}
    )
    eval_rows: int = field(default=32, metadata={"help": "Rows held out for evaluation where there is no eval_split."})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns to rename, each THEIRS=OURS, as in text=completion."}
    )


# Rows as they are ----------------------------------------------------------------------------------------------------


def load_rows(data: DataArguments, name: str) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows to evaluate on.

    Args:
        data: where they are.
        name: which of the demo's data sets is meant: "prompts" or "pairs".

    Raises:
        FileNotFoundError, ValueError: there is no such file, split or column, or too few rows.
    """
    if data.dataset == "demo":
        return demo.load(name, "train"), demo.load(name, "test")
    rows = _read(data, data.dataset, data.train_split)
    held_out = _evaluated_on(data)
    if held_out is not None:
        return rows, _read(data, *held_out)
    _check_size(data, len(rows), "rows")
    split = rows.train_test_split(test_size=data.eval_rows, seed=0)
    return split["train"], split["test"]


def load_texts(dataset: str) -> Dataset:
    """Rows of a file or a dataset on the Hub, split "train".

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be read.
    """
    return _read(DataArguments(), dataset, "train")


def _read(data: DataArguments, source: str, split: str) -> Dataset:
    if not _is_file(source):
        rows = load_dataset(source, split=split)
    elif not Path(source).is_file():
        raise FileNotFoundError(f"The dataset file {source!r} does not exist.")
    else:
        try:
            rows = load_dataset(**READERS[Path(source).suffix], data_files=source, split="train")
        except (StopIteration, DatasetsError, ValueError) as error:
            reason = " ".join(str(error.__cause__ or error).split()) or "it holds no rows"
            raise ValueError(f"The dataset file {source!r} cannot be read: {reason:.200}") from error
    return rows.rename_columns(renaming(data.columns))


def _is_file(source: str) -> bool:
    return Path(source).suffix in READERS


def _evaluated_on(data: DataArguments) -> tuple[str, str] | None:
    """Dataset and split of the rows to evaluate on; None where they are held out of the others."""
    if data.eval_split is None:
        return None
    if _is_file(data.eval_split):
        return data.eval_split, "train"
    if _is_file(data.dataset):
        raise ValueError(
            f"eval_split is {data.eval_split!r}, but the file {data.dataset!r} has no splits: name a second file, or "
            "leave it out and eval_rows are held out."
        )
    return data.dataset, data.eval_split


def _check_size(data: DataArguments, count: int, what: str) -> None:
    if count <= data.eval_rows:
        raise ValueError(
            f"The dataset {data.dataset!r} has {count} {what}, and eval_rows={data.eval_rows} of them are held out: "
            f"give more {what} or lower eval_rows."
        )


# Preference pairs ----------------------------------------------------------------------------------------------------


def load_pairs(data: DataArguments) -> tuple[Dataset, Dataset]:
    """Preference pairs to train and to evaluate on, in TRL's columns prompt, chosen and rejected (and margin, which a
    column "strength" becomes). Held-out pairs have prompts of their own.

    Raises:
        ValueError: a column is missing; and what `load_rows` raises.
    """
    if data.dataset == "demo":
        train, test = load_rows(data, "pairs")
        return _as_pairs(data, train), _as_pairs(data, test)
    pairs = _as_pairs(data, _read(data, data.dataset, data.train_split))
    held_out = _evaluated_on(data)
    if held_out is not None:
        return pairs, _as_pairs(data, _read(data, *held_out))
    _check_size(data, len(pairs), "rows")
    return _split_by_prompt(pairs, data.eval_rows)


def _as_pairs(data: DataArguments, rows: Dataset) -> Dataset:
    missing = [column for column in ("chosen", "rejected") if column not in rows.column_names]
    if missing:
        raise ValueError(
            f"The dataset {data.dataset!r} has no {' and no '.join(map(repr, missing))} column, only "
            f"{rows.column_names}: give preference pairs, or rename columns."
        )
    if "prompt" not in rows.column_names:
        rows = rows.map(extract_prompt)
    if "strength" in rows.column_names and "margin" not in rows.column_names:
        rows = rows.map(lambda row: {"margin": float(row["strength"] or 0.0)}, remove_columns="strength")
    return rows.select_columns([c for c in ("prompt", "chosen", "rejected", "margin") if c in rows.column_names])


def _split_by_prompt(rows: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """Two parts without a prompt in common, the second of `count` rows or what its last prompt makes of them. Where all
    have one prompt, and among those that have none, rows are drawn."""
    numbers: dict[str, list[int]] = {}
    for number, prompt in enumerate(rows["prompt"]):
        numbers.setdefault(key_of(prompt) if prompt else f"row {number}", []).append(number)
    if len(numbers) == 1:
        split = rows.train_test_split(test_size=count, seed=0)
        return split["train"], split["test"]
    prompts = list(numbers)
    random.Random(0).shuffle(prompts)
    second: list[int] = []
    while len(second) < count and len(prompts) > 1:
        second += numbers[prompts.pop()]
    return rows.select(sorted(n for prompt in prompts for n in numbers[prompt])), rows.select(sorted(second))


# Feedback of any form ------------------------------------------------------------------------------------------------

# Everything that many answers to one prompt could be made into grows with their square, or does not fit into memory.
_PAIRS = partial(feedback.to_preference, pairs_per_answer=10)
_RANKINGS = partial(feedback.to_rankings, size=8)
CONVERTERS: dict[str, Callable[[feedback.Feedback], Dataset]] = {
    "pairwise": _PAIRS,
    "probe": _PAIRS,
    "regression": feedback.to_ratings,
    "binary": feedback.to_unpaired,
    "ranking": _RANKINGS,
    "all_pairs": _RANKINGS,
}


@dataclass(frozen=True)
class RewardData:
    """Rows for a reward model.

    Attributes:
        train, test: in the columns of the objective.
        judged: the held-out feedback as people gave it: ratings where there are some, else as `test`.
        pairs: held-out preference pairs, whatever the form; `judged` where no pair can be made of it.
    """

    train: Dataset
    test: Dataset
    judged: Dataset
    pairs: Dataset


def load_feedback(data: DataArguments, objective: str) -> RewardData:
    """Feedback of any form, in the columns of `objective`, split by prompt: at most 10 pairs that an answer is in, at
    most 8 answers a ranking. The demo's pairs are its own for "pairwise"; its other rows come from its ratings.

    Raises:
        FeedbackError: a record that cannot be used, with its line and column; and what `load_rows` raises.
    """
    if objective == "pairwise" and _holds_pairs(data):
        train, test = load_pairs(data)
        return RewardData(train, test, test, test)
    if data.dataset == "demo":
        kept, held_out = (feedback.read(demo.load("ratings", split), "ratings") for split in ("train", "test"))
        pairs = load_pairs(data)[1]
    else:
        kept, held_out = _split_feedback(data)
        pairs = None
    convert = CONVERTERS[objective]
    if objective == "binary" and kept.form == "ratings":  # where good begins is not for the held-out answers to say
        convert = partial(feedback.to_unpaired, threshold=middle_of_scale(kept))
    test = convert(held_out)
    judged = feedback.to_ratings(held_out) if held_out.form == "ratings" else test
    if pairs is None:
        try:
            pairs = _PAIRS(held_out)
        except feedback.FeedbackError:  # no two answers to one prompt: answers are judged as they are
            pairs = judged
    return RewardData(convert(kept), test, judged, pairs)


def _holds_pairs(data: DataArguments) -> bool:
    if data.dataset == "demo":
        return True
    if Path(data.dataset).suffix == ".tsv":  # which `feedback.read` knows better
        return False
    return "chosen" in _read(data, data.dataset, data.train_split).column_names


def _split_feedback(data: DataArguments) -> tuple[feedback.Feedback, feedback.Feedback]:
    def read(source: str, split: str) -> feedback.Feedback:
        rows = source if _is_file(source) else load_dataset(source, split=split)
        return feedback.read(rows, columns=renaming(data.columns))

    given, held_out = read(data.dataset, data.train_split), _evaluated_on(data)
    if held_out is not None:
        return given, read(*held_out)
    _check_size(data, len(given.records), "records")
    return feedback.split_by_prompt(given, data.eval_rows / len(given.records))
