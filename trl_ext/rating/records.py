"""What the store gives: items as raters see them, and what was said about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_ext.rating.answers import Answer
from trl_ext.rating.modes import Verdict


@dataclass(frozen=True)
class Shown:
    """An item as a rater sees it.

    Attributes:
        token: names this showing.
        prompt: a text, or messages.
        completions: in the order in which they are shown.
        verdict: what the rater said, in that order; None where nothing was said.
        state: "open", "judged", "unsure" (cannot tell) or "skipped".
    """

    token: str
    prompt: Any
    completions: tuple[Any, ...]
    state: str
    verdict: Verdict | None
    comment: str


@dataclass(frozen=True)
class Annotation:
    """What a rater said about an item.

    Attributes:
        item: its number.
        kind: "ask", "repeat" or "attention".
        state: "judged", "unsure" or "skipped".
        order: the answer of the item that was shown at each place.
        verdict: in the item's own order; None where there is none.
        known: the verdict of an attention item.
        seconds: from when the item was given to when the judgement came.
    """

    item: int
    rater: str
    kind: str
    state: str
    order: tuple[int, ...]
    verdict: Verdict | None
    known: Verdict | None
    comment: str
    seconds: float
    prompt_number: int
    prompt: Any
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Compared:
    """Two answers by different policies to one prompt, as a person saw them.

    Attributes:
        prompt: its number in the file of answers, from 0, each prompt counted once.
        a, b: the policies.
        outcome: 1.0 where a's answer is better, 0.5 for a tie, 0.0 where b's is.
        tokens_a, tokens_b: of the completions; None where nobody said.
        id_a, id_b: of the answers.
        rater: None where the answers read alike, which is a tie that nobody was asked about.
    """

    prompt: int
    a: str
    b: str
    outcome: float
    tokens_a: int | None
    tokens_b: int | None
    id_a: str
    id_b: str
    rater: str | None


@dataclass(frozen=True)
class Progress:
    """How far the work is.

    Attributes:
        done, needed: judgements of new items, by everybody.
        mine: items that this rater dealt with, repeats and attention items among them.
        held: items that are before other raters now.
    """

    done: int
    needed: int
    mine: int
    held: int
