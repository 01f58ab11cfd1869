"""What the subcommands of `trl-ext` do. `trl_ext.cli` names them and their options."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from trl_ext import demo, diagnostics, evaluation, feedback
from trl_ext.diagnostics.catalogue import all_clear
from trl_ext.diagnostics.pages import page
from trl_ext.feedback.reading import renaming
from trl_ext.launch import import_functions, load_prompts, load_texts, trained
from trl_ext.rating import Store


def doctor(chosen: Namespace) -> int:
    log = diagnostics.read_run(chosen.run_dir)
    findings = diagnostics.diagnose(log)
    if chosen.json:
        print(json.dumps([{**asdict(f), "page": f.page} for f in findings], indent=2))
    else:
        _print_findings(log, findings)
    problems = any(finding.severity == "problem" for finding in findings)
    return 2 if chosen.strict and problems else 0


def explain(chosen: Namespace) -> int:
    Console().print(Markdown(page(chosen.name)))
    return 0


def report(chosen: Namespace) -> int:
    names = ("evaluation.json", "*/evaluation.json")
    evaluations = [file for run in chosen.run_dirs for name in names for file in sorted(Path(run).glob(name))]
    sections = [evaluation.section(json.loads(file.read_text(encoding="utf-8"))) for file in evaluations]
    print(diagnostics.write_report(chosen.run_dirs, chosen.output, sections))
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


def merge(chosen: Namespace) -> int:
    difference = trained.merge(chosen.policy, chosen.out, chosen.base, chosen.dtype)
    print(f"{chosen.out} (at most {difference:.1g} from the adapter on its base)")
    return 0


def score(chosen: Namespace) -> int:
    _check_new(chosen.out)
    rows = load_texts(chosen.file).rename_columns(renaming(chosen.columns))
    scores = trained.score(chosen.adapter, rows, chosen.base, chosen.load_in_4bit)
    scored = ({**row, "score": score} for row, score in zip(rows, scores, strict=True))
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in scored)
    chosen.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(scores)} scores, mean {sum(scores) / len(scores):.3g}, in {chosen.out}")
    return 0


def chat(chosen: Namespace) -> int:
    def ask() -> str | None:
        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            return None

    print("Say something; /new begins anew, an empty line ends.")
    sampling = {"max_new_tokens": chosen.max_new_tokens, "temperature": chosen.temperature}
    trained.chat(chosen.adapter, ask, chosen.base, chosen.load_in_4bit, **sampling)
    return 0


def sample(chosen: Namespace) -> int:
    cast, functions = _cast(chosen)
    everything, of = chosen.out, chosen.of or "pairs"
    if chosen.pick:
        evaluation.check_pick(chosen.pick, of, len(chosen.reward), len(functions), chosen.items)
        everything = chosen.out.with_name(f"{chosen.out.stem}.all{chosen.out.suffix}")
        if not everything.exists():  # or what is there is an earlier choice of the same answers
            _check_new(chosen.out)
    elif chosen.items is not None or chosen.of is not None:
        raise ValueError("--items and --of say what is picked: give --pick WAY, or leave them out.")
    prompts = load_prompts(chosen.prompts, chosen.columns)
    how, loading = _sampling(chosen), trained.loading(chosen.load_in_4bit)
    rows = evaluation.sample(cast, prompts, everything, how, functions, loading)
    if chosen.pick:
        rows = evaluation.pick(rows, chosen.pick, chosen.items, of, chosen.seed)
        evaluation.write_rows(chosen.out, rows)
        if (found := rows[-1]["item"] + 1) < chosen.items:
            print(f"There are {found:,} {of} to pick, not {chosen.items:,}.")
    print(f"{len(rows):,} answers to {len(prompts):,} prompts in {chosen.out}")
    return 0


def evaluate(chosen: Namespace) -> int:
    cast, functions = _cast(chosen)
    judge = evaluation.Spec.of(chosen.judge) if chosen.judge else None
    if judge is not None and judge.kind == "reward":
        judge = replace(judge, value=_adapter(judge.value, chosen))
    if judge is not None and judge.kind == "function":
        judge = replace(judge, function=import_functions([judge.value])[0])
    if (judge is None or judge.kind != "url") and (idle := chosen.rubric or chosen.judge_key):
        raise ValueError(
            f"{str(idle)!r} is for a language model that judges: give --judge url:MODEL@URL, or leave it out."
        )
    if judge is None and chosen.store is not None:
        raise ValueError(
            f"{str(chosen.store)!r} is for a judge: give --judge people, or one to be compared with people."
        )
    if chosen.judge_key and chosen.judge_key not in os.environ:
        raise ValueError(f"The environment variable {chosen.judge_key!r} is not set: put the judge's key there.")
    result = evaluation.evaluate(
        cast,
        load_prompts(chosen.prompts, chosen.columns),
        chosen.out,
        judge,
        _sampling(chosen),
        functions,
        trained.loading(chosen.load_in_4bit),
        people=None if chosen.store is None else partial(_said_by_people, chosen.store),
        rubric=chosen.rubric.read_text(encoding="utf-8") if chosen.rubric else evaluation.RUBRIC,
        key=os.environ[chosen.judge_key] if chosen.judge_key else None,
    )
    evaluation.print_result(result)
    if chosen.store is not None and chosen.judge != "people" and result["agreement"] is None:
        print(f"Nobody has compared these answers in {chosen.store} yet: there is no agreement with people to give.")
    print(f"{chosen.out / 'evaluation.json'}, {chosen.out / 'evaluation.html'}")
    return 0


def _cast(chosen: Namespace) -> tuple[evaluation.Cast, list[Any]]:
    base = demo.model_path() if chosen.base == "demo" else chosen.base
    rewards = [_adapter(folder, chosen) for folder in chosen.reward]
    return evaluation.Cast.checked(base, chosen.policy, rewards), import_functions(chosen.function)


def _adapter(reward: str, chosen: Namespace) -> str:
    return str(demo.reward_adapter(load_in_4bit=chosen.load_in_4bit)) if reward == "demo" else reward


def _sampling(chosen: Namespace) -> evaluation.Sampling:
    return evaluation.Sampling(
        *(chosen.per_prompt, chosen.max_new_tokens, chosen.temperature, chosen.seed), batch_size=chosen.batch_size
    )


def _said_by_people(store: Path, rows: Sequence[evaluation.Row]) -> list[evaluation.Comparison]:
    """What people said about pairs of these answers on the rating page; none where its store is not there yet.

    Raises:
        ValueError: an answer in the store reads otherwise. Ids alone do not tell: those of other policies are the same.
    """
    if not store.exists():
        return []
    with Store.read(store) as judged:
        of_rows = {row["id"]: row["completion"] for row in rows}
        for answer in judged.answers():
            if answer.id in of_rows and not _reads_alike(answer.completion, of_rows[answer.id]):
                raise ValueError(
                    f"{store} holds judgements of other answers: {answer.id} reads otherwise there. Name the store of "
                    "these answers, or leave out --store."
                )
        return evaluation.by_people(((c.id_a, c.id_b, c.outcome, c.rater) for c in judged.comparisons()), rows)


def _reads_alike(stored: Any, sampled: Any) -> bool:
    """A store keeps an answer of spaces as an empty one."""
    return bool(stored == sampled) or (stored == "" and isinstance(sampled, str) and not sampled.strip())


def convert(chosen: Namespace) -> int:
    columns, on_error = renaming(chosen.columns), "drop" if chosen.drop else "raise"
    _check_new(chosen.out)
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


def _check_new(file: Path) -> None:
    """Say before any work that the file cannot be written."""
    if file.exists():
        raise FileExistsError(f"{file} exists already: name another file, or remove it.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(file.parent)!r} does not exist: make it, or name another file.")


def _print_dropped(dropped: Sequence[feedback.Problem], console: Console) -> None:
    for problem in dropped[:20]:
        console.print(Text(f"dropped: {problem}"))
    if len(dropped) > 20:
        console.print(Text(f"... and {len(dropped) - 20} more"))
