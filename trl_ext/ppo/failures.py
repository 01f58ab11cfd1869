"""Failures that end a run after a checkpoint, on all processes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils import gather_object

from trl_ext.callbacks import CallbackError
from trl_ext.generation import GenerationError
from trl_ext.ppo.objectives import ObjectiveError
from trl_ext.rewards import RewardError

FAILURES = (GenerationError, RewardError, CallbackError, ObjectiveError, torch.OutOfMemoryError)
_Result = TypeVar("_Result")


def together(work: Callable[[], _Result]) -> _Result:
    """What `work` returns, which must not wait for other processes. Every process must call it: one that failed alone
    would leave the others waiting for ever.

    Raises:
        Exception: what `work` raised here. Where it failed on another process, one of `FAILURES` with the same words,
            or else a RuntimeError.
    """
    done: list[_Result] = []
    failure: Exception | None = None
    try:
        done.append(work())
    except Exception as error:
        failure = error
    kinds = [number for number, kind in enumerate(FAILURES) if isinstance(failure, kind)]
    report = None if failure is None else (kinds, str(failure), type(failure).__name__)
    failures = [other for other in gather_object([report]) if other is not None]
    if failure is not None:
        raise failure
    if failures:
        kinds, message, name = failures[0]
        raise FAILURES[kinds[0]](message) if kinds else RuntimeError(f"{name}: {message}")
    return done[0]
