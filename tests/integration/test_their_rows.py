"""Trainers take rows in what people hold them in: lists, DataFrames, a data set of one split."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig

from tests.helpers import QUIET, prompt_dataset, saved_model, word_tokenizer
from trl_ext import FeedbackRewardConfig, FeedbackRewardTrainer, PPOConfig, PPOTrainer

PROMPTS = prompt_dataset(8)
RATED = Dataset.from_list([{"prompt": "the red", "completion": "cat " * n, "rating": float(n)} for n in range(1, 9)])


def many_cats(completions: list[str], **_: Any) -> list[float]:
    return [float(text.count("cat")) for text in completions]


def ppo(folder: Path, rows: Any, evaluated: Any = None) -> PPOTrainer:
    settings = {"per_device_train_batch_size": 4, "max_completion_length": 4, "total_episodes": 8, "disable_tqdm": True}
    lora = LoraConfig(r=4, target_modules="all-linear")
    args = PPOConfig(str(folder / "out"), **settings, **QUIET)
    return PPOTrainer(
        saved_model(folder / "model"), many_cats, args, rows, evaluated, word_tokenizer(), peft_config=lora
    )


def reward(folder: Path, rows: Any, evaluated: Any = None) -> FeedbackRewardTrainer:
    saved_model(folder / "model")
    args = FeedbackRewardConfig(str(folder / "out"), objective="regression", disable_tqdm=True, **QUIET)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    return FeedbackRewardTrainer(str(folder / "model"), args, rows, evaluated, peft_config=lora)


HELD_IN = {
    "a list": list,
    "a DataFrame": lambda rows: pd.DataFrame(list(rows)),
    "one split": lambda rows: DatasetDict({"everything": rows}),
}


@pytest.mark.parametrize("held_in", HELD_IN)
def test_rows_are_trained_on(held_in: str, tmp_path: Path) -> None:
    wrap = HELD_IN[held_in]
    evaluated = None if held_in == "one split" else wrap
    trainer = ppo(tmp_path, wrap(PROMPTS), evaluated and evaluated(PROMPTS))
    assert trainer.train_dataset["prompt"][:] == PROMPTS["prompt"][:]
    assert evaluated is None or trainer.eval_dataset["prompt"][:] == PROMPTS["prompt"][:]
    trainer.train()
    judge = reward(tmp_path / "judge", wrap(RATED), evaluated and evaluated(RATED))
    assert len(judge.train_dataset) == 8


@pytest.mark.parametrize("make", [ppo, reward])
def test_several_splits_are_named(make: Any, tmp_path: Path) -> None:
    rows = PROMPTS if make is ppo else RATED
    sentence = r"^train_dataset has the splits 'train', 'test': give one, as in dataset\['train'\]\.$"
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, DatasetDict({"train": rows, "test": rows}))
