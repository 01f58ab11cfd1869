"""Reward functions as TRL calls them."""

from trl_ext.rewards.combination import Combination, ScoreMoments, correlations, weighted_total
from trl_ext.rewards.protocol import RewardCallable, RewardFunction, name_of
from trl_ext.rewards.scorer import RewardError, Scorer

__all__ = [
    "Combination",
    "RewardCallable",
    "RewardError",
    "RewardFunction",
    "ScoreMoments",
    "Scorer",
    "correlations",
    "name_of",
    "weighted_total",
]
