"""What people say about answers, in four forms. A prompt or an answer is a text, or a list of messages."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Rating:
    """Numbers that people gave to one answer.

    Attributes:
        ratings: one for each rater, on any scale; NaN where a rater gave none.
    """

    prompt: Any
    completion: Any
    ratings: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the ratings, NaN left out."""
        return fmean(without_nan(self.ratings))


@dataclass(frozen=True)
class Ranking:
    """Several answers in order.

    Attributes:
        ranks: one for each answer; 1 is the best, equal ranks are ties.
    """

    prompt: Any
    completions: tuple[Any, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two answers, of which one was preferred.

    Attributes:
        strength: how clearly, on any scale: above 0 from a column `strength`, any number from a column `margin`. None
            where nobody said.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    strength: float | None


@dataclass(frozen=True)
class Label:
    """An answer that was labelled good (True) or bad (False)."""

    prompt: Any
    completion: Any
    label: bool


Record = Rating | Ranking | Pair | Label


@dataclass(frozen=True)
class Problem:
    """Why a record cannot be used.

    Attributes:
        line: its line in the file, from 1, the header included; its row, from 1, where the source has no lines.
        column: the column that is at fault; empty where it is the line as a whole.
        reason: what is wrong.
    """

    line: int
    column: str
    reason: str

    def __str__(self) -> str:
        column = f", column {self.column!r}" if self.column else ""
        return f"line {self.line}{column}: {self.reason}"


def answers_of(record: Record) -> tuple[Any, ...]:
    """Every answer that the record is about."""
    if isinstance(record, Pair):
        return record.chosen, record.rejected
    return record.completions if isinstance(record, Ranking) else (record.completion,)


def key_of(item: Any) -> str:
    """A prompt or an answer as a text that can be compared and looked up. A key of a message without a value, as tables
    add them, is no difference."""
    if isinstance(item, str):
        return item
    if isinstance(item, list):
        item = [
            {key: value for key, value in one.items() if value is not None} if isinstance(one, dict) else one
            for one in item
        ]
    return json.dumps(item, sort_keys=True, ensure_ascii=False)


def without_nan(ratings: Iterable[float]) -> list[float]:
    """The ratings that were given."""
    return [rating for rating in ratings if not math.isnan(rating)]
