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


def held_out_loss(
    features: torch.Tensor, pairs: torch.Tensor, margins: torch.Tensor, penalty: float, folds: list[int]
) -> float:
    """Sum over folds of the mean loss on pairs inside, after a fit (Newton's method) to those outside."""
    total = 0.0
    for fold in range(3):
        rows: dict[bool, list[tuple[torch.Tensor, float]]] = {True: [], False: []}
        for (better, worse), margin in zip(pairs.tolist(), margins.tolist(), strict=True):
            if (folds[better] == fold) == (folds[worse] == fold):
                rows[folds[better] == fold].append((features[better] - features[worse], margin))
        differences = torch.stack([d for d, _ in rows[False]]).double()
        scale, w = differences.pow(2).mean(0).sqrt(), torch.zeros(features.shape[1], dtype=torch.float64)
        scaled, margin = differences / scale, torch.tensor([m for _, m in rows[False]], dtype=torch.float64)
        for _ in range(30):
            p = torch.sigmoid(margin - scaled @ w)
            gradient = -(scaled.T @ p) / len(p) + 2 * penalty * w
            hessian = (scaled.T * (p * (1 - p))) @ scaled / len(p) + 2 * penalty * torch.eye(len(w))
            w = w - torch.linalg.solve(hessian, gradient)
        gaps = [float(d.double() @ (w / scale)) - m for d, m in rows[True]]
        total += sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_the_penalty_is_the_best_of_all_on_answers_held_out(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    worth = torch.randn(24, generator=generator)
    told = worth.unsqueeze(1) + (0.3 + 0.3 * seed) * torch.randn(24, 2, generator=generator)
    features = torch.cat([told, torch.randn(24, 3, generator=generator)], 1) * torch.tensor([1.0, 5.0, 0.01, 1.0, 3.0])
    drawn = torch.randint(24, (90, 2), generator=generator).tolist()
    pairs = torch.tensor([(i, j) if worth[i] > worth[j] else (j, i) for i, j in drawn if i != j])
    margins = 0.2 * torch.rand(len(pairs), generator=generator)
    folds = (torch.randperm(24, generator=torch.Generator().manual_seed(0)) % 3).tolist()
    losses = {penalty: held_out_loss(features, pairs, margins, penalty, folds) for penalty in (1.0, 0.1, 0.03, 0.01)}
    ordered = sorted(losses.values())
    assert ordered[1] - ordered[0] > 1e-6  # no tie
    assert choose_penalty(features, pairs, margins, tuple(losses)) == min(losses, key=losses.__getitem__)


def test_the_search_ends_after_two_penalties_that_do_worse() -> None:
    """The last of these is the best, but it comes too late."""
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(24, generator=generator)
    features = worth.unsqueeze(1) + 0.2 * torch.randn(24, 1, generator=generator)
    pairs = torch.tensor([(i, j) for i in range(24) for j in range(24) if worth[i] > worth[j]])
    margins = torch.zeros(len(pairs))
    assert choose_penalty(features, pairs, margins, (0.1, 1.0, 1e-4)) == 1e-4
    assert choose_penalty(features, pairs, margins, (0.1, 1.0, 10.0, 1e-4)) == 0.1
    assert choose_penalty(features, pairs, margins, (1.0, 10.0, 0.1, 100.0, 1e-4)) == 1e-4


def test_a_start_changes_the_way_but_not_the_end() -> None:
    differences = torch.tensor([[1.0, 0.3], [2.0, -1.0], [-1.0, 0.5], [0.4, 0.4]])
    plain = fit_probe(differences, no_margin(4), 0.01)
    assert torch.allclose(fit_probe(differences, no_margin(4), 0.01, start=torch.tensor([5.0, -3.0])), plain, atol=1e-5)


def test_small_features_weigh_as_much_as_large_ones() -> None:
    differences = torch.tensor([[1.0]] * 8 + [[-1.0]] * 2)
    plain = fit_probe(differences, no_margin(10), penalty=0.1).item()
    assert fit_probe(differences / 1000, no_margin(10), penalty=0.1).item() == pytest.approx(plain * 1000, rel=1e-4)
