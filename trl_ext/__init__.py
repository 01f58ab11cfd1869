"""RLHF with PPO on one GPU: an extension of Hugging Face TRL in which four roles share one base model."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

# On CPUs with AVX512-BF16 bitsandbytes asks, when it is imported, for a kernel that reads repacked 4-bit weights. None
# are repacked here: see `roles.switching.keep_differentiable`.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
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

_ROOMS = {
    "callbacks": ("AdaptiveKLCallback", "DiagnosticsCallback", "RolloutCallback"),
    "controllers": ("AdaptiveKLController", "FixedKLController", "PIKLController"),
    "ppo": ("PPOConfig", "PPOTrainer"),
    "reward_models": ("FeedbackRewardConfig", "FeedbackRewardTrainer"),
    "roles": ("SharedBase",),
}


def __getattr__(name: str) -> Any:
    """A public name or a room, imported when it is first asked for: `trl-ext --help` needs none of them."""
    for room, names in _ROOMS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{room}"), name)
    if not name.startswith("_"):
        try:
            return import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
