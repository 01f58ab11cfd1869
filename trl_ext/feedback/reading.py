"""Files of feedback to records, each validated, with line and column named where something is wrong."""

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
from trl_ext.feedback.records import Label, Pair, Problem, Ranking, Rating, Record, key_of

FORMS = ("ratings", "rankings", "pairs", "labels")
GOOD = {"good", "true", "yes", "1", "+1", "up"}
BAD = {"bad", "false", "no", "0", "-1", "down"}


@dataclass(frozen=True)
class Feedback:
    """What was read.

    Attributes:
        form: "ratings", "rankings", "pairs" or "labels".
        records: all of that form, in the file's order.
        source: the file's name, or "dataset".
        dropped: what was not taken in, and why.
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
) -> Feedback:
    """Read feedback in one of its forms:

    - ratings: `prompt`, `completion`, and `rating` (a number) or `ratings` (several: a list, or text with spaces or
      commas between them). Records of the same prompt and completion are one answer's several raters.
    - rankings: `prompt`, `completions` (a list), `ranks` (as many whole numbers, 1 the best, equal ones tied).
    - pairs: `prompt`, `chosen`, `rejected`, and where known `strength` (above 0).
    - labels: `prompt`, `completion`, `label` (true or false, good or bad, 1 or 0, yes or no).

    Prompts and completions are texts or lists of messages. Without a `prompt` column the prompt is the empty text, or
    the messages that the two conversations of a pair begin with. Lists may stand as JSON, as they
    must in CSV and TSV; TSV knows no quoting.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, or a dataset.
        form: which; None: told from the columns.
        columns: names in the file to the names above, e.g. {"text": "completion"}.
        on_error: "raise" at the first bad record, or "drop" it and list it in `dropped`.

    Raises:
        FileNotFoundError: no such file.
        FeedbackError: no records, unknown columns, or a bad record.
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error is {on_error!r}: choose raise or drop.")
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}.")
    name = "dataset" if isinstance(source, Dataset) else str(source)
    made: list[Any] = []
    dropped: list[Problem] = []
    for line, row in numbered_rows(source, name):
        try:
            if isinstance(row, Unusable):
                raise row
            row = {(columns or {}).get(key, key): value for key, value in row.items()}
            form = form or _form_of(row, name)
            made.append(_MAKERS[form](row))
        except Unusable as bad:
            problem = Problem(line, bad.column, bad.reason)
            if on_error == "raise":
                raise FeedbackError(f"{name}: {problem}.") from bad
            dropped.append(problem)
    if not made:
        lost = f": all {len(dropped)} records were dropped, the first for {dropped[0]}" if dropped else ""
        raise FeedbackError(f"{name} holds no feedback{lost}.")
    return Feedback(str(form), _raters_together(made) if form == "ratings" else made, name, dropped)


def _form_of(row: Row, name: str) -> str:
    given = set(row)
    if {"chosen", "rejected"} <= given:
        return "pairs"
    if {"completions", "ranks"} <= given:
        return "rankings"
    if "completion" in given and given & {"rating", "ratings"}:
        return "ratings"
    if {"completion", "label"} <= given:
        return "labels"
    raise FeedbackError(
        f"{name} has the columns {sorted(given)}, which are no form of feedback: it needs completion and rating, "
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
    """Column names of a command line, each THEIRS=OURS, as `columns` of `read` has them.

    Raises:
        ValueError: one is of another kind.
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
    numbers = tuple(math.nan if item in (None, "") else _number(item, column) for item in values)
    if all(number != number for number in numbers):
        raise Unusable(column, "no rating was given")
    return Rating(_said(row, "prompt"), _said(row, "completion"), numbers)


def _ranking(row: Row) -> Record:
    completions, ranks = _list(row, "completions"), _list(row, "ranks")
    if len(completions) < 2:
        raise Unusable("completions", f"a ranking needs two completions or more, not {len(completions)}")
    if len(ranks) != len(completions):
        raise Unusable("ranks", f"{len(ranks)} ranks for {len(completions)} completions")
    numbers = [_number(rank, "ranks") for rank in ranks]
    if any(number != int(number) or number < 1 for number in numbers):
        raise Unusable("ranks", f"{ranks!r:.60} are no whole numbers from 1 on")
    answers = tuple(_said({"completions": item}, "completions") for item in completions)
    return Ranking(_said(row, "prompt"), answers, tuple(int(number) for number in numbers))


def _pair(row: Row) -> Record:
    strength = row.get("strength")
    number = None if strength in (None, "") else _number(strength, "strength")
    if number is not None and number <= 0:
        raise Unusable("strength", f"{strength!r} is not above 0: turn the pair round, or drop it as a tie")
    pair = {side: _said(row, side) for side in ("prompt", "chosen", "rejected")}
    if "prompt" not in row and isinstance(pair["chosen"], list):
        pair |= extract_prompt({"chosen": pair["chosen"], "rejected": pair["rejected"]})
    return Pair(pair["prompt"], pair["chosen"], pair["rejected"], number)


def _label(row: Row) -> Record:
    value = row.get("label")
    word = str(value).strip().lower()
    if word.removesuffix(".0") not in GOOD | BAD:
        raise Unusable("label", f"{value!r:.60} is neither good nor bad (true or false, 1 or 0, yes or no)")
    return Label(_said(row, "prompt"), _said(row, "completion"), word.removesuffix(".0") in GOOD)


_MAKERS = {"ratings": _rating, "rankings": _ranking, "pairs": _pair, "labels": _label}


def _said(row: Row, column: str) -> Any:
    """A prompt or completion: text or messages."""
    value = _messages(row.get(column))
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


def _messages(value: Any) -> Any:
    """Messages also where they stand as JSON, as in a table, whose cells are texts."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if _are_messages(found) else value
    return value


def _has_half_a_character(value: Any) -> bool:
    """JSON's escapes can spell what no UTF-8 text can hold, and no tokenizer takes."""
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
        except ValueError:
            value = None
    if not isinstance(value, (list, tuple)):
        raise Unusable(column, f"{row.get(column)!r:.60} is no list")
    return list(value)


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise Unusable(column, f"{value!r:.60} is no number")
    return number
