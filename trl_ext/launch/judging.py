"""A reward role judged on held-out feedback, whatever its form."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ext.feedback import Judged, Judgement, judge, save_judgement
from trl_ext.feedback.records import key_of, text_of
from trl_ext.launch.screen import answer_ids
from trl_ext.roles import SharedBase


@torch.no_grad()
def judge_reward_role(
    base: SharedBase, tokenizer: PreTrainedTokenizerBase, rows: Dataset, output_dir: str
) -> Judgement:
    """Score the answers of `rows` with the reward role, compare with what people said, and write judgement.json and
    judgement.png into `output_dir`.

    Args:
        rows: with the columns of any objective: chosen and rejected, completion and rating or label, completions and
            ranks.
    """
    answers = []
    for prompt, answer, worth, group in _answers(rows):
        ids = answer_ids(tokenizer, prompt, answer).to(base.device)
        score = float(base.scores(ids, torch.ones_like(ids)))
        answers.append(Judged(group, worth, score, len(text_of(answer))))
    judgement = judge(answers)
    save_judgement(judgement, Path(output_dir), answers)
    return judgement


def _answers(rows: Dataset) -> Iterator[tuple[Any, Any, float, str]]:
    """(prompt, answer, what people gave it, which answers it is compared with) of every answer."""
    for number, row in enumerate(rows):
        prompt = row.get("prompt", "")
        if "chosen" in row:
            yield prompt, row["chosen"], 1.0, str(number)
            yield prompt, row["rejected"], 0.0, str(number)
        elif "completions" in row:
            for answer, rank in zip(row["completions"], row["ranks"], strict=True):
                yield prompt, answer, -float(rank), str(number)
        else:
            worth = row["rating"] if "rating" in row else row["label"]
            yield prompt, row["completion"], float(worth), key_of(prompt)
