"""Normalisation, weights and clipping of scores, against numbers worked out from all scores at once."""

import math
import statistics

import pytest
import torch

from trl_ext.core import worst_case
from trl_ext.rewards import Combination, ScoreMoments, correlations

NAN = float("nan")
SCORES = [torch.tensor([[1.0, 5.0], [3.0, NAN]]), torch.tensor([[2.0, 7.0], [8.0, 9.0], [NAN, 0.0]])]
COLUMNS = [[1.0, 3.0, 2.0, 8.0], [5.0, 7.0, 9.0, 0.0]]


def test_moments_of_all_parts() -> None:
    moments = ScoreMoments(2)
    for part in SCORES:
        moments.update(part)
    assert moments.count.tolist() == [4, 4]
    assert moments.mean.tolist() == pytest.approx([statistics.fmean(c) for c in COLUMNS], rel=1e-12)
    variances = [statistics.pvariance(c) for c in COLUMNS]
    assert (moments.squares / moments.count).tolist() == pytest.approx(variances, rel=1e-12)
    normal = moments.normalize(torch.tensor([[2.0, NAN]]))
    assert normal[0, 0].item() == pytest.approx((2 - 3.5) / math.sqrt(variances[0]), rel=1e-6)
    assert math.isnan(normal[0, 1])


def test_moments_without_anything() -> None:
    moments = ScoreMoments(1)
    moments.update(torch.tensor([[NAN], [NAN]]))
    assert moments.normalize(torch.tensor([[2.5]])).item() == 2.5
    moments.update(torch.tensor([[4.0], [4.0]]))
    assert moments.normalize(torch.tensor([[5.0]])).item() == 1.0, "a constant has no scale to divide by"


def test_moments_go_on() -> None:
    first, second, at_once = ScoreMoments(2), ScoreMoments(2), ScoreMoments(2)
    first.update(SCORES[0])
    second.load_state_dict(first.state_dict())
    second.update(SCORES[1])
    for part in SCORES:
        at_once.update(part)
    assert second.state_dict() == at_once.state_dict()
    with pytest.raises(ValueError, match="of 2 reward functions, but the run has 3"):
        ScoreMoments(3).load_state_dict(first.state_dict())


def test_running_takes_in_training_scores_before_it_divides() -> None:
    combination = Combination([1.0, 2.0], "running")
    totals = [combination(part) for part in SCORES]
    first = [[-1.0, 0.0], [1.0, NAN]]  # two scores: mean +- 1 standard deviation; one score: no scale
    assert totals[0].tolist() == pytest.approx([first[0][0], first[1][0]])
    means, stds = [statistics.fmean(c) for c in COLUMNS], [statistics.pstdev(c) for c in COLUMNS]
    expected = [
        (2 - means[0]) / stds[0] + 2 * (7 - means[1]) / stds[1],
        (8 - means[0]) / stds[0] + 2 * (9 - means[1]) / stds[1],
    ]
    assert totals[1][:2].tolist() == pytest.approx(expected, rel=1e-5)
    before = combination.moments.state_dict()
    combination(torch.tensor([[100.0, 100.0]]), training=False)
    assert combination.moments.state_dict() == before, "evaluation does not move them"


def test_reference_is_made_once() -> None:
    combination = Combination([1.0], "reference")
    assert combination.needs_reference
    combination.moments.update(torch.tensor([[10.0], [14.0]]))
    assert not combination.needs_reference
    assert combination(torch.tensor([[12.0], [16.0]])).tolist() == [0.0, 2.0]
    assert combination(torch.tensor([[12.0], [16.0]])).tolist() == [0.0, 2.0]


def test_clipping_comes_last() -> None:
    total = Combination([2.0], clip_range=[-1.0, 1.5])(torch.tensor([[-3.0], [0.25], [4.0], [NAN]]))
    assert total[:3].tolist() == [-1.0, 0.5, 1.5]
    assert math.isnan(total[3])


def test_members_count_as_one_function_once_each_has_its_scale() -> None:
    """Members whose zeros lie apart by 100 and whose units differ by 10: the least of raw scores is the first's."""
    combination = Combination([2.0], "reference", members=2, combine=worst_case)
    combination.moments.update(torch.tensor([[0.0, 90.0], [2.0, 110.0]]))  # means 1 and 100, std 1 and 10
    scores = torch.tensor([[3.0, 100.0], [2.0, 130.0]])  # at that scale (2, 0) and (1, 3)
    assert combination(scores).tolist() == [0.0, 2.0]
    assert combination.spread(scores).tolist() == [1.0, 1.0]  # type: ignore[union-attr]
    assert Combination([2.0], members=2, combine=worst_case)(scores).tolist() == [6.0, 4.0]
    assert Combination([1.0]).spread(scores) is None


def test_correlations() -> None:
    by_function = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [4.0, NAN, 3.0], [3.0, 0.0, 3.0]])
    by_pair = correlations(by_function, ["a", "b", "c"])
    assert by_pair == pytest.approx({"a~b": statistics.correlation([1, 2, 3], [2, 1, 0]), "a~c": 0.0, "b~c": 0.0})
    assert correlations(by_function[:1], ["a", "b", "c"]) == {"a~b": 0.0, "a~c": 0.0, "b~c": 0.0}
