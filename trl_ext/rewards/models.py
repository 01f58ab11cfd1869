"""Scores that models give: a classifier of its own, or a role of the shared base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from trl_ext.core import masked_mean
from trl_ext.rewards.texts import Reward
from trl_ext.types import as_text


def classifier(
    name_or_path: str, label: str | None = None, device: str = "cpu", max_length: int = 512, batch_size: int = 32
) -> Reward:
    """What a Transformers sequence classifier makes of an answer's text, read with the classifier's own tokenizer.

    Args:
        name_or_path: the model; its tokenizer lies beside it.
        label: whose probability (0 to 1) is the score, one by one where several labels can hold at once; None: the raw
            output of a model with one label.
        device: where it runs.
        max_length: tokens that it reads.
        batch_size: answers at a time.

    Raises:
        ValueError: no such label, or several labels and none chosen.
    """
    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(name_or_path).to(device).eval().requires_grad_(False)
    labels = {str(name): int(i) for name, i in model.config.label2id.items()}
    if label is None and model.config.num_labels > 1:
        raise ValueError(f"The classifier {name_or_path!r} has several labels: choose one of {', '.join(labels)}.")
    if label is not None and label not in labels:
        raise ValueError(f"The classifier {name_or_path!r} has no label {label!r}: choose one of {', '.join(labels)}.")

    # As in Transformers' own text-classification pipeline.
    apart = model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1

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
                return_tensors="pt",
            )
            logits: Tensor = model(**batch.to(device)).logits.float()
            probabilities = logits.sigmoid() if apart else logits.softmax(dim=-1)
            scores += (logits[:, 0] if label is None else probabilities[:, labels[label]]).tolist()
        return scores

    return classifier


def fluency(base: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> Reward:
    """Mean log-probability of an answer's tokens under the reference role, nats a token: minus the logarithm of its
    perplexity. Near 0 is fluent, far below is word salad.

    Args:
        base: a `SharedBase`.
        tokenizer: of the base.
        batch_size: answers at a time.
    """

    @torch.no_grad()
    def fluency(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        means: list[float] = []
        for ids, mask, width in _batches(tokenizer, prompts, completion_ids, batch_size):
            logprobs = base.logprobs(ids.to(base.device), mask.to(base.device), width, role="reference").cpu()
            means += masked_mean(logprobs, mask[:, -width:], dim=1).tolist()
        return [mean if len(row) else None for mean, row in zip(means, completion_ids, strict=True)]

    return fluency


def reward_role(base: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 32) -> Reward:
    """The score of the base's reward role, for trainers that know reward functions only.

    Args:
        base: a `SharedBase` with a reward role.
        tokenizer: of the base.
        batch_size: answers at a time.
    """
    after = answer_suffix(tokenizer, [tokenizer.eos_token_id])

    @torch.no_grad()
    def reward_role(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        ended = [list(ids) + after if list(ids[-1:]) == [tokenizer.eos_token_id] else ids for ids in completion_ids]
        answers = completion_ids if isinstance(prompts[0], str) else ended
        scores: list[float | None] = []
        for ids, mask, _width in _batches(tokenizer, prompts, answers, batch_size):
            scores += base.scores(ids.to(base.device), mask.to(base.device)).cpu().tolist()
        return scores

    return reward_role


def answer_suffix(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], chat_template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """What the chat template writes after an answer's last id of `ends`: often a newline after the EOS, which a reward
    model was trained to read.

    Empty where there is no chat template or nothing follows.
    """
    if tokenizer.chat_template is None:
        return []
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    kwargs: dict[str, Any] = {"tokenize": True, "return_dict": True, **(chat_template_kwargs or {})}
    asked = tokenizer.apply_chat_template(conversation[:1], **kwargs)["input_ids"]
    ids = list(tokenizer.apply_chat_template(conversation, **kwargs)["input_ids"])
    last = [i for i, token in enumerate(ids) if i >= len(asked) and token in set(ends)]
    return ids[last[-1] + 1 :] if last else []


def _batches(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], size: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    for start in range(0, len(prompts), size):
        yield _rows(tokenizer, prompts[start : start + size], completion_ids[start : start + size])


def _rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, int]:
    """Prompts left-padded beside completions right-padded: ids, mask, width of the completions."""
    asked = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    left, right = max(map(len, asked)), max(1, *map(len, completion_ids))
    ids = torch.zeros(len(asked), left + right, dtype=torch.long)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, (before, after) in enumerate(zip(asked, completion_ids, strict=True)):
        ids[i, left - len(before) : left + len(after)] = torch.tensor([*before, *after])
        mask[i, left - len(before) : left + len(after)] = True
    return ids, mask, right


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    chat = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(chat["input_ids"])
