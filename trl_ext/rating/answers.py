"""Answers to be judged, and the items that are made of them, in the order in which they are asked about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.feedback import FORMS, FeedbackError, Problem, Record, Unusable, read
from trl_ext.feedback.files import Row, has_half_a_character, numbered_rows
from trl_ext.feedback.forms import number_of
from trl_ext.feedback.reading import check_prompt_is_read, check_same
from trl_ext.rating.modes import LETTERS, STARS, Candidate, Mode, Verdict, alike, shuffled

COLUMNS = ("prompt", "completion", "policy", "id", "tokens")


@dataclass(frozen=True)
class Answer:
    """A row of the file of answers.

    Attributes:
        id: as it was given; else its number in the file, from 1.
        prompt, completion: a text, or a list of messages.
        policy: who wrote it; None where nobody said.
        tokens: how many the completion has; None where nobody said.
    """

    id: str
    prompt: Any
    completion: Any
    policy: str | None = None
    tokens: int | None = None

    @property
    def key(self) -> str:
        return written(self.completion)


@dataclass(frozen=True)
class Item:
    """Answers that are shown together.

    Attributes:
        answers: their numbers, from 0.
        kind: "ask"; "attention" where the verdict is known; "alike" where nobody is asked because the two read alike.
        known: the verdict of an attention item.
    """

    answers: tuple[int, ...]
    kind: str = "ask"
    known: Verdict | None = None


def written(value: Any) -> str:
    """As JSON."""
    return json.dumps(value, ensure_ascii=False)


def read_answers(file: str | Path) -> tuple[list[Answer], list[str]]:
    """The answers in a file as `trl-ext sample` writes it, and the columns that nobody reads. Answers have
    `completion`, and where they are known `prompt`, `policy`, `id` and `tokens`. One may be empty: a policy may say
    nothing.

    Raises:
        FileNotFoundError: no such file.
        FeedbackError: no answers, a row that is none, two with one id, or prompts in a column that nobody reads.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"The file of answers {str(file)!r} does not exist.")
    answers: list[Answer] = []
    first: Record | None = None
    unread: dict[str, str] = {}
    lines: dict[str, int] = {}  # by id
    for line, row in numbered_rows(str(path), str(file)):
        try:
            if isinstance(row, Unusable):
                raise row
            if "completion" not in row:
                raise FeedbackError(
                    f"{file}, line {line} has the columns {sorted(row)}: answers need 'completion', and 'prompt' where "
                    "they answer one."
                )
            unread.update({column.lower(): column for column in row if column not in COLUMNS})
            says_nothing = isinstance(row["completion"], str) and not row["completion"].strip()
            asked = {"prompt": row.get("prompt"), "completion": "-" if says_nothing else row["completion"]}
            record: Any = FORMS["labels"].record({**asked, "label": True})
            first = first or record
            check_same(record, first)
            about = {column: _text(row, column) for column in ("id", "policy", "tokens")}
            tokens = None if about["tokens"] is None else _tokens(about["tokens"])
            name = about["id"] or str(len(answers) + 1)
            if (before := lines.setdefault(name, line)) != line:
                raise Unusable("id", f"{name!r:.60} is that of line {before} too: give each answer one of its own")
        except Unusable as bad:
            raise FeedbackError(f"{file}: {Problem(line, bad.column, bad.reason)}.") from bad
        answers.append(
            Answer(
                name,
                record.prompt,
                "" if says_nothing else record.completion,
                about["policy"],
                tokens,
            )
        )
    if not answers:
        raise FeedbackError(f"{file} holds no answers.")
    if not any(answer.prompt for answer in answers) and isinstance(answers[0].completion, str):
        check_prompt_is_read(str(file), unread)
    return answers, sorted(unread.values())


def _text(row: Row, column: str) -> str | None:
    """A cell that may be missing, which tables write as NaN."""
    value = row.get(column)
    if has_half_a_character(value):
        raise Unusable(column, "half of a surrogate pair (\\ud800 to \\udfff), which is no character: mend the escapes")
    return None if value is None or value == "" or value != value else str(value)


def _tokens(text: str) -> int:
    number = number_of(text, "tokens")
    if number != int(number) or not 0 <= number < 2**53:
        raise Unusable("tokens", f"{text!r:.60} is not a whole number from 0 on")
    return int(number)


def fingerprint(answers: Iterable[Answer]) -> str:
    """Equal for equal answers, however their file is laid out."""
    rows = (written([answer.id, answer.prompt, answer.completion, answer.policy]) for answer in answers)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def items_of(answers: Sequence[Answer], mode: Mode, seed: str) -> list[Item]:
    """What is asked, in this order: one item of each prompt, then another of each, so that ratings reach all prompts
    however few they are. Prompts and their answers are shuffled.

    Raises:
        FeedbackError: there is nothing to ask.
    """
    by_prompt: dict[str, list[Candidate]] = {}
    for number, answer in enumerate(answers):
        candidates = by_prompt.setdefault(written(answer.prompt), [])
        candidates.append(Candidate(number, answer.key, answer.policy))
    turns: list[tuple[int, Item]] = []
    ties: list[Item] = []
    for prompt in shuffled(list(by_prompt), seed):
        candidates = shuffled(by_prompt[prompt], seed, prompt)
        turns += enumerate(Item(group) for group in mode.groups(candidates))
        ties += [Item(pair, "alike") for pair in alike(candidates)] if mode.ranks else []
    if not turns:
        raise FeedbackError(f"Nothing can be judged: --mode {mode.name} needs {mode.needs}.")
    return [item for _, item in sorted(turns, key=lambda turn: turn[0])] + ties


def read_attention(file: str | Path, mode: Mode) -> list[tuple[Any, tuple[Any, ...], Verdict]]:
    """(prompt, completions, verdict) of feedback whose judgement is known.

    Raises:
        FileNotFoundError, FeedbackError: as `feedback.read` does; or it is of another form than the mode's, or no
            verdict that a rater could give.
    """
    known = read(file)
    if known.form != mode.form:
        raise FeedbackError(
            f"{file} holds {known.form}: --mode {mode.name} needs attention items that are {mode.form}."
        )
    items: dict[Any, tuple[Any, tuple[Any, ...], Verdict]] = {}
    for number, record in enumerate(known.records, start=1):
        completions, verdict = mode.known(record)
        if mode.name == "stars" and not STARS[0] <= record.mean <= STARS[-1]:
            raise FeedbackError(f"{file}: rating {number} is {record.mean:g}, but --mode stars asks for 1 to 5.")
        if len(completions) > len(LETTERS):
            raise FeedbackError(
                f"{file}: record {number} has {len(completions)} answers, but a page shows {len(LETTERS)} at most."
            )
        said = dict(zip(map(written, completions), verdict, strict=True))
        item = items.setdefault(name_of(record.prompt, completions), (record.prompt, completions, verdict))
        if len(said) < len(completions) or said != dict(zip(map(written, item[1]), item[2], strict=True)):
            raise FeedbackError(
                f"{file}: record {number} says two things about the same answer: leave one verdict on each."
            )
    return list(items.values())


def name_of(prompt: Any, completions: Sequence[Any]) -> tuple[str, ...]:
    """Equal for the same answers to the same prompt, in any order."""
    return written(prompt), *sorted(map(written, completions))
