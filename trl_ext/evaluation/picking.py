"""Which answers, or pairs of answers, are worth a person's time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean, pstdev

from trl_ext.evaluation.comparisons import grouped
from trl_ext.evaluation.sampling import Row
from trl_ext.feedback.records import key_of

WAYS = ("disagreement", "closeness", "likelihood", "random")
BY_SCORES = WAYS[:2]  # those that ask reward models
KINDS = ("pairs", "answers")  # of items


def check_pick(way: str, of: str, rewards: int, functions: int, items: int | None) -> None:
    """Refuse a choice that cannot be made, before anything is sampled.

    Args:
        rewards, functions: how many of each score.

    Raises:
        ValueError: says what is missing.
    """
    if items is None or items < 1:
        raise ValueError(f"--pick {way} needs to know how many: give --items N.")
    if way == "disagreement" and rewards + functions < 2:
        raise ValueError("--pick disagreement is about what several reward models say: give two or more.")
    if way == "closeness" and of == "answers":
        raise ValueError("--pick closeness is about pairs of answers: leave out --of answers.")
    if way == "closeness" and not rewards + functions:
        raise ValueError("--pick closeness is about scores: give --reward or --function.")


def pick(rows: Sequence[Row], way: str, items: int, of: str = "pairs", seed: int = 0) -> list[Row]:
    """The rows of the items that are worth most, in that order, with the item's number in their column "item".

    An item is an answer, or a pair of unlike answers to one prompt; no answer is in two pairs.

    - disagreement: the items about which the reward models are most at odds: the standard deviation over the models of
      an answer's score, or of a pair's margin, each model's scores brought to mean 0 and standard deviation 1. This is
      query by committee (Seung, Opper and Sompolinsky 1992), as Christiano et al. 2017 (arXiv:1706.03741, section
      2.2.4) choose the pairs that people compare.
    - closeness: the pairs whose scores are closest, of which the model knows least: by Bradley-Terry, the chance that
      one is preferred is nearest 1/2 (uncertainty sampling, Lewis and Gale 1994). The mean of the scores, each brought
      to standard deviation 1.
    - likelihood: the answers that the policy is likeliest to give, or pairs of them (the log-probabilities are summed):
      what is learned about them moves most of what it says. For short answers; of long ones it takes the shortest.
    - random.

    Args:
        rows: as `sample` makes them.
        way: one of `WAYS`.
        items: how many; fewer where there are fewer.
        of: "pairs" or "answers".

    Raises:
        ValueError: no such way or kind of item, or no item: no two answers to one prompt differ, or none has scores.
    """
    if way not in WAYS or of not in KINDS:
        raise ValueError(f"{way!r} of {of!r} cannot be picked: give {', '.join(WAYS)}, of {' or '.join(KINDS)}.")
    scores = _standardised(rows) if rows else []
    rng = random.Random(seed)
    candidates = [(i,) for i in range(len(rows))] if of == "answers" else _pairs(rows)
    candidates = [c for c in candidates if way not in BY_SCORES or all(scores[i] for i in c)]
    rng.shuffle(candidates)  # equals stay in random order

    def worth(item: tuple[int, ...]) -> float:
        if way == "random":
            return 0.0
        if way == "likelihood":
            return float(sum(rows[i]["logprob"] for i in item))
        margins = [x - y for x, y in zip(scores[item[0]], scores[item[-1]], strict=True)]
        if way == "closeness":
            return -abs(fmean(margins))
        return pstdev(scores[item[0]] if len(item) == 1 else margins)

    taken: set[int] = set()
    picked: list[Row] = []
    number = 0
    for item in sorted(candidates, key=worth, reverse=True):
        if number < items and not taken & {*item}:
            taken |= {*item}
            picked += [{**rows[i], "item": number} for i in item]
            number += 1
    if not picked:
        raise ValueError(f"There are no {of} to pick: no two answers to one prompt differ, or none has all its scores.")
    return picked


def _pairs(rows: Sequence[Row]) -> list[tuple[int, ...]]:
    by_prompt = grouped((key_of(row["prompt"]), i) for i, row in enumerate(rows))
    every = (pair for group in by_prompt for pair in combinations(group, 2))
    return [pair for pair in every if rows[pair[0]]["completion"] != rows[pair[1]]["completion"]]


def _standardised(rows: Sequence[Row]) -> list[list[float]]:
    """Each row's scores, one a model, over all rows of mean 0 and standard deviation 1; empty where one is missing."""
    names = list(rows[0].get("scores") or {})
    moments = {}
    for name in names:
        known = [row["scores"][name] for row in rows if row["scores"][name] is not None]
        moments[name] = (fmean(known), pstdev(known) or 1.0) if known else (0.0, 1.0)
    whole = [all(row["scores"][name] is not None for name in names) for row in rows]
    return [
        [(row["scores"][name] - moments[name][0]) / moments[name][1] for name in names] if known else []
        for row, known in zip(rows, whole, strict=True)
    ]
