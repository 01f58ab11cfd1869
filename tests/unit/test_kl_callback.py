"""AdaptiveKLCallback outside of a trainer: what it counts, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from trl_ext import AdaptiveKLCallback, AdaptiveKLController

ARGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3,
    "world_size": 1,
    "num_generations": 2,
    "num_iterations": 2,
    "beta": 0.05,
}


def test_answers_that_several_steps_share_count_once() -> None:
    """GRPOTrainer: a step trains on 4 x 3 answers, each of them twice."""
    trainer = SimpleNamespace(beta=0.05)
    callback = AdaptiveKLCallback(AdaptiveKLController(init=0.05, target=1.0, horizon=100), trainer=trainer)
    state, args = TrainerState(), SimpleNamespace(**ARGS)
    callback.on_train_begin(args, state, TrainerControl())
    expected = AdaptiveKLController(init=0.05, target=1.0, horizon=100)
    for step, answers in ((2, 12), (6, 24)):
        state.global_step = step
        callback.on_log(args, state, TrainerControl(), logs={"kl": 0.1, "completions/mean_length": 20.0})
        expected.update(0.1 * 20.0, answers)
        assert trainer.beta == pytest.approx(expected.value, rel=1e-12)


def test_a_loss_that_copies_beta_is_refused() -> None:
    trainer = SimpleNamespace(beta=0.05, liger_loss=object())
    callback = AdaptiveKLCallback(trainer=trainer)
    with pytest.raises(ValueError, match="set use_liger_kernel to False"):
        callback.on_train_begin(SimpleNamespace(**ARGS, use_liger_kernel=True), TrainerState(), TrainerControl())


def test_a_kl_that_could_not_be_measured_changes_nothing() -> None:
    """GRPOTrainer logs None where every value of a window is NaN."""
    trainer = SimpleNamespace(beta=0.05)
    callback = AdaptiveKLCallback(AdaptiveKLController(init=0.05), trainer=trainer)
    callback.on_train_begin(SimpleNamespace(**ARGS), TrainerState(), TrainerControl())
    logs = {"kl": None, "completions/mean_length": 20.0}
    callback.on_log(SimpleNamespace(**ARGS), TrainerState(), TrainerControl(), logs=logs)
    assert trainer.beta == 0.05


def test_what_was_sampled_before_the_callback_came_is_not_counted() -> None:
    trainer, state = SimpleNamespace(beta=0.05), TrainerState()
    callback = AdaptiveKLCallback(AdaptiveKLController(init=0.05, target=1.0, horizon=100), trainer=trainer)
    state.global_step = 500  # of a checkpoint without it
    callback.on_train_begin(SimpleNamespace(**ARGS), state, TrainerControl())
    state.global_step = 502
    callback.on_log(SimpleNamespace(**ARGS), state, TrainerControl(), logs={"kl": 1, "completions/mean_length": 20.0})
    expected = AdaptiveKLController(init=0.05, target=1.0, horizon=100)
    expected.update(20.0, 12)
    assert trainer.beta == pytest.approx(expected.value, rel=1e-12)


def test_a_trainer_of_ppo_is_not_needed_and_does_no_harm() -> None:
    args = SimpleNamespace(kl_coef=0.3)
    callback = AdaptiveKLCallback(AdaptiveKLController(init=0.05), trainer=SimpleNamespace())
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    assert args.kl_coef == 0.05
