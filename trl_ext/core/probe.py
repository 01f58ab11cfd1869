"""A linear probe: the score head alone, fitted to pairs over features that stay as they are.

The problem is convex and small, so it is solved to the end (L-BFGS in float64), not descended in a few noisy epochs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Weights of the penalty to choose from, largest first: each fit starts where the one before ended.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
FOLDS = 3
PATIENCE = 2  # penalties in a row that may do worse than the best before


def fit_probe(differences: Tensor, margins: Tensor, penalty: float, start: Tensor | None = None) -> Tensor:
    """Weights w of the score s(x) = w.x that minimise

        mean_i -log sigmoid(w.d_i - margin_i) + penalty * sum_k (sigma_k w_k)^2

    Source: Bradley and Terry 1952, as a logistic regression on differences. The penalty is measured in the features'
    own scale, sigma_k = sqrt(mean_i d_ik^2).

    Args:
        differences: (pairs, features) features of the chosen answer minus those of the rejected one.
        margins: (pairs,) how much better the chosen one is at least; 0 where unknown.
        penalty: 0 or above.
        start: (features,) where to start; None: at 0.

    Returns:
        (features,) float64.
    """
    differences, margins = differences.double(), margins.double()
    scale = differences.pow(2).mean(dim=0).sqrt().clamp(min=1e-12)
    scaled = differences / scale
    first = torch.zeros_like(scale) if start is None else start.double() * scale
    weights = first.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = _loss(scaled @ weights, margins) + penalty * weights.pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weights.detach() / scale


def choose_penalty(features: Tensor, pairs: Tensor, margins: Tensor, penalties: Sequence[float] = PENALTIES) -> float:
    """The penalty whose probes do best on held-out answers, in three folds of the answers.

    A pair is validated on in a fold that has both its answers, and trained on in those that have neither. Where no pair
    lies within a fold, the middle one of `penalties` is taken.

    Args:
        features: (answers, features).
        pairs: (pairs, 2) int64, which answer is better and which worse.
        margins: (pairs,).
    """
    folds = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(pairs.device) % FOLDS
    better, worse = pairs.unbind(dim=1)
    differences = features[better] - features[worse]
    parts = []
    for fold in range(FOLDS):
        inside = (folds[better] == fold) & (folds[worse] == fold)
        outside = (folds[better] != fold) & (folds[worse] != fold)
        if inside.any() and outside.any():
            parts.append((inside, outside))
    if not parts:
        return float(penalties[len(penalties) // 2])
    weights: list[Tensor | None] = [None] * len(parts)
    losses: list[float] = []
    for penalty in penalties:
        total = 0.0
        for i, (inside, outside) in enumerate(parts):
            fitted = fit_probe(differences[outside], margins[outside], penalty, weights[i])
            weights[i] = fitted
            total += float(_loss(differences[inside].double() @ fitted, margins[inside].double()))
        losses.append(total)
        if len(losses) - 1 - losses.index(min(losses)) == PATIENCE:
            break  # smaller ones fit noise, and take ever longer
    return float(penalties[losses.index(min(losses))])


def _loss(gaps: Tensor, margins: Tensor) -> Tensor:
    return -torch.nn.functional.logsigmoid(gaps - margins).mean()
