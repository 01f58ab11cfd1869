"""How far raters agree: with each other, with themselves, and with what is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from trl_ext.rating.modes import Mode, Verdict
from trl_ext.rating.records import Annotation

Two = tuple[Verdict, Verdict]


@dataclass(frozen=True)
class ObservedAgreement:
    """How often verdicts on the same item agree, two at a time, chance not taken off.

    Attributes:
        agreed: how often the two say the same; of rankings, how many pairs of answers stand in the same order.
        near: of stars, how often they are at most one apart; of others, the same as `agreed`.
        of: how many were compared.
    """

    agreed: int
    near: int
    of: int

    def __str__(self) -> str:
        return f"{self.agreed} of {self.of} ({self.agreed / self.of:.0%})" if self.of else "nothing to compare"


@dataclass(frozen=True)
class Agreements:
    """Of one rater, or of all.

    Attributes:
        others: with other raters, on the same item.
        self_: between the first time and the repeat.
        known: with the known verdict of attention items.
    """

    others: ObservedAgreement
    self_: ObservedAgreement
    known: ObservedAgreement


def agreements(judgements: Sequence[Annotation], mode: Mode, rater: str | None = None) -> Agreements:
    """Of one rater; None: of all, where each two raters of an item are counted once."""
    judged = [j for j in judgements if j.state == "judged"]
    mine = [j for j in judged if rater in (None, j.rater)]
    return Agreements(
        _count(mode, (two for two, _ in with_others(judged, rater))),
        _count(mode, _repeats(mine)),
        _count(mode, ((j.verdict, j.known) for j in mine if j.verdict and j.known), near=mode.name == "stars"),
    )


def with_others(judgements: Iterable[Annotation], rater: str | None = None) -> Iterator[tuple[Two, Annotation]]:
    """Verdicts of two raters on one item, the rater's own first, with the judgement of the other."""
    by_item: dict[int, list[Annotation]] = {}
    for judgement in judgements:
        if judgement.kind == "ask" and judgement.verdict is not None:
            by_item.setdefault(judgement.item, []).append(judgement)
    for several in by_item.values():
        for a, b in combinations(several, 2):
            a, b = (b, a) if b.rater == rater else (a, b)
            if rater in (None, a.rater) and a.verdict and b.verdict:
                yield (a.verdict, b.verdict), b


def _repeats(judgements: Iterable[Annotation]) -> Iterator[Two]:
    first = {(j.item, j.rater): j.verdict for j in judgements if j.kind == "ask"}
    for judgement in judgements:
        before = first.get((judgement.item, judgement.rater))
        if judgement.kind == "repeat" and before and judgement.verdict:
            yield before, judgement.verdict


def _count(mode: Mode, twos: Iterable[Two], near: bool = False) -> ObservedAgreement:
    """`near` counts what is at most one apart as agreed."""
    same: list[tuple[bool, bool]] = [one for a, b in twos for one in ALIKE[mode.name](a, b)]
    close = sum(is_close for _, is_close in same)
    return ObservedAgreement(close if near else sum(is_same for is_same, _ in same), close, len(same))


def _numbers(a: Verdict, b: Verdict) -> list[tuple[bool, bool]]:
    return [(a == b, abs(a[0] - b[0]) <= 1)]


def _labels(a: Verdict, b: Verdict) -> list[tuple[bool, bool]]:
    return [(a == b, a == b)]


def _orders(a: Verdict, b: Verdict) -> list[tuple[bool, bool]]:
    """Of every two answers, whether both verdicts put them in the same order, ties among these."""
    signs = [[(v[i] > v[j]) - (v[i] < v[j]) for i, j in combinations(range(len(v)), 2)] for v in (a, b)]
    return [(x == y, x == y) for x, y in zip(*signs, strict=True)]


ALIKE: dict[str, Callable[[Verdict, Verdict], list[tuple[bool, bool]]]] = {
    "stars": _numbers,
    "labels": _labels,
    "pairs": _orders,
    "ranking": _orders,
}
