"""The forms that feedback is written in: how each is recognised, and how a row becomes a record.

A new form is a `Form` in `FORMS`; its rows become one of the four records, which everything else knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl import extract_prompt

from trl_ext.feedback.files import Row, Unusable
from trl_ext.feedback.records import Label, Pair, Ranking, Rating, Record, without_nan

GOOD = {"good", "true", "yes", "1", "+1", "up"}
BAD = {"bad", "false", "no", "0", "-1", "down"}


@dataclass(frozen=True)
class Form:
    """One way to write feedback down.

    Attributes:
        columns: sets of columns; a row that has all of one set is of this form.
        record: makes a record of a row. It raises `Unusable` with the column and the reason where it cannot.
    """

    columns: Sequence[set[str]]
    record: Callable[[Row], Record]

    def __post_init__(self) -> None:
        if isinstance(self.columns, (str, set, frozenset)) or not all(self.columns) or not callable(self.record):
            raise TypeError(
                "A Form takes a list of sets of column names, none of them empty, as in [{'completion', 'stars'}], and "
                "a function from a row to a record."
            )


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


# In the order in which rows are held against them.
FORMS: dict[str, Form] = {
    "pairs": Form([{"chosen", "rejected"}], _pair),
    "rankings": Form([{"completions", "ranks"}], _ranking),
    "ratings": Form([{"completion", "rating"}, {"completion", "ratings"}], _rating),
    "labels": Form([{"completion", "label"}], _label),
}
