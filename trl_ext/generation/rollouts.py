"""Prompts in, rollout out: the protocols of whoever answers, and the one place where its answers become tensors."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_ext.tokens import as_ids, cut_at_eos, padded, tokenize_prompts
from trl_ext.types import Rollout


class GenerationError(RuntimeError):
    """Prompts that got no whole completion; one sentence with the remedy."""


class Answers(NamedTuple):
    """What a generator returns.

    Attributes:
        ids: one completion a prompt, in the prompts' order, its EOS included; what follows an EOS is dropped.
        logprobs: the log-probability (nats) that each of these ids was sampled with; None where they are not known.
    """

    ids: list[list[int]]
    logprobs: list[list[float]] | None = None


class Generator(Protocol):
    """Whoever answers: Transformers' generate, its continuous batching, vLLM, or your own."""

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """One completion for each prompt, sampled as `config` says, under `role` ("policy", or "reference" where scores
        are normalised by it). A plain list of ids will do where their log-probs are not known."""
        ...


class BackgroundGenerator(Generator, Protocol):
    """A generator that can answer while the policy is trained."""

    def begin(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Future[Answers]:
        """What `answers` returns, to be had later. The role's weights as they are now answer, and random numbers of
        this process are drawn before it returns."""
        ...


def begin(
    generator: BackgroundGenerator,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> Future[Answers]:
    """Let the policy as it is now begin a completion for each prompt. Arguments as of `generate`, which takes what is
    returned as `begun`.

    Raises:
        GenerationError: the generator could not begin.
    """
    asked, name = tokenize_prompts(prompts, tokenizer, chat_template_kwargs), f"{type(generator).__name__}.begin"
    try:
        begun: Any = generator.begin(asked, copy.deepcopy(config), "policy")
    except (GenerationError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise GenerationError(f"{name} raised {type(error).__name__}: {error}.") from error
    if not isinstance(begun, Future):
        kind = type(begun).__name__
        raise GenerationError(f"{name} returned {kind}: return a concurrent.futures.Future of Answers(ids, logprobs).")
    return begun


def generate(
    generator: Generator,
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    chat_template_kwargs: dict[str, Any] | None = None,
    role: str = "policy",
    vocab_size: int | None = None,
    begun: Future[Answers] | None = None,
) -> Rollout:
    """Sample one completion for each prompt.

    Args:
        generator: who answers.
        prompts: plain texts, or conversations (lists of messages); all of one kind.
        config: sampling settings; its `eos_token_id` ends a completion, its `pad_token_id` fills up.
        role: who the generator answers as.
        vocab_size: ids that the model has; None: any.
        begun: answers to these very prompts, see `begin`; None: the generator is asked now.

    Returns:
        The rollout, rows in the order of `prompts`, on the CPU.

    Raises:
        GenerationError: the generator failed, or returned something other than one list of ids a prompt.
    """
    asked = tokenize_prompts(prompts, tokenizer, chat_template_kwargs)
    eos, pad = as_ids(config.eos_token_id), int(config.pad_token_id)
    ids, logprobs = _checked_answers(generator, asked, config, role, vocab_size, begun)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    chat = not isinstance(prompts[0], str)
    prompt_ids, prompt_mask = padded(asked, pad, left=True)
    completion_ids, completion_mask = padded(ids, pad)
    sampled = None
    if logprobs is not None:
        sampled = torch.zeros(completion_ids.shape)
        sampled[completion_mask] = torch.tensor([x for row in logprobs for x in row])
    return Rollout(
        prompts=list(prompts),
        completions=[[{"role": "assistant", "content": text}] for text in texts] if chat else list(texts),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        has_eos=torch.tensor([bool(row) and row[-1] in eos for row in ids]),
        sampling_logprobs=sampled,
    )


def check_whole(ids: Sequence[Sequence[int]], config: GenerationConfig) -> None:
    """Refuse completions that an engine cut short for want of room.

    Raises:
        GenerationError: one neither ended nor is as long as it might be.
    """
    eos = set(as_ids(config.eos_token_id))
    for row in ids:
        if len(row) < config.max_new_tokens and not eos & set(row):
            raise GenerationError(
                f"A completion was cut off after {len(row)} of {config.max_new_tokens} tokens: give the generator room "
                "for prompt and completion (vLLM's vllm_max_model_length), or lower max_completion_length."
            )


def _checked_answers(
    generator: Generator,
    prompt_ids: list[list[int]],
    config: GenerationConfig,
    role: str,
    vocab_size: int | None,
    begun: Future[Answers] | None,
) -> Answers:
    """What the generator answers, cut at the EOS and checked: user code may stand behind it."""
    name, count = f"{type(generator).__name__}.{'answers' if begun is None else 'begin'}", len(prompt_ids)
    try:
        if begun is not None:
            answers = begun.result()
        else:
            # Copies: what it does to its arguments is its own affair.
            answers = generator.answers([list(ids) for ids in prompt_ids], copy.deepcopy(config), role)
    except (GenerationError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise GenerationError(f"{name} raised {type(error).__name__}: {error}.") from error
    ids, logprobs = answers if isinstance(answers, tuple) and len(answers) == 2 else (answers, None)
    if not isinstance(ids, (list, tuple)) or len(ids) != count:
        got = f"{len(ids)} completions" if isinstance(ids, (list, tuple)) else type(ids).__name__
        raise GenerationError(
            f"{name} returned {got} for {count} prompts: return one list of ids each, or Answers(ids, logprobs)."
        )
    try:
        rows = [[operator.index(token) for token in row] for row in ids]
        numbers = None if logprobs is None else [[float(x) for x in row] for row in logprobs]
    except (TypeError, ValueError) as error:
        raise GenerationError(f"{name} returned something other than lists of ids and numbers ({error}).") from error
    if numbers is not None and [len(row) for row in numbers] != [len(row) for row in rows]:
        raise GenerationError(f"{name} returned log-probs of other lengths than its ids: return one for each id.")
    eos, most = as_ids(config.eos_token_id), config.max_new_tokens
    rows = [cut_at_eos(row, eos) for row in rows]
    if numbers is not None:
        numbers = [of_row[: len(row)] for of_row, row in zip(numbers, rows, strict=True)]
        if not all(math.isfinite(x) for row in numbers for x in row):
            raise GenerationError(f"{name} returned log-probs that are not finite.")
    for number, row in enumerate(rows):
        foreign = next((token for token in row if not 0 <= token < (vocab_size or 2**31)), None)
        if foreign is not None:
            raise GenerationError(f"{name} returned an id that the model does not have in row {number}: {foreign}.")
        if most is not None and len(row) > most:
            raise GenerationError(f"{name} returned {len(row)} ids in row {number}: max_completion_length is {most}.")
    return Answers(rows, numbers)
