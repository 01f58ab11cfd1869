"""Likeness to a reference text as a completion's score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl_ext.rewards.texts import Reward
from trl_ext.types import as_text


def chrf(column: str = "reference") -> Reward:
    """chrF of each completion against the text in the dataset's `column`, from 0 to 1; None where that is empty.

    Source: Popović 2015, "chrF: character n-gram F-score for automatic MT evaluation", by the package sacrebleu.

    Raises:
        ImportError: sacrebleu is missing.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError("The chrF reward needs sacrebleu: pip install 'trl-ext[rewards]'.") from error
    metric = CHRF()

    def chrf(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        if column not in columns:
            raise ValueError(f"the dataset has no column {column!r} to compare with")
        return [
            metric.sentence_score(as_text(completion), [as_text(reference)]).score / 100 if reference else None
            for completion, reference in zip(completions, columns[column], strict=True)
        ]

    return chrf
