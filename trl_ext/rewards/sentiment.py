"""Sentiment of a completion as its score."""

from __future__ import annotations

from functools import cache
from typing import Any

from trl_ext.types import as_text


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError("The sentiment reward needs vaderSentiment: pip install 'trl-ext[sentiment]'.") from error
    return SentimentIntensityAnalyzer()


def vader_sentiment(completions: list[Any], **_: Any) -> list[float]:
    """How positive each completion sounds, from -1 to 1.

    The compound score of C.J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text" (ICWSM 2014), by the package vaderSentiment.
    """
    return [_analyzer().polarity_scores(as_text(completion))["compound"] for completion in completions]
