"""Calling reward functions on a rollout."""

from __future__ import annotations

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from trl_ext.rewards.classifiers import load_classifier, longest_read, padding_side, settle, tokenizer_of
from trl_ext.rewards.loop import Loop, on_the_same_gpu
from trl_ext.rewards.protocol import RewardFunction, arguments_of, check_functions, listed, name_of
from trl_ext.tokens import check_chat_template, of_whole_conversations
from trl_ext.types import Rollout


class Scorer:
    """Several reward functions, called as one.

    Args:
        functions: callables (sync or async), models, or names of models.
        tokenizers: for the models among the functions, one per function; None: loaded from the model's name.
        device: where the models run.
        chat_template_kwargs: passed to the chat template when a model scores conversations.
        trust_remote_code: passed on when a model is loaded by name.
        timeout: most seconds that one call of a function may take; None: any.
        batch_size: most completions of one forward of a model.

    Raises:
        TypeError, ValueError: a function that cannot be called, or lists of different lengths.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        tokenizers: Sequence[Any] | None = None,
        device: torch.device | str = "cpu",
        chat_template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
        timeout: float | None = None,
        batch_size: int = 64,
    ) -> None:
        tokenizers = list(tokenizers) if tokenizers is not None else [None] * len(functions)
        check_functions(functions, tokenizers)
        self.names = _distinct([name_of(function) for function in functions])
        self.timeout, self._batch_size = timeout, batch_size
        self._chat_template_kwargs = chat_template_kwargs or {}
        self._functions: list[Callable[..., Any]] = []
        self._of_models: dict[str, Any] = {}  # their tokenizers
        for name, function, tokenizer in zip(self.names, functions, tokenizers, strict=True):
            if isinstance(function, (str, nn.Module)):
                function, self._of_models[name] = self._model_function(function, tokenizer, device, trust_remote_code)
            self._functions.append(function)
        self.repeatable = [_is_repeatable(function) for function in functions]
        self._loop = Loop()

    def check(self, prompt: Any) -> None:
        """Refuse prompts of a kind that a model cannot read.

        Raises:
            ValueError: a conversation, and a tokenizer without a chat template.
        """
        for name, tokenizer in self._of_models.items():
            if not isinstance(prompt, str):
                check_chat_template(tokenizer, f"the tokenizer of the reward model {name!r}")

    def __call__(self, rollout: Rollout, columns: dict[str, list[Any]], **context: Any) -> Tensor:
        """Score every completion of `rollout`: (batch, functions), NaN where a function returned None.

        Args:
            columns: the dataset's further columns, one entry per row.
            **context: `trainer_state`, `log_extra`, `log_metric`, passed on.

        Raises:
            RewardError: a function raised, took too long, or returned the wrong number of values or something that is
                no number.
        """
        return self._scores(rollout, columns, context, [True] * len(self.names))

    def once_more(self, rollout: Rollout, columns: dict[str, list[Any]], **context: Any) -> Tensor:
        """As a call, for a measurement that training does not need: those that are not `repeatable` are not called, and
        have NaN."""
        return self._scores(rollout, columns, context, self.repeatable)

    def _scores(
        self, rollout: Rollout, columns: dict[str, list[Any]], context: dict[str, Any], called: Sequence[bool]
    ) -> Tensor:
        arguments = {
            **columns,
            **context,
            "prompts": list(rollout.prompts),
            "completions": list(rollout.completions),
            "completion_ids": rollout.completion_tokens,
            "prompt_ids": rollout.prompt_tokens,
        }
        results: list[Any] = []
        count = len(rollout.completions)
        for name, function, is_called in zip(self.names, self._functions, called, strict=True):
            if not is_called:
                results.append([None] * count)
                continue
            with _reported_as(name, self.timeout):
                taken = {argument: arguments[argument] for argument in arguments_of(function, arguments)}
                results.append(self._call(function, taken))
        waiting = {i: result for i, result in enumerate(results) if inspect.isawaitable(result)}
        if waiting:
            finished = self._loop.run(_gather(list(waiting.values()), self.timeout))
            for i, result in zip(waiting, finished, strict=True):
                with _reported_as(self.names[i], self.timeout):
                    if isinstance(result, asyncio.CancelledError):
                        raise RuntimeError("it was cancelled") from result
                    if isinstance(result, BaseException):
                        raise result
                    results[i] = listed(result)
        checked = [_checked(result, name, count) for result, name in zip(results, self.names, strict=True)]
        return torch.stack(checked, dim=1)

    def _call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Call a function, in a thread that can be left behind where it may not take for ever."""
        if self.timeout is None or inspect.iscoroutinefunction(function):
            return listed(function(**arguments))
        future: Future[Any] = Future()
        take_gpu = on_the_same_gpu()

        def work() -> None:
            try:
                take_gpu()
                future.set_result(listed(function(**arguments)))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="trl_ext-reward", daemon=True).start()
        return future.result(self.timeout)

    def _model_function(
        self, model: Any, tokenizer: Any, device: Any, trust_remote_code: bool
    ) -> tuple[Callable[..., Any], Any]:
        """A function that asks a model, and the model's tokenizer."""
        tokenizer = tokenizer_of(model, tokenizer, trust_remote_code)
        if isinstance(model, str):
            kind = "a sequence classifier with one label"
            model = load_classifier(model, kind, num_labels=1, trust_remote_code=trust_remote_code)
        settle(model, tokenizer, device)
        template, limit = of_whole_conversations(self._chat_template_kwargs), longest_read(model)
        side = padding_side(model)

        @torch.inference_mode()
        def score(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
            texts = [
                prompt + completion
                if isinstance(prompt, str)
                else tokenizer.apply_chat_template(prompt + completion, tokenize=False, **template)
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            scores: list[float] = []
            for start in range(0, len(texts), self._batch_size):
                part = texts[start : start + self._batch_size]
                inputs = tokenizer(
                    text=part, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False
                )
                longest = int(inputs["attention_mask"].sum(dim=1).max())
                if limit is not None and longest > limit:
                    raise RewardError(
                        f"Reward function {name_of(model)!r} reads {limit} tokens, and a prompt with its completion "
                        f"has {longest}: lower max_completion_length, or drop the longest prompts."
                    )
                logits: Tensor = model(**inputs.to(device)).logits
                if logits.shape[1:] != (1,):
                    raise RewardError(
                        f"Reward function {name_of(model)!r} gives {tuple(logits.shape[1:])} numbers a completion: "
                        "give a sequence classifier with one label."
                    )
                scores += logits[:, 0].float().tolist()
            return scores

        return score, tokenizer


def _is_repeatable(function: Any) -> bool:
    """Whether a measurement may call it once more: what its attribute `repeatable` says; without one, whether it is
    synchronous. What is awaited mostly asks a server, which costs money or time."""
    awaited = any(inspect.iscoroutinefunction(one) for one in (function, type(function).__call__))
    return bool(getattr(function, "repeatable", not awaited))


async def _gather(awaitables: list[Any], timeout: float | None) -> list[Any]:
    timed = [asyncio.wait_for(awaitable, timeout) for awaitable in awaitables]
    return list(await asyncio.gather(*timed, return_exceptions=True))


class RewardError(ValueError):
    """A reward function failed or returned something unusable; the message names it, the row and the remedy."""


@contextmanager
def _reported_as(name: str, timeout: float | None) -> Iterator[None]:
    try:
        yield
    except (RewardError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, TimeoutError) and timeout is not None:
            raise RewardError(
                f"Reward function {name!r} timed out ({timeout:g} s): make it faster, or raise reward_timeout."
            ) from error
        raise RewardError(
            f"Reward function {name!r} raised {type(error).__name__}: {error}. Let it return None for a completion "
            "that it cannot judge."
        ) from error


def _checked(values: Any, name: str, expected: int) -> Tensor:
    if not isinstance(values, list):
        raise RewardError(
            f"Reward function {name!r} returned {type(values).__name__}: return a list of numbers, one a completion."
        )
    if len(values) != expected:
        raise RewardError(
            f"Reward function {name!r} returned {len(values)} values for {expected} completions: return one each."
        )
    return torch.tensor([_number(value, name, row) for row, value in enumerate(values)], dtype=torch.float32)


def _number(value: Any, name: str, row: int) -> float:
    """A finite number; NaN for None."""
    if value is None:
        return math.nan
    try:
        number = math.inf if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise RewardError(
            f"Reward function {name!r} returned {value!r} for completion {row}: return a finite number, or None to "
            "abstain."
        )
    return number


def _distinct(names: list[str]) -> list[str]:
    """Number the names that occur more than once, so that each has its own metric."""
    taken = {name for name in names if names.count(name) == 1}
    distinct = []
    for name in names:
        if names.count(name) > 1:
            name = next(numbered for i in count(1) if (numbered := f"{name}_{i}") not in taken)
            taken.add(name)
        distinct.append(name)
    return distinct
