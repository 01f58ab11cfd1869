"""What came of each round: a line, a table, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl_ext.launch.screen import show_table
from trl_ext.loop.rounds import Round
from trl_ext.runs import write_whole

Line = dict[str, Any]
COLUMNS = {  # of the table: the line's name, the heading, how it is written
    "number": ("Round", "d"),
    "ratings": ("Ratings", ",d"),
    "exam": ("Exam", ".1%"),
    "win_rate": ("Wins", ".1%"),
    "win_rate_first": ("Beats first", ".1%"),
    "score": ("Score", ".2f"),
    "own_score": ("By reward", ".2f"),
    "kl": ("KL", ".2f"),
    "accuracy_before": ("New before", ".1%"),
    "accuracy_after": ("New after", ".1%"),
}


def line(
    round_: Round,
    result: Mapping[str, Any],
    accuracy: Mapping[str, Any],
    exams: Mapping[str, float],
    judging: str | None,
    own: Sequence[str],
    spent: int,
) -> Line:
    """One round in numbers; None where there is none.

    Args:
        result: of `trl_ext.evaluation.evaluate`.
        accuracy: of the reward models, before and after they were trained on the round's feedback.
        exams: share right, by policy.
        judging: the metric that the judge gives; None: it gives none.
        own: those of the round's own reward models.
        spent: judgements so far.
    """
    policies, rates = result["policies"], result["win_rates"].get(round_.name, {})

    def metric(policy: str, name: str | None) -> float | None:
        found = policies[policy]["metrics"].get(name)
        return None if found is None else found["mean"]

    values = [metric(round_.name, name) for name in own]
    return {
        "number": round_.number,
        "ratings": spent,
        "exam": exams.get(round_.name),
        "exam_before": exams.get(round_.before.name),
        "win_rate": rates.get(round_.before.name, {}).get("rate"),
        "win_rate_first": rates.get("base", {}).get("rate"),
        "score": metric(round_.name, judging),
        "score_before": metric(round_.before.name, judging),
        "own_score": sum(values) / len(values) if values and None not in values else None,  # type: ignore[arg-type]
        "kl": metric(round_.name, "kl"),
        "accuracy_before": accuracy["before"],
        "accuracy_after": accuracy["after"],
    }


def idle(rows: Sequence[Line]) -> int:
    """How many rounds, the last ones, did not win against the one before."""
    count = 0
    for row in reversed(rows):
        if row["win_rate"] is not None and row["win_rate"] > 0.5:
            break
        count += 1
    return count


def show_round(row: Line) -> None:
    """Print a round's numbers."""
    known = [f"{heading} {format(row[name], how)}" for name, (heading, how) in COLUMNS.items() if row[name] is not None]
    print(", ".join(known), flush=True)


def show(rows: Sequence[Line]) -> None:
    """Print all rounds as a table; a column that nobody has is left out."""
    columns = {name: about for name, about in COLUMNS.items() if any(row[name] is not None for row in rows)}
    cells = [
        ["" if row[name] is None else format(row[name], how) for name, (_, how) in columns.items()] for row in rows
    ]
    show_table("The circle", [heading for heading, _ in columns.values()], cells)
    if rows and rows[0]["exam_before"] is not None:
        print(f"Exam: {rows[0]['exam_before']:.1%} right before, {rows[-1]['exam']:.1%} after.", flush=True)


def write(out: Path, rows: Sequence[Line]) -> None:
    """rounds.json, and where matplotlib is installed rounds.svg."""
    write_whole(out / "rounds.json", json.dumps(rows, indent=2) + "\n")
    with suppress(ImportError):  # the extra `feedback`
        draw(rows, out / "rounds.svg")


def draw(rows: Sequence[Line], picture: Path) -> None:
    """Over the judgements spent: exam and win rate; scores; KL; the reward model on new answers, before and after
    it was trained on them.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = {
        "share": {"exam": "exam", "win_rate_first": "wins against the first"},
        "score": {"score": "the judge's", "own_score": "the reward model's"},
        "KL, nats per completion": {"kl": ""},
        "accuracy on new answers": {"accuracy_before": "before", "accuracy_after": "after"},
    }
    for axis, (what, lines) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for (name, label), colour in zip(lines.items(), ("#0072b2", "#e69f00"), strict=False):
            points = [(row["ratings"], row[name]) for row in rows if row[name] is not None]
            if name == "exam" and rows[0]["exam_before"] is not None:
                points.insert(0, (0, rows[0]["exam_before"]))
            if name == "kl":
                points.insert(0, (0, 0.0))
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=label) if points else None
        if any(lines.values()) and axis.get_lines():
            axis.legend(frameon=False)
        axis.set_ylabel(what)
        axis.set_xlabel("judgements")
        axis.spines[["top", "right"]].set_visible(False)
    draft = picture.with_name(f".{picture.name}")
    figure.savefig(draft, format="svg", metadata={"Date": None})
    draft.replace(picture)
