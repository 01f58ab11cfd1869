"""Files of records to rows, each with the number of its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

Row = dict[str, Any]


class FeedbackError(ValueError):
    """Feedback that cannot be used; one sentence with file, line, column and remedy."""


class Unusable(Exception):
    """A value that cannot be used: its column and why."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


def numbered_rows(source: str | Path | Dataset, name: str) -> Iterator[tuple[int, Row | Unusable]]:
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


def _lines(path: Path) -> Iterator[tuple[int, str | Unusable]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, Unusable("", f"byte {error.start + 1} is no UTF-8")


def _jsonl(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    for number, line in _lines(path):
        if isinstance(line, Unusable):
            yield number, line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Unusable("", f"no JSON ({error!s:.80})")
                continue
            yield number, row if isinstance(row, dict) else Unusable("", "no JSON object")


def _json(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FeedbackError(f"{path} is no JSON ({error!s:.80}).") from error
    if not isinstance(rows, list):
        raise FeedbackError(f"{path} holds {type(rows).__name__}, not a list of records.")
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else Unusable("", "no JSON object")


def _csv(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    csv.field_size_limit(2**31 - 1)
    broken: list[tuple[int, Unusable]] = []

    def good() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, Unusable):
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
            yield reader.line_num, Unusable("", f"no CSV ({error})")
            continue
        while broken:
            yield broken.pop(0)
        if row is None:
            return
        line = reader.line_num
        if None in row or None in row.values():
            found = len(row) + len(row.get(None) or []) - (None in row) - list(row.values()).count(None)
            yield line, Unusable("", f"{found} fields under {len(reader.fieldnames or [])} columns")
        else:
            yield line, row


def _parquet(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
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
