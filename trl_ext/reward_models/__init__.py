"""Reward models from every form of feedback: the objectives that TRL's RewardTrainer lacks."""

from trl_ext.reward_models.trainer import FeedbackRewardConfig, FeedbackRewardTrainer

__all__ = ["FeedbackRewardConfig", "FeedbackRewardTrainer"]
