"""PPO on the machinery of `transformers.Trainer`."""

from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.objectives import OBJECTIVES, Clip, KLPenalty, Objective, Reinforce, Sequence
from trl_ext.ppo.trainer import PPOTrainer

__all__ = ["OBJECTIVES", "Clip", "KLPenalty", "Objective", "PPOConfig", "PPOTrainer", "Reinforce", "Sequence"]
