"""The four ways to judge answers: what is shown together, what the page's form says, and what becomes of it.

A verdict is a tuple of whole numbers, one for each answer of the item in the item's own order, whatever order the rater
saw: stars 1 to 5; 1 for good and 0 for bad; ranks, 1 the best, equal ranks tied. A pair is a ranking of two.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from trl_ext.feedback import Label, Pair, Ranking, Rating

Verdict = tuple[int, ...]
STARS = range(1, 6)
DISTANCES = 4  # a pair joins answers at most this far apart in the prompt's circle: all pairs, up to nine answers
LONGEST_RANKING = 8
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Candidate:
    """An answer as far as it matters for what is shown together.

    Attributes:
        key: equal for answers that read alike.
        policy: who wrote it; None where nobody said.
    """

    number: int
    key: str
    policy: str | None


@dataclass(frozen=True)
class Mode:
    """One way to judge.

    Attributes:
        name: on the command line.
        asks: the question on the page.
        form: of `trl_ext.feedback`, in which judgements are written.
        needs: what a file of answers must have to be judged so.
        groups: the answers of one prompt, as they are shown together.
        verdict: of the page's form, in the order in which the answers were shown; None where it says nothing.
        known: the verdict in a record whose judgement is known.
        row: the columns of the form, from completions and a verdict; None where the form has no words for it.
        said: a verdict in words, of answers as they were shown.
    """

    name: str
    asks: str
    form: str
    needs: str
    groups: Callable[[Sequence[Candidate]], list[tuple[int, ...]]]
    verdict: Callable[[Mapping[str, str], int], Verdict | None]
    known: Callable[[Any], tuple[tuple[Any, ...], Verdict]]
    row: Callable[[Sequence[Any], Verdict], dict[str, Any] | None]
    said: Callable[[Verdict], str]

    @property
    def ranks(self) -> bool:
        """Whether verdicts are ranks."""
        return self.form in ("pairs", "rankings")


def distinct(answers: Sequence[Candidate]) -> list[Candidate]:
    """Those that read alike once."""
    return list({answer.key: answer for answer in reversed(answers)}.values())[::-1]


def alike(answers: Sequence[Candidate]) -> list[tuple[int, int]]:
    """Answers of two policies that read alike: ties that nobody needs to be asked about."""
    return [
        (a.number, b.number) for a, b in combinations(answers, 2) if a.key == b.key and a.policy not in (None, b.policy)
    ]


def _singles(answers: Sequence[Candidate]) -> list[tuple[int, ...]]:
    return [(answer.number,) for answer in distinct(answers)]


def _pairs(answers: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """Of different policies where there are several, else any two."""
    several = len({answer.policy for answer in answers}) > 1
    found: dict[frozenset[str], tuple[int, ...]] = {}
    for distance in range(1, min(DISTANCES, len(answers) // 2) + 1):
        for place, a in enumerate(answers):
            b = answers[(place + distance) % len(answers)]
            if a.key != b.key and (a.policy != b.policy or not several):
                found.setdefault(frozenset((a.key, b.key)), (a.number, b.number))
    return list(found.values())


def _rankings(answers: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """All together, or in lists of about the same length where they are too many for one."""
    different = [answer.number for answer in distinct(answers)]
    lists = -(-len(different) // LONGEST_RANKING)
    return [part for start in range(lists) if len(part := tuple(different[start::lists])) > 1]


def _stars(form: Mapping[str, str], _: int) -> Verdict | None:
    said = form.get("verdict", "")
    return (int(said),) if said in map(str, STARS) else None


def _label(form: Mapping[str, str], _: int) -> Verdict | None:
    return {"good": (1,), "bad": (0,)}.get(form.get("verdict", ""))


def _better(form: Mapping[str, str], _: int) -> Verdict | None:
    return {"a": (1, 2), "b": (2, 1), "tie": (1, 1)}.get(form.get("verdict", ""))


def _ranked(form: Mapping[str, str], size: int) -> Verdict | None:
    places = [form.get(f"place-{LETTERS[shown]}", "") for shown in range(size)]
    if form.get("verdict") != "ranked" or not all(place.isdecimal() and len(place) < 3 for place in places):
        return None
    order = sorted({int(place) for place in places})
    return tuple(order.index(int(place)) + 1 for place in places)  # 1, 3, 3 says the same as 1, 2, 2


def _row_of_pair(completions: Sequence[Any], verdict: Verdict) -> dict[str, Any] | None:
    if verdict[0] == verdict[1]:
        return None
    chosen = verdict.index(1)
    return {"chosen": completions[chosen], "rejected": completions[1 - chosen]}


def said_of_ranks(verdict: Verdict) -> str:
    """As in "B, then A and C"."""
    places = [[LETTERS[i] for i, rank in enumerate(verdict) if rank == place] for place in sorted(set(verdict))]
    return ", then ".join(" and ".join(letters) for letters in places)


def _known_rating(record: Rating) -> tuple[tuple[Any, ...], Verdict]:
    return (record.completion,), (round(record.mean),)


def _known_label(record: Label) -> tuple[tuple[Any, ...], Verdict]:
    return (record.completion,), (int(record.label),)


def _known_pair(record: Pair) -> tuple[tuple[Any, ...], Verdict]:
    return (record.chosen, record.rejected), (1, 2)


def _known_ranking(record: Ranking) -> tuple[tuple[Any, ...], Verdict]:
    order = sorted(set(record.ranks))
    return record.completions, tuple(order.index(rank) + 1 for rank in record.ranks)


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            name="stars",
            asks="How good is this answer?",
            form="ratings",
            needs="an answer",
            groups=_singles,
            verdict=_stars,
            known=_known_rating,
            row=lambda completions, verdict: {"completion": completions[0], "rating": verdict[0]},
            said=lambda verdict: "1 star" if verdict == (1,) else f"{verdict[0]} stars",
        ),
        Mode(
            name="pairs",
            asks="Which answer is better?",
            form="pairs",
            needs="two different answers to one prompt",
            groups=_pairs,
            verdict=_better,
            known=_known_pair,
            row=_row_of_pair,
            said=lambda verdict: "Tie" if verdict[0] == verdict[1] else f"{LETTERS[verdict.index(1)]} is better",
        ),
        Mode(
            name="ranking",
            asks="Put the answers in order, the best on top.",
            form="rankings",
            needs="two different answers to one prompt",
            groups=_rankings,
            verdict=_ranked,
            known=_known_ranking,
            row=lambda completions, verdict: {"completions": list(completions), "ranks": list(verdict)},
            said=said_of_ranks,
        ),
        Mode(
            name="labels",
            asks="Is this answer good?",
            form="labels",
            needs="an answer",
            groups=_singles,
            verdict=_label,
            known=_known_label,
            row=lambda completions, verdict: {"completion": completions[0], "label": bool(verdict[0])},
            said=lambda verdict: "Good" if verdict == (1,) else "Bad",
        ),
    )
}


def shuffled(items: Sequence[Any], *seed: object) -> list[Any]:
    """The items in an order that the seed decides."""
    return random.Random(" ".join(map(str, seed))).sample(list(items), len(items))


def as_shown(verdict: Verdict, order: Sequence[int]) -> Verdict:
    """A verdict in the order in which the answers were shown: `order[place]` is the answer at that place."""
    return tuple(verdict[answer] for answer in order)


def as_stored(verdict: Verdict, order: Sequence[int]) -> Verdict:
    """The inverse of `as_shown`."""
    return tuple(verdict[order.index(answer)] for answer in range(len(order)))
