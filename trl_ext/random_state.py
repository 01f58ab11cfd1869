"""Random numbers that are left as they were."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomState:
    """The random numbers to come, of Python, NumPy and torch, as they were when this was made."""

    def __init__(self) -> None:
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Go back to them."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
