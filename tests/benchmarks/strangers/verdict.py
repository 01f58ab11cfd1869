"""What the doctor says of a log, whether that is the true cause, and the table of it all. Pure functions; no run."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from trl_ext.diagnostics import Explained, Finding, RunLog, diagnose, roots
from trl_ext.diagnostics.finding import CANNOT_TELL

Result = dict[str, Any]
Root = dict[str, Any]
Truth = dict[str, list[str]]

HARM = 0.10  # of the exam, below the healthy run of the same seed
LOOKS = 100  # at a log as it was on the way
# What is not known of a rollout before it is trained on, by the beginning of its names.
OF_TRAINING = (
    "policy/",
    "val/ratio",
    "val/clipfrac",
    "loss",
    "grad_norm",
    "learning_rate",
    "epoch",
    "eps",
    "time/",
    "memory/",
    "evidence/gradient/signal",
    "evidence/gradient/noise",
    "evidence/lost_to_rounding",
)
LORA_WORDS = {"r": ("rank", "lora_rank")}  # what a text calls a field whose name is too short to look for
HEALTHY_RUN = "healthy:ppo:the recipe"

# What the doctor says ------------------------------------------------------------------------------------------------


def judge(log: RunLog) -> Result:
    """The doctor's verdict on a log.

    Returns:
        "roots": at the end, in the doctor's order. "first_seen": of every topic that was told on the way the finding,
        as it was, with the steps and episodes that had been trained on. "rollouts": how many were logged.
    """
    seen: dict[str, dict[str, Any]] = {}
    points = sorted({row["step"] for row in [*log.rows, *log.evals]})
    every = max(math.ceil(len(points) / LOOKS), 1)
    looks = [(0, until(log, 0)), (0, before_training(log))]
    looks += [(step, until(log, step)) for step in sorted(points[::-every])]  # the last is among them
    for step, so_far in looks:
        episode = max((row.get("episode", 0.0) for row in so_far.rows), default=0.0) if step else 0.0
        told = {"step": step, "episode": episode}
        for finding in diagnose(so_far):
            seen.setdefault(finding.topic, {**told, **as_plain(Explained(finding, None, ()))})
    found = [as_plain(top) for top in roots(diagnose(log))]
    return {"roots": found, "first_seen": seen, "rollouts": len(log.rows)}


def before_training(log: RunLog) -> RunLog:
    """The log as the doctor at work sees the first rollout of our PPOTrainer before a step is taken on it; of another
    trainer, or of a log that does not begin there, nothing."""
    size = log.setting("rollout_batch_size")
    if log.kind != "ppo" or size is None or not log.rows or log.rows[0].get("episode") != size:
        return replace(log, rows=[], evals=[], samples=[])
    row = {name: value for name, value in log.rows[0].items() if not name.startswith(OF_TRAINING)}
    return replace(until(log, 0), rows=[row | {"step": 0}])


def until(log: RunLog, step: int) -> RunLog:
    """The log as it was at a step."""
    return replace(
        log,
        rows=[row for row in log.rows if row["step"] <= step],
        evals=[row for row in log.evals if row["step"] <= step],
        samples=[sample for sample in log.samples if sample.step <= step],
    )


def as_plain(top: Explained) -> Root:
    """A root and the names of what follows from it. "severity" is the worst of these, "own" that of the root itself."""
    finding: Finding = top.finding
    return {
        "name": finding.name,
        "severity": top.severity,
        "own": finding.severity,
        "title": finding.title,
        "evidence": finding.evidence,
        "cause": finding.cause,
        "changes": finding.remedy.changes,
        "suspects": [{"says": f"{s.cause}: {s.experiment}", "changes": s.changes} for s in finding.suspects],
        "follows": [one.finding.name for one in top][1:],
    }


# Whether that is true ------------------------------------------------------------------------------------------------


TRUTHS = (
    "truth.yaml",
    "truth_2.yaml",
    "truth_3.yaml",
    "truth_4.yaml",
    "truth_5.yaml",
    "truth_6.yaml",
)  # of mistakes.yaml and its followers


def read_truth() -> tuple[Truth, Truth]:
    """The findings that are true of each group, and the words by which a refusal names a group or a kind of group."""
    findings, refusals = Truth(), Truth()
    for name in TRUTHS:
        content = yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
        findings |= content["findings"]
        refusals |= content["refusals"]
    return findings, refusals


def is_true(root: Root, mistakes: Sequence[tuple[str, dict[str, Any]]], truth: Truth) -> bool:
    """Whether a root is the true cause: of several mistakes in a run, of one of them.

    Of a setting it is also true where what it would change, or what it says, names the setting. A change that goes
    further in the direction of the mistake is none.
    """
    return any(
        root["name"] in truth[group] or any(_names(root, name, value) for name, value in _mistaken(group, mistake))
        for group, mistake in mistakes
    )


def _mistaken(group: str, mistake: dict[str, Any]) -> list[tuple[str, tuple[str, Any]]]:
    """The fields that are mistaken: (name, (direction, value)). What only makes room for another one is none."""
    if not {"settings", "lora"} & set(mistake):
        return []
    setting, direction = group.split(":")
    fields = mistake.get("settings", {}) | mistake.get("lora", {})
    if setting != "objective":
        fields = {name: value for name, value in fields.items() if name != "objective"}
    return [(name, (direction, value)) for name, value in fields.items()]


def _names(root: Root, name: str, mistaken: tuple[str, Any]) -> bool:
    direction, value = mistaken
    for changes in (root["changes"], *(suspect["changes"] for suspect in root["suspects"])):
        if name in changes and not _further(direction, value, changes[name]):
            return True
    said = " ".join([root["title"], root["evidence"], *(suspect["says"] for suspect in root["suspects"])])
    return _in_words(LORA_WORDS.get(name, (name,)), said)


def _further(direction: str, mistaken: Any, proposed: Any) -> bool:
    """Whether a change makes the mistake larger."""
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (mistaken, proposed)):
        return False
    return (direction == "low" and proposed <= mistaken) or (direction == "high" and proposed >= mistaken)


def _in_words(words: Iterable[str], text: str) -> bool:
    return any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in words)


def is_named_in_refusal(result: Result, refusals: Truth) -> bool:
    """Whether a run never began, and the sentence says why: it names the setting, or what truth.yaml lists."""
    if not result["refused"]:
        return False
    for group, mistake in result["mistakes"]:
        fields = [name for name, _ in _mistaken(group, mistake)]
        inner = mistake.get("settings", {}).get("generation_kwargs", {})
        words = [*fields, *inner, *refusals.get(group, []), *refusals.get(group.split(":")[0], [])]
        if _in_words(words, result["died"]):
            return True
    return False


def is_named(result: Result, truth: Truth, refusals: Truth, among: int = 2) -> bool:
    """Whether the true cause is among the doctor's first roots, or the refusal says it."""
    first = result["roots"][:among]
    return any(is_true(root, result["mistakes"], truth) for root in first) or is_named_in_refusal(result, refusals)


def begins_otherwise(result: Result, truth: Truth) -> bool:
    """Whether the doctor's first root is a problem that is not the true cause."""
    first = result["roots"][:1]
    return any(root["severity"] == "problem" and not is_true(root, result["mistakes"], truth) for root in first)


def begins_falsely(result: Result, truth: Truth) -> bool:
    """Whether it is one of which the doctor says what makes it: who says that the cause cannot be told names none."""
    return begins_otherwise(result, truth) and not result["roots"][0]["cause"].startswith(CANNOT_TELL)


# When ----------------------------------------------------------------------------------------------------------------


def fall(curve: Sequence[Sequence[float]], healthy: Sequence[Sequence[float]]) -> float | None:
    """The episode from which on a run's exams, (episode, 0 to 1), stay `HARM` below those of a healthy run; None where
    they do not.

    Both are compared at the same episode, which for rollouts of one size is the same rollout.
    """
    since = None
    for at, value in curve:
        level = [exam for episode, exam in healthy if episode <= at]
        if not level or not is_harmed(value, level[-1]):
            since = None
        elif since is None:
            since = at
    return since


def lead(result: Result, healthy: Result, truth: Truth) -> float | None:
    """When a true finding was first made, over when the exam fell: below 1 the doctor was first. None where there was
    no fall to be seen, or no true finding."""
    fell = fall(result["exams"], healthy["exams"])
    seen = [told["episode"] for told in result["first_seen"].values() if is_true(told, result["mistakes"], truth)]
    return min(seen) / fell if fell and seen else None


# What a mistake costs ------------------------------------------------------------------------------------------------


def recipes(results: Sequence[Result], healthy: Sequence[Result]) -> dict[int, Result]:
    """The healthy recipe's run at each seed.

    Raises:
        ValueError: it has not been run at a seed of `results`.
    """
    recipe = {run["seed"]: run for run in healthy if run["id"] == HEALTHY_RUN}
    missing = sorted({run["seed"] for run in results} - set(recipe))
    if missing:
        raise ValueError(
            f"The healthy recipe has not been run at seed {missing[0]}: what a mistake costs is not known."
        )
    return recipe


def is_harmed(exam: float, healthy: float) -> bool:
    """Whether an exam is so far below that of the healthy run of the same seed that something is wrong."""
    return healthy - exam >= HARM - 1e-9


# The table -----------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result], healthy: Sequence[Result], truth: Truth, refusals: Truth) -> str:
    """What was measured, as Markdown.

    Args:
        results: runs with mistakes.
        healthy: runs without, among them the recipe at each seed of `results`.

    Raises:
        ValueError: the recipe has not been run at a seed.
    """
    recipe = recipes(results, healthy)
    harmful = [run for run in results if is_harmed(run["exam"], recipe[run["seed"]]["exam"])]
    harmless = [run for run in results if run not in harmful]
    named = [run for run in harmful if is_named(run, truth, refusals)]
    false = [run for run in harmful if begins_falsely(run, truth)]
    open_ = [run for run in harmful if begins_otherwise(run, truth) and run not in false]
    leads = [ratio for run in harmful if (ratio := lead(run, recipe[run["seed"]], truth)) is not None]
    sections = [
        _by_kind(results, harmful, named, false, open_),
        f"Of {len(harmful)} harmful runs (of {len(results)}) the true cause is among the first two roots in "
        f"{len(named)} ({_share(named, harmful)}); the first root is a false cause in {len(false)} "
        f"({_share(false, harmful)}), and in {len(open_)} a problem whose cause the doctor says it cannot tell "
        f"({_share(open_, harmful)}).",
        _lead_in_words(leads, harmful),
        _listed("Misses", [run for run in harmful if run not in named], recipe),
        _listed("False first roots in harmful runs", false, recipe),
        _listed("First roots without a cause in harmful runs", open_, recipe),
        _listed("False problems in harmless runs", [run for run in harmless if begins_otherwise(run, truth)], recipe),
        _confusion(harmful),
        _of_healthy(healthy),
    ]
    return "\n\n".join(sections)


def _by_kind(results: Sequence[Result], *parts: Sequence[Result]) -> str:
    heads = ("kind of mistake", "runs", "harmful", "true cause among the first two", "false first root")
    lines = [f"| {' | '.join([*heads, 'first root without a cause'])} |", "|---" * 6 + "|"]
    for kind in dict.fromkeys(run["kind"] for run in results):
        counts = [sum(run["kind"] == kind for run in part) for part in (results, *parts)]
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


def _share(part: Sequence[Any], whole: Sequence[Any]) -> str:
    return f"{len(part) / len(whole):.0%}" if whole else "none"


def _lead_in_words(leads: Sequence[float], harmful: Sequence[Result]) -> str:
    if not leads:
        return "Lead: no harmful run has both a true finding and a fall of the exam."
    ahead = sum(ratio < 1 for ratio in leads)
    return (
        f"Lead: in {len(leads)} of {len(harmful)} harmful runs a true finding and the exam's fall were both seen; "
        f"the finding came first in {ahead}. Median of its rollout over the fall's: {median(leads):.2f}."
    )


def _listed(title: str, runs: Sequence[Result], recipe: dict[int, Result]) -> str:
    """A line a mistake: its exams, those of the healthy runs, and what was said of it at which seeds."""
    lines = [f"### {title}: {len(runs)}", ""] if runs else [f"### {title}: none"]
    by_mistake: defaultdict[str, list[Result]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run["id"], run["seed"])):
        by_mistake[run["id"]].append(run)
    for name, of_one in by_mistake.items():
        said: defaultdict[str, list[int]] = defaultdict(list)
        for run in of_one:
            names = [f"{root['name']} ({root['severity']})" for root in run["roots"]] or ["nothing"]
            said[", ".join(names) + (f"; died: {run['died']}" if run["died"] else "")].append(run["seed"])
        exams = ", ".join(f"{run['exam']:.0%}" for run in of_one)
        healthy = ", ".join(f"{recipe[run['seed']]['exam']:.0%}" for run in of_one)
        told = "; ".join(f"{words} at {_seeds(seeds)}" for words, seeds in said.items())
        lines.append(f"- {name}: exam {exams}, healthy {healthy}; {told}")
    return "\n".join(lines)


def _seeds(numbers: Sequence[int]) -> str:
    return f"seed{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _confusion(harmful: Sequence[Result]) -> str:
    first: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for run in harmful:
        said = run["roots"][0]["name"] if run["roots"] else "refused" if run["refused"] else "nothing"
        first[" + ".join(group for group, _ in run["mistakes"])][said] += 1
    lines = ["### First root by mistake, harmful runs", "", "| mistake | first root |", "|---|---|"]
    for group in sorted(first):
        lines.append(f"| {group} | {', '.join(f'{name} {n}' for name, n in first[group].most_common())} |")
    return "\n".join(lines)


def _of_healthy(healthy: Sequence[Result]) -> str:
    problems = [
        f"- {run['id']}, seed {run['seed']}: exam {run['exam']:.0%}; {root['name']}: {root['evidence']}"
        for run in healthy
        for root in run["roots"]
        if root["severity"] == "problem"
    ]
    died = [f"- {run['id']}, seed {run['seed']}: {run['died']}" for run in healthy if run["died"]]
    runs = len({line.split(": exam")[0] for line in problems})
    passed = [
        f"- {run['id']}, seed {run['seed']}: {', '.join(names)}"
        for run in healthy
        if (names := [told["name"] for told in run["first_seen"].values() if told["severity"] == "problem"])
    ]
    sections = [f"### {len(healthy)} healthy runs: {runs} with a problem", "", *problems, *died]
    return "\n".join([*sections, f"Told on the way, at any time: {len(passed)} runs.", "", *passed]).rstrip()
