"""Several members' scores into one, against arithmetic by hand."""

import pytest
import torch

from trl_ext.core import combine_members, mean_score, member_spread, uncertainty_weighted, worst_case

# Mean 3, deviations -2, -1, 3, so variance 14/3; mean -1, deviations 1, -1, 0, so variance 2/3; agreed.
MEMBERS = torch.tensor([[1.0, 2.0, 6.0], [0.0, -2.0, -1.0], [0.5, 0.5, 0.5]])


def test_mean() -> None:
    assert mean_score(MEMBERS).tolist() == [3.0, -1.0, 0.5]


def test_worst_case() -> None:
    assert worst_case(MEMBERS).tolist() == [1.0, -2.0, 0.5]


def test_mean_less_a_multiple_of_the_variance() -> None:
    assert uncertainty_weighted(MEMBERS, 0.75).tolist() == pytest.approx([3 - 3.5, -1 - 0.5, 0.5])
    assert uncertainty_weighted(MEMBERS, 0.0).tolist() == pytest.approx([3.0, -1.0, 0.5])


def test_spread_is_the_standard_deviation() -> None:
    assert member_spread(MEMBERS).tolist() == pytest.approx([(14 / 3) ** 0.5, (2 / 3) ** 0.5, 0.0])
    assert member_spread(MEMBERS[:, :1]).tolist() == [0.0, 0.0, 0.0]


def test_by_name() -> None:
    expected = {"mean": [3.0, -1.0, 0.5], "min": [1.0, -2.0, 0.5], "uncertainty": [-4.0, -2.0, 0.5]}
    for how, scores in expected.items():
        assert combine_members(MEMBERS, how, 1.5).tolist() == pytest.approx(scores), how  # type: ignore[arg-type]


def test_one_member_is_itself() -> None:
    for how in ("mean", "min", "uncertainty"):
        assert combine_members(MEMBERS[:, :1], how, 1.5).tolist() == [1.0, 0.0, 0.5], how  # type: ignore[arg-type]
