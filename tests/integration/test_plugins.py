"""Callbacks, KL controllers, guards and objectives in real training runs on a tiny model."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.helpers import prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, rows_with, trained_state, trainer_for
from trl_ext import (
    AdaptiveKLCallback,
    AdaptiveKLController,
    PIKLController,
    PPOTrainer,
    RolloutCallback,
    SharedBase,
)
from trl_ext.callbacks import CallbackError
from trl_ext.generation import GenerationError, TransformersGenerator
from trl_ext.ppo import Objective
from trl_ext.ppo.failures import RunError
from trl_ext.ppo.metrics import name_taken
from trl_ext.ppo.objectives import Clip, ObjectiveError, Reinforce
from trl_ext.rewards import RewardError
from trl_ext.tokens import side_by_side

# Events --------------------------------------------------------------------------------------------------------------


class Recorder(RolloutCallback):
    """Writes down which event came, and what it saw."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_rollout_end(self, args: Any, state: Any, control: Any, rollout: Any) -> None:
        self.events.append(("rollout", rollout))

    def on_scores(self, args: Any, state: Any, control: Any, judged: Any) -> None:
        self.events.append(("scores", judged))

    def on_rewards(self, args: Any, state: Any, control: Any, shaped: Any) -> None:
        self.events.append(("rewards", shaped))

    def on_advantages(self, args: Any, state: Any, control: Any, experience: Any) -> None:
        self.events.append(("advantages", experience))

    def on_ppo_epoch_end(self, args: Any, state: Any, control: Any, experience: Any, stats: Any) -> None:
        self.events.append(("epoch", stats))

    def on_update_end(self, args: Any, state: Any, control: Any, experience: Any, metrics: Any) -> None:
        self.events.append(("update", metrics))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def test_events_come_in_the_order_of_the_sentence(tmp_path: Path) -> None:
    trainer, recorder = trainer_for(tmp_path, num_mini_batches=2, total_episodes=32), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    a_rollout = ["rollout", "scores", "rewards", "advantages", "epoch", "epoch", "update"]
    assert recorder.names == a_rollout * 2
    stats = [what for name, what in recorder.events if name == "epoch"]
    assert [s.epoch for s in stats] == [0, 1, 0, 1]
    assert [s.skipped for s in stats] == [0] * 4
    assert stats[0].ratio == pytest.approx(1.0, abs=0.2)
    assert stats[1].approxkl > 0
    metrics = [what for name, what in recorder.events if name == "update"]
    assert [m["objective/scores"] for m in metrics] == [r["objective/scores"] for r in rows_with(trainer, "eps")]


def test_each_epoch_averages_its_own_minibatches(tmp_path: Path) -> None:
    trainer, recorder = trainer_for(tmp_path, num_mini_batches=2, logging_steps=2), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    stats = [what for name, what in recorder.events if name == "epoch"]
    logged = rows_with(trainer, "policy/approxkl_avg")
    assert len(stats) == len(logged) == 2
    names = {
        "approxkl": "policy/approxkl_avg",
        "clipfrac": "policy/clipfrac_avg",
        "ratio": "val/ratio",
        "entropy": "policy/entropy_avg",
        "policy_loss": "loss/policy_avg",
        "value_loss": "loss/value_avg",
    }
    for stat, row in zip(stats, logged, strict=True):
        for field, name in names.items():
            assert getattr(stat, field) == pytest.approx(row[name], rel=1e-9), field
    assert len({round(value, 6) for value in vars(stats[1]).values()}) >= len(names), "no two are alike"


def test_a_callback_that_cannot_be_called_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    class Careless(RolloutCallback):
        def on_scores(self, batch: Any) -> None:
            """Asks for what no event comes with."""

    message = r"^Careless\.on_scores asks for 'batch', which this event does not come with"
    with pytest.raises(TypeError, match=message):
        PPOTrainer("no/such-model", cats, config(tmp_path), prompt_dataset(32), callbacks=[Careless()])
    trainer = trainer_for(tmp_path)
    for callback in (Careless(), Careless):
        with pytest.raises(TypeError, match=message):
            trainer.add_callback(callback)
    assert not any(isinstance(callback, Careless) for callback in trainer.callback_handler.callbacks)


# Objectives of one's own ---------------------------------------------------------------------------------------------


class Own(Clip):
    """PPO's, until `fails` says otherwise: a method's name, the rollout in which it fails, and what it does then."""

    def __init__(self, fails: str, rollout: int, instead: Any) -> None:
        self.fails, self.rollout, self.instead, self.made = fails, rollout, instead, 0

    def _made(self, method: str, value: Any) -> Any:
        self.made += method == "advantages"
        return self.instead(value) if method == self.fails and self.made > self.rollout else value

    def advantages(self, shaped: Any, args: Any) -> Any:
        return self._made("advantages", super().advantages(shaped, args))

    def terms(self, *arguments: Any) -> Any:
        return self._made("terms", super().terms(*arguments))

    def clipped(self, *arguments: Any) -> Any:
        return self._made("clipped", super().clipped(*arguments))

    def metrics(self, coef: float) -> Any:
        return self._made("metrics", {"own/metric": coef})

    def controller(self, args: Any) -> Any:
        return self._made("controller", super().controller(args))


def gone(value: Any) -> Any:
    raise KeyError("gone")


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize(
    ("method", "instead", "message"),
    [
        ("advantages", gone, r"raised KeyError: 'gone'"),
        ("advantages", lambda pair: pair[0], r"must return advantages and returns, two tensors of shape \(8, \d\)"),
        ("advantages", lambda pair: (pair[0][:, :1], pair[1]), r"must return advantages and returns"),
        ("advantages", lambda pair: (pair[0] / 0, pair[1]), r"must return finite numbers"),
        ("terms", gone, r"raised KeyError: 'gone'"),
        (
            "terms",
            lambda terms: terms.sum(dim=1, keepdim=True),
            r"must return a tensor of shape \(8, \d\) that carries",
        ),
        ("terms", lambda terms: terms.detach(), r"must return a tensor of shape \(8, \d\) that carries the gradient"),
        ("clipped", lambda clipped: clipped.float(), r"must return a tensor of bool of shape"),
        ("metrics", lambda metrics: list(metrics), r"must return a dict of numbers by name"),
        ("metrics", lambda _: {"objective/kl": 1.0}, r"returned 'objective/kl', which the trainer logs itself"),
        ("metrics", lambda _: {"val/ratio": 1.0}, r"returned 'val/ratio', which the trainer logs itself"),
    ],
)
def test_an_objective_that_fails_late_loses_nothing(tmp_path: Path, method: str, instead: Any, message: str) -> None:
    """And a run that resumes with one that is mended ends as if nothing had been."""

    def train(folder: Path, objective: Any, checkpoint: str | None = None) -> PPOTrainer:
        # Evidence would call the objective too, and calls are counted.
        settings = config(folder, total_episodes=24, logging_steps=3, objective=objective, evidence=False)
        trainer = PPOTrainer(model, cats, settings, prompt_dataset(32), None, word_tokenizer(), peft_config=LORA)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    model = saved_model(tmp_path / "model")
    whole = train(tmp_path / "whole", Own("", 0, None))
    # The rollout's last step has been taken where its metrics are asked for.
    steps = 4 if method == "metrics" else 2
    with pytest.raises(ObjectiveError, match=rf"^Own\.{method} {message}.*\. All {steps} steps before are saved in"):
        train(tmp_path / "out", Own(method, 1, instead))
    resumed = train(tmp_path / "out", Own("", 0, None), str(tmp_path / "out" / f"checkpoint-{steps}"))
    expected = trained_state(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_state(resumed).items())
    apart = ("time/", "memory/", "eps", "train_", "own/")
    for row, other in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        names = [name for name in row if not name.startswith(apart)]
        assert {name: row[name] for name in names} == {name: other.get(name) for name in names}


class Unmasked(Reinforce):
    """Advantages that are NaN where there is no score, as a user's may be."""

    def advantages(self, shaped: Any, args: Any) -> Any:
        advantages = shaped.scores.total.unsqueeze(1) * torch.where(shaped.loss_mask, 1.0, torch.nan)
        return advantages, advantages


def test_what_an_objective_makes_of_rows_without_a_score_reaches_no_gradient(tmp_path: Path) -> None:
    def some(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i == 0 else float(i) for i in range(len(completions))]

    trainer = trainer_for(tmp_path, reward=some, objective=Unmasked(), num_ppo_epochs=1, total_episodes=24)
    trainer.train()
    norms = [row["grad_norm"] for row in rows_with(trainer, "grad_norm")]
    assert norms and all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert all(row["policy/skipped_minibatches"] == 0 for row in rows_with(trainer, "policy/skipped_minibatches"))


def test_objectives_that_cannot_be(tmp_path: Path) -> None:
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)
    message = r"^Own\.controller must return a controller with value, update, state_dict and load_state_dict\.$"
    with pytest.raises(ObjectiveError, match=message):
        trainer_for(tmp_path, model=base, objective=Own("controller", -1, lambda controller: None))
    with pytest.raises(ValueError, match=r"^objective 'Objective' has no `terms`: write the method"):
        config(tmp_path, objective=Objective())


# Who answers ---------------------------------------------------------------------------------------------------------


class Told:
    """Answers as the base does, and claims half a nat less a token than the policy gives; or more and less in turn."""

    def __init__(self, base: SharedBase, in_turn: bool = False) -> None:
        self.base, self.inner, self.in_turn = base, TransformersGenerator(base, 8), in_turn

    def answers(self, prompt_ids: Any, config: Any, role: str) -> Any:
        ids, _ = self.inner.answers(prompt_ids, config, role)
        batch, mask, width = side_by_side(prompt_ids, ids)
        with torch.no_grad():
            logprobs = self.base.logprobs(batch, mask, width) - 0.5
        if self.in_turn:
            logprobs[:, ::2] += 1.0
        return ids, [row[: len(n)].tolist() for row, n in zip(logprobs, ids, strict=True)]


def test_a_generator_that_tells_its_log_probs_is_compared_with_the_policy(tmp_path: Path) -> None:
    """One that claims half a nat less a token than the policy gives is half a nat off, and says so."""
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)
    trainer = PPOTrainer(base, cats, config(tmp_path), prompt_dataset(32), None, word_tokenizer(), generator=Told(base))
    trainer.train()
    rows = rows_with(trainer, "objective/scores")
    assert [row["val/sampling_kl"] for row in rows] == pytest.approx([-0.5] * len(rows), abs=1e-5)
    assert [row["val/sampling_spread"] for row in rows] == pytest.approx([0.0] * len(rows), abs=1e-5)
    assert trainer.experience is not None and trainer.experience.rollout.sampling_logprobs is not None
    silent = trainer_for(tmp_path / "silent")
    silent.train()
    assert not rows_with(silent, "val/sampling_kl")


def test_a_generator_that_is_off_both_ways_is_seen_in_the_spread(tmp_path: Path) -> None:
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)
    told = Told(base, in_turn=True)
    trainer = PPOTrainer(base, cats, config(tmp_path), prompt_dataset(32), None, word_tokenizer(), generator=told)
    trainer.train()
    for row in rows_with(trainer, "objective/scores"):
        assert abs(row["val/sampling_kl"]) < 0.2
        # Each token is off by a half: mean square = 1/4 = mean^2 + spread^2.
        assert row["val/sampling_spread"] ** 2 + row["val/sampling_kl"] ** 2 == pytest.approx(0.25, abs=1e-4)


@pytest.mark.parametrize(("correction", "cut"), [(None, True), (True, True), (False, False)])
def test_what_another_sampler_made_too_often_is_weighed(correction: bool | None, cut: bool, tmp_path: Path) -> None:
    """Each token's ratio is e^0.5 by the sampler's word: above a bound of 1.5 all of them are cut, so that the policy
    learns nothing, and the value learns as ever."""
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)
    settings: Any = {"vllm_importance_sampling_correction": correction}
    if cut:
        settings |= {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_max": 1.5}
    args = config(tmp_path, **settings)
    trainer = PPOTrainer(base, cats, args, prompt_dataset(32), None, word_tokenizer(), generator=Told(base))
    before = trained_state(trainer)
    trainer.train()
    moved = dict.fromkeys(("policy", "value"), False)
    for name, tensor in trained_state(trainer).items():
        moved["policy" if ".policy." in name else "value"] |= not torch.equal(tensor, before[name])
    assert moved == {"policy": not cut, "value": True}
    name = "sampling/importance_sampling_ratio/"
    for row in rows_with(trainer, "objective/scores"):
        found = {key: value for key, value in row.items() if key.startswith("sampling/")}
        expected = {f"{name}mean": 0.0, f"{name}min": 0.0, f"{name}max": 0.0, "sampling/weight_cut": 1.0}
        assert found == (pytest.approx(expected) if cut else {})


def test_a_sampler_that_is_silent_is_told_of_and_refused_where_weights_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Silent:
        def answers(self, prompt_ids: Any, config: Any, role: str) -> Any:
            return [[5, 1]] * len(prompt_ids)

        def begin(self, *asked: Any) -> Any:
            raise AssertionError("the first rollout has failed")

    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)
    for correction, told in ((None, 1), (False, 0)):
        args = config(tmp_path, vllm_importance_sampling_correction=correction)
        caplog.clear()
        PPOTrainer(base, cats, args, prompt_dataset(32), None, word_tokenizer(), generator=Silent()).train()
        assert sum("Silent tells no log-probabilities" in message for message in caplog.messages) == told
    for setting, value in (("vllm_importance_sampling_correction", True), ("rollouts_ahead", 1)):
        args = config(tmp_path, **{setting: value})
        trainer = PPOTrainer(base, cats, args, prompt_dataset(32), None, word_tokenizer(), generator=Silent())
        with pytest.raises(GenerationError, match=rf"^{setting} is {value}, but Silent tells no"):
            trainer.train()


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("continuous", [True, False])
def test_what_the_base_samples_from_a_part_of_its_distribution_is_weighed(continuous: bool, tmp_path: Path) -> None:
    """Among four tokens each has more of a chance than in the whole softmax, so its ratio is below 1; a run that
    resumes in the middle of a rollout weighs it as before."""
    settings: dict[str, Any] = {"top_k": 4, "vllm_importance_sampling_correction": True, "num_mini_batches": 2}
    settings |= {"vllm_importance_sampling_mode": "token_truncate", "use_transformers_continuous_batching": continuous}
    settings |= {"total_episodes": 32, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_for(tmp_path, **settings)
    whole.train()
    for row in rows_with(whole, "objective/scores"):
        assert 0 < row["sampling/importance_sampling_ratio/mean"] < row["sampling/importance_sampling_ratio/max"] < 1
    resumed = trainer_for(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    expected = trained_state(whole)
    for name, tensor in trained_state(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_generators_that_cannot_be(tmp_path: Path) -> None:
    """Before a model is loaded."""
    data = prompt_dataset(32)

    class KeywordsAlone:
        def answers(self, *, prompt_ids: Any, config: Any, role: str) -> Any:
            return prompt_ids

    for bad in (object(), TransformersGenerator, KeywordsAlone()):
        with pytest.raises(TypeError, match=r"^generator must have a method answers\(.*\), which \w+ has not \("):
            PPOTrainer("no/such-model", cats, config(tmp_path), data, generator=bad)  # type: ignore[arg-type]
    settings = config(tmp_path, use_transformers_continuous_batching=True)
    with pytest.raises(ValueError, match=r"^A generator is given and use_transformers_continuous_batching is set"):
        PPOTrainer("no/such-model", cats, settings, data, generator=TransformersGenerator(None, 1))


def test_a_generator_that_fails_late_loses_nothing(tmp_path: Path) -> None:
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)

    class Fails(TransformersGenerator):
        def answers(self, *asked: Any) -> Any:
            if trainer.state.global_step == 2:
                raise ConnectionError("gone")
            return super().answers(*asked)

    trainer = PPOTrainer(
        base, cats, config(tmp_path / "out"), prompt_dataset(32), None, word_tokenizer(), generator=Fails(base, 8)
    )
    expected = r"^Fails\.answers raised ConnectionError: gone\. All 2 steps before are saved in"
    with pytest.raises(GenerationError, match=expected):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()


def test_ids_that_the_model_does_not_have_lose_nothing(tmp_path: Path) -> None:
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)

    class Foreign(TransformersGenerator):
        def answers(self, *asked: Any) -> Any:
            if trainer.state.global_step == 2:
                return [[5, 25]] * len(asked[0])  # 25 ids: the last is 24
            return super().answers(*asked)

    trainer = PPOTrainer(
        base, cats, config(tmp_path / "out"), prompt_dataset(32), None, word_tokenizer(), generator=Foreign(base, 8)
    )
    expected = (
        r"^Foreign\.answers returned an id that the model does not have in row 0: 25\. All 2 steps before are saved"
    )
    with pytest.raises(GenerationError, match=expected):
        trainer.train()


class ShorterIsBetter(RolloutCallback):
    def on_scores(self, args: Any, state: Any, control: Any, judged: Any) -> Any:
        scores = replace(judged.scores, total=judged.scores.total - 0.5 * judged.rollout.lengths)
        return replace(judged, scores=scores)


def test_what_a_callback_changed_is_seen_by_the_next_and_by_the_losses(tmp_path: Path) -> None:
    before, after = Recorder(), Recorder()
    trainer = trainer_for(tmp_path, total_episodes=8, kl_coef=0.0)
    for callback in (before, ShorterIsBetter(), after):
        trainer.add_callback(callback)
    trainer.train()
    seen, changed = dict(before.events)["scores"], dict(after.events)["scores"]
    expected = seen.scores.total - 0.5 * seen.rollout.lengths
    assert torch.equal(changed.scores.total, expected)
    assert torch.equal(dict(after.events)["advantages"].rewards.sum(dim=1), expected)
    assert rows_with(trainer, "objective/scores")[0]["objective/scores"] == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("event", ["on_rollout_end", "on_rewards", "on_advantages"])
def test_every_record_can_be_replaced(tmp_path: Path, event: str) -> None:
    def change(args: Any, state: Any, control: Any, record: Any) -> Any:
        if event == "on_rollout_end":
            return replace(record, completions=["cat cat"] * len(record.completions))
        name = {"on_rewards": "rewards", "on_advantages": "advantages"}[event]
        return replace(record, **{name: torch.zeros_like(getattr(record, name))})

    callback = RolloutCallback()
    setattr(callback, event, change)
    trainer = trainer_for(tmp_path, total_episodes=8, num_ppo_epochs=1)
    trainer.add_callback(callback)
    before = trained_state(trainer)
    trainer.train()
    row = rows_with(trainer, "objective/scores")[0]
    if event == "on_rollout_end":
        assert row["objective/scores"] == 2.0
    elif event == "on_advantages":
        assert row["loss/policy_avg"] == 0.0
        after = trained_state(trainer)
        assert all(torch.equal(before[name], after[name]) for name in before if ".policy." in name)
    else:
        assert row["loss/value_avg"] == 0.0, "no reward, and a value that starts at 0"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda judged: judged.scores, r"returned a record of type Scores, not ScoredRollout"),
        (
            lambda judged: replace(judged, scores=replace(judged.scores, total=torch.zeros(3))),
            r"returned scores\.total as \(3,\) torch\.float32, not \(8,\) torch\.float32",
        ),
        (
            lambda judged: replace(judged, scores=replace(judged.scores, total=judged.scores.total / 0)),
            r"returned scores\.total with a number that is not finite in row \d",
        ),
        (
            lambda judged: replace(judged, rollout=replace(judged.rollout, prompts=[])),
            r"returned 0 rollout\.prompts, not 8",
        ),
        (
            lambda judged: replace(
                judged, rollout=replace(judged.rollout, completion_ids=judged.rollout.completion_ids + 100)
            ),
            r"returned an id that the model does not have in row 0: 1\d\d\.",
        ),
    ],
)
def test_a_callback_that_returns_something_else_is_named(tmp_path: Path, changed: Any, message: str) -> None:
    class Careless(RolloutCallback):
        def on_scores(self, args: Any, state: Any, control: Any, judged: Any) -> Any:
            return changed(judged)

    trainer = trainer_for(tmp_path)
    trainer.add_callback(Careless())
    with pytest.raises(CallbackError, match=rf"^Careless\.on_scores {message}"):
        trainer.train()


def test_ids_that_the_model_does_not_have_are_refused_before_it_reads_them(tmp_path: Path) -> None:
    class Careless(RolloutCallback):
        def on_rollout_end(self, rollout: Any) -> Any:
            ids = rollout.completion_ids.clone()
            ids[2, 0] = 25  # the vocabulary has 25, from 0
            return replace(rollout, completion_ids=ids)

    trainer = trainer_for(tmp_path)
    trainer.add_callback(Careless())
    message = r"^Careless\.on_rollout_end returned an id that the model does not have in row 2: 25\.$"
    with pytest.raises(CallbackError, match=message):
        trainer.train()


def test_a_reward_function_logs_under_names_of_its_own(tmp_path: Path) -> None:
    def judge(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric("objective/kl", 7.0)
        return [1.0] * len(completions)

    with pytest.raises(RewardError, match=r"^A reward function logged 'objective/kl', which the trainer logs itself"):
        trainer_for(tmp_path, judge).train()


def test_every_name_that_a_run_logs_is_known_as_taken(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, ptx_coef=0.0, max_grad_norm=1.0)
    trainer.train()
    for row in rows_with(trainer, "eps"):
        assert not [name for name in row if name_taken([name], trainer.updater.rollout_metrics) is None]


def test_a_run_whose_gradients_are_never_finite_ends(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, total_episodes=8 * 6)
    trainer.base.trainable_parameters("policy")[0].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError, match=r"^No gradient of the last 3 rollouts was finite, .* steps before are saved in"):
        trainer.train()
    assert trainer.state.global_step == 3 * 2


def test_a_callback_that_fails_late_loses_nothing(tmp_path: Path) -> None:
    class Careless(RolloutCallback):
        def on_advantages(self, args: Any, state: Any, control: Any, experience: Any) -> Any:
            if state.global_step == 2:
                raise KeyError("prompt")

    trainer = trainer_for(tmp_path)
    trainer.add_callback(Careless())
    expected = r"^Careless\.on_advantages raised KeyError: 'prompt'\. All 2 steps before are saved in"
    with pytest.raises(CallbackError, match=expected):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()


class StopAfterFirstEpoch(RolloutCallback):
    def on_ppo_epoch_end(self, args: Any, state: Any, control: Any, experience: Any, stats: Any) -> None:
        control.should_update_stop = stats.epoch == 0


def test_a_callback_can_end_the_epochs_of_an_update(tmp_path: Path) -> None:
    """Three epochs of which two are passed over end where one epoch ends."""
    short = trainer_for(tmp_path / "short", num_ppo_epochs=1, total_episodes=24, weight_decay=0.1)
    short.train()
    stopped = trainer_for(tmp_path / "stopped", num_ppo_epochs=3, total_episodes=24, weight_decay=0.1)
    recorder = Recorder()
    stopped.add_callback(StopAfterFirstEpoch())
    stopped.add_callback(recorder)
    stopped.train()
    assert stopped.state.global_step == 9
    assert recorder.names.count("epoch") == recorder.names.count("update") == 3
    expected = trained_state(short)
    for name, tensor in trained_state(stopped).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("settings", [{}, {"objective": "kl_penalty"}], ids=["clip", "kl_penalty"])
def test_an_update_that_was_ended_stays_ended_on_resuming(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Checkpoints in the first update after its end, and in the second, after the penalty has moved."""

    def run(checkpoint: str | None) -> dict[str, torch.Tensor]:
        steps = {"num_ppo_epochs": 3, "total_episodes": 24, "save_strategy": "steps", "save_steps": 2}
        trainer = trainer_for(tmp_path, **steps, **settings)
        trainer.add_callback(StopAfterFirstEpoch())
        trainer.train(resume_from_checkpoint=checkpoint)
        return trained_state(trainer)

    whole = run(None)
    for step in (2, 4):
        resumed = run(str(tmp_path / "out" / f"checkpoint-{step}"))
        assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items()), step


def test_a_callback_can_pass_over_a_whole_rollout(tmp_path: Path) -> None:
    class NotThisOne(RolloutCallback):
        def on_advantages(self, args: Any, state: Any, control: Any, experience: Any) -> None:
            control.should_update_stop = state.global_step == 0

    trainer, recorder = trainer_for(tmp_path, total_episodes=16), Recorder()
    states = [trained_state(trainer)]

    class Watch(RolloutCallback):
        def on_update_end(self, args: Any, state: Any, control: Any, experience: Any, metrics: Any) -> None:
            states.append(trained_state(trainer))

    for callback in (NotThisOne(), recorder, Watch()):
        trainer.add_callback(callback)
    trainer.train()
    assert recorder.names.count("epoch") == 2 and recorder.names.count("update") == 2
    assert all(torch.equal(states[1][name], states[0][name]) for name in states[0])
    assert any(not torch.equal(states[2][name], states[1][name]) for name in states[0])


def test_a_callback_can_end_the_training(tmp_path: Path) -> None:
    class Enough(RolloutCallback):
        def on_update_end(self, args: Any, state: Any, control: Any, experience: Any, metrics: Any) -> None:
            control.should_training_stop = True

    trainer = trainer_for(tmp_path, total_episodes=80)
    trainer.add_callback(Enough())
    trainer.train()
    assert trainer.state.global_step == 2


# Guards --------------------------------------------------------------------------------------------------------------


def test_an_update_that_goes_too_far_ends_without_its_last_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, num_ppo_epochs=4, total_episodes=8, max_approx_kl=1e-3, learning_rate=0.05)
    steps: list[dict[str, torch.Tensor]] = []

    class Watch(RolloutCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(trained_state(trainer))

    recorder = Recorder()
    trainer.add_callback(Watch())
    trainer.add_callback(recorder)
    before = trained_state(trainer)
    trainer.train()
    assert len(steps) == 4
    assert any(not torch.equal(steps[0][name], before[name]) for name in before)
    for later in steps[1:]:
        assert all(torch.equal(later[name], steps[0][name]) for name in later)
    stats = [what for name, what in recorder.events if name == "epoch"]
    assert [s.skipped for s in stats] == [0, 1]
    assert stats[1].approxkl > 1e-3
    assert rows_with(trainer, "eps")[0]["policy/skipped_minibatches"] == 0.5


@pytest.mark.parametrize(("rows", "shift", "skipped"), [(1, -20.0, 1), (16, 20.0, 2)], ids=["too high", "too low"])
def test_minibatches_whose_ratio_explodes_are_skipped_and_the_others_are_not(
    tmp_path: Path, rows: int, shift: float, skipped: int
) -> None:
    class Explode(RolloutCallback):
        """Old log-probs of some rows far too low or high."""

        def on_advantages(self, args: Any, state: Any, control: Any, experience: Any) -> Any:
            pass_ = experience.score_pass
            logprobs = pass_.logprobs.clone()
            logprobs[:rows] += shift
            return replace(experience, score_pass=replace(pass_, logprobs=logprobs))

    trainer, recorder = trainer_for(tmp_path, num_mini_batches=2, total_episodes=16, max_ratio=10.0), Recorder()
    trainer.add_callback(Explode())
    trainer.add_callback(recorder)
    trainer.train()
    assert [what.skipped for name, what in recorder.events if name == "epoch"] == [skipped] * 2
    assert trainer.state.global_step == 4
    assert all(bool(t.isfinite().all()) for t in trained_state(trainer).values())


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_value_warm_up_leaves_the_policy_alone(tmp_path: Path, value: str) -> None:
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA, value=value)
    trainer = trainer_for(tmp_path, model=base, total_episodes=24, value_warmup_rollouts=2)
    states: list[dict[str, torch.Tensor]] = [trained_state(trainer)]

    class Watch(RolloutCallback):
        def on_update_end(self, args: Any, state: Any, control: Any, experience: Any, metrics: Any) -> None:
            states.append(trained_state(trainer))

    trainer.add_callback(Watch())
    trainer.train()
    moved = [
        {name for name in before if not torch.equal(before[name], after[name])} for before, after in pairwise(states)
    ]
    policy = {name for name in states[0] if ".policy." in name}
    assert policy
    assert not moved[0] & policy and not moved[1] & policy
    assert "heads.value.weight" in moved[0] and "heads.value.weight" in moved[1]
    assert moved[2] & policy
    assert all(parameter.requires_grad for parameter in base.trainable_parameters("policy"))


def test_the_pretraining_term_makes_its_texts_likelier(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": ["the red bird flew over the house", "a small dog ran"] * 4})
    losses = []
    for coefficient in (1.0, 1e-9):
        trainer = PPOTrainer(
            saved_model(tmp_path / "model"),
            lambda completions, **_: [0.0] * len(completions),
            config(tmp_path / str(coefficient), total_episodes=80, ptx_coef=coefficient),
            prompt_dataset(32),
            processing_class=word_tokenizer(),
            peft_config=LORA,
            ptx_dataset=texts,
        )
        trainer.train()
        losses.append([row["loss/ptx"] for row in rows_with(trainer, "loss/ptx")])
    assert losses[0][-1] < losses[0][0] - 0.5
    assert abs(losses[1][-1] - losses[1][0]) < 0.3


@pytest.mark.long
def test_an_entropy_bonus_keeps_the_entropy_up(tmp_path: Path) -> None:
    ends = []
    for coefficient in (0.0, 1.0):
        trainer = trainer_for(
            tmp_path / str(coefficient),
            entropy_coef=coefficient,
            total_episodes=400,
            kl_coef=0.0,
            whiten_advantages=False,
        )
        trainer.train()
        ends.append(rows_with(trainer, "policy/entropy_avg")[-1]["policy/entropy_avg"])
    assert ends[1] > ends[0] + 0.1


# Objectives ----------------------------------------------------------------------------------------------------------

OBJECTIVES: dict[str, dict[str, Any]] = {
    "kl_penalty": {"objective": "kl_penalty"},
    "sequence": {"objective": "sequence"},
    "reinforce-mean": {"objective": "reinforce", "baseline": "mean", "num_ppo_epochs": 1},
    "reinforce-leave_one_out": {"objective": "reinforce", "num_ppo_epochs": 1, "num_generations": 4},
    "reinforce-value": {"objective": "reinforce", "baseline": "value", "num_ppo_epochs": 1},
}


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_what_is_rewarded(tmp_path: Path, name: str) -> None:
    settings = {"total_episodes": 30 * 32, "per_device_train_batch_size": 32, "kl_coef": 0.01, **OBJECTIVES[name]}
    trainer = trainer_for(tmp_path, **settings)
    value_before = {n: t for n, t in trained_state(trainer).items() if ".policy." not in n}
    trainer.train()
    logs = rows_with(trainer, "objective/scores")
    first, last = (sum(row["objective/scores"] for row in part) / 5 for part in (logs[:5], logs[-5:]))
    assert last > first + 0.5
    value_after = trained_state(trainer)
    if name in ("sequence", "reinforce-mean", "reinforce-leave_one_out"):
        assert all(torch.equal(value_after[n], t) for n, t in value_before.items()), "no critic"
        assert "loss/value_avg" not in logs[-1]
    if name == "kl_penalty":
        assert len({row["policy/penalty_coef"] for row in logs}) > 1


def test_answers_to_one_prompt_are_compared_with_each_other(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = trainer_for(
        tmp_path, objective="reinforce", num_ppo_epochs=1, num_generations=4, total_episodes=8, whiten_advantages=False
    )
    trainer.add_callback(recorder)
    trainer.train()
    experience = dict(recorder.events)["advantages"]
    worth = experience.rewards.sum(dim=1)
    assert len(set(experience.rollout.prompts[:4])) == len(set(experience.rollout.prompts[4:])) == 1
    for row in range(8):
        others = [i for i in range(row // 4 * 4, row // 4 * 4 + 4) if i != row]
        expected = float(worth[row] - worth[others].mean())
        mask = experience.rollout.completion_mask[row]
        assert experience.advantages[row][mask].tolist() == pytest.approx([expected] * int(mask.sum()), abs=1e-5)


# KL controllers ------------------------------------------------------------------------------------------------------


def test_the_controller_decides_the_next_rollouts_coefficient(tmp_path: Path) -> None:
    controller = AdaptiveKLController(init=0.1, target=0.5, horizon=100)
    trainer = trainer_for(tmp_path, total_episodes=40, learning_rate=0.05)
    trainer.add_callback(AdaptiveKLCallback(controller))
    trainer.train()
    logs = rows_with(trainer, "objective/kl")
    expected = AdaptiveKLController(init=0.1, target=0.5, horizon=100)
    for row in logs:
        assert row["objective/kl_coef"] == pytest.approx(expected.value, rel=1e-6)
        expected.update(row["objective/kl"], 8)
    assert len({row["objective/kl_coef"] for row in logs}) == 5
    assert trainer.args.kl_coef == controller.value


def test_the_controllers_state_survives_resuming(tmp_path: Path) -> None:
    settings = {"total_episodes": 48, "save_strategy": "steps", "save_steps": 3, "learning_rate": 0.05}

    def run(checkpoint: str | None) -> tuple[PPOTrainer, PIKLController]:
        controller = PIKLController(init=0.1, target=0.5, horizon=50)
        trainer = trainer_for(tmp_path, **settings)
        trainer.add_callback(AdaptiveKLCallback(controller))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, controller

    whole, first = run(None)
    resumed, second = run(str(tmp_path / "out" / "checkpoint-3"))
    assert second.state_dict() == first.state_dict()
    expected = trained_state(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_state(resumed).items())


# Normalised scores ---------------------------------------------------------------------------------------------------


def test_reference_normalisation(tmp_path: Path) -> None:
    recorder = Recorder()

    def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [100.0 + 10 * len(ids) for ids in completion_ids]

    trainer = trainer_for(
        tmp_path, lengths, score_normalization="reference", normalization_samples=32, total_episodes=64, kl_coef=0.0,
        per_device_train_batch_size=32, learning_rate=0.0,
    )  # fmt: skip
    trainer.add_callback(recorder)
    trainer.train()
    moments = trainer.collector.combination.moments
    assert moments.count.item() == 32
    totals = [what.scores.total for name, what in recorder.events if name == "scores"]
    raw = [what.scores.by_function[:, 0] for name, what in recorder.events if name == "scores"]
    assert abs(float(totals[0].mean())) < 1.0 and 0.3 < float(totals[0].std()) < 3.0
    std = (moments.squares / moments.count).sqrt()
    torch.testing.assert_close(totals[1], ((raw[1] - moments.mean) / std).float())


def test_the_reference_s_answers_make_the_moments_however_far_the_policy_is(tmp_path: Path) -> None:
    def sums(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(sum(ids)) for ids in completion_ids]

    moments, answers = [], []
    for moved in (False, True):
        how = {"score_normalization": "reference", "normalization_samples": 32}
        trainer = trainer_for(tmp_path / str(moved), sums, **how)
        if moved:
            for parameter in trainer.base.trainable_parameters("policy"):
                torch.nn.init.normal_(parameter, std=0.3)
        trainer.collector.normalize_by_reference(trainer.train_dataset, trainer.state)
        moments.append(trainer.collector.combination.moments.state_dict())
        torch.manual_seed(0)
        judged = trainer.collector(trainer.train_dataset.select(range(8)).to_list(), trainer.state)
        answers.append(judged.rollout.completion_ids.tolist())
    assert moments[0] == moments[1] and answers[0] != answers[1]


def test_running_moments_survive_resuming(tmp_path: Path) -> None:
    settings = {
        "total_episodes": 32,
        "save_strategy": "steps",
        "save_steps": 3,
        "score_normalization": "running",
    }
    whole = trainer_for(tmp_path, **settings)
    whole.train()
    resumed = trainer_for(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    states = [t.collector.combination.moments.state_dict() for t in (whole, resumed)]
    assert states[0] == states[1]
    assert states[0]["count"] == [32.0]


def test_an_evaluation_before_training_is_on_the_scale_of_those_after_it(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"score_normalization": "reference", "normalization_samples": 16, "learning_rate": 0.0}
    ends = []
    for name, how in {
        "plain": {},
        "looked": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    }.items():
        trainer = trainer_for(tmp_path / name, **settings, **how)
        trainer.train()
        ends.append([row["objective/scores"] for row in rows_with(trainer, "objective/scores")])
    assert ends[0] == ends[1], "looking changes nothing"
    looked = [row["eval_objective/scores"] for row in rows_with(trainer, "eval_objective/scores")]
    assert len(looked) == 3 and len(set(looked)) == 1, "nothing was learned, so nothing may change"


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_a_reward_function_that_fails_late_loses_nothing(tmp_path: Path) -> None:
    """The run ends with one sentence and a checkpoint from which it goes on as if nothing had happened."""
    calls = []

    def sometimes(completions: list[str], **_: Any) -> list[float]:
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("server on fire")
        return cats(completions)

    settings = {"total_episodes": 32, "evidence": False}  # evidence would call the function too, and calls are counted
    trainer = trainer_for(tmp_path, sometimes, **settings)
    with pytest.raises(
        RewardError, match=r"^Reward function 'sometimes' raised RuntimeError: server on fire.*All 4 steps"
    ):
        trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4
    resumed = trainer_for(tmp_path, cats, **settings)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_for(tmp_path / "whole", cats, **settings)
    whole.train()
    expected = trained_state(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trained_state(resumed).items())


def test_a_reward_function_that_fails_in_evaluation_loses_nothing(tmp_path: Path) -> None:
    calls = []

    def sometimes(completions: list[str], **_: Any) -> list[float]:
        calls.append(len(completions))
        if len(completions) == 5:  # the evaluation's prompts
            raise RuntimeError("server on fire")
        return cats(completions)

    trainer = trainer_for(tmp_path, sometimes, eval_strategy="steps", eval_steps=3, total_episodes=32)
    with pytest.raises(RewardError, match=r"server on fire.*All 3 steps before are saved"):
        trainer.train()
    assert (tmp_path / "out" / "checkpoint-3" / "trainer_state.json").is_file()


def test_nobody_gave_a_score(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, lambda completions, **_: [None] * len(completions))
    with pytest.raises(RewardError, match=r"^No reward function \(<lambda>\) scored any of 8 completions"):
        trainer.train()
    assert copy.copy(trainer.state.global_step) == 0


def test_a_step_on_gradients_that_are_not_finite_is_passed_over(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, total_episodes=24, evidence=False)  # which takes gradients too
    calls = []

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("nan") if len(calls) == 2 else gradient

    trainer.base.trainable_parameters("policy")[0].register_hook(overflow)
    trainer.train()
    skipped = [row["policy/skipped_minibatches"] for row in rows_with(trainer, "policy/skipped_minibatches")]
    assert sum(skipped) > 0 and skipped[1:] == [0.0, 0.0]
    assert all(bool(parameter.isfinite().all()) for parameter in trainer.base.parameters())
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert moments and all(bool(torch.as_tensor(moment).isfinite().all()) for moment in moments)
