"""Rows for the recipes: from the demo, a file or the Hub, renamed, split, in the columns that the training needs.

Feedback is read by `trl_ext.feedback.read` alone. Other rows (prompts, texts) stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from trl_ext import demo, feedback
from trl_ext.feedback.converting import keys_held_out, middle_of_scale
from trl_ext.feedback.files import READERS, Unusable, decoded, opened, rows_of_file
from trl_ext.feedback.forms import prompt_and_answers
from trl_ext.feedback.reading import check_on_error, converting_lines, renaming, says_how_to_prompt
from trl_ext.feedback.records import key_of
from trl_ext.ppo.checks import check_column, check_prompts
from trl_ext.reward_models import rows as rows_of_reward
from trl_ext.tokens import config_of
from trl_ext.types import as_text, fault_of_messages


@dataclass
class DataArguments:
    """Where a recipe's rows come from."""

    dataset: str = field(
        default="demo",
        metadata={
            "help": "'demo', a file (.jsonl, .json, .csv, .tsv, .parquet), a folder of save_to_disk, or a dataset on "
            "the Hub; several with commas between them."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; a file is one split."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split, or a further file, to evaluate on; None: eval_rows of the other."}
    )
    eval_rows: int = field(default=32, metadata={"help": "Rows held out for evaluation where there is no eval_split."})
    columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns to rename, each THEIRS=OURS, as in text=completion.",
            "aliases": ["--column"],
            "action": "extend",
        },
    )
    on_error: str = field(
        default="raise",
        metadata={"help": "Of feedback that cannot be used: 'raise' at the first record, or 'drop' them."},
    )
    read_as: str = field(default="", init=False)  # what the rows were read as, once they are loaded: for the header

    def __post_init__(self) -> None:
        check_on_error(self.on_error)

    @property
    def on_hub(self) -> list[str]:
        """Names of data sets on the Hub; none of the demo and of files."""
        names = [] if self.dataset == "demo" else _sources(self.dataset)
        return [name for name in names if not _is_file(name) and not Path(name).exists()]


# Rows as they are ----------------------------------------------------------------------------------------------------


def load_rows(data: DataArguments, name: str) -> tuple[Dataset, Dataset]:
    """Rows with a prompt to train on, and such rows to evaluate on.

    Args:
        data: where they are.
        name: the demo's data set where `data` says "demo", e.g. "prompts".

    Raises:
        FileNotFoundError, ValueError: there is no such file, split or column, or too few rows.
    """
    _check_read(data)
    if data.dataset == "demo":
        return demo.load(name, "train"), demo.load(name, "test")
    rows = _prompts(data, data.dataset, data.train_split)
    held_out = _held_out_source(data)
    if held_out is not None:
        return rows, _prompts(data, *held_out)
    _check_size(data, len(rows), "rows")
    return _apart(rows, data.eval_rows)


def _apart(rows: Dataset, count: int) -> tuple[Dataset, Dataset]:
    """Rows to train on, and `count` of them held out. Where prompts come more than once, all rows of one go to the same
    side, and a few more may be held out."""
    keys = [key_of(prompt) for prompt in rows["prompt"]]
    often = Counter(keys)
    if len(often) in (1, len(keys)):
        split = rows.train_test_split(test_size=count, seed=0)
        return split["train"], split["test"]
    held_out = set(keys_held_out(often, count))
    sides: tuple[list[int], list[int]] = [], []
    for number, key in enumerate(keys):
        sides[key in held_out].append(number)
    return rows.select(sides[0]), rows.select(sides[1])


BESIDE = (("chosen", "rejected"), ("completion",))  # columns of answers, which may begin with the prompt


def _as_reward_models_read(rows: Dataset) -> Dataset:
    """The same rows, with the prompts that feedback has: a text beside answers that are conversations is one of their
    turns, and what a column `system` says comes first."""
    known, first = set(rows.column_names), rows[0]["prompt"] if len(rows) else None
    beside = next((columns for columns in BESIDE if set(columns) <= known), ()) if isinstance(first, str) else ()
    if not beside and not (isinstance(first, list) and "system" in known):
        return rows
    prompts = [_prompt_as_read(row, number, beside) for number, row in enumerate(rows)]
    if prompts == list(rows["prompt"]):
        return rows
    columns = {name: prompts if name == "prompt" else list(rows[name]) for name in rows.column_names}
    return Dataset.from_dict(columns, on_mixed_types="use_json")


def _prompt_as_read(row: dict[str, Any], number: int, beside: Sequence[str]) -> Any:
    prompt = row["prompt"]
    if isinstance(prompt, list):
        # Without a fault: what is wrong with messages is said where prompts are checked.
        return prompt if fault_of_messages(prompt) else prompt_and_answers(row)[0]
    answers = [decoded(row[column]) for column in beside]
    if not isinstance(prompt, str) or not answers or not all(isinstance(answer, list) for answer in answers):
        return prompt
    try:
        return prompt_and_answers(row, *beside)[0]
    except Unusable as bad:
        raise feedback.FeedbackError(f"Row {number}, column {bad.column!r}: {bad.reason}.") from bad


def _prompts(data: DataArguments, dataset: str, split: str) -> Dataset:
    """Rows with prompts: as they are, or the prompts of feedback and of conversations, each once."""
    parts, columns = [], renaming(data.columns)
    for name in _sources(dataset):
        source = name if _is_file(name) else opened(name, split, name)
        if (_is_file(name) and not Path(name).is_file()) or not says_how_to_prompt(source, columns):
            rows = _read(source, name, data.columns)
            capital = [column for column in rows.column_names if column.strip().lower() == "prompt"]
            rows = rows.rename_column(capital[0], "prompt") if capital and "prompt" not in capital else rows
            if "prompt" not in rows.column_names:
                _refuse(rows, name)
            parts.append(_as_reward_models_read(rows))
            continue
        with _how_to_go_on():
            prompts = feedback.read_prompts(source, columns, data.on_error, name)
        if (described := _described(prompts)) not in data.read_as:
            data.read_as += described
        parts.append(prompts.dataset)
    if len(parts) == 1:
        return parts[0]
    if len({str(part.features["prompt"]) for part in parts}) > 1:
        raise feedback.FeedbackError(
            f"{dataset} has prompts of several kinds: give texts, or messages, in all of them."
        )
    columns_of = [{(name, str(kind)) for name, kind in part.features.items()} for part in parts]
    shared = {name for name, _ in set.intersection(*columns_of)}
    if others := sorted({name for part in parts for name in part.column_names} - shared):
        data.read_as += f"; columns that are not alike in all of them, and not used: {', '.join(others)}"
    return concatenate_datasets([part.select_columns(sorted(shared)) for part in parts])


def _refuse(rows: Dataset, name: str) -> None:
    """Say that there are no prompts, as the trainer does, with lines that would make some."""
    try:
        check_column(rows, name)
    except ValueError as error:
        error.add_note(converting_lines(name, rows.column_names, ("prompt",)))
        raise


@contextmanager
def _how_to_go_on() -> Iterator[None]:
    """Where one row is at fault, say how to do without it."""
    try:
        yield
    except feedback.FeedbackError as error:
        if isinstance(error.__cause__, Unusable):
            error.add_note("--on_error drop leaves such rows out, and says how many.")
        raise


def _sources(dataset: str) -> list[str]:
    """Names with commas between them; a comma may be part of a file's own name."""
    return [dataset] if Path(dataset).exists() else [part.strip() for part in dataset.split(",")]


def _described(read: feedback.Feedback | feedback.Prompts) -> str:
    """What was read, to stand behind the number of rows."""
    shown = ["", f"read as: {read.read_as}"]
    if read.unused:
        shown.append(f"columns not used: {', '.join(read.unused)}")
    if undecided := getattr(read, "undecided", 0):
        shown.append(f"{undecided} rows prefer nothing")
    if read.dropped:
        shown.append(f"{len(read.dropped)} rows dropped, the first for {read.dropped[0]}")
    return "; ".join(shown)


def load_texts(dataset: str) -> Dataset:
    """Rows of a file or of a dataset on the Hub, split "train".

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be read.
    """
    return _read(dataset if _is_file(dataset) else opened(dataset, "train", dataset), dataset)


def load_prompts(dataset: str, columns: Sequence[str] = ()) -> tuple[list[dict[str, Any]], str]:
    """Rows with "prompt", each prompt once: those of a file, a folder or a data set on the Hub, whose further columns
    ride along; or the prompts of feedback and conversations, as `feedback.read_prompts` reads them. "demo": the demo's
    held-out ones.

    Returns:
        The rows, and in one line what they were read as and what of them was left out; empty where there is nothing to
        say.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or what is in it are no prompts.
    """
    data = DataArguments(dataset, columns=list(columns))
    rows = demo.load("prompts", "test") if dataset == "demo" else _prompts(data, dataset, "train")
    check_prompts(rows, dataset)
    first: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(rows, start=1):
        if not as_text(row["prompt"]).strip():
            raise ValueError(f"{dataset}, row {number}: there is no prompt to answer.")
        first.setdefault(key_of(row["prompt"]), row)
    if again := len(rows) - len(first):
        data.read_as += f"; {again:,} rows left out, whose prompt was there before"
    return list(first.values()), data.read_as.removeprefix("; ")


def _read(source: Any, name: str, columns: list[str] | None = None) -> Dataset:
    if isinstance(source, str) and not Path(source).is_file():
        raise FileNotFoundError(f"The dataset file {source!r} does not exist.")
    if isinstance(source, str):
        source = rows_of_file(source, name)
    return source.rename_columns(renaming(columns or []))


def _is_file(source: str) -> bool:
    return Path(source).suffix in READERS


def _held_out_source(data: DataArguments) -> tuple[str, str] | None:
    """Dataset and split of the rows to evaluate on; None where they are held out of the others."""
    if data.eval_split is None:
        return None
    if _is_file(data.eval_split):
        return data.eval_split, "train"
    if (file := next(filter(_is_file, _sources(data.dataset)), None)) is not None:
        raise ValueError(
            f"eval_split is {data.eval_split!r}, but the file {file!r} has no splits: name a second file, or "
            "leave it out and eval_rows are held out."
        )
    return data.dataset, data.eval_split


def _check_read(data: DataArguments) -> None:
    """Refuse settings that would change nothing.

    Raises:
        ValueError: names one.
    """
    names, why = ["train_split"], f"the file {data.dataset!r} has no splits"
    if data.dataset == "demo":
        names, why = [*names, "eval_split", "eval_rows", "columns"], "the demo has rows of its own"
    elif not all(map(_is_file, _sources(data.dataset))):
        return
    usual = DataArguments()
    for name in names:
        if getattr(data, name) != getattr(usual, name):
            raise ValueError(f"{name} is {getattr(data, name)!r}, but {why}: leave it out.")


def _check_size(data: DataArguments, count: int, what: str) -> None:
    if count <= data.eval_rows:
        raise ValueError(
            f"The dataset {data.dataset!r} has {count} {what}, and eval_rows={data.eval_rows} of them are held out: "
            f"give more {what} or lower eval_rows."
        )


# Feedback ------------------------------------------------------------------------------------------------------------

# The number of pairs grows with the square of the answers to one prompt, and a ranking must fit into memory.
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
        held_out: the feedback of `test` as people gave it: ratings where there are some, else `test` itself.
        pairs: preference pairs of the same feedback, whatever its form; `held_out` where no pair can be made of it.
    """

    train: Dataset
    test: Dataset
    held_out: Dataset
    pairs: Dataset


def load_pairs(data: DataArguments) -> tuple[Dataset, Dataset]:
    """Preference pairs to train and to evaluate on: TRL's columns prompt, chosen and rejected, and `margin` where pairs
    have one. Other forms of feedback are made into pairs, at most 10 for each answer. Held-out pairs have prompts of
    their own.

    Raises:
        FileNotFoundError, ValueError: no such file or split, too few records, or (`FeedbackError`) a record that cannot
            be used, with its line and column.
    """
    train, held_out = _read_feedback(data, "pairs")
    return _PAIRS(train), _PAIRS(held_out)


def load_feedback(data: DataArguments, objective: str) -> RewardData:
    """Feedback of any form, in the columns of `objective`, split by prompt: at most 10 pairs for each answer, at most 8
    answers in a ranking. The demo has pairs for "pairwise"; for every other objective it has ratings.

    Raises:
        FileNotFoundError, ValueError: as `load_pairs` does.
    """
    train, held_out = _read_feedback(data, "pairs" if objective == "pairwise" else "ratings")
    convert = CONVERTERS[objective]
    if objective == "binary" and train.form == "ratings":  # held-out ratings have no say in where good begins
        convert = partial(feedback.to_unpaired, threshold=middle_of_scale(train))
    test = convert(held_out)
    as_given = feedback.to_ratings(held_out) if held_out.form == "ratings" else test
    if data.dataset == "demo" and objective != "pairwise":
        pairs = load_pairs(data)[1]
    elif convert is _PAIRS:
        pairs = test
    else:
        try:
            pairs = _PAIRS(held_out)
        except feedback.FeedbackError:  # no two answers to one prompt
            pairs = as_given
    return RewardData(convert(train), test, as_given, pairs)


def check_written(
    model: str, tokenizer: PreTrainedTokenizerBase, args: Any, train: Dataset, test: Dataset, cut: bool = False
) -> None:
    """Refuse rows that tokenizer or chat template refuse, or that the model cannot read, before it is loaded.

    Args:
        args: of the trainer: `max_length`, beyond which rows are left out, or `cut`.

    Raises:
        ValueError: names the row and the column.
    """
    config = config_of(model, args.trust_remote_code)
    for name, rows in (("train_dataset", train), ("eval_dataset", test)):
        rows_of_reward.check_written(rows, name, tokenizer, config, args.max_length, cut)


def _read_feedback(data: DataArguments, name: str) -> tuple[feedback.Feedback, feedback.Feedback]:
    """Feedback to train on and to evaluate on; of the demo, that of its data set `name`."""
    _check_read(data)
    if data.dataset == "demo":
        train, held_out = (feedback.read(demo.load(name, split), name=f"demo {name}") for split in ("train", "test"))
        return train, held_out

    def read(dataset: str, split: str) -> feedback.Feedback:
        sources: Any = _sources(dataset)
        with _how_to_go_on():
            several = sources if len(sources) > 1 else sources[0]
            return feedback.read(several, None, renaming(data.columns), data.on_error, split=split)

    records, source = read(data.dataset, data.train_split), _held_out_source(data)
    data.read_as = _described(records)
    if source is not None:
        return records, read(*source)
    _check_size(data, len(records.records), "records")
    return feedback.split_by_prompt(records, data.eval_rows)
