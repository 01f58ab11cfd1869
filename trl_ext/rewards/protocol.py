"""What a reward function is: the calling convention of TRL's GRPOTrainer and RLOOTrainer, unchanged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from torch import nn

RewardCallable = Callable[..., "list[float | None] | Awaitable[list[float | None]]"]
"""Called with the keyword arguments `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`,
`log_metric` and every further column of the dataset, each list with one entry per completion. Returns one number a
completion, None to abstain. May be `async`."""

RewardFunction = RewardCallable | nn.Module | str
"""A reward callable, a sequence-classification model with one label, or the name or folder of one."""


def name_of(function: Any) -> str:
    """A short name for logs: the function's own, or the last part of a model's path."""
    if isinstance(function, str):
        return function.rstrip("/").split("/")[-1]
    if isinstance(function, nn.Module):
        path = getattr(getattr(function, "config", None), "name_or_path", "")
        return str(path).rstrip("/").split("/")[-1] or type(function).__name__
    function = getattr(function, "func", function)  # functools.partial
    return getattr(function, "__name__", type(function).__name__)
