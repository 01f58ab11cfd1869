"""From a scored rollout to something to train on."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from trl_ext.core import (
    approx_kl,
    batch_baseline,
    estimate_advantages,
    masked_whiten,
    penalize_missing_eos,
    rewards_to_go,
    sequence_returns,
    shape_rewards,
)
from trl_ext.trainers.ppo_config import PPOConfig
from trl_ext.types import Experience, Judged, Shaped


def make_experience(judged: Judged, args: PPOConfig) -> Experience:
    """Rewards, advantages and returns of what was judged."""
    return estimate(shape(judged, args), args)


def shape(judged: Judged, args: PPOConfig) -> Shaped:
    """One reward a token. Rows without a score are left out of the losses and of every whitening."""
    rollout, scores, pass_ = judged.rollout, judged.scores, judged.score_pass
    mask = rollout.completion_mask
    loss_mask = mask & ~scores.total.isnan().unsqueeze(1)
    kl = approx_kl(pass_.logprobs, pass_.ref_logprobs, args.kl_estimator) * mask  # type: ignore[arg-type]
    final = penalize_missing_eos(scores.total.nan_to_num(0.0), rollout.has_eos, args.missing_eos_penalty)
    rewards = shape_rewards(final, kl, args.kl_coef, mask)
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, loss_mask, shift_mean=False)
    return Shaped(rollout, scores, pass_, kl, rewards, loss_mask)


def estimate(shaped: Shaped, args: PPOConfig) -> Experience:
    """One advantage and one return a token, as `args.objective` has them."""
    rewards, values, mask = shaped.rewards, shaped.score_pass.values, shaped.loss_mask
    if not args.uses_value:
        advantages = returns = _without_critic(shaped, args)
    else:
        if args.objective == "reinforce":
            returns = rewards_to_go(rewards, mask, args.gamma)
            advantages = (returns - values) * mask
        else:
            advantages, returns = estimate_advantages(rewards, values, mask, args.gamma, args.lam, args.lam_value)
        if args.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
    kept = {f.name: getattr(shaped, f.name) for f in fields(shaped)}
    return Experience(**kept, advantages=advantages, returns=returns)


def _without_critic(shaped: Shaped, args: PPOConfig) -> Tensor:
    """A completion's return less its baseline, at each of its tokens, (batch, tokens)."""
    mask = shaped.loss_mask
    scored = mask.any(dim=1)
    worth = sequence_returns(shaped.rewards, mask)
    leave_one_out = args.objective == "reinforce" and args.baseline == "leave_one_out"
    groups = _same_prompt(shaped) if args.num_generations > 1 else None
    advantages = worth - batch_baseline(worth, scored, leave_one_out, groups)
    if args.whiten_advantages:
        advantages = masked_whiten(advantages, scored)
    return advantages.unsqueeze(1) * mask


def _same_prompt(shaped: Shaped) -> Tensor:
    """A number a row, (batch,), the same for answers to the same prompt."""
    numbers: dict[tuple[int, ...], int] = {}
    rollout = shaped.rollout
    keys = [tuple(ids[mask].tolist()) for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
