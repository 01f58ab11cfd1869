"""The `trl-ext` command. What a subcommand needs it imports itself, so that the others and `--help` start at once."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_ext.diagnostics import Finding, RunLog

RECIPES = {"ppo": "PPO with LoRA", "reward": "train a reward model", "dpo": "DPO with LoRA"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: this process's) and give back the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in RECIPES:
        return _recipe(arguments[0], arguments[1:])
    parser = argparse.ArgumentParser(prog="trl-ext", description="RLHF with PPO on one GPU.")
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, about_it in RECIPES.items():
        rooms.add_parser(name, help=f"{about_it}: the recipe {name}_lora.py, with its options")
    about = rooms.add_parser("feedback", help="human feedback").add_subparsers(required=True, metavar="COMMAND")
    check = about.add_parser("check", help="look at a file of feedback before training on it")
    check.add_argument("file", help="ratings, rankings, pairs or labels: .jsonl, .json, .csv, .tsv or .parquet")
    check.add_argument("--form", help="ratings, rankings, pairs or labels; without it the columns decide")
    check.add_argument("--column", action="append", default=[], metavar="THEIRS=OURS", help="rename a column")
    check.add_argument("--held-out", metavar="FILE", help="feedback for evaluation; shared prompts are counted")
    check.add_argument("--picture", type=Path, metavar="FILE", help="draw the histogram of ratings (.png, .svg, .pdf)")
    check.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    check.set_defaults(run=_check)
    doctor = rooms.add_parser("doctor", help="what is wrong with a run, and what cures it")
    doctor.add_argument("run_dir", help="output folder of a trainer of ours or TRL's, with trainer_state.json")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--strict", action="store_true", help="exit with status 2 where there is a problem")
    doctor.set_defaults(run=_doctor)
    report = rooms.add_parser("report", help="one HTML file about a run, or about two side by side")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="output folders, as for doctor")
    report.add_argument("--output", type=Path, metavar="FILE", help="where to; report.html in the first folder")
    report.set_defaults(run=_report)
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TRL_EXT_TRACEBACK"):
            raise
        print(f"trl-ext: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


def _recipe(name: str, arguments: Sequence[str]) -> int:
    """As `python recipes/NAME_lora.py`. A wheel has the recipes inside the package, a clone beside it."""
    package = Path(__file__).parent
    folder = next(path for path in (package / "recipes", package.parent / "recipes") if path.is_dir())
    sys.argv = [str(folder / f"{name}_lora.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def _doctor(chosen: argparse.Namespace) -> int:
    from trl_ext import diagnostics

    log = diagnostics.read_run(chosen.run_dir)
    findings = diagnostics.diagnose(log)
    if chosen.json:
        print(json.dumps([{**asdict(f), "page": f.page} for f in findings], indent=2))
    else:
        _print_findings(log, findings)
    problems = any(finding.severity == "problem" for finding in findings)
    return 2 if chosen.strict and problems else 0


def _report(chosen: argparse.Namespace) -> int:
    from trl_ext import diagnostics

    print(diagnostics.write_report(chosen.run_dirs, chosen.output))
    return 0


def _print_findings(log: RunLog, findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(Text(f"{log.kind} run, {len(log.rows)} logs, steps {log.steps[0]} to {log.steps[1]}"))
    if not findings:
        console.print("Nothing stands out.")
    for finding in findings:
        table = Table(title=f"{finding.severity}: {finding.title}", show_header=False, title_justify="left")
        for name in ("evidence", "cause", "remedy", "page"):
            table.add_row(name, Text(str(getattr(finding, name))))
        table.add_row("steps", f"{finding.steps[0]} to {finding.steps[1]}")
        for sample in finding.samples:
            table.add_row(f"score {sample.score:.2f}", Text(f"{sample.prompt} -> {sample.completion}"))
        console.print(table)


def _check(chosen: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trl_ext import feedback
    from trl_ext.feedback.reading import renaming

    columns = renaming(chosen.column)
    on_error = "raise" if chosen.strict else "drop"
    data = feedback.read(chosen.file, chosen.form, columns, on_error)
    held_out = feedback.read(chosen.held_out, chosen.form, columns, on_error) if chosen.held_out else None
    report = feedback.check(data, held_out)
    console, table = Console(), Table(title=chosen.file, show_header=False, title_justify="left")
    for name, value in report.facts.items():
        table.add_row(name, Text(f"{value:,}" if isinstance(value, int) else str(value)))
    console.print(table)
    for problem in data.dropped[:20]:
        console.print(Text(f"dropped: {problem}"))
    if len(data.dropped) > 20:
        console.print(Text(f"... and {len(data.dropped) - 20} more"))
    for sentence in report.advice or ["Nothing stands out."]:
        console.print(Text(f"- {sentence}"))
    if chosen.picture:
        feedback.draw_ratings(report, chosen.picture)
        console.print(Text(f"drawn into {chosen.picture}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
