"""Which of a round's answers are judged: new ones, as many as there are judgements to spend."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set

from trl_ext.evaluation import Row, pick
from trl_ext.evaluation.comparisons import grouped
from trl_ext.feedback.records import Record, answers_of, key_of
from trl_ext.types import as_text

Known = Mapping[str, Sequence[Set[str]]]  # by prompt, the answers that were judged together


class NothingNew(ValueError):
    """A round in which there is nothing to learn; one sentence."""


def known_of(records: Iterable[Record]) -> Known:
    """What was judged before."""
    known: defaultdict[str, list[Set[str]]] = defaultdict(list)
    for record in records:
        known[key_of(record.prompt)].append(frozenset(map(key_of, answers_of(record))))
    return known


def _is_known(item: Sequence[Row], known: Known) -> bool:
    """Whether these answers to one prompt were judged together."""
    answers = {key_of(row["completion"]) for row in item}
    return any(answers <= judged for judged in known.get(key_of(item[0]["prompt"]), ()))


def chosen(rows: Sequence[Row], mode: str, way: str, items: int, known: Known, seed: int) -> list[Row]:
    """The rows of the items to judge, at most `items` of them.

    - stars, labels: an item is an answer. One that says nothing or is there already is left out.
    - pairs: two unlike answers to a prompt, one pair a prompt.
    - ranking: all unlike answers to a prompt.

    Answers that were judged before, together where they are several, are left out too.

    Args:
        rows: as `trl_ext.evaluation.sample` makes them.
        mode: as on the rating page.
        way: as `trl_ext.evaluation.pick` has it; for rankings any.
        known: from `known_of`.

    Raises:
        NothingNew: there is none.
    """
    unlike: dict[tuple[str, str], Row] = {}
    for row in rows:
        if as_text(row["completion"]).strip():
            unlike.setdefault((key_of(row["prompt"]), key_of(row["completion"])), row)
    if mode in ("stars", "labels"):
        fresh = [row for row in unlike.values() if not _is_known([row], known)]
        picked = pick(fresh, way, items, "answers", seed) if fresh else []
    else:
        groups = grouped((prompt, row) for (prompt, _), row in unlike.items())
        several = [group for group in groups if len(group) > 1]
        ranked = mode == "ranking"
        picked = _rankings(several, items, known, seed) if ranked else _pairs(several, way, items, known, seed)
    if not picked:
        alone = mode in ("stars", "labels")
        why = "every answer was judged before" if alone else "no two answers to a prompt differ that were not judged"
        raise NothingNew(f"there is nothing new to judge: {why}.")
    return picked


def _pairs(groups: Sequence[list[Row]], way: str, items: int, known: Known, seed: int) -> list[Row]:
    """The best new pair of each prompt. Two pairs of one prompt would make four answers of it, and other pairs too."""
    rows = [row for group in groups for row in group]
    best: dict[str, list[Row]] = {}
    for pair in grouped((row["item"], row) for row in (pick(rows, way, len(rows), "pairs", seed) if rows else [])):
        if not _is_known(pair, known):
            best.setdefault(key_of(pair[0]["prompt"]), pair)
    return [row for pair in list(best.values())[:items] for row in pair]


def _rankings(groups: Sequence[list[Row]], items: int, known: Known, seed: int) -> list[Row]:
    new = [group for group in groups if not _is_known(group, known)]
    order = random.Random(seed).sample(range(len(new)), min(items, len(new)))
    return [row for number in order for row in new[number]]
