"""The `trl-ext` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from trl_ext import diagnostics, feedback
from trl_ext.diagnostics.catalogue import all_clear
from trl_ext.diagnostics.pages import page
from trl_ext.feedback.reading import renaming


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (None: this process's) and give back the exit status."""
    parser = argparse.ArgumentParser(prog="trl-ext", description="RLHF with PPO on one GPU.")
    rooms = parser.add_subparsers(required=True, metavar="COMMAND")
    about = rooms.add_parser("feedback", help="human feedback").add_subparsers(required=True, metavar="COMMAND")
    check = about.add_parser("check", help="look at a file of feedback before training on it")
    convert = about.add_parser("convert", help="write feedback in any layout as our own JSONL")
    for command in (check, convert):
        command.add_argument(
            "file", help="ratings, rankings, pairs or labels: a file, a saved folder, or a name on the Hub"
        )
        command.add_argument("--form", help="the form or the layout; without it the columns decide")
        command.add_argument("--split", help="of a folder or a data set on the Hub")
        command.add_argument(
            "--columns",
            "--column",
            nargs="+",
            action="extend",
            default=[],
            metavar="THEIRS=OURS",
            help="rename columns",
        )
    convert.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write, .jsonl")
    convert.add_argument("--prompts", action="store_true", help="write the prompts alone, each once")
    convert.add_argument("--drop", action="store_true", help="leave out records that cannot be used, and list them")
    convert.set_defaults(run=_convert)
    about.add_parser("layouts", help="the layouts that are recognised").set_defaults(run=_layouts)
    check.add_argument("--held-out", metavar="FILE", help="feedback for evaluation; shared prompts are counted")
    check.add_argument("--picture", type=Path, metavar="FILE", help="draw the histogram of ratings (.png, .svg, .pdf)")
    check.add_argument("--strict", action="store_true", help="stop at the first record that cannot be used")
    check.set_defaults(run=_check)
    doctor = rooms.add_parser("doctor", help="what is wrong with a run, and what cures it")
    doctor.add_argument("run_dir", help="output folder of a trainer of ours or TRL's, with trainer_state.json")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.add_argument("--strict", action="store_true", help="exit with status 2 where there is a problem")
    doctor.set_defaults(run=_doctor)
    explain = rooms.add_parser("explain", help="the page about one of the doctor's problems")
    explain.add_argument("name", help="as the doctor says it, e.g. kl_runs_away")
    explain.set_defaults(run=_explain)
    report = rooms.add_parser("report", help="one HTML file about a run, or about two side by side")
    report.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="output folders, as for doctor")
    report.add_argument("--output", type=Path, metavar="FILE", help="where to; report.html in the first folder")
    report.set_defaults(run=_report)
    for name, run, what in (
        ("merge", _merge, "write the base with a saved adapter merged into it"),
        ("score", _score, "score a file of answers by a saved reward adapter"),
        ("chat", _chat, "talk to a saved policy"),
    ):
        command = rooms.add_parser(name, help=what)
        command.add_argument("adapter", help="folder of the adapter")
        command.add_argument("--base", metavar="MODEL", help="name or folder of the base; without it, the adapter's")
        command.set_defaults(run=run)
        if name == "merge":
            command.add_argument("output_dir", type=Path, help="where the merged model goes")
            command.add_argument("--dtype", default="auto", help="of its weights: auto, float32, bfloat16, float16")
            continue
        command.add_argument("--load_in_4bit", action="store_true", help="hold the base in 4 bits (NF4)")
        if name == "score":
            command.add_argument("file", help="rows with 'completion' and 'prompt': .jsonl, .json, .csv, .parquet")
            command.add_argument("output", type=Path, help="the same rows with their 'score', as JSONL")
            command.add_argument("--column", action="append", default=[], metavar="THEIRS=OURS", help="rename a column")
        else:
            command.add_argument("--max_new_tokens", type=int, default=256, help="most tokens of an answer")
            command.add_argument("--temperature", type=float, default=1.0, help="of the sampling")
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TRL_EXT_TRACEBACK"):
            raise
        print(f"trl-ext: error: {' '.join(str(error).split())}", file=sys.stderr)
        print(*getattr(error, "__notes__", []), sep="\n", end="", file=sys.stderr)
        return 1


def _doctor(chosen: argparse.Namespace) -> int:
    log = diagnostics.read_run(chosen.run_dir)
    findings = diagnostics.diagnose(log)
    if chosen.json:
        print(json.dumps([{**asdict(f), "page": f.page} for f in findings], indent=2))
    else:
        _print_findings(log, findings)
    problems = any(finding.severity == "problem" for finding in findings)
    return 2 if chosen.strict and problems else 0


def _explain(chosen: argparse.Namespace) -> int:
    Console().print(Markdown(page(chosen.name)))
    return 0


def _report(chosen: argparse.Namespace) -> int:
    print(diagnostics.write_report(chosen.run_dirs, chosen.output))
    return 0


def _print_findings(log: diagnostics.RunLog, findings: Sequence[diagnostics.Finding]) -> None:
    console = Console()
    console.print(Text(f"{log.kind} run, {len(log.rows)} logs, steps {log.steps[0]} to {log.steps[1]}"))
    if not findings:
        console.print(all_clear(log))
    for finding in findings:
        table = Table(title=f"{finding.severity}: {finding.title}", show_header=False, title_justify="left")
        for name in ("evidence", "cause", "remedy"):
            table.add_row(name, Text(str(getattr(finding, name))))
        table.add_row("more", f"trl-ext explain {finding.name}")
        table.add_row("steps", f"{finding.steps[0]} to {finding.steps[1]}")
        for sample in finding.samples:
            table.add_row(f"score {sample.score:.2f}", Text(f"{sample.prompt} -> {sample.completion}"))
        console.print(table)


def _check(chosen: argparse.Namespace) -> int:
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


def _merge(chosen: argparse.Namespace) -> int:
    from trl_ext.launch import trained

    difference = trained.merge(chosen.adapter, chosen.output_dir, chosen.base, chosen.dtype)
    print(f"{chosen.output_dir} (at most {difference:.1g} from the adapter on its base)")
    return 0


def _score(chosen: argparse.Namespace) -> int:
    from trl_ext.launch import load_texts, trained

    if chosen.output.exists():
        raise ValueError(f"{str(chosen.output)!r} exists: name another file for the scores.")
    rows = load_texts(chosen.file).rename_columns(renaming(chosen.column))
    scores = trained.score(chosen.adapter, rows, chosen.base, chosen.load_in_4bit)
    scored = (json.dumps({**row, "score": score}, ensure_ascii=False) for row, score in zip(rows, scores, strict=True))
    chosen.output.write_text("".join(f"{line}\n" for line in scored), encoding="utf-8")
    print(f"{len(scores)} scores, mean {sum(scores) / len(scores):.3g}, in {chosen.output}")
    return 0


def _chat(chosen: argparse.Namespace) -> int:
    from trl_ext.launch import trained

    def ask() -> str | None:
        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            return None

    print("Say something; /new begins anew, an empty line ends.")
    sampling = {"max_new_tokens": chosen.max_new_tokens, "temperature": chosen.temperature}
    trained.chat(chosen.adapter, ask, chosen.base, chosen.load_in_4bit, **sampling)
    return 0


def _convert(chosen: argparse.Namespace) -> int:
    columns, on_error = renaming(chosen.columns), "drop" if chosen.drop else "raise"
    if chosen.out.exists():
        raise FileExistsError(f"{chosen.out} exists already: name another file, or remove it.")
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


def _layouts(_: argparse.Namespace) -> int:
    for layout in feedback.LAYOUTS:
        columns = " or ".join(", ".join(sorted(names)) for names in layout.columns)
        print(f"{layout.name} ({layout.form}): {columns}\n    {layout.becomes}; as in {layout.found_in}")
    return 0


def _print_dropped(dropped: Sequence[feedback.Problem], console: Console) -> None:
    for problem in dropped[:20]:
        console.print(Text(f"dropped: {problem}"))
    if len(dropped) > 20:
        console.print(Text(f"... and {len(dropped) - 20} more"))


if __name__ == "__main__":
    sys.exit(main())
