"""What separates the causes of a training problem: variance components, shares, cosines, signal and noise of gradients,
the reach of credit, rounding. Statistics of few rows, each beside its equation and its source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trl_ext.core.masking import masked_mean


def correlation(x: Tensor, y: Tensor, least: int = 3, undefined: float = math.nan) -> float:
    """Pearson's correlation over the rows that both have.

    Args:
        x, y: (rows,), NaN where there is none.
        least: rows that there must be.
        undefined: returned where fewer rows have both, or one side is constant.
    """
    both = torch.stack([x.double(), y.double()])
    both = both[:, ~both.isnan().any(dim=0)]
    if both.shape[1] < least or bool((both.std(dim=1) == 0).any()):
        return undefined
    return float(torch.corrcoef(both)[0, 1])


def alike(values: Tensor) -> float:
    """The share of the most common value, to six digits; 0 where there is none.

    Args:
        values: (rows,), NaN where there is none.
    """
    counts = Counter(f"{value:.6g}" for value in values[~values.isnan()].tolist())
    return max(counts.values(), default=0) / max(counts.total(), 1)


def missed_share(verdicts: Tensor, scores: Tensor, least: int = 3) -> float:
    """Of the completions that a judge likes best, the share that score no more than the others do on average.

        best = {i: v_i >= Q_{3/4}(v)},   missed = mean_{i in best} [s_i <= mean_{j not in best} s_j]

    None of the best has the lowest verdict. Of a score that fewer earn than that, as many are the best as earn it. A
    correlation hardly sees scores that are wrong for a few prompts alone. Of two normal variables with a correlation of
    0.9 this is below 0.01, of 0.75 about 0.04, of independent ones 1/2.

    Args:
        verdicts, scores: (rows,), NaN where there is none.
        least: rows that there must be on either side.
    """
    both = ~(verdicts.isnan() | scores.isnan())
    verdicts, scores = verdicts[both].double(), scores[both].double()
    if not len(verdicts):
        return math.nan
    best = (verdicts >= verdicts.quantile(0.75)) & (verdicts > verdicts.min())
    if not least <= int(best.sum()) <= len(verdicts) - least:
        return math.nan
    earned = max(int((scores > scores[~best].mean()).sum()), least)
    if earned < int(best.sum()):
        best &= verdicts >= verdicts.topk(earned).values[-1]
    return float((scores[best] <= scores[~best].mean()).double().mean())


def variance_components(scores: Tensor, groups: Tensor) -> tuple[float, float, int]:
    """Variance of scores within prompts and between prompts: one-way analysis of variance with random effects.

        within = SS_within / (N - G),   between = max(0, (SS_between / (G - 1) - within) / n0)
        n0 = (N - sum_g n_g^2 / N) / (G - 1)

    Source: Searle, Casella and McCulloch 1992, "Variance Components", chapter 3 (groups of unequal size).

    Args:
        scores: (rows,).
        groups: (rows,) int64, the same number for completions of the same prompt.

    Returns:
        within, between, and the degrees of freedom N - G that `within` rests on; 0, 0, 0 where no prompt has two rows
        or all rows have one prompt.
    """
    values, (_, index, counts) = scores.double(), torch.unique(groups, return_inverse=True, return_counts=True)
    n, g = len(values), len(counts)
    if n == g or g < 2:
        return 0.0, 0.0, 0
    sizes = counts.double()
    means = torch.zeros(g, dtype=torch.float64).index_add(0, index, values) / sizes
    within = float((values - means[index]).pow(2).sum()) / (n - g)
    around = float((sizes * (means - values.mean()).pow(2)).sum()) / (g - 1)
    n0 = (n - float(sizes.pow(2).sum()) / n) / (g - 1)
    return within, max(0.0, (around - within) / n0), n - g


def noise_share(first: Tensor, again: Tensor, variance: float) -> float:
    """Share of a score's variance that is not there again when the same completions are scored a second time.

        noise = mean_i (a_i - b_i)^2 / 2,   share = noise / variance

    Source: Shrout and Fleiss 1979, "Intraclass Correlations", one less the reliability of two ratings.

    Args:
        first, again: (rows,); rows with NaN in either do not count.
        variance: of the scores over all completions, the noise included.

    Returns:
        0 for scores that repeat, about 1 for pure noise; NaN where nothing can be told.
    """
    both = ~(first.isnan() | again.isnan())
    if not bool(both.any()):
        return math.nan
    noise = float((first[both].double() - again[both].double()).pow(2).mean()) / 2
    if noise == 0.0:
        return 0.0
    return noise / variance if variance > 0 else math.nan


def shares_of_variance(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """How much of the variance of a sum each of its parts makes; the shares add up to 1.

        share_j = Cov(x_j, sum_k x_k) / Var(sum_k x_k)

    Source: Shorrocks 1982, "Inequality Decomposition by Factor Components", Econometrica 50. A part that
    works against the others has a share below 0.

    Args:
        parts: (rows,) by name.

    Returns:
        All 0 where the sum is constant.
    """
    centred = {name: part.double() - part.double().mean() for name, part in parts.items()}
    total = torch.stack(list(centred.values())).sum(dim=0)
    variance = float(total.pow(2).mean())
    return {name: float((part * total).mean()) / variance if variance > 0 else 0.0 for name, part in centred.items()}


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Cosine of the angle between two gradients, each given parameter by parameter; 0 where one of them is 0.

    Source: Yu et al. 2020, "Gradient Surgery for Multi-Task Learning", arXiv:2001.06782, definition 1: below 0 they
    conflict.
    """
    product = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    size = norm(a) * norm(b)
    return product / size if size > 0 else 0.0


def norm(gradient: Sequence[Tensor]) -> float:
    """Euclidean norm of a gradient that is given parameter by parameter."""
    return math.sqrt(sum(float(part.double().pow(2).sum()) for part in gradient))


def signal_and_noise(total: Tensor, squares: float, count: int) -> tuple[float, float]:
    """What is common to several gradients, and what is not: unbiased estimates of |E g|^2 and of E |g - E g|^2.

        noise = (sum_i |g_i|^2 - |sum_i g_i|^2 / n) / (n - 1),   signal = |mean_i g_i|^2 - noise / n

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162, appendix A.1. Their
    simple noise scale is the number of completions of one gradient times noise / signal.

    Args:
        total: sum of the gradients, (parameters,).
        squares: sum of their squared norms.
        count: how many, at least 2.

    Returns:
        signal (below 0 by chance where there is hardly any) and noise.
    """
    together = float(total.double().pow(2).sum())
    noise = (squares - together / count) / (count - 1)
    return together / count**2 - noise / count, noise


def credit_reach(mask: Tensor, decay: float) -> tuple[float, float]:
    """How much of a score that comes with the last token reaches the tokens before it, while values say nothing.

        weight_t = decay^(T - 1 - t),   decay = gamma * lambda

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
    arXiv:1506.02438, equation 16, with one reward and values of 0.

    Args:
        mask: (rows, tokens), True marks a real token; right-padded.
        decay: from 0 to 1.

    Returns:
        The weight at a completion's first token, a mean over rows, and that of a token, a mean over tokens.
    """
    lengths = mask.sum(dim=1)
    left = (lengths.unsqueeze(1) - 1 - torch.arange(mask.shape[1], device=mask.device)).clamp(min=0)
    weights = torch.as_tensor(decay, dtype=torch.float64).pow(left)
    kept = lengths > 0
    return float(masked_mean(weights[:, 0], kept)), float(masked_mean(weights, mask))


def lost_to_rounding(weights: Tensor, steps: Tensor) -> tuple[float, float]:
    """What is left of small steps where weights have few digits.

        lost = sum (fl(w + u) - w - u)^2,   size = sum u^2

    Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 2.2: fl rounds to the nearest number
    of the weights' precision, so a step below half a unit in the last place is lost whole.

    Args:
        weights: in the precision that they are kept in.
        steps: what the optimizer means to add, float32 or float64.

    Returns:
        lost and size, to be added up over parameters: lost / size is 0 where nothing is lost and 1 where all is.
    """
    exact, meant = weights.double(), steps.double()
    kept = (exact + meant).to(weights.dtype).double()
    return float((kept - exact - meant).pow(2).sum()), float(meant.pow(2).sum())


def score_gap(first: Tensor, second: Tensor) -> tuple[float, float]:
    """How far apart two sets of scores lie: in standard deviations, and in standard errors.

        gap = (mean_1 - mean_2) / sqrt((s_1^2 + s_2^2) / 2),   z = (mean_1 - mean_2) / sqrt(s_1^2 / n_1 + s_2^2 / n_2)

    Source: Cohen 1988, "Statistical Power Analysis", chapter 2; Welch 1947, Biometrika 34.

    Args:
        first, second: (rows,) each, without NaN.

    Returns:
        gap and z; NaN where a set has fewer than two rows or both are constant.
    """
    if min(len(first), len(second)) < 2:
        return math.nan, math.nan
    a, b = first.double(), second.double()
    variances = float(a.var()), float(b.var())
    if sum(variances) == 0.0:
        return math.nan, math.nan
    difference = float(a.mean() - b.mean())
    error = math.sqrt(variances[0] / len(a) + variances[1] / len(b))
    return difference / math.sqrt(sum(variances) / 2), difference / error
