"""Remedies tried on trainers that only pretend to train: forks, verdicts, and nothing of the run touched."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import set_seed

from tests.unit.test_diagnostics import CONFIG, HEALTHY, SICK, rows
from trl_ext.diagnostics import Limits, RunLog, diagnose, try_remedies
from trl_ext.diagnostics.trial import checkpoint_before, first_sign, judged

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
        self.state = SimpleNamespace(log_history=[], global_step=0)
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
        args = SimpleNamespace(to_dict=lambda: {**CONFIG, "learning_rate": self.settings["learning_rate"]})
        control = SimpleNamespace(should_training_stop=False)
        for callback in self.callbacks:
            callback.on_train_begin(args, self.state, control, optimizer=None, lr_scheduler=None)
        for row in self.history[len(self.state.log_history) :]:
            if self.settings["learning_rate"] > 10:
                raise ValueError("weights blew up")
            self.state.log_history.append(row)
            for callback in self.callbacks:
                callback.on_log(args, self.state, control)
            if control.should_training_stop:
                return


class Clinic:
    """A maker of trainers for a run with these settings, and what it made."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.made = settings, []

    def __call__(self, changes: dict[str, Any]) -> Pretender:
        self.made.append(Pretender({**self.settings, **changes}))
        return self.made[-1]


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
    assert [one.settings["learning_rate"] for one in clinic.made] == [1e-6, 3e-4]
    assert len({one.settings["output_dir"] for one in clinic.made}) == 2
    (told,) = json.loads((tmp_path / "trial" / "trial.json").read_text())
    assert told["verdict"] == "cured" and len(told["with"]["values"]) == 9
    html = (tmp_path / "trial" / "trial.html").read_text()
    assert "steps_too_small: cured by <code>learning_rate: 0.0003</code>" in html and html.count("<polyline") == 2


def test_a_remedy_that_does_not_go_far_enough_is_followed_by_what_the_fork_says(tmp_path: Path) -> None:
    class Stubborn(Clinic):
        def __call__(self, changes: dict[str, Any]) -> Pretender:
            made = super().__call__(changes)
            if made.settings["learning_rate"] < 1e-2 / 2:  # it needs far more than the doctor thinks
                made.history = rows(LENGTH, **SMALL)
            return made

    trials = try_remedies(Stubborn(learning_rate=1e-6), findings_at(1e-6), tmp_path / "trial")
    assert [trial.verdict for trial in trials] == ["not cured", "cured"]
    assert [trial.changes["learning_rate"] for trial in trials] == [3e-4, 9e-3]


@pytest.mark.parametrize(("rate", "words"), [(5.0, "truncation"), (50.0, "It died: ValueError: weights blew up")])
def test_a_remedy_that_makes_it_worse(rate: float, words: str, tmp_path: Path) -> None:
    found = findings_at(rate / 30)  # thirty times the rate is what it prescribes
    (trial,) = try_remedies(Clinic(learning_rate=1e-6), found, tmp_path / "trial")
    assert trial.verdict == "worse" and words in str(trial)


def test_a_problem_that_does_not_come_back_says_nothing_of_a_remedy(tmp_path: Path) -> None:
    clinic = Clinic(learning_rate=1e-3)
    (trial,) = try_remedies(clinic, findings_at(1e-6), tmp_path / "trial", logs=12)
    assert (trial.verdict, trial.logs, len(clinic.made)) == ("not seen", 12, 1)
    assert "nothing can be said" in str(trial)


def test_the_forks_begin_at_the_last_checkpoint_before_the_first_sign(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for step in (16, 32, 48, 64):
        (run_dir / f"checkpoint-{step}").mkdir(parents=True)
        (run_dir / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    run = RunLog.of(rows(LENGTH, **SMALL), {**CONFIG, "learning_rate": 1e-6})
    assert first_sign(run, "steps_too_small") == 48, "logs of steps 8, 16, ...: the sixth"
    assert first_sign(run, "truncation") is None
    assert checkpoint_before(run_dir, 48) == run_dir / "checkpoint-32"
    assert checkpoint_before(run_dir, 16) is None
    clinic = Clinic(learning_rate=1e-6)
    (trial,) = try_remedies(clinic, diagnose(run), tmp_path / "trial", run, run_dir)
    assert [one.resumed for one in clinic.made] == [str(run_dir / "checkpoint-32")] * 2
    assert trial.start == 32 and min(trial.with_.steps) == 40
    assert sorted(path.name for path in run_dir.rglob("*")) == sorted(
        [f"checkpoint-{step}" for step in (16, 32, 48, 64)] + ["trainer_state.json"] * 4
    )


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
    assert judged("steps_too_small", small, healthy, "", limits) == ("cured", [])
    assert judged("steps_too_small", small, small, "", limits) == ("not cured", [])
    assert judged("steps_too_small", small, cut, "", limits) == ("worse", ["truncation"])
    assert judged("steps_too_small", both, cut, "", limits) == ("cured", []), "it was there before"
    assert judged("steps_too_small", small, healthy, "OutOfMemory", limits)[0] == "worse"
    blamed, usual = (RunLog.of(rows(**STILL), {**CONFIG, "adam_epsilon": value}) for value in (1.0, 1e-5))
    assert judged("unusual_settings", blamed, usual, "", limits) == ("not cured", []), "the score stays as it is"
