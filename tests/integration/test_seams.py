"""Every public seam of a run, found and not listed: whatever fails there after a step, the run is saved and goes on."""

import inspect
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.helpers import prompt_dataset, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, saved_model, trained_state
from trl_ext import DiagnosticsCallback, PPOTrainer
from trl_ext.callbacks.rollout import EVENTS
from trl_ext.controllers import KLController
from trl_ext.generation import Generator
from trl_ext.ppo import Objective
from trl_ext.ppo import trainer as trainer_module

# 16 prompts, 8 completions a rollout, two steps on each, two micro-batches a step; some evaluations and checkpoints,
# none of them due where a rollout begins, after an even step: what fails there must save the run itself.
SETTINGS: dict[str, Any] = {
    "total_episodes": 40,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "objective": "kl_penalty",  # the one with a controller that moves
    "score_normalization": "running",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 5,
    "logging_steps": 1,
    "log_completions": True,
    "num_completions_to_print": 0,
}
STEPS = 10
# Events that a run has no occasion for: on_predict needs `predict`, on_prediction_step Transformers' own evaluation
# loop, on_push_begin a repository. on_init_end comes before any step.
ELSEWHERE = {"on_init_end", "on_predict", "on_prediction_step", "on_push_begin"}
TRANSFORMERS_EVENTS = sorted(
    name for name, _ in inspect.getmembers(TrainerCallback, inspect.isfunction) if name.startswith("on_")
)
# Of the beginning: nothing is trained yet.
AT_ONCE = {"on_train_begin"}


class Fault(LookupError):
    """Of a kind that nothing in the package knows."""


def trainer_for(
    folder: Path, reward: Any = cats, data: Dataset | None = None, model: str | None = None, **changes: Any
) -> PPOTrainer:
    model, data = model or saved_model(folder / "model"), data if data is not None else prompt_dataset(16)
    args = config(folder / "out", **{**SETTINGS, **changes})
    return PPOTrainer(model, reward, args, data, data.select(range(5)), word_tokenizer(), peft_config=LORA)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PPOTrainer:
    """A run in which nothing fails."""
    trainer = trainer_for(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def failing(event: str, step: int) -> tuple[TrainerCallback, list[int]]:
    """A callback whose `event` fails, once, when the run has come to `step` or further; and where it did."""
    failed: list[int] = []

    def fail(args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step >= step and not failed:
            failed.append(state.global_step)
            raise Fault("the tracker went away")

    callback = TrainerCallback()
    setattr(callback, event, fail)
    return callback, failed


def check_goes_on(trainer: PPOTrainer, error: BaseException, folder: Path, whole: PPOTrainer) -> None:
    """The run was saved where it stood, and a run from there ends as the whole one."""
    step = trainer.state.global_step
    said = " ".join([str(error), *getattr(error, "__notes__", [])])
    saved = folder / "out" / f"checkpoint-{step}"
    assert f"All {step} steps before are saved in '{saved}': resume from there." in said and said.count("saved in") == 1
    assert saved.is_dir() and not (folder / "out" / "unfinished").exists()
    progress = json.loads((saved / "ppo_state.json").read_text())["updater"]["progress"]
    assert progress["sums"] == {} and progress["skipped"] == 0, "the step under way is forgotten"
    again = trainer_for(folder)
    again.train(resume_from_checkpoint=str(saved))
    assert again.state.global_step == STEPS
    expected = trained_state(whole)
    for name, tensor in trained_state(again).items():
        assert torch.equal(tensor, expected[name]), name
    state, wanted = again.updater.state_dict(), whole.updater.state_dict()
    assert state["reward_moments"] == wanted["reward_moments"], "no score counts twice"
    assert state["updater"] == wanted["updater"], "no minibatch counts twice"


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("event", [e for e in TRANSFORMERS_EVENTS if e not in ELSEWHERE | AT_ONCE])
def test_an_event_of_transformers(event: str, whole: PPOTrainer, tmp_path: Path) -> None:
    """In the middle of a rollout, or at the end of one."""
    step = 1 + TRANSFORMERS_EVENTS.index(event) % 2
    trainer = trainer_for(tmp_path)
    callback, failed = failing(event, step)
    trainer.add_callback(callback)
    with pytest.raises(Fault, match="the tracker went away") as stop:
        trainer.train()
    assert failed, "the event never came"
    assert trainer.state.global_step == failed[0] + (event == "on_optimizer_step"), "weights and number belong together"
    check_goes_on(trainer, stop.value, tmp_path, whole)


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    for event in ("on_train_begin", "on_step_begin", "on_pre_optimizer_step"):
        trainer = trainer_for(tmp_path)
        trainer.add_callback(failing(event, 0)[0])
        with pytest.raises(Fault) as stop:
            trainer.train()
        assert not getattr(stop.value, "__notes__", []) and not list((tmp_path / "out").glob("checkpoint-*"))


def methods(kind: type) -> list[str]:
    """The public methods that a class of one's own may have."""
    return [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]


# Called before the first step alone.
EARLY = {"controller", "load_state_dict"}
# Methods of the trainer's parts that a run calls, each with what may stand behind it.
SEAMS = {
    **{f"generator's {name}": ("collector.generator", name) for name in methods(Generator)},
    **{f"objective's {name}": ("updater.objective._objective", name) for name in methods(Objective)},
    **{f"controller's {name}": ("updater.controller", name) for name in methods(KLController)},
    "scorer": ("collector", "score"),
    "roles": ("collector", "score_pass"),
    **{event: ("events", event) for event in EVENTS},
    "forward": ("updater", "_loss"),
    "backward": ("updater", "_backward"),
    "guards": ("updater", "finish_minibatch"),
    "evaluation": ("collector", "all_of"),
    "log": ("", "log"),
    "model card": ("", "create_model_card"),
    "weights": ("checkpoints", "save_model"),
    "state": ("checkpoints", "save_state"),
    "tokenizer": ("processing_class", "save_pretrained"),
    "dataloader": ("", "get_batch_samples"),
}
SEAMS = {seam: place for seam, place in SEAMS.items() if place[1] not in EARLY}


class Breaks:
    """Fails at its first call after so many steps of the run, and never again.

    Args:
        work: what it does else.
        step: 4: in a rollout, if it is called in one; 3: in an evaluation.
    """

    def __init__(self, work: Any, step: int = 4) -> None:
        self.work, self.step, self.failed = work, step, False
        self.trainer: PPOTrainer | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.trainer is not None and self.trainer.state.global_step >= self.step and not self.failed:
            self.failed = True
            raise Fault("it went away")
        return self.work(*args, **kwargs)


def breaking(trainer: PPOTrainer, place: tuple[str, str], patch: pytest.MonkeyPatch) -> Breaks:
    """Have a method of one of the trainer's parts fail."""
    path, name = place
    part: Any = trainer
    for attribute in path.split(".") if path else ():
        part = getattr(part, attribute)
    breaks = Breaks(getattr(part, name))
    breaks.trainer = trainer
    patch.setattr(part, name, lambda *args, **kwargs: breaks(*args, **kwargs))
    return breaks


def check_ends_and_goes_on(trainer: PPOTrainer, breaks: Breaks, folder: Path, whole: PPOTrainer) -> None:
    with pytest.raises(Exception, match="it went away") as stop:
        trainer.train()
    assert breaks.failed
    check_goes_on(trainer, stop.value, folder, whole)


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("seam", SEAMS)
def test_a_part_of_the_trainer(seam: str, whole: PPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path)
    check_ends_and_goes_on(trainer, breaking(trainer, SEAMS[seam], monkeypatch), tmp_path, whole)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("step", [3, 4], ids=["evaluation", "rollout"])
@pytest.mark.parametrize("kind", ["now", "later"])
def test_a_reward_function(kind: str, step: int, whole: PPOTrainer, tmp_path: Path) -> None:
    async def cats_later(completions: list[str], **_: Any) -> list[float]:
        return breaks(completions)

    def cats_now(completions: list[str], **_: Any) -> list[float]:
        return breaks(completions)

    breaks = Breaks(cats, step)
    breaks.trainer = trainer = trainer_for(tmp_path, {"now": cats_now, "later": cats_later}[kind])
    check_ends_and_goes_on(trainer, breaks, tmp_path, whole)
    assert trainer.state.global_step == step


def test_reading_the_dataset(whole: PPOTrainer, tmp_path: Path) -> None:
    breaks = Breaks(lambda rows: rows)
    trainer = trainer_for(tmp_path, data=prompt_dataset(16).with_transform(lambda rows: breaks(rows)))
    breaks.trainer = trainer
    check_ends_and_goes_on(trainer, breaks, tmp_path, whole)


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("part", ["rule", "yardstick", "file"])
def test_diagnostics(part: str, whole: PPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    breaks = Breaks({"rule": lambda *_: None, "yardstick": cats}.get(part))
    if part == "file":
        breaks.work = DiagnosticsCallback._write
        monkeypatch.setattr(DiagnosticsCallback, "_write", lambda *args: breaks(*args))
    callback = {
        "rule": lambda: DiagnosticsCallback(rules=[breaks]),
        "yardstick": lambda: DiagnosticsCallback(yardstick=breaks),
        "file": DiagnosticsCallback,
    }[part]()
    breaks.trainer = trainer = trainer_for(tmp_path)
    trainer.add_callback(callback)
    check_ends_and_goes_on(trainer, breaks, tmp_path, whole)


def test_the_table_of_completions(whole: PPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(tmp_path)
    breaks = Breaks(trainer_module.save_completions)
    monkeypatch.setattr(trainer_module, "save_completions", breaks)
    breaks.trainer = trainer
    check_ends_and_goes_on(trainer, breaks, tmp_path, whole)


def test_the_checkpoint_that_a_signal_asks_for(
    whole: PPOTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path)
    breaks = breaking(trainer, SEAMS["weights"], monkeypatch)
    breaks.step = 3

    def terminate(args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    callback = TrainerCallback()
    callback.on_pre_optimizer_step = terminate  # type: ignore[method-assign]
    trainer.add_callback(callback)
    check_ends_and_goes_on(trainer, breaks, tmp_path, whole)
    assert trainer.state.global_step == 3


def test_where_saving_fails_too_the_first_error_is_the_one_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path)
    trainer.add_callback(failing("on_log", 3)[0])

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(trainer.checkpoints, "save_state", full)
    with pytest.raises(Fault, match="the tracker went away") as stop:
        trainer.train()
    (note,) = stop.value.__notes__
    assert note.startswith("The 3 steps before could not be saved (checkpoint-3 could not be written to")


def test_an_optimizer_that_breaks_amid_its_step_leaves_no_checkpoint(tmp_path: Path) -> None:
    """Weights that have moved by half belong to no step."""
    trainer = trainer_for(tmp_path)
    trainer.create_optimizer()
    step, calls = trainer.optimizer.step, []

    def breaks(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise Fault("the optimizer broke")
        return step(*args, **kwargs)

    trainer.optimizer.step = breaks
    with pytest.raises(Fault, match="the optimizer broke"):
        trainer.train()
    assert trainer.state.global_step == 2 and not list((tmp_path / "out").glob("checkpoint-*"))
