"""Where PPO and the reward trainer were before 0.2; goes with 0.3."""

import warnings
from typing import Any

import trl_ext

_MOVED = {"PPOConfig", "PPOTrainer", "FeedbackRewardConfig", "FeedbackRewardTrainer"}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"trl_ext.trainers goes with trl_ext 0.3: take {name} from trl_ext itself.", FutureWarning, stacklevel=2
    )
    return getattr(trl_ext, name)
