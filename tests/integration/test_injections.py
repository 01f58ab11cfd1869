"""Fifty short runs, each with something that goes bad at a random moment: all of them end well."""

import json
import math
import random
import re
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from tests.helpers import QUIET, prompt_dataset, saved_model, word_tokenizer
from trl_ext import PPOConfig, PPOTrainer
from trl_ext.rewards import RewardError

RUNS = 50
FAULTS = (
    "NaN score",
    "infinite score",
    "raise",
    "hang",
    "too few",
    "out of memory",
    "NaN gradient",
    "infinite gradient",
)
ROLLOUTS, STEPS = 4, 4  # rollouts, and optimizer steps in one


class Judge:
    """A reward function that fails in one of its calls."""

    def __init__(self, fault: str, call: int, row: int) -> None:
        self.fault, self.call, self.row, self.calls = fault, call, row, 0
        self.__name__ = "judge"

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        scores = [float(text.split().count("cat")) for text in completions]
        self.calls += 1
        if self.calls == self.call:
            if self.fault == "raise":
                raise ConnectionResetError("the judge went home")
            if self.fault == "hang":
                time.sleep(1.0)
            if self.fault == "too few":
                return scores[1:]
            if self.fault in ("NaN score", "infinite score"):
                scores[self.row] = math.nan if self.fault == "NaN score" else math.inf
        return scores


def trainer_for(tmp_path: Path, judge: Judge) -> PPOTrainer:
    args = PPOConfig(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=8 * ROLLOUTS,
        max_completion_length=5,
        learning_rate=1e-2,
        score_normalization="running",
        reward_timeout=0.3 if judge.fault == "hang" else None,
        gradient_checkpointing=False,
        evidence=False,  # it would call what is counted here
        disable_tqdm=True,
        **QUIET,
    )
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = str(tmp_path / "model")
    return PPOTrainer(model, judge, args, prompt_dataset(16), None, word_tokenizer(), peft_config=lora)


def spoil_gradients(trainer: PPOTrainer, number: float, step: int, role: Any, rng: random.Random) -> None:
    """One entry of one gradient of `role` becomes `number` in optimizer step `step`."""
    parameter = rng.choice([p for p in trainer.base.trainable_parameters(role) if p.dim() > 1])

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step == step:
            gradient = gradient.clone()
            gradient.view(-1)[rng.randrange(gradient.numel())] = number
        return gradient

    parameter.register_hook(spoil)


def run_out_of_memory(trainer: PPOTrainer, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the generation of the rollout with the number `call`."""
    generate, calls = trainer.base.generate, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(*args, **kwargs)

    monkeypatch.setattr(trainer.base, "generate", failing)


def all_finite(trainer: PPOTrainer) -> bool:
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    numbers = trainer.collector.combination.moments.state_dict()
    flat = json.loads(json.dumps(numbers), parse_constant=lambda name: pytest.fail(f"moments hold {name}"))
    return flat is not None and all(bool(t.isfinite().all()) for t in [*trainer.base.parameters(), *moments])


@pytest.mark.sampled(every=10)
@pytest.mark.parametrize("seed", range(RUNS))
def test_a_fault_at_a_random_moment(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    saved_model(tmp_path / "model")
    fault, rollout = FAULTS[seed % len(FAULTS)], rng.randrange(ROLLOUTS)
    step, row = STEPS * rollout, rng.randrange(8)
    judge = Judge(fault, rollout + 1, row)
    trainer = trainer_for(tmp_path, judge)
    if "gradient" in fault:
        number, role = (math.nan if "NaN" in fault else math.inf), rng.choice(["policy", "value"])
        spoil_gradients(trainer, number, step + rng.randrange(STEPS), role, rng)
        trainer.train()
        skipped = sum(row.get("policy/skipped_minibatches", 0.0) for row in trainer.state.log_history)
        assert skipped > 0 and trainer.state.global_step == STEPS * ROLLOUTS
        assert all_finite(trainer)
        return
    if fault == "out of memory":
        run_out_of_memory(trainer, rollout + 1, monkeypatch)
    kind = torch.OutOfMemoryError if fault == "out of memory" else RewardError
    with pytest.raises(kind) as stop:
        trainer.train()
    said = str(stop.value)
    assert "\n" not in said and (
        "'judge'" in said if kind is RewardError else "local_rollout_forward_batch_size" in said
    )
    if fault in ("NaN score", "infinite score"):
        assert re.search(rf"completion {row}\b", said), said
    assert all_finite(trainer)
    assert trainer.state.global_step == step
    if step == 0:
        return
    assert f"All {step} steps before are saved in" in said
    again = trainer_for(tmp_path, Judge("", 0, 0))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS * ROLLOUTS and all_finite(again)


@pytest.mark.parametrize("limit", [6_000, 20_000], ids=["adapters", "optimizer"])
def test_a_disk_that_is_full(limit: int, tmp_path: Path) -> None:
    """No file may grow beyond `limit` bytes once there is one checkpoint."""
    saved_model(tmp_path / "model")
    trainer = trainer_for(tmp_path, Judge("", 0, 0))
    trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, 4

    class Full(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    trainer.add_callback(Full())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match=r"^checkpoint-8 could not be written to .* resume from checkpoint-4, which"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["checkpoint-4"]
    again = trainer_for(tmp_path, Judge("", 0, 0))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS * ROLLOUTS
