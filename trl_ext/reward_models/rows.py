"""The rows that a reward model is trained on: checked, and laid out as the trainer reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from trl_ext.feedback.files import ANSWERS, Unusable
from trl_ext.feedback.forms import FORMS
from trl_ext.feedback.reading import check_same
from trl_ext.feedback.records import Pair, Rating
from trl_ext.tokens import context_limit, fault_of_template, sequence_ids, vocabulary_size

FORM_OF = {"chosen": "pairs", "rating": "ratings", "label": "labels", "ranks": "rankings"}
OF_TEMPLATE = (("tools", list), ("chat_template_kwargs", dict))  # columns that the chat template is given


def checked_rows(dataset: Any, name: str, columns: tuple[str, ...]) -> Any:
    """The rows as TRL lays them out, whoever laid them out: texts, or messages with the prompt in a column of its own.

    Args:
        dataset: a Dataset; of pairs a streaming one too, whose rows are checked when they are drawn.
        name: what messages call it.
        columns: of the objective.

    Raises:
        TypeError: no dataset.
        ValueError: no rows, or a row that cannot be used, by its number (from 0) and column.
    """
    if isinstance(dataset, IterableDataset) and columns[0] == "chosen":
        return dataset.map(lambda row, i: _checked(row, i, name, columns)[0], with_indices=True)
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset with the columns {columns}, not {type(dataset).__name__}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: it needs at least one row.")
    rows, changed, first = [], False, None
    for number, row in enumerate(dataset):
        checked, record = _checked(row, number, name, columns)
        first = first or record
        try:
            check_same(record, first)
        except Unusable as bad:
            raise _refusal(name, number, bad) from bad
        changed = changed or checked != row
        rows.append(checked)
    if not changed:
        return dataset
    if any("prompt" in row for row in rows):  # a Dataset has the columns of its first row
        rows = [{"prompt": "", **row} for row in rows]
    return Dataset.from_list(rows, on_mixed_types="use_json")


def _checked(row: dict[str, Any], number: int, name: str, columns: tuple[str, ...]) -> tuple[dict[str, Any], Any]:
    """A row as it is trained on, and its record."""
    wanted = {"prompt", *columns, *(["margin"] if columns[0] == "chosen" else [])}
    try:
        record = FORMS[FORM_OF[columns[0] if columns[0] == "chosen" else columns[-1]]].record(
            {column: value for column, value in row.items() if column in wanted}
        )
        checked = {column: getattr(record, column) for column in columns if hasattr(record, column)}
        if isinstance(record, Rating):
            checked["rating"] = record.mean
        for column in ("completions", "ranks"):
            if column in checked:
                checked[column] = list(checked[column])
        if "prompt" in row or record.prompt:
            checked["prompt"] = record.prompt
        if "margin" in row and isinstance(record, Pair):
            checked["margin"] = 0.0 if record.strength is None else record.strength
        for column in {"weight", "margin"} & row.keys():
            checked[column] = _amount(checked.get(column, row[column]), column)
        for column, kind in OF_TEMPLATE:
            if column in row:
                checked[column] = _parsed(row[column], column, kind)
    except Unusable as bad:
        raise _refusal(name, number, bad) from bad
    return {**row, **checked}, record


def _refusal(name: str, number: int, bad: Unusable) -> ValueError:
    return ValueError(f"Row {number} of {name}, column {bad.column!r}: {bad.reason}.")


def _amount(value: Any, column: str) -> float:
    """A weight (1 where there is none) or a margin, in what float32 can hold."""
    try:
        amount = 1.0 if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        amount = math.nan
    if isinstance(value, bool) or not abs(amount) <= torch.finfo(torch.float32).max:
        raise Unusable(column, f"{value!r:.60} is not a finite number")
    if column == "weight" and amount < 0:
        raise Unusable(column, f"{value!r:.60} is below 0")
    return amount


def _parsed(value: Any, column: str, kind: type) -> Any:
    """Tools or template arguments, where a text is their JSON."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if value is not None and not isinstance(value, kind):
        raise Unusable(column, f"{value!r:.60} is no {kind.__name__}")
    return value


# In ids --------------------------------------------------------------------------------------------------------------


def template_of(row: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template that a row brings along.

    Raises:
        Unusable: they are none.
    """
    given = {column: _parsed(row.get(column), column, kind) for column, kind in OF_TEMPLATE}
    return {"tools": given["tools"], **(given["chat_template_kwargs"] or {})}


def answer_ids(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], answer: Any) -> list[int]:
    """Ids of an answer with the prompt of its row, as the reward model reads them."""
    template = {} if isinstance(answer, str) else template_of(row)
    return sequence_ids(tokenizer, row.get("prompt"), answer, **template)


def check_written(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: Any | None = None,
    max_length: int | None = None,
    cut: bool = False,
) -> None:
    """Refuse rows that cannot be written in ids, or that a model cannot read.

    Args:
        dataset: rows of any objective, or pairs for DPO.
        name: what messages call it.
        config: of the model; None: not known.
        max_length: longer rows are left out, or `cut`.

    Raises:
        ValueError: names the row and the column.
    """
    vocabulary = vocabulary_size(config) if config is not None else None
    context = context_limit(config) if config is not None else None
    for number, row in enumerate(dataset):
        for column, answer in _answers(row):
            try:
                ids = answer_ids(tokenizer, row, answer)
                fault = None if isinstance(answer, str) else _lost(row, answer, tokenizer)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                bad = Unusable(column, f"cannot be written in ids ({reason:.200}): mend or drop the row")
                raise _refusal(name, number, bad) from error
            if fault is None and vocabulary is not None and max(ids, default=0) >= vocabulary:
                token = tokenizer.convert_ids_to_tokens(max(ids))
                fault = f"the token {token!r} (id {max(ids)}), but the model has {vocabulary} ids only"
            left_out = max_length is not None and len(ids) > max_length and not cut
            length = min(len(ids), max_length) if cut and max_length is not None else len(ids)
            if fault is None and context is not None and length > context and not left_out:
                fault = (
                    f"{length} tokens with its prompt, but the model reads {context}: shorten it or lower max_length"
                )
            if fault is not None:
                raise _refusal(name, number, Unusable(column, f"has {fault}"))


def _lost(row: dict[str, Any], answer: list[Any], tokenizer: PreTrainedTokenizerBase) -> str | None:
    return fault_of_template([*(row.get("prompt") or []), *answer], tokenizer, **template_of(row))


def _answers(row: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for column in ANSWERS:
        if column in row:
            for answer in row[column] if column == "completions" else [row[column]]:
                yield column, answer
