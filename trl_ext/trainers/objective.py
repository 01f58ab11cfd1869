"""The two losses of a micro-batch, and the per-token numbers worth watching."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_ext.core import (
    approx_kl,
    clipped_policy_terms,
    clipped_value_loss,
    kl_penalty_policy_terms,
    policy_clipped,
    probability_ratio,
    reinforce_terms,
    token_mean,
    value_clipped,
)
from trl_ext.trainers.ppo_config import PPOConfig
from trl_ext.types import Experience

Watched = dict[str, Tensor]


def policy_loss(
    batch: Experience, said: dict[str, Tensor], num_tokens: Tensor, args: PPOConfig, penalty: float
) -> tuple[Tensor, Watched]:
    """The policy's share of the minibatch loss, a scalar, and (batch, tokens) tensors by metric name.

        loss = mean_t (objective_t - entropy_coef * H_t)

    Source of the entropy bonus: Schulman et al. 2017, arXiv:1707.06347, equation 9.

    Args:
        batch: the micro-batch.
        said: "logprobs" (with gradient) and "entropy", (batch, tokens).
        num_tokens: real tokens of the whole minibatch, over all processes.
        args: settings; `objective` chooses.
        penalty: beta of the 'kl_penalty' objective.
    """
    new, old, advantages, mask = said["logprobs"], batch.score_pass.logprobs, batch.advantages, batch.loss_mask
    ratio = probability_ratio(new, old, mask)
    clipping = args.objective in ("clip", "sequence")
    if clipping:
        terms = clipped_policy_terms(ratio, advantages, args.cliprange, args.dual_clip)
    elif args.objective == "kl_penalty":
        terms = kl_penalty_policy_terms(ratio, advantages, penalty)
    else:
        terms = reinforce_terms(new, advantages)
    watched = {
        "policy/approxkl_avg": approx_kl(new.detach(), old, "k2"),
        "policy/clipfrac_avg": policy_clipped(new.detach(), old, advantages, mask, args.cliprange, args.dual_clip)
        if clipping
        else torch.zeros_like(old),
        "policy/entropy_avg": said["entropy"].detach(),
        "loss/policy_avg": terms.detach(),
        "val/ratio": ratio.detach(),
    }
    if args.entropy_coef:
        terms = terms - args.entropy_coef * said["entropy"]
    return token_mean(terms, mask, num_tokens), watched


def value_loss(
    batch: Experience, said: dict[str, Tensor], num_tokens: Tensor, args: PPOConfig, penalty: float
) -> tuple[Tensor, Watched]:
    """The value role's share of the minibatch loss, `vf_coef` included, and (batch, tokens) tensors by metric name.
    Arguments as of `policy_loss`."""
    new, old, returns, mask = said["values"], batch.score_pass.values, batch.returns, batch.loss_mask
    loss = clipped_value_loss(new, old, returns, mask, args.cliprange_value, num_tokens)
    detached = new.detach()
    clipped = value_clipped(detached, old, returns, mask, args.cliprange_value)
    bounded = detached.clamp(old - args.cliprange_value, old + args.cliprange_value)
    return args.vf_coef * loss, {
        "loss/value_avg": 0.5 * (detached.where(~clipped, bounded) - returns) ** 2,
        "val/clipfrac_avg": clipped,
    }
