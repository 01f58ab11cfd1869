"""Ctrl-C and SIGTERM: finish the optimizer step under way, save, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from accelerate.utils import gather_object

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within `with`, remembers the first signal instead of dying of it; a second one has its usual effect.

    A signal that the process ignores, as one in a script's background ignores Ctrl-C, stays ignored. Outside of the
    main thread, where Python lets nobody handle signals, it does nothing.

    Attributes:
        received: the signal's number, or None; see `came`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in HANDLED if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._remember) for number in heard}
        return self

    def __exit__(self, *error: Any) -> None:
        self._give_back()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def came(self) -> bool:
        """Whether a signal has come, to whichever process: it ends all of them alike. Every process must call it."""
        heard = [one for one in gather_object([self.received]) if one is not None]
        self.received = heard[0] if heard else None
        return bool(heard)

    def raise_received(self) -> None:
        """Go on as the signal would have: KeyboardInterrupt, or exit with status 143.

        Raises:
            KeyboardInterrupt, SystemExit: a signal had come.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
