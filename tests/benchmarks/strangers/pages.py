"""What `--try` made of each problem, from the kept trials of cure.py, into the problem's page. The pages of problems
that no trial met stay as they are.

python tests/benchmarks/strangers/pages.py --out runs/doctor:catalogue runs/strangers:measure_3
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
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


def text(trials: Iterable[tuple[cure.Result, cure.Result]]) -> str:
    """A table of (case, trial), a line for each remedy."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    unseen = 0
    for case, trial in trials:
        if trial["verdict"] == "not seen":
            unseen += 1
            continue
        counts[remedy_of(trial["changes"])].update(
            [trial["verdict"], *(["truly"] if cure.is_truly_cured(case, trial) else [])]
        )
    lines = ["| remedy | runs | cured | in part | not cured | worse | cured at the end of a whole run |"]
    lines.append("|---|---|---|---|---|---|---|")
    for remedy, count in sorted(counts.items(), key=lambda one: -one[1].total()):
        of_verdicts = [count[verdict] for verdict in VERDICTS]
        cells = [sum(of_verdicts), *of_verdicts, f"{count['truly']} of {count['cured']}" if count["cured"] else ""]
        lines.append(f"| {remedy} | {' | '.join(map(str, cells))} |")
    again = f"In {unseen} more the problem did not come back without a remedy." if unseen else ""
    return "\n\n".join(part for part in ("\n".join(lines) if counts else "", again) if part) or NOTHING


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
    found: defaultdict[str, list[tuple[cure.Result, cure.Result]]] = defaultdict(list)
    for case in cases:
        for trial in case["trials"]:
            found[trial["finding"]].append((case, trial))
    for name in MOVES:
        page = PAGES / f"{name}.md"
        if found[name] or START not in page.read_text(encoding="utf-8"):
            write(page, text(found[name]))
    print(f"{sum(map(len, found.values()))} trials of {len(found)} problems, in {len(cases)} runs")


if __name__ == "__main__":
    main()
