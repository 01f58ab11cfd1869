"""Losses of reward models on ratings, labels and rankings. (TRL's RewardTrainer has the loss on pairs.)

`scores` (answers,) carries the gradient; the other arguments have one entry an answer too. `groups` (answers,) int64
numbers the group of each answer: only answers of one group are compared.
"""

import torch
from torch import Tensor


def regression_loss(scores: Tensor, ratings: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean squared error: mean_i w_i (s_i - r_i)^2.

    Weights have mean 1 over the training set, not over a batch: a batch of light answers weighs little.

    Source: Stiennon et al. 2020 and others fit ratings so; least squares.
    """
    return (weights * (scores - ratings) ** 2).mean()


def binary_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy of good (1) and bad (0): -mean_i w_i log p(label_i), p(good) = sigmoid(s); weights as of
    `regression_loss`."""
    losses = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype), reduction="none")
    return (weights * losses).mean()


def plackett_luce_loss(scores: Tensor, ranks: Tensor, groups: Tensor) -> Tensor:
    """Negative log-likelihood of rankings, a mean over answers that something could still be chosen against.

        -log p = -sum_i [ s_i - log sum_{j : rank_j >= rank_i} exp(s_j) ]

    The best answer is chosen from all, the second from the rest, and so on; tied answers are each chosen from the same
    set (Breslow's approximation). Source: Plackett 1975, "The Analysis of Permutations"; Luce 1959.

    Args:
        ranks: 1 the best; equal ranks are ties.
    """
    remaining = (groups.unsqueeze(0) == groups.unsqueeze(1)) & (ranks.unsqueeze(0) >= ranks.unsqueeze(1))
    among = scores.unsqueeze(0).expand_as(remaining).masked_fill(~remaining, -torch.inf)
    terms = among.logsumexp(dim=1) - scores
    chosen = remaining.sum(dim=1) > 1
    return (terms * chosen).sum() / chosen.sum().clamp(min=1)


def all_pairs_loss(scores: Tensor, ranks: Tensor, groups: Tensor) -> Tensor:
    """Mean over all pairs of a ranking, each ranking counting alike.

        loss = -1/|rankings| sum over rankings of 1/|pairs| sum_{i better than j} log sigmoid(s_i - s_j)

    Source: Ouyang et al. 2022, arXiv:2203.02155, equation 1.

    Args:
        ranks: 1 the best; tied answers make no pair.
    """
    better = (groups.unsqueeze(0) == groups.unsqueeze(1)) & (ranks.unsqueeze(1) < ranks.unsqueeze(0))
    terms = -torch.nn.functional.logsigmoid(scores.unsqueeze(1) - scores.unsqueeze(0)) * better
    numbers, index = groups.unique(return_inverse=True)
    zeros = torch.zeros(len(numbers), dtype=scores.dtype, device=scores.device)
    sums = zeros.index_add(0, index, terms.sum(dim=1))
    counts = zeros.index_add(0, index, better.sum(dim=1).to(scores.dtype))
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)
