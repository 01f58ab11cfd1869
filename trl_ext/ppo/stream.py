"""Prompts that come one by one, as datasets' `streaming=True` gives them, in the order of a list."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as Rows

from trl_ext.ppo.config import PPOConfig

MOST_TO_EVALUATE = 10_000


class PromptStream(Rows[dict[str, Any]]):
    """The rows that a run takes from a stream, by number: to the Trainer a data set of exactly that many.

    Rows are read as the run comes to them; those of one rollout are kept, for it is drawn several times, and with
    `rollouts_ahead` those of the next. A run that
    resumes reads past the rows that it has had. Where the stream ends it begins again, in its next epoch. Each process
    reads all of it and takes its own part.

    Args:
        stream: of rows with a prompt.
        args: settings, which say how long the run is.

    Attributes:
        check: called with each row that the run takes and its number, once; raises where something is wrong.
        example: a row, once `first` has been called.

    Raises:
        ValueError: nothing says how long the run is; or there are no rows, at first or when it is read again.
    """

    def __init__(self, stream: IterableDataset, args: PPOConfig) -> None:
        steps = args.steps_of_run or args.max_steps
        if steps <= 0:
            raise ValueError("train_dataset is a stream, which has no length: set total_episodes or max_steps.")
        if args.dataloader_num_workers:
            raise ValueError(
                f"train_dataset is a stream, which {args.dataloader_num_workers} dataloader workers would split: leave "
                "dataloader_num_workers at 0."
            )
        self.stream = stream
        self.example: dict[str, Any] = {}
        self.check: Callable[[dict[str, Any], int], None] = lambda row, number: None
        self._prompts = max(1, args.rollout_batch_size // args.num_generations)
        self._length = -(-steps // args.steps_per_rollout) * self._prompts
        self._keeps = (1 + args.rollouts_ahead) * self._prompts
        self._checked = 0
        self._begin()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number < self._read - len(self._kept):
            self._begin()
        while self._read <= number:
            self._kept.append(self._next())
            self._read += 1
        row = self._kept[number - self._read]
        if number >= self._checked:
            self.check(row, number)
            self._checked = number + 1
        return row

    def first(self, count: int | None = None) -> Dataset:
        """So many rows, checked; None: those of the first rollout. The run takes them none the less."""
        self.stream.set_epoch(0)
        rows = list(islice(self.stream, count or self._prompts))
        if not rows:
            raise ValueError("train_dataset is empty: it needs at least one prompt.")
        for number, row in enumerate(rows):
            self.check(row, number)
        self.example = rows[0]
        self.stream.set_epoch(self._epoch)
        return Dataset.from_list(rows, on_mixed_types="use_json")

    def _begin(self) -> None:
        self._epoch, self._read = 0, 0
        self._kept: deque[dict[str, Any]] = deque(maxlen=self._keeps)
        self.stream.set_epoch(0)
        self._rows = iter(self.stream)

    def _next(self) -> dict[str, Any]:
        try:
            return next(self._rows)
        except StopIteration:
            self._epoch += 1
            self.stream.set_epoch(self._epoch)  # its own shuffle draws a new order
            self._rows = iter(self.stream)
        if (row := next(self._rows, None)) is None:
            raise ValueError(
                f"train_dataset gave {self._read} prompts and none when it was read again, but the run takes "
                f"{len(self)}: give a stream that can be read again, or lower total_episodes or max_steps."
            )
        return row


def rows_to_evaluate(dataset: Any) -> Any:
    """A stream, or several by name, read to its end; all else as it is.

    Raises:
        ValueError: it has more rows than anybody evaluates on.
    """
    if isinstance(dataset, dict):
        return {name: rows_to_evaluate(one) for name, one in dataset.items()}
    if not isinstance(dataset, IterableDataset):
        return dataset
    rows = list(islice(dataset, MOST_TO_EVALUATE + 1))
    if len(rows) > MOST_TO_EVALUATE:
        raise ValueError(
            f"eval_dataset is a stream of more than {MOST_TO_EVALUATE:,} rows: say how many, as in stream.take(256)."
        )
    return Dataset.from_list(rows, on_mixed_types="use_json")
