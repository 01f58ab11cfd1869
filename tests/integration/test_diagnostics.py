"""The doctor at work in real training runs on a tiny model."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_ppo_trainer import cats, rows_with, trained_state, trainer_for
from trl_ext import AdaptiveKLCallback, DiagnosticsCallback
from trl_ext.cli import main
from trl_ext.controllers import FixedKLController
from trl_ext.diagnostics import Finding, Remedy, RunLog, diagnose, read_run
from trl_ext.diagnostics.graph import cause_of
from trl_ext.diagnostics.scores import weights_of
from trl_ext.rewards.texts import length_penalty

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "strangers"))
import verdict


def nothing(completions: list[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def dogs(completions: list[str], **kwargs: Any) -> list[float]:
    """A judge that is not trained on."""
    return [float(text.split().count("dog")) for text in completions]


def test_a_problem_is_said_once_and_written_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trainer_for(tmp_path, reward=nothing, total_episodes=8 * 6)
    callback = DiagnosticsCallback()
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_state()
    # The run is short, and the tiny model's answers hardly ever end.
    assert [finding.name for finding in callback.findings] == ["unusual_settings", "constant_scores", "truncation"]
    said = [record.getMessage() for record in caplog.records if record.name == "trl_ext.callbacks.diagnostics"]
    assert len(said) == 3 and "the run takes 12 optimizer steps in all: 6 rollouts of 8 completions" in said[0]
    assert said[1].startswith("problem: All scores are the same (steps 2 to 6).")
    log = read_run(tmp_path / "out")
    assert log.config["num_ppo_epochs"] == 2 and log.config["rollout_batch_size"] == 8
    policy = trainer.base.model.peft_config[trainer.base.adapters["policy"]]
    assert (log.config["lora_r"], log.config["lora_alpha"]) == (policy.r, policy.lora_alpha)
    assert log.config["steps_of_run"] == trainer.state.max_steps == 12
    assert {finding.name for finding in diagnose(log)} == {"unusual_settings", "constant_scores", "truncation"}
    assert len(log.samples) == 6 * 8 and log.samples[0].tokens > 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["versions"]["trl"]


def test_a_setting_that_cannot_be_meant_is_told_before_anything_is_sampled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def watched(completions: list[str], **kwargs: Any) -> list[float]:
        asked.append(len(told()))
        return cats(completions)

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "trl_ext.callbacks.diagnostics"]

    settings = {"adam_epsilon": 1.0, "total_episodes": 16, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, watched, **settings)
    trainer.add_callback(DiagnosticsCallback())
    trainer.train()
    assert asked[0] == 1 and "adam_epsilon is 1" in told()[0] and "(before the first step)" in told()[0]
    assert len([one for one in told() if "adam_epsilon" in one]) == 1
    resumed = trainer_for(tmp_path / "resumed", cats, **settings)
    resumed.add_callback(DiagnosticsCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert len([one for one in told() if "adam_epsilon" in one]) == 1, "nor a second time"


def test_the_yardstick_is_logged_and_not_trained_on(tmp_path: Path) -> None:
    plain = trainer_for(tmp_path / "plain")
    plain.train()
    judged = trainer_for(tmp_path / "judged")
    judged.add_callback(DiagnosticsCallback(yardstick=dogs))
    judged.train()
    logged = rows_with(judged, "yardstick/dogs")
    assert len(logged) == len(rows_with(judged, "objective/kl")) == 2
    assert all(0 <= row["yardstick/dogs"] <= 6 for row in logged)
    same = ["objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg"]
    for ours, theirs in zip(logged, rows_with(plain, "objective/kl"), strict=True):
        assert [ours[name] for name in same] == [theirs[name] for name in same]


def test_a_yardstick_s_agreement_with_the_score_is_logged(tmp_path: Path) -> None:
    def fewer(completions: list[str], **kwargs: Any) -> list[float | None]:
        """The score turned round, of all completions but the first two."""
        return [None, None, *(5 - 2 * score for score in cats(completions)[2:])]

    trainer = trainer_for(tmp_path, reward=cats)
    trainer.add_callback(DiagnosticsCallback(yardstick=fewer))
    trainer.train()
    assert [row["agreement/fewer"] for row in rows_with(trainer, "agreement/fewer")] == pytest.approx([-1.0, -1.0])


def test_scores_that_belong_to_other_rows_are_told(tmp_path: Path) -> None:
    def late(completions: list[str], **kwargs: Any) -> list[float]:
        scores = cats(completions)
        return scores[-3:] + scores[:-3]

    trainer = trainer_for(tmp_path, reward=late, per_device_train_batch_size=32, total_episodes=32)
    trainer.add_callback(DiagnosticsCallback(yardstick=cats))
    trainer.train()
    (row,) = rows_with(trainer, "agreement_shifted/cats")
    assert row["agreement_shifted/cats"] == pytest.approx(1.0) and abs(row["agreement/cats"]) < 0.5


def test_an_evaluation_has_the_yardstick_too(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, reward=cats, eval_strategy="steps", eval_steps=2)
    trainer.add_callback(DiagnosticsCallback(yardstick=cats))
    trainer.train()
    trainer.save_state()
    evaluated = read_run(tmp_path / "out").series("agreement/cats", evals=True)
    assert evaluated.values == pytest.approx([1.0] * len(evaluated)) and len(evaluated) > 0
    for row in rows_with(trainer, "eval_yardstick/cats"):
        assert row["eval_yardstick/cats"] == pytest.approx(row["eval_rewards/cats/mean"])
    for name in ("evidence/prompts/surprise", "eval_evidence/prompts/surprise"):
        assert all(row[name] > 0 for row in rows_with(trainer, name)) and rows_with(trainer, name)


def test_weights_stay_with_their_functions_in_saved_logs(tmp_path: Path) -> None:
    """A saved log is sorted by name, where cats come before nothing; weights are in the order of the functions."""
    weights = {"reward_weights": [0.0, 1.0], "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_for(tmp_path, reward=[nothing, cats], **weights)
    trainer.add_callback(DiagnosticsCallback())
    trainer.train()
    trainer.save_state()
    assert weights_of(read_run(tmp_path / "out")) == {"nothing": 0.0, "cats": 1.0}
    resumed = trainer_for(tmp_path, reward=[nothing, cats], **{**weights, "total_episodes": 32})
    callback = DiagnosticsCallback()
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=True)
    assert weights_of(callback.log_of(resumed.state)) == {"nothing": 0.0, "cats": 1.0}


@pytest.mark.parametrize(("verdicts", "share"), [([1.0] * 6 + [2.0, None], [6 / 7] * 2), ([1.0] * 3 + [None] * 5, [])])
def test_the_share_of_one_verdict_is_of_most_completions(
    verdicts: list[float | None], share: list[float], tmp_path: Path
) -> None:
    """Where a yardstick says nothing of most, what it says of few is not that all are alike."""

    def judge(completions: list[str], **kwargs: Any) -> list[float | None]:
        return verdicts

    trainer = trainer_for(tmp_path)
    trainer.add_callback(DiagnosticsCallback(yardstick=judge))
    trainer.train()
    told = [row["one_verdict/judge"] for row in rows_with(trainer, "one_verdict/judge")]
    assert told == pytest.approx(share)


def test_a_yardstick_may_count_tokens(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.add_callback(DiagnosticsCallback(yardstick=length_penalty(0, 100)))
    trainer.train()
    logged = rows_with(trainer, "objective/kl")
    assert len(logged) == 2
    for row in logged:
        assert row["yardstick/length_penalty"] == pytest.approx(-row["completions/mean_length"] / 100)


def test_stop_saves_and_ends_the_run(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, reward=nothing, total_episodes=8 * 20)
    trainer.add_callback(DiagnosticsCallback(on_problem="stop"))
    trainer.train()
    assert trainer.state.global_step == 6, "three rollouts of two steps show it"
    assert (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").is_file()
    assert (tmp_path / "out" / "diagnostics.json").is_file()


def blind(prompts: Any, **_: Any) -> list[float]:
    return [float(sum(map(ord, str(prompt))) % 7) for prompt in prompts]


def test_stop_ends_a_run_whose_first_rollout_shows_it_before_a_weight_changes(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 64, "num_generations": 2, "total_episodes": 64 * 8}
    trainer = trainer_for(tmp_path, reward=blind, **settings)
    callback = DiagnosticsCallback(on_problem="stop", yardstick=cats)
    trainer.add_callback(callback)
    before = {name: tensor.clone() for name, tensor in trained_state(trainer).items()}
    trainer.train()
    assert "score_ignores_completion" in [finding.name for finding in callback.findings]
    # What was seen is there for who asks afterwards.
    trainer.save_state()
    log = read_run(tmp_path / "out")
    assert "score_ignores_completion" in [finding.name for finding in diagnose(log)]
    assert len(log.samples) == 8 and log.series("yardstick/cats")
    assert trainer.state.global_step == 1 and (tmp_path / "out" / "checkpoint-1").is_dir()
    for name, tensor in trained_state(trainer).items():
        assert torch.equal(tensor, before[name]), name


def test_a_rollout_of_one_step_that_is_stopped_is_noted_once(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 64, "num_generations": 2, "num_ppo_epochs": 1, "total_episodes": 64 * 8}
    trainer = trainer_for(tmp_path, reward=blind, **settings)
    callback = DiagnosticsCallback(on_problem="stop", samples=4)
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == 1 and len(callback.log_of(trainer.state).samples) == 4


def test_act_on_the_first_rollout_changes_the_rate_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower = Finding(
        name="a_problem",
        severity="problem",
        title="",
        steps=(0, 0),
        evidence="",
        figures={},
        cause="",
        remedy=Remedy(text="", changes={"learning_rate": 1e-5, "kl_coef": 0.3}),
    )
    monkeypatch.setattr("trl_ext.callbacks.diagnostics.diagnose", lambda log, *_: [slower] if log.rows else [])
    trainer = trainer_for(tmp_path, learning_rate=1e-2)
    trainer.add_callback(DiagnosticsCallback(on_problem="act"))
    trainer.train()
    rates = [row["learning_rate"] for row in rows_with(trainer, "learning_rate")]
    assert rates == pytest.approx([1e-5] * len(rates)) and trainer.args.kl_coef == 0.3


def test_the_first_look_is_what_the_log_without_its_training_would_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `verdict.before_training` makes of a log is what the callback has seen."""
    seen: list[RunLog] = []
    monkeypatch.setattr("trl_ext.callbacks.diagnostics.diagnose", lambda log, *_: seen.append(log) or [])
    trainer = trainer_for(tmp_path, reward=cats)
    callback = DiagnosticsCallback(yardstick=cats)
    trainer.add_callback(callback)
    trainer.train()
    (first,) = [log for log in seen if [row["step"] for row in log.rows] == [0]]
    (known,) = verdict.before_training(callback.log_of(trainer.state)).rows
    assert known == pytest.approx(first.rows[0])
    assert {"objective/kl", "agreement/cats", "evidence/gradient/score", "rewards/cats/std"} <= set(first.rows[0])


def test_the_yardstick_judges_each_rollout_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def counted(completions: Any, **_: Any) -> list[float]:
        calls.append(len(completions))
        return [0.0] * len(completions)

    settings = {"save_strategy": "steps", "save_steps": 1, "total_episodes": 24}
    trainer = trainer_for(tmp_path, **settings)
    trainer.add_callback(DiagnosticsCallback(yardstick=counted))
    trainer.train()
    assert len(calls) == 3
    again = trainer_for(tmp_path / "again", **settings)
    again.add_callback(DiagnosticsCallback(yardstick=cats))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert len(rows_with(again, "yardstick/cats")) == 2, "of the rollout that was amid its training, too"


def test_stop_ends_a_resumed_run_whose_problem_nobody_was_told(tmp_path: Path) -> None:
    settings = {"total_episodes": 8 * 6, "save_strategy": "steps", "save_steps": 8}
    trainer_for(tmp_path, reward=nothing, **settings).train()
    resumed = trainer_for(tmp_path / "resumed", reward=nothing, **settings)
    resumed.add_callback(DiagnosticsCallback(on_problem="stop"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert resumed.state.global_step == 10 < resumed.state.max_steps


def test_act_changes_what_a_run_in_progress_can_take(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 16, "kl_coef": 1e-4, "learning_rate": 3e-3}
    trainer = trainer_for(tmp_path, total_episodes=16 * 24, **settings)
    callback = DiagnosticsCallback(on_problem="act")
    trainer.add_callback(callback)
    trainer.train()
    (finding,) = [finding for finding in callback.findings if finding.name == "kl_runs_away"]
    logged = rows_with(trainer, "objective/kl_coef")
    # The change shows from the rollout after the one that showed the problem.
    before = [row["objective/kl_coef"] for row in logged if row["step"] <= finding.steps[1]]
    after = [row["objective/kl_coef"] for row in logged if row["step"] > finding.steps[1]]
    assert before == [1e-4] * len(before)
    assert after and after == [finding.remedy.changes["kl_coef"]] * len(after)


def test_act_leaves_the_coefficient_to_its_controller(tmp_path: Path) -> None:
    """Which would take the change back after the next rollout."""
    settings = {"per_device_train_batch_size": 16, "kl_coef": 1e-4, "learning_rate": 3e-3, "total_episodes": 16 * 24}
    trainer = trainer_for(tmp_path, **settings)
    trainer.add_callback(AdaptiveKLCallback(FixedKLController(1e-4)))
    callback = DiagnosticsCallback(on_problem="act")
    trainer.add_callback(callback)
    trainer.train()
    (finding,) = [finding for finding in callback.findings if finding.name == "kl_runs_away"]
    state, made = trainer.state, {"kl_coef": 0.6, "vf_coef": 0.2}
    asked = replace(finding, remedy=replace(finding.remedy, changes=made))
    assert callback._changes(asked, trainer.args, state) == {"vf_coef": 0.2}
    assert trainer.args.kl_coef == 1e-4 and callback._state["settings"].get("kl_coef") is None


def test_a_damaged_file_of_samples_ends_no_run_and_no_token_is_written_down(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "total_episodes": 24}
    trainer = trainer_for(tmp_path, **settings)
    callback = DiagnosticsCallback()
    trainer.add_callback(callback)
    trainer.train()
    callback._config["model_init_kwargs"] = {"token": "hf_mine"}  # as TRL's own settings have it
    callback._write_settings(trainer.args, trainer.state)
    assert "hf_mine" not in (tmp_path / "out" / "run.json").read_text()
    (tmp_path / "out" / "diagnostics.json").write_text('{"findings": [], "samp')
    again = trainer_for(tmp_path, **settings)
    again.add_callback(DiagnosticsCallback())
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == trainer.state.global_step


def test_act_scales_the_learning_rate_of_any_schedule(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-7, "lr_scheduler_type": "linear", "total_episodes": 8 * 20}
    trainer = trainer_for(tmp_path, reward=cats, **settings)
    trainer.add_callback(DiagnosticsCallback(on_problem="act"))
    trainer.train()
    trainer.save_state()
    assert read_run(tmp_path / "out").config["rate_changed"], "so that nobody blames the schedule"
    rates = [row["learning_rate"] for row in rows_with(trainer, "learning_rate")]
    jumps = [b / a for a, b in pairwise(rates) if a > 0 and b > 0]
    assert sum(jump > 100 for jump in jumps) == 1, "1e-7 to 3e-4, once"
    assert rates[-1] < max(rates), "and the schedule goes on falling"


def test_act_scales_the_learning_rate_once_for_settings_that_are_told_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blamed(*settings: str) -> Finding:
        return Finding(
            name="unusual_settings",
            severity="problem",
            title="",
            steps=(1, 2),
            evidence="",
            figures={f"times_off/{name}": 9.0 for name in settings},
            cause="",
            remedy=Remedy(text="", changes={"learning_rate": 1e-3}),
        )

    def told(log: Any, *_: Any) -> list[Finding]:
        return [[], [blamed("learning_rate")], [blamed("learning_rate", "lam")]][min(len(log.rows), 2)]

    monkeypatch.setattr("trl_ext.callbacks.diagnostics.diagnose", told)
    trainer = trainer_for(tmp_path, total_episodes=24, learning_rate=1e-2, lr_scheduler_type="constant")
    callback = DiagnosticsCallback(on_problem="act")
    trainer.add_callback(callback)
    trainer.train()
    assert len(callback.findings) == 2 and trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_act_follows_roots_and_sets_one_rate_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three problems of one log, of which one follows from another, all ask for a tenth; a fourth one asks for less."""

    def blamed(name: str, rate: float) -> Finding:
        remedy = Remedy(text="", changes={"learning_rate": rate})
        return Finding(
            name=name, severity="problem", title="", steps=(1, 2), evidence="", figures={}, cause="", remedy=remedy
        )

    same = [blamed("clipping_saturated", 1e-3), blamed("truncation", 1e-3), blamed("entropy_collapse", 1e-5)]
    assert cause_of(same[2], same) is not None and cause_of(same[1], same) is None

    def told(log: Any, *_: Any) -> list[Finding]:
        return [[], same, [*same, blamed("negative_kl", 5e-4)]][min(len(log.rows), 2)]

    monkeypatch.setattr("trl_ext.callbacks.diagnostics.diagnose", told)
    trainer = trainer_for(tmp_path, total_episodes=24, learning_rate=1e-2, lr_scheduler_type="constant")
    trainer.add_callback(DiagnosticsCallback(on_problem="act"))
    trainer.train()
    rates = [row["learning_rate"] for row in rows_with(trainer, "learning_rate")]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4]), "from the look at the first rollout on"


def test_the_evaluation_s_prompts_are_watched(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    callback = DiagnosticsCallback(samples=3)
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_state()
    watched = [sample for sample in read_run(tmp_path / "out").samples if sample.watched]
    assert [sample.step for sample in watched] == [0] * 3 + [2] * 3 + [4] * 3
    assert len({sample.prompt for sample in watched}) == 3
    assert all(math.isfinite(sample.kl) for sample in watched)
    assert main(["report", str(tmp_path / "out")]) == 0
    assert watched[-1].completion in (tmp_path / "out" / "report.html").read_text()


def test_a_resumed_run_is_diagnosed_from_its_beginning(tmp_path: Path) -> None:
    settings = {"total_episodes": 8 * 6, "save_strategy": "steps", "save_steps": 4}
    whole = trainer_for(tmp_path, reward=nothing, **settings)
    whole.add_callback(DiagnosticsCallback())
    whole.train()
    resumed = trainer_for(tmp_path, reward=nothing, **settings)
    callback = DiagnosticsCallback()
    resumed.add_callback(callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    finding = callback.findings[0]
    assert finding.name == "constant_scores"
    assert finding.steps == (2, 6), "three logs, two of them from before"


def test_a_warning_that_becomes_a_problem_is_told_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"learning_rate": 1e-7, "total_episodes": 8 * 8, "save_strategy": "steps", "save_steps": 14}
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-14")):
        trainer = trainer_for(tmp_path, **settings)
        trainer.add_callback(DiagnosticsCallback())
        trainer.train(resume_from_checkpoint=checkpoint)
        said = [record.getMessage().split(" (")[0] for record in caplog.records if record.name.endswith("diagnostics")]
        steps = [one for one in said if "Steps are too small" in one]
        assert steps == ["warning: Steps are too small to learn", "problem: Steps are too small to learn"], "once each"


def test_what_was_done_before_an_interruption_is_kept_and_not_done_again(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-7, "total_episodes": 8 * 12, "save_strategy": "steps", "save_steps": 16}
    rates = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-16")):
        trainer = trainer_for(tmp_path, **settings)
        trainer.add_callback(DiagnosticsCallback(on_problem="act"))
        trainer.train(resume_from_checkpoint=checkpoint)
        rates.append([row["learning_rate"] for row in rows_with(trainer, "learning_rate")])
    assert rates[0] == rates[1]
    assert rates[0][0] == 1e-7 and rates[0][-1] == pytest.approx(3e-4)


def test_a_resumed_run_keeps_its_completions_and_its_yardstick(tmp_path: Path) -> None:
    settings = {"total_episodes": 8 * 6, "save_strategy": "steps", "save_steps": 6, "logging_steps": 4}
    kept = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-6")):
        trainer = trainer_for(tmp_path, **settings)
        trainer.add_callback(DiagnosticsCallback(yardstick=dogs))
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
        yardstick = [row["yardstick/dogs"] for row in rows_with(trainer, "yardstick/dogs")]
        kept.append((yardstick, read_run(tmp_path / "out").samples))
    assert len(kept[0][0]) == 3 and len(kept[0][1]) == 6 * 8
    assert kept[0] == kept[1], "the checkpoint lies between two logs"


def test_a_yardstick_that_is_no_function() -> None:
    with pytest.raises(ValueError, match="yardstick is 'exact': pass a function"):
        DiagnosticsCallback(yardstick="exact")

    async def asked_of_a_server(prompts, completions, completion_ids):
        return [1.0] * len(prompts)

    for yardstick, words in (
        (asked_of_a_server, "asked_of_a_server is asynchronous"),
        (lambda prompts, completions, answer, **_: [1.0], "asks for 'answer', and is called with prompts, completions"),
        (lambda completions: [1.0], "takes completions, and is called with"),
        (lambda prompts, completions, completion_ids, /: [1.0], "takes prompts, completions, completion_ids, and is"),
    ):
        with pytest.raises(ValueError, match=words):
            DiagnosticsCallback(yardstick=yardstick)


def test_a_yardstick_that_leaves_completions_out(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.add_callback(DiagnosticsCallback(yardstick=lambda completions, **_: [1.0] * (len(completions) - 1)))
    with pytest.raises(ValueError, match="returned 7 verdicts on 8 completions: return one of each"):
        trainer.train()


def test_an_unknown_action() -> None:
    with pytest.raises(ValueError, match="on_problem is 'panic': choose one of warn, stop, act"):
        DiagnosticsCallback(on_problem="panic")
