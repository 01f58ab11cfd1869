"""The linear probe, against closed forms and a search."""

import math

import pytest
import torch

from trl_ext.core.probe import PENALTIES, choose_penalty, fit_probe


def no_margin(count: int) -> torch.Tensor:
    return torch.zeros(count)


def test_one_feature_gives_the_log_odds() -> None:
    # Of ten pairs the better answer has more of the feature in eight: -0.8 log s(w) - 0.2 log s(-w) is least at log 4.
    differences = torch.tensor([[1.0]] * 8 + [[-1.0]] * 2)
    assert fit_probe(differences, no_margin(10), penalty=0.0).item() == pytest.approx(math.log(4), abs=1e-5)


def test_the_penalty_is_in_the_features_own_scale() -> None:
    differences = torch.tensor([[1.0]] * 8 + [[-1.0]] * 2)
    plain = fit_probe(differences, no_margin(10), penalty=0.1).item()
    assert 0 < plain < math.log(4)
    assert fit_probe(100 * differences, no_margin(10), penalty=0.1).item() == pytest.approx(plain / 100, rel=1e-4)


def test_margins_against_a_search() -> None:
    differences = torch.tensor([[1.0], [2.0], [-1.0]])
    margins = torch.tensor([0.5, 2.0, 0.0])

    def loss(w: float) -> float:
        return (
            sum(math.log(1 + math.exp(-(w * d - m))) for d, m in zip([1.0, 2.0, -1.0], margins.tolist(), strict=True))
            / 3
            + 0.01 * 2.0 * w**2
        )  # 2: the mean square of the differences

    best = min((i / 1000 for i in range(-3000, 6000)), key=loss)
    assert fit_probe(differences, margins, penalty=0.01).item() == pytest.approx(best, abs=2e-3)


def test_more_noise_than_answers_asks_for_a_larger_penalty() -> None:
    generator = torch.Generator().manual_seed(1)
    worth = torch.randn(60, generator=generator)
    telling = worth.unsqueeze(1) + 0.1 * torch.randn(60, 1, generator=generator)
    noisy = torch.cat(
        [telling + 2 * torch.randn(60, 1, generator=generator), torch.randn(60, 80, generator=generator)], 1
    )
    pairs = torch.tensor([(i, j) for i in range(60) for j in range(60) if worth[i] > worth[j]])
    clean = choose_penalty(telling, pairs, no_margin(len(pairs)))
    assert choose_penalty(noisy, pairs, no_margin(len(pairs))) > clean


def test_without_a_pair_to_validate_on_the_middle_is_taken() -> None:
    features = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert choose_penalty(features, torch.tensor([[0, 1]]), no_margin(1)) == PENALTIES[len(PENALTIES) // 2]
