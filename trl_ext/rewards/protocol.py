"""What a reward function is: the calling convention of TRL's GRPOTrainer and RLOOTrainer, unchanged."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from torch import nn

RewardCallable = Callable[..., "list[float | None] | Awaitable[list[float | None]]"]
"""Called with the keyword arguments `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`,
`log_metric` and every further column of the dataset, each list with one entry per completion; without `**kwargs` with
those that it names. Returns one number a completion, None to abstain: a list, or whatever else holds them in their
order (an array, a tensor, a pandas Series, a generator). May be `async`."""

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

RewardFunction = RewardCallable | nn.Module | str
"""A reward callable, a sequence-classification model with one label, or the name or folder of one."""


def check_functions(functions: Sequence[Any], tokenizers: Sequence[Any]) -> None:
    """Refuse what cannot score, as far as that shows without loading it.

    Args:
        tokenizers: one for each function; None where it has none.

    Raises:
        FileNotFoundError, TypeError, ValueError: names it.
    """
    if len(tokenizers) != len(functions):
        raise ValueError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(functions)} reward functions: give one "
            "each."
        )
    for function in functions:
        if not callable(function) and not isinstance(function, str):
            raise TypeError(
                f"A reward function must be a callable, a model or a model's name, not {type(function).__name__}."
            )
        if isinstance(function, str) and Path(function).is_absolute() and not Path(function).is_dir():
            raise FileNotFoundError(f"The reward model {function!r} does not exist: give a model's name or folder.")
        if not isinstance(function, nn.Module):
            continue
        if not hasattr(function, "config"):
            raise TypeError(
                f"The reward model {type(function).__name__} is none of Transformers: give a function that calls it."
            )
        labels = getattr(function.config, "num_labels", 1)
        if type(function).__name__.endswith("ForSequenceClassification") and labels != 1:
            raise ValueError(
                f"The reward model {name_of(function)!r} has {labels} labels, and a score is one number: give one of "
                "num_labels=1, or a function that reads the label you mean."
            )


def name_of(function: Any) -> str:
    """A short name for logs: the function's own, or the last part of a model's path."""
    if isinstance(function, str):
        return function.rstrip("/").split("/")[-1]
    if isinstance(function, nn.Module):
        path = getattr(getattr(function, "config", None), "name_or_path", "")
        return str(path).rstrip("/").split("/")[-1] or type(function).__name__
    function = getattr(function, "func", function)  # functools.partial
    return getattr(function, "__name__", type(function).__name__)


def arguments_of(function: Any, offered: Collection[str]) -> list[str]:
    """Which of the names `offered` a reward function is called with: those that it names, with `**kwargs` all. The ids
    of the prompts (`prompt_ids`), which TRL's trainers do not have, only go to one that names them.

    Raises:
        TypeError: it asks for something else, or for an argument without a name.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable that Python cannot look into
        return [name for name in offered if name != "prompt_ids"]
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for p in parameters:
        if p.kind not in starred and p.default is p.empty and (p.name not in offered or p.name not in named):
            raise TypeError(
                f"Reward function {name_of(function)!r} asks for {p.name!r}, and is called by name with "
                f"{', '.join(offered)}: name the dataset's column so, or take it out of the signature."
            )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [name for name in offered if name in named or (takes_all and name != "prompt_ids")]


def listed(values: Any) -> Any:
    """What a function returned as a list, where it is something else that holds numbers in their order: a tensor, an
    array, a Series, one column of either, a generator."""
    if hasattr(values, "tolist"):
        column = len(getattr(values, "shape", ())) == 2 and values.shape[1] == 1
        listed = (values[:, 0] if column else values).tolist()
        return listed if isinstance(listed, list) else values
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set)):
        return list(values)
    return values
