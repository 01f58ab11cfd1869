"""RLHF with PPO on one GPU: an extension of Hugging Face TRL in which four roles share one base model."""

from trl_ext.callbacks import AdaptiveKLCallback, DiagnosticsCallback, RolloutCallback
from trl_ext.controllers import AdaptiveKLController, FixedKLController, PIKLController
from trl_ext.ppo import PPOConfig, PPOTrainer
from trl_ext.reward_models import FeedbackRewardConfig, FeedbackRewardTrainer
from trl_ext.roles import SharedBase

__all__ = [
    "AdaptiveKLCallback",
    "AdaptiveKLController",
    "DiagnosticsCallback",
    "FeedbackRewardConfig",
    "FeedbackRewardTrainer",
    "FixedKLController",
    "PIKLController",
    "PPOConfig",
    "PPOTrainer",
    "RolloutCallback",
    "SharedBase",
]
