"""The forms that feedback is written in: how each is recognised, and how a row becomes a record.

A new form is a `Form` in `FORMS`; its rows become one of the four records, which everything else knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ext.feedback.files import Row, Unusable, decoded, has_half_a_character
from trl_ext.feedback.records import Label, Pair, Ranking, Rating, Record, without_nan
from trl_ext.types import fault_of_messages

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
    ratings = tuple(math.nan if item in (None, "") else number_of(item, column) for item in values)
    if not without_nan(ratings):
        raise Unusable(column, "no rating was given")
    prompt, (completion,) = prompt_and_answers(row, "completion")
    return Rating(prompt, completion, ratings)


def _ranking(row: Row) -> Record:
    completions, ranks = _list(row, "completions"), _list(row, "ranks")
    if len(completions) < 2:
        raise Unusable("completions", f"a ranking needs two completions or more, not {len(completions)}")
    if len(ranks) != len(completions):
        raise Unusable("ranks", f"{len(ranks)} ranks for {len(completions)} completions")
    numbers = [number_of(rank, "ranks") for rank in ranks]
    if any(number != int(number) or number < 1 for number in numbers):
        raise Unusable("ranks", f"{ranks!r:.60} are not whole numbers from 1 on")
    prompt, answers = prompt_and_answers(row, *("completions" for _ in completions), items=completions)
    return Ranking(prompt, tuple(answers), tuple(int(number) for number in numbers))


def _pair(row: Row) -> Record:
    column = "margin" if row.get("margin") not in (None, "") else "strength"
    strength = None if row.get(column) in (None, "") else number_of(row[column], column)
    if column == "strength" and strength is not None and strength <= 0:
        raise Unusable("strength", f"{row['strength']!r} is not above 0: turn the pair round, or drop it as a tie")
    prompt, (chosen, rejected) = prompt_and_answers(row, "chosen", "rejected")
    return Pair(prompt, chosen, rejected, strength)


def _label(row: Row) -> Record:
    value = row.get("label")
    word = str(value).strip().lower()
    if word.removesuffix(".0") not in GOOD | BAD:
        raise Unusable("label", f"{value!r:.60} is neither good nor bad (true or false, 1 or 0, yes or no)")
    prompt, (completion,) = prompt_and_answers(row, "completion")
    return Label(prompt, completion, word.removesuffix(".0") in GOOD)


def prompt_and_answers(row: Row, *columns: str, items: Sequence[Any] | None = None) -> tuple[Any, list[Any]]:
    """The prompt and what follows it in each of `columns` (or `items`), whoever laid them out: conversations may begin
    with the prompt, which may have a column of its own too, as messages or as the text of one of its turns. What a
    column `system` says comes before messages that have no system's of their own."""
    prompt, answers = _parted(row, columns, items)
    if isinstance(prompt, list) and prompt[0]["role"] != "system" and isinstance(row.get("system"), str):
        prompt = [*([{"role": "system", "content": row["system"]}] if row["system"].strip() else []), *prompt]
    return prompt, answers


def _parted(row: Row, columns: Sequence[str], items: Sequence[Any] | None) -> tuple[Any, list[Any]]:
    prompt = _text_or_messages(row, "prompt")
    values = [row.get(column) for column in columns] if items is None else items
    answers = [_text_or_messages({column: item}, column) for column, item in zip(columns, values, strict=True)]
    if not all(isinstance(answer, list) for answer in answers):
        return prompt, answers
    if isinstance(prompt, list):
        return prompt, _after_prompt(prompt, answers, columns)
    if prompt.strip() and all(answer[0]["role"] == "assistant" for answer in answers):
        return [{"role": "user", "content": prompt}], answers
    if not prompt.strip() and len(answers) == 1:  # nothing says where the prompt ends
        return prompt, answers
    shared = shared_messages(answers)
    if prompt.strip() and prompt.strip() not in (str(message.get("content")).strip() for message in shared):
        raise Unusable("prompt", "a text that the conversations do not begin with: give the prompt as messages")
    if not shared and columns == ("chosen", "rejected"):
        raise Unusable("prompt", "the conversations begin with no message in common: give the prompt as messages")
    return shared or prompt, [answer[len(shared) :] for answer in answers]


def _after_prompt(prompt: list[Any], answers: list[list[Any]], columns: Sequence[str]) -> list[list[Any]]:
    """The answers without the prompt, where they begin with it: all of them, or none."""
    begin = [shared_messages([[*prompt, {}], [*answer, {}]]) == prompt for answer in answers]
    for column, answer, begins in zip(columns, answers, begin, strict=True):
        if any(begin) and not (begins and len(answer) > len(prompt)):
            raise Unusable(column, "does not go on from the prompt, as others of the row do: give all of them alike")
    return [answer[len(prompt) :] for answer in answers] if any(begin) else answers


def shared_messages(conversations: Sequence[list[Any]]) -> list[Any]:
    """The messages that all of them begin with; each keeps its last. A key without a value, as tables add them, is no
    difference."""
    plain = [[{key: v for key, v in m.items() if v is not None} for m in messages] for messages in conversations]
    most = min(map(len, plain)) - 1
    return conversations[0][: next((i for i in range(most) if any(o[i] != plain[0][i] for o in plain)), most)]


def _text_or_messages(row: Row, column: str) -> Any:
    """A prompt or an answer."""
    value = decoded(row.get(column))
    if value is None and column == "prompt":
        return ""
    if has_half_a_character(value):
        raise Unusable(column, "half of a surrogate pair (\\ud800 to \\udfff), which is no character: mend the escapes")
    if isinstance(value, str) and (column == "prompt" or value.strip()):
        return value
    fault = fault_of_messages(value)
    if fault is None:
        return value
    shown = "missing" if value is None else "empty" if value in ("", []) or not str(value).strip() else f"{value!r:.60}"
    shown = fault if fault.startswith("the content") else shown
    raise Unusable(column, f"{shown}: give a text, or a list of messages with role and content")


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


def number_of(value: Any, column: str) -> float:
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
