"""From files to rows, each with the number of its line. What is wrong with a line takes its row's place."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

Row = dict[str, Any]


class FeedbackError(ValueError):
    """Feedback that cannot be used. The message is one sentence with file, line, column and remedy."""


class Unusable(Exception):
    """A value that cannot be used, with its column and the reason."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


def numbered_rows(source: str | Path | Dataset, name: str) -> Iterator[tuple[int, Row | Unusable]]:
    """(line, row) of every record. A line that holds no record gives an `Unusable` instead of a row.

    Cells of CSV and TSV are texts, whatever they look like: 02 stays "02", NA stays "NA", an empty cell is "".
    """
    if isinstance(source, Dataset):
        yield from enumerate(source, start=1)
        return
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"The feedback file {name!r} does not exist.")
    if path.suffix not in READERS:
        raise FeedbackError(f"{name} is of no known kind: give one of {', '.join(READERS)}.")
    yield from READERS[path.suffix](path)


def _lines(path: Path) -> Iterator[tuple[int, str | Unusable]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield number, Unusable("", f"byte {error.start + 1} is not UTF-8")


def _jsonl(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    for number, line in _lines(path):
        if isinstance(line, Unusable):
            yield number, line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, Unusable("", f"not JSON ({error!s:.80})")
                continue
            yield number, row if isinstance(row, dict) else Unusable("", "not a JSON object")


def _json(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":  # a record a line
            yield from _jsonl(path)
            return
        raise FeedbackError(f"{path} is not JSON ({error!s:.80}).") from error
    if not isinstance(rows, list):
        raise FeedbackError(f"{path} holds {type(rows).__name__}, not a list of records.")
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else Unusable("", "not a JSON object")


def _csv(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    csv.field_size_limit(2**31 - 1)
    broken: list[tuple[int, Unusable]] = []
    skipped = 0  # lines that the csv module has not seen

    def decoded() -> Iterator[str]:
        for number, line in _lines(path):
            if isinstance(line, Unusable):
                broken.append((number, line))
            else:
                yield line

    tabs = path.suffix == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.DictReader(decoded(), **dialect)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield reader.line_num + skipped + len(broken), Unusable("", f"not CSV ({error})")
            continue
        while broken:
            skipped += 1
            yield broken.pop(0)
        if row is None:
            return
        line = reader.line_num + skipped
        if None in row or None in row.values():
            fields = len(row) + len(row.get(None) or []) - (None in row) - list(row.values()).count(None)
            yield line, Unusable("", f"{fields} fields under {len(reader.fieldnames or [])} columns")
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
        raise FeedbackError(f"{path} is not a Parquet file ({error!s:.80}).") from error


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
