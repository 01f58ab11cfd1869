"""Rows as the model will read them: written in ids before a run, measured, and held against what the model can read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from trl_ext.ppo.config import PPOConfig
from trl_ext.tokens import PromptError, as_ids, fault_of_prompt, reward_suffix, tokenize_prompts

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Measured:
    """The extremes of some rows, each with the number of its row.

    Attributes:
        longest: tokens of the longest row.
        largest: the largest id in any row.
    """

    longest: tuple[int, int] = (0, 0)
    largest: tuple[int, int] = (0, 0)

    def with_rows(self, ids: Sequence[Sequence[int]], start: int) -> Measured:
        """These and further rows, the first of which has the number `start`."""
        longest, largest = self.longest, self.largest
        for number, row in enumerate(ids, start):
            longest = max(longest, (len(row), number), key=_size)
            largest = max(largest, (max(row, default=0), number), key=_size)
        return Measured(longest, largest)


def _size(pair: tuple[int, int]) -> int:
    return pair[0]


@dataclass(frozen=True)
class Limits:
    """What a model can read.

    Attributes:
        vocabulary: ids that it has; None: not known.
        context: tokens of a row; None: any.
        beyond: tokens that follow those that are measured.
        setting: the setting that decides about the length.
    """

    vocabulary: int | None
    context: int | None
    beyond: int
    setting: str

    @classmethod
    def of_prompts(
        cls,
        vocabulary: int | None,
        context: int | None,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Any,
        args: PPOConfig,
        functions: bool,
    ) -> Limits:
        """For prompts that are answered as `args` say, and scored by `functions` or else by the reward role, which
        reads what the chat template writes after a completion."""
        if args.use_vllm and args.vllm_max_model_length is not None:
            context = min(context or args.vllm_max_model_length, args.vllm_max_model_length)
        given: Any = args.generation_kwargs or {}
        template: Any = args.chat_template_kwargs
        suffix = [] if functions else reward_suffix([prompt], tokenizer, as_ids(tokenizer.eos_token_id), template)
        beyond = int(given.get("max_new_tokens") or args.max_completion_length) + len(suffix)
        return cls(vocabulary, context, beyond, "max_completion_length")

    def check(self, measured: Measured, row_name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse rows beyond them; `row_name` is what a row is called, with its number at {}.

        Raises:
            ValueError: names the row.
        """
        largest, row = measured.largest
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise ValueError(
                f"{row_name.format(row)} holds the token {tokenizer.convert_ids_to_tokens(largest)!r} (id {largest}), "
                f"but the model has {self.vocabulary} ids only: resize its embeddings, or take the token out."
            )
        longest, row = measured.longest
        if self.context is not None and longest + self.beyond > self.context:
            more = f" and {self.beyond} may follow" if self.beyond else ""
            raise ValueError(
                f"{row_name.format(row)} has {longest} tokens{more}, but the model reads {self.context}: shorten or "
                f"drop the row, or lower {self.setting}."
            )


# A recipe asks before a model is loaded, and its trainer again.
_KNOWN: WeakKeyDictionary[Dataset, dict[tuple[Any, ...], Measured]] = WeakKeyDictionary()


def measured_prompts(dataset: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, template: Any) -> Measured:
    """Of the prompts of a dataset that is called `name`, written with the chat template's arguments `template`.

    Raises:
        ValueError: a prompt makes no ids, or a message of it would be lost.
    """

    def ids(prompts: list[Any]) -> list[list[int]]:
        return _prompt_ids(prompts, tokenizer, template)

    kind = (tokenizer.chat_template, json.dumps(template, default=str))
    return _measured(dataset, f"The prompt in row {{}} of {name}", "prompt", tokenizer, kind, ids)


def measured_prompt(
    prompt: Any, number: int, row_name: str, tokenizer: PreTrainedTokenizerBase, template: Any
) -> Measured:
    """Of a single prompt, the row `number` of its data set; the rest as `measured_prompts`."""
    try:
        return Measured().with_rows(_prompt_ids([prompt], tokenizer, template), number)
    except PromptError as error:
        raise ValueError(f"{row_name.format(number)} {error.reason}") from error


def _prompt_ids(prompts: list[Any], tokenizer: PreTrainedTokenizerBase, template: Any) -> list[list[int]]:
    rows = tokenize_prompts(prompts, tokenizer, template)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            fault = fault_of_prompt(prompt, tokenizer, **(template or {}))
            if fault is not None:
                raise PromptError(prompt, row, f"has {fault}.")
    return rows


def measured_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Measured:
    """Of the texts for the pretraining term, cut at `max_length` tokens.

    Raises:
        ValueError: a text makes no ids.
    """

    def ids(texts: list[Any]) -> list[list[int]]:
        return [row[:max_length] for row in tokenize_prompts(texts, tokenizer, whole=True)]

    return _measured(dataset, "The text in row {} of ptx_dataset", "text", tokenizer, (max_length,), ids)


def _measured(
    dataset: Dataset,
    row_name: str,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    kind: tuple[Any, ...],
    ids: Callable[[list[Any]], list[list[int]]],
) -> Measured:
    known, key = _KNOWN.setdefault(dataset, {}), (column, tokenizer, len(tokenizer), *kind)
    if key not in known:
        values, measured = dataset[column], Measured()
        for start in range(0, len(dataset), ROWS_AT_ONCE):
            try:
                measured = measured.with_rows(ids(list(values[start : start + ROWS_AT_ONCE])), start)
            except PromptError as error:
                raise ValueError(f"{row_name.format(start + error.row)} {error.reason}") from error
        known[key] = measured
    return known[key]
