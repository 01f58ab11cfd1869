"""Callbacks: PPO's own events, and thin wrappers that work in TRL's trainers too."""

from trl_ext.callbacks.kl import AdaptiveKLCallback
from trl_ext.callbacks.rollout import EpochStats, PPOControl, RolloutCallback, RolloutEvents

__all__ = ["AdaptiveKLCallback", "EpochStats", "PPOControl", "RolloutCallback", "RolloutEvents"]
