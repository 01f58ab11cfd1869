"""Whether what `trl-ext doctor --try` calls cured is cured when it is run to the end.

python tests/benchmarks/strangers/cure.py --half work           # on the runs that run.py made; minutes a run
python tests/benchmarks/strangers/cure.py --catalogue           # on the doctor's own cases, those of doctor.py
python tests/benchmarks/strangers/cure.py --half work --table   # what has been tried, as Markdown

Of a half, every kept run is tried that its mistake harmed and whose true cause the doctor names among its first two
roots; of the catalogue, every mistaken run (made first, where it is not there) in which the case's finding, or one that
changes the mistaken setting, is among them. `try_remedies` forks the run from its start; each remedy that it calls
cured is then run to the end. That is truly cured where the exam is within 10 points of the healthy run's at the same
seed; in the catalogue, where neither that finding nor the case's is there at the end.

A result is one JSON file in the folder `cures`. What is there is not tried again - after the rules changed, rejudge the
runs and remove the folder - and processes that are started side by side share the work. Of a half that only measures
nothing is printed but its table.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import run
import torch
import verdict
from run import Job, doctor  # which finds doctor.py, a folder above
from transformers.utils.logging import disable_progress_bar

from trl_ext.diagnostics import Explained, RunLog, Trial, diagnose, read_run, roots, try_remedies
from trl_ext.diagnostics.forks import FRESH
from trl_ext.diagnostics.trial import candidates

Result = dict[str, Any]

CALLED, TRULY = 0.90, 0.80  # goals: truly cured, of those called cured; cured, of those named
# Why nothing was tried.
REFUSED, LORA, CODE = "refused before it began", "a setting of LoRA", "code or data"

# Which runs ----------------------------------------------------------------------------------------------------------


def named(results: Sequence[Result], healthy: Sequence[Result]) -> list[Result]:
    """Runs that their mistake harmed and whose true cause the doctor names.

    Args:
        results: of a half.
        healthy: among them the recipe at each of their seeds.
    """
    recipe, truth = verdict.recipes(results, healthy), verdict.read_truth()
    harmful = [one for one in results if verdict.is_harmed(one["exam"], recipe[one["seed"]]["exam"])]
    return [one for one in harmful if verdict.is_named(one, *truth)]


def catalogue_jobs(seeds: list[int], episodes: int | None) -> list[Job]:
    """The doctor's own cases at every seed; those of PPO with so many `episodes`."""
    short = {} if episodes is None else {"total_episodes": episodes}
    cases = [
        replace(case, settings=case.settings | short) if case.kind == "ppo" else case
        for case in doctor.CASES
        if case.kind in ("ppo", "reward", "dpo")
    ]
    return [
        Job(f"{case.kind}:{case.finds}:{case.note}", "catalogue", case.kind, seed, case=case)
        for seed in seeds
        for case in cases
    ]


# One run's remedies --------------------------------------------------------------------------------------------------


def of_half(job: Job, out: Path, episodes: int | None) -> Result:
    """The remedies of a kept run of run.py."""
    kept = json.loads((out / job.half / f"{job.name}.json").read_text(encoding="utf-8"))
    healthy = verdict.recipes([kept], run.kept(out, "healthy"))[job.seed]["exam"]
    own = {"exam": kept["exam"], "healthy": healthy, "named": True, "finds": ""}
    if kept["refused"]:
        return nothing(job, REFUSED) | own
    return of_log(job, read_run(out / job.half / job.name), out, episodes) | own


def of_catalogue(job: Job, out: Path, episodes: int | None) -> Result:
    """The remedies of a case of doctor.py, whose mistaken run is made and kept as it makes and keeps it."""
    case = job.case
    out.mkdir(parents=True, exist_ok=True)
    doctor.do(case, "mistaken", job.seed, out)
    path = doctor.file_of(out, case, "mistaken", job.seed)
    log = read_run(path.with_suffix(""))
    first = [top.finding for top in roots(diagnose(log))[:2]]
    named = any(one.name == case.finds or set(one.remedy.changes) & set(case.settings) for one in first)
    exam = json.loads(path.read_text(encoding="utf-8"))["well"]
    own = {"exam": exam, "healthy": None, "named": named, "finds": case.finds}
    return (of_log(job, log, out, episodes) if own["named"] else nothing(job, "not named")) | own


def nothing(job: Job, why: str) -> Result:
    """What is kept of a run of which nothing was tried; see `of_log`."""
    own = {"id": job.id, "half": job.half, "kind": job.kind, "seed": job.seed}
    return own | {"untried": why, "roots": [], "failed": "", "trials": [], "seconds": 0.0}


def of_log(job: Job, log: RunLog, out: Path, episodes: int | None) -> Result:
    """Try the remedies of a run, and run to the end what is called cured.

    Returns:
        "untried": why nothing was tried, else empty; "roots": each with what follows from it; "trials": each with
        "whole", what became of the remedy at the end of a run, None where it was not called cured; "failed": what ended
        the trial, as where the remedy is refused.
    """
    findings = diagnose(log)
    tops = roots(findings)
    shown = {"roots": [[one.finding.name for one in top] for top in tops]}
    if why := why_untried(tops, log):
        return nothing(job, why) | shown
    folder, started = out / "cures" / job.half / job.name, time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was ended
    trials, failed = list[Trial](), ""
    try:
        trials = try_remedies(lambda changes: _fork(job, out, episodes, changes), findings, folder, run=log)
    except (ValueError, RuntimeError) as error:  # which who types --try would see
        failed = f"{type(error).__name__}: {error}"
    for fork in [*folder.glob("*-with"), *folder.glob("*-without")]:
        shutil.rmtree(fork)
    wholes: dict[str, Result] = {}
    for trial in trials:
        if trial.verdict == "cured" and repr(trial.changes) not in wholes:  # two roots may have one remedy
            whole = _whole(job, out, episodes, trial, folder / f"whole-{len(wholes) + 1}")
            wholes[repr(trial.changes)] = whole
    plain = [_as_plain(one, wholes[repr(one.changes)] if one.verdict == "cured" else None) for one in trials]
    seconds = time.perf_counter() - started
    return nothing(job, "") | shown | {"failed": failed, "trials": plain, "seconds": seconds}


def why_untried(tops: Sequence[Explained], log: RunLog) -> str:
    """What the remedies of the first two roots are, where no root has one that can be tried; else empty."""
    if any(candidates(top, log) for top in tops):
        return ""
    said = [f"{top.finding.remedy.text} {top.finding.remedy.code}" for top in tops[:2]]
    return LORA if any(re.search("lora", text, re.IGNORECASE) for text in said) else CODE


def _fork(job: Job, out: Path, episodes: int | None, changes: dict[str, Any]) -> Any:
    """The same mistaken trainer with some settings changed. It keeps its yardstick: rules read it."""
    settings = dict(changes)
    return run.build(job, out, Path(settings.pop("output_dir")), episodes, settings)[0]


def _as_plain(trial: Trial, whole: Result | None) -> Result:
    kept = ("finding", "changes", "verdict", "metric", "logs", "new", "died")
    return {name: getattr(trial, name) for name in kept} | {"said": str(trial), "whole": whole}


def _whole(job: Job, out: Path, episodes: int | None, trial: Trial, folder: Path) -> Result:
    """A whole run with a remedy, from where a new process would begin."""
    torch.manual_seed(FRESH)
    ended = run.run(job, out, episodes, trial.changes, folder)
    found = [name for top in ended["roots"] for name in (top["name"], *top["follows"])]
    return {"exam": ended["exam"], "died": ended["died"], "found": found}


@contextmanager
def in_silence(half: str) -> Iterator[None]:
    """Inside, what is said about a run that only measures is lost."""
    if not run.only_measures(half):
        yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        except Exception:
            raise RuntimeError("An error of the benchmark, in a run of which nothing is told.") from None


# The table -----------------------------------------------------------------------------------------------------------


def is_truly_cured(case: Result, trial: Result) -> bool:
    """Whether what was called cured was cured at the end."""
    whole = trial["whole"]
    if whole is None or whole["died"]:
        return False
    if case["healthy"] is None:
        return not {trial["finding"], case["finds"]} & set(whole["found"])
    return not verdict.is_harmed(whole["exam"], case["healthy"])


def table(cases: Sequence[Result], waiting: int) -> str:
    """What was tried, as Markdown.

    Args:
        cases: one a run.
        waiting: how many runs have not been tried.
    """
    mine = [case for case in cases if case["named"]]
    settings = [case for case in mine if not case["untried"]]
    called = [(case, trial) for case in mine for trial in case["trials"] if trial["verdict"] == "cured"]
    true = [(case, trial) for case, trial in called if is_truly_cured(case, trial)]
    cured = [case for case in mine if any(is_truly_cured(case, trial) for trial in case["trials"])]
    verdicts = Counter(trial["verdict"] for case in mine for trial in case["trials"])
    verdicts["failed"] += sum(bool(case["failed"]) for case in mine)
    began = [case for case in mine if case["untried"] != REFUSED]
    untried = Counter(case["untried"] for case in mine if case["untried"])
    sections = [
        _by_kind(cases, mine, settings, [case for case in mine if any(case is one for one, _ in called)], cured),
        f"Of {len(cases)} runs the true cause is named in {len(mine)}; {waiting} more wait. In {len(settings)} the "
        f"remedy can be tried. In the others nothing was: {_counted(untried)}.",
        f"Verdicts of {verdicts.total()} trials: {_counted(verdicts)}.",
        f"Of {len(called)} remedies called cured {len(true)} are truly cured ({_share(true, called)}; the goal is "
        f"{CALLED:.0%}).",
        f"Of {len(mine)} runs with a named cause {len(cured)} are truly cured ({_share(cured, mine)}; the goal is "
        f"{TRULY:.0%}); of the {len(began)} that were not refused before they began {_share(cured, began)}, of those "
        f"whose remedy can be tried {_share(cured, settings)}.",
        _listed("Called cured, and not", [_of_trial(*one) for one in called if one not in true]),
        _listed("Named, and not truly cured", [_of_case(case) for case in mine if case not in cured]),
    ]
    return "\n\n".join(sections)


_share = verdict._share


def _by_kind(cases: Sequence[Result], *parts: Sequence[Result]) -> str:
    lines = ["| kind | runs | true cause named | remedy can be tried | runs with a remedy called cured | truly cured |"]
    lines.append("|---|---|---|---|---|---|")
    for kind in dict.fromkeys(case["kind"] for case in cases):
        counts = [sum(case["kind"] == kind for case in part) for part in (cases, *parts)]
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common() if count) or "none"


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"### {title}: {len(lines)}", "", *sorted(lines)]) if lines else f"### {title}: none"


def _of_trial(case: Result, trial: Result) -> str:
    whole = trial["whole"]
    healthy = "" if case["healthy"] is None else f", healthy {case['healthy']:.0%}"
    end = f"died: {whole['died']}" if whole["died"] else f"at the end: {', '.join(whole['found']) or 'nothing'}"
    return (
        f"- {case['id']}, seed {case['seed']}: {trial['finding']} by {_settings(trial)}: exam {whole['exam']:.0%}"
        f"{healthy}; {end}"
    )


def _of_case(case: Result) -> str:
    tried = [f"{one['finding']} by {_settings(one)}: {one['verdict']}" for one in case["trials"]]
    failed = [f"failed: {case['failed']}"] if case["failed"] else []
    return f"- {case['id']}, seed {case['seed']}: {'; '.join([case['untried'] or '', *tried, *failed]).strip('; ')}"


def _settings(trial: Result) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in trial["changes"].items()) or "no remedy"


# The work ------------------------------------------------------------------------------------------------------------


def said(job: Job, case: Result) -> str:
    """What is printed of a case once it is made."""
    if run.only_measures(job.half):
        return ""
    tried = [
        f"{trial['said']} To the end: {'truly cured' if is_truly_cured(case, trial) else 'NOT CURED'}, exam "
        f"{trial['whole']['exam']:.2f}."
        if trial["whole"]
        else trial["said"]
        for trial in case["trials"]
    ]
    more = [one for one in (case["untried"], case["failed"]) if one]
    return f"{job.name}: {' '.join([*tried, *more])} {case['seconds']:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--half", choices=run.HALVES)
    which.add_argument("--catalogue", action="store_true", help="the doctor's own cases, of PPO, rewards and DPO")
    parser.add_argument("--out", type=Path, help="of run.py, runs/strangers; of doctor.py, runs/doctor")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="a pattern that is found in the id")
    parser.add_argument("--episodes", type=int, help="of PPO, to try something out: as in run.py, into another --out")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--table", action="store_true", help="print what has been tried, and try nothing")
    args = parser.parse_args()
    half, out = args.half or "catalogue", args.out or Path("runs/doctor" if args.catalogue else "runs/strangers")
    make: Callable[[Job, Path, int | None], Result]
    if args.catalogue:
        jobs, make = catalogue_jobs(args.seeds, args.episodes), of_catalogue
    else:
        eligible = {(one["id"], one["seed"]) for one in named(run.kept(out, half), run.kept(out, "healthy"))}
        jobs, make = [job for job in run.jobs_of(half, args.seeds) if (job.id, job.seed) in eligible], of_half
    chosen = [job for job in jobs if re.search(args.only, job.id)]
    if args.table:
        ids = {(job.id, job.seed) for job in chosen}
        cases = [case for case in run.kept(out / "cures", half) if (case["id"], case["seed"]) in ids]
        print(table(cases, len(ids) - len(cases)))
        return
    logging.getLogger("trl_ext").setLevel(logging.ERROR)
    disable_progress_bar()
    (out / "cures" / half).mkdir(parents=True, exist_ok=True)

    def made(job: Job) -> Result:
        with in_silence(job.half):
            return make(job, out, args.episodes)

    count, failed = run.work_through(chosen, out / "cures", args.limit_seconds, made, said)
    print(f"{failed} failed" if run.only_measures(half) else f"{count} runs tried, {failed} failed", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
