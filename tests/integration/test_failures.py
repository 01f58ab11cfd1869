"""What fails ends the run after a checkpoint from which it goes on as if nothing had been."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from tests.integration.test_ppo_trainer import trained_state, trainer_for
from trl_ext import PPOTrainer, RolloutCallback
from trl_ext.callbacks import CallbackError


def failing(event: str, step: int) -> RolloutCallback:
    """A callback whose `event` fails once the run has come to `step`."""

    def fail(args: Any, state: Any, *_: Any) -> None:
        if state.global_step == step:
            raise ConnectionResetError("the judge went home")

    callback = RolloutCallback()
    setattr(callback, event, fail)
    return callback


# 16 prompts and 8 answers a rollout: an epoch is two rollouts of two steps.
SETTINGS: dict[str, Any] = {"total_episodes": 64, "score_normalization": "running", "rows": 16}


EVALUATIONS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> PPOTrainer:
    """A run in which nothing fails."""
    trainer = trainer_for(tmp_path_factory.mktemp("whole"), **SETTINGS, **EVALUATIONS)
    trainer.train()
    return trainer


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("on_rollout_end", 2),
        ("on_scores", 4),  # the first rollout of an epoch
        ("on_advantages", 6),
        ("on_update_begin", 6),
        ("on_ppo_epoch_end", 5),
        ("on_update_end", 6),
        ("on_evaluation_end", 6),
    ],
)
def test_a_run_goes_on_where_a_callback_failed(event: str, step: int, whole: PPOTrainer, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, **SETTINGS, **EVALUATIONS)
    trainer.add_callback(failing(event, step))
    with pytest.raises(CallbackError, match=rf"All {step} steps before are saved in .*checkpoint-{step}'"):
        trainer.train()
    again = trainer_for(tmp_path, **SETTINGS, **EVALUATIONS)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 16
    expected = trained_state(whole)
    for name, tensor in trained_state(again).items():
        assert torch.equal(tensor, expected[name]), name
    moments = [trainer.collector.combination.moments.state_dict() for trainer in (whole, again)]
    assert moments[0] == moments[1], "no score counts twice"


def test_a_checkpoint_of_an_earlier_run_is_not_taken_for_this_one_s(tmp_path: Path) -> None:
    """Of the same number in the same folder; what this run has trained is saved in its place."""
    settings = {**SETTINGS, "learning_rate": 1e-3}
    old = trainer_for(tmp_path, save_strategy="steps", save_steps=2, **settings)
    old.train()
    trainer = trainer_for(tmp_path, **settings, seed=7)
    trainer.add_callback(failing("on_rollout_end", 2))
    with pytest.raises(CallbackError, match=r"All 2 steps before are saved in .*checkpoint-2'"):
        trainer.train()
    kept = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
    mine = get_peft_model_state_dict(trainer.base.model, adapter_name=trainer.base.adapters["policy"])
    for name, tensor in mine.items():
        assert torch.equal(kept[name], tensor), name


def test_a_step_that_is_left_out_touches_no_gradient_and_has_the_norm_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At fp16 a second unscaling without a step between raises."""
    trainer = trainer_for(tmp_path, max_grad_norm=0.0, max_approx_kl=1e-12, num_ppo_epochs=3, total_episodes=16)
    clip, calls = trainer.accelerator.clip_grad_norm_, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(trainer.accelerator.gradient_state.sync_gradients)
        return clip(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", counted)
    trainer.train()
    assert calls and all(calls) and len(calls) < trainer.state.global_step
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    assert norms and min(norms) > 0


def test_training_again_after_an_error_amid_a_minibatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the minibatch that was under way is left for the next one."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "total_episodes": 32}
    whole = trainer_for(tmp_path / "whole", **settings)
    whole.train()
    trainer = trainer_for(tmp_path, **settings, save_strategy="steps", save_steps=2)
    backward, calls = trainer.updater._backward, []

    def full(loss: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 9:  # value role and policy have a backward each: the first of the third step
            raise torch.OutOfMemoryError("out of memory")
        return backward(loss)

    monkeypatch.setattr(trainer.updater, "_backward", full)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.state.global_step == 2 and not trainer.updater.idle
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == whole.state.global_step == 8
    assert trainer.updater.idle
    expected = trained_state(whole)
    for name, tensor in trained_state(trainer).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_torch_empty_cache_steps_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    trainer: PPOTrainer = trainer_for(tmp_path, torch_empty_cache_steps=2)
    monkeypatch.setattr("trl_ext.ppo.trainer.clear_device_cache", lambda: emptied.append(trainer.state.global_step))
    trainer.train()
    assert emptied == [0, 2]
