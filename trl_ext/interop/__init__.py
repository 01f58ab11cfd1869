"""What TRL 1.12's own PPOTrainer takes. (`SharedBase.as_trl_models` gives the roles in its shape.)"""

from trl_ext.interop.reward_module import RewardModule

__all__ = ["RewardModule"]
