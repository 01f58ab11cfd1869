"""Which of a round's answers are judged: new ones, as many as there are judgements to spend."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence, Set

from trl_ext.evaluation import Row, pick
from trl_ext.evaluation.comparisons import grouped
from trl_ext.feedback.records import Record, answers_of, key_of
from trl_ext.types import as_text

Known = Set[tuple[str, str]]


class NothingNew(ValueError):
    """A round in which there is nothing to learn; one sentence."""


def known_of(records: Iterable[Record]) -> Known:
    """(prompt, answer) of everything that was judged before."""
    return {(key_of(record.prompt), key_of(answer)) for record in records for answer in answers_of(record)}


def chosen(rows: Sequence[Row], mode: str, way: str, items: int, known: Known, seed: int) -> list[Row]:
    """The rows of the items to judge, at most `items` of them.

    - stars, labels: an item is an answer. One that says nothing, was judged before or is there already is left out.
    - pairs: two unlike answers to a prompt, one pair a prompt.
    - ranking: all unlike answers to a prompt.

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
        fresh = [row for key, row in unlike.items() if key not in known]
        picked = pick(fresh, way, items, "answers", seed) if fresh else []
    else:
        groups = grouped((prompt, row) for (prompt, _), row in unlike.items())
        several = [group for group in groups if len(group) > 1]
        ranked = mode == "ranking"
        picked = _rankings(several, items, seed) if ranked else _pairs(several, way, items, seed)
    if not picked:
        why = "every answer was judged before" if mode in ("stars", "labels") else "no two answers to a prompt differ"
        raise NothingNew(f"there is nothing new to judge: {why}.")
    return picked


def _pairs(groups: Sequence[list[Row]], way: str, items: int, seed: int) -> list[Row]:
    """The best pair of each prompt. Two pairs of one prompt would make four answers of it, and other pairs too."""
    rows = [row for group in groups for row in group]
    best: dict[str, list[Row]] = {}
    for row in pick(rows, way, len(rows), "pairs", seed) if rows else []:
        pair = best.setdefault(key_of(row["prompt"]), [row])
        if pair[0] is not row and pair[0]["item"] == row["item"]:
            pair.append(row)
    return [row for pair in list(best.values())[:items] for row in pair]


def _rankings(groups: Sequence[list[Row]], items: int, seed: int) -> list[Row]:
    order = random.Random(seed).sample(range(len(groups)), min(items, len(groups)))
    return [row for number in order for row in groups[number]]
