"""From rows to records. Every record is checked; a message names the line and the column of what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import extract_prompt

from trl_ext.feedback.files import FeedbackError, Row, Unusable, numbered_rows
from trl_ext.feedback.records import Label, Pair, Problem, Ranking, Rating, Record, key_of, without_nan

FORMS = ("ratings", "rankings", "pairs", "labels")
GOOD = {"good", "true", "yes", "1", "+1", "up"}
BAD = {"bad", "false", "no", "0", "-1", "down"}


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
        form: one of the four; None: the columns decide.
        columns: names in the source to the names above, e.g. {"text": "completion"}.
        on_error: "raise" at the first bad record, or "drop" it and list it in `dropped`.
        name: what messages call the source; None: the file's name, or "dataset".

    Raises:
        FileNotFoundError: no such file.
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
            record = _MAKERS[form](row)
            _check_kind(record, records[0] if records else record)
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
    return Feedback(str(form), _raters_together(records) if form == "ratings" else records, name, dropped)


def _form_of(row: Row, name: str) -> str:
    present = set(row)
    if {"chosen", "rejected"} <= present:
        return "pairs"
    if {"completions", "ranks"} <= present:
        return "rankings"
    if "completion" in present and present & {"rating", "ratings"}:
        return "ratings"
    if {"completion", "label"} <= present:
        return "labels"
    raise FeedbackError(
        f"{name} has the columns {sorted(present)}, which are no form of feedback: it needs completion and rating, "
        "completions and ranks, chosen and rejected, or completion and label (rename with columns)."
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


# One record ----------------------------------------------------------------------------------------------------------


def _rating(row: Row) -> Record:
    column = "ratings" if row.get("ratings") is not None else "rating"
    value = row.get(column)
    if isinstance(value, str) and column == "ratings":
        value = _list(row, column) if value.startswith("[") else value.replace(",", " ").replace(";", " ").split()
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    ratings = tuple(math.nan if item in (None, "") else _number(item, column) for item in values)
    if not without_nan(ratings):
        raise Unusable(column, "no rating was given")
    return Rating(_text_or_messages(row, "prompt"), _text_or_messages(row, "completion"), ratings)


def _ranking(row: Row) -> Record:
    completions, ranks = _list(row, "completions"), _list(row, "ranks")
    if len(completions) < 2:
        raise Unusable("completions", f"a ranking needs two completions or more, not {len(completions)}")
    if len(ranks) != len(completions):
        raise Unusable("ranks", f"{len(ranks)} ranks for {len(completions)} completions")
    numbers = [_number(rank, "ranks") for rank in ranks]
    if any(number != int(number) or number < 1 for number in numbers):
        raise Unusable("ranks", f"{ranks!r:.60} are not whole numbers from 1 on")
    answers = tuple(_text_or_messages({"completions": item}, "completions") for item in completions)
    return Ranking(_text_or_messages(row, "prompt"), answers, tuple(int(number) for number in numbers))


def _pair(row: Row) -> Record:
    column = "margin" if row.get("margin") not in (None, "") else "strength"
    strength = None if row.get(column) in (None, "") else _number(row[column], column)
    if column == "strength" and strength is not None and strength <= 0:
        raise Unusable("strength", f"{row['strength']!r} is not above 0: turn the pair round, or drop it as a tie")
    prompt, chosen, rejected = (_text_or_messages(row, column) for column in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        prompt, chosen, rejected = _shared_prompt(prompt, chosen, rejected)
    return Pair(prompt, chosen, rejected, strength)


def _shared_prompt(text: str, chosen: list[Any], rejected: list[Any]) -> tuple[Any, Any, Any]:
    """Prompt and answers of two conversations. `text` is the prompt's text where it has a column of its own, too."""
    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    if not parts["prompt"]:
        raise Unusable("prompt", "the conversations begin with no message in common: give the prompt as messages")
    if text.strip() and text.strip() not in (str(message["content"]).strip() for message in parts["prompt"]):
        raise Unusable("prompt", "a text that neither conversation begins with: give the prompt as messages")
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _label(row: Row) -> Record:
    value = row.get("label")
    word = str(value).strip().lower()
    if word.removesuffix(".0") not in GOOD | BAD:
        raise Unusable("label", f"{value!r:.60} is neither good nor bad (true or false, 1 or 0, yes or no)")
    return Label(
        _text_or_messages(row, "prompt"), _text_or_messages(row, "completion"), word.removesuffix(".0") in GOOD
    )


_MAKERS = {"ratings": _rating, "rankings": _ranking, "pairs": _pair, "labels": _label}


def _check_kind(record: Record, first: Record) -> None:
    """Refuse texts among messages: trainers tell which of them a data set holds by one row."""
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


def _text_or_messages(row: Row, column: str) -> Any:
    """A prompt or an answer."""
    value = _decoded(row.get(column))
    if value is None and column == "prompt":
        return ""
    if _has_half_a_character(value):
        raise Unusable(column, "half of a surrogate pair (\\ud800 to \\udfff), which is no character: mend the escapes")
    if (isinstance(value, str) and (column == "prompt" or value.strip())) or _are_messages(value):
        return value
    shown = "missing" if value is None else "empty" if value in ("", []) or not str(value).strip() else f"{value!r:.60}"
    raise Unusable(column, f"{shown}: give a text, or a list of messages with role and content")


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and m.get("role") and "content" in m for m in value)
    )


def _decoded(value: Any) -> Any:
    """Messages, where a text is their JSON: the cells of a table are texts."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return decoded if _are_messages(decoded) else value
    return value


def _has_half_a_character(value: Any) -> bool:
    """Escapes in JSON can spell what UTF-8 cannot hold and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _list(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, (list, tuple)):
        raise Unusable(column, f"{row.get(column)!r:.60} is not a list")
    return list(value)


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Unusable(column, f"{value!r:.60} is not a number")
    return number
