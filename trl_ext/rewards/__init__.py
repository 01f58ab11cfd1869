"""Reward functions as TRL calls them: ready-made ones, and calling and combining several."""

from trl_ext.rewards.combination import Combination, ScoreMoments, correlations, weighted_total
from trl_ext.rewards.models import classifier, fluency, reward_role
from trl_ext.rewards.protocol import RewardCallable, RewardFunction, name_of
from trl_ext.rewards.remote import remote
from trl_ext.rewards.scorer import RewardError, Scorer
from trl_ext.rewards.sentiment import vader_sentiment
from trl_ext.rewards.similarity import chrf
from trl_ext.rewards.texts import (
    forbidden,
    json_schema,
    keywords,
    length_penalty,
    limited,
    matches,
    repetition_penalty,
)

__all__ = [
    "Combination",
    "RewardCallable",
    "RewardError",
    "RewardFunction",
    "ScoreMoments",
    "Scorer",
    "chrf",
    "classifier",
    "correlations",
    "fluency",
    "forbidden",
    "json_schema",
    "keywords",
    "length_penalty",
    "limited",
    "matches",
    "name_of",
    "remote",
    "repetition_penalty",
    "reward_role",
    "vader_sentiment",
    "weighted_total",
]
