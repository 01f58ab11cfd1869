"""The statistics that separate causes, against hand arithmetic, closed forms and numpy."""

import math

import numpy as np
import pytest
import torch

from trl_ext.core import evidence


def test_correlation_by_hand() -> None:
    """Of the rows (1, 2), (2, 2), (4, 5): means 7/3 and 3, products 5, squares 14/3 and 6."""
    x, y = torch.tensor([1.0, 9.0, 2.0, 4.0]), torch.tensor([2.0, math.nan, 2.0, 5.0])
    assert evidence.correlation(x, y) == pytest.approx(5 / math.sqrt(14 / 3 * 6))
    assert math.isnan(evidence.correlation(x, y, least=4)) and evidence.correlation(x[:3], y[:3], undefined=0.0) == 0.0
    assert math.isnan(evidence.correlation(x, torch.ones(4))), "a constant"


def test_missed_share_by_hand() -> None:
    """Three quarters of 1, 1, 2, 3, 4, 5, 5, 5 lie at 5: three best, and the others score 0.4 on average."""
    verdicts = torch.tensor([1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, math.nan])
    scores = torch.tensor([0.0, 0.0, 0.4, 0.6, 1.0, 2.0, 0.4, 0.5, -9.0])
    assert evidence.missed_share(verdicts, scores) == pytest.approx(1 / 3)
    assert math.isnan(evidence.missed_share(verdicts, scores, least=4))


def test_missed_share_of_verdicts_that_are_mostly_the_lowest_or_all_the_same() -> None:
    verdicts = torch.tensor([0.0] * 9 + [1.0] * 3)
    assert evidence.missed_share(verdicts, 1 - verdicts) == 1.0 and evidence.missed_share(verdicts, verdicts) == 0.0
    assert math.isnan(evidence.missed_share(torch.ones(12), torch.arange(12.0)))
    assert math.isnan(evidence.missed_share(torch.full((12,), math.nan), torch.arange(12.0)))


def test_missed_share_of_a_score_that_few_earn() -> None:
    """A reward for the right answer alone, beside verdicts that have steps between, or beside a skewed scale."""
    steps = torch.tensor([0.0] * 45 + [0.2] * 10 + [1.0] * 9)
    assert evidence.missed_share(steps, (steps == 1).double()) == 0.0
    skewed = torch.linspace(0, 1, 100) ** 8
    assert evidence.missed_share(skewed, (skewed > 0.9 * 0.9**8).double()) == 0.0


@pytest.mark.parametrize(("r", "share"), [(0.75, 0.042), (0.0, 0.5)])
def test_missed_share_of_normal_variables(r: float, share: float) -> None:
    draw = np.random.default_rng(0)
    verdicts = draw.normal(size=40_000)
    scores = r * verdicts + math.sqrt(1 - r * r) * draw.normal(size=40_000)
    found = evidence.missed_share(torch.tensor(verdicts), torch.tensor(scores))
    assert found == pytest.approx(share, abs=0.01)


def test_variance_components_by_hand() -> None:
    """Prompts with the scores (1, 3), (6, 8) and (5,).

    Means 2, 7, 5; within: (1 + 1 + 1 + 1) / (5 - 3) = 2. Grand mean 23 / 5 = 4.6; between groups
    2 * 2.6^2 + 2 * 2.4^2 + 0.4^2 = 25.2, over 2: 12.6. n0 = (5 - 9 / 5) / 2 = 1.6; (12.6 - 2) / 1.6 = 6.625.
    """
    scores, groups = torch.tensor([1.0, 6.0, 3.0, 8.0, 5.0]), torch.tensor([7, 9, 7, 9, 4])
    within, between, freedom = evidence.variance_components(scores, groups)
    assert (within, between, freedom) == (pytest.approx(2.0), pytest.approx(6.625), 2)


def test_variance_components_of_a_drawn_population() -> None:
    """Between 4, within 1: a share of 0.2 lies within."""
    draw = np.random.default_rng(0)
    prompts = draw.normal(0, 2, 4000).repeat(2)
    scores = prompts + draw.normal(0, 1, 8000)
    within, between, _ = evidence.variance_components(torch.tensor(scores), torch.arange(4000).repeat_interleave(2))
    assert within == pytest.approx(1.0, rel=0.05) and between == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("groups", [[0, 1, 2], [0, 0, 0]])
def test_nothing_is_said_of_variance_without_repeats_or_with_one_prompt(groups: list[int]) -> None:
    assert evidence.variance_components(torch.tensor([1.0, 2.0, 4.0]), torch.tensor(groups)) == (0.0, 0.0, 0)


def test_the_share_of_the_most_common_value() -> None:
    values = torch.tensor([1.0, 0.3, 0.1 + 0.2, math.nan, 2.0])  # rounding makes no other value
    assert evidence.alike(values) == 0.5 and evidence.alike(values[3:4]) == 0.0


def test_noise_share_by_hand() -> None:
    """Differences 2, 0 and one that is missing: (4 + 0) / 2 / 2 = 1, of a variance of 5."""
    first, again = torch.tensor([1.0, 4.0, math.nan]), torch.tensor([3.0, 4.0, 2.0])
    assert evidence.noise_share(first, again, 5.0) == pytest.approx(0.2)
    assert evidence.noise_share(first[:2], first[:2], 0.0) == 0.0
    assert math.isnan(evidence.noise_share(first[2:], again[2:], 5.0))


def test_pure_noise_is_all_noise() -> None:
    draw = np.random.default_rng(1)
    first, again = draw.normal(3, 2, (2, 20_000))
    assert evidence.noise_share(torch.tensor(first), torch.tensor(again), first.var()) == pytest.approx(1.0, rel=0.05)


def test_shares_of_variance_against_numpy_and_their_sum() -> None:
    draw = np.random.default_rng(2)
    a, b = draw.normal(0, 3, 500), draw.normal(0, 1, 500)
    parts = {"a": a, "b": b, "against": -0.5 * a}
    total = sum(parts.values())
    shares = evidence.shares_of_variance({name: torch.tensor(part) for name, part in parts.items()})
    expected = {name: np.cov(part, total, ddof=0)[0, 1] / total.var() for name, part in parts.items()}
    assert shares == {name: pytest.approx(share) for name, share in expected.items()}
    assert sum(shares.values()) == pytest.approx(1.0) and shares["against"] < 0
    assert evidence.shares_of_variance({"a": torch.ones(3)}) == {"a": 0.0}


def test_cosine_and_norm_over_several_parameters() -> None:
    """(3, 4 | 0) and (4, 3 | 5): 24 / (5 sqrt(50))."""
    a, b = [torch.tensor([3.0, 4.0]), torch.tensor([[0.0]])], [torch.tensor([4.0, 3.0]), torch.tensor([[5.0]])]
    assert evidence.norm(a) == pytest.approx(5.0)
    assert evidence.cosine(a, b) == pytest.approx(24 / (5 * math.sqrt(50)))
    assert evidence.cosine(a, [-x for x in a]) == pytest.approx(-1.0)
    assert evidence.cosine(a, [torch.zeros(2), torch.zeros(1, 1)]) == 0.0


def test_signal_and_noise_by_hand() -> None:
    """(3, 0) and (1, 0): mean (2, 0), squared distances 1 + 1 over 1: noise 2, signal 4 - 2 / 2."""
    signal, noise = evidence.signal_and_noise(torch.tensor([4.0, 0.0]), 10.0, 2)
    assert (signal, noise) == (pytest.approx(3.0), pytest.approx(2.0))


def test_signal_and_noise_are_unbiased() -> None:
    draw = np.random.default_rng(3)
    truth = np.array([1.0, -2.0, 0.5])
    estimates = []
    for _ in range(4000):
        gradients = truth + draw.normal(0, 2, (3, 3))
        total = torch.tensor(gradients.sum(axis=0))
        estimates.append(evidence.signal_and_noise(total, float((gradients**2).sum()), 3))
    signal, noise = np.mean(estimates, axis=0)
    assert signal == pytest.approx(5.25, rel=0.05) and noise == pytest.approx(12.0, rel=0.05)


def test_credit_reach_by_hand() -> None:
    """Three tokens and one at a decay of 0.5: first tokens 0.25 and 1; tokens 0.25, 0.5, 1, 1."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert evidence.credit_reach(mask, 0.5) == (pytest.approx(0.625), pytest.approx(2.75 / 4))
    assert evidence.credit_reach(mask, 0.0) == (pytest.approx(0.5), pytest.approx(0.5))
    assert evidence.credit_reach(mask, 1.0) == (1.0, 1.0)


def test_steps_that_bfloat16_cannot_hold_are_lost() -> None:
    """At 1, bfloat16 has steps of 1/128 upwards: 1/1024 is lost whole, 1/128 is kept whole, 3/256 goes to 1/64."""
    weights = torch.ones(1, dtype=torch.bfloat16)
    for step, left in ((1 / 1024, 0.0), (1 / 128, 1 / 128), (3 / 256, 1 / 64)):
        lost, size = evidence.lost_to_rounding(weights, torch.tensor([step]))
        assert (lost, size) == (pytest.approx((left - step) ** 2), pytest.approx(step**2))
    assert evidence.lost_to_rounding(torch.ones(1), torch.tensor([2.0**-20]))[0] == 0.0


def test_score_gap_by_hand() -> None:
    """Means 2 and 5, variances 1 and 4 (unbiased), three rows each: -3 / sqrt(2.5), -3 / sqrt(1/3 + 4/3)."""
    gap, z = evidence.score_gap(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 5.0, 7.0]))
    assert (gap, z) == (pytest.approx(-3 / math.sqrt(2.5)), pytest.approx(-3 / math.sqrt(5 / 3)))
    assert all(math.isnan(x) for x in evidence.score_gap(torch.ones(3), torch.ones(3)))
