"""rollouts_ahead: the next rollout is sampled while this one is trained on, and a run goes on exactly.

The stand-in's answers depend on prompt, adapter and seed alone, so two runs are alike where these are."""

import json
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, rows_with, trained_state
from tests.integration.test_processes import launch
from tests.integration.test_vllm import trainer_for as trainer_over
from tests.vllm_server import StandIn, served
from trl_ext import PPOTrainer, RolloutCallback
from trl_ext.generation import GenerationError
from trl_ext.generation.vllm_server import BACKGROUND, AdapterFolders
from trl_ext.rewards import RewardError

ROWS, STEPS = 8, 2  # of a rollout
CLOCKS = ("time/", "train_", "memory/", "eps")
State = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


def trainer_for(folder: Path, server: StandIn, **changes: Any) -> PPOTrainer:
    """Six rollouts over prompts that are used up after four."""
    return trainer_over(folder, server, **{"total_episodes": 6 * ROWS, "rollouts_ahead": 1, **changes})


def outcome(trainer: PPOTrainer) -> State:
    logs = [
        {name: x for name, x in row.items() if not name.startswith(CLOCKS)}
        for row in rows_with(trainer, "objective/scores")
    ]
    return trained_state(trainer), logs


def assert_same(one: State, other: State, logs: bool = True) -> None:
    for ours, theirs in zip(one[1], other[1], strict=True) if logs else ():
        assert {name: (x, theirs.get(name)) for name, x in ours.items() if x != theirs.get(name)} == {}
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name


def saved_ahead(folder: Path, step: int) -> Any:
    return json.loads((folder / "out" / f"checkpoint-{step}" / "ppo_state.json").read_text())["ahead"]


@pytest.fixture(autouse=True)
def no_thread_is_left_over() -> Iterator[None]:
    yield
    for thread in [thread for thread in threading.enumerate() if thread.name == BACKGROUND]:
        thread.join(0.2)  # its answers are there a moment before it ends
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> State:
    """A run that nothing interrupts."""
    with served() as server:
        trainer = trainer_for(tmp_path_factory.mktemp("whole"), server)
        trainer.train()
    return outcome(trainer)


class Note(RolloutCallback):
    """What the policy's adapter is called before each rollout is trained on, and the rollouts themselves."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.names, self.rollouts = folder, [], []  # type: ignore[var-annotated]

    def on_advantages(self, experience: Any, **_: Any) -> None:
        self.names.append(self.folders.write("policy").name)
        self.rollouts.append(experience)

    def of(self, trainer: PPOTrainer) -> "Note":
        self.folders = AdapterFolders(trainer.base, self.folder)
        trainer.add_callback(self)
        return self


def test_a_rollout_is_sampled_by_the_policy_of_before_the_last_update(tmp_path: Path, server: StandIn) -> None:
    """The first by the policy as it is. Each answers its own prompts, with nothing sampled that is not used."""
    trainer = trainer_for(tmp_path, server)
    note, before = Note(tmp_path / "noted").of(trainer), len(server.asked)
    trainer.train()
    asked = server.asked[before:]
    assert len(asked) == 6 * ROWS and len(note.names) == len(set(note.names)) == 6
    sampled_by = [{body["model"] for body in asked[i : i + ROWS]} for i in range(0, len(asked), ROWS)]
    assert sampled_by == [{note.names[max(0, k - 1)]} for k in range(6)]
    for k, experience in enumerate(note.rollouts):
        there = sorted(body["prompt"] for body in asked[k * ROWS : (k + 1) * ROWS])
        assert sorted(experience.rollout.prompt_tokens) == there
    assert len(server.adapters) == 1


def test_its_importance_weights_are_what_its_policies_say(tmp_path: Path, server: StandIn) -> None:
    trainer = trainer_for(tmp_path, server, vllm_importance_sampling_mode="token_truncate")
    note = Note(tmp_path / "noted").of(trainer)
    trainer.train()
    rows = rows_with(trainer, "objective/scores")
    for k, (experience, row) in enumerate(zip(note.rollouts, rows, strict=True)):
        mask = experience.loss_mask
        told, now = experience.rollout.sampling_logprobs[mask], experience.score_pass.logprobs[mask]
        weights = (now.double() - told.double()).exp().clamp(max=3.0)
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(weights.mean()), rel=1e-5)
        assert row["policy/first_approxkl"] == pytest.approx(0.0, abs=1e-8), "PPO's own ratio begins at 1"
        moved = float((now - told).abs().max())
        assert moved < 1e-4 if k == 0 else moved > 1e-3


# A run that stops anywhere goes on exactly ----------------------------------------------------------------------------


def test_it_goes_on_exactly_from_each_step(tmp_path: Path, server: StandIn, whole: State) -> None:
    """What was sampled ahead is saved with each checkpoint and not sampled again; also where a new pass over the
    prompts begins (step 8) and in the last rollout, after which there is none."""
    settings = {"save_strategy": "steps", "save_steps": 1}
    saving = trainer_for(tmp_path, server, **settings)
    saving.train()
    assert_same(outcome(saving), whole)
    for step in (1, 2, 7, 8, 9, 11):
        ahead, before = saved_ahead(tmp_path, step), len(server.asked)
        assert (ahead is None) == (step > 10)
        resumed = trainer_for(tmp_path, server, **settings)
        probed = len(server.asked) - before
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert_same(outcome(resumed), whole)
        begun = min(6, (step - 1) // STEPS + 2)
        assert len(server.asked) - before - probed == (6 - begun) * ROWS


def test_a_checkpoint_waits_for_what_is_under_way(tmp_path: Path, server: StandIn, whole: State) -> None:
    trainer = trainer_for(tmp_path, server, save_strategy="steps", save_steps=STEPS + 1)
    held = Held(server, after=len(server.asked) + 2 * ROWS)  # the third rollout, begun before step 2
    trainer.add_callback(Call("on_step_end", 3, held.release))  # the checkpoint comes after it
    trainer.train()
    assert held.waited and len(saved_ahead(tmp_path, 3)["ids"]) == ROWS
    assert_same(outcome(trainer), whole)
    resumed = trainer_for(tmp_path, server)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert_same(outcome(resumed), whole)


class Held:
    """A server that answers no request after so many until it is released, soon after it is told to."""

    def __init__(self, server: StandIn, after: int) -> None:
        self.server, self.after, self.gate, self.waited = server, after, threading.Event(), False
        self.complete, server.complete = server.complete, self.answer  # type: ignore[method-assign]

    def answer(self, body: dict[str, Any]) -> Any:
        if len(self.server.asked) >= self.after and not self.gate.is_set():
            self.waited = True
            assert self.gate.wait(60)
        return self.complete(body)

    def release(self) -> None:
        threading.Timer(0.5, self.gate.set).start()


class Call(RolloutCallback):
    """Calls something at an event of the Trainer's own, once so many steps were taken."""

    def __init__(self, event: str, step: int, what: Callable[[], Any]) -> None:
        def call(args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                what()

        setattr(self, event, call)


def fail() -> None:
    raise ConnectionResetError("the judge went home")


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("event", ["on_rollout_end", "on_advantages", "on_pre_optimizer_step", "on_step_end"])
def test_a_failure_at_any_stage(event: str, tmp_path: Path, server: StandIn, whole: State) -> None:
    """Of the third rollout: the checkpoint has what was sampled for it, and not what was begun since."""
    trainer = trainer_for(tmp_path, server)
    trainer.add_callback(Failing(event, 2 * STEPS))
    with pytest.raises(Exception, match="the judge went home"):
        trainer.train()
    resumed = trainer_for(tmp_path, server)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), whole, logs=event != "on_step_end")  # which comes before the rollout's row


class Failing(RolloutCallback):
    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, getattr(self, f"_{event}"))

    def _fail(self, state: Any) -> None:
        if state.global_step == self.step:
            raise ConnectionResetError("the judge went home")

    def _on_rollout_end(self, state: Any, rollout: Any) -> None:
        self._fail(state)

    def _on_advantages(self, state: Any, experience: Any) -> None:
        self._fail(state)

    def _on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._fail(state)

    _on_step_end = _on_pre_optimizer_step


def test_an_adapter_that_cannot_be_written(
    tmp_path: Path,
    server: StandIn,
    whole: State,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next rollout cannot begin: this one's completions, which are there, are not lost."""
    trainer, write = trainer_for(tmp_path, server), AdapterFolders.write

    def full(folders: AdapterFolders, adapter: str) -> Any:
        if trainer.state.global_step == 2 * STEPS:
            raise OSError("No space left on device")
        return write(folders, adapter)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterFolders, "write", full)
        with pytest.raises(GenerationError, match=r"^VLLMServerGenerator\.begin raised OSError: No space left .*saved"):
            trainer.train()
    before = len(server.asked)
    resumed = trainer_for(tmp_path, server)
    probed = len(server.asked) - before
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), whole)
    assert len(server.asked) - before - probed == 3 * ROWS


def test_ctrl_c(tmp_path: Path, server: StandIn, whole: State) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        trainer = trainer_for(tmp_path, server)
        trainer.add_callback(Call("on_pre_optimizer_step", 2, lambda: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert trainer.state.global_step == 3
    resumed = trainer_for(tmp_path, server)
    resumed.train(resume_from_checkpoint=True)
    assert_same(outcome(resumed), whole)


def test_a_server_that_goes_while_the_policy_is_trained(tmp_path: Path, server: StandIn) -> None:
    """The rollout in use is trained on to its end and saved. What was under way is lost: the run that goes on samples
    it by the policy as it is then."""
    trainer = trainer_for(tmp_path, server)
    server.die_after = len(server.asked) + 2 * ROWS + 3  # in the third rollout, while the second is trained on
    message = r"^(No vLLM server answers any|vLLM gave no answer in 4) .* All 4 steps before are saved in .*point-4'"
    with pytest.raises(GenerationError, match=message):
        trainer.train()
    assert saved_ahead(tmp_path, 4) is None
    server.die_after = -1
    server.start()
    again = trainer_for(tmp_path, server)
    note = Note(tmp_path / "noted").of(again)
    before = len(server.asked)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6 * STEPS
    asked = server.asked[before:]
    assert len(asked) == 4 * ROWS, "nothing that was trained on is sampled again"
    sampled_by = [{body["model"] for body in asked[i : i + ROWS]} for i in range(0, len(asked), ROWS)]
    assert sampled_by == [{note.names[max(0, k - 1)]} for k in range(4)]


# What else uses the servers, and the end ------------------------------------------------------------------------------


def test_evaluations_change_nothing(tmp_path: Path, server: StandIn, whole: State) -> None:
    """Not even one that comes while the next rollout is under way, whose adapter it would unload."""
    trainer = trainer_for(tmp_path, server, eval_strategy="steps", eval_steps=1)
    held = Held(server, after=len(server.asked) + 2 * ROWS + 2 * 5 + 3)  # in the third rollout
    trainer.add_callback(Call("on_step_end", 3, held.release))
    trainer.train()
    assert held.waited
    assert_same(outcome(trainer), whole)
    assert len(rows_with(trainer, "eval_objective/scores")) == 6 * STEPS


def test_training_that_is_stopped_and_begins_anew(tmp_path: Path, server: StandIn) -> None:
    """What the first training has begun is nobody's."""
    trainer = trainer_for(tmp_path, server)

    class Stop(RolloutCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    stop = Stop()
    trainer.add_callback(stop)
    trainer.train()
    assert trainer.collector.ahead is None
    trainer.remove_callback(stop)
    note, before = Note(tmp_path / "noted").of(trainer), len(server.asked)
    trainer.train()
    assert len(server.asked) - before == 6 * ROWS
    assert {body["model"] for body in server.asked[before : before + ROWS]} == {note.names[0]}


def test_other_prompts_than_were_asked_are_answered_anew(
    tmp_path: Path,
    server: StandIn,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As where a run goes on with another data set."""
    settings = {"save_strategy": "steps", "save_steps": 3, "total_episodes": 3 * ROWS}
    trainer_for(tmp_path, server, **settings).train()
    path = tmp_path / "out" / "checkpoint-3" / "ppo_state.json"
    state = json.loads(path.read_text())
    state["ahead"]["prompts"][0] += " cat"
    path.write_text(json.dumps(state))
    resumed, before = trainer_for(tmp_path, server, **settings), len(server.asked)
    note = Note(tmp_path / "noted").of(resumed)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(path.parent))
    assert "has other prompts than come now: it is dropped" in caplog.text
    assert {body["model"] for body in server.asked[before:]} == {note.names[0]} and len(server.asked) - before == ROWS


def test_a_stream_is_read_once(tmp_path: Path, server: StandIn) -> None:
    """And gives what a list of the same prompts gives."""
    whole = trainer_for(tmp_path, server, total_episodes=4 * ROWS, shuffle_dataset=False)
    whole.train()
    rows, read = prompt_dataset(32), []
    stream = rows.to_iterable_dataset().map(lambda row: read.append(row["prompt"]) or row)
    streamed = PPOTrainer(
        str(tmp_path / "model"),
        cats,
        config(tmp_path / "streamed", **kept(whole), total_episodes=4 * ROWS),
        stream,
        None,
        word_tokenizer(),
        peft_config=LORA,
    )
    read.clear()
    streamed.train()
    assert read == list(rows["prompt"])
    assert_same(outcome(streamed), outcome(whole))


def kept(trainer: PPOTrainer) -> dict[str, Any]:
    """Settings of a trainer that say who answers."""
    names = ("use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_probe_tolerance", "rollouts_ahead")
    return {name: getattr(trainer.args, name) for name in names}


def test_a_reward_function_that_fails_ends_the_run_at_once(tmp_path: Path, server: StandIn) -> None:
    """In the first rollout, where nothing is saved: the next is under way, and waited for."""
    trainer = trainer_for(tmp_path, server)
    trainer.collector.scorer._functions[0] = lambda **_: fail()  # type: ignore[union-attr]
    with pytest.raises(RewardError, match="the judge went home"):
        trainer.train()
    assert trainer.collector.ahead is None


# Several processes ----------------------------------------------------------------------------------------------------


def run_two(folder: Path, server: StandIn, out: str, *checkpoint: str) -> subprocess.CompletedProcess[str]:
    model = saved_model(folder / "model")
    return launch(2, Path(__file__).with_name("ahead_worker.py"), model, str(folder / out), server.url, *checkpoint)


def ended(folder: Path, done: subprocess.CompletedProcess[str]) -> State:
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((folder / "logs.json").read_text())
    logs = [{name: x for name, x in row.items() if not name.startswith(CLOCKS)} for row in rows]
    return load_file(folder / "trained.safetensors"), [row for row in logs if "objective/scores" in row]


@pytest.mark.long
def test_each_of_two_processes_begins_its_share(tmp_path: Path, server: StandIn) -> None:
    """And goes on exactly from the middle of a rollout, with evaluations while the other's share is under way."""
    whole = ended(tmp_path / "whole", run_two(tmp_path, server, "whole"))
    models = [body["model"] for body in server.asked if body["max_tokens"] == 6]
    assert len(models) == 5 * ROWS + 10 * 6, "rollouts, and evaluations, whose five prompts two processes make six"
    resumed = run_two(tmp_path, server, "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(ended(tmp_path / "resumed", resumed), whole)


@pytest.mark.long
def test_a_server_that_goes_ends_both_processes_after_a_checkpoint(tmp_path: Path, server: StandIn) -> None:
    server.die_after = 2 * 2 * 4 + 2 * ROWS + 3  # the probes, two rollouts, and some of an evaluation or the third
    done = run_two(tmp_path, server, "gone")
    assert done.returncode != 0
    assert done.stderr.count("No vLLM server answers any more at") >= 2, done.stderr[-3000:]
    [checkpoint] = (tmp_path / "gone").glob("checkpoint-*")
    server.die_after = -1
    server.start()
    ended(tmp_path / "again", run_two(tmp_path, server, "again", str(checkpoint)))
