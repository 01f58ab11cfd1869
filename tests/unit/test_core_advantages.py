"""Generalised advantage estimation against its definition as a sum, and its two closed forms."""

import math

import pytest
import torch
from torch import Tensor

from trl_ext.core import estimate_advantages

LENGTHS = [6, 1, 4, 0, 2]
WIDTH = 6


def definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, Schulman et al. 2016 equation 16, cut off where the episode ends."""
    after = [*values, 0.0]
    return [
        math.fsum(
            (gamma * lam) ** (s - t) * (rewards[s] + gamma * after[s + 1] - values[s]) for s in range(t, len(rewards))
        )
        for t in range(len(rewards))
    ]


def rows(width: int = WIDTH, garbage: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask of `LENGTHS`, `garbage` on the padding."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(width) < torch.tensor(LENGTHS).unsqueeze(1)
    padded = []
    for _ in range(2):
        drawn = torch.randn(len(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)
        wide = torch.full((len(LENGTHS), width), garbage, dtype=torch.float64)
        wide[:, :WIDTH] = drawn
        padded.append(wide.masked_fill(~mask, garbage))
    return padded[0], padded[1], mask


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_against_the_definition(gamma: float, lam: float) -> None:
    rewards, values, mask = rows()
    advantages, returns = estimate_advantages(rewards, values, mask, gamma, lam)
    for i, length in enumerate(LENGTHS):
        r, v = rewards[i, :length].tolist(), values[i, :length].tolist()
        expected = definition(r, v, gamma, lam)
        assert advantages[i].tolist() == pytest.approx([*expected, *[0.0] * (WIDTH - length)], rel=1e-12, abs=1e-14)
        target = [a + b for a, b in zip(expected, v, strict=True)]
        assert returns[i].tolist() == pytest.approx([*target, *[0.0] * (WIDTH - length)], rel=1e-12, abs=1e-14)


def test_by_hand() -> None:
    # gamma 1/2, lambda 1/2; deltas 1 + 1 - 4 = -2, 0 + 4 - 2 = 2, 3 - 8 = -5;
    # A_2 = -5, A_1 = 2 - 5/4 = 0.75, A_0 = -2 + 0.75/4 = -1.8125.
    rewards, values = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[4.0, 2.0, 8.0]])
    advantages, returns = estimate_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), 0.5, 0.5)
    assert advantages.tolist() == [[-1.8125, 0.75, -5.0]]
    assert returns.tolist() == [[2.1875, 2.75, 3.0]]


def test_answers_of_one_token() -> None:
    advantages, returns = estimate_advantages(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[True]]))
    assert (advantages.item(), returns.item()) == (2.0, 3.0)


def test_defaults_are_gamma_1_and_lambda_095() -> None:
    rewards, values, mask = rows()
    advantages, _ = estimate_advantages(rewards, values, mask)
    expected = definition(rewards[0].tolist(), values[0].tolist(), 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_lambda_0_is_the_one_step_error() -> None:
    rewards, values, mask = rows()
    advantages, _ = estimate_advantages(rewards, values, mask, gamma=0.9, lam=0.0)
    r, v = rewards[0].tolist(), [*values[0].tolist(), 0.0]
    assert advantages[0].tolist() == pytest.approx([r[t] + 0.9 * v[t + 1] - v[t] for t in range(WIDTH)], rel=1e-12)


def test_lambda_1_is_monte_carlo_whatever_the_values() -> None:
    rewards, values, mask = rows()
    _, returns = estimate_advantages(rewards, values, mask, gamma=0.9, lam=1.0)
    r = rewards[0].tolist()
    expected = [math.fsum(0.9 ** (s - t) * r[s] for s in range(t, WIDTH)) for t in range(WIDTH)]
    assert returns[0].tolist() == pytest.approx(expected, rel=1e-12)
    _, others = estimate_advantages(rewards, values + 5.0, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(others, returns, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
def test_neither_the_amount_nor_the_content_of_padding_matters(garbage: float) -> None:
    expected = estimate_advantages(*rows(), gamma=0.97, lam=0.9)
    wide = estimate_advantages(*rows(WIDTH + 5, garbage), gamma=0.97, lam=0.9)
    for narrow, padded in zip(expected, wide, strict=True):
        assert torch.equal(padded[:, :WIDTH], narrow)
        assert padded[:, WIDTH:].abs().sum().item() == 0.0


def test_one_row_alone_and_among_others() -> None:
    rewards, values, mask = rows()
    together, _ = estimate_advantages(rewards, values, mask)
    for i in range(len(LENGTHS)):
        alone, _ = estimate_advantages(rewards[i : i + 1], values[i : i + 1], mask[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_inputs_are_left_as_they_were() -> None:
    rewards, values, mask = rows()
    before = rewards.clone(), values.clone(), mask.clone()
    estimate_advantages(rewards, values, mask)
    assert all(torch.equal(a, b) for a, b in zip(before, (rewards, values, mask), strict=True))


def test_padding_on_the_left_gives_the_same() -> None:
    """More than is promised: rows are walked from their end, so only a gap between real tokens would do harm."""
    rewards, values, mask = (column[2:3, :4] for column in rows())
    expected = estimate_advantages(rewards, values, mask, 0.9, 0.8)
    left = [torch.cat([torch.full((1, 2), float("nan")), column], dim=1) for column in (rewards, values)]
    moved = estimate_advantages(left[0], left[1], torch.cat([torch.zeros(1, 2).bool(), mask], dim=1), 0.9, 0.8)
    for plain, padded in zip(expected, moved, strict=True):
        assert padded.tolist() == [[0.0, 0.0, *plain[0].tolist()]]
