"""Awaiting from code that is no coroutine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def on_the_same_gpu() -> Callable[[], Any]:
    """What lets another thread use the caller's GPU by the name "cuda": which one that is belongs to the thread."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return partial(torch.cuda.set_device, torch.cuda.current_device())


class Loop:
    """An event loop in a thread of its own: the caller's thread may have one that runs already, as a notebook's has.

    It is one loop for good, since a client that an async function keeps open belongs to the loop it was made in.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What it returns. An interrupt of the caller cancels it."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            loop, settle = self._loop, on_the_same_gpu()
            threading.Thread(target=lambda: (settle(), loop.run_forever()), name="trl_ext-loop", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()
