"""A role in the shape that TRL 1.12's PPOTrainer asks of its separate models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Trunk(nn.Module):
    """A backbone that is a function: the base's parameters are the policy's alone, to move, cast and train."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.__dict__["_function"] = function  # hidden from nn.Module

    def forward(self, **kwargs: Any) -> Any:
        return self.__dict__["_function"](**kwargs)


class _Score(nn.Module):
    """A scalar head that takes hidden states of any precision."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float())


class RoleView(nn.Module):
    """A role as TRL's `get_reward` reads it: a backbone under `base_model_prefix`, and `score`.

    Args:
        config: of the base.
        backbone: the base's backbone under the role's adapter.
        head: of the role.
    """

    base_model_prefix = "trunk"

    def __init__(self, config: Any, backbone: Callable[..., Any], head: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.trunk = _Trunk(backbone)
        self.score = _Score(head)
