"""The old place of PPO and the reward trainer."""

from trl_ext._moved import moved

_NAMES = ("PPOConfig", "PPOTrainer", "FeedbackRewardConfig", "FeedbackRewardTrainer")
__getattr__ = moved(__name__, {name: f"trl_ext.{name}" for name in _NAMES})
