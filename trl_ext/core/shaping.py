"""From one score per completion to one reward per token: this is where the KL enters the reward."""

import torch
from torch import Tensor

from trl_ext.core.masking import last_true


def shape_rewards(scores: Tensor, kl: Tensor, kl_coef: float, mask: Tensor) -> Tensor:
    """Reward of each token: the KL penalty everywhere, and the completion's score on its last real token.

        reward_t = -kl_coef * kl_t + score * 1[t = last real token]

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, equation 2.

    Args:
        scores: (batch,), one number per completion, penalties included.
        kl: (batch, tokens), per-token KL to the reference, nats.
        kl_coef: weight of the KL, score units a nat.
        mask: (batch, tokens), True marks a real completion token (its EOS is one).

    Returns:
        (batch, tokens); 0 on padding. A row without any real token gets no reward.
    """
    mask = mask.bool()
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    last = last_true(mask)
    final = torch.where(last >= 0, scores, 0.0).to(rewards.dtype)
    return rewards.scatter_add(1, last.clamp(min=0).unsqueeze(1), final.unsqueeze(1))


def penalize_missing_eos(scores: Tensor, has_eos: Tensor, penalty: float | None) -> Tensor:
    """Subtract `penalty` (a positive number, or None for nothing) from the score of completions that never ended.

    Args:
        scores: (batch,).
        has_eos: (batch,), True where the completion ended with an end-of-sequence token.
    """
    return scores if penalty is None else torch.where(has_eos.bool(), scores, scores - penalty)
