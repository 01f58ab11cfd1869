"""From the store to a file of feedback that `trl_ext.feedback.read` reads."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.rating.agreement import Agreements, agreements
from trl_ext.rating.answers import Answer
from trl_ext.rating.modes import Mode
from trl_ext.rating.records import Annotation
from trl_ext.rating.store import Store, StoreError


@dataclass(frozen=True)
class Export:
    """What was written, and what was not.

    Attributes:
        rows: how many were written.
        raters: how many people they are from.
        left_out: how many were not, by reason.
        agreements: of all raters.
    """

    rows: int
    raters: int
    left_out: dict[str, int]
    agreements: Agreements

    def __str__(self) -> str:
        left_out = ", ".join(f"{count:,} {why}" for why, count in self.left_out.items())
        lines = [f"left out: {left_out}"] if left_out else []
        found = {"with others": self.agreements.others, "with themselves": self.agreements.self_}
        found["with known verdicts"] = self.agreements.known
        lines += [f"raters agree {who}: {agreement}" for who, agreement in found.items() if agreement.of]
        return "\n".join(lines)


def export(store: Store, file: str | Path) -> Export:
    """Write every judgement of a new item as a row of feedback, with the rater, the comment, the seconds and who wrote
    the answers. An earlier export of that name is replaced.

    Raises:
        StoreError: nothing was judged, or the file is no export of ours, or no .jsonl.
        FileNotFoundError: there is no such folder.
    """
    file = Path(file)
    _check_replaceable(file)
    judgements = store.annotations()
    rows, left_out = feedback_rows(judgements, store.mode)
    if not rows:
        raise StoreError(f"{store.path} holds no judgements to export{_why(left_out)}.")
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    beside.replace(file)
    return Export(len(rows), len({row["rater"] for row in rows}), left_out, agreements(judgements, store.mode))


def feedback_rows(judgements: Iterable[Annotation], mode: Mode) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows in the mode's form of feedback, and how many judgements make none, by reason."""
    rows: list[dict[str, Any]] = []
    left_out: Counter[str] = Counter()
    for judgement in judgements:
        if judgement.kind != "ask":
            left_out["repeats" if judgement.kind == "repeat" else "attention items"] += 1
        elif judgement.verdict is None:
            left_out["skipped" if judgement.state == "skipped" else "cannot tell"] += 1
        elif not all(answer.completion for answer in judgement.answers):
            left_out["with an empty answer"] += 1
        elif (said := mode.row([answer.completion for answer in judgement.answers], judgement.verdict)) is None:
            left_out["ties"] += 1
        else:
            about = {"rater": judgement.rater, "comment": judgement.comment, "seconds": judgement.seconds}
            rows.append({"prompt": judgement.prompt, **said, **about, **_policies(judgement, mode)})
    return rows, dict(left_out)


def _policies(judgement: Annotation, mode: Mode) -> dict[str, Any]:
    answers: Sequence[Answer] = judgement.answers
    if mode.name == "pairs":
        chosen = (judgement.verdict or ()).index(1)
        return {"chosen_policy": answers[chosen].policy, "rejected_policy": answers[1 - chosen].policy}
    if mode.name == "ranking":
        return {"policies": [answer.policy for answer in answers]}
    return {"policy": answers[0].policy}


def _check_replaceable(file: Path) -> None:
    if not file.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(file.parent)!r} does not exist: make it, or name another file.")
    if file.suffix != ".jsonl":  # a reader goes by it
        raise StoreError(f"{file} does not end with .jsonl, which an export is: name another file.")
    if file.is_dir():
        raise StoreError(f"{file} is a folder: name a file.")
    if not file.exists() or file.stat().st_size == 0:
        return
    with file.open("rb") as lines:
        try:
            first = json.loads(lines.readline())
        except ValueError:
            first = None
    if not isinstance(first, dict) or not {"rater", "seconds"} <= set(first):
        raise StoreError(f"{file} exists and is no export of judgements: name another file, or remove it.")


def _why(left_out: dict[str, int]) -> str:
    return " (" + ", ".join(f"{count:,} {why}" for why, count in left_out.items()) + ")" if left_out else " yet"
