"""The roles in the shape that TRL 1.12's PPOTrainer asks of its separate models, over the one base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trl_ext.roles.base import Role, SharedBase


class _Trunk(nn.Module):
    """The base model's backbone under one role's adapter."""

    def __init__(self, base: SharedBase, role: Role) -> None:
        super().__init__()
        # Hidden from nn.Module: the base's parameters are the policy's alone, to move, cast and train.
        self.__dict__["_base"], self._role = base, role

    def forward(self, **kwargs: Any) -> Any:
        base: SharedBase = self.__dict__["_base"]
        if self._role == "value" and torch.is_grad_enabled():
            # After its reference's forward TRL has PEFT enable the adapters again, which freezes all but the policy's.
            for parameter in base.trainable_parameters("value"):
                parameter.requires_grad_(True)
        with base.use(self._role):
            return base.causal_lm.base_model(**kwargs)


class _Score(nn.Module):
    """A scalar head that takes hidden states of any precision."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float())


class RoleView(nn.Module):
    """A role as TRL's `get_reward` reads it: a backbone under `base_model_prefix`, and `score`."""

    base_model_prefix = "trunk"

    def __init__(self, base: SharedBase, role: Role, head: nn.Module) -> None:
        super().__init__()
        self.config = base.config
        self.trunk = _Trunk(base, role)
        self.score = _Score(head)


def trl_models(base: SharedBase) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(policy, value_model, reward_model) for `trl.experimental.ppo.PPOTrainer` of TRL 1.12.

    The policy is the PEFT model itself, so that TRL finds the reference by disabling its adapter; pass
    `model_adapter_name="policy", ref_adapter_name="reference"` in TRL's PPOConfig where the base has a frozen reference
    adapter. TRL's `save_model` leaves heads out: `base.save_pretrained(folder)` writes every role.

    Raises:
        ValueError: the base has no reward role.
    """
    if not base.has_role("reward"):
        raise ValueError("This base has no reward role: build it with reward=<folder of a reward adapter>.")
    # TRL turns recomputation off and on around each rollout, without regard to roles.
    base.model.gradient_checkpointing_enable = base.gradient_checkpointing_enable
    return base.model, RoleView(base, "value", base.heads["value"]), RoleView(base, "reward", base.heads["reward"])
