"""Scores that models give: a classifier of its own, or a role of the shared base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_ext.core import masked_mean
from trl_ext.rewards.classifiers import load_classifier, padding_side, settle
from trl_ext.rewards.texts import Reward
from trl_ext.tokens import eos_ids, reward_suffix, side_by_side, tokenize_prompts
from trl_ext.types import as_text


def classifier(
    name_or_path: str, label: str | None = None, device: str = "cpu", max_length: int = 512, batch_size: int = 32
) -> Reward:
    """What a Transformers sequence classifier makes of a completion's text, read with the classifier's own tokenizer.

    Args:
        name_or_path: the model; its tokenizer lies beside it.
        label: whose probability (0 to 1) is the score, one by one where several labels can hold at once, or whose raw
            output, of a model that was trained for regression; None: the raw output of a model with one label.
        device: where it runs.
        max_length: tokens that it reads.
        batch_size: completions at a time.

    Raises:
        ValueError: no such label, several labels and none chosen, or a checkpoint without a classifier's head.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = load_classifier(name_or_path, "a sequence classifier")
    settle(model, tokenizer, device)
    labels = {str(name): int(i) for name, i in model.config.label2id.items()}
    if label is None and model.config.num_labels > 1:
        raise ValueError(f"The classifier {name_or_path!r} has several labels: choose one of {', '.join(labels)}.")
    if label is not None and label not in labels:
        raise ValueError(f"The classifier {name_or_path!r} has no label {label!r}: choose one of {', '.join(labels)}.")

    # As in Transformers' own text-classification pipeline.
    kind = model.config.problem_type
    apart = kind == "multi_label_classification" or model.config.num_labels == 1

    @torch.inference_mode()
    def classifier(completions: Sequence[Any], **_: Any) -> list[float | None]:
        texts = [as_text(completion) for completion in completions]
        scores: list[float | None] = []
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                texts[start : start + batch_size],
                max_length=max_length,
                truncation=True,
                padding=True,
                padding_side=padding_side(model),
                return_tensors="pt",
            )
            logits: Tensor = model(**batch.to(device)).logits.float()
            probabilities = logits if kind == "regression" else logits.sigmoid() if apart else logits.softmax(dim=-1)
            scores += (logits[:, 0] if label is None else probabilities[:, labels[label]]).tolist()
        return scores

    return classifier


def fluency(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Reward:
    """Mean log-probability of a completion's tokens under the reference role, in nats: minus the logarithm of its
    perplexity. Near 0 is fluent, far below is word salad.

    Args:
        base: a `SharedBase`.
        tokenizer: of the base.
        batch_size: completions at a time.
        chat_template_kwargs: of the prompts, in trainers that do not pass on `prompt_ids`; ours does.
    """

    @torch.no_grad()
    def fluency(
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        asked = prompt_ids or tokenize_prompts(prompts, tokenizer, chat_template_kwargs)
        means: list[float] = []
        for start in range(0, len(asked), batch_size):
            part = slice(start, start + batch_size)
            ids, mask, width = side_by_side(asked[part], completion_ids[part])
            logprobs = base.logprobs(ids.to(base.device), mask.to(base.device), width, role="reference").cpu()
            means += masked_mean(logprobs, mask[:, -width:], dim=1).tolist()
        return [mean if len(row) else None for mean, row in zip(means, completion_ids, strict=True)]

    return fluency


def reward_role(
    base: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 32,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Reward:
    """The score of the base's reward role, for trainers that know reward functions only.

    Args:
        base: a `SharedBase` with a reward role.
        tokenizer: of the base.
        batch_size: completions at a time.
        chat_template_kwargs: of the conversations: what the policy's prompts were written with.
    """
    eos = eos_ids(base.causal_lm, tokenizer)

    @torch.no_grad()
    def reward_role(
        prompts: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> list[float | None]:
        suffix = reward_suffix(prompts, tokenizer, eos, chat_template_kwargs)
        asked = prompt_ids or tokenize_prompts(prompts, tokenizer, chat_template_kwargs)
        read = [[*ids, *suffix] if len(ids) and ids[-1] in eos else list(ids) for ids in completion_ids]
        scores: list[float | None] = []
        for start in range(0, len(asked), batch_size):
            part = slice(start, start + batch_size)
            ids, mask, _width = side_by_side(asked[part], read[part])
            scores += base.scores(ids.to(base.device), mask.to(base.device)).cpu().tolist()
        return scores

    return reward_role
