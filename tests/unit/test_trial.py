"""Remedies tried on trainers that only pretend to train: forks, verdicts, and nothing of the run touched."""

import json
import math
import random
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import set_seed

from tests.unit.test_diagnostics import CONFIG, HEALTHY, SICK, rows
from trl_ext import PPOConfig
from trl_ext.diagnostics import Limits, RunLog, Suspect, diagnose, roots, try_remedies
from trl_ext.diagnostics.forks import _Watch, checkpoint_before, scale_learning_rate
from trl_ext.diagnostics.remedies import stand_ins
from trl_ext.diagnostics.settings import DEFAULTS, to_defaults
from trl_ext.diagnostics.trial import _Patient, candidates, first_sign, judged
from trl_ext.launch.remaking import changed

SMALL = {**HEALTHY, **SICK["steps_too_small"]}
STILL = {**HEALTHY, "objective/scores": 0.1}
LENGTH = 40


class Pretender:
    """Logs what the settings would make: small steps below a rate of 1e-4, cut completions above 1, death above 10."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.callbacks, self.began_at = settings, [], 0
        rate = settings["learning_rate"]
        sick = SMALL if rate < 1e-4 else {**HEALTHY, **(SICK["truncation"] if rate > 1 else {})}
        self.history = rows(LENGTH, **sick)
        self.state = SimpleNamespace(log_history=[], global_step=0, max_steps=8 * LENGTH)
        self.resumed: str | None = None

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def remove_callback(self, kind: Any) -> None:
        pass

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        self.resumed = resume_from_checkpoint
        if resume_from_checkpoint:
            self.state.global_step = int(resume_from_checkpoint.rpartition("-")[2])
            self.state.log_history = [row for row in rows(LENGTH, **SMALL) if row["step"] <= self.state.global_step]
        known = {name: self.settings[name] for name in self.known() if name in self.settings}
        args = SimpleNamespace(to_dict=lambda: {**CONFIG, **known})
        control = SimpleNamespace(should_training_stop=False)
        self.given = (args, self.state, control)
        for callback in self.callbacks:
            callback.on_train_begin(args, self.state, control, optimizer=None, lr_scheduler=None)
        for row in self.history[len(self.state.log_history) :]:
            if self.settings["learning_rate"] > 10:
                raise ValueError("weights blew up")
            self.state.global_step = row["step"]
            self.log(row)
            if control.should_training_stop:
                return

    def known(self) -> tuple[str, ...]:
        return ("learning_rate", "adam_epsilon")

    def log(self, row: dict[str, Any]) -> None:
        self.state.log_history.append(row)
        for callback in self.callbacks:
            callback.on_log(*self.given)


class ByHeart(Pretender):
    """A reward model that learns its pairs by heart after the first of three epochs, and is evaluated after each."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__({"learning_rate": 1e-4, **settings})
        self.epochs = settings.get("num_train_epochs", 3)
        self.history = rows(5 * self.epochs, accuracy=0.97, loss=0.1)

    def log(self, row: dict[str, Any]) -> None:
        super().log(row)
        if "accuracy" in row and row["step"] % 40 == 0 and self.settings.get("eval_strategy") != "no":
            self.evaluate()

    def evaluate(self) -> None:
        epoch = self.state.global_step / 40
        loss, accuracy = (1.0, 0.6) if self.epochs > 2 and epoch > 1 else (0.5, 0.9)
        row = {"step": self.state.global_step, "epoch": epoch, "eval_loss": loss, "eval_accuracy": accuracy}
        super().log(row)


class Clinic:
    """A maker of trainers for a run with these settings, and what it made."""

    def __init__(self, kind: type[Pretender] = Pretender, **settings: Any) -> None:
        self.kind, self.settings, self.made = kind, settings, []

    def __call__(self, changes: dict[str, Any]) -> Pretender:
        self.made.append(self.kind({**self.settings, **changes}))
        return self.made[-1]


class ByEvaluation(Pretender):
    def evaluate(self) -> None:
        self.log({"step": self.state.global_step, "eval_objective/scores": 0.1})


def findings_at(rate: float) -> list[Any]:
    return diagnose(RunLog.of(rows(**SMALL), {**CONFIG, "learning_rate": rate}))


def test_a_remedy_that_cures(tmp_path: Path) -> None:
    clinic = Clinic(learning_rate=1e-6)
    (trial,) = try_remedies(clinic, findings_at(1e-6), tmp_path / "trial")
    # The rule waits for six logs; both forks have half as many more.
    assert (trial.finding, trial.verdict, trial.logs) == ("steps_too_small", "cured", 9)
    assert trial.changes == {"learning_rate": 3e-4} and trial.metric == "approxkl"
    assert trial.without.recent() == pytest.approx(1e-8, rel=0.1) and trial.with_.recent() == pytest.approx(
        0.01, rel=0.1
    )
    # A higher one still learns no more.
    assert [one.settings["learning_rate"] for one in clinic.made] == [1e-6, 3e-4, 1e-3]
    assert len({one.settings["output_dir"] for one in clinic.made}) == 3
    (told,) = json.loads((tmp_path / "trial" / "trial.json").read_text())
    assert told["verdict"] == "cured" and len(told["with"]["values"]) == 12
    html = (tmp_path / "trial" / "trial.html").read_text()
    assert "steps_too_small: cured by <code>learning_rate=0.0003</code>" in html and html.count("<polyline") == 2


def test_a_remedy_that_does_not_go_far_enough_is_followed_by_what_the_fork_says(tmp_path: Path) -> None:
    class Stubborn(Clinic):
        def __call__(self, changes: dict[str, Any]) -> Pretender:
            made = super().__call__(changes)
            if made.settings["learning_rate"] < 1e-3 / 2:  # it needs more than the doctor thinks
                made.history = rows(LENGTH, **SMALL)
            return made

    trials = try_remedies(Stubborn(learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert [trial.verdict for trial in trials] == ["not cured", "cured"]
    assert [trial.changes["learning_rate"] for trial in trials] == [3e-4, 1e-3]


class Ladder(Pretender):
    """Learns faster with a rate of 1e-3 than with 3e-4, and faster still with four epochs; with more of both not."""

    GAINS: ClassVar = {(3e-4, 1): 1.0, (1e-3, 1): 2.0, (1e-3, 4): 3.0}

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        rate, epochs = settings["learning_rate"], settings.get("num_ppo_epochs", 1)
        self.settings = {**settings, "num_ppo_epochs": epochs, "num_mini_batches": 2}
        gain = self.GAINS.get((rate, epochs))
        if gain is not None:
            self.history = rows(LENGTH, **{**HEALTHY, "yardstick/exact": lambda t: 3 + gain * t})

    def known(self) -> tuple[str, ...]:
        return (*super().known(), "num_ppo_epochs", "num_mini_batches")


def test_a_remedy_that_helps_is_strengthened_for_as_long_as_the_run_learns_more(tmp_path: Path) -> None:
    """Steps are no longer called small at a rate at which the run is still slow."""
    trials = try_remedies(Clinic(Ladder, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert [one.changes for one in trials] == [
        {"learning_rate": 3e-4},
        {"learning_rate": 1e-3},
        {"learning_rate": 1e-3, "num_ppo_epochs": 4},
    ]
    assert [one.verdict for one in trials] == ["in part", "in part", "cured"]
    assert "cured in part by learning_rate=0.0003" in str(trials[0]) and "Still there" not in str(trials[0])


def test_a_stronger_remedy_by_which_nothing_more_is_learned_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ladder, "GAINS", {(3e-4, 1): 1.0, (1e-3, 1): 1.0})
    (trial,) = try_remedies(Clinic(Ladder, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert (trial.verdict, trial.changes) == ("cured", {"learning_rate": 3e-4})


def test_what_the_doctor_says_of_a_fork_goes_on_top_of_the_forks_own_changes(tmp_path: Path) -> None:
    """Epochs are offered where the rate is as high as it may be: both are needed."""

    class Both(Ladder):
        GAINS: ClassVar = {(1e-3, 4): 3.0}

        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            if (settings["learning_rate"], settings.get("num_ppo_epochs", 1)) not in self.GAINS:
                self.history = rows(LENGTH, **SMALL)

    trials = try_remedies(Clinic(Both, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert [one.verdict for one in trials] == ["not cured", "not cured", "cured"]
    assert trials[-1].changes == {"learning_rate": 1e-3, "num_ppo_epochs": 4}


def test_what_a_stronger_remedy_brings_has_a_remedy_of_its_own(tmp_path: Path) -> None:
    class Away(Ladder):
        """At the rate by which most is learned the KL runs away, which a larger coefficient mends."""

        GAINS: ClassVar = {(3e-4, 1): 1.0, (1e-3, 1): 2.0}

        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            if settings["learning_rate"] == 1e-3 and settings.get("kl_coef") is None:
                self.history = rows(LENGTH, **{**HEALTHY, "objective/kl": lambda t: 50 * t})

    first, second = try_remedies(Clinic(Away, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert (first.verdict, first.changes) == ("in part", {"learning_rate": 3e-4})
    assert second.verdict == "cured" and second.changes["learning_rate"] == 1e-3
    assert second.changes["kl_coef"] is not None


def test_a_cure_is_not_given_up_for_one_in_part(tmp_path: Path) -> None:
    class Cut(Ladder):
        """At the rate by which most is learned completions are cut off, and no penalty mends it."""

        GAINS: ClassVar = {(3e-4, 1): 1.0}

        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            if settings["learning_rate"] < 1e-4:
                self.history = rows(LENGTH, **{**SMALL, **SICK["truncation"]})
            if settings["learning_rate"] == 1e-3:
                learning = {"yardstick/exact": lambda t: 3 + 3 * t}
                self.history = rows(LENGTH, **{**HEALTHY, **SICK["truncation"], **learning})

        def known(self) -> tuple[str, ...]:
            return (*super().known(), "missing_eos_penalty")

    (trial,) = try_remedies(Clinic(Cut, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert (trial.verdict, trial.changes) == ("cured", {"learning_rate": 3e-4})


@pytest.mark.parametrize("learns", [True, False])
def test_a_policy_that_moves_and_learns_nothing_is_cured_in_part(learns: bool, tmp_path: Path) -> None:
    class Moved(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            if settings["learning_rate"] >= 1e-4 and not learns:
                self.history = rows(LENGTH, **{**HEALTHY, "yardstick/exact": 3.0})

    run = RunLog.of(rows(LENGTH, **SMALL), {**CONFIG, "learning_rate": 1e-6})
    (trial,) = try_remedies(Clinic(Moved, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial", run)
    assert (trial.verdict, trial.left) == (("cured", []) if learns else ("in part", ["nothing is learned"]))


def test_the_defaults_do_not_go_on_top_of_a_stand_in(tmp_path: Path) -> None:
    class AllIsWell(Ported):
        """With the yardstick it learns, and more with the usual settings."""

        def exchange(self, part: str) -> bool:
            gain = 1.0 if self.kept else 3.0
            self.history = rows(LENGTH, **{**HEALTHY, "yardstick/exact": lambda t: 3 + gain * t})
            return part == "reward_funcs"

        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            self.history = rows(LENGTH, **{**STILL, "yardstick/exact": 3.0})

    run = RunLog.of(rows(LENGTH, **{**STILL, "yardstick/exact": 3.0}), {**CONFIG, **SET})
    (found,) = [one for one in diagnose(run) if one.name == "no_progress"]
    trials = try_remedies(Clinic(AllIsWell, **SET), [found], tmp_path / "trial", run)
    assert trials[-1].verdict == "cured" and trials[-1].changes == {"reward_funcs": "the yardstick"}


SET = {"num_ppo_epochs": 1, "cliprange": 0.02, "gamma": 0.9, "weight_decay": 0.01}


class Ported(Pretender):
    """Settings that hold each other in balance: the policy stands still unless all of them are the usual ones, and
    then learns the more the higher the rate is, up to 9e-3."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__({"learning_rate": 1e-3, **settings})
        self.kept = {name: value for name, value in SET.items() if self.settings.get(name) == value}
        gain = 100 * min(self.settings["learning_rate"], 9e-3)
        learning = {**HEALTHY, "yardstick/exact": lambda t: 3 + gain * t}
        self.history = rows(LENGTH, **(STILL if self.kept else learning))

    def known(self) -> tuple[str, ...]:
        return (*super().known(), *SET)


def test_settings_that_came_as_a_set_are_taken_back_to_the_defaults_together(tmp_path: Path) -> None:
    run = RunLog.of(rows(LENGTH, **STILL), {**CONFIG, **SET})
    assert to_defaults(run) == {"num_ppo_epochs": 4, "cliprange": 0.2, "gamma": 1.0, "weight_decay": 0.0}
    (found,) = [one for one in diagnose(run) if one.name == "unusual_settings"]
    trials = try_remedies(Clinic(Ported, **SET), [found], tmp_path / "trial", run)
    assert [one.verdict for one in trials] == ["not cured", "in part", "cured"]
    assert trials[1].changes == to_defaults(run), "all of them"
    assert trials[2].changes == to_defaults(run) | {"learning_rate": 3e-3}, "and at a rate by which it learns more"


def test_the_defaults_are_tried_with_the_remedy_of_what_was_made_and_then_strengthened(tmp_path: Path) -> None:
    slow = {"warmup_steps": 0.5, "cliprange": 0.19, "weight_decay": 0.01, "learning_rate": 1e-6}

    class Slow(Ported):
        def known(self) -> tuple[str, ...]:
            return tuple(slow)

        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            if any(settings.get(name) == value for name, value in slow.items()):
                self.history = rows(LENGTH, **SMALL)

    run = RunLog.of(Slow(slow).history, {**CONFIG, **slow, "steps_of_run": 160})
    (found,) = [one for one in diagnose(run) if one.name == "unusual_settings"]
    assert "steps_too_small" in found.explains and "learning_rate" not in found.remedy.changes
    trials = try_remedies(Clinic(Slow, **slow), diagnose(run), tmp_path / "trial", run)
    with_rate = to_defaults(run) | {"learning_rate": 3e-4}
    assert [one.changes for one in trials[-3:]] == [with_rate | {"learning_rate": x} for x in (3e-4, 9e-4, 3e-3)]
    assert [one.verdict for one in trials[-3:]] == ["in part", "in part", "cured"]
    assert all(one.changes not in [other.changes for other in trials[:i]] for i, one in enumerate(trials))


@pytest.mark.parametrize(("more", "taken"), [(2.0, True), (0.0, False)])
def test_the_other_settings_of_a_set_are_usual_again_where_more_is_learned_so(
    more: float, taken: bool, tmp_path: Path
) -> None:
    class HalfRight(Ported):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            gain = 1.0 if self.kept else 1.0 + more
            learning = {**HEALTHY, "yardstick/exact": lambda t: 3 + gain * t}
            self.history = rows(LENGTH, **(STILL if "cliprange" in self.kept else learning))

    run = RunLog.of(rows(LENGTH, **STILL), {**CONFIG, **SET})
    (found,) = [one for one in diagnose(run) if one.name == "unusual_settings"]
    trials = try_remedies(Clinic(HalfRight, **SET), [found], tmp_path / "trial", run)
    assert trials[-1].verdict == "cured" and trials[0].changes == found.remedy.changes
    assert (trials[-1].changes == to_defaults(run)) == taken and len(trials) == 1 + taken


@pytest.mark.parametrize(
    "config",
    [
        {**SET, "rollout_batch_size": None},  # of TRL's trainer, whose settings have other names and defaults
        {"num_ppo_epochs": 1, "cliprange": 0.2, "learning_rate": 1e-9},  # the remedy of that one has been tried
        {"num_ppo_epochs": 1, "lr_scheduler_type": "linear"},  # which is the trainer's own default
    ],
)
def test_there_is_no_set_of_one_setting_or_of_another_trainer(config: dict[str, Any]) -> None:
    assert to_defaults(RunLog.of(rows(**STILL), {**CONFIG, **config})) == {}


def test_the_defaults_of_a_step_are_the_trainers() -> None:
    own = {f.name: f.default for f in fields(PPOConfig)}
    assert {name: own[name] for name in DEFAULTS} == DEFAULTS | {"lr_scheduler_type": "linear"}


@pytest.mark.parametrize(("gain", "verdict"), [(1.0, "in part"), (0.02, "not cured")])
def test_what_does_not_take_the_finding_away_may_help_all_the_same(gain: float, verdict: str, tmp_path: Path) -> None:
    class Helped(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            better = 0.0 if settings["learning_rate"] < 1e-4 else gain
            exact = lambda t: 3 + better * t + 0.1 * math.sin(50 * t)  # noqa: E731
            self.history = rows(LENGTH, **{**SMALL, "yardstick/exact": exact})

    trials = try_remedies(Clinic(Helped, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial", causes=1)
    assert {one.verdict for one in trials[:-1]} <= {"not cured"}
    assert (trials[-1].verdict, trials[-1].left) == (verdict, ["steps_too_small"] if verdict == "in part" else [])


def test_a_longer_fork_has_not_learned_more_for_that(tmp_path: Path) -> None:
    """Those of small steps are longer than what they are compared with."""

    class Alike(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            late = [0.0] * 9 + [0.9] * (LENGTH - 9)
            same = {**SMALL, "yardstick/exact": lambda t: 3 + 5 * t}
            cut = {"completions/clipped_ratio": late} if settings["learning_rate"] > 1e-4 else {}
            self.history = rows(LENGTH, **{**same, **cut})

    trials = try_remedies(Clinic(Alike, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert {one.verdict for one in trials} == {"not cured"}, "neither in part, nor worse for what came later"


class Sorted(Pretender):
    """Shuffles its prompts, or not."""

    def known(self) -> tuple[str, ...]:
        return (*super().known(), "shuffle_dataset")


def test_a_fork_knows_what_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(args: Any, *_: Any, **__: Any) -> dict[str, Any]:
        in_order = {"prompts_order": ("prompt", 0.99, 1000), "rollout_batch_size": 64}
        return {} if args.to_dict().get("shuffle_dataset", True) else in_order

    monkeypatch.setattr("trl_ext.diagnostics.forks.planned", planned)
    order = {"shuffle_dataset": False, "prompts_order": ("prompt", 0.99, 1000)}
    run = RunLog.of(rows(LENGTH, **HEALTHY), {**CONFIG, **order})
    (trial,) = try_remedies(
        Clinic(Sorted, learning_rate=1e-3, shuffle_dataset=False), diagnose(run), tmp_path / "trial", run
    )
    assert (trial.finding, trial.verdict, trial.changes) == ("prompts_in_order", "cured", {"shuffle_dataset": True})


class Twofold(Pretender):
    """Two mistakes at once, each with its own remedy: a rate that is too small, and no penalty on a missing EOS."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        sick = {} if settings["learning_rate"] >= 1e-4 else SICK["steps_too_small"]
        if settings.get("missing_eos_penalty") is None:
            sick = {**sick, **SICK["truncation"]}
        self.history = rows(LENGTH, **{**HEALTHY, **sick})


def test_what_helped_is_kept_while_the_next_cause_is_tried(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-6, "missing_eos_penalty": None}
    run = RunLog.of(Twofold(settings).history, {**CONFIG, **settings})
    found = {one.name: one for one in diagnose(run)}
    remedy = {"missing_eos_penalty": 1.0}
    cut = replace(found["truncation"], remedy=replace(found["truncation"].remedy, changes=remedy), suspects=())
    clinic = Clinic(Twofold, **settings)
    first, second = try_remedies(clinic, [found["steps_too_small"], cut], tmp_path / "trial", run)
    assert (first.finding, first.verdict, first.left) == ("steps_too_small", "in part", ["truncation"])
    assert (second.finding, second.verdict, second.left) == ("truncation", "cured", [])
    assert second.changes == first.changes | remedy, "one run that has both"
    rates = [one.settings["learning_rate"] for one in clinic.made]
    assert rates == [1e-6, 3e-4, 1e-3, 3e-4, 3e-4], "the third was no better than the second"


def test_what_hangs_below_a_cause_that_stays_has_its_turn(tmp_path: Path) -> None:
    """More is learned with the first remedy, and its finding stays: what follows from it is hidden for good else."""
    settings = {"learning_rate": 1e-6, "value_warmup_rollouts": 0}

    class Hidden(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            gain = settings["learning_rate"] >= 1e-4
            value = {} if settings["value_warmup_rollouts"] else SICK["value_not_learning"]
            self.history = rows(LENGTH, **{**SMALL, **value, "yardstick/exact": lambda t: 3 + gain * t})

        def known(self) -> tuple[str, ...]:
            return (*super().known(), "value_warmup_rollouts")

    run = RunLog.of(Hidden(settings).history, {**CONFIG, **settings})
    (top,) = roots(diagnose(run))
    assert {"value_not_learning"} < {one.finding.name for one in top}
    trials = try_remedies(Clinic(Hidden, **settings), [one.finding for one in top], tmp_path / "trial", run)
    helped = [one for one in trials if one.verdict in ("in part", "cured")]
    assert [one.finding for one in helped] == ["steps_too_small", "value_not_learning"]
    assert helped[1].changes.keys() == {"learning_rate", "value_warmup_rollouts"}
    assert helped[1].left == ["steps_too_small"], "which is tried only once"


NOISY = {**HEALTHY, "evidence/noise/mine": 0.9, "yardstick/exact": 3.0}


class Blamed(Pretender):
    """A score that changes from call to call; with the yardstick in its place the run learns, or it does not."""

    learns, has = True, True

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__({"learning_rate": 1e-3, **settings})
        self.history, self.exchanged = rows(LENGTH, **NOISY), list[str]()

    def exchange(self, part: str) -> bool:
        self.exchanged.append(part)
        calm = {**NOISY, "evidence/noise/mine": 0.0, "agreement/exact": 1.0}
        self.history = rows(LENGTH, **({**calm, "yardstick/exact": lambda t: 3 + t} if self.learns else calm))
        return self.has


def blamed(kind: type[Pretender], folder: Path) -> tuple[list[Any], Clinic]:
    run, clinic = RunLog.of(rows(LENGTH, **NOISY), CONFIG), Clinic(kind)
    findings = [one for one in diagnose(run) if one.name == "score_not_repeatable"]
    assert findings and not findings[0].remedy.changes
    return try_remedies(clinic, findings, folder, run), clinic


class Traded(Pretender):
    """A rate that no longer is too small cuts completions off, which a penalty mends."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        cut = SICK["truncation"] if settings.get("missing_eos_penalty") is None else {}
        sick = SICK["steps_too_small"] if settings["learning_rate"] < 1e-4 else cut
        self.history = rows(LENGTH, **{**HEALTHY, **sick})


def test_a_remedy_that_brings_another_problem_is_followed_by_that_ones_remedy(tmp_path: Path) -> None:
    (found,) = [one for one in findings_at(1e-6) if one.name == "steps_too_small"]
    first, second = try_remedies(Clinic(Traded, learning_rate=1e-6), [found], tmp_path / "trial")
    assert (first.verdict, first.new) == ("worse", ["truncation"])
    assert (second.finding, second.verdict) == ("truncation", "cured")
    assert second.changes["learning_rate"] == 3e-4 and second.changes["missing_eos_penalty"] is not None


def test_what_is_new_in_a_fork_and_has_a_setting_is_tried_with_it(tmp_path: Path) -> None:
    class Away(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            if settings["learning_rate"] >= 1e-4 and settings.get("kl_coef") is None:
                self.history = rows(LENGTH, **{**HEALTHY, "objective/kl": lambda t: 50 * t})

    (found,) = [one for one in findings_at(1e-6) if one.name == "steps_too_small"]
    first, second = try_remedies(Clinic(Away, learning_rate=1e-6), [found], tmp_path / "trial")
    assert (first.verdict, first.new) == ("worse", ["kl_runs_away"])
    assert (second.finding, second.verdict) == ("steps_too_small", "cured")
    assert second.changes["learning_rate"] == 3e-4 and second.changes["kl_coef"] > 0


def test_a_remedy_that_the_trainer_refuses_is_passed_over(tmp_path: Path) -> None:
    (found,) = [one for one in findings_at(1e-6) if one.name == "steps_too_small"]
    changes = {"num_mini_batches": 64}
    found = replace(found, remedy=replace(found.remedy, changes=changes), suspects=())
    other = Suspect(cause="the rate is low", experiment="it learns.", changes={"learning_rate": 1e-3})
    clinic = Clinic(learning_rate=1e-6)

    def refusing(settings: dict[str, Any]) -> Pretender:
        if "num_mini_batches" in settings:
            raise ValueError("too few prompts for one rollout")
        return clinic(settings)

    assert try_remedies(refusing, [found], tmp_path / "none") == []
    (trial,) = try_remedies(refusing, [replace(found, suspects=(other,))], tmp_path / "other")
    assert trial.verdict == "cured" and trial.changes == {"learning_rate": 1e-3}


def test_a_cure_after_which_another_problem_comes_later_is_one_in_part(tmp_path: Path) -> None:
    class Later(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            self.history[20:] = rows(LENGTH, **{**HEALTHY, **SICK["truncation"]})[20:]

    run = RunLog.of(rows(LENGTH, **SMALL), {**CONFIG, "learning_rate": 1e-6})
    (found,) = [one for one in diagnose(run) if one.name == "steps_too_small"]
    (trial, *_) = try_remedies(Clinic(Later, learning_rate=1e-6), [found], tmp_path / "trial", run)
    assert (trial.verdict, trial.left) == ("in part", ["truncation"])
    (trial,) = try_remedies(Clinic(Later, learning_rate=1e-6), [found], tmp_path / "short", run, logs=15)
    assert trial.verdict == "cured" and len(trial.with_) == 15, "nobody has looked further"


def test_what_was_tried_is_kept_whatever_becomes_of_the_next_cause(tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-6, "missing_eos_penalty": None}
    run = RunLog.of(Twofold(settings).history, {**CONFIG, **settings})
    found = {one.name: one for one in diagnose(run)}
    clinic = Clinic(Twofold, **settings)

    def interrupted(changes: dict[str, Any]) -> Pretender:
        if "missing_eos_penalty" in changes:
            raise KeyboardInterrupt
        return clinic(changes)

    with pytest.raises(KeyboardInterrupt):
        try_remedies(interrupted, [found["steps_too_small"], found["truncation"]], tmp_path / "trial", run)
    (kept,) = json.loads((tmp_path / "trial" / "trial.json").read_text())
    assert (kept["finding"], kept["verdict"]) == ("steps_too_small", "in part")


def test_a_cure_is_kept_though_nobody_waited_for_the_whole_run(tmp_path: Path) -> None:
    class Interrupted(Pretender):
        def log(self, row: dict[str, Any]) -> None:
            if row["step"] > 8 * 20:
                raise KeyboardInterrupt
            super().log(row)

    run = RunLog.of(rows(LENGTH, **SMALL), {**CONFIG, "learning_rate": 1e-6})
    (found,) = [one for one in diagnose(run) if one.name == "steps_too_small"]
    with pytest.raises(KeyboardInterrupt):
        try_remedies(Clinic(Interrupted, learning_rate=1e-6), [found], tmp_path / "trial", run)
    (kept,) = json.loads((tmp_path / "trial" / "trial.json").read_text())
    assert kept["verdict"] == "cured" and len(kept["with"]["values"]) == 12


def test_a_cure_that_dies_later_is_none_and_nothing_is_built_on_it(tmp_path: Path) -> None:
    class Dying(Twofold):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            self.history[13:] = rows(LENGTH, **{**HEALTHY, **SICK["truncation"]})[13:]

        def log(self, row: dict[str, Any]) -> None:
            if self.settings["learning_rate"] >= 1e-4 and row["step"] > 8 * 20:
                raise ValueError("weights blew up")
            super().log(row)

    settings = {"learning_rate": 1e-6, "missing_eos_penalty": 1.0}
    run = RunLog.of(Twofold(settings).history, {**CONFIG, **settings})
    (found,) = [one for one in diagnose(run) if one.name == "steps_too_small"]
    (trial,) = try_remedies(Clinic(Dying, **settings), [found], tmp_path / "trial", run)
    assert (trial.verdict, trial.died) == ("worse", "ValueError: weights blew up")


def test_a_fork_keeps_nothing_that_it_would_need_a_checkpoint_for(tmp_path: Path) -> None:
    clinic = Clinic(learning_rate=1e-6, load_best_model_at_end=True, save_strategy="steps")
    assert try_remedies(clinic, findings_at(1e-6), tmp_path / "trial")
    kept = {(one.settings["load_best_model_at_end"], one.settings["save_strategy"]) for one in clinic.made}
    assert kept == {(False, "no")}


def test_a_part_that_is_blamed_is_exchanged_for_what_is_known_to_be_good(tmp_path: Path) -> None:
    (trial,), clinic = blamed(Blamed, tmp_path / "trial")
    assert (trial.verdict, trial.changes) == ("cured", {"reward_funcs": "the yardstick"})
    assert "cured by the yardstick in the place of reward_funcs" in str(trial)
    assert str(trial).endswith("At fault: reward_funcs.")
    without, with_, whole = clinic.made
    assert (without.exchanged, with_.exchanged, whole.exchanged) == ([], ["reward_funcs"], ["reward_funcs"])
    assert (len(with_.state.log_history), len(whole.state.log_history)) == (12, LENGTH), "what cures, for a whole run"
    assert "reward_funcs" not in with_.settings, "no trainer has such a setting"
    assert "the yardstick in the place of reward_funcs" in (tmp_path / "trial" / "trial.html").read_text()


def test_a_finding_that_goes_with_what_was_exchanged_is_no_cure_where_nothing_is_learned(tmp_path: Path) -> None:
    """Scores by the yardstick always agree with it, whatever else is wrong."""
    (trial,), _ = blamed(type("Idle", (Blamed,), {"learns": False}), tmp_path / "trial")
    assert (trial.verdict, trial.left) == ("in part", ["nothing is learned"])


@pytest.mark.parametrize("kind", [Pretender, type("Bare", (Blamed,), {"has": False})])
def test_where_nothing_can_stand_in_nothing_is_tried(kind: type[Pretender], tmp_path: Path) -> None:
    class Sick(kind):  # type: ignore[misc, valid-type]
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__({"learning_rate": 1e-3, **settings})
            self.history = rows(LENGTH, **NOISY)

    assert blamed(Sick, tmp_path / "trial")[0] == []


def test_stand_ins_are_offered_where_the_run_has_them() -> None:
    run = RunLog.of(rows(**NOISY), CONFIG)
    assert stand_ins("score_opposed", run) == [{"reward_funcs": "the yardstick"}]
    blind = {name: value for name, value in HEALTHY.items() if not name.startswith("yardstick/")}
    assert stand_ins("score_opposed", RunLog.of(rows(**blind), CONFIG)) == [], "no yardstick"
    assert stand_ins("held_out_differs", run) == [{"reward_funcs": "the yardstick"}], "no evaluations"
    evaluated = RunLog.of([*rows(**blind), {"step": 128, "eval_objective/scores": 0.1}], CONFIG)
    assert stand_ins("held_out_differs", evaluated) == [{"train_dataset": "the held-out prompts"}]
    assert stand_ins("sampling_differs", run) == [{"generator": "Transformers' generate"}]
    assert stand_ins("overfit", run) == []
    read = {"evidence/prompts/otherwise": 0.0, "evidence/prompts/other_tokens": 0.0}
    assert stand_ins("prompts_unlike_the_model", RunLog.of(rows(**{**HEALTHY, **read}), CONFIG)) == []
    for name in read:
        otherwise = RunLog.of(rows(**{**HEALTHY, **read, name: 0.5}), CONFIG)
        assert stand_ins("prompts_unlike_the_model", otherwise) == [
            {"processing_class": "the tokenizer beside the model"}
        ]
    of_trl = RunLog.of(rows(**NOISY), {**CONFIG, "rollout_batch_size": None})
    assert stand_ins("score_opposed", of_trl) == [], "TRL 1.12's PPOTrainer exchanges nothing"


@pytest.mark.parametrize(("rate", "words"), [(5.0, "truncation"), (50.0, "It died: ValueError: weights blew up")])
def test_a_remedy_that_makes_it_worse(rate: float, words: str, tmp_path: Path) -> None:
    (found,) = [one for one in findings_at(1e-6) if one.name == "steps_too_small"]
    found = replace(found, remedy=replace(found.remedy, changes={"learning_rate": rate}))
    trial, *_ = try_remedies(Clinic(learning_rate=1e-6), [found], tmp_path / "trial")
    assert trial.verdict == "worse" and words in str(trial)


def test_a_problem_that_does_not_come_back_says_nothing_of_a_remedy(tmp_path: Path) -> None:
    clinic = Clinic(learning_rate=1e-3)
    (trial,) = try_remedies(clinic, findings_at(1e-6), tmp_path / "trial", logs=12)
    assert (trial.verdict, trial.logs, len(clinic.made)) == ("not seen", 12, 1)
    assert "nothing can be said" in str(trial)


def test_where_forks_begin_that_no_checkpoint_suits(tmp_path: Path) -> None:
    """At the start: what only a fork has shown, what a controller goes on from, and a rate of 0."""
    (tmp_path / "checkpoint-16").mkdir()
    (tmp_path / "checkpoint-16" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-16-backup").mkdir()  # no checkpoint of a trainer's
    (small,) = [one for one in findings_at(1e-6) if one.name == "steps_too_small"]
    adaptive = {"objective/kl_target": 6.0}
    for more, rate, finding, changes, begins in (
        ({}, 1e-6, small, {"learning_rate": 1e-4}, 16),
        ({}, 1e-6, replace(small, name="truncation"), {"learning_rate": 1e-4}, None),
        ({}, 1e-6, small, {"kl_coef": 1.0}, 16),
        (adaptive, 1e-6, small, {"kl_coef": 1.0}, None),
        ({}, 0.0, small, {"learning_rate": 1e-4}, None),
        ({}, 1e-6, small, {"penalty_coef": 1.0}, None),
    ):
        run = RunLog.of(rows(LENGTH, **SMALL, **more), {**CONFIG, "learning_rate": rate})
        found = _Patient(None, run, tmp_path, None, Limits())._checkpoint(finding, changes)  # type: ignore[arg-type]
        assert found == (None if begins is None else tmp_path / f"checkpoint-{begins}")


def test_a_schedule_that_is_scaled_is_not_off_and_a_plateau_has_no_rates_of_its_own() -> None:
    group = {"lr": 1e-3, "params": []}
    optimizer = SimpleNamespace(param_groups=[group])
    scale_learning_rate(optimizer, SimpleNamespace(), 0.1)
    assert group["lr"] == pytest.approx(1e-4)
    watch = _Watch(Limits(), None, None, {"learning_rate": 1e-5}).callback()
    args = SimpleNamespace(to_dict=lambda: {}, learning_rate=1e-5)  # the fork's own
    state = SimpleNamespace(log_history=[], global_step=8, max_steps=80)
    watch.on_train_begin(args, state, None, optimizer=optimizer, lr_scheduler=SimpleNamespace())
    assert group["lr"] == pytest.approx(1e-5) and watch.config["rate_changed"]


def test_the_forks_begin_at_the_last_checkpoint_before_the_first_sign(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for step in (16, 32, 48, 64):
        (run_dir / f"checkpoint-{step}").mkdir(parents=True)
        (run_dir / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    run = RunLog.of(rows(LENGTH, **SMALL), {**CONFIG, "learning_rate": 1e-6})
    assert first_sign(run, "steps_too_small", severity="problem") == 48, "logs of steps 8, 16, ...: the sixth"
    assert first_sign(run, "steps_too_small") == 16, "a warning before"
    assert first_sign(run, "truncation") is None
    assert checkpoint_before(run_dir, 48) == run_dir / "checkpoint-32"
    assert checkpoint_before(run_dir, 16) is None
    clinic = Clinic(learning_rate=1e-6)
    (trial,) = try_remedies(clinic, diagnose(run), tmp_path / "trial", run, run_dir)
    assert [one.resumed for one in clinic.made] == [str(run_dir / "checkpoint-32")] * 4
    assert trial.start == 32 and trial.without.steps == [40, 48, 56, 64], "as many logs as are called recent"
    assert sorted(path.name for path in run_dir.rglob("*")) == sorted(
        [f"checkpoint-{step}" for step in (16, 32, 48, 64)] + ["trainer_state.json"] * 4
    )


def test_what_was_learned_from_misread_prompts_is_not_gone_on_with(tmp_path: Path) -> None:
    late = {**HEALTHY, "evidence/prompts/otherwise": 0.5, "completions/clipped_ratio": lambda t: 0.9 * (t > 0.6)}

    class Misread(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__({"learning_rate": 1e-3, **settings})
            self.history = rows(LENGTH, **late)

        def exchange(self, part: str) -> bool:
            self.history = rows(LENGTH, **{**HEALTHY, "objective/scores": lambda t: 5 * t})
            return True

    for step in (16, 32):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"run/checkpoint-{step}/trainer_state.json").write_text("{}")
    run, clinic = RunLog.of(rows(LENGTH, **late), CONFIG), Clinic(Misread)
    (found,) = [one for one in diagnose(run) if one.name == "prompts_unlike_the_model"]
    assert first_sign(run, found.name, severity=found.severity) > 32
    trial, *_ = try_remedies(clinic, [found], tmp_path / "trial", run, tmp_path / "run")
    assert (trial.verdict, trial.start) == ("cured", 0) and "At fault: processing_class" in str(trial)
    assert {one.resumed for one in clinic.made} == {None}


def by_heart(evals: int = 3) -> RunLog:
    """The log of such a reward model that was evaluated so often, at its end or before too."""
    learner = ByHeart({"eval_strategy": "no"} if evals == 1 else {})
    learner.train()
    if evals == 1:
        learner.evaluate()
    return RunLog.of(learner.state.log_history)


def test_forks_are_evaluated_as_the_run_was_where_rules_read_that(tmp_path: Path) -> None:
    run, clinic = by_heart(), Clinic(ByHeart)
    (trial,) = try_remedies(clinic, diagnose(run), tmp_path / "trial", run)
    assert (trial.finding, trial.verdict, trial.changes) == ("overfit", "cured", {"num_train_epochs": 2})
    assert trial.metric == "eval_loss", "that of training falls while pairs are learned by heart"
    assert (trial.without.values, trial.with_.values) == ([0.5, 1.0, 1.0], [0.5, 0.5])
    assert {one.settings.get("eval_strategy") for one in clinic.made} == {None}


def test_a_run_that_was_evaluated_at_its_end_has_forks_that_are(tmp_path: Path) -> None:
    run, clinic = by_heart(1), Clinic(ByHeart, eval_strategy="no")
    (trial,) = try_remedies(clinic, diagnose(by_heart()), tmp_path / "trial", run)
    assert (trial.finding, trial.verdict, trial.logs) == ("overfit", "cured", 15)
    assert (trial.without.values, trial.with_.values) == ([1.0], [0.5])


def test_forks_of_ppo_are_not_evaluated(tmp_path: Path) -> None:
    run = RunLog.of([*rows(**SMALL), {"step": 128, "eval_objective/scores": 0.1}], {**CONFIG, "learning_rate": 1e-6})
    clinic = Clinic(learning_rate=1e-6)
    assert try_remedies(clinic, diagnose(run), tmp_path / "trial", run)
    assert {one.settings["eval_strategy"] for one in clinic.made} == {"no"}


@pytest.mark.parametrize("more", [{"lr_scheduler_type": "reduce_lr_on_plateau"}, {"finding": "held_out_differs"}])
def test_forks_of_ppo_are_evaluated_where_something_reads_that(more: dict[str, str], tmp_path: Path) -> None:
    config = {**CONFIG, "learning_rate": 1e-6, "lr_scheduler_type": more.get("lr_scheduler_type", "constant")}
    run = RunLog.of([*rows(**SMALL), {"step": 128, "eval_objective/scores": 0.1}], config)
    found = [one for one in diagnose(run) if one.name == "steps_too_small"]
    if "finding" in more:
        held_out = replace(found[0].remedy, changes={}, moves="eval_evidence/held_out/score_gap")
        found.append(replace(found[0], name=more["finding"], remedy=held_out))
    clinic = Clinic(ByEvaluation, learning_rate=1e-6)
    assert try_remedies(clinic, found, tmp_path / "trial", run)
    assert {one.settings.get("eval_strategy") for one in clinic.made} == {None}


def test_the_first_sign_may_be_an_evaluation() -> None:
    assert first_sign(by_heart(), "overfit") == 80, "the second epoch's"
    log = by_heart(1)
    assert first_sign(log, "overfit") == 120
    later = RunLog(log.kind, log.rows, [{**log.evals[0], "step": 123}])
    assert first_sign(later, "overfit") == 123, "after the last log of training"


def test_a_problem_that_was_there_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    class Again(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            if settings["learning_rate"] < 1e-4:
                self.history[6:12] = rows(LENGTH, **HEALTHY)[6:12]

    trial, *_ = try_remedies(Clinic(Again, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert trial.verdict in ("cured", "in part")
    assert 1.5 * 12 < trial.logs < LENGTH, "half as long again from where it came to stay"


def test_what_is_seen_in_the_place_of_a_problem_has_its_turn(tmp_path: Path) -> None:
    """The run's first cause does not come back, another one does."""
    cut = diagnose(RunLog.of(rows(**{**HEALTHY, **SICK["truncation"]}), CONFIG))
    (found,) = [one for one in cut if one.name == "truncation"]
    first, second, *_ = try_remedies(Clinic(learning_rate=1e-6), [found], tmp_path / "trial", logs=20)
    assert (first.finding, first.verdict) == ("truncation", "not seen")
    assert (second.finding, second.verdict) == ("steps_too_small", "cured")


def test_a_problem_that_goes_by_itself_says_nothing_of_a_remedy(tmp_path: Path) -> None:
    class Passing(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            self.history[6:] = rows(LENGTH, **HEALTHY)[6:]

    (trial,) = try_remedies(Clinic(Passing, learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert (trial.verdict, trial.logs) == ("not seen", LENGTH), "it may come again"


def test_a_fork_knows_what_the_run_noted_of_its_model(tmp_path: Path) -> None:
    """An alpha is a setting of the adapter, which no trainer's settings have."""
    config = {**CONFIG, "lora_r": 16, "lora_alpha": 4096, "learning_rate": 1e-4}
    run = RunLog.of(rows(LENGTH, **STILL), config)
    (found,) = [one for one in diagnose(run) if one.name == "unusual_settings"]
    found = replace(found, remedy=replace(found.remedy, changes={"lora_alpha": 32}))

    class Still(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            self.history = rows(LENGTH, **(HEALTHY if "lora_alpha" in settings else STILL))

    (trial,) = try_remedies(Clinic(Still, learning_rate=1e-4), [found], tmp_path / "trial", run)
    assert trial.verdict == "cured"


def test_a_setting_that_is_told_at_once_is_tried_until_it_shows_what_it_makes(tmp_path: Path) -> None:
    """It is gone from the fork with the remedy from the first log on, whatever it was to blame for."""
    run = RunLog.of(rows(LENGTH, **STILL), {**CONFIG, "adam_epsilon": 1.0, "learning_rate": 1e-4})
    (found,) = [one for one in diagnose(run) if one.name == "unusual_settings"]
    assert set(found.explains) == {"no_progress"}

    class Still(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            self.history = rows(LENGTH, **STILL)

    clinic = Clinic(Still, learning_rate=1e-4, adam_epsilon=1.0)
    (trial,) = try_remedies(clinic, [found], tmp_path / "trial", run)
    assert trial.logs > 12 and trial.verdict == "not cured", "no_progress is seen after twelve logs, and does not go"


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("explains", [{}, {"no_progress": ("", "")}])
def test_settings_that_make_no_problem_here_held_the_run_back_if_it_learns_more_without_them(
    learns: bool, explains: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    """Whether they had made none, or what they had made does not come back."""
    run = RunLog.of(rows(LENGTH, **STILL), {**CONFIG, "adam_epsilon": 1.0, "learning_rate": 1e-4})
    (found,) = [one for one in diagnose(run) if one.name == "unusual_settings"]
    slow = {**HEALTHY, "yardstick/exact": [2.0 + 0.01 * i for i in range(LENGTH)]}
    fast = {**HEALTHY, "yardstick/exact": [2.0 + 0.05 * i for i in range(LENGTH)]}

    class Learning(Pretender):
        def __init__(self, settings: dict[str, Any]) -> None:
            super().__init__(settings)
            self.history = rows(LENGTH, **(fast if settings["adam_epsilon"] < 1 and learns else slow))

    clinic = Clinic(Learning, learning_rate=1e-4, adam_epsilon=1.0)
    trials = try_remedies(clinic, [replace(found, explains=explains)], tmp_path / "trial", run)
    assert (trials[0].verdict == "cured") == learns and trials[0].changes == {"adam_epsilon": 1e-5}
    assert trials[0].logs == (LENGTH if explains else 12)


def test_of_unusual_settings_the_remedies_of_what_they_make_are_tried_too() -> None:
    """A rate that is low and usual is not among them, and without a higher one nothing moves."""
    config = {**CONFIG, "warmup_steps": 0.5, "learning_rate": 5e-7, "steps_of_run": 160}
    run = RunLog.of(rows(LENGTH, **{**SMALL, "objective/scores": 0.1}), config)
    (top,) = [one for one in roots(diagnose(run)) if one.finding.name == "unusual_settings"]
    assert "steps_too_small" in top.finding.explains and "learning_rate" not in top.finding.remedy.changes
    first, *others = candidates(top, run)
    assert first == {"warmup_steps": 0} and {"warmup_steps": 0, "learning_rate": 3e-4} in others


def test_what_the_objective_refuses_is_not_proposed() -> None:
    config = {**CONFIG, "objective": "reinforce", "baseline": "value", "num_ppo_epochs": 1, "adam_epsilon": 0.1}
    run = RunLog("ppo", [], config={**config, "num_mini_batches": 1, "rollout_batch_size": 64, "steps_of_run": 20})
    (top,) = roots(diagnose(run))
    assert "num_ppo_epochs is 1" in top.finding.evidence or "num_ppo_epochs 1" in top.finding.evidence
    assert candidates(top, run)[0] == {"adam_epsilon": 1e-5}
    assert to_defaults(run) | {"objective": "clip", "baseline": "leave_one_out", "num_ppo_epochs": 4} == to_defaults(
        run
    )


def test_a_longer_run_is_not_tried() -> None:
    """It shows nothing until it is longer than the run was."""
    config = {**CONFIG, "num_ppo_epochs": 4, "num_mini_batches": 1, "total_episodes": 320, "steps_of_run": 20}
    (top,) = roots(diagnose(RunLog("ppo", [], config={**config, "rollout_batch_size": 64})))
    assert top.finding.remedy.changes == {"total_episodes": 640} and candidates(top) == []
    (top,) = roots(diagnose(RunLog("ppo", [], config={**config, "rollout_batch_size": 64, "adam_epsilon": 1.0})))
    assert "total_episodes" in top.finding.remedy.changes and candidates(top) == [{"adam_epsilon": 1e-5}]


def test_a_remedy_takes_the_place_of_what_it_contradicts() -> None:
    run = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 3, "learning_rate": 1e-4}
    kept = {"eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1e-4}
    assert changed(run, {"num_train_epochs": 1}) == {"num_train_epochs": 1, **kept}
    assert changed(run, {"eval_strategy": "no"}) == {"max_steps": 5, "eval_strategy": "no", "learning_rate": 1e-4}


def test_random_numbers_go_on_as_if_nothing_had_been_tried(tmp_path: Path) -> None:
    def drawn() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    class Drawing(Clinic):
        def __call__(self, changes: dict[str, Any]) -> Pretender:
            set_seed(3)  # as trainers do
            forks.append(drawn())
            return super().__call__(changes)

    forks: list[list[float]] = []
    set_seed(7)
    expected = drawn()
    set_seed(7)
    assert try_remedies(Drawing(learning_rate=1e-5), findings_at(1e-5), tmp_path / "trial")
    assert drawn() == expected and len(forks) > 1


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        try_remedies(Clinic(learning_rate=1e-6), findings_at(1e-6), tmp_path)


def test_what_cannot_be_made_is_no_death_of_a_fork(tmp_path: Path) -> None:
    def broken(changes: dict[str, Any]) -> Any:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        try_remedies(broken, findings_at(1e-6), tmp_path / "trial")


def test_verdicts() -> None:
    healthy, small = RunLog.of(rows(**HEALTHY), CONFIG), RunLog.of(rows(**SMALL), CONFIG)
    cut = RunLog.of(rows(**{**HEALTHY, **SICK["truncation"]}), CONFIG)
    both = RunLog.of(rows(**{**SMALL, **SICK["truncation"]}), CONFIG)
    limits = Limits()
    (found,) = [one for one in diagnose(small) if one.name == "steps_too_small"]
    assert judged(found, small, healthy, "", limits) == ("cured", [], [])
    assert judged(found, small, small, "", limits) == ("not cured", [], [])
    assert judged(found, small, cut, "", limits) == ("worse", ["truncation"], [])
    assert judged(found, both, cut, "", limits) == ("in part", [], ["truncation"]), "it was there before"
    assert judged(found, small, healthy, "OutOfMemory", limits)[0] == "worse"
    unlearned = {"val/explained_variance": 0.0}
    blind, still = (RunLog.of(rows(**{**one, **unlearned}), CONFIG) for one in (SMALL, HEALTHY))
    assert judged(found, blind, still, "", limits) == ("in part", [], ["value_not_learning"]), "it followed, and stays"
    blamed, usual = (RunLog.of(rows(**STILL), {**CONFIG, "adam_epsilon": value}) for value in (1.0, 1e-5))
    (setting,) = [one for one in diagnose(blamed) if one.name == "unusual_settings"]
    assert judged(setting, blamed, usual, "", limits)[0] == "not cured", "the score stays as it is"
