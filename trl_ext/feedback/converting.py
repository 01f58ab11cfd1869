"""From one form of feedback to another, and to the data set types that TRL's trainers take.

Margins and weights say how clear a preference was. `margin` is a difference of mean ratings (above 0), or of ranks as a
share of the list (above 0), or a pair's strength. `agreement` (0 to 1) is the chance that a rater of one answer and a
rater of the other put them in this order, ties counting half.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, combinations, product
from statistics import fmean
from typing import Any

from datasets import Dataset

from trl_ext.feedback.files import FeedbackError
from trl_ext.feedback.reading import Feedback
from trl_ext.feedback.records import Label, Ranking, Rating, Record, answers_of, key_of, without_nan


def to_preference(
    feedback: Feedback, min_gap: float = 0.0, pairs_per_answer: int | None = None, seed: int = 0
) -> Dataset:
    """TRL's preference type: prompt, chosen, rejected, with `margin` and, from ratings, `agreement`.

    Ratings and labels make pairs of answers to the same prompt, rankings of their own answers. Ties make no pair.

    Args:
        feedback: any form.
        min_gap: of ratings, the least difference of the means for a pair.
        pairs_per_answer: of ratings and labels, the largest number of pairs that one answer is in; None: all pairs,
            whose number grows with the square of the answers to one prompt.
        seed: of the choice among the pairs.

    Raises:
        FeedbackError: no pair can be made, or conversations have no prompt.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    if feedback.form == "pairs":
        for pair in feedback.records:
            margin = {} if pair.strength is None else {"margin": pair.strength}
            rows.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} | margin)
    elif feedback.form == "rankings":
        for ranking in feedback.records:
            rows += _pairs_of_ranking(ranking)
    else:
        for records in _by_prompt(feedback.records):
            for first, second in _matched(records, pairs_per_answer, rng):
                rows += _pair_of(first, second, min_gap)
    if not rows:
        raise FeedbackError(
            f"{feedback.source} makes no pair: every prompt has one answer only, or its answers are all tied."
        )
    if not all(row["prompt"] or isinstance(row["chosen"], str) for row in rows):
        raise FeedbackError(f"{feedback.source} has conversations without a prompt: give it as messages to make pairs.")
    if feedback.form == "pairs" and any("margin" in row for row in rows):
        rows = [row | {"margin": row.get("margin", 0.0)} for row in rows]
    return _dataset(rows)


def to_unpaired(feedback: Feedback, threshold: float | None = None) -> Dataset:
    """TRL's unpaired preference type: prompt, completion, label (bool), with a `weight` from 0 to 1.

    Args:
        feedback: any form. In a ranking, ranks better than the mean are good, worse ones bad; the mean is left out.
        threshold: of ratings: a mean above it is good, below it bad; a mean equal to it is left out. None:
            `middle_of_scale`. The weight is the share of an answer's raters on its side.

    Raises:
        FeedbackError: every answer is left out.
    """
    rows = []
    if feedback.form == "ratings":
        limit = middle_of_scale(feedback) if threshold is None else threshold
        for record in feedback.records:
            if record.mean != limit:
                good = record.mean > limit
                ratings = without_nan(record.ratings)
                agreeing = sum((rating > limit) == good and rating != limit for rating in ratings)
                weight = max(agreeing / len(ratings), 1e-3)
                rows.append(_unpaired(record.prompt, record.completion, good, weight))
    elif feedback.form == "labels":
        rows = [_unpaired(record.prompt, record.completion, record.label) for record in feedback.records]
    elif feedback.form == "pairs":
        for pair in feedback.records:
            rows += [_unpaired(pair.prompt, pair.chosen, True), _unpaired(pair.prompt, pair.rejected, False)]
    else:
        for ranking in feedback.records:
            middle = fmean(ranking.ranks)
            rows += [
                _unpaired(ranking.prompt, completion, rank < middle)
                for completion, rank in zip(ranking.completions, ranking.ranks, strict=True)
                if rank != middle
            ]
    if not rows:
        raise FeedbackError(f"{feedback.source} makes no good or bad answer: all of them stand in the middle.")
    return _dataset(rows)


def to_prompts(feedback: Feedback) -> Dataset:
    """TRL's prompt-only type: each prompt once."""
    return _dataset([{"prompt": prompt} for prompt in {key_of(r.prompt): r.prompt for r in feedback.records}.values()])


def to_rows(feedback: Feedback) -> list[dict[str, Any]]:
    """The records as rows in our own columns, which `read` reads again."""
    rows = []
    for record in feedback.records:
        row = {name: value for name, value in vars(record).items() if value is not None}
        if isinstance(record, Rating):
            row["ratings"] = [None if math.isnan(rating) else rating for rating in record.ratings]
        if "strength" in row:
            row["margin"] = row.pop("strength")  # which may be any number
        rows.append(row)
    return rows


def to_ratings(feedback: Feedback) -> Dataset:
    """Our rating type: prompt, completion, `rating` (the mean), and `weight`, the number of ratings over the largest
    such number.

    Raises:
        FeedbackError: not ratings.
    """
    if feedback.form != "ratings":
        raise FeedbackError(f"{feedback.source} has {feedback.form}, which give no answer a number: read ratings.")
    counts = [len(without_nan(record.ratings)) for record in feedback.records]
    return _dataset(
        [
            {"prompt": r.prompt, "completion": r.completion, "rating": r.mean, "weight": count / max(counts)}
            for r, count in zip(feedback.records, counts, strict=True)
        ]
    )


def to_rankings(feedback: Feedback, size: int | None = None, seed: int = 0) -> Dataset:
    """Our ranking type: prompt, completions, ranks (1 the best, ties equal).

    Args:
        feedback: any form. Answers to one prompt are ranked by their mean ratings or labels.
        size: of ratings and labels, the largest number of answers in a ranking, drawn at random; None: all of a prompt.
        seed: of the draw.

    Raises:
        FeedbackError: every prompt has one answer only.
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    if feedback.form == "rankings":
        rows = [_ranked(r.prompt, r.completions, [-float(rank) for rank in r.ranks]) for r in feedback.records]
    elif feedback.form == "pairs":
        rows = [_ranked(pair.prompt, (pair.chosen, pair.rejected), [1.0, 0.0]) for pair in feedback.records]
    else:
        for records in _by_prompt(feedback.records):
            rng.shuffle(records)
            for start in range(0, len(records), size or len(records)):
                part = records[start : start + (size or len(records))]
                if len(part) > 1:
                    rows.append(_ranked(part[0].prompt, [r.completion for r in part], [_worth(r) for r in part]))
    if not rows:
        raise FeedbackError(f"{feedback.source} makes no ranking: every prompt has one answer only.")
    return _dataset(rows)


def split_by_prompt(feedback: Feedback, held_out: float, seed: int = 0) -> tuple[Feedback, Feedback]:
    """The same feedback in two parts that share no prompt. Records without a prompt are told apart by their answers; so
    are all records where there is only one prompt.

    Args:
        held_out: below 1, the share of prompts in the second part; from 1 on, the number of records in it, or more,
            since prompts stay whole. Each part gets at least one prompt.

    Raises:
        FeedbackError: all records are of one prompt and one answer.
    """
    by_answers = len({key_of(record.prompt) for record in feedback.records}) == 1
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for number, record in enumerate(feedback.records):
        answers = "\n".join(sorted(map(key_of, answers_of(record))))
        groups[answers if by_answers or not record.prompt else key_of(record.prompt)].append(number)
    if len(groups) < 2:
        raise FeedbackError(f"{feedback.source} cannot be split: all of it is about one answer to one prompt.")
    sizes = {key: len(numbers) for key, numbers in groups.items()}
    second = {number for key in keys_held_out(sizes, held_out, seed) for number in groups[key]}
    parts: tuple[list[Record], list[Record]] = [], []
    for number, record in enumerate(feedback.records):
        parts[number in second].append(record)
    halves = [replace(feedback, records=part, dropped=[], undecided=0) for part in parts]
    return halves[0], halves[1]


def keys_held_out(sizes: Mapping[str, int], held_out: float, seed: int = 0) -> list[str]:
    """Which of several groups are held out, at least one and not all.

    Args:
        sizes: of each group, by its key.
        held_out: as of `split_by_prompt`, of groups or of their rows.
    """
    keys = sorted(sizes)
    random.Random(seed).shuffle(keys)
    rows = list(accumulate(sizes[key] for key in keys))
    count = round(len(keys) * held_out) if held_out < 1 else bisect_left(rows, held_out) + 1
    return keys[: min(max(count, 1), len(keys) - 1)]


def middle_of_scale(feedback: Feedback) -> float:
    """Between the lowest and the highest number that any rater gave."""
    ratings = without_nan(rating for record in feedback.records for rating in record.ratings)
    return (min(ratings) + max(ratings)) / 2


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows as they are: messages whose keys or contents differ in kind stay so."""
    return Dataset.from_list(rows, on_mixed_types="use_json")


def _by_prompt(records: Sequence[Any]) -> list[list[Any]]:
    groups: defaultdict[str, list[Any]] = defaultdict(list)
    for record in records:
        groups[key_of(record.prompt)].append(record)
    return list(groups.values())


def _matched(records: list[Any], most: int | None, rng: random.Random) -> list[tuple[Any, Any]]:
    """Pairs of records. Each record is in at most `most` of them."""
    if most is None or len(records) - 1 <= most:
        return list(combinations(records, 2))
    # Each ring over shuffled records gives every record two pairs. An odd `most` ends with one pair each.
    matched: dict[tuple[int, int], None] = {}
    order = list(range(len(records)))
    for _ in range(most // 2):
        rng.shuffle(order)
        for a, b in zip(order, [*order[1:], order[0]], strict=True):
            matched[min(a, b), max(a, b)] = None
    if most % 2:
        rng.shuffle(order)
        for a, b in zip(order[::2], order[1::2], strict=False):
            matched[min(a, b), max(a, b)] = None
    return [(records[a], records[b]) for a, b in matched]


def _worth(record: Rating | Label) -> float:
    return record.mean if isinstance(record, Rating) else float(record.label)


def _pair_of(first: Rating | Label, second: Rating | Label, min_gap: float) -> list[dict[str, Any]]:
    gap = _worth(first) - _worth(second)
    if gap == 0 or abs(gap) < min_gap:
        return []
    better, worse = (first, second) if gap > 0 else (second, first)
    row = {"prompt": better.prompt, "chosen": better.completion, "rejected": worse.completion, "margin": abs(gap)}
    if isinstance(better, Rating) and isinstance(worse, Rating):
        row["agreement"] = agreement(better.ratings, worse.ratings)
    return [row]


def agreement(better: Sequence[float], worse: Sequence[float]) -> float:
    """Chance that a rater of the first gave more than a rater of the second, ties counting half (0 to 1)."""
    both = list(product(without_nan(better), without_nan(worse)))
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in both) / len(both)


def _pairs_of_ranking(ranking: Ranking) -> list[dict[str, Any]]:
    rows, span = [], max(ranking.ranks) - min(ranking.ranks)
    answers = sorted(zip(ranking.ranks, ranking.completions, strict=True), key=lambda item: item[0])
    for (better, chosen), (worse, rejected) in combinations(answers, 2):
        if better < worse:
            margin = (worse - better) / span
            rows.append({"prompt": ranking.prompt, "chosen": chosen, "rejected": rejected, "margin": margin})
    return rows


def _unpaired(prompt: Any, completion: Any, label: bool, weight: float = 1.0) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, "weight": weight}


def _ranked(prompt: Any, completions: Sequence[Any], worth: Sequence[float]) -> dict[str, Any]:
    """Ranks 1, 2, ... of what is worth most, second most, ...; equal worth, equal rank."""
    order = sorted(set(worth), reverse=True)
    return {"prompt": prompt, "completions": list(completions), "ranks": [order.index(w) + 1 for w in worth]}
