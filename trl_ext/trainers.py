"""The old place of PPO and the reward trainer."""

from trl_ext._moved import moved

__all__ = ["FeedbackRewardConfig", "FeedbackRewardTrainer", "PPOConfig", "PPOTrainer"]  # noqa: F822
__getattr__ = moved(__name__, {name: f"trl_ext.{name}" for name in __all__})
