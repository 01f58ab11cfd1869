"""Callbacks: PPO's own events, and thin wrappers that work in TRL's trainers too."""

from trl_ext.callbacks.adaptive_kl import AdaptiveKLCallback
from trl_ext.callbacks.diagnostics import DiagnosticsCallback
from trl_ext.callbacks.rollout import (
    CallbackError,
    EpochStats,
    PPOControl,
    RolloutCallback,
    RolloutEvents,
    check_events,
)

__all__ = [
    "AdaptiveKLCallback",
    "CallbackError",
    "DiagnosticsCallback",
    "EpochStats",
    "PPOControl",
    "RolloutCallback",
    "RolloutEvents",
    "check_events",
]
