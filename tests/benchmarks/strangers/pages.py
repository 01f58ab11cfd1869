"""What `--try` made of each problem, from the kept trials of cure.py, into the problem's page. The pages of problems
that no trial met stay as they are.

python tests/benchmarks/strangers/pages.py --out runs/doctor:catalogue runs/strangers:measure_3
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import cure
import run

from trl_ext.diagnostics.remedies import MOVES, STAND_INS

PAGES = Path(__file__).parents[3] / "docs" / "diagnostics"
START, END = "<!-- tried: begin -->", "<!-- tried: end -->"
VERDICTS = ("cured", "in part", "not cured", "worse")
NOTHING = "Nothing has been tried yet in a run that had it."


def remedy_of(changes: Mapping[str, Any]) -> str:
    """What was changed, without the values."""
    parts = [f"{STAND_INS[name]} in the place of `{name}`" for name in changes if name in STAND_INS]
    settings = [f"`{name}`" for name in changes if name not in STAND_INS]
    return ", ".join([*(settings if len(settings) < 5 else [f"{len(settings)} settings"]), *parts])


Tried = tuple[cure.Result, cure.Result]  # a case, and one of its trials


def table(tried: Iterable[tuple[str, Tried]]) -> str:
    """A line for each remedy, by what it is called."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for remedy, (case, trial) in tried:
        counts[remedy].update([trial["verdict"], *(["truly"] if cure.is_truly_cured(case, trial) else [])])
    lines = ["| remedy | trials | cured | in part | not cured | worse | cured at the end of a whole run |"]
    lines.append("|---|---|---|---|---|---|---|")
    for remedy, count in sorted(counts.items(), key=lambda one: -one[1].total()):
        of_verdicts = [count[verdict] for verdict in VERDICTS]
        cells = [sum(of_verdicts), *of_verdicts, f"{count['truly']} of {count['cured']}" if count["cured"] else ""]
        lines.append(f"| {remedy} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def text(own: Sequence[Tried], followed: Sequence[Tried] = (), untried: int = 0) -> str:
    """What was tried against one problem.

    Args:
        own: trials of its remedies.
        followed: trials of the remedies of what it followed from.
        untried: runs in which it had no remedy that can be tried, see `without_trial`.
    """
    seen, roots = ([one for one in tried if one[1]["verdict"] != "not seen"] for tried in (own, followed))
    parts = [table((remedy_of(one[1]["changes"]), one) for one in seen)] if seen else []
    if unseen := len(own) - len(seen):
        trials = f"{unseen} {'more ' if parts else ''}trial{'s' if unseen > 1 else ''}"
        parts += [f"In {trials} the problem did not come back without a remedy."]
    if roots:
        named = ((f"one of `{one[1]['finding']}`", one) for one in roots)
        parts += [f"Where it followed from another problem, the remedies of that were tried:\n\n{table(named)}"]
    if untried:
        runs = f"{untried} {'more run' if parts else 'run'}{'s' if untried > 1 else ''}"
        parts += [f"In {runs} the remedy was no setting that a fork can change, and nothing was tried."]
    return "\n\n".join(parts) or NOTHING


def without_trial(case: cure.Result) -> list[str]:
    """Of the first two roots those before any that was tried: of them no remedy can be tried."""
    names, tried = [root for root, *_ in case["roots"][:2]], {trial["finding"] for trial in case["trials"]}
    return [] if case["failed"] else list(takewhile(lambda name: name not in tried, names))


def write(page: Path, made: str) -> None:
    """Between the marks, or in a section at the end of the page."""
    before = page.read_text(encoding="utf-8")
    if START not in before:
        before = f"{before.rstrip()}\n\n## What `--try` made of it\n\n{START}\n{END}\n"
    head, rest = before.split(START)
    page.write_text(f"{head}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", nargs="+", required=True, help="FOLDER:HALF of cure.py, several")
    folders = [one.rsplit(":", 1) for one in parser.parse_args().out]
    cases = [case for folder, half in folders for case in run.kept(Path(folder) / "cures", half)]
    own: defaultdict[str, list[Tried]] = defaultdict(list)
    followed: defaultdict[str, list[Tried]] = defaultdict(list)
    untried: Counter[str] = Counter()
    for case in cases:
        follows = {root: names for root, *names in case["roots"]}
        untried.update(without_trial(case))
        for trial in case["trials"]:
            own[trial["finding"]].append((case, trial))
            for name in follows.get(trial["finding"], []):
                followed[name].append((case, trial))
    for name in MOVES:
        page, tried = PAGES / f"{name}.md", (own[name], followed[name], untried[name])
        if any(tried) or START not in page.read_text(encoding="utf-8"):
            write(page, text(*tried))
    print(f"{sum(map(len, own.values()))} trials of {sum(map(bool, own.values()))} problems, in {len(cases)} runs")


if __name__ == "__main__":
    main()
