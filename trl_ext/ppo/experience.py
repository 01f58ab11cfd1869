"""From a scored rollout to something to train on."""

from __future__ import annotations

from dataclasses import fields

from trl_ext.core import approx_kl, masked_whiten, penalize_missing_eos, shape_rewards
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.objectives import CheckedObjective
from trl_ext.types import Experience, ScoredRollout, ShapedRollout


def make_experience(scored: ScoredRollout, args: PPOConfig) -> Experience:
    """Rewards, advantages and returns of a scored rollout."""
    return estimate(shape(scored, args), args)


def shape(scored: ScoredRollout, args: PPOConfig) -> ShapedRollout:
    """One reward per token. Rows without a score are left out of the losses and of every whitening."""
    rollout, scores, pass_ = scored.rollout, scored.scores, scored.score_pass
    mask = rollout.completion_mask
    loss_mask = mask & ~scores.total.isnan().unsqueeze(1)
    kl = approx_kl(pass_.logprobs, pass_.ref_logprobs, args.kl_estimator) * mask
    final = penalize_missing_eos(scores.total.nan_to_num(0.0), rollout.has_eos, args.missing_eos_penalty)
    rewards = shape_rewards(final, kl, args.kl_coef, mask)
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, loss_mask, shift_mean=False)
    return ShapedRollout(rollout, scores, pass_, kl, rewards, loss_mask)


def estimate(shaped: ShapedRollout, args: PPOConfig) -> Experience:
    """One advantage and one return per token, as the objective has them."""
    advantages, returns = CheckedObjective(args.policy_objective).advantages(shaped, args)
    return Experience(
        **{f.name: getattr(shaped, f.name) for f in fields(shaped)}, advantages=advantages, returns=returns
    )
