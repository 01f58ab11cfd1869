"""From rows to records. Every record is checked; a message names the line and the column of what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_ext.feedback.files import FeedbackError, Row, Source, Unusable, numbered_rows, opened, table_of
from trl_ext.feedback.forms import FORMS
from trl_ext.feedback.layouts import ASKED, LAYOUTS, Layout, Made, matched
from trl_ext.feedback.records import Label, Pair, Problem, Ranking, Rating, Record, answers_of, key_of
from trl_ext.types import as_text

# What each record is called, whatever form it was written in.
KINDS: dict[type[Record], str] = {Rating: "ratings", Ranking: "rankings", Pair: "pairs", Label: "labels"}
OWN_FORMS = tuple(FORMS)
FIRST_ROWS = 16  # that a layout is recognised by
# Columns that say which of two answers is better: beside `chosen` and `rejected` one of the two is wrong.
VERDICTS = (
    *("labels", "label", "winner", "choice", "preference", "preferred", "better", "vote", "verdict", "judgment"),
    *("better_response_id", "safer_response_id", "winner_model_a", "human_preference"),
    *("overall_preference", "preference_strength"),
)
SIDE = re.compile(
    r"((model|response|answer|completion|option|output|human_ref)[ _-]?)?([ab]|[0-3])([ _-]?(wins|is better))?|"
    r"-[1-3]|left|right|first|second|true|false|tie|chosen|rejected"
)


@dataclass(frozen=True)
class Feedback:
    """Records of one form.

    Attributes:
        form: "ratings", "rankings", "pairs" or "labels".
        records: all of that form, in the order of the source.
        source: the name of the file or dataset.
        dropped: the records that were left out, and why.
        layout: the name of the layout in which others wrote it; "" where it was in our own columns.
        unused: the source's columns that say nothing here.
        undecided: how many rows judged nothing, and made no record: ties, answers that nobody ranked.
        table: how cells were kept apart, where they were not by commas or tabs.
    """

    form: str
    records: list[Any]
    source: str
    dropped: list[Problem] = field(default_factory=list)
    layout: str = ""
    unused: list[str] = field(default_factory=list)
    undecided: int = 0
    table: str = ""

    @property
    def read_as(self) -> str:
        """Form and layout, as in "pairs, hh-rlhf layout"."""
        return ", ".join([self.form, *([f"{self.layout} layout"] if self.layout else []), *filter(None, [self.table])])


@dataclass(frozen=True)
class Prompts:
    """Prompts for PPO.

    Attributes:
        dataset: with the column prompt, each once.
        read_as, unused, dropped: as in `Feedback`.
    """

    dataset: Dataset
    read_as: str
    unused: list[str]
    dropped: list[Problem]


def read(
    source: Source,
    form: str | None = None,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
    name: str | None = None,
    split: str | None = None,
) -> Feedback:
    """Read feedback of one of these forms:

    - ratings: `prompt`, `completion`, and `rating` (a number) or `ratings` (several: a list, or text with spaces or
      commas between them). Records of the same prompt and completion are one answer's several raters.
    - rankings: `prompt`, `completions` (a list), `ranks` (as many whole numbers, 1 the best, equal ones tied).
    - pairs: `prompt`, `chosen`, `rejected`, and where known `strength` (above 0) or TRL's `margin` (any number).
    - labels: `prompt`, `completion`, `label` (true or false, good or bad, 1 or 0, yes or no).

    or of a layout in `trl_ext.feedback.LAYOUTS`, in which public data sets and tools write it.

    Prompts and completions are all texts, or all lists of messages. Where there is no prompt, it is the empty text; for
    a pair of conversations it is the messages that both begin with. Lists may be JSON, as they must be in CSV and TSV.
    TSV knows no quoting. Further columns are named in `unused`.

    Args:
        source: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of `save_to_disk`, the name of a data set on the
            Hub, a data set, a list of rows, a DataFrame; or a list of such sources, which must make one form.
        form: one of these, or of your own in `FORMS`, or the name of a layout; None: the columns decide.
        columns: names in the source to the names above, e.g. {"text": "completion"}. Capital letters need no renaming.
        on_error: "raise" at the first bad record, or "drop" it and list it in `dropped`.
        name: what messages call the source; None: the file's name, or "dataset".
        split: of a source that has several.

    Raises:
        FileNotFoundError: no such file.
        ValueError: `form` or `on_error` is unknown.
        FeedbackError: no records, unknown columns, or a bad record.
    """
    check_on_error(on_error)
    if form is not None and form not in {*FORMS, *(layout.name for layout in LAYOUTS)}:
        raise ValueError(f"form is {form!r}: choose one of {', '.join(FORMS)}, or the name of a layout.")
    if _is_several(source):
        return _together([read(part, form, columns, on_error, name, split) for part in source])
    rows = Rows.of(source, columns, name, split, form)
    if rows.layout is not None and rows.layout.form == "prompts":
        raise rows.unreadable("holds prompts without a judgement", "they serve PPO")
    records: list[Any] = []
    dropped: list[Problem] = []
    undecided = 0
    for line, made in rows:
        try:
            if isinstance(made, Unusable):
                raise made
            if made.row.keys() == {"prompt"}:
                undecided += 1
                continue
            record = _record_of(made, rows.form_of(made.row))
            check_same(record, records[0] if records else record)
            records.append(record)
        except Unusable as bad:
            problem = Problem(line, bad.column, bad.reason)
            if on_error == "raise":
                raise FeedbackError(f"{rows.name}: {problem}.") from bad
            dropped.append(problem)
    if not records:
        first = f": all {len(dropped)} records were dropped, the first for {dropped[0]}" if dropped else ""
        first = first or (f": none of its {undecided} rows judges anything" if undecided else "")
        raise FeedbackError(f"{rows.name} holds no feedback{first}.")
    rows.check_meaning(records)
    kind, layout = KINDS[type(records[0])], rows.layout.name if rows.layout else ""
    records = _raters_together(records) if kind == "ratings" else records
    return Feedback(kind, records, rows.name, dropped, layout, rows.unused, undecided, rows.table)


def read_prompts(
    source: Source,
    columns: Mapping[str, str] | None = None,
    on_error: str = "raise",
    name: str | None = None,
    split: str | None = None,
) -> Prompts:
    """Each prompt once, of feedback in any form and of conversations.

    Args:
        source, columns, on_error, name, split: as in `read`.

    Raises:
        FileNotFoundError, FeedbackError: as `read` does; or there are no prompts.
    """
    check_on_error(on_error)
    rows = Rows.of(source, columns, name, split)
    prompts: dict[str, Any] = {}
    dropped: list[Problem] = []
    form = ""
    for line, made in rows:
        try:
            if isinstance(made, Unusable):
                raise made
            if made.row.keys() == {"prompt"}:
                prompt, form = made.row["prompt"], form or "prompts"
            else:
                record = _record_of(made, rows.form_of(made.row))
                prompt, form = record.prompt, KINDS[type(record)]
            if as_text(prompt).strip():
                prompts[key_of(prompt)] = prompt
            else:
                dropped.append(Problem(line, made.columns.get("prompt", "prompt"), "there is no prompt to answer"))
        except Unusable as bad:
            if on_error == "raise":
                raise FeedbackError(f"{rows.name}: {Problem(line, bad.column, bad.reason)}.") from bad
            dropped.append(Problem(line, bad.column, bad.reason))
    if not prompts:
        raise rows.unreadable(f"holds no prompts (read as {form or 'nothing'})", "PPO needs them")
    if len({isinstance(prompt, str) for prompt in prompts.values()}) > 1:
        raise FeedbackError(f"{rows.name} has texts and messages as prompts: give all of them in one of the two ways.")
    what = "prompts" if form == "prompts" else f"prompts of {form}"
    read_as = f"{what}, {rows.layout.name} layout" if rows.layout else what
    each = [{"prompt": prompt} for prompt in prompts.values()]
    return Prompts(Dataset.from_list(each, on_mixed_types="use_json"), read_as, rows.unused, dropped)


def _goes_on_from(prompt: Any, answer: str) -> bool:
    return isinstance(prompt, str) and answer.startswith(prompt) and answer != prompt


def _begin_with_one_line(pair: Record) -> bool:
    if not isinstance(pair, Pair):
        return False
    lines = [answer.strip().partition("\n") for answer in (pair.chosen, pair.rejected)]
    return pair.chosen != pair.rejected and lines[0][0] == lines[1][0] and all(rest for _, _, rest in lines)


def says_how_to_prompt(source: Source, columns: Mapping[str, str] | None = None, split: str | None = None) -> bool:
    """Whether prompts must be made of the rows (`read_prompts`): they have no column `prompt`, or one that is not the
    whole prompt, as in a layout of others."""
    try:
        rows = Rows.of(source, columns, None, split)
    except FeedbackError:
        return False
    return not rows.layout.plain if rows.layout else bool(rows.first_columns) and "prompt" not in rows.first_columns


def _spelt_as_ours(name: str) -> str:
    """A column of a table, whose writer may begin it with a capital, as a form or a layout has it."""
    lower = re.sub(r"\W+", "_", name.strip().lower())
    sets = [columns for layout in LAYOUTS for columns in layout.columns]
    sets += [columns for form in FORMS.values() for columns in form.columns]
    known = set().union(*sets)
    return next((column for column in known if column.lower() == lower), lower)


class _Watched(dict[str, Any]):
    """A row that notes which of its columns are read."""

    def __init__(self, row: Row, used: set[str]) -> None:
        super().__init__(row)
        self._used = used

    def __getitem__(self, key: str) -> Any:
        self._used.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._used.add(key)
        return super().get(key, default)


class Rows:
    """The rows of a source, and what they were recognised as.

    Attributes:
        name: what messages call the source.
        layout: in which others wrote the rows; None: they are of our own forms.
        form: of our own, or the user's; None where a layout says it.
        first_columns: of the first rows, renamed.
        table: how cells are kept apart, where they are not by commas or tabs.
    """

    def __init__(self, numbered: Iterator[tuple[int, Row | Unusable]], columns: Mapping[str, str], name: str) -> None:
        self.name, self.table, self._decimal_comma = name, "", False
        self._columns = dict(columns)
        first = list(islice(numbered, FIRST_ROWS))
        while first and all(isinstance(row, Unusable) for _, row in first) and (more := next(numbered, None)):
            first.append(more)
        self._numbered = chain(first, numbered)
        self._first = [row for _, row in first if not isinstance(row, Unusable)]
        self._present: dict[str, None] = {}
        self._used: set[str] = set()
        self._verdicts: dict[str, set[str]] = {}
        self.layout: Layout | None = None
        self.form: str | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        columns: Mapping[str, str] | None = None,
        name: str | None = None,
        split: str | None = None,
        form: str | None = None,
    ) -> Rows:
        """The rows of `source`, recognised by `form`, or by their columns and the first rows' cells.

        Raises:
            FileNotFoundError, FeedbackError: no such file, or rows of no known kind.
        """
        name = name or (str(source) if isinstance(source, (str, Path)) else "dataset")
        source = opened(source, split, name)
        rows = cls(numbered_rows(source, name), columns or {}, name)
        if isinstance(source, Path) and source.suffix == ".csv" and (table := table_of(source)).excel:
            rows.table, rows._decimal_comma = str(table), True
        rows._recognise(form)
        return rows

    def _recognise(self, form: str | None) -> None:
        if form in FORMS:
            self.form = form
        elif form is not None:
            self.layout = next(layout for layout in LAYOUTS if layout.name == form)
        elif self._first:
            found = self._found()
            if found is None:
                lower = {name: _spelt_as_ours(name) for row in self._first for name in row}
                given, self._columns = self._columns, {**lower, **self._columns}
                if (found := self._found()) is None:
                    self._columns = given
                    raise self.unreadable(
                        f"has the columns {sorted(self.first_columns)}, which are no form of feedback", ""
                    )
            self.layout, self.form = (found, None) if isinstance(found, Layout) else (None, found)

    def _found(self) -> Layout | str | None:
        """The layout or form most of whose columns are there: of equals a form of the user's, then a layout, then a
        form of ours, the first of each."""
        rows = [self._renamed(row) for row in self._first]
        columns = self.first_columns
        candidates: list[tuple[int, int, Layout | str]] = [(matched(x, columns, rows), 1, x) for x in LAYOUTS]
        for name, shape in FORMS.items():
            size = max((len(wanted) for wanted in shape.columns if any(wanted <= set(row) for row in rows)), default=0)
            candidates.append((size, 0 if name in OWN_FORMS else 2, name))
        best = max(candidates, key=lambda candidate: candidate[:2])
        return best[2] if best[0] else None

    @property
    def first_columns(self) -> set[str]:
        return {name for row in self._first for name in self._renamed(row)}

    def _renamed(self, row: Row) -> Row:
        """A row under our names. What is renamed takes the place of what had that name."""
        return {
            **{name: value for name, value in row.items() if name not in self._columns},
            **{self._columns[name]: value for name, value in row.items() if name in self._columns},
        }

    def __iter__(self) -> Iterator[tuple[int, Made | Unusable]]:
        numbered: Any = self._watched()
        if self.layout is None:
            yield from ((line, row if isinstance(row, Unusable) else Made(row)) for line, row in numbered)
        else:
            for line, row in self.layout.gathered(numbered) if self.layout.gathered else numbered:
                try:
                    made = [row] if isinstance(row, Unusable) else self.layout.rows(row)
                except Unusable as bad:
                    made = [bad]
                yield from ((line, item) for item in made)
        if missing := [column for column in self._columns if column not in self._present]:
            raise FeedbackError(f"{self.name} has no column {missing[0]!r} to rename, only {sorted(self._present)}.")

    def _watched(self) -> Iterator[tuple[int, Row | Unusable]]:
        for line, row in self._numbered:
            if isinstance(row, Unusable):
                yield line, row
                continue
            self._present.update(dict.fromkeys(row))
            renamed = self._renamed(row)
            for column in VERDICTS:
                if column in renamed and len(said := self._verdicts.setdefault(column, set())) < 9:
                    said.add(str(renamed[column]).strip().lower().removesuffix(".0"))
            if self._decimal_comma and "," in str(renamed.get("ratings", "")):
                yield (
                    line,
                    Unusable("ratings", f"{renamed['ratings']!r:.60} may be one number or several: put spaces between"),
                )
                continue
            if self._decimal_comma:
                for column in ("rating", "strength", "margin"):
                    if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", str(renamed.get(column, ""))):
                        renamed[column] = renamed[column].replace(",", ".")
            yield line, _Watched(renamed, self._used)

    @property
    def unused(self) -> list[str]:
        """Columns of the source that nothing was read from."""
        return [name for name in self._present if self._columns.get(name, name) not in self._used]

    def form_of(self, row: Row) -> str:
        """The form that a row is in, whose layout was seen to."""
        if self.form is not None:
            return self.form
        told = {"chosen": "pairs", "ranks": "rankings", "rating": "ratings", "ratings": "ratings", "label": "labels"}
        return next(form for column, form in told.items() if column in row)

    def check_meaning(self, records: Sequence[Record]) -> None:
        """Refuse pairs that a further column turns round, and answers whose prompt stands in a column that nobody
        reads.

        Raises:
            FeedbackError: names the column.
        """
        if self.layout is not None and not self.layout.plain:
            return
        unread = {self._columns.get(name, name).lower(): name for name in self.unused}
        for column in VERDICTS if isinstance(records[0], Pair) else ():
            said = self._verdicts.get(column, set())
            if column in unread and len(said) > 1 and all(map(SIDE.fullmatch, said)):
                raise FeedbackError(
                    f"{self.name} has 'chosen' and 'rejected', and a column {unread[column]!r} that says now one and "
                    f"now the other ({', '.join(sorted(said))}): if it tells which answer is better, half of the pairs "
                    "are the wrong way round. Leave the columns their own names, or drop it if it means another thing."
                )
        first = records[:1000]
        if not isinstance(answers_of(first[0])[0], str):
            return
        if all(record.prompt for record in first):
            if all(_goes_on_from(record.prompt, answer) for record in first for answer in answers_of(record)):
                raise FeedbackError(
                    f"{self.name} repeats the prompt at the beginning of every answer: cut it off there, or what is "
                    "trained learns to repeat it."
                )
        elif not any(record.prompt for record in first):
            check_prompt_is_read(self.name, unread)
            if all(map(_begin_with_one_line, first)):
                raise FeedbackError(
                    f"{self.name} has no prompts, and in each row both answers begin with the same line, as if the "
                    "prompt stood in them: give it in a column 'prompt', and leave it out of 'chosen' and 'rejected'."
                )

    def unreadable(self, what: str, why: str = "") -> FeedbackError:
        """Why these rows are no feedback; its note holds lines that would make them some."""
        known = [" and ".join(sorted(columns)) for shape in FORMS.values() for columns in shape.columns]
        needs = f"it needs {', '.join(known[:-1])}, or {known[-1]} (rename with columns), or one of the layouts that "
        needs += "`trl-ext feedback layouts` lists"
        error = FeedbackError(f"{self.name} {what}: {why + ': ' if why else ''}{needs}.")
        error.add_note(converting_lines(self.name, sorted(self.first_columns)))
        return error


def converting_lines(name: str, columns: Sequence[str], ours: Sequence[str] = ("prompt", "chosen", "rejected")) -> str:
    """Lines of Python that write these rows in our columns; "..." stands for what only people know."""
    theirs = {"prompt": next((column for column in ASKED if column in columns), "...")}
    row = ", ".join(f'"{column}": row["{theirs.get(column, "...")}"]' for column in ours)
    stem = re.sub(r"\W+", "_", Path(name).stem) or "rows"
    return (
        "import json\n"
        "from trl_ext.feedback import rows_of\n"
        f'with open("{stem}.converted.jsonl", "w", encoding="utf-8") as file:\n'
        f"    for row in rows_of({json.dumps(name)}):  # has {', '.join(columns)}\n"
        f'        file.write(json.dumps({{{row}}}) + "\\n")\n'
    )


def rows_of(source: Source, split: str | None = None) -> Iterator[Row]:
    """The rows of any source as they are.

    Raises:
        FileNotFoundError, FeedbackError: no such source, or a line that is no row.
    """
    for line, row in numbered_rows(source, str(source), split):
        if isinstance(row, Unusable):
            raise FeedbackError(f"{source}: {Problem(line, row.column, row.reason)}.")
        yield row


def _is_several(source: Source) -> bool:
    return isinstance(source, (list, tuple)) and bool(source) and not isinstance(source[0], Mapping)


def _together(parts: Sequence[Feedback]) -> Feedback:
    """Feedback of several sources, as that of one.

    Raises:
        FeedbackError: they are of unlike forms, or texts and messages.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.form != first.form:
            raise FeedbackError(
                f"{first.source} has {first.form}, {part.source} has {part.form}: read them one by one."
            )
        try:
            check_same(part.records[0], first.records[0])
        except Unusable as bad:
            raise FeedbackError(f"{part.source}, column {bad.column!r}: {bad.reason} ({first.source}).") from bad
    records = [record for part in parts for record in part.records]
    return Feedback(
        first.form,
        _raters_together(records) if first.form == "ratings" else records,
        " and ".join(part.source for part in parts),
        [problem for part in parts for problem in part.dropped],
        " and ".join(dict.fromkeys(part.layout for part in parts if part.layout)),
        list(dict.fromkeys(column for part in parts for column in part.unused)),
        sum(part.undecided for part in parts),
        " and ".join(dict.fromkeys(part.table for part in parts if part.table)),
    )


def _record_of(made: Made, form: str) -> Record:
    """A row's record, whoever wrote the form."""
    try:
        record = FORMS[form].record(made.row)
    except Unusable as bad:
        raise Unusable(made.columns.get(bad.column, bad.column), bad.reason) from bad
    except Exception as error:
        raise Unusable("", f"the form {form!r} raised {type(error).__name__}: {error}") from error
    if type(record) not in KINDS:
        kind = "dict" if isinstance(record, dict) else type(record).__name__
        raise Unusable("", f"the form {form!r} returned {kind}, not a Rating, Ranking, Pair or Label")
    return record


def _raters_together(records: list[Rating]) -> list[Rating]:
    """Several records of one prompt and completion as one."""
    merged: dict[tuple[str, str], Rating] = {}
    for record in records:
        key = key_of(record.prompt), key_of(record.completion)
        before = merged.get(key)
        merged[key] = record if before is None else replace(record, ratings=before.ratings + record.ratings)
    return list(merged.values())


def renaming(pairs: Sequence[str]) -> dict[str, str]:
    """The argument `columns` of `read`, from a command line's THEIRS=OURS.

    Raises:
        ValueError: one has no "=", or nothing beside it.
    """
    columns = {}
    for pair in pairs:
        theirs, equals, ours = pair.partition("=")
        if not (theirs and equals and ours):
            raise ValueError(f"The column {pair!r} is not of the kind THEIRS=OURS, as in text=completion.")
        columns[theirs] = ours
    return columns


def check_on_error(on_error: str) -> None:
    """Refuse what is no answer to a bad record.

    Raises:
        ValueError: it is none.
    """
    if on_error not in ("raise", "drop"):
        raise ValueError(f"on_error is {on_error!r}: choose raise or drop.")


def check_prompt_is_read(name: str, unread: Mapping[str, str]) -> None:
    """Refuse answers without prompts where these seem to stand in a column that nobody reads.

    Args:
        unread: columns as the source calls them, by their names in small letters.

    Raises:
        FeedbackError: names the column.
    """
    for column in ("prompt", *ASKED, "history", "post", "system"):
        if column in unread:
            raise FeedbackError(
                f"{name} has no column 'prompt', but {unread[column]!r}, which nobody would read: rename it "
                f"({unread[column]}=prompt), or drop it if the answers belong to no prompt."
            )


def check_same(record: Record, first: Record) -> None:
    """Refuse a record of another kind than the first, and texts among messages: trainers tell by one row which of them
    a data set holds."""
    if type(record) is not type(first):
        kinds = f"a {type(record).__name__}, where the first record is a {type(first).__name__}"
        raise Unusable("", f"the form makes {kinds}: let it make one kind")
    items = [*_items(first), *_items(record)]
    texts = isinstance(items[0][1], str)
    for column, item in items:
        if isinstance(item, str) != texts:
            shown = "messages, where others are texts" if texts else "a text, where others are messages"
            raise Unusable(column, f"{shown}: give all prompts and answers in one of the two ways")


def _items(record: Record) -> list[tuple[str, Any]]:
    """(column, text or messages) of every answer, and of the prompt where it is not empty."""
    items = []
    for column in ("chosen", "rejected", "completion", "completions", "prompt"):
        value = getattr(record, column, None)
        items += [(column, item) for item in (value if isinstance(value, tuple) else (value,)) if item]
    return items
