"""From one form of feedback to another, and to the data set types that TRL's trainers take.

Margins and weights say how clear a preference was: `margin` (above 0) is a difference of mean ratings, or of ranks as a
share of the list, or the strength that was given; `agreement` (0.5 to 1) is the chance that a rater of one answer and a
rater of the other put them in this order, ties counting half.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from datasets import Dataset

from trl_ext.feedback.files import FeedbackError
from trl_ext.feedback.reading import Feedback
from trl_ext.feedback.records import Label, Pair, Ranking, Rating, Record, key_of
from trl_ext.types import as_text


def to_preference(
    feedback: Feedback, min_gap: float = 0.0, pairs_per_answer: int | None = None, seed: int = 0
) -> Dataset:
    """TRL's preference type: prompt, chosen, rejected, with `margin` and, from ratings, `agreement`.

    Ratings and labels make pairs of answers to the same prompt, rankings of their own answers. Ties make none.

    Args:
        feedback: any form.
        min_gap: ratings: least difference of the means for a pair.
        pairs_per_answer: at most so many pairs that an answer is in; None: all, which grows with the square of the
            answers to one prompt.
        seed: of the choice among them.

    Raises:
        FeedbackError: nothing can be preferred to anything.
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
    if feedback.form == "pairs" and any("margin" in row for row in rows):
        rows = [{"margin": 0.0} | row for row in rows]
    return Dataset.from_list(rows)


def balance_lengths(pairs: Dataset, seed: int = 0) -> Dataset:
    """As many pairs whose chosen answer is the longer one as pairs whose chosen answer is the shorter one. Every pair
    stays; of the rarer kind some, drawn at random, occur again and again.

    Args:
        pairs: with the columns chosen and rejected, texts or messages.

    Raises:
        FeedbackError: all pairs lean one way, so there is nothing to balance them with.
    """
    gaps = [len(as_text(row["chosen"])) - len(as_text(row["rejected"])) for row in pairs]
    longer, shorter = ([i for i, gap in enumerate(gaps) if sign * gap > 0] for sign in (1, -1))
    if bool(longer) != bool(shorter):
        which = "longer" if longer else "shorter"
        raise FeedbackError(f"In every pair the {which} answer was chosen: collect pairs in which it was not.")
    rarer, commoner = sorted((longer, shorter), key=len)
    rounds, rest = divmod(len(commoner) - len(rarer), max(len(rarer), 1))
    again = [*rarer * rounds, *random.Random(seed).sample(rarer, rest)]
    return pairs.select(sorted([*range(len(gaps)), *again]))


def balance_labels(rows: Dataset) -> Dataset:
    """Rows whose good and bad labels weigh the same in all, whatever their number, so that an answer as likely good as
    bad is not scored by how rare bad labels are.

    Args:
        rows: with the columns label and, where there is one, weight, as `to_unpaired` makes them.

    Raises:
        FeedbackError: all labels are the same.
    """
    weights = [float(weight) for weight in rows["weight"]] if "weight" in rows.column_names else [1.0] * len(rows)
    sums = {True: 0.0, False: 0.0}
    for weight, label in zip(weights, rows["label"], strict=True):
        sums[bool(label)] += weight
    if not all(sums.values()):
        raise FeedbackError(f"Every label is {'good' if sums[True] else 'bad'}: collect some of the other kind.")
    # The rarer label keeps its weights, so that none exceeds 1.
    rarer = min(sums.values())
    balanced = [w * rarer / sums[bool(label)] for w, label in zip(weights, rows["label"], strict=True)]
    columns = [name for name in rows.column_names if name != "weight"]
    return rows.select_columns(columns).add_column("weight", balanced)


def to_unpaired(feedback: Feedback, threshold: float | None = None) -> Dataset:
    """TRL's unpaired preference type: prompt, completion, label (bool), with a `weight` from 0 to 1.

    Args:
        feedback: any form but rankings' middle ranks: of a ranking, the better half is good.
        threshold: ratings: above it is good, below it bad, on it neither; None: `middle_of_scale`. The weight is the
            share of an answer's raters on its side.
    """
    rows = []
    if feedback.form == "ratings":
        limit = middle_of_scale(feedback) if threshold is None else threshold
        for record in feedback.records:
            if record.mean != limit:
                good = record.mean > limit
                given = [rating for rating in record.ratings if rating == rating]
                agreeing = sum((rating > limit) == good and rating != limit for rating in given)
                weight = max(agreeing / len(given), 1e-3)
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
    return Dataset.from_list(rows)


def to_prompts(feedback: Feedback) -> Dataset:
    """TRL's prompt-only type: each prompt once."""
    return Dataset.from_list(
        [{"prompt": prompt} for prompt in {key_of(r.prompt): r.prompt for r in feedback.records}.values()]
    )


def to_ratings(feedback: Feedback) -> Dataset:
    """Our rating type: prompt, completion, `rating` (the mean), and `weight`, the number of ratings over the largest
    such number.

    Raises:
        FeedbackError: not ratings.
    """
    if feedback.form != "ratings":
        raise FeedbackError(f"{feedback.source} has {feedback.form}, which give no answer a number: read ratings.")
    counts = [sum(rating == rating for rating in record.ratings) for record in feedback.records]
    return Dataset.from_list(
        [
            {"prompt": r.prompt, "completion": r.completion, "rating": r.mean, "weight": count / max(counts)}
            for r, count in zip(feedback.records, counts, strict=True)
        ]
    )


def to_rankings(feedback: Feedback, size: int | None = None, seed: int = 0) -> Dataset:
    """Our ranking type: prompt, completions, ranks (1 the best, ties equal).

    Args:
        feedback: rankings, ratings (answers to one prompt in the order of their means), pairs or labels.
        size: ratings and labels: most answers a ranking, drawn at random; None: all of a prompt.
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
    return Dataset.from_list(rows)


def split_by_prompt(feedback: Feedback, held_out: float, seed: int = 0) -> tuple[Feedback, Feedback]:
    """The same feedback in two parts without a prompt in common. Records without one, or all with the same one, are
    told apart by what was answered.

    Args:
        held_out: share of the prompts in the second part, between 0 and 1; at least one prompt is in either.

    Raises:
        FeedbackError: all records are of one prompt and one answer.
    """
    alone = len({key_of(record.prompt) for record in feedback.records}) == 1

    def key(record: Record) -> str:
        return _answers_of(record) if alone or not record.prompt else key_of(record.prompt)

    keys = sorted({key(record) for record in feedback.records})
    if len(keys) < 2:
        raise FeedbackError(f"{feedback.source} cannot be split: all of it is about one answer to one prompt.")
    random.Random(seed).shuffle(keys)
    second = set(keys[: min(max(round(len(keys) * held_out), 1), len(keys) - 1)])
    parts = ([r for r in feedback.records if key(r) not in second], [r for r in feedback.records if key(r) in second])
    return tuple(Feedback(feedback.form, part, feedback.source) for part in parts)  # type: ignore[return-value]


def _answers_of(record: Record) -> str:
    if isinstance(record, Pair | Ranking):
        answers = (record.chosen, record.rejected) if isinstance(record, Pair) else record.completions
        return "\n".join(sorted(map(key_of, answers)))
    return key_of(record.completion)


def middle_of_scale(feedback: Feedback) -> float:
    """Between the lowest and the highest number that any rater gave."""
    every = [rating for record in feedback.records for rating in record.ratings if rating == rating]
    return (min(every) + max(every)) / 2


def _by_prompt(records: Sequence[Any]) -> list[list[Any]]:
    groups: defaultdict[str, list[Any]] = defaultdict(list)
    for record in records:
        groups[key_of(record.prompt)].append(record)
    return list(groups.values())


def _matched(records: list[Any], most: int | None, rng: random.Random) -> list[tuple[Any, Any]]:
    """Pairs of records, each in at most `most` of them."""
    if most is None or len(records) - 1 <= most:
        return list(combinations(records, 2))
    # Rings over shuffled records: every ring gives each record two pairs, or one where `most` is odd at the end.
    found: dict[tuple[int, int], None] = {}
    order = list(range(len(records)))
    for _ in range(most // 2):
        rng.shuffle(order)
        for a, b in zip(order, [*order[1:], order[0]], strict=True):
            found[min(a, b), max(a, b)] = None
    if most % 2:
        rng.shuffle(order)
        for a, b in zip(order[::2], order[1::2], strict=False):
            found[min(a, b), max(a, b)] = None
    return [(records[a], records[b]) for a, b in found]


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
    both = [(a, b) for a in better for b in worse if a == a and b == b]
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
