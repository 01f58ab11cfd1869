"""Win rates and what surrounds them, against closed forms, hand arithmetic, independent loops and simulation."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from trl_ext.evaluation import comparisons as c
from trl_ext.evaluation.comparisons import Comparison, Interval


def said(prompt: int, outcome: float, longer: int = 0, a: str = "a", b: str = "b", **ids: str) -> Comparison:
    return Comparison(prompt, a, b, outcome, 20 + longer, 20, "judge", **ids)


def sign_test(wins: int, losses: int) -> float:
    """Exact and two-sided: twice the upper tail of Binomial(n, 1/2)."""
    n, most = wins + losses, max(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n)


# The interval --------------------------------------------------------------------------------------------------------


def test_interval_of_many_prompts_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).gamma(2.0, size=400)
    found = c.bootstrap(values.tolist())
    half = 1.959964 * values.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert found.n == 400


def test_interval_where_all_are_won_is_that_of_clopper_and_pearson() -> None:
    # Lower limit for 10 successes of 10: (0.025)^(1/10) = 0.6915 in any table.
    assert c.bootstrap([1.0] * 10, bounds=(0, 1)) == Interval(1.0, pytest.approx(0.6915, abs=5e-5), 1.0, 10)
    assert c.bootstrap([0.0] * 10, bounds=(0, 1)) == Interval(0.0, 0.0, pytest.approx(0.3085, abs=5e-5), 10)
    tied = c.bootstrap([0.5] * 10, bounds=(0, 1))
    assert (tied.low, tied.high) == (pytest.approx(0.5 * 0.6915, abs=5e-5), pytest.approx(1 - 0.5 * 0.6915, abs=5e-5))


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7]])
def test_prompts_that_agree_tell_no_interval_of_what_has_no_bounds(values: list[float]) -> None:
    found = c.bootstrap(values)
    assert (found.mean, found.n) == (0.7, len(values))
    assert math.isnan(found.low) and math.isnan(found.high)
    assert 0 < c.bootstrap(values, bounds=(0, 1)).low < 0.7


def test_one_prompt_tells_no_interval_of_a_regression_or_a_strength() -> None:
    mixed = [said(0, 1.0, 3), said(0, 0.0, -2), said(0, 1.0, 1)]
    alike = [said(i, outcome) for i in range(5) for outcome in (1.0, 0.0, 1.0)]
    for data, rate in ((mixed, None), (alike, 2 / 3)):
        found = c.length_controlled(data)
        assert math.isnan(found.low) and math.isnan(found.high)
        assert rate is None or found.mean == pytest.approx(rate)
        assert all(math.isnan(x.low) for x in c.strengths(data, ["a", "b"]).values())
    (raw,) = c.win_rates(mixed, ["a", "b"])
    # One prompt, two thirds of it won: at most 0.975 of the prompts are others (Clopper and Pearson, 1 of 1).
    assert (raw.rate.low, raw.rate.high) == pytest.approx((2 / 3 * 0.025, 1 - 1 / 3 * 0.025))


@pytest.mark.parametrize("p", [0.5, 0.65])
def test_interval_holds_the_true_rate_as_often_as_it_says(p: float) -> None:
    rng, trials, held = np.random.default_rng(0), 400, 0
    for trial in range(trials):
        # Three answers a prompt, alike more often than chance: what a prompt is like matters.
        per_prompt = np.clip(rng.normal(p, 0.2, size=(60, 1)), 0, 1)
        outcomes = (rng.random((60, 3)) < per_prompt).mean(axis=1)
        found = c.bootstrap(outcomes.tolist(), seed=trial, bounds=(0, 1), resamples=500)
        held += found.low <= p <= found.high
    assert 0.91 <= held / trials <= 0.98


# Chance --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(7, 1), (4, 4), (10, 0), (3, 9)])
def test_few_prompts_are_tested_exactly(wins: int, losses: int) -> None:
    outcomes = [1.0] * wins + [0.0] * losses + [0.5] * 5
    assert c.chance(outcomes) == pytest.approx(sign_test(wins, losses))


def test_many_prompts_are_tested_nearly_exactly() -> None:
    assert c.chance([1.0] * 24 + [0.0] * 12) == pytest.approx(sign_test(24, 12), abs=0.01)


def test_outcomes_between_count_by_their_size() -> None:
    # d = 0.5, 0.25, -0.25: of the eight signs, |sum| >= 0.5 for sums 1, 0.5, 0.5 and their negatives: 6 of 8.
    assert c.chance([1.0, 0.75, 0.25]) == 6 / 8


def test_only_ties_are_no_evidence() -> None:
    assert c.chance([0.5, 0.5]) == 1.0


def test_several_pairs_are_corrected_by_holm() -> None:
    assert c.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert c.holm([0.6, 0.9]) == [1.0, 1.0]
    assert c.holm([]) == []


# How many more -------------------------------------------------------------------------------------------------------


def test_prompts_needed_by_hand() -> None:
    # 60 of 100: sd = sqrt(0.24 * 100 / 99) = 0.49237; ((1.95996 + 0.84162) * 0.49237 / 0.1)^2 = 190.3
    assert c.prompts_needed([1.0] * 60 + [0.0] * 40) == 191
    # Three pairs: z of 1 - 0.05 / 6 is 2.39398; ((2.39398 + 0.84162) * 0.49237 / 0.1)^2 = 253.8
    assert c.prompts_needed([1.0] * 60 + [0.0] * 40, pairs=3) == 254
    assert c.prompts_needed([1.0, 0.0]) is None


def test_as_many_prompts_find_the_difference_four_times_of_five() -> None:
    n, p = 191, 0.6
    critical = next(k for k in range(n // 2, n) if sign_test(k, n - k) < 0.05)
    power = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(critical, n + 1))
    assert 0.76 < power < 0.84


# Length --------------------------------------------------------------------------------------------------------------


def by_descent(comparisons: Sequence[Comparison]) -> float:
    """The regression's win rate at equal length, by plain gradient ascent, one comparison at a time."""
    spread = np.std([x.tokens_a - x.tokens_b for x in comparisons])
    count: dict[int | str, int] = {}
    for x in comparisons:
        count[x.prompt] = count.get(x.prompt, 0) + 1
    theta = phi = 0.0
    for _ in range(20_000):
        up, along = 0.0, -phi
        for x in comparisons:
            z = math.tanh((x.tokens_a - x.tokens_b) / spread)
            error = (x.outcome - 1 / (1 + math.exp(-(theta + phi * z)))) / count[x.prompt]
            up, along = up + error, along + error * z
        theta, phi = theta + 0.3 * up / len(count), phi + 0.3 * along / len(count)
    return 1 / (1 + math.exp(-theta))


def test_length_controlled_rate_is_the_regressions() -> None:
    rng = np.random.default_rng(3)
    data = [said(i // 2, [0.0, 0.5, 1.0][rng.integers(3)], int(rng.normal(6, 8))) for i in range(24)]
    assert c.length_controlled(data).mean == pytest.approx(by_descent(data), abs=1e-6)


@pytest.mark.parametrize("won", [0.75, 1.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_equal_length_is_not_guessed_where_one_side_is_always_longer(won: float, sign: int) -> None:
    """Lengths 200 to 260 tokens apart say nothing of answers that are as long."""
    data = [said(i, float(i < 20 * won), sign * (200 + 3 * i)) for i in range(20)]
    found = c.length_controlled(data)
    assert math.isnan(found.mean) and math.isnan(found.low) and found.n == 20
    near = [*data, said(20, 1.0, sign), said(21, 0.0, sign)]
    assert 0 <= c.length_controlled(near).mean <= 1


def test_a_judge_who_only_looks_at_length_sees_no_winner_at_equal_length() -> None:
    rng = np.random.default_rng(0)
    data = []
    for prompt in range(300):
        longer = int(rng.normal(10, 10))
        chance = 1 / (1 + math.exp(-3 * math.tanh(longer / 10)))
        data.append(said(prompt, float(rng.random() < chance), longer))
    raw, controlled = c.bootstrap([x.outcome for x in data]), c.length_controlled(data)
    assert raw.low > 0.7
    assert controlled.low < 0.5 < controlled.high


def test_length_that_plays_no_part_changes_nothing() -> None:
    data = [said(i, float(i % 4 > 0), longer) for i, longer in enumerate([-5, -5, -5, -5, 5, 5, 5, 5] * 5)]
    assert c.length_controlled(data).mean == pytest.approx(0.75)
    same_length = [said(i, float(i % 4 > 0)) for i in range(40)]
    assert c.length_controlled(same_length).mean == pytest.approx(0.75)


def test_length_control_where_all_are_won() -> None:
    assert c.length_controlled([said(i, 1.0, i) for i in range(10)]).mean == 1.0


# Several policies ----------------------------------------------------------------------------------------------------


def test_two_strengths_by_hand() -> None:
    strengths = c.bradley_terry(np.array([[0.0, 7.0], [2.0, 0.0]]))
    assert strengths[0] - strengths[1] == pytest.approx(math.log(7.5 / 2.5))
    assert strengths.sum() == pytest.approx(0)


def test_strengths_that_made_the_wins_are_found() -> None:
    true = np.array([0.9, -0.2, -0.7])
    wins = np.array([[0.0 if i == j else 1e6 / (1 + math.exp(true[j] - true[i])) for j in range(3)] for i in range(3)])
    assert c.bradley_terry(wins) == pytest.approx(true, abs=1e-4)


def test_a_policy_that_won_everything_has_a_finite_strength() -> None:
    assert np.isfinite(c.bradley_terry(np.array([[0.0, 5.0, 5.0], [0.0, 0.0, 3.0], [0.0, 2.0, 0.0]]))).all()


def test_strengths_of_comparisons_with_intervals() -> None:
    data = [said(i, float(i % 4 > 0), a=x, b=y) for i in range(40) for x, y in ("ab", "bc", "ac")]
    found = c.strengths(data, ["a", "b", "c"])
    assert found["a"].mean > found["b"].mean > found["c"].mean
    # a won 60 of 80, c lost 60 of 80, b is between: by symmetry it has 0.
    assert found["b"].mean == pytest.approx(0, abs=1e-6)
    for strength in found.values():
        assert strength.low <= strength.mean <= strength.high


def test_win_rates_average_a_prompt_first_and_know_both_directions() -> None:
    # Prompt 0 is won twice and lost once, prompt 1 won once: (2/3 + 1) / 2.
    data = [said(0, 1.0), said(0, 0.0, a="b", b="a"), said(0, 0.0), said(1, 1.0)]
    [rate] = c.win_rates(data, ["a", "b"])
    assert rate.rate.mean == pytest.approx(5 / 6)
    assert rate.rate.n == 2
    assert rate.swapped.rate.mean == pytest.approx(1 / 6)
    assert rate.swapped.rate.low == pytest.approx(1 - rate.rate.high)


def test_sentences_say_what_may_be_believed() -> None:
    [sure] = c.win_rates([said(i, float(i % 10 > 0)) for i in range(50)], ["a", "b"])
    assert "a wins 90% against b" in sure.sentence and "more than chance (p < 0.001)" in sure.sentence
    assert sure.more_prompts == 0
    assert "b wins 10% against a" in sure.swapped.sentence and "less than chance (p < 0.001)" in sure.swapped.sentence
    [unsure] = c.win_rates([said(i, float(i % 5 > 1)) for i in range(100)], ["a", "b"])
    assert unsure.more_prompts == 91  # 191 are needed: see above
    assert "could be chance (p = 0.0" in unsure.sentence and "about 91 more prompts would settle it" in unsure.sentence
    [equal] = c.win_rates([said(i, i % 2) for i in range(10)], ["a", "b"])
    assert equal.more_prompts is None and "no difference" in equal.sentence


# Judges --------------------------------------------------------------------------------------------------------------


def test_kappa_by_hand() -> None:
    # Of 50: both yes 20, both no 15, apart 5 and 10: p_o 0.7, p_e 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa 0.4.
    first = [1.0] * 25 + [0.0] * 25
    second = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert c.cohen_kappa(first, second) == pytest.approx(0.4)
    assert math.isnan(c.cohen_kappa([1.0], [1.0]))


def test_agreement_is_by_completions_whatever_side_they_were_on() -> None:
    judge = [said(0, 1.0, id_a="0-a-0", id_b="0-b-0"), said(1, 0.5, id_a="1-a-0", id_b="1-b-0")]
    people = [
        said(0, 0.0, a="b", b="a", id_a="0-b-0", id_b="0-a-0"),
        said(0, 1.0, id_a="0-a-0", id_b="0-b-0"),
        said(0, 0.0, id_a="0-a-0", id_b="0-b-0"),
        said(1, 1.0, id_a="1-a-0", id_b="1-b-0"),
        said(2, 1.0, id_a="2-a-0", id_b="2-b-0"),
    ]
    found = c.agreement(judge, people)
    assert found is not None
    assert (found.share.mean, found.pairs) == (0.5, 2)  # prompt 0: two of three say a; prompt 1: no tie to people
    assert c.agreement(judge, people[-1:]) is None
