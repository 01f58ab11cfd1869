"""What people say about answers, in four forms. An answer or a prompt is a text, or a list of messages."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Rating:
    """Numbers that people gave one answer.

    Attributes:
        ratings: one a rater, on any scale; NaN where a rater gave none.
    """

    prompt: Any
    completion: Any
    ratings: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the numbers that were given."""
        return fmean(rating for rating in self.ratings if rating == rating)


@dataclass(frozen=True)
class Ranking:
    """Several answers in order.

    Attributes:
        ranks: one an answer, 1 the best; equal ranks are ties.
    """

    prompt: Any
    completions: tuple[Any, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One answer preferred to another.

    Attributes:
        strength: how clearly, above 0, on any scale; None where nobody said.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    strength: float | None


@dataclass(frozen=True)
class Label:
    """An answer found good (True) or bad (False)."""

    prompt: Any
    completion: Any
    label: bool


Record = Rating | Ranking | Pair | Label


@dataclass(frozen=True)
class Problem:
    """Why a record was not taken in.

    Attributes:
        line: where it stands in its file, from 1, the header counted; of a table without lines, its row from 1.
        column: which column is at fault.
        reason: what is wrong with it.
    """

    line: int
    column: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column!r}: {self.reason}"


def key_of(item: Any) -> str:
    """Prompts and answers as something that can be compared and looked up."""
    return item if isinstance(item, str) else json.dumps(item, sort_keys=True, ensure_ascii=False)
