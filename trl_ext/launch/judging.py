"""Held-out feedback of any form beside a reward role's scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ext.feedback import ScoredAnswer
from trl_ext.feedback.records import key_of
from trl_ext.launch.screen import answered
from trl_ext.reward_models.rows import answer_ids
from trl_ext.roles import SharedBase
from trl_ext.tokens import eos_ids, padded_by_length, reward_suffix
from trl_ext.types import as_text


def scored_answers(
    base: SharedBase, tokenizer: PreTrainedTokenizerBase, rows: Dataset, batch_size: int = 32, role: str = "reward"
) -> list[ScoredAnswer]:
    """The answers of `rows` with people's feedback and the reward role's scores, for `trl_ext.feedback.judge`.

    Args:
        rows: with the columns of any objective: chosen and rejected, completion and rating or label, completions and
            ranks.
        batch_size: answers in one forward; answers of like length share one.
        role: one of several reward roles, in place of all combined.
    """
    answers = list(_answers(rows))
    sequences = [answer_ids(tokenizer, row, answer) for row, answer, _, _ in answers]
    scores = scores_of(base, sequences, batch_size, role)
    return [
        ScoredAnswer(group, worth, score, len(as_text(answer)))
        for (_, answer, worth, group), score in zip(answers, scores, strict=True)
    ]


@torch.no_grad()
def scores_of(
    base: SharedBase, sequences: Sequence[Sequence[int]], batch_size: int = 32, role: str = "reward"
) -> list[float]:
    """The reward role's score of each sequence of ids, as `answer_ids` gives them."""
    scores = torch.zeros(len(sequences))
    for numbers, ids, mask in padded_by_length(sequences, batch_size):
        scores[numbers] = base.scores(ids.to(base.device), mask.to(base.device), role).float().cpu()
    return scores.tolist()


@torch.no_grad()
def reference_scores(
    base: SharedBase,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> list[float]:
    """The reward role's scores of one sample of the untrained policy for each prompt, at temperature 1, read as PPO
    reads them. Empty prompts are left out: there is nothing to continue."""
    prompts = [prompt for prompt in prompts if as_text(prompt)]
    if not prompts:
        return []
    rollout = answered(base, tokenizer, prompts, max_new_tokens, batch_size)
    suffix = reward_suffix(prompts, tokenizer, eos_ids(base.causal_lm, tokenizer))
    scores: list[float] = []
    for rows in torch.arange(len(prompts)).split(batch_size):
        part = rollout.rows(rows).to(base.device)
        output = base(
            part.input_ids,
            part.attention_mask,
            part.completion_ids.shape[1],
            roles=("reward",),
            reward_suffix_ids=suffix,
            reward_suffix_rows=part.has_eos,
        )
        scores += output["scores"].tolist()
    return scores


def _answers(rows: Dataset) -> Iterator[tuple[Any, Any, float, str]]:
    """(row, answer, worth, group of answers that it is compared with) of every answer."""
    for number, row in enumerate(rows):
        if "chosen" in row:
            yield row, row["chosen"], 1.0, str(number)
            yield row, row["rejected"], 0.0, str(number)
        elif "completions" in row:
            for answer, rank in zip(row["completions"], row["ranks"], strict=True):
                yield row, answer, -float(rank), str(number)
        else:
            worth = row["rating"] if "rating" in row else row["label"]
            yield row, row["completion"], float(worth), key_of(row.get("prompt", ""))
