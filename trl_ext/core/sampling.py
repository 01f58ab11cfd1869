"""What a token counts where another distribution sampled it than the one that is trained: importance weights."""

from typing import Literal

import torch
from torch import Tensor

from trl_ext.core.masking import masked_sum

CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
LARGEST = 80.0  # nats; the exponential of more is no float32


def importance_ratio(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, by_sequence: bool) -> Tensor:
    """How much likelier the trained policy makes what was sampled than the sampler made it.

        by token:     ratio_t = pi(a_t | s_t) / mu(a_t | s_t)
        by sequence:  ratio_t = prod_k pi(a_k | s_k) / mu(a_k | s_k),  the same at each token of a completion

    Args:
        logprobs: (batch, tokens) under the policy before its first step on the rollout (pi), nats.
        sampling_logprobs: (batch, tokens) that each token was really sampled with (mu), nats: after temperature,
            top-p, top-k, min-p and penalties, in the sampler's precision.
        mask: (batch, tokens), True marks a real token.

    Returns:
        (batch, tokens), 1 on padding.
    """
    mask = mask.bool()
    differences = torch.where(mask, logprobs - sampling_logprobs, torch.zeros_like(logprobs))
    if by_sequence:
        differences = torch.where(mask, differences.sum(dim=1, keepdim=True), differences)
    return differences.clamp(-LARGEST, LARGEST).exp()


def importance_weights(
    logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    mode: CorrectionMode,
    clip_max: float | None,
    clip_min: float | None = None,
) -> Tensor:
    """What each token's term of the policy's loss is multiplied by, so that samples of mu train pi.

        truncate:  w_t = min(max(ratio_t, clip_min), clip_max)
        mask:      w_t = ratio_t where clip_min <= ratio_t <= clip_max, else 0

    An importance weight makes the mean over mu's samples the mean over pi's; its bound trades a little bias for a
    bounded variance.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", the section on
    truncated importance sampling (by token); by sequence and masked: Liu et al. 2025, "When Speed Kills Stability:
    Demystifying RL Collapse from the Training-Inference Mismatch". The modes are those of TRL's
    `vllm_importance_sampling_mode`.

    Args:
        logprobs, sampling_logprobs, mask: as of `importance_ratio`.
        clip_max: the largest ratio; None: any.
        clip_min: the least ratio; None: any.

    Returns:
        (batch, tokens), 1 on padding.
    """
    ratio = importance_ratio(logprobs, sampling_logprobs, mask, by_sequence=mode.startswith("sequence"))
    bounded = ratio.clamp(clip_min, clip_max) if (clip_min, clip_max) != (None, None) else ratio
    if mode.endswith("mask"):
        bounded = torch.where(bounded == ratio, ratio, torch.zeros_like(ratio))
    return torch.where(mask.bool(), bounded, torch.ones_like(bounded))


def share_cut(weights: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """Share of the ratios' sum over the real tokens that the weights leave out (or, under `clip_min`, put on), a scalar
    from 0."""
    cut, total = (masked_sum(x.double(), mask) for x in ((ratio - weights).abs(), ratio))
    return cut / total.clamp(min=torch.finfo(torch.float64).tiny)
