"""Files of feedback to records, each validated, with line and column named where something is wrong."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.feedback.records import Label, Pair, Problem, Ranking, Rating, Record, key_of

FORMS = ("ratings", "rankings", "pairs", "labels")
GOOD = {"good", "true", "yes", "1", "+1", "up"}
BAD = {"bad", "false", "no", "0", "-1", "down"}
Row = dict[str, Any]


class FeedbackError(ValueError):
    """Feedback that cannot be used; one sentence with file, line, column and remedy."""


@dataclass(frozen=True)
class Feedback:
    """What was read.

    Attributes:
        form: "ratings", "rankings", "pairs" or "labels".
        records: all of that form, in the file's order.
        source: the file's name, or "dataset".
        dropped: what was not taken in, and why.
    """

    form: str
    records: list[Any]
    source: str
    dropped: list[Problem] = field(default_factory=list)


class _Bad(Exception):
    """A value that cannot be used: its column and why."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


def read(
    source: str | Path | Dataset,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
) -> Feedback:
    """Read feedback in one of its forms:

    - ratings: `prompt`, `completion`, and `rating` (a number) or `ratings` (several: a list, or text with spaces or
      commas between them). Records of the same prompt and completion are one answer's several raters.
    - rankings: `prompt`, `completions` (a list), `ranks` (as many whole numbers, 1 the best, equal ones tied).
    - pairs: `prompt`, `chosen`, `rejected`, and where known `strength` (above 0).
    - labels: `prompt`, `completion`, `label` (true or false, good or bad, 1 or 0, yes or no).

    Prompts and completions are texts or lists of messages; without a `prompt` column the prompt is the empty text. In
    CSV and TSV, lists stand as JSON; TSV knows no quoting.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, or a dataset.
        form: which; None: told from the columns.
        columns: names in the file to the names above, e.g. {"text": "completion"}.
        on_error: "raise" at the first bad record, or "drop" it and list it in `dropped`.

    Raises:
        FileNotFoundError: no such file.
        FeedbackError: no records, unknown columns, or a bad record.
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error is {on_error!r}: choose raise or drop.")
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}.")
    name = "dataset" if isinstance(source, Dataset) else str(source)
    made: list[Any] = []
    dropped: list[Problem] = []
    for line, row in _rows(source, name):
        try:
            if isinstance(row, _Bad):
                raise row
            row = {(columns or {}).get(key, key): value for key, value in row.items()}
            form = form or _form_of(row, name)
            made.append(_MAKERS[form](row))
        except _Bad as bad:
            problem = Problem(line, bad.column, bad.reason)
            if on_error == "raise":
                raise FeedbackError(f"{name}: {problem}.") from bad
            dropped.append(problem)
    if not made:
        lost = f": all {len(dropped)} records were dropped, the first for {dropped[0]}" if dropped else ""
        raise FeedbackError(f"{name} holds no feedback{lost}.")
    return Feedback(str(form), _raters_together(made) if form == "ratings" else made, name, dropped)


def _form_of(row: Row, name: str) -> str:
    given = set(row)
    if {"chosen", "rejected"} <= given:
        return "pairs"
    if {"completions", "ranks"} <= given:
        return "rankings"
    if "completion" in given and given & {"rating", "ratings"}:
        return "ratings"
    if {"completion", "label"} <= given:
        return "labels"
    raise FeedbackError(
        f"{name} has the columns {sorted(given)}, which are no form of feedback: it needs completion and rating, "
        "completions and ranks, chosen and rejected, or completion and label (rename with columns)."
    )


def _raters_together(records: list[Rating]) -> list[Rating]:
    """Several records of one prompt and completion as one."""
    merged: dict[tuple[str, str], Rating] = {}
    for record in records:
        key = key_of(record.prompt), key_of(record.completion)
        before = merged.get(key)
        merged[key] = record if before is None else replace(record, ratings=before.ratings + record.ratings)
    return list(merged.values())


# One record ----------------------------------------------------------------------------------------------------------


def _rating(row: Row) -> Record:
    column = "ratings" if row.get("ratings") is not None else "rating"
    value = row.get(column)
    if isinstance(value, str) and column == "ratings":
        value = value.replace(",", " ").replace(";", " ").split()
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    numbers = tuple(math.nan if item in (None, "") else _number(item, column) for item in values)
    if all(number != number for number in numbers):
        raise _Bad(column, "no rating was given")
    return Rating(_said(row, "prompt"), _said(row, "completion"), numbers)


def _ranking(row: Row) -> Record:
    completions, ranks = _list(row, "completions"), _list(row, "ranks")
    if len(completions) < 2:
        raise _Bad("completions", f"a ranking needs two completions or more, not {len(completions)}")
    if len(ranks) != len(completions):
        raise _Bad("ranks", f"{len(ranks)} ranks for {len(completions)} completions")
    numbers = [_number(rank, "ranks") for rank in ranks]
    if any(number != int(number) or number < 1 for number in numbers):
        raise _Bad("ranks", f"{ranks!r:.60} are no whole numbers from 1 on")
    answers = tuple(_said({"completions": item}, "completions") for item in completions)
    return Ranking(_said(row, "prompt"), answers, tuple(int(number) for number in numbers))


def _pair(row: Row) -> Record:
    strength = row.get("strength")
    number = None if strength in (None, "") else _number(strength, "strength")
    if number is not None and number <= 0:
        raise _Bad("strength", f"{strength!r} is not above 0: turn the pair round, or drop it as a tie")
    return Pair(_said(row, "prompt"), _said(row, "chosen"), _said(row, "rejected"), number)


def _label(row: Row) -> Record:
    value = row.get("label")
    word = str(value).strip().lower()
    if word.removesuffix(".0") not in GOOD | BAD:
        raise _Bad("label", f"{value!r:.60} is neither good nor bad (true or false, 1 or 0, yes or no)")
    return Label(_said(row, "prompt"), _said(row, "completion"), word.removesuffix(".0") in GOOD)


_MAKERS = {"ratings": _rating, "rankings": _ranking, "pairs": _pair, "labels": _label}


def _said(row: Row, column: str) -> Any:
    """A prompt or completion: text or messages."""
    value = row.get(column)
    if value is None and column == "prompt":
        return ""
    if isinstance(value, str) and (column == "prompt" or value.strip()):
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and m.get("role") and "content" in m for m in value)
    ):
        return value
    shown = "missing" if value is None else "empty" if value in ("", []) or not str(value).strip() else f"{value!r:.60}"
    raise _Bad(column, f"{shown}: give a text, or a list of messages with role and content")


def _list(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, (list, tuple)):
        raise _Bad(column, f"{row.get(column)!r:.60} is no list")
    return list(value)


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise _Bad(column, f"{value!r:.60} is no number")
    return number


# Files ---------------------------------------------------------------------------------------------------------------


def _rows(source: str | Path | Dataset, name: str) -> Iterator[tuple[int, Row | _Bad]]:
    """(line, row) of every record; in the row's place what is wrong with a line that is none."""
    if isinstance(source, Dataset):
        yield from enumerate(source, start=1)
        return
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"The feedback file {name!r} does not exist.")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise FeedbackError(f"{name} is of no known kind: give one of {', '.join(readers)}.")
    yield from readers[path.suffix](path)


def _lines(path: Path) -> Iterator[tuple[int, str | _Bad]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, _Bad("", f"byte {error.start + 1} is no UTF-8")


def _jsonl(path: Path) -> Iterator[tuple[int, Row | _Bad]]:
    for number, line in _lines(path):
        if isinstance(line, _Bad):
            yield number, line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, _Bad("", f"no JSON ({error!s:.80})")
                continue
            yield number, row if isinstance(row, dict) else _Bad("", "no JSON object")


def _json(path: Path) -> Iterator[tuple[int, Row | _Bad]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FeedbackError(f"{path} is no JSON ({error!s:.80}).") from error
    if not isinstance(rows, list):
        raise FeedbackError(f"{path} holds {type(rows).__name__}, not a list of records.")
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else _Bad("", "no JSON object")


def _csv(path: Path) -> Iterator[tuple[int, Row | _Bad]]:
    csv.field_size_limit(2**31 - 1)
    broken: list[tuple[int, _Bad]] = []

    def good() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, _Bad):
                broken.append((number, line))
            else:
                yield line

    tabs = path.suffix == ".tsv"
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.DictReader(good(), **how)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num, _Bad("", f"no CSV ({error})")
            continue
        while broken:
            yield broken.pop(0)
        if row is None:
            return
        line = reader.line_num
        if None in row or None in row.values():
            found = len(row) + len(row.get(None) or []) - (None in row) - list(row.values()).count(None)
            yield line, _Bad("", f"{found} fields under {len(reader.fieldnames or [])} columns")
        else:
            yield line, row


def _parquet(path: Path) -> Iterator[tuple[int, Row | _Bad]]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        batches = pq.ParquetFile(path).iter_batches()
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except ArrowException as error:
        raise FeedbackError(f"{path} is no Parquet file ({error!s:.80}).") from error
