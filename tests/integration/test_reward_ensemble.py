"""PPO with several reward roles, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, rows_with, trained_state
from tests.parity.tiny import save_reward_adapter
from trl_ext import PPOTrainer, SharedBase
from trl_ext.ppo import evidence
from trl_ext.ppo.collector import Collector
from trl_ext.ppo.evidence import TWINS


def base_with(tmp_path: Path, members: int) -> SharedBase:
    model = Path(saved_model(tmp_path / "model"))
    folders = [save_reward_adapter(tmp_path / str(i), model, seed=3 + i) for i in range(members)]
    torch.manual_seed(0)
    return SharedBase.from_pretrained(str(model), policy=LORA, reward=folders)


def trainer_of(tmp_path: Path, members: int = 2, reward: Any = None, **changes: Any) -> PPOTrainer:
    settings = {"score_normalization": "reference", **changes}
    if settings["score_normalization"] == "reference":
        settings["normalization_samples"] = 16
    args, data = config(tmp_path / "out", **settings), prompt_dataset(32)
    return PPOTrainer(base_with(tmp_path, members), reward, args, data, processing_class=word_tokenizer())


@pytest.mark.parametrize("members", [1, 2])
def test_evidence_scores_only_what_reward_roles_have_not_scored(
    members: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second completions and other rows' prompts; what they are compared with is what the rollout was scored by."""
    passes, plain, compared = [], Collector.score_pass, []
    within = evidence._within

    def counted(self: Collector, rollout: Any, roles: Any = None) -> Any:
        passes.append((len(rollout.prompts), roles))
        return plain(self, rollout, roles) if roles is not None else plain(self, rollout)

    def seen(scores: torch.Tensor, groups: torch.Tensor) -> dict[str, float]:
        compared.append(scores)
        return within(scores, groups)

    monkeypatch.setattr(Collector, "score_pass", counted)
    monkeypatch.setattr(evidence, "_within", seen)
    settings = {"per_device_train_batch_size": 16, "total_episodes": 16, "score_normalization": "none"}
    trainer = trainer_of(tmp_path, members, num_mini_batches=1, **settings)
    trainer.train()
    assert [rows for rows, roles in passes if roles == ["reward"]] == [TWINS, TWINS]
    own, others = compared[-1].chunk(2)
    assert trainer.experience is not None
    known = trainer.experience.scores.total.tolist()
    assert 4 < len(own) == len(others)
    assert all(min(abs(score - one) for one in known) < 1e-6 for score in own.tolist())
    assert not all(min(abs(score - one) for one in known) < 1e-6 for score in others.tolist())


@pytest.mark.parametrize("how", ["mean", "min", "uncertainty"])
def test_two_updates_by_the_scores_of_two_reward_roles(how: str, tmp_path: Path) -> None:
    """Each is brought to mean 0 and standard deviation 1 of the reference's completions before they are combined."""
    coef = {"reward_uncertainty_coef": 1.5} if how == "uncertainty" else {}
    trainer = trainer_of(tmp_path, reward_ensemble=how, reward_weights=[2.0], **coef)
    before = trained_state(trainer)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.experience is not None
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained_state(trainer).items())
    scores, rollout = trainer.experience.scores, trainer.experience.rollout
    moments = trainer.collector.combination.moments.state_dict()
    assert moments["count"] == [16, 16]
    expected, spreads, means = [], [], []
    for row, (ids, mask) in enumerate(zip(rollout.input_ids, rollout.attention_mask, strict=True)):
        alone = ids[mask].unsqueeze(0).to(trainer.base.device)
        raw = [trainer.base.scores(alone, torch.ones_like(alone), role=f"reward_{i}").item() for i in range(2)]
        assert scores.by_function[row].tolist() == pytest.approx(raw, rel=1e-4, abs=1e-5)
        a, b = ((raw[i] - moments["mean"][i]) / (moments["squares"][i] / moments["count"][i]) ** 0.5 for i in range(2))
        # Of two the variance is (a - b)^2 / 4 and the standard deviation |a - b| / 2.
        totals = {"mean": (a + b) / 2, "min": min(a, b), "uncertainty": (a + b) / 2 - 1.5 * (a - b) ** 2 / 4}
        expected.append(2 * totals[how])
        spreads.append(abs(a - b) / 2)
        means.append(raw)
    assert scores.total.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert max(spreads) > 0.05, "the two disagree somewhere"
    last = rows_with(trainer, "objective/kl")[-1]
    assert last["objective/score_spread"] == pytest.approx(sum(spreads) / len(spreads), rel=1e-3)
    for i in range(2):
        mean = sum(raw[i] for raw in means) / len(means)
        assert last[f"rewards/reward_{i}/mean"] == pytest.approx(mean, rel=1e-3, abs=1e-4)
    assert "rewards/correlation/reward_0~reward_1" in last


def test_one_reward_role_logs_what_it_always_did(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, members=1, total_episodes=8)
    trainer.train()
    (row,) = rows_with(trainer, "objective/kl")
    assert "rewards/reward_role/mean" in row and "objective/score_spread" not in row
    assert trainer.experience is not None and trainer.experience.scores.spread is None


@pytest.mark.parametrize("normalization", ["reference", "running"])
def test_resuming_ends_where_an_unbroken_run_ends(normalization: str, tmp_path: Path) -> None:
    """In the middle of a rollout, to the bit; the checkpoint holds each reward role."""
    settings = {"total_episodes": 48, "num_mini_batches": 2, "save_strategy": "steps", "save_steps": 3}
    settings |= {"score_normalization": normalization, "reward_ensemble": "min"}
    whole = trainer_of(tmp_path, **settings)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    assert sorted(path.name for path in checkpoint.glob("reward*")) == ["reward_0", "reward_1"]
    resumed = trainer_of(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == 12
    expected = trained_state(whole)
    for name, tensor in trained_state(resumed).items():
        assert torch.equal(tensor, expected[name]), name
    same = ("loss", "objective/scores", "objective/score_spread", "rewards/reward_1/mean")
    for row, other in zip(rows_with(whole, "objective/kl")[1:], rows_with(resumed, "objective/kl")[-2:], strict=True):
        assert {key: row[key] for key in same} == {key: other[key] for key in same}
    fewer = trainer_of(tmp_path, members=3, **settings)
    with pytest.raises(ValueError, match="moments are of 2 reward functions, but the run has 3"):
        fewer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("members", "changes", "words"),
    [
        (1, {"reward_ensemble": "min"}, "is 'min', but there is one reward role: give SharedBase several"),
        (2, {"reward_ensemble": "min", "reward": cats}, "'min', but reward functions score: give"),
        (2, {"reward_ensemble": "min", "score_normalization": "none"}, "set score_normalization to 'reference' or"),
        (2, {"reward_ensemble": "median"}, "reward_ensemble is 'median': choose one of mean, min, uncertainty"),
        (2, {"reward_uncertainty_coef": -1.0}, "reward_uncertainty_coef is -1.0: it must be at least 0"),
        (2, {"reward_weights": [1.0, 1.0]}, "reward_weights has 2 entries for 1 reward functions"),
    ],
)
def test_refusals_are_one_sentence(members: int, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as error:
        trainer_of(tmp_path, members=members, **changes)
    assert "\n" not in str(error.value)
