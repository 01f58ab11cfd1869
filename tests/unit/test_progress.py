"""What a run's lines say."""

from pathlib import Path

import pytest

from trl_ext import PPOConfig
from trl_ext.callbacks.progress import shown
from trl_ext.launch.progress import steps_in_words


@pytest.mark.parametrize(
    ("settings", "steps", "words"),
    [
        (
            {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "num_mini_batches": 2},
            400,
            "400 steps = 50 rollouts of 64 completions x 4 epochs x 2 minibatches",
        ),
        (
            {"per_device_train_batch_size": 1, "num_ppo_epochs": 1},
            1,
            "1 step = 1 rollout of 1 completion x 1 epoch x 1 minibatch",
        ),
        (
            {"per_device_train_batch_size": 8},
            8000,
            "8,000 steps = 2,000 rollouts of 8 completions x 4 epochs x 1 minibatch",
        ),
    ],
)
def test_steps_in_words(settings: dict[str, int], steps: int, words: str, tmp_path: Path) -> None:
    assert steps_in_words(PPOConfig(str(tmp_path), use_cpu=True, **settings), steps) == words


def test_a_step_of_ppo_shows_no_sum_of_losses() -> None:
    """Neither with the figures of its rollout, nor, at logging_steps=1, without them."""
    assert shown({"loss": 64.4, "policy/entropy_avg": 1.0, "policy/clipfrac_avg": 0.25}) == {
        "entropy": "1",
        "clipped": "0.25",
    }
    assert "loss" not in shown({"loss": 64.4, "policy/entropy_avg": 1.0, "objective/kl": 0.5})
    assert shown({"loss": 0.5}) == {"loss": "0.5"}
