"""Metrics between two logs: sums over real tokens, so that a mean is a mean however the tokens were batched."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import psutil
import torch
from accelerate.utils import gather_object
from torch import Tensor

from trl_ext.core import masked_sum

# What a training log holds beside a rollout's metrics.
OF_THE_TRAINER = {
    *("loss", "grad_norm", "learning_rate", "epoch", "step", "episode", "eps", "memory/peak_gib"),
    *("loss/policy_avg", "loss/value_avg", "loss/ptx", "val/ratio", "val/clipfrac_avg"),
    *("policy/approxkl_avg", "policy/first_approxkl", "policy/clipfrac_avg", "policy/entropy_avg"),
    *("policy/skipped_minibatches", "grad_norm/policy", "grad_norm/value"),
    *("time/generate", "time/roles", "time/score", "time/evidence", "time/train"),
}
EVIDENCE = "evidence/"  # of some rollouts alone


def name_taken(names: Iterable[str], rollout_metrics: Iterable[str]) -> str | None:
    """The first of `names`, given by a user's code, that the trainer logs something else under; None where none is."""
    taken = OF_THE_TRAINER.union(rollout_metrics)
    return next((name for name in sorted(names) if name in taken or name.startswith(EVIDENCE)), None)


class Metrics:
    """Collects until drained.

    Local metrics are (sum, count) pairs of this process, added up over all processes on draining; rollout metrics
    describe the rollout of all processes already and are averaged over rollouts.
    """

    def __init__(self) -> None:
        self._local: dict[str, Tensor] = {}
        self._rollouts: defaultdict[str, list[float]] = defaultdict(list)

    @property
    def names(self) -> set[str]:
        """Of what has been collected."""
        return {*self._local, *self._rollouts}

    def add_tokens(self, values: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Add per-token `values` (batch, tokens) each at the real positions of `mask`; gives back what was added, (sum,
        count) by name."""
        count = mask.sum().double()
        added = {
            name: torch.stack([masked_sum(value.detach().double(), mask), count]) for name, value in values.items()
        }
        for name, entry in added.items():
            self._add(name, entry)
        return added

    def add_value(self, name: str, value: float | Tensor) -> None:
        """Add one number of this process."""
        number = torch.as_tensor(value, dtype=torch.float64)
        self._add(name, torch.stack([number, torch.ones_like(number)]))

    def add_rollout(self, values: dict[str, float]) -> None:
        """Add one rollout's numbers, the same on every process."""
        for name, value in values.items():
            self._rollouts[name].append(value)

    def take_in(self, other: Metrics) -> None:
        """Add what `other` has collected on this process."""
        for name, entry in other._local.items():
            self._add(name, entry)

    def copy(self) -> Metrics:
        """The same numbers, apart from what is added later; sums are replaced, never changed in place."""
        twin = Metrics()
        twin._local.update(self._local)
        twin._rollouts.update({name: list(values) for name, values in self._rollouts.items()})
        return twin

    def state_dict(self) -> dict[str, Any]:
        """What has been collected on all processes, as plain numbers. Every process must call it."""
        return {"sums": self._totals(), "rollouts": dict(self._rollouts)}

    def load_state_dict(self, state: dict[str, Any], keep: bool = True) -> None:
        """Go on from what `state_dict` gave; the sums count on the process with `keep`."""
        sums = state["sums"] if keep else {}
        self._local = {name: torch.tensor(entry, dtype=torch.float64) for name, entry in sums.items()}
        self._rollouts = defaultdict(list, {name: list(values) for name, values in state["rollouts"].items()})

    def drain(self) -> dict[str, float]:
        """Means since the last call, and a fresh start. Every process must call it."""
        totals = self._totals()
        means = {name: sum(values) / len(values) for name, values in self._rollouts.items()}
        means |= {name: total / max(count, 1.0) for name, (total, count) in totals.items()}
        self._local, self._rollouts = {}, defaultdict(list)
        return means

    def _totals(self) -> dict[str, list[float]]:
        totals: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for local in gather_object([{name: entry.tolist() for name, entry in self._local.items()}]):
            for name, (total, count) in local.items():
                totals[name][0] += total
                totals[name][1] += count
        return dict(totals)

    def _add(self, name: str, entry: Tensor) -> None:
        before = self._local.get(name)  # on the CPU where a checkpoint brought it
        self._local[name] = entry if before is None else before.to(entry.device) + entry


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on the accelerator, or resident on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        now = psutil.Process().memory_info()
        return int(now.peak_wset if hasattr(now, "peak_wset") else now.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
