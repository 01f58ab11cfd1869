"""Advantage estimation over the tokens of a completion: with a critic (GAE), or with a baseline of the batch's own."""

import torch
from torch import Tensor

from trl_ext.core.masking import masked_sum


def estimate_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    lam_value: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

        delta_t = r_t + gamma * V_{t+1} - V_t          (V = 0 after the last real token: the episode is over)
        A_t     = delta_t + gamma * lam * A_{t+1}
        R_t     = A_t + V_t                            (the value loss's target)

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv:1506.02438, equations 11 and 16. Decoupled lambdas: Yuan et al. 2025, "What's Behind PPO's Collapse in
    Long-CoT? Value Optimization Holds the Secret" (VC-PPO), arXiv:2503.01491.

    Args:
        rewards: (batch, tokens), KL included.
        values: (batch, tokens); values[:, t] is the prediction before token t is chosen.
        mask: (batch, tokens), True marks a real token. Padding must not lie between real tokens.
        gamma: discount of the next token's reward.
        lam: 0 trusts the values (one-step), 1 trusts the rewards (Monte Carlo).
        lam_value: lambda of the returns, where the value role shall learn from another one; None: `lam`.

    Returns:
        advantages and returns, both (batch, tokens), 0 on padding.
    """
    advantages = _gae(rewards, values, mask, gamma, lam)
    of_value = advantages if lam_value is None or lam_value == lam else _gae(rewards, values, mask, gamma, lam_value)
    return advantages, torch.where(mask.bool(), of_value + values, torch.zeros_like(values))


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    mask = mask.bool()
    zero = torch.zeros_like(rewards)
    rewards, values = torch.where(mask, rewards, zero), torch.where(mask, values, zero)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, zero[:, t])
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each token on, (batch, tokens); 0 on padding.

        G_t = r_t + gamma * G_{t+1}

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".
    """
    return _gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)


def batch_baseline(
    returns: Tensor, scored: Tensor, leave_one_out: bool = False, groups: Tensor | None = None
) -> Tensor:
    """The return of an average completion, to compare each completion with, (batch,).

        mean:           b_i = mean_j R_j
        leave one out:  b_i = mean_{j != i} R_j          (independent of completion i, hence without bias)

    over the completions of the same group; one that is alone in its group is compared with the whole batch.

    Source: Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!"; Ahmadian et al. 2024, "Back to
    Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs", arXiv:2402.14740.

    Args:
        returns: (batch,), one number per completion.
        scored: (batch,) True where it counts.
        groups: (batch,) int64, equal for completions of the same prompt; None: all are one group.
    """
    everyone = torch.ones(len(returns), len(returns), dtype=torch.bool, device=returns.device)
    same = everyone if groups is None else groups.unsqueeze(0) == groups.unsqueeze(1)
    same = torch.where((same & scored).sum(dim=1, keepdim=True) > 1, same, everyone) & scored
    if leave_one_out:
        same = same & ~torch.eye(len(returns), dtype=torch.bool, device=returns.device)
    return masked_sum(returns.expand_as(same), same, dim=1) / same.sum(dim=1).clamp(min=1)


def sequence_returns(rewards: Tensor, mask: Tensor) -> Tensor:
    """What a whole completion is worth, (batch,): its score less the KL it cost.

        R = sum_t r_t = score - kl_coef * sum_t kl_t,       kl_t = log pi(a_t | s_t) - log pi_ref(a_t | s_t)

    Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback",
    arXiv:2203.02155, equation 2 without its pretraining term.

    Args:
        rewards: (batch, tokens), as `shape_rewards` made them. mask: (batch, tokens).
    """
    return masked_sum(rewards, mask, dim=1)
