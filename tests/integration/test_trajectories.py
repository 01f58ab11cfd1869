"""The first twenty updates of three small runs, as they were when last looked at.

A change in numerics shows here, and is then explained and recorded:

    python -m tests.integration.test_trajectories     # writes trajectories/trl-<version>/*.json anew

TRL's versions draw adapters and batches in different orders, so each that CI runs has its own record.
"""

import json
import platform
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer

from tests.helpers import DEVICE, QUIET, prompt_dataset, saved_model, word_tokenizer
from trl_ext import FeedbackRewardConfig, FeedbackRewardTrainer, PPOConfig, PPOTrainer

RECORDS = Path(__file__).parent / "trajectories" / f"trl-{version('trl')}"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
UPDATES = 20
# Kernels of another CPU round differently; over twenty updates that stays below this, a changed formula does not.
RELATIVE, ABSOLUTE = 2e-3, 2e-5
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "gradient_checkpointing": False,
    **QUIET,
    "disable_tqdm": True,
}


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type=task)


def pairs() -> Dataset:
    answers = [(" cat", " dog"), (" bird flew", " tree"), (" cat sat", " red"), (" small cat", " big dog")]
    rows = [("the", *answers[i % 4]) if i % 3 else ("a big", *reversed(answers[i % 4])) for i in range(32)]
    return Dataset.from_list([{"prompt": p, "chosen": chosen, "rejected": rejected} for p, chosen, rejected in rows])


def cats(completions: list[str], **_: Any) -> list[float]:
    return [float(text.split().count("cat")) - 0.1 * len(text.split()) for text in completions]


def ppo(folder: Path, model: str) -> Trainer:
    settings = {**COMMON, "logging_steps": None, "num_ppo_epochs": 2, "max_completion_length": 6}
    args = PPOConfig(str(folder), total_episodes=16 * UPDATES, num_mini_batches=2, missing_eos_penalty=0.5, **settings)
    return PPOTrainer(model, cats, args, prompt_dataset(32), None, word_tokenizer(), peft_config=lora("CAUSAL_LM"))


def reward(folder: Path, model: str) -> Trainer:
    args = FeedbackRewardConfig(str(folder), max_steps=UPDATES, center_rewards_coefficient=0.01, **COMMON)
    return FeedbackRewardTrainer(model, args, pairs(), peft_config=lora("SEQ_CLS"))


def dpo(folder: Path, model: str) -> Trainer:
    args = DPOConfig(str(folder), max_steps=UPDATES, **COMMON)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return DPOTrainer(
        policy, args=args, train_dataset=pairs(), processing_class=word_tokenizer(), peft_config=lora("CAUSAL_LM")
    )


# The run, and what is recorded of it.
RUNS: dict[str, tuple[Callable[[Path, str], Trainer], tuple[str, ...]]] = {
    "ppo": (
        ppo,
        (
            "loss",
            "grad_norm/policy",
            "grad_norm/value",
            "objective/kl",
            "objective/entropy",
            "objective/scores",
            "objective/rlhf_reward",
            "policy/approxkl_avg",
            "policy/clipfrac_avg",
            "loss/policy_avg",
            "loss/value_avg",
            "val/explained_variance",
            "completions/mean_length",
        ),
    ),
    "reward": (reward, ("loss", "grad_norm", "accuracy", "margin", "mean_reward")),
    "dpo": (dpo, ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")),
}


def trajectory(name: str, folder: Path) -> dict[str, list[float]]:
    """Every metric at every update."""
    build, metrics = RUNS[name]
    trainer = build(folder / "out", saved_model(folder / "model"))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == UPDATES
    return {metric: [float(f"{row[metric]:.6g}") for row in rows] for metric in metrics}


def environment() -> dict[str, str]:
    return {"machine": platform.machine(), **{package: version(package) for package in PACKAGES}}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_the_course_that_was_recorded(name: str, tmp_path: Path) -> None:
    if not RECORDS.is_dir():
        pytest.skip(f"nothing is recorded for TRL {version('trl')}")
    recorded = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    if name == "ppo" and DEVICE.type != "cpu":
        pytest.skip("another device draws other random numbers, and so other answers")
    found = trajectory(name, tmp_path)
    assert found.keys() == recorded["trajectory"].keys()
    off = [
        f"update {update + 1}: {metric} is {now}, was {then}"
        for update in range(UPDATES)
        for metric in found
        if (now := found[metric][update])
        != pytest.approx((then := recorded["trajectory"][metric][update]), rel=RELATIVE, abs=ABSOLUTE)
    ]
    assert not off, f"{len(off)} differ, first {off[:3]}; recorded with {recorded['environment']}, now {environment()}"


if __name__ == "__main__":
    RECORDS.mkdir(parents=True, exist_ok=True)
    for run in RUNS:
        with tempfile.TemporaryDirectory() as root:
            record = {"environment": environment(), "trajectory": trajectory(run, Path(root))}
        (RECORDS / f"{run}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
