"""Held-out feedback, whatever its form, beside a reward role's scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ext.feedback import Judged
from trl_ext.feedback.records import key_of
from trl_ext.generation import generate
from trl_ext.launch.screen import sampling_config
from trl_ext.roles import SharedBase
from trl_ext.trainers.batching import padded_by_length
from trl_ext.trainers.reward_trainer import sequence_ids
from trl_ext.types import as_text


@torch.no_grad()
def scored_answers(
    base: SharedBase, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int = 32
) -> list[Judged]:
    """The answers of `rows` with what people gave them and the reward role's score, for `trl_ext.feedback.judge`.

    Args:
        rows: with the columns of any objective: chosen and rejected, completion and rating or label, completions and
            ranks.
        batch_size: answers of one forward; those of like length go together.
    """
    answers = list(_answers(rows))
    sequences = [sequence_ids(tokenizer, prompt, answer) for prompt, answer, _, _ in answers]
    scores = torch.zeros(len(answers))
    for numbers, ids, mask in padded_by_length(sequences, batch_size):
        scores[numbers] = base.scores(ids.to(base.device), mask.to(base.device)).float().cpu()
    return [
        Judged(group, worth, score, len(as_text(answer)))
        for (_, answer, worth, group), score in zip(answers, scores.tolist(), strict=True)
    ]


@torch.no_grad()
def reference_scores(
    base: SharedBase,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    max_new_tokens: int = 48,
    seed: int = 0,
) -> list[float]:
    """The reward role's scores of one sample of the bare base for each prompt, at temperature 1. Feedback without
    prompts leaves the base nothing to go on from: empty prompts are passed over."""
    prompts = [prompt for prompt in prompts if as_text(prompt)]
    if not prompts:
        return []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = sampling_config(tokenizer, max_new_tokens, do_sample=True)
        rollout = generate(base, prompts, tokenizer, config, len(prompts)).to(base.device)
    return [float(score) for score in base.scores(rollout.input_ids, rollout.attention_mask)]


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
