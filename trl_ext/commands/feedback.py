"""`trl-ext feedback check`, `convert` and `layouts`."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_ext import feedback
from trl_ext.commands.files import check_new
from trl_ext.feedback.reading import renaming


def check(chosen: Namespace) -> int:
    columns = renaming(chosen.columns)
    on_error = "raise" if chosen.strict else "drop"
    data = feedback.read(chosen.file, chosen.form, columns, on_error, split=chosen.split)
    held_out = feedback.read(chosen.held_out, chosen.form, columns, on_error) if chosen.held_out else None
    report = feedback.check(data, held_out)
    console, table = Console(), Table(title=chosen.file, show_header=False, title_justify="left")
    for name, value in report.facts.items():
        table.add_row(name, Text(f"{value:,}" if isinstance(value, int) else str(value)))
    console.print(table)
    _print_dropped(data.dropped, console)
    for sentence in report.advice or ["Nothing stands out."]:
        console.print(Text(f"- {sentence}"))
    if chosen.picture:
        feedback.draw_ratings(report, chosen.picture)
        console.print(Text(f"drawn into {chosen.picture}"))
    return 0


def convert(chosen: Namespace) -> int:
    columns, on_error = renaming(chosen.columns), "drop" if chosen.drop else "raise"
    check_new(chosen.out)
    if chosen.prompts:
        data: feedback.Prompts | feedback.Feedback
        data = feedback.read_prompts(chosen.file, columns, on_error, split=chosen.split)
        rows = list(data.dataset)
    else:
        data = feedback.read(chosen.file, chosen.form, columns, on_error, split=chosen.split)
        rows = feedback.to_rows(data)
    _print_dropped(data.dropped, Console())
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    chosen.out.write_text(text, encoding="utf-8")
    print(f"read as: {data.read_as}")
    if data.unused:
        print(f"columns not used: {', '.join(data.unused)}")
    print(f"{len(rows):,} records written to {chosen.out}")
    return 0


def layouts(_: Namespace) -> int:
    for layout in feedback.LAYOUTS:
        columns = " or ".join(", ".join(sorted(names)) for names in layout.columns)
        print(f"{layout.name} ({layout.form}): {columns}\n    {layout.becomes}; as in {layout.found_in}")
    return 0


def _print_dropped(dropped: Sequence[feedback.Problem], console: Console) -> None:
    for problem in dropped[:20]:
        console.print(Text(f"dropped: {problem}"))
    if len(dropped) > 20:
        console.print(Text(f"... and {len(dropped) - 20} more"))
