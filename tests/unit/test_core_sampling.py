"""Importance weights against a loop in plain Python, and against their purpose: a mean under another distribution."""

import math

import pytest
import torch
from torch import Tensor

from trl_ext.core import CorrectionMode, importance_ratio, importance_weights, share_cut

LENGTHS = [5, 2, 0, 4]
CLIPS = [(2.0, None), (1.2, 0.8), (None, 0.9)]


@pytest.fixture
def told() -> tuple[Tensor, Tensor, Tensor]:
    """The policy's log-probs, the sampler's, and the mask, in float64; NaN on padding."""
    draws = torch.Generator().manual_seed(3)
    policy = torch.randn(4, 5, generator=draws, dtype=torch.float64) - 3
    sampler = policy + 0.5 * torch.randn(4, 5, generator=draws, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)
    return policy.where(mask, torch.nan), sampler.where(mask, torch.nan), mask


def by_loop(policy: Tensor, sampler: Tensor, mode: str, high: float | None, low: float | None) -> list[list[float]]:
    rows = []
    for length, of_policy, of_sampler in zip(LENGTHS, policy.tolist(), sampler.tolist(), strict=True):
        ratios = [math.exp(p) / math.exp(q) for p, q in zip(of_policy[:length], of_sampler[:length], strict=True)]
        if mode.startswith("sequence"):
            ratios = [math.prod(ratios)] * length
        row = []
        for ratio in ratios:
            above, below = high is not None and ratio > high, low is not None and ratio < low
            if mode.endswith("mask"):
                row.append(0.0 if above or below else ratio)
            else:
                row.append(float(high) if above else float(low) if below else ratio)  # type: ignore[arg-type]
        rows.append(row)
    return rows


@pytest.mark.parametrize(("high", "low"), CLIPS)
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_weights(
    mode: CorrectionMode, high: float | None, low: float | None, told: tuple[Tensor, Tensor, Tensor]
) -> None:
    policy, sampler, mask = told
    weights = importance_weights(policy, sampler, mask, mode, high, low)
    expected = by_loop(policy, sampler, mode, high, low)
    plain = by_loop(policy, sampler, mode, None, None)
    assert expected != plain, "a bound is reached"
    assert [row[mask].tolist() for row, mask in zip(weights, mask, strict=True)] == [
        pytest.approx(row, rel=1e-12) for row in expected
    ]
    assert bool((weights[~mask] == 1).all())
    ratio = importance_ratio(policy, sampler, mask, mode.startswith("sequence"))
    pairs = [(w, r) for of_w, of_r in zip(expected, plain, strict=True) for w, r in zip(of_w, of_r, strict=True)]
    cut = sum(abs(r - w) for w, r in pairs) / sum(r for _, r in pairs)
    assert float(share_cut(weights, ratio, mask)) == pytest.approx(cut, rel=1e-12)


def test_the_weighted_mean_over_the_samplers_tokens_is_the_policys_mean() -> None:
    """sum_a mu(a) w(a) f(a) = sum_a pi(a) f(a), exactly, where no bound is reached."""
    policy, sampler = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.4, 0.35, 0.25]]).double()
    worth = torch.tensor([[1.0, -2.0, 5.0]]).double()
    weights = importance_weights(policy.log(), sampler.log(), torch.ones(1, 3).bool(), "token_truncate", 3.0)
    assert float((sampler * weights * worth).sum()) == pytest.approx(float((policy * worth).sum()), rel=1e-12)


def test_what_no_float_can_hold_is_bounded() -> None:
    policy, sampler = torch.zeros(1, 2), torch.tensor([[-300.0, 0.0]])
    for mode, expected in (("token_truncate", 3.0), ("sequence_mask", 0.0)):
        weights = importance_weights(policy, sampler, torch.ones(1, 2).bool(), mode, 3.0)  # type: ignore[arg-type]
        assert float(weights[0, 0]) == expected
    assert bool(importance_weights(policy, sampler, torch.ones(1, 2).bool(), "token_mask", None, 0.5).isfinite().all())
