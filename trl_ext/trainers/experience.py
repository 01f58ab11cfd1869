"""From a scored rollout to something to train on, and to the numbers that describe it."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from trl_ext.core import (
    approx_kl,
    batch_baseline,
    estimate_advantages,
    masked_mean,
    masked_sum,
    masked_whiten,
    penalize_missing_eos,
    rewards_to_go,
    sequence_returns,
    shape_rewards,
)
from trl_ext.rewards import correlations
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


def summarize(experience: Experience, args: PPOConfig, names: list[str]) -> dict[str, float]:
    """The rollout's metrics, under TRL's names.

    Each `objective/` number is a mean over completions, over the scored ones where scores enter: `kl` (k1, summed
    over tokens, nats), `entropy` (-log-prob, summed over tokens, nats), `scores`, `non_score_reward`, `rlhf_reward`.

    Args:
        names: the reward functions' names, one a column of `scores.by_function`.
    """
    rollout, pass_, total = experience.rollout, experience.score_pass, experience.scores.total
    mask, scored, lengths = rollout.completion_mask, ~total.isnan(), rollout.lengths.float()
    final = penalize_missing_eos(total.nan_to_num(0.0), rollout.has_eos, args.missing_eos_penalty)
    score = masked_mean(final, scored)
    non_score = -args.kl_coef * masked_sum(experience.kl, mask, dim=1).mean()
    metrics: dict[str, Tensor | float] = {
        "objective/kl": masked_sum(pass_.logprobs - pass_.ref_logprobs, mask, dim=1).mean(),
        "objective/entropy": masked_sum(-pass_.logprobs, mask, dim=1).mean(),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": score + non_score,
        "objective/scores": score,
        "objective/scores_std": final[scored].std(unbiased=False) if bool(scored.any()) else 0.0,
        "objective/kl_coef": args.kl_coef,
        "objective/unscored": (~scored).float().sum(),
        "val/num_eos_tokens": rollout.has_eos.float().sum(),
        "val/explained_variance": explained_variance(pass_.values, experience.returns, experience.loss_mask),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~rollout.has_eos).float().mean(),
    }
    for i, name in enumerate(names):
        column = experience.scores.by_function[:, i]
        given = ~column.isnan()
        metrics[f"rewards/{name}/mean"] = masked_mean(column, given)
        metrics[f"rewards/{name}/std"] = column[given].std(unbiased=False) if bool(given.any()) else 0.0
    found = {f"rewards/correlation/{pair}": r for pair, r in correlations(experience.scores.by_function, names).items()}
    return found | {key: float(value) for key, value in metrics.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the values predict: 1 - Var(R - V) / Var(R); 1 perfect, 0 useless."""
    kept_returns, kept_values = returns[mask], values[mask]
    variance = kept_returns.var(unbiased=False) if kept_returns.numel() else kept_returns.new_zeros(())
    if float(variance) == 0.0:
        return 0.0
    return float(1 - (kept_returns - kept_values).var(unbiased=False) / variance)
