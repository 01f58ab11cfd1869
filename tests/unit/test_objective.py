"""The update's two losses as the trainer takes them, and the numbers that are watched beside them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import PLACE, rollout
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.objectives import Objective, policy_loss, value_loss
from trl_ext.types import Experience, ScorePass, Scores

LENGTHS = [4, 2, 3]
PENALTY = 0.7
NUM_TOKENS = 20  # of a minibatch that this micro-batch is a part of


@pytest.fixture
def args(tmp_path: Path) -> PPOConfig:
    return PPOConfig(
        str(tmp_path),
        **PLACE,
        report_to="none",
        cliprange=0.1,
        cliprange_value=0.3,
        vf_coef=0.5,
        kl_estimator="k1",
    )


@pytest.fixture
def batch() -> Experience:
    answers = rollout(LENGTHS, [False, True, True])
    generator = torch.Generator().manual_seed(2)
    old, reference, values, advantages, returns = (
        torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    zeros = torch.zeros(3, 4, dtype=torch.float64)
    loss_mask = answers.completion_mask.clone()
    loss_mask[1] = False  # a row without a score
    pass_ = ScorePass(old - 2, zeros, reference - 2, values, zeros[:, 0])
    scores = Scores(zeros[:, 0], zeros[:, :1])
    return Experience(answers, scores, pass_, zeros, zeros, loss_mask, advantages, returns)


@pytest.fixture
def said(batch: Experience) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    new, values, entropy = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return {
        "logprobs": (batch.score_pass.logprobs + 0.2 * new).requires_grad_(),
        "values": (batch.score_pass.values + 1.5 * values).requires_grad_(),
        "entropy": entropy.abs(),
    }


def tokens(mask: Tensor, *columns: Tensor) -> list[tuple[float, ...]]:
    return list(zip(*(column.detach()[mask].tolist() for column in columns), strict=True))


def test_policy(batch: Experience, said: dict[str, Tensor], args: PPOConfig) -> None:
    loss, watched = policy_loss(args.policy_objective, batch, said, torch.tensor(NUM_TOKENS), args, PENALTY)
    terms, log_ratios, clipped = [], [], []
    for new, old, advantage in tokens(batch.loss_mask, said["logprobs"], batch.score_pass.logprobs, batch.advantages):
        ratio = math.exp(new - old)
        bounded = min(max(ratio, 0.9), 1.1)
        terms.append(max(-advantage * ratio, -advantage * bounded))
        log_ratios.append(new - old)
        clipped.append(-advantage * bounded > -advantage * ratio)
    assert len(terms) == 7
    assert 0 < sum(clipped) < 7
    assert loss.item() == pytest.approx(math.fsum(terms) / NUM_TOKENS, rel=1e-12)
    expected = {
        "policy/approxkl_avg": [d * d / 2 for d in log_ratios],
        "policy/clipfrac_avg": [float(c) for c in clipped],
        "policy/entropy_avg": said["entropy"][batch.loss_mask].tolist(),
        "loss/policy_avg": terms,
        "val/ratio": [math.exp(d) for d in log_ratios],
    }
    assert watched.keys() == expected.keys()
    for name, values in expected.items():
        assert watched[name][batch.loss_mask].tolist() == pytest.approx(values, rel=1e-12), name
        assert not watched[name].requires_grad, name
    loss.backward()
    assert said["logprobs"].grad is not None
    assert torch.equal(said["logprobs"].grad[batch.loss_mask] == 0, torch.tensor(clipped))
    assert not said["logprobs"].grad[~batch.loss_mask].any()


@pytest.mark.parametrize(
    ("settings", "term"),
    [
        (
            {"objective": "kl_penalty", "penalty_coef": 9.0},
            lambda x, a, new: -a * math.exp(x) + PENALTY * (math.exp(x) - 1 - x),
        ),
        ({"objective": "reinforce", "num_ppo_epochs": 1}, lambda x, a, new: -a * new),
        (
            {"objective": "sequence", "cliprange": 0.1},
            lambda x, a, new: max(-a * math.exp(x), -a * min(max(math.exp(x), 0.9), 1.1)),
        ),
        (
            {"dual_clip": 1.05, "cliprange": 0.1},
            lambda x, a, new: (
                min(max(-a * math.exp(x), -a * max(math.exp(x), 0.9)), -a * 1.05)
                if a < 0
                else -a * min(math.exp(x), 1.1)
            ),
        ),
    ],
    ids=["kl_penalty", "reinforce", "sequence", "dual_clip"],
)
@pytest.mark.parametrize("bonus", [0.0, 0.3])
def test_every_other_objective(
    settings: dict[str, Any], term: Any, bonus: float, batch: Experience, said: dict[str, Tensor], tmp_path: Path
) -> None:
    args = PPOConfig(str(tmp_path), **PLACE, report_to="none", entropy_coef=bonus, **settings)
    loss, watched = policy_loss(args.policy_objective, batch, said, torch.tensor(NUM_TOKENS), args, PENALTY)
    columns = (said["logprobs"], batch.score_pass.logprobs, batch.advantages, said["entropy"])
    rows = tokens(batch.loss_mask, *columns)
    terms = [term(new - old, advantage, new) for new, old, advantage, _ in rows]
    assert watched["loss/policy_avg"][batch.loss_mask].tolist() == pytest.approx(terms, rel=1e-12)
    entropies = [entropy for *_, entropy in rows]
    expected = math.fsum(t - bonus * entropy for t, entropy in zip(terms, entropies, strict=True)) / NUM_TOKENS
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    if "dual_clip" in settings:
        assert any(a < 0 and -a * math.exp(new - old) > -a * 1.05 for new, old, a, _ in rows), "it makes a difference"


@pytest.mark.parametrize(
    ("mode", "bounds", "weight"),
    [
        ("token_truncate", {"clip_max": 1.5}, lambda own, all_: min(own, 1.5)),
        ("token_mask", {"clip_max": 1.5, "clip_min": 0.7}, lambda own, all_: own if 0.7 <= own <= 1.5 else 0.0),
        ("sequence_truncate", {"clip_max": 1.5, "clip_min": 0.7}, lambda own, all_: min(max(all_, 0.7), 1.5)),
        ("sequence_mask", {"clip_max": 1.5}, lambda own, all_: all_ if all_ <= 1.5 else 0.0),
    ],
)
@pytest.mark.parametrize("objective", ["clip", "kl_penalty", "reinforce", "sequence", "own"])
def test_every_objectives_terms_are_weighed(
    objective: str, mode: str, bounds: dict[str, float], weight: Any, batch: Experience, said: Any, tmp_path: Path
) -> None:
    """Each token's term times what the token counts; a row without a score counts for nobody."""

    class Own(Objective):
        def terms(self, logprobs: Tensor, batch: Experience, args: Any, coef: float) -> Tensor:
            return 3 * logprobs

    settings: Any = {"objective": Own() if objective == "own" else objective, "num_ppo_epochs": 1}
    settings |= {f"vllm_importance_sampling_{name}": x for name, x in {"mode": mode, **bounds}.items()}
    args = PPOConfig(str(tmp_path), **PLACE, report_to="none", entropy_coef=0.3, **settings)
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(39), dtype=torch.float64)
    told = batch.score_pass.logprobs - 0.4 * noise
    corrected = replace(batch, rollout=replace(batch.rollout, sampling_logprobs=told))
    num_tokens = torch.tensor(NUM_TOKENS)
    _, plain = policy_loss(args.policy_objective, batch, said, num_tokens, args, PENALTY)
    loss, watched = policy_loss(args.policy_objective, corrected, said, num_tokens, args, PENALTY)
    expected, weights = [], []
    for row in range(3):
        mask = batch.loss_mask[row]
        ratios = [math.exp(0.4 * x) for x in noise[row][mask].tolist()]
        for own, term in zip(ratios, plain["loss/policy_avg"][row][mask].tolist(), strict=True):
            weights.append(weight(own, math.prod(ratios)))
            expected.append(weights[-1] * term)
    assert len(weights) == 7 and len(set(weights)) > 1
    assert watched["loss/policy_avg"][batch.loss_mask].tolist() == pytest.approx(expected, rel=1e-9)
    bonus = 0.3 * math.fsum(said["entropy"][batch.loss_mask].tolist())
    assert loss.item() == pytest.approx((math.fsum(expected) - bonus) / NUM_TOKENS, rel=1e-9)
    args.vllm_importance_sampling_correction = False
    _, off = policy_loss(args.policy_objective, corrected, said, num_tokens, args, PENALTY)
    assert torch.equal(off["loss/policy_avg"], plain["loss/policy_avg"])


def test_value(batch: Experience, said: dict[str, Tensor], args: PPOConfig) -> None:
    loss, watched = value_loss(batch, said, torch.tensor(NUM_TOKENS), args)
    terms, clipped = [], []
    for new, old, target in tokens(batch.loss_mask, said["values"], batch.score_pass.values, batch.returns):
        bounded = min(max(new, old - 0.3), old + 0.3)
        terms.append(0.5 * max((new - target) ** 2, (bounded - target) ** 2))
        clipped.append((bounded - target) ** 2 > (new - target) ** 2)
    assert 0 < sum(clipped) < 7
    assert loss.item() == pytest.approx(0.5 * math.fsum(terms) / NUM_TOKENS, rel=1e-12)  # vf_coef
    expected = {"loss/value_avg": terms, "val/clipfrac_avg": [float(c) for c in clipped]}
    assert watched.keys() == expected.keys()
    for name, values in expected.items():
        assert watched[name][batch.loss_mask].tolist() == pytest.approx(values, rel=1e-12), name
        assert not watched[name].requires_grad, name
    loss.backward()
    assert said["values"].grad is not None
    assert torch.equal(said["values"].grad[batch.loss_mask] == 0, torch.tensor(clipped))
    assert not said["values"].grad[~batch.loss_mask].any()


def test_a_step_down_the_gradient_makes_good_tokens_likelier(batch: Experience, args: PPOConfig) -> None:
    """At the start of an update, where new and old are equal, the slope is -advantage / tokens."""
    logprobs = batch.score_pass.logprobs.clone().requires_grad_()
    loss, _ = policy_loss(
        args.policy_objective,
        batch,
        {"logprobs": logprobs, "entropy": logprobs.detach()},
        torch.tensor(NUM_TOKENS),
        args,
        PENALTY,
    )
    loss.backward()
    assert logprobs.grad is not None
    expected = [-a / NUM_TOKENS for a in batch.advantages[batch.loss_mask].tolist()]
    assert logprobs.grad[batch.loss_mask].tolist() == pytest.approx(expected, rel=1e-12)
