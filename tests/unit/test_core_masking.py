"""Masked statistics against the standard library's `statistics`, and the layout of padded rows."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from trl_ext.core import last_true, left_align, masked_mean, masked_sum, masked_var, masked_whiten

NAN, INF = float("nan"), float("inf")

# Padding on the right, on the left, on both sides, in the middle, everywhere; what lies under it must not matter.
VALUES = [
    [1.5, -2.0, 0.25, NAN],
    [INF, 4.0, -7.5, 3.0],
    [NAN, 11.0, 0.5, -INF],
    [2.0, NAN, NAN, -9.0],
    [NAN, INF, -INF, NAN],
]
MASK = [
    [True, True, True, False],
    [False, True, True, True],
    [False, True, True, False],
    [True, False, False, True],
    [False, False, False, False],
]
ROWS = [[1.5, -2.0, 0.25], [4.0, -7.5, 3.0], [11.0, 0.5], [2.0, -9.0], []]
REAL = [x for row in ROWS for x in row]


@pytest.fixture
def x() -> Tensor:
    return torch.tensor(VALUES, dtype=torch.float64)


@pytest.fixture
def mask() -> Tensor:
    return torch.tensor(MASK)


def test_sum_and_mean_see_real_positions_only(x: Tensor, mask: Tensor) -> None:
    assert masked_sum(x, mask).item() == pytest.approx(math.fsum(REAL), rel=1e-14)
    assert masked_mean(x, mask).item() == pytest.approx(statistics.fmean(REAL), rel=1e-14)


@pytest.mark.parametrize("dim", [1, -1])
def test_sum_and_mean_of_each_row(x: Tensor, mask: Tensor, dim: int) -> None:
    assert masked_sum(x, mask, dim=dim).tolist() == pytest.approx([sum(row) for row in ROWS], rel=1e-14)
    expected = [statistics.fmean(row) if row else 0.0 for row in ROWS]  # an empty selection has mean 0
    assert masked_mean(x, mask, dim=dim).tolist() == pytest.approx(expected, rel=1e-14)


def test_mean_of_each_column(x: Tensor, mask: Tensor) -> None:
    columns = [[1.5, 2.0], [-2.0, 4.0, 11.0], [0.25, -7.5, 0.5], [3.0, -9.0]]
    assert masked_mean(x, mask, dim=0).tolist() == pytest.approx([statistics.fmean(c) for c in columns], rel=1e-14)


def test_variance_is_bessel_corrected_unless_told(x: Tensor, mask: Tensor) -> None:
    assert masked_var(x, mask).item() == pytest.approx(statistics.variance(REAL), rel=1e-13)
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(statistics.pvariance(REAL), rel=1e-13)


@pytest.mark.parametrize("real", [0, 1])
@pytest.mark.parametrize("unbiased", [True, False])
def test_variance_of_one_or_no_number_is_zero(real: int, unbiased: bool) -> None:
    mask = torch.arange(3).unsqueeze(0) < real
    x = torch.tensor([[5.0 if real else NAN, NAN, INF]])
    assert masked_var(x, mask, unbiased).item() == 0.0
    assert masked_mean(x, mask).item() == (5.0 if real else 0.0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_the_standard_score(x: Tensor, mask: Tensor, shift_mean: bool) -> None:
    mean, deviation = statistics.fmean(REAL), statistics.stdev(REAL)
    offset = 0.0 if shift_mean else mean
    expected = [
        [(v - mean) / deviation + offset if real else 0.0 for v, real in zip(values, row, strict=True)]
        for values, row in zip(VALUES, MASK, strict=True)
    ]
    whitened = masked_whiten(x, mask, shift_mean=shift_mean, eps=0.0)
    torch.testing.assert_close(whitened, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_whitening_adds_eps_to_the_variance() -> None:
    # mean 2, variance ((1-2)^2 + (3-2)^2) / (2 - 1) = 2; eps 7 makes 9: divide by 3.
    whitened = masked_whiten(torch.tensor([[1.0, 3.0, NAN]]), torch.tensor([[True, True, False]]), eps=7.0)
    torch.testing.assert_close(whitened, torch.tensor([[-1 / 3, 1 / 3, 0.0]]))


def test_whitening_shifts_the_mean_unless_told(x: Tensor, mask: Tensor) -> None:
    assert torch.equal(masked_whiten(x, mask), masked_whiten(x, mask, shift_mean=True))


def test_whitening_a_constant_stays_finite() -> None:
    mask = torch.tensor([[True, True, False]])
    constant = torch.tensor([[4.0, 4.0, NAN]])
    assert masked_whiten(constant, mask).tolist() == [[0.0, 0.0, 0.0]]
    assert masked_whiten(constant, mask, shift_mean=False).tolist() == [[4.0, 4.0, 0.0]]


def test_integer_masks_work_like_bool_masks(x: Tensor, mask: Tensor) -> None:
    ints = mask.long()
    assert masked_mean(x, ints).item() == pytest.approx(statistics.fmean(REAL), rel=1e-14)
    assert masked_var(x, ints).item() == pytest.approx(statistics.variance(REAL), rel=1e-13)
    assert masked_whiten(x, ints)[~mask].tolist() == [0.0] * 10
    assert last_true(ints).tolist() == [2, 3, 2, 3, -1]


def test_gradient_of_the_mean_is_one_over_the_count(x: Tensor, mask: Tensor) -> None:
    x.requires_grad_()
    masked_mean(x, mask).backward()
    assert x.grad is not None
    assert x.grad[mask].tolist() == pytest.approx([1 / 10] * 10)
    assert x.grad[~mask].tolist() == [0.0] * 10  # NaN under the mask gives no NaN gradient


def test_last_true() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert last_true(mask).tolist() == [1, -1, 3, 0, 3]


def test_left_align_moves_padding_right_and_keeps_the_order_of_tokens() -> None:
    ids = torch.tensor([[9, 9, 1, 2, 3], [4, 5, 9, 9, 9], [9, 6, 9, 7, 8], [9, 9, 9, 9, 9]])
    mask = ids != 9
    order, aligned = left_align(mask)
    assert aligned.tolist() == [[True] * 3, [True, True, False], [True] * 3, [False] * 3]
    moved = ids.gather(1, order)
    assert [row[keep].tolist() for row, keep in zip(moved, aligned, strict=True)] == [[1, 2, 3], [4, 5], [6, 7, 8], []]


def test_left_align_keeps_the_order_of_long_rows() -> None:
    # Long enough for a sort that is not stable to show.
    mask = torch.arange(3000).unsqueeze(0) % 3 != 0
    order, aligned = left_align(mask)
    assert order.tolist() == [[i for i in range(3000) if i % 3 != 0]]
    assert bool(aligned.all())


def test_left_align_of_no_rows_and_of_rows_without_tokens() -> None:
    for mask, shape in ((torch.zeros(0, 4, dtype=torch.bool), (0, 0)), (torch.zeros(2, 4, dtype=torch.bool), (2, 0))):
        order, aligned = left_align(mask)
        assert tuple(order.shape) == tuple(aligned.shape) == shape
