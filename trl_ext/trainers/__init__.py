"""PPO on the machinery of `transformers.Trainer`, and reward models from every form of feedback."""

from trl_ext.trainers.ppo_config import PPOConfig
from trl_ext.trainers.ppo_trainer import PPOTrainer
from trl_ext.trainers.reward_trainer import FeedbackRewardConfig, FeedbackRewardTrainer

__all__ = ["FeedbackRewardConfig", "FeedbackRewardTrainer", "PPOConfig", "PPOTrainer"]
