"""Failures that end a run after a checkpoint, on all processes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from trl_ext.callbacks import CallbackError
from trl_ext.generation import GenerationError
from trl_ext.ppo.objectives import ObjectiveError
from trl_ext.rewards import RewardError


class RunError(RuntimeError):
    """What nobody foresaw, by its class and its words; its cause is the error itself."""


class OutOfMemory(torch.OutOfMemoryError):
    """Torch's, of which every process has heard."""


# Each ends the run on all processes at once.
FAILURES = (GenerationError, RewardError, CallbackError, ObjectiveError, OutOfMemory, RunError)
_Result = TypeVar("_Result")


def together(work: Callable[[], _Result]) -> _Result:
    """What `work` returns, which must not wait for other processes. Every process must call it: one that failed alone
    would leave the others waiting for ever.

    Raises:
        Exception: one of `FAILURES`: `work` failed here, or on another process.
    """
    done: list[_Result] = []
    failure: Exception | None = None
    try:
        done.append(work())
    except FAILURES as error:
        failure = error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a SystemExit or a CancelledError of somebody's code, too
        if PartialState().num_processes == 1 and not isinstance(error, Exception):
            raise
        known = isinstance(error, torch.OutOfMemoryError)
        failure = OutOfMemory(str(error)) if known else RunError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
    kinds = [number for number, kind in enumerate(FAILURES) if isinstance(failure, kind)]
    failures = [report for report in gather_object([(kinds, str(failure))]) if report[0]]
    if failure is not None:
        raise failure
    if failures:
        (kind, *_), message = failures[0]
        raise FAILURES[kind](message)
    return done[0]


def on_all(work: Callable[[], _Result]) -> _Result:
    """As `together`; of a single process an error stays what it is."""
    return together(work) if PartialState().num_processes > 1 else work()
