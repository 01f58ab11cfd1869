"""The two losses against loops in plain Python, their gradients against derivatives taken by hand."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from trl_ext.core import clipped_policy_loss, clipped_value_loss, policy_clipped, probability_ratio, value_clipped

NAN, INF = float("nan"), float("inf")
CLIP = 0.2


class Token(NamedTuple):
    """One token, and what the derivative of its term is, worked out by hand."""

    new: float
    old: float
    target: float
    slope: float
    clipped: bool


LOG_RATIOS = {"up": math.log(1.5), "down": math.log(0.5), "inside": math.log(1.1)}

# term = max(-A r, -A clip(r)); where the first wins, d term / d logprob = -A r; where the second wins, 0.
POLICY = [
    Token(-1 + LOG_RATIOS["up"], -1, 2.0, 0.0, True),  # better already, and further than allowed: no more push
    Token(-1 + LOG_RATIOS["up"], -1, -2.0, 2.0 * 1.5, False),  # likelier though worse: pushed back in full
    Token(-1 + LOG_RATIOS["down"], -1, 2.0, -2.0 * 0.5, False),  # rarer though better: pushed back in full
    Token(-1 + LOG_RATIOS["down"], -1, -2.0, 0.0, True),
    Token(-1 + LOG_RATIOS["inside"], -1, 3.0, -3.0 * 1.1, False),
    Token(-1 + LOG_RATIOS["inside"], -1, -3.0, 3.0 * 1.1, False),
    Token(-1, -1, 1.0, -1.0, False),  # where every update starts
    Token(-1, -1, 0.0, 0.0, False),
]

# term = 1/2 max((V - R)^2, (clip(V) - R)^2); where the first wins, d term / d V = V - R; where the second wins, 0.
VALUE = [
    Token(1.0, 0.5, 2.0, 0.0, True),  # on its way to R, and further than allowed (clip(V) = 0.7)
    Token(1.0, 0.5, -1.0, 2.0, False),  # away from R: pulled back in full
    Token(0.0, 0.5, -1.0, 0.0, True),  # clip(V) = 0.3
    Token(0.0, 0.5, 1.0, -1.0, False),
    Token(0.6, 0.5, 2.0, -1.4, False),  # a step within the range
    Token(0.5, 0.5, 0.5, 0.0, False),
]


def policy_term(t: Token) -> float:
    ratio = math.exp(t.new - t.old)
    return max(-t.target * ratio, -t.target * min(max(ratio, 1 - CLIP), 1 + CLIP))


def value_term(t: Token) -> float:
    bounded = min(max(t.new, t.old - CLIP), t.old + CLIP)
    return 0.5 * max((t.new - t.target) ** 2, (bounded - t.target) ** 2)


KINDS = {
    "policy": (POLICY, policy_term, clipped_policy_loss, policy_clipped),
    "value": (VALUE, value_term, clipped_value_loss, value_clipped),
}


def padded(tokens: list[Token], width: int, garbage: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tokens in rows of ragged length, `garbage` wherever there is no token: new, old, target, mask."""
    rows, rest, length = [], list(tokens), width
    while rest:
        rows.append(rest[:length])
        rest, length = rest[length:], max(1, length - 1)
    columns = [
        [[row[i][column] if i < len(row) else garbage for i in range(width)] for row in rows] for column in range(3)
    ]
    new, old, target = (torch.tensor(column, dtype=torch.float64) for column in columns)
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return new, old, target, mask


@pytest.mark.parametrize("garbage", [0.0, 3.0, NAN, INF, -INF])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_by_hand(kind: str, garbage: float) -> None:
    tokens, term, loss_of, _ = KINDS[kind]
    new, old, target, mask = padded(tokens, 4, garbage)
    new.requires_grad_()
    loss = loss_of(new, old, target, mask, CLIP)
    assert loss.item() == pytest.approx(math.fsum(map(term, tokens)) / len(tokens), rel=1e-12)
    loss.backward()
    assert new.grad is not None
    expected = [token.slope / len(tokens) for token in tokens]
    assert new.grad[mask].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert new.grad[~mask].tolist() == [0.0] * int((~mask).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_finite_differences(kind: str) -> None:
    """The slopes in the tables are those of the loops, too."""
    tokens, term, _, _ = KINDS[kind]
    for token in tokens[:-1] if kind == "policy" else tokens:
        step = 1e-6
        up, down = (term(token._replace(new=token.new + sign * step)) for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(token.slope, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [0.0, NAN, INF])
def test_which_tokens_are_clipped(kind: str, garbage: float) -> None:
    tokens, _, _, clipped_of = KINDS[kind]
    new, old, target, mask = padded(tokens, 4, garbage)
    clipped = clipped_of(new, old, target, mask, CLIP)
    assert clipped[mask].tolist() == [token.clipped for token in tokens]
    assert not clipped[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_exactly_where_it_says_clipped(kind: str) -> None:
    _, _, loss_of, clipped_of = KINDS[kind]
    generator = torch.Generator().manual_seed(11)
    new, old, target = (torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(8, 16, generator=generator) < 0.7
    new.requires_grad_()
    loss_of(new, old, target, mask, CLIP).backward()
    assert new.grad is not None
    clipped = clipped_of(new.detach(), old, target, mask, CLIP)
    assert 10 < int(clipped.sum()) < int(mask.sum()) - 10  # both kinds occur
    assert torch.equal(new.grad == 0, clipped | ~mask)


@pytest.mark.parametrize("kind", KINDS)
def test_default_range_is_02(kind: str) -> None:
    tokens, term, loss_of, _ = KINDS[kind]
    new, old, target, mask = padded(tokens, 4, 0.0)
    assert loss_of(new, old, target, mask).item() == pytest.approx(math.fsum(map(term, tokens)) / len(tokens))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [[1, 1, 1, 1, 1, 1], [4, 2], [6], [2, 3, 1]])
def test_shares_of_micro_batches_add_up(kind: str, cuts: list[int]) -> None:
    """However unequal the micro-batches' token counts are, their losses and gradients sum to the minibatch's."""
    _, term, loss_of, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(5)
    new, old, target = (torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 2, 0, 5]).unsqueeze(1)
    picked = zip(new[mask].tolist(), old[mask].tolist(), target[mask].tolist(), strict=True)
    expected = math.fsum(term(Token(*values, 0.0, False)) for values in picked) / 18

    new.requires_grad_()
    num_tokens = mask.sum() if len(cuts) % 2 else 18  # a tensor and a plain number alike
    parts = [tensor.split(cuts) for tensor in (new, old, target, mask)]
    shares = [loss_of(*part, CLIP, num_tokens) for part in zip(*parts, strict=True)]
    total = torch.stack(shares).sum()
    assert total.item() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(total, new)
    (at_once,) = torch.autograd.grad(loss_of(new, old, target, mask, CLIP), new)
    torch.testing.assert_close(gradient, at_once, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_train_on(kind: str) -> None:
    _, _, loss_of, _ = KINDS[kind]
    new = torch.full((2, 3), NAN, requires_grad=True)
    loss = loss_of(new, torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert new.grad is not None
    assert new.grad.tolist() == [[0.0] * 3] * 2


def test_probability_ratio() -> None:
    new, old = torch.tensor([[math.log(0.3), NAN, INF]]), torch.tensor([[math.log(0.2), -1.0, INF]])
    ratio = probability_ratio(new, old, torch.tensor([[True, False, False]]))
    torch.testing.assert_close(ratio, torch.tensor([[1.5, 1.0, 1.0]]))
