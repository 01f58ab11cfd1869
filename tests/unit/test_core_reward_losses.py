"""Losses of reward models, against loops over plain numbers."""

import math
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from trl_ext.core.reward_losses import all_pairs_loss, binary_loss, plackett_luce_loss, regression_loss

SCORES = [0.3, -1.2, 2.0, 0.7, 0.1, -0.4]
RANKS = [1, 2, 3, 2, 1, 2]
GROUPS = [5, 5, 5, 5, 9, 9]


def tensors(scores: list[float] = SCORES) -> tuple[Tensor, Tensor, Tensor]:
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(RANKS), torch.tensor(GROUPS)


def test_regression_and_binary() -> None:
    scores = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    targets = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    expected = (1.0 * 0.25 + 0.5 * 1.0 + 2.0 * 4.0) / 3
    assert regression_loss(scores, targets, weights).item() == pytest.approx(expected, rel=1e-12)
    good = [1 / (1 + math.exp(-s)) for s in scores.tolist()]
    terms = [-math.log(good[0]), -0.5 * math.log(1 - good[1]), -2.0 * math.log(1 - good[2])]
    assert binary_loss(scores, targets, weights).item() == pytest.approx(sum(terms) / 3, rel=1e-9)
    assert binary_loss(scores, targets.long(), weights).item() == pytest.approx(sum(terms) / 3, rel=1e-9)
    for loss in (regression_loss, binary_loss):  # the cut into micro-batches does not matter
        alone = [loss(scores[i : i + 1], targets[i : i + 1], weights[i : i + 1]).item() for i in range(3)]
        assert sum(alone) / 3 == pytest.approx(loss(scores, targets, weights).item(), rel=1e-12)


def test_plackett_luce_is_the_likelihood_of_the_order() -> None:
    """Without ties: the product of choices, and over all orders the likelihoods add up to 1."""
    scores = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    total = 0.0
    for order in permutations(range(3)):
        ranks = torch.tensor([order.index(i) + 1 for i in range(3)])
        loss = plackett_luce_loss(scores, ranks, torch.zeros(3, dtype=torch.long)).item() * 2  # a mean over two choices
        rest, likelihood = list(order), 1.0
        for i in order:
            likelihood *= math.exp(scores[i]) / sum(math.exp(scores[j]) for j in rest)
            rest.remove(i)
        assert math.exp(-loss) == pytest.approx(likelihood, rel=1e-9)
        total += likelihood
    assert total == pytest.approx(1.0)


def test_plackett_luce_with_ties_and_several_rankings() -> None:
    terms = []
    for i in range(6):
        among = [j for j in range(6) if GROUPS[j] == GROUPS[i] and RANKS[j] >= RANKS[i]]
        if len(among) > 1:
            terms.append(math.log(sum(math.exp(SCORES[j]) for j in among)) - SCORES[i])
    assert len(terms) == 4
    assert plackett_luce_loss(*tensors()).item() == pytest.approx(sum(terms) / 4, rel=1e-9)


def test_all_pairs() -> None:
    means = []
    for group in (5, 9):
        members = [i for i in range(6) if GROUPS[i] == group]
        pairs = [(i, j) for i, j in combinations(members, 2) if RANKS[i] != RANKS[j]]
        ordered = [(i, j) if RANKS[i] < RANKS[j] else (j, i) for i, j in pairs]
        means.append(sum(math.log(1 + math.exp(SCORES[j] - SCORES[i])) for i, j in ordered) / len(ordered))
    assert all_pairs_loss(*tensors()).item() == pytest.approx(sum(means) / 2, rel=1e-9)


@pytest.mark.parametrize("loss", [plackett_luce_loss, all_pairs_loss])
def test_one_pair_beside_rankings_that_say_nothing(loss: object) -> None:
    scores, ranks = torch.tensor([0.5, 2.0, 1.0, 1.0, 7.0]), torch.tensor([1, 2, 1, 1, 1])
    if loss is plackett_luce_loss:  # each of two tied answers is one of two
        ranks, scores = ranks[[0, 1, 4]], scores[[0, 1, 4]]
    groups = torch.tensor([0, 0, 1, 1, 2]) if len(ranks) == 5 else torch.tensor([0, 0, 2])
    assert loss(scores, ranks, groups).item() == pytest.approx(math.log(1 + math.exp(1.5)))  # type: ignore[operator]


@pytest.mark.parametrize("loss", [plackett_luce_loss, all_pairs_loss])
def test_one_group_of_one_or_of_ties_gives_nothing(loss: object) -> None:
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    value = loss(scores, torch.tensor([1, 1]), torch.tensor([0, 1]))  # type: ignore[operator]
    value.backward()
    assert value.item() == 0.0 and scores.grad is not None and scores.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [plackett_luce_loss, all_pairs_loss])
def test_the_gradient_pulls_the_better_answer_up(loss: object) -> None:
    scores = torch.zeros(3, requires_grad=True)
    loss(scores, torch.tensor([2, 1, 3]), torch.zeros(3, dtype=torch.long)).backward()  # type: ignore[operator]
    assert scores.grad is not None
    assert scores.grad[1] < 0 < scores.grad[2]
