"""RLHF with PPO on one GPU: an extension of Hugging Face TRL in which four roles share one base model."""

from trl_ext.callbacks import AdaptiveKLCallback, DiagnosticsCallback, RolloutCallback
from trl_ext.controllers import AdaptiveKLController, FixedKLController, PIKLController
from trl_ext.roles import SharedBase
from trl_ext.trainers import FeedbackRewardConfig, FeedbackRewardTrainer, PPOConfig, PPOTrainer

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
