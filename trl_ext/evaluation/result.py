"""What an evaluation found: as JSON, as tables on the screen, as a page, and as a section of a run's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trl_ext.diagnostics.charts import number
from trl_ext.evaluation.comparisons import Agreement, Interval, WinRate
from trl_ext.evaluation.figures import MEANING
from trl_ext.runs import write_whole

Result = dict[str, Any]


def as_json(
    settings: Mapping[str, Any],
    adapters: Mapping[str, str | None],
    metrics: Mapping[str, Mapping[str, Interval]],
    judge: str | None,
    rates: Sequence[WinRate],
    left_out: int,
    strengths: Mapping[str, Interval],
    agreement: Agreement | None,
) -> Result:
    """An evaluation in plain numbers, lists and dicts; a figure that is no number is None."""
    policies = {}
    for name, figures in metrics.items():
        policies[name] = {"adapter": adapters[name], "metrics": {key: _figure(x) for key, x in figures.items()}}
        if name in strengths:
            policies[name]["strength"] = _figure(strengths[name])
    win_rates: dict[str, dict[str, Any]] = {name: {} for name in metrics} if rates else {}
    for rate in rates:
        for way in (rate, rate.swapped):
            win_rates[way.a][way.b] = _rate(way)
    agreed = None
    if agreement is not None:
        kappa = None if math.isnan(agreement.kappa) else agreement.kappa
        agreed = {**asdict(agreement.share), "kappa": kappa, "pairs": agreement.pairs}
        agreed["sentence"] = (
            f"The judge and people say the same of {agreement.share.mean:.0%} of {agreement.pairs} pairs "
            f"({agreement.share.low:.0%} to {agreement.share.high:.0%}"
            + (")." if kappa is None else f"; Cohen's kappa {kappa:.2f}).")
        )
    return {
        **settings,
        "policies": policies,
        "judge": judge,
        "left_out": left_out,
        "win_rates": win_rates,
        "agreement": agreed,
    }


def _figure(x: Interval) -> dict[str, Any]:
    return {name: None if math.isnan(value) else value for name, value in asdict(x).items()}


def _rate(rate: WinRate) -> dict[str, Any]:
    raw, controlled = (
        {"rate" if name == "mean" else name: value for name, value in _figure(x).items()}
        for x in (rate.rate, rate.length_controlled)
    )
    tested = {"p": rate.p, "p_corrected": rate.corrected, "more_prompts": rate.more_prompts}
    return {**raw, "length_controlled": controlled, **tested, "sentence": rate.sentence}


def print_result(result: Result, console: Console | None = None) -> None:
    """The figures and win rates as tables, and what they say in sentences."""
    console = console or Console()
    policies = result["policies"]
    table = Table(title=f"{result['prompts']} prompts, {result['per_prompt']} a prompt", title_justify="left")
    table.add_column("Figure")
    for name in policies:
        table.add_column(Text(name), justify="right")
    for metric in _metric_names(result):
        table.add_row(Text(metric), *(_interval(policy["metrics"].get(metric)) for policy in policies.values()))
    if any("strength" in policy for policy in policies.values()):
        table.add_row("strength", *(_interval(policy.get("strength")) for policy in policies.values()))
    console.print(table)
    if not result["judge"]:
        return
    won = Table(title=Text(f"Win rates, judge {result['judge']}"), title_justify="left")
    for heading in ("Policies", "Win rate", "At equal length", "Prompts", "p"):
        won.add_column(heading, justify="left" if heading == "Policies" else "right")
    for a, b, rate in _rates(result):
        shares = _share(rate), _share(rate["length_controlled"])
        won.add_row(Text(f"{a} against {b}"), *shares, str(rate["n"]), number(rate["p_corrected"]))
    console.print(won)
    for _, _, rate in _rates(result):
        console.print(Text(rate["sentence"]))
    if result["left_out"]:
        console.print(f"{result['left_out']} pairs without a verdict are left out.")
    if result["agreement"]:
        console.print(result["agreement"]["sentence"])


def section(result: Result) -> Markup:
    """The section of a report. Everything that a model or a user wrote is escaped."""
    return Markup(_rendered("section.html", result))


def write_page(result: Result, file: Path) -> None:
    """One self-contained HTML file."""
    write_whole(file, _rendered("evaluation.html", result))


def _rendered(template: str, result: Result) -> str:
    loaders = [PackageLoader("trl_ext.evaluation"), PackageLoader("trl_ext.diagnostics")]
    environment = Environment(loader=ChoiceLoader(loaders), autoescape=True)
    environment.filters |= {"number": number, "interval": _interval, "share": _share}
    return environment.get_template(template).render(
        result=result,
        metrics=_metric_names(result),
        meaning=lambda name: MEANING[name.split("/")[0]],
        rates=_rates(result),
        strengths=any("strength" in policy for policy in result["policies"].values()),
    )


def _metric_names(result: Result) -> list[str]:
    return list(dict.fromkeys(name for policy in result["policies"].values() for name in policy["metrics"]))


def _rates(result: Result) -> list[tuple[str, str, dict[str, Any]]]:
    """Each pair once, the one that wins first."""
    found = []
    for a, b in combinations(result["policies"], 2):
        if b in result["win_rates"].get(a, {}):
            first, second = (a, b) if result["win_rates"][a][b]["rate"] >= 0.5 else (b, a)
            found.append((first, second, result["win_rates"][first][second]))
    return found


def _interval(figure: Mapping[str, Any] | None) -> str:
    return f"{number(figure['mean'])} {_ends(figure, number)}" if figure else ""


def _share(rate: Mapping[str, Any]) -> str:
    return "cannot be told" if rate["rate"] is None else f"{rate['rate']:.1%} {_ends(rate, '{:.1%}'.format)}"


def _ends(figure: Mapping[str, Any], written: Callable[[float], str]) -> str:
    low, high = figure["low"], figure["high"]
    return "(no interval)" if low is None else f"({written(low)} to {written(high)})"
