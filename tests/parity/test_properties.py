"""Padding, order and batch never matter: whatever hypothesis thinks of, the same numbers come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import DEVICE, PLACE, TOLERANCE
from tests.parity import tiny
from trl_ext import PPOConfig, SharedBase
from trl_ext.ppo.objectives import policy_loss, value_loss
from trl_ext.roles import Role
from trl_ext.types import Experience, Rollout, ScorePass, Scores, concatenate

ROLES: tuple[Role, ...] = ("policy", "reference", "value", "reward")
OBJECTIVES = ("clip", "kl_penalty", "reinforce", "sequence")
# The same cases every time; a base that examples share is only read.
thorough = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Layout:
    """How the same rows are laid out.

    Attributes:
        lengths: prompt and completion tokens, a row each.
        order: of the rows.
        parts: rows a micro-batch.
        before, after: columns of padding more, left of the prompts and right of the completions.
        seed: of the tokens.
    """

    lengths: list[tuple[int, int]]
    order: list[int]
    parts: int
    before: int
    after: int
    seed: int


@st.composite
def layouts(draw: Any) -> Layout:
    lengths = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=2, max_size=5))
    return Layout(
        lengths,
        draw(st.permutations(range(len(lengths)))),
        draw(st.integers(1, len(lengths))),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 1000)),
    )


def experience_of(prompt: int, answer: int, seed: int) -> Experience:
    """One row without padding; everything about it random."""
    generator = torch.Generator().manual_seed(seed)

    def ids(columns: int) -> Tensor:
        return torch.randint(3, tiny.VOCABULARY, (1, columns), generator=generator)

    def numbers() -> Tensor:
        return torch.randn(1, answer, generator=generator)

    mask = torch.ones(1, answer, dtype=torch.bool)
    rollout = Rollout(["p"], ["c"], ids(prompt), torch.ones(1, prompt).bool(), ids(answer), mask, torch.tensor([True]))
    pass_ = ScorePass(numbers() - 4, numbers().abs(), numbers() - 4, numbers(), torch.zeros(1))
    scores = Scores(torch.zeros(1), torch.zeros(1, 1))
    return Experience(rollout, scores, pass_, numbers(), numbers(), mask, numbers(), numbers()).to(DEVICE)


def padded(experience: Experience, before: int, after: int) -> Experience:
    """With so many columns of padding more on either side."""
    blank = experience_of(
        experience.rollout.prompt_ids.shape[1] + before, experience.loss_mask.shape[1] + after, seed=0
    )
    both = concatenate([experience, blank], tiny.PAD)
    return both.rows(torch.arange(len(experience.loss_mask), device=DEVICE))


def laid_out(layout: Layout) -> tuple[list[Experience], list[Experience]]:
    """The rows alone, and the micro-batches that the layout makes of them."""
    alone = [experience_of(p, a, layout.seed + i) for i, (p, a) in enumerate(layout.lengths)]
    whole = concatenate([alone[i] for i in layout.order], tiny.PAD)
    cut = torch.arange(len(alone)).split(layout.parts)
    return alone, [padded(whole.rows(rows), layout.before, layout.after) for rows in cut]


def said_of(base: SharedBase, batch: Experience) -> dict[str, Tensor]:
    rollout = batch.rollout
    return base(rollout.input_ids, rollout.attention_mask.long(), rollout.completion_ids.shape[1], roles=ROLES)


def trained_on(base: SharedBase, batches: list[Experience], args: PPOConfig) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one minibatch that is trained on in these micro-batches."""
    base.zero_grad()
    tokens, total = sum(batch.loss_mask.sum() for batch in batches), 0.0
    for batch in batches:
        rollout = batch.rollout
        for role in ("policy", "value"):
            said = base(
                rollout.input_ids, rollout.attention_mask.long(), rollout.completion_ids.shape[1], roles=(role,)
            )
            if role == "policy":
                loss, _ = policy_loss(args.policy_objective, batch, said, torch.as_tensor(tokens), args, 1.0)
            else:
                loss, _ = value_loss(batch, said, torch.as_tensor(tokens), args)
            loss.backward()
            total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tiny.Home:
    return tiny.build(tmp_path_factory.mktemp(request.param), tiny.config_of(request.param))


@thorough
@given(layout=layouts())
def test_what_the_roles_say(family: tiny.Home, layout: Layout) -> None:
    alone, batches = laid_out(layout)
    with torch.no_grad():
        expected = [said_of(family.base, row) for row in alone]
        got = [said_of(family.base, batch) for batch in batches]
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        tokens = torch.cat([said[name][batch.loss_mask] for said, batch in zip(got, batches, strict=True)])
        torch.testing.assert_close(tokens, torch.cat([expected[i][name][0] for i in layout.order]), **TOLERANCE)
        outside = [said[name][~batch.loss_mask] for said, batch in zip(got, batches, strict=True)]
        assert not torch.cat(outside).any(), f"{name} says something of padding"
    scores = torch.cat([said["scores"] for said in got])
    torch.testing.assert_close(scores, torch.cat([expected[i]["scores"] for i in layout.order]), **TOLERANCE)


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PPOConfig]:
    reads = {name: {} if name == "sequence" else {"vf_coef": 0.5} for name in OBJECTIVES}
    reads["reinforce"]["baseline"] = "value"
    settings = {**PLACE, "num_ppo_epochs": 1}
    return {
        name: PPOConfig(str(tmp_path_factory.mktemp("out")), objective=name, **settings, **reads[name])
        for name in OBJECTIVES
    }


@thorough
@given(layout=layouts(), objective=st.sampled_from(OBJECTIVES))
def test_losses_and_gradients(family: tiny.Home, args: dict[str, PPOConfig], layout: Layout, objective: str) -> None:
    alone, batches = laid_out(layout)
    loss, gradients = trained_on(family.base, batches, args[objective])
    expected_loss, expected = trained_on(family.base, alone, args[objective])
    assert loss == pytest.approx(expected_loss, rel=TOLERANCE["rtol"], abs=TOLERANCE["atol"])
    assert gradients.keys() == expected.keys() and len(gradients) > 4
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, **{**TOLERANCE, "rtol": 10 * TOLERANCE["rtol"]})


def test_the_layouts_differ() -> None:
    """What the properties above compare is not the same to begin with."""
    layout = Layout([(3, 2), (1, 4)], [1, 0], 2, 2, 1, seed=5)
    alone, (batch,) = laid_out(layout)
    assert batch.rollout.input_ids.shape == (2, 3 + 2 + 4 + 1)
    assert batch.rollout.prompt_mask.sum(dim=1).tolist() == [1, 3] and batch.rollout.lengths.tolist() == [4, 2]
    assert torch.equal(batch.advantages[1, :2], alone[0].advantages[0])
    assert replace(layout, order=[0, 1]) != layout
