"""Which rows are trained on when: prompts into rollouts, rollouts into minibatches, minibatches into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class RolloutSampler(Sampler[int]):
    """Row numbers of a dataset: each rollout's prompts, repeated for every micro-batch that trains on them.

    The Trainer draws one dataloader batch a micro-batch, but a rollout serves many. The first draw is generated from,
    the repeats only count; what is left at the end of an epoch and does not fill a rollout is dropped.

    Args:
        num_rows: rows of the dataset, at least `rollout_size`.
        rollout_size: completions of one rollout, over all processes.
        repeats: micro-batches a rollout, a process.
        shuffle: draw the rows in a new order each epoch.
        seed: with the epoch's number, decides that order.
        num_generations: completions of each prompt; divides `rollout_size`.
    """

    def __init__(
        self, num_rows: int, rollout_size: int, repeats: int, shuffle: bool, seed: int, num_generations: int = 1
    ) -> None:
        self.num_rows, self.prompts, self.repeats = num_rows, rollout_size // num_generations, repeats
        self.num_generations = num_generations
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer at the start of each epoch, also of a resumed one."""
        self.epoch = epoch

    @property
    def rollouts(self) -> int:
        """Whole rollouts of an epoch."""
        return self.num_rows // self.prompts

    def rollout(self, number: int) -> list[int]:
        """Row numbers of one rollout of the run, counted from 0 over all epochs."""
        epoch, at = divmod(number, self.rollouts)
        prompts = self._order(epoch)[at * self.prompts : (at + 1) * self.prompts]
        return prompts.repeat_interleave(self.num_generations).tolist()

    def __iter__(self) -> Iterator[int]:
        order = self._order(self.epoch)
        for prompts in order[: self.rollouts * self.prompts].split(self.prompts):
            rollout = prompts.repeat_interleave(self.num_generations).tolist()
            for _ in range(self.repeats):
                yield from rollout

    def __len__(self) -> int:
        return self.rollouts * self.prompts * self.num_generations * self.repeats

    def _order(self, epoch: int) -> Tensor:
        return permutation(self.num_rows, self.seed, epoch) if self.shuffle else torch.arange(self.num_rows)


def permutation(n: int, *seeds: int) -> Tensor:
    """A permutation of n rows that depends on `seeds` alone: a resumed run needs no generator's state to repeat it."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % 2**63
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


def mini_batch(num_rows: int, minibatch: int, num_mini_batches: int, *seeds: int) -> Tensor:
    """Rows of the `minibatch`-th minibatch of an epoch over a rollout, over all processes.

    `seeds` (the run's, the rollout, the epoch) decide the order: every epoch draws a new one. The minibatches of an
    epoch are disjoint and of equal size.
    """
    return permutation(num_rows, *seeds).chunk(num_mini_batches)[minibatch]


def micro_batches(rows: Tensor, lengths: Tensor, count: int, processes: int, process: int) -> list[Tensor]:
    """Cut a minibatch so that rows of like length are computed together, and little of it is padding.

    Args:
        rows: (minibatch,) row numbers, a multiple of `count * processes`.
        lengths: (all rows,) tokens of each row of the rollout.
        count: micro-batches a process.
        processes: number of processes; each gets its share of every length class.
        process: which one this is.

    Returns:
        This process's `count` micro-batches of row numbers, the longest first (an out-of-memory error comes at once).
    """
    by_length = rows[lengths[rows].argsort(descending=True, stable=True)]
    return [part.chunk(processes)[process] for part in by_length.chunk(count)]
