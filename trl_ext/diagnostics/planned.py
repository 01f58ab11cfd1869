"""What a run's schedule and its data say of it before it begins, for rules that need not wait for a log."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")  # schedules that follow a metric of evaluations
PARTS = 40  # of a run whose learning rate is read off the schedule
FEWEST, MOST = 16, 5_000  # rows whose order is looked at


def planned(
    args: Any,
    state: Any,
    lr_scheduler: Any = None,
    train_dataloader: Any = None,
    processing_class: Any = None,
    **_: Any,
) -> dict[str, Any]:
    """From what Transformers' `on_train_begin` comes with.

    Returns:
        "planned_rates", see `rates`; of trl_ext's PPOTrainer, where it does not shuffle, "prompts_order", see `order`,
        and where generation is told where to end, "stop_words", see `stop_words`.
    """
    told: dict[str, Any] = {"planned_rates": rates(lr_scheduler, state.max_steps)}
    if hasattr(args, "steps_per_rollout") and args.shuffle_dataset is False:
        told["prompts_order"] = order(getattr(train_dataloader, "dataset", None))
    ends = (getattr(args, "generation_kwargs", None) or {}).get("eos_token_id")
    if hasattr(args, "steps_per_rollout") and ends:  # a list, as PPOConfig keeps it
        told["stop_words"] = stop_words(ends, processing_class)
    return told


def stop_words(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Of the tokens at which generation ends those that are ordinary words, or parts of one: no mark, and no space or
    stop, at which some mean to end. An id of another model's EOS is such a word."""
    if tokenizer is None:
        return []
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    texts = [tokenizer.decode([one]) for one in ids if one not in marks]
    return [text for text in texts if any(c.isalpha() for c in text) and not text.strip().startswith(("<", "["))]


def rates(schedule: Any, steps: int) -> list[tuple[int, float]]:
    """(optimizer step, learning rate) at some steps of the whole run; empty where the schedule cannot say it before."""
    from torch.optim.lr_scheduler import LambdaLR  # nobody waits for torch who only asks the doctor

    schedule = getattr(schedule, "scheduler", schedule)  # accelerate wraps it
    factor: Any = schedule.lr_lambdas[0] if isinstance(schedule, LambdaLR) else None
    if steps < 1 or not inspect.isfunction(getattr(factor, "func", factor)):  # an object of its own has a state
        return []
    at = sorted({step * (steps - 1) // PARTS for step in range(PARTS + 1)})
    try:
        return [(step, schedule.base_lrs[0] * float(factor(step))) for step in at]
    except Exception:  # a schedule that knows the next steps alone; the run tells if it ever comes there
        return []


def order(dataset: Any) -> tuple[str, float, int] | None:
    """By what neighbouring prompts are alike, and how much: 1 less the mean difference of their ranks over that of rows
    drawn at random, so about 0 of shuffled rows and 1 of sorted ones. Of all that they can be sorted by, the reward
    functions' columns included, the one by which it is highest; and how many rows there are. None where that is not
    known. A prompt that stands there several times in a row counts once, and columns that number the rows, or that
    hardly differ, do not count."""
    from datasets import Dataset, Value

    from trl_ext.types import as_text

    if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
        return None
    plain = [name for name, feature in dataset.features.items() if isinstance(feature, Value)]
    columns = dataset.with_format(None).select_columns(list({"prompt", *plain}))[:MOST]
    texts = [as_text(prompt) for prompt in columns["prompt"]]
    first = [next(rows) for _, rows in groupby(range(len(texts)), key=texts.__getitem__)]
    if len(first) < FEWEST:
        return None
    columns = {name: values for name, values in columns.items() if not _numbers_rows(values)}
    keys = {**columns, "prompt": texts, "the prompt's length": [len(text) for text in texts]}
    alike = {name: _neighbours_alike([values[row] for row in first]) for name, values in keys.items()}
    name = max(alike, key=lambda one: alike[one])
    return name, alike[name], len(dataset)


def _numbers_rows(values: Sequence[Any]) -> bool:
    """Whether these are ids: texts of which each is another one, in their order, or numbers with one step between."""
    if not all(isinstance(value, str | int | float) for value in values) or len(set(values)) < len(values):
        return False
    if all(isinstance(value, str) for value in values):
        return list(values) in (sorted(values), sorted(values, reverse=True))
    return len({b - a for a, b in pairwise(values)}) == 1


def _neighbours_alike(values: Sequence[Any]) -> float:
    """See `order`; 0 where that says nothing: most values are the same, or some are none."""
    count, different = len(values), Counter(values)
    if any(value is None or value != value for value in different) or different.most_common(1)[0][1] > 0.6 * count:
        return 0.0
    places = {value: place for place, value in enumerate(sorted(different))}
    ranks = [places[value] for value in values]
    # Mean over all pairs of |a - b|, from the sorted values.
    anywhere = sum((2 * i - count + 1) * rank for i, rank in enumerate(sorted(ranks))) * 2 / count**2
    near = math.fsum(abs(b - a) for a, b in pairwise(ranks)) / (count - 1)
    return 1 - near / anywhere
