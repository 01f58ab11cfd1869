"""From rows to records. Every record is checked; a message names the line and the column of what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.feedback.files import FeedbackError, Row, Unusable, numbered_rows
from trl_ext.feedback.forms import FORMS
from trl_ext.feedback.records import Label, Pair, Problem, Ranking, Rating, Record, key_of

# What each record is called, whatever form it was written in.
KINDS: dict[type[Record], str] = {Rating: "ratings", Ranking: "rankings", Pair: "pairs", Label: "labels"}


@dataclass(frozen=True)
class Feedback:
    """Records of one form.

    Attributes:
        form: "ratings", "rankings", "pairs" or "labels".
        records: all of that form, in the order of the source.
        source: the name of the file or dataset.
        dropped: the records that were left out, and why.
    """

    form: str
    records: list[Any]
    source: str
    dropped: list[Problem] = field(default_factory=list)


def read(
    source: str | Path | Dataset,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
    name: str | None = None,
) -> Feedback:
    """Read feedback of one of these forms:

    - ratings: `prompt`, `completion`, and `rating` (a number) or `ratings` (several: a list, or text with spaces or
      commas between them). Records of the same prompt and completion are one answer's several raters.
    - rankings: `prompt`, `completions` (a list), `ranks` (as many whole numbers, 1 the best, equal ones tied).
    - pairs: `prompt`, `chosen`, `rejected`, and where known `strength` (above 0) or TRL's `margin` (any number).
    - labels: `prompt`, `completion`, `label` (true or false, good or bad, 1 or 0, yes or no).

    Prompts and completions are all texts, or all lists of messages. Where there is no prompt, it is the empty text; for
    a pair of conversations it is the messages that both begin with. Lists may be JSON, as they must be in CSV and TSV.
    TSV knows no quoting. Further columns are ignored.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, or a dataset.
        form: one of these, or of your own in `FORMS`; None: the columns decide.
        columns: names in the source to the names above, e.g. {"text": "completion"}.
        on_error: "raise" at the first bad record, or "drop" it and list it in `dropped`.
        name: what messages call the source; None: the file's name, or "dataset".

    Raises:
        FileNotFoundError: no such file.
        ValueError: `form` or `on_error` is unknown.
        FeedbackError: no records, unknown columns, or a bad record.
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error is {on_error!r}: choose raise or drop.")
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}.")
    name = name or ("dataset" if isinstance(source, Dataset) else str(source))
    columns = columns or {}
    present: set[str] = set()
    records: list[Any] = []
    dropped: list[Problem] = []
    for line, row in numbered_rows(source, name):
        try:
            if isinstance(row, Unusable):
                raise row
            present |= row.keys()
            row = {columns.get(key, key): value for key, value in row.items()}
            form = form or _form_of(row, name)
            record = _record_of(row, form)
            check_same(record, records[0] if records else record)
            records.append(record)
        except Unusable as bad:
            problem = Problem(line, bad.column, bad.reason)
            if on_error == "raise":
                raise FeedbackError(f"{name}: {problem}.") from bad
            dropped.append(problem)
    if not records:
        first = f": all {len(dropped)} records were dropped, the first for {dropped[0]}" if dropped else ""
        raise FeedbackError(f"{name} holds no feedback{first}.")
    if missing := [column for column in columns if column not in present]:
        raise FeedbackError(f"{name} has no column {missing[0]!r} to rename, only {sorted(present)}.")
    kind = KINDS[type(records[0])]
    return Feedback(kind, _raters_together(records) if kind == "ratings" else records, name, dropped)


def _record_of(row: Row, form: str) -> Record:
    """A row's record, whoever wrote the form."""
    try:
        record = FORMS[form].record(row)
    except Unusable:
        raise
    except Exception as error:
        raise Unusable("", f"the form {form!r} raised {type(error).__name__}: {error}") from error
    if type(record) not in KINDS:
        raise Unusable("", f"the form {form!r} returned {type(record).__name__}, not a Rating, Ranking, Pair or Label")
    return record


def _form_of(row: Row, name: str) -> str:
    """The form most of whose columns the row has."""
    fitting = [
        (len(columns), form) for form, shape in FORMS.items() for columns in shape.columns if columns <= set(row)
    ]
    if fitting:
        return max(fitting, key=lambda pair: pair[0])[1]  # of equals the first
    known = [" and ".join(sorted(columns)) for shape in FORMS.values() for columns in shape.columns]
    raise FeedbackError(
        f"{name} has the columns {sorted(row)}, which are no form of feedback: it needs {', '.join(known[:-1])}, or "
        f"{known[-1]} (rename with columns)."
    )


def _raters_together(records: list[Rating]) -> list[Rating]:
    """Several records of one prompt and completion as one."""
    merged: dict[tuple[str, str], Rating] = {}
    for record in records:
        key = key_of(record.prompt), key_of(record.completion)
        before = merged.get(key)
        merged[key] = record if before is None else replace(record, ratings=before.ratings + record.ratings)
    return list(merged.values())


def renaming(pairs: Sequence[str]) -> dict[str, str]:
    """The argument `columns` of `read`, from a command line's THEIRS=OURS.

    Raises:
        ValueError: one has no "=", or nothing beside it.
    """
    columns = {}
    for pair in pairs:
        theirs, equals, ours = pair.partition("=")
        if not (theirs and equals and ours):
            raise ValueError(f"The column {pair!r} is not of the kind THEIRS=OURS, as in text=completion.")
        columns[theirs] = ours
    return columns


def check_same(record: Record, first: Record) -> None:
    """Refuse a record of another kind than the first, and texts among messages: trainers tell by one row which of them
    a data set holds."""
    if type(record) is not type(first):
        kinds = f"a {type(record).__name__}, where the first record is a {type(first).__name__}"
        raise Unusable("", f"the form makes {kinds}: let it make one kind")
    items = [*_items(first), *_items(record)]
    texts = isinstance(items[0][1], str)
    for column, item in items:
        if isinstance(item, str) != texts:
            shown = "messages, where others are texts" if texts else "a text, where others are messages"
            raise Unusable(column, f"{shown}: give all prompts and answers in one of the two ways")


def _items(record: Record) -> list[tuple[str, Any]]:
    """(column, text or messages) of every answer, and of the prompt where it is not empty."""
    items = []
    for column in ("chosen", "rejected", "completion", "completions", "prompt"):
        value = getattr(record, column, None)
        items += [(column, item) for item in (value if isinstance(value, tuple) else (value,)) if item]
    return items
