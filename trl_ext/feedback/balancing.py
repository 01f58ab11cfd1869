"""Balance for feedback that leans one way."""

from __future__ import annotations

import random

from datasets import Dataset

from trl_ext.feedback.files import FeedbackError
from trl_ext.types import as_text


def balance_lengths(pairs: Dataset, seed: int = 0) -> Dataset:
    """Repeat pairs until the longer answer is chosen as often as the shorter one. Every pair stays; pairs of the rarer
    kind, drawn at random, occur several times.

    Args:
        pairs: with the columns chosen and rejected, texts or messages.

    Raises:
        FeedbackError: all pairs lean one way, so none can balance the others.
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
    """Weigh rows so that good and bad labels have the same weight in all. Otherwise every score depends on how rare bad
    labels are.

    Args:
        rows: with the columns label and, where there is one, weight, as made by `to_unpaired`.

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
