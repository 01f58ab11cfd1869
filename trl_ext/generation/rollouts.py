"""Prompts in, rollout out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_ext.types import Rollout, concatenate


class GenerationError(RuntimeError):
    """Prompts that got no whole answer; one sentence with the remedy."""


class Generator(Protocol):
    """Anything with Transformers' `generate`."""

    @property
    def device(self) -> torch.device:
        """Where ids must go."""
        ...

    def generate(self, **kwargs: Any) -> Tensor:
        """Ids (batch, prompt + new tokens)."""
        ...


class BatchingGenerator(ABC):
    """A `Generator` that makes batches of its own: it is given all prompts at once."""

    device = torch.device("cpu")

    @abstractmethod
    def answers(self, prompts: list[list[int]], config: GenerationConfig, role: str) -> list[list[int]]:
        """Ids of one answer to each prompt's ids, in their order."""

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig, role: str = "policy"
    ) -> Tensor:
        """As `SharedBase.generate`: ids (batch, prompt + new tokens), padded on the right.

        Raises:
            GenerationError: an answer that neither ended nor is as long as it might be.
        """
        prompts = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, attention_mask, strict=True)]
        answers, ends = self.answers(prompts, generation_config, role), set(generation_config.eos_token_id)
        for answer in answers:
            # It would be filled up with padding that nobody sampled, and trained on.
            if len(answer) < generation_config.max_new_tokens and not ends & set(answer):
                raise GenerationError(
                    f"An answer was cut off after {len(answer)} of {generation_config.max_new_tokens} tokens: give the "
                    "generator room for prompt and answer (vLLM's vllm_max_model_length), or lower "
                    "max_completion_length."
                )
        columns = [torch.tensor(answer) for answer in answers]
        padding = generation_config.pad_token_id
        padded = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=padding)
        return torch.cat([input_ids.cpu(), padded], dim=1)


def tokenize_prompts(
    prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None = None
) -> list[list[int]]:
    """Ids of each prompt; a conversation goes through the chat template with the generation prompt added.

    Raises:
        ValueError: a conversation and a tokenizer without a chat template, or a prompt without a single token.
    """
    if isinstance(prompts[0], str):
        ids = tokenizer(list(prompts))["input_ids"]
    else:
        check_chat_template(tokenizer)
        ids = tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )["input_ids"]
    empty = next((i for i, row in enumerate(ids) if len(row) == 0), None)
    if empty is not None:
        raise ValueError(f"Prompt {prompts[empty]!r} has no tokens: give it some text, or a tokenizer that adds a BOS.")
    return [list(row) for row in ids]


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse conversations for a tokenizer that cannot write them.

    Raises:
        ValueError: no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversations, but the tokenizer has no chat template: set tokenizer.chat_template, use "
            "an instruct model, or give prompts as plain text."
        )


def generate(
    policy: Generator,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    batch_size: int,
    chat_template_kwargs: dict[str, Any] | None = None,
    **how: Any,
) -> Rollout:
    """Sample one completion for each prompt.

    Args:
        policy: what generates.
        prompts: plain texts, or conversations (lists of messages); all of one kind.
        config: sampling settings; its `eos_token_id` (list) ends a completion, its `pad_token_id` fills up.
        batch_size: prompts generated at a time.
        **how: further arguments of the policy's `generate`.

    Returns:
        The rollout, rows in the order of `prompts`, on the CPU.
    """
    ids = tokenize_prompts(prompts, tokenizer, chat_template_kwargs)
    parts = []
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        prompt_ids, prompt_mask = _left_padded(ids[part], config.pad_token_id)
        produced = policy.generate(
            input_ids=prompt_ids.to(policy.device),
            attention_mask=prompt_mask.long().to(policy.device),
            generation_config=config,
            **how,
        )
        completion_ids, completion_mask, has_eos = cut_at_eos(
            produced[:, prompt_ids.shape[1] :].cpu(), torch.tensor(config.eos_token_id), config.pad_token_id
        )
        kept = [row[mask].tolist() for row, mask in zip(completion_ids, completion_mask, strict=True)]
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
        chat = not isinstance(prompts[0], str)
        parts.append(
            Rollout(
                prompts=list(prompts[part]),
                completions=[[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts),
                prompt_ids=prompt_ids,
                prompt_mask=prompt_mask,
                completion_ids=completion_ids,
                completion_mask=completion_mask,
                has_eos=has_eos,
            )
        )
    return concatenate(parts, config.pad_token_id)


def cut_at_eos(ids: Tensor, eos_ids: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """End each row of generated `ids` (batch, columns) after its first EOS.

    Returns:
        The ids with everything after the EOS replaced by padding, their mask (batch, longest), EOS included, and
        whether each row has one (batch,).
    """
    is_eos = torch.isin(ids, eos_ids)
    has_eos = is_eos.any(dim=1)
    before_or_at = (is_eos.cumsum(dim=1) - is_eos.long()) == 0
    longest = max(1, int(before_or_at.sum(dim=1).max()))
    return ids.masked_fill(~before_or_at, pad_token_id)[:, :longest], before_or_at[:, :longest], has_eos


def _left_padded(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = True
    return ids, mask


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends an answer: what the model's generation config or the tokenizer names.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its own.
    """
    declared = model.generation_config.eos_token_id
    ids = list(declared) if isinstance(declared, list) else [] if declared is None else [declared]
    return ids if tokenizer.eos_token_id in ids else [tokenizer.eos_token_id, *ids]
