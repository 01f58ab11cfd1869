"""From sources to rows, each with the number of its line. What is wrong with a line takes its row's place."""

from __future__ import annotations

import ast
import csv
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from pyarrow import ArrowException

from trl_ext.feedback.records import Problem

Row = dict[str, Any]

# A file (.jsonl, .json, .csv, .tsv, .parquet), a folder that `save_to_disk` wrote, the name of a data set on the Hub, a
# data set of `datasets`, a list of rows, or a DataFrame of pandas or polars.
Source = Any


class FeedbackError(ValueError):
    """Feedback that cannot be used. The message is one sentence with file, line, column and remedy."""


class Unusable(Exception):
    """A value that cannot be used, with its column and the reason."""

    def __init__(self, column: str, reason: str) -> None:
        super().__init__(column, reason)
        self.column, self.reason = column, reason


def numbered_rows(source: Source, name: str, split: str | None = None) -> Iterator[tuple[int, Row | Unusable]]:
    """(line, row) of every record. A line that holds no record gives an `Unusable` instead of a row.

    Cells of CSV and TSV are texts, whatever they look like: 02 stays "02", NA stays "NA", an empty cell is "".
    """
    source = opened(source, split, name)
    if isinstance(source, Path):
        yield from READERS[source.suffix](source)
        return
    classes = {
        column: kind
        for column, kind in (getattr(source, "features", None) or {}).items()
        if isinstance(kind, ClassLabel)
    }
    for number, row in enumerate(source, start=1):
        for column, kind in classes.items():  # which number means what is theirs to say
            if isinstance(row.get(column), int) and row[column] >= 0:
                row[column] = kind.int2str(row[column])
        yield number, row if isinstance(row, dict) else Unusable("", f"{type(row).__name__} instead of a record")


def opened(source: Source, split: str | None = None, name: str = "") -> Path | Dataset | IterableDataset | list[Any]:
    """A file that can be read, or what gives rows when it is gone through.

    Args:
        split: of what has several; None: the only one, or "train" of a data set on the Hub.
        name: what messages call it.

    Raises:
        FileNotFoundError: no such file, nor such a data set.
        FeedbackError: a file of an unknown kind, several splits and none of them named, or the Hub cannot be reached.
        TypeError: nothing that holds rows.
    """
    name = name or str(source)
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _one_split(_saved(path, name), split, name)
        if path.suffix in READERS or path.is_file():
            if not path.is_file():
                raise FileNotFoundError(f"The feedback file {name!r} does not exist.")
            if path.suffix not in READERS:
                raise FeedbackError(f"{name} is of no known kind: give one of {', '.join(READERS)}.")
            return path
        return _of_the_hub(str(source), split or "train", name)
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        return _one_split(source, split, name)
    if isinstance(source, (Dataset, IterableDataset, list, tuple)):
        return source
    if hasattr(source, "to_dicts"):  # polars
        return list(source.to_dicts())
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        source = source.reset_index() if any(source.index.names) else source
        return [{str(key): _plain(value) for key, value in row.items()} for row in source.to_dict(orient="records")]
    raise TypeError(
        f"Rows cannot be read from {type(source).__name__}: give a file, a folder of save_to_disk, the name of a data "
        "set on the Hub, a Dataset, a list of rows or a DataFrame."
    )


def as_dataset(rows: Any, name: str, several: bool = False) -> Any:
    """What trainers take: the rows of a file, a saved folder or a name on the Hub, a list of rows or a DataFrame as a
    Dataset; several of these as one; the only split of several; all else as it is.

    Args:
        several: whether a trainer takes several data sets by name, as it does for evaluation.

    Raises:
        FileNotFoundError, FeedbackError: no such file or data set, or a line that is no row.
        ValueError: several splits, where one is needed; data sets of unlike columns.
    """
    if isinstance(rows, (str, Path)):
        return _named_rows(rows, name, evaluated=name.startswith("eval"))
    if isinstance(rows, (list, tuple)) and rows and all(map(_names_rows, rows)):
        parts = [as_dataset(part, f"{name}[{place}]") for place, part in enumerate(rows)]
        if not all(isinstance(part, Dataset) for part in parts):
            return rows
        if len({tuple(sorted(part.column_names)) for part in parts}) > 1:
            listed = "; ".join(", ".join(sorted(part.column_names)) for part in parts)
            raise ValueError(f"{name} has data sets of unlike columns ({listed}): keep those that all of them have.")
        return concatenate_datasets(parts)
    if isinstance(rows, (DatasetDict, IterableDatasetDict)) and not several:
        if len(rows) > 1:
            listed = ", ".join(map(repr, rows))
            raise ValueError(f"{name} has the splits {listed}: give one, as in dataset[{next(iter(rows))!r}].")
        return next(iter(rows.values()))
    if isinstance(rows, (Dataset, IterableDataset)):
        return rows
    is_list = isinstance(rows, (list, tuple)) and bool(rows) and all(isinstance(row, Mapping) for row in rows)
    if is_list or (hasattr(rows, "columns") and (hasattr(rows, "to_dict") or hasattr(rows, "to_dicts"))):
        each: Any = opened(rows, None, name)
        return Dataset.from_list(list(each), on_mixed_types="use_json")
    return rows


ANSWERS = ("chosen", "rejected", "completion", "completions")
# Columns of a file of JSON whose texts may be conversations: others may hold JSON on purpose.
CONVERSATIONS = ("prompt", *ANSWERS, "messages", "conversations")


def decoded(value: Any) -> Any:
    """Messages, where a text is their JSON, or what Python or NumPy writes of them: a table's cells are texts."""
    if isinstance(value, str) and re.match(r"\s*\[\s*\{", value):
        for read in (json.loads, _as_python_writes):
            try:
                messages = read(value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(messages, list) and all(map(_is_message, messages)):
                return messages
    return value


def _as_python_writes(text: str) -> Any:
    """What `repr` wrote; NumPy leaves out the commas between messages, as pandas and datasets do in a CSV."""
    between = r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\}\s+\{"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a backslash in somebody's text
        return ast.literal_eval(re.sub(between, lambda found: found[1] or "}, {", text.strip()))


def _is_message(part: Any) -> bool:
    return isinstance(part, dict) and isinstance(part.get("role"), str) and ("content" in part or "tool_calls" in part)


def _plain(value: Any) -> Any:
    """A cell of a DataFrame: an array as a list; what is missing, which pandas writes as NaN, as None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [item.tolist() if hasattr(item, "tolist") else item for item in value]
    return None if value is not None and value != value else value


def _names_rows(part: Any) -> bool:
    """Whether it is a source of rows, and no row or text."""
    if isinstance(part, str):
        return Path(part).exists() or Path(part).suffix in READERS or bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", part))
    return not isinstance(part, Mapping)


def _named_rows(source: str | Path, name: str, evaluated: bool) -> Dataset:
    """The rows of a file, a saved folder or a name on the Hub, of which training takes the split "train"."""
    if evaluated and not Path(source).exists() and Path(source).suffix not in READERS:
        raise ValueError(f"{name} is {str(source)!r}, which does not say its split: give load_dataset(..., split=...).")
    found: Any = opened(source, None, str(source))
    if not isinstance(found, Path):
        return found
    return rows_of_file(str(found), str(source))


def rows_of_file(source: str, name: str) -> Dataset:
    """The rows of a file as they are.

    Raises:
        FeedbackError: it cannot be read, or holds what no table or tokenizer takes.
    """
    try:
        return _rows_of_file(source)
    except (ArrowException, OverflowError, StopIteration, DatasetsError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or "it holds no rows"
        raise FeedbackError(f"The dataset file {name!r} cannot be read: {reason:.200}") from error


def _rows_of_file(source: str) -> Dataset:
    if Path(source).suffix == ".parquet":  # has types of its own, and need not fit into memory
        return load_dataset("parquet", data_files=source, split="train")
    # Not `load_dataset`, which takes digits in a CSV cell for a number and a date in JSON for a time.
    rows, in_cells = [], Path(source).suffix in (".csv", ".tsv")
    for line, row in numbered_rows(source, source):
        if isinstance(row, Unusable):
            raise ValueError(str(Problem(line, row.column, row.reason)))
        row = {name: decoded(value) if in_cells or name in CONVERSATIONS else value for name, value in row.items()}
        for name, value in row.items():
            if has_half_a_character(value):
                raise ValueError(str(Problem(line, name, "half of a surrogate pair, which is no character")))
            if _too_big(value):
                raise ValueError(str(Problem(line, name, "a number of more than 64 bits: give it as a text")))
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    if not names:
        raise ValueError("it holds no rows")
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, on_mixed_types="use_json")


def _too_big(value: Any) -> bool:
    """Whether a whole number in it is beyond what a table can hold."""
    if isinstance(value, (list, dict)):
        return any(map(_too_big, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def has_half_a_character(value: Any) -> bool:
    """Escapes in JSON can spell what UTF-8 cannot hold and no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _saved(path: Path, name: str) -> Any:
    try:
        return load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError) as error:
        raise FeedbackError(f"The folder {name!r} was not written by save_to_disk: name a file in it.") from error


def _one_split(rows: Any, split: str | None, name: str) -> Any:
    if not isinstance(rows, Mapping):
        return rows
    if split in rows or (len(rows) == 1 and split in (None, "train")):
        return rows[split] if split in rows else next(iter(rows.values()))
    listed = ", ".join(map(repr, rows))
    said = f"has no split {split!r}" if split else "has several splits"
    raise FeedbackError(f"{name} {said}: name one of {listed}.")


def _of_the_hub(name: str, split: str, shown: str) -> Any:
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) or ("/" not in name and "." in name):
        raise FileNotFoundError(f"The feedback file {shown!r} does not exist.")
    try:
        return load_dataset(name, split=split)
    except (OSError, ValueError) as error:  # no such data set, no network, no such split
        reason = " ".join(str(error).split())
        raise FeedbackError(
            f"{shown} is neither a file here nor a data set that can be loaded from the Hub ({reason:.200})."
        ) from error


def _lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str, Unusable | None]]:
    """Each line's number, its text and what is wrong with it; bytes that are no text are replaced."""
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise FeedbackError(f"{path} is UTF-16, which Excel calls Unicode text: save it as CSV UTF-8.")
        file.seek(0)
        for number, line in enumerate(file, start=1):
            used = "utf-8-sig" if number == 1 and encoding == "utf-8" else encoding
            try:
                yield number, line.decode(used), None
            except UnicodeDecodeError as error:
                which = "UTF-8" if encoding == "utf-8" else encoding
                wrong = Unusable("", f"byte {error.start + 1} is not {which}")
                yield number, line.decode(used, errors="replace"), wrong


def _jsonl(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    for number, line, wrong in _lines(path):
        if wrong is not None:
            yield number, wrong
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


@dataclass(frozen=True)
class Table:
    """How the cells of a CSV or TSV file are kept apart.

    Attributes:
        excel: written by Excel where the comma is the decimal sign: ";" between cells, often in cp1252.
    """

    separator: str
    encoding: str = "utf-8"
    excel: bool = False

    def __str__(self) -> str:
        return f"{self.separator!r} between cells, {'UTF-8' if self.encoding == 'utf-8' else self.encoding}"


def table_of(path: Path) -> Table:
    """How this file of cells is laid out: by its header and, if that has ";", by its bytes."""
    if path.suffix == ".tsv":
        return Table("\t")
    with path.open("rb") as file:
        header = next((line for line in file if line.strip()), b"")
        names = re.sub(rb'"[^"]*"', b"", header)
        if b";" not in names or b"," in names:
            return Table(",")
        try:
            file.seek(0)
            for line in file:
                line.decode("utf-8")
        except UnicodeDecodeError:
            return Table(";", "cp1252", excel=True)
    return Table(";", excel=True)


def _csv(path: Path) -> Iterator[tuple[int, Row | Unusable]]:
    csv.field_size_limit(2**31 - 1)
    broken: list[tuple[int, Unusable]] = []  # of the record in hand
    table = table_of(path)

    def decoded() -> Iterator[str]:
        for number, line, wrong in _lines(path, table.encoding):
            if wrong is not None:
                broken.append((number, wrong))
            yield line

    tabs = path.suffix == ".tsv"
    dialect: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    reader = csv.DictReader(decoded(), delimiter=table.separator, **dialect)
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            broken.clear()
            yield reader.line_num, Unusable("", f"not CSV ({error})")
            continue
        if broken:  # all of the record is lost with one of its lines
            yield broken[0]
            broken.clear()
            if row is not None:
                continue
        if row is None:
            return
        line = reader.line_num
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
