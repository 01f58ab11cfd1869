"""One self-contained HTML file about a run, or about two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from trl_ext.diagnostics.catalogue import all_clear, diagnose
from trl_ext.diagnostics.charts import Line, line_chart, number, scatter
from trl_ext.diagnostics.graph import roots
from trl_ext.diagnostics.log import RunLog, Sample
from trl_ext.diagnostics.reading import read_run, read_versions

# Title, what it shows, and the metrics in it: (label, name, from evaluations).
Chart = tuple[str, str, tuple[tuple[str, str, bool], ...]]
PPO_CHARTS: tuple[Chart, ...] = (
    ("Score", "mean over completions", (("training", "score", False), ("evaluation", "objective/scores", True))),
    (
        "KL to the reference",
        "nats per completion",
        (("KL", "kl", False), ("target", "objective/kl_target", False), ("evaluation", "objective/kl", True)),
    ),
    ("KL coefficient", "weight of the penalty", (("kl_coef", "kl_coef", False),)),
    ("Entropy", "nats per token", (("entropy", "entropy", False),)),
    ("Clip fraction", "share of tokens", (("policy", "clipfrac", False), ("value", "val/clipfrac_avg", False))),
    ("Step size", "approximate KL of an update, nats per token", (("approxkl", "approxkl", False),)),
    ("Probability ratio", "mean over tokens", (("ratio", "val/ratio", False),)),
    ("Explained variance", "share of the returns' variance", (("value role", "val/explained_variance", False),)),
    ("Losses", "policy and value", (("policy", "loss/policy_avg", False), ("value", "value_loss", False))),
    ("Length", "tokens a completion", (("mean", "length", False), ("longest", "completions/max_length", False))),
    ("Cut off", "share of completions without EOS", (("cut off", "truncated", False),)),
    ("Variety", "shares", (("distinct", "completions/distinct", False), ("repeated", "completions/repetition", False))),
)
PREFERENCE_CHARTS: tuple[Chart, ...] = (
    ("Loss", "", (("training", "loss", False), ("evaluation", "loss", True))),
    ("Accuracy", "share of pairs in order", (("training", "accuracy", False), ("evaluation", "accuracy", True))),
    ("Margin", "chosen less rejected", (("training", "margin", False), ("evaluation", "margin", True))),
    (
        "Scores",
        "of a reward model",
        (("lowest", "min_reward", False), ("mean", "mean_reward", False), ("highest", "max_reward", False)),
    ),
    (
        "DPO's rewards",
        "beta times nats",
        (("chosen", "rewards/chosen", False), ("rejected", "rewards/rejected", False)),
    ),
    (
        "Log-probabilities",
        "nats per completion",
        (("chosen", "logps/chosen", False), ("rejected", "logps/rejected", False)),
    ),
)
COMMON_CHARTS: tuple[Chart, ...] = (
    (
        "Gradient norms",
        "before clipping",
        (("all", "grad_norm", False), ("policy", "grad_norm/policy", False), ("value", "grad_norm/value", False)),
    ),
    ("Learning rate", "", (("rate", "learning_rate", False),)),
    ("Memory", "peak, GiB", (("peak", "memory/peak_gib", False),)),
)
CHARTS = {"ppo": PPO_CHARTS + COMMON_CHARTS, "online": PPO_CHARTS + COMMON_CHARTS}
OTHER = PREFERENCE_CHARTS + COMMON_CHARTS


@dataclass(frozen=True)
class Run:
    """A run to report on: its name, log and packages."""

    name: str
    log: RunLog
    versions: dict[str, str]


def write_report(
    folders: Sequence[str | Path], output: str | Path | None = None, sections: Sequence[Markup] = ()
) -> Path:
    """Write the report of one or two runs.

    Args:
        folders: output folders of one run or two.
        output: the file; None: report.html in the first folder.
        sections: HTML to stand after the curves, such as that of an evaluation.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError, ValueError: what `read_run` raises; or not one or two folders.
    """
    html = Report(*folders, sections=sections).html
    path = Path(output) if output is not None else Path(folders[0]) / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


class Report:
    """The report of one run or two, which a notebook shows where this is a cell's last line.

    Args:
        *folders: output folders of one run or two.
        sections: as `write_report`.

    Raises:
        FileNotFoundError, ValueError: as `write_report`.
    """

    def __init__(self, *folders: str | Path, sections: Sequence[Markup] = ()) -> None:
        if not 1 <= len(folders) <= 2:
            raise ValueError(f"A report is about one run or two, not {len(folders)}.")
        runs = [Run(Path(f).resolve().name, read_run(f), read_versions(f)) for f in folders]
        self.html = render(runs, sections)

    def _repr_html_(self) -> str:
        # A page of its own: neither its styles nor what a model said reach the notebook.
        style = "width: 100%; height: 50rem; border: 1px solid #8884"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(self.html)}"></iframe>'


def render(runs: Sequence[Run], sections: Sequence[Markup] = ()) -> str:
    """The report as HTML. Everything that a model or a user wrote is escaped; `sections` are taken as they are."""
    environment = Environment(loader=PackageLoader("trl_ext.diagnostics"), autoescape=True)
    environment.filters["number"] = number
    return environment.get_template("report.html").render(
        runs=runs,
        roots_by_run=[(run, roots(diagnose(run.log))) for run in runs],
        all_clear=all_clear,
        charts=[chart for chart in _charts(runs) if chart["svg"]],
        samples_by_run=[(run, _shown(run.log.samples)) for run in runs],
        settings=_settings(runs),
        sections=sections,
    )


def _charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    log = runs[0].log
    specified = list(CHARTS.get(log.kind, OTHER))
    functions = [name for run in runs for name in run.log.names("rewards/", "/mean")]
    specified += _evidence_charts(runs)
    if functions:
        metrics = tuple((name, f"rewards/{name}/mean", False) for name in dict.fromkeys(functions))
        specified.insert(1, ("Reward functions", "means", metrics))
    yardsticks = dict.fromkeys(name for run in runs for name in run.log.names("yardstick/"))
    if yardsticks:
        metrics = tuple((name, f"yardstick/{name}", False) for name in yardsticks)
        specified.insert(1, ("Yardstick", "not trained on", metrics))
    phases = dict.fromkeys(name for run in runs for name in run.log.names("time/"))
    if phases:
        specified.append(("Time", "seconds between logs", tuple((name, f"time/{name}", False) for name in phases)))
    charts = [_metric_chart(runs, *chart) for chart in specified]
    frontier = [
        Line(run.name, [kl for kl, _ in points], [score for _, score in points], i)
        for i, run in enumerate(runs)
        if (points := _kl_and_score(run.log))
    ]
    caption = "score against KL, later points stronger"
    charts.insert(1, _entry("Frontier", caption, frontier, scatter(frontier, caption)))
    return charts


def _kl_and_score(log: RunLog) -> list[tuple[float, float]]:
    """Both of each log that has them."""
    kl, score = (log.series(name) for name in ("kl", "score"))
    scores = dict(zip(score.steps, score.values, strict=True))
    return [(nats, scores[step]) for step, nats in zip(kl.steps, kl.values, strict=True) if step in scores]


def _evidence_charts(runs: Sequence[Run]) -> list[Chart]:
    """What was measured beside training, where it was."""
    groups = (
        ("Who makes the reward", "share of the reward's variance", ("evidence/share_of/", "evidence/share/")),
        ("Gradient by term", "norm of the policy's gradient", ("evidence/gradient/",)),
        ("Within prompts", "share of the score's variance", ("evidence/score/within_",)),
        ("Noise", "share of a score that does not repeat", ("evidence/noise/",)),
    )
    hidden = {"evidence/gradient/signal", "evidence/gradient/noise"}
    charts: list[Chart] = []
    for title, unit, prefixes in groups:
        found = dict.fromkeys((p, name) for run in runs for p in prefixes for name in run.log.names(p))
        metrics = tuple((name.replace("_", " "), p + name, False) for p, name in found if p + name not in hidden)
        if metrics:
            charts.append((title, unit, metrics))
    return charts


def _metric_chart(
    runs: Sequence[Run], title: str, unit: str, metrics: tuple[tuple[str, str, bool], ...]
) -> dict[str, Any]:
    lines: list[Line] = []
    for i, run in enumerate(runs):
        for place, (label, name, evals) in enumerate(metrics):
            series = run.log.series(name, evals=evals)
            if series:
                named = f"{run.name}: {label}" if len(runs) > 1 else label
                colour = len(lines) % 6 if len(runs) == 1 else i
                dashed = evals or (len(runs) > 1 and place > 0)
                lines.append(Line(named, series.steps, series.values, colour, dashed))
    return _entry(title, unit, lines, line_chart(lines, f"{title}, {unit}"))


def _entry(title: str, unit: str, lines: list[Line], svg: str) -> dict[str, Any]:
    # The SVG is numbers and escaped captions: markup by construction.
    return {"title": title, "unit": unit, "lines": lines, "svg": Markup(svg)}


def _shown(samples: Sequence[Sample], prompts: int = 8) -> list[Sample]:
    """Completions of the same prompts at the start, in the middle and at the end. The prompts are those of evaluations;
    without evaluations, those that came up again."""
    by_prompt: dict[str, list[Sample]] = {}
    watched = [sample for sample in samples if sample.watched]
    for sample in watched or samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    most_steps = sorted(by_prompt.values(), key=lambda group: -len({sample.step for sample in group}))[:prompts]
    chosen = []
    for group in most_steps:
        ordered = sorted(group, key=lambda sample: sample.step)
        chosen += [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})]
    return chosen


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(name, each run's value, whether they differ), those that differ first."""
    sides: list[dict[str, Any]] = [{**run.log.config, **run.versions} for run in runs]
    names = sorted({name for side in sides for name in side})
    rows = [(name, [str(side.get(name, "")) for side in sides], False) for name in names]
    rows = [(name, values, len(set(values)) > 1) for name, values, _ in rows]
    return sorted(rows, key=lambda row: not row[2])
