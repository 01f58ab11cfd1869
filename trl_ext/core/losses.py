"""The losses of an update, each a mean over real tokens.

`num_tokens` lets a micro-batch contribute its share of a larger minibatch: give the whole minibatch's count of real
tokens, and the micro-batches' losses add up to the minibatch's loss, however the rows are cut.
"""

import torch
from torch import Tensor

from trl_ext.core.masking import masked_sum


def token_mean(x: Tensor, mask: Tensor, num_tokens: Tensor | int | None = None) -> Tensor:
    """Sum of `x` over the real tokens, divided by `num_tokens` (None: their number)."""
    count = mask.bool().sum() if num_tokens is None else torch.as_tensor(num_tokens, device=x.device)
    return masked_sum(x, mask) / count.clamp(min=1)


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """p_new / p_old of each token, (batch, tokens); 1 on padding."""
    return log_ratio(logprobs, old_logprobs, mask).exp()


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log p_new - log p_old of each token, (batch, tokens); 0 on padding."""
    return torch.where(mask.bool(), logprobs - old_logprobs, torch.zeros_like(logprobs))


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float = 0.2,
    num_tokens: Tensor | int | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate objective, as a loss to minimise.

        ratio_t = exp(logprobs_t - old_logprobs_t)
        loss_t  = max(-A_t * ratio_t, -A_t * clip(ratio_t, 1 - cliprange, 1 + cliprange))
        loss_t  = min(loss_t, -A_t * dual_clip)   where A_t < 0, with dual_clip
        loss    = mean_t loss_t

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, equation 7. Dual clip: Ye
    et al. 2020, "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning", arXiv:1912.09729,
    equation 5.

    Args:
        logprobs: (batch, tokens), log-probabilities under the policy in training, nats; carries the gradient.
        old_logprobs: (batch, tokens), under the policy that sampled, nats.
        advantages: (batch, tokens).
        mask: (batch, tokens), True marks a real token.
        num_tokens: count to divide by; None: the True entries of `mask`.
        dual_clip: bound on the ratio where the advantage is negative, above 1 (3 in the paper); None: no bound.

    Returns:
        A scalar.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    return token_mean(clipped_policy_terms(ratio, advantages, cliprange, dual_clip), mask, num_tokens)


def clipped_policy_terms(ratio: Tensor, advantages: Tensor, cliprange: float, dual_clip: float | None) -> Tensor:
    """Each token's term of `clipped_policy_loss`, (batch, tokens)."""
    terms = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))
    if dual_clip is None:
        return terms
    return torch.where(advantages < 0, torch.minimum(terms, -advantages * dual_clip), terms)


def kl_penalty_policy_terms(log_ratio: Tensor, advantages: Tensor, penalty: float) -> Tensor:
    """Each token's term of PPO's other objective: no clipping, but a penalty on the KL from the policy that sampled.

        loss_t = -A_t * ratio_t + penalty * KL_t,      KL_t = (ratio_t - 1) - log ratio_t

    KL_t >= 0 is the low-variance estimate of KL(old || new) from tokens that the old policy sampled (k3 of
    `approx_kl`), whose gradient is that of the KL in expectation.

    Source: Schulman et al. 2017, arXiv:1707.06347, equation 8.

    Args:
        log_ratio: (batch, tokens), log p_new - log p_old; carries the gradient.
        advantages: (batch, tokens).
        penalty: beta, what a nat costs.
    """
    ratio = log_ratio.exp()  # 0 for what has become very unlikely, of which there is no logarithm
    return -advantages * ratio + penalty * (ratio - 1 - log_ratio)


def reinforce_terms(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Each token's term of the policy gradient itself: loss_t = -A_t * log pi(a_t | s_t).

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning".

    Args:
        logprobs: (batch, tokens), carries the gradient. advantages: (batch, tokens), returns less a baseline.
    """
    return -advantages * logprobs


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    cliprange_value: float = 0.2,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """Half the squared error of the values, with the step from the old values clipped.

        clipped_t = clip(V_t, V_old_t - cliprange_value, V_old_t + cliprange_value)
        loss      = 1/2 mean_t max((V_t - R_t)^2, (clipped_t - R_t)^2)

    Source: OpenAI baselines ppo2; see Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO",
    arXiv:2403.17031.

    Args:
        values: (batch, tokens), predictions in training; carries the gradient.
        old_values: (batch, tokens), predictions when the rollout was made.
        returns: (batch, tokens), targets.
        mask: (batch, tokens), True marks a real token.
        num_tokens: count to divide by; None: the True entries of `mask`.

    Returns:
        A scalar.
    """
    values, old_values, returns = (
        torch.where(mask.bool(), x, torch.zeros_like(x)) for x in (values, old_values, returns)
    )
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    squared = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * token_mean(squared, mask, num_tokens)


def policy_clipped(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    dual_clip: float | None = None,
) -> Tensor:
    """True, (batch, tokens), where a constant branch of the policy loss is the one that counts: no gradient there."""
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange) > -advantages * ratio
    if dual_clip is not None:
        clipped = clipped | ((advantages < 0) & (ratio > dual_clip))
    return clipped & mask.bool()


def value_clipped(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float) -> Tensor:
    """True, (batch, tokens), where the clipped branch of the value loss is the larger one: no gradient there."""
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return ((clipped - returns) ** 2 > (values - returns) ** 2) & mask.bool()
