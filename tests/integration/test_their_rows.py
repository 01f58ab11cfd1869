"""Trainers take rows in what people hold them in: lists, DataFrames, a data set of one split."""

import tempfile
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


def written(rows: Dataset, kind: str) -> str:
    path = Path(tempfile.mkdtemp()) / f"rows.{kind}".rstrip(".")
    if kind == "":
        rows.save_to_disk(path)
    elif kind == "jsonl":
        rows.to_json(path)
    else:
        rows.to_csv(path)
    return str(path)


HELD_IN = {
    "a list": list,
    "a DataFrame": lambda rows: pd.DataFrame(list(rows)),
    "a file": lambda rows: written(rows, "jsonl"),
    "a CSV file": lambda rows: written(rows, "csv"),
    "a saved folder": lambda rows: written(rows, ""),
    "several": lambda rows: [written(rows.select(range(3)), "jsonl"), pd.DataFrame(list(rows.select(range(3, 8))))],
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
    if held_in == "a CSV file":
        return  # its cells are texts, and a rating is a number
    judge = reward(tmp_path / "judge", wrap(RATED), evaluated and evaluated(RATED))
    assert len(judge.train_dataset) == 8


@pytest.mark.parametrize("make", [ppo, reward])
def test_several_splits_are_named(make: Any, tmp_path: Path) -> None:
    rows = PROMPTS if make is ppo else RATED
    sentence = r"^train_dataset has the splits 'train', 'test': give one, as in dataset\['train'\]\.$"
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, DatasetDict({"train": rows, "test": rows}))


def test_a_name_that_says_too_little(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl' does not exist"):
        ppo(tmp_path, "gone.jsonl")
    with pytest.raises(ValueError, match="eval_dataset is 'someone/prompts', which does not say its split"):
        ppo(tmp_path, PROMPTS, "someone/prompts")
    with pytest.raises(ValueError, match="eval_dataset is 'someone/ratings', which does not say its split"):
        reward(tmp_path, RATED, "someone/ratings")
    with pytest.raises(ValueError, match=r"unlike columns \(prompt; prompt, topic\): keep those that all of them have"):
        ppo(tmp_path, [Dataset.from_dict({"prompt": ["the"]}), Dataset.from_dict({"prompt": ["a"], "topic": ["b"]})])
