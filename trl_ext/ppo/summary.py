"""The numbers that describe a rollout: what is logged, and what problems are told from."""

from __future__ import annotations

import torch
from torch import Tensor

from trl_ext.core import importance_ratio, masked_mean, masked_sum, penalize_missing_eos, share_cut
from trl_ext.core.evidence import alike, correlation
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.objectives import sampling_weights
from trl_ext.rewards import correlations
from trl_ext.types import Experience, Rollout, ScorePass, as_text

NGRAM = 3


def summarize(experience: Experience, args: PPOConfig, names: list[str]) -> dict[str, float]:
    """The rollout's metrics, under TRL's names.

    Each `objective/` number is a mean over completions, over the scored ones where scores enter: `kl` (k1, summed
    over tokens, nats), `entropy` (-log-prob, summed over tokens, nats), `scores`, `non_score_reward`, `rlhf_reward`;
    `kl_std` and `scores_std` are standard deviations over completions, `scores_median` is the score in the
    middle, `scores_shorth` the width of the narrowest range that holds half of the scores (1.35 standard deviations
    where they are normal); `scores_alike` is the share
    with the most common score; `score_spread`, with several reward roles, is how far these disagree about a completion.

    Args:
        names: the reward functions' names, or those of several reward roles, one a column of `scores.by_function`.
    """
    rollout, pass_, total = experience.rollout, experience.score_pass, experience.scores.total
    mask, scored, lengths = rollout.completion_mask, ~total.isnan(), rollout.lengths.float()
    prompt_lengths = rollout.prompt_mask.sum(dim=1).float()
    final = penalize_missing_eos(total.nan_to_num(0.0), rollout.has_eos, args.missing_eos_penalty)
    score = masked_mean(final, scored)
    kl = masked_sum(pass_.logprobs - pass_.ref_logprobs, mask, dim=1)
    non_score = -args.kl_coef * masked_sum(experience.kl, mask, dim=1).mean()
    metrics: dict[str, Tensor | float] = {
        "objective/kl": kl.mean(),
        "objective/kl_std": kl.std(unbiased=False),
        "objective/entropy": masked_sum(-pass_.logprobs, mask, dim=1).mean(),
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": score + non_score,
        "objective/scores": score,
        "objective/scores_std": final[scored].std(unbiased=False) if bool(scored.any()) else 0.0,
        "objective/scores_median": total[scored].median() if bool(scored.any()) else 0.0,
        "objective/scores_shorth": shorth(total[scored]),
        "objective/scores_alike": alike(total[scored]),
        "objective/kl_coef": args.kl_coef,
        "objective/unscored": (~scored).float().sum(),
        "val/num_eos_tokens": rollout.has_eos.float().sum(),
        "val/explained_variance": explained_variance(pass_.values, experience.returns, experience.loss_mask),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~rollout.has_eos).float().mean(),
        "completions/repetition": repetition(rollout),
        "completions/distinct": distinct(rollout.completions),
        "completions/score_length_correlation": correlation(final[scored], lengths[scored], undefined=0.0),
        "prompts/mean_length": prompt_lengths.mean(),
        "prompts/min_length": prompt_lengths.min(),
        "prompts/max_length": prompt_lengths.max(),
        "prompts/at_max_length": (prompt_lengths == prompt_lengths.max()).float().mean(),
        "prompts/distinct": distinct(rollout.prompts),
        "prompts/empty": sum(not as_text(prompt).strip() for prompt in rollout.prompts) / len(rollout.prompts),
        "prompts/hold_completion": held(rollout),
    }
    for i, name in enumerate(names):
        column = experience.scores.by_function[:, i]
        judged = ~column.isnan()
        metrics[f"rewards/{name}/mean"] = masked_mean(column, judged)
        metrics[f"rewards/{name}/std"] = column[judged].std(unbiased=False) if bool(judged.any()) else 0.0
    if experience.scores.spread is not None:
        metrics["objective/score_spread"] = experience.scores.spread.mean()
    metrics |= sampling_gap(pass_, mask)
    if rollout.sampling_logprobs is not None:
        # The mean of log q - log p over tokens drawn from q estimates KL(q || p): 0 where the generator is the policy.
        metrics["val/sampling_kl"] = masked_mean(rollout.sampling_logprobs - pass_.logprobs, mask)
        # A sampler that rounds otherwise is off in both directions, which no mean shows.
        off = (rollout.sampling_logprobs - pass_.logprobs)[mask]
        metrics["val/sampling_spread"] = off.std(unbiased=False) if off.numel() else 0.0
        metrics |= weighted_gap(pass_, rollout.sampling_logprobs, mask)
    metrics |= correction(experience, args)
    for pair, r in correlations(experience.scores.by_function, names).items():
        metrics[f"rewards/correlation/{pair}"] = r
    return {key: float(value) for key, value in metrics.items()}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Share of the returns' variance that the values predict: 1 - Var(R - V) / Var(R); 1 perfect, 0 useless."""
    kept_returns, kept_values = returns[mask], values[mask]
    variance = kept_returns.var(unbiased=False) if kept_returns.numel() else kept_returns.new_zeros(())
    if float(variance) == 0.0:
        return 0.0
    return float(1 - (kept_returns - kept_values).var(unbiased=False) / variance)


def sampling_gap(pass_: ScorePass, mask: Tensor) -> dict[str, float]:
    """Whether the completions were drawn from the distribution that they are scored under.

    For a token drawn from pi, -log pi(token) has the mean H(pi): summed over a rollout, -log pi - H is a martingale,
    and its sum over the root of its squares' sum is about standard normal. Below 0 the sampling was sharper than the
    scoring (top_k, a lower temperature, a repetition penalty taking tokens away), above 0 it was forced elsewhere.

    A policy that is all but certain hardly ever shows the rare tokens that carry its variance. For a token of
    probability e against one of 1 - e that variance, about e log(e)^2, exceeds the entropy, about e |log e|, so the sum
    of the entropies is the least that is taken for it.

    Returns:
        `val/sampling_gap`, nats per token, and `val/sampling_gap_z`, in standard errors.
    """
    gap, z = _gap(pass_, torch.ones_like(pass_.logprobs), mask)
    return {"val/sampling_gap": gap, "val/sampling_gap_z": z}


def weighted_gap(pass_: ScorePass, told: Tensor, mask: Tensor) -> dict[str, float]:
    """`sampling_gap` of completions that another policy sampled: whether they were drawn as the generator says.

    What has the mean 0 over tokens of pi has it over tokens of mu, too, once it is multiplied by pi(token) / mu(token),
    which is importance sampling (Owen 2013, "Monte Carlo theory, methods and examples", section 9.1):
    another mean says that mu is not what sampled, or never samples some of what pi does.

    Args:
        told: (batch, tokens) log-probs by the generator's word (mu), nats.

    Returns:
        `val/weighted_gap`, nats per token, and `val/weighted_gap_z`, in standard errors.
    """
    ratio = importance_ratio(pass_.logprobs, told, mask, by_sequence=False)
    gap, z = _gap(pass_, ratio, mask)
    return {"val/weighted_gap": gap, "val/weighted_gap_z": z}


def _gap(pass_: ScorePass, weights: Tensor, mask: Tensor) -> tuple[float, float]:
    """Mean over real tokens of the weighted terms of `sampling_gap`, and their sum in standard errors."""
    gap = ((-pass_.logprobs - pass_.entropy) * weights * mask).double()
    spread = float(torch.maximum(gap.pow(2).sum(), (pass_.entropy * mask).sum().double()).sqrt())
    return float(gap.sum() / mask.sum().clamp(min=1)), float(gap.sum()) / spread if spread > 0 else 0.0


def correction(experience: Experience, args: PPOConfig) -> dict[str, float]:
    """Of the importance weights that correct for another sampler, over the tokens that are trained on: mean, least and
    greatest, under TRL's names, and the share of the ratios that their bounds cut. Empty where nothing is corrected."""
    weights, mask, told = sampling_weights(experience, args), experience.loss_mask, experience.rollout.sampling_logprobs
    if weights is None or told is None or not bool(mask.any()):
        return {}
    by_sequence = args.vllm_importance_sampling_mode.startswith("sequence")
    ratio = importance_ratio(experience.score_pass.logprobs, told, mask, by_sequence)
    figures = {"mean": masked_mean(weights, mask), "min": weights[mask].min(), "max": weights[mask].max()}
    return {
        **{f"sampling/importance_sampling_ratio/{name}": float(figure) for name, figure in figures.items()},
        "sampling/weight_cut": float(share_cut(weights, ratio, mask)),
    }


def repetition(rollout: Rollout) -> float:
    """Share of a completion's trigrams of tokens that it has had before, a mean over completions of three tokens and
    more; 0 where there are none."""
    shares = []
    for ids, length in zip(rollout.completion_ids.tolist(), rollout.lengths.tolist(), strict=True):
        grams = [tuple(ids[i : i + NGRAM]) for i in range(length - NGRAM + 1)]
        if grams:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def distinct(items: list[object]) -> float:
    """Different prompts, or completions, over all of them; 1 where none occurs twice."""
    return len({as_text(item) for item in items}) / max(len(items), 1)


def held(rollout: Rollout) -> float:
    """Share of the completions that stand word for word in their prompt, in any of its messages. One without a letter
    or a digit does not count."""
    found = 0
    for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
        said = as_text(completion).strip()
        messages = [prompt] if isinstance(prompt, str) else [[message] for message in prompt]
        found += any(map(str.isalnum, said)) and any(said in as_text(message) for message in messages)
    return found / max(len(rollout.prompts), 1)


def shorth(scores: Tensor) -> float:
    """The width of the narrowest range that holds half of the scores, (rows,); 0 where there is none.

    Source: Rousseeuw and Leroy 1988, "A Robust Scale Estimator Based on the Shortest Half".
    """
    ordered, half = scores.double().sort().values, len(scores) // 2
    return float((ordered[half:] - ordered[: len(scores) - half]).min()) if len(scores) else 0.0
