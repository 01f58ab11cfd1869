"""`trl-ext doctor`, `explain` and `report`."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from trl_ext import diagnostics
from trl_ext.diagnostics.catalogue import all_clear
from trl_ext.diagnostics.pages import page


def doctor(chosen: Namespace) -> int:
    if not chosen.trial and (chosen.out is not None or chosen.logs is not None):
        raise ValueError("--out and --logs say where and how long remedies are tried: give --try, or leave them out.")
    if chosen.trial and chosen.json:
        raise ValueError("--json prints findings alone, and --try writes trial.json: give one of the two.")
    log = diagnostics.read_run(chosen.run_dir)
    findings = diagnostics.diagnose(log)
    if chosen.json:
        print(json.dumps([_plain(root) for root in diagnostics.roots(findings)], indent=2))
    else:
        _print_findings(log, findings)
    if chosen.trial:
        _try(chosen, log, findings)
    problems = any(finding.severity == "problem" for finding in findings)
    return 2 if chosen.strict and problems else 0


def _try(chosen: Namespace, log: diagnostics.RunLog, findings: Sequence[diagnostics.Finding]) -> None:
    from trl_ext.launch.remaking import trainer_maker  # imports what trains, which takes seconds

    run = Path(chosen.run_dir).resolve()
    folder = chosen.out if chosen.out is not None else run.with_name(f"{run.name}-try")
    trials = diagnostics.try_remedies(trainer_maker(run), findings, folder, log, run, chosen.logs)
    for trial in trials:
        print(trial)
    print(
        "Nothing was tried: no problem was found whose remedy a trial can show."
        if not trials
        else folder / "trial.html"
    )


def explain(chosen: Namespace) -> int:
    Console().print(Markdown(page(chosen.name)))
    return 0


def report(chosen: Namespace) -> int:
    names = ("evaluation.json", "*/evaluation.json")
    evaluations = [file for run in chosen.run_dirs for name in names for file in sorted(Path(run).glob(name))]
    sections = []
    for file in evaluations:
        from trl_ext.evaluation import section  # imports what samples too, which takes seconds

        try:
            sections.append(section(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:
            why = f"{type(error).__name__}: {error!s:.80}"
            print(
                f"{file} is left out, for it is no evaluation ({why}): run `trl-ext evaluate` again.", file=sys.stderr
            )
    print(diagnostics.write_report(chosen.run_dirs, chosen.output, sections))
    return 0


def _plain(explained: diagnostics.Explained) -> dict[str, Any]:
    """A finding as JSON, with those that follow from it below it."""
    finding, edge = explained.finding, explained.because
    because = {} if edge is None else {"because": edge.mechanism, "source": edge.source}
    return {**asdict(finding), "page": finding.page, **because, "follows": [_plain(one) for one in explained.follows]}


def _print_findings(log: diagnostics.RunLog, findings: Sequence[diagnostics.Finding]) -> None:
    console = Console()
    console.print(Text(f"{log.kind} run, {len(log.rows)} logs, steps {log.steps[0]} to {log.steps[1]}"))
    if not findings:
        console.print(all_clear(log))
    for root in diagnostics.roots(findings):
        finding = root.finding
        table = Table(title=f"{finding.severity}: {finding.title}", show_header=False, title_justify="left")
        for name in ("evidence", "cause", "remedy"):
            table.add_row(name, Text(str(getattr(finding, name))))
        for suspect in finding.suspects:
            table.add_row("perhaps", Text(str(suspect)))
        for one in list(root)[1:]:
            assert one.because is not None
            table.add_row("follows", Text(f"{one.finding.title}. {one.because.mechanism} {one.finding.evidence}"))
        table.add_row("more", f"trl-ext explain {finding.name}")
        table.add_row("steps", f"{finding.steps[0]} to {finding.steps[1]}")
        for sample in finding.samples:
            table.add_row(f"score {sample.score:.2f}", Text(f"{sample.prompt} -> {sample.completion}"))
        console.print(table)
