"""The further objectives and their advantages, each against a loop over plain numbers or a derivative by hand."""

import math
import statistics

import pytest
import torch

from trl_ext.core import (
    batch_baseline,
    clipped_policy_loss,
    estimate_advantages,
    kl_penalty_policy_terms,
    policy_clipped,
    reinforce_terms,
    rewards_to_go,
    sequence_returns,
    shape_rewards,
    token_mean,
)

MASK = torch.tensor([[True, True, True, True], [True, False, False, False], [True, True, False, False]])


def draw(seed: int) -> torch.Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Losses --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (10.0, -2.0, 6.0, 0.0),  # bounded at dual_clip 3
        (2.5, -2.0, 5.0, 5.0),  # below the bound: as without it
        (0.5, -2.0, 1.6, 0.0),  # the ordinary clip
        (10.0, 2.0, -2.4, 0.0),  # a good token is none of its business
        (10.0, 0.5, -0.6, 0.0),
        (10.0, 0.0, 0.0, None),  # and one that makes no difference is not clipped
    ],
)
def test_dual_clip(ratio: float, advantage: float, expected: float, slope: float | None) -> None:
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, advantages, mask = torch.zeros(1, 1), torch.tensor([[advantage]], dtype=torch.float64), torch.ones(1, 1)
    loss = clipped_policy_loss(new, old, advantages, mask, 0.2, dual_clip=3.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(slope or 0.0, rel=1e-12)
    assert bool(policy_clipped(new.detach(), old, advantages, mask, 0.2, 3.0)) == (slope == 0.0)


@pytest.mark.parametrize(("log_ratio", "advantage", "penalty"), [(0.3, 1.5, 0.7), (-0.4, -2.0, 3.0), (0.0, 1.0, 5.0)])
def test_kl_penalty(log_ratio: float, advantage: float, penalty: float) -> None:
    new = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    ratio = math.exp(log_ratio)
    term = kl_penalty_policy_terms(new, torch.tensor(advantage, dtype=torch.float64), penalty)
    assert term.item() == pytest.approx(-advantage * ratio + penalty * (ratio - 1 - log_ratio), rel=1e-12)
    term.backward()
    assert new.grad is not None
    assert new.grad.item() == pytest.approx(-advantage * ratio + penalty * (ratio - 1), rel=1e-12)


@pytest.mark.parametrize("log_ratio", [-95.0, -110.0, -1000.0])
def test_a_token_that_has_become_very_unlikely_spoils_no_gradient(log_ratio: float) -> None:
    """In float32 its ratio is 0, of which there is no logarithm."""
    new = torch.tensor(log_ratio, requires_grad=True)
    kl_penalty_policy_terms(new, torch.tensor(1.0), 2.0).backward()
    assert new.grad is not None and new.grad.item() == pytest.approx(-2.0)


def test_the_penalty_is_the_kl_between_the_policies() -> None:
    """Over all tokens of a vocabulary, weighed by the policy that samples, the terms add up to KL(old || new)."""
    old, new = (torch.randn(2, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).log_softmax(-1)
    terms = kl_penalty_policy_terms(new - old, torch.zeros(50, dtype=torch.float64), 1.0)
    assert (old.exp() * terms).sum().item() == pytest.approx((old.exp() * (old - new)).sum().item(), rel=1e-9)


def test_reinforce() -> None:
    logprobs, advantages = draw(0).requires_grad_(), draw(1)
    token_mean(reinforce_terms(logprobs, advantages), MASK, 5).backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.where(MASK, -advantages / 5, 0.0), rtol=1e-12, atol=0)


# Advantages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_rewards_to_go(gamma: float) -> None:
    rewards = draw(2)
    got = rewards_to_go(rewards, MASK, gamma)
    for row, length in enumerate((4, 1, 2)):
        r = rewards[row].tolist()
        expected = [sum(gamma ** (s - t) * r[s] for s in range(t, length)) for t in range(length)]
        assert got[row].tolist() == pytest.approx([*expected, *[0.0] * (4 - length)], rel=1e-12)


def test_sequence_returns_are_score_less_kl() -> None:
    scores, kl = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), draw(3)
    returns = sequence_returns(shape_rewards(scores, kl, 0.3, MASK), MASK)
    expected = [
        score - 0.3 * sum(k for k, real in zip(row, mask, strict=True) if real)
        for score, row, mask in zip(scores.tolist(), kl.tolist(), MASK.tolist(), strict=True)
    ]
    assert returns.tolist() == pytest.approx(expected, rel=1e-12)


def test_rewards_are_not_discounted_unless_told() -> None:
    rewards = draw(2)
    assert torch.equal(rewards_to_go(rewards, MASK), rewards_to_go(rewards, MASK, 1.0))


RETURNS = [1.0, 4.0, 2.5, -3.0, 7.0]
SCORED = [True, True, False, True, True]
GROUPS = [0, 0, 0, 1, 2]


def test_the_baseline_is_the_mean_unless_told() -> None:
    assert batch_baseline(torch.tensor([1.0, 3.0]), torch.tensor([True, True])).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_baseline(leave_one_out: bool, grouped: bool) -> None:
    got = batch_baseline(
        torch.tensor(RETURNS, dtype=torch.float64),
        torch.tensor(SCORED),
        leave_one_out,
        torch.tensor(GROUPS) if grouped else None,
    ).tolist()
    everyone = [j for j in range(5) if SCORED[j]]
    for i in everyone:
        group = [j for j in everyone if GROUPS[j] == GROUPS[i]] if grouped else everyone
        group = group if len(group) > 1 else everyone  # alone in its group
        others = [RETURNS[j] for j in group if not (leave_one_out and j == i)]
        assert got[i] == pytest.approx(statistics.fmean(others), rel=1e-12), i


def test_leave_one_out_of_one_answer_is_0() -> None:
    assert batch_baseline(torch.tensor([3.0]), torch.tensor([True]), leave_one_out=True).tolist() == [0.0]


def test_another_lambda_for_the_returns() -> None:
    rewards, values = draw(4), draw(5)
    advantages, returns = estimate_advantages(rewards, values, MASK, 0.99, 0.9, lam_value=1.0)
    of_policy, _ = estimate_advantages(rewards, values, MASK, 0.99, 0.9)
    _, of_value = estimate_advantages(rewards, values, MASK, 0.99, 1.0)
    assert torch.equal(advantages, of_policy)
    assert torch.equal(returns, of_value)
    assert not torch.equal(returns, estimate_advantages(rewards, values, MASK, 0.99, 0.9)[1])
    # At lambda 1 the return is the discounted sum of the rewards, whatever the values say.
    torch.testing.assert_close(returns, rewards_to_go(rewards, MASK, 0.99), rtol=1e-12, atol=1e-12)
