"""What tests/benchmarks/doctor.py measured, into the page of every problem: a plot and a paragraph.

python tests/benchmarks/doctor_pages.py --out runs/doctor
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from doctor import file_of, results
from doctor_cases import CASES, Case
from matplotlib.figure import Figure

from trl_ext.diagnostics import RunLog

DOCS = Path(__file__).parents[2] / "docs"
START, END = "<!-- measured: begin -->", "<!-- measured: end -->"
# What shows each problem best.
SHOWN = {
    "kl_runs_away": "objective/kl",
    "negative_kl": "objective/kl",
    "sampling_differs": "val/sampling_gap_z",
    "first_ratio": "policy/first_approxkl",
    "entropy_collapse": "policy/entropy_avg",
    "kl_drowns_score": "objective/scores",
    "clipping_saturated": "policy/approxkl_avg",
    "steps_too_small": "policy/approxkl_avg",
    "constant_scores": "objective/scores_std",
    "score_scale": "objective/scores_std",
    "value_not_learning": "val/explained_variance",
    "value_loss_explodes": "loss/value_avg",
    "gradients_absent": "grad_norm/value",
    "gradients_not_finite": "grad_norm/policy",
    "gradients_explode": "grad_norm/value",
    "truncation": "completions/clipped_ratio",
    "length_exploitation": "completions/mean_length",
    "repetition_exploitation": "completions/repetition",
    "mode_collapse": "completions/distinct",
    "over_optimisation": "yardstick/exact",
    "functions_at_odds": "objective/scores_std",
    "prompts_truncated": "prompts/at_max_length",
    "overfit": "eval_loss",
    "length_bias": "eval_accuracy",
    "chance_level": "accuracy",
    "saturated": "margin",
    "uncentred": "mean_reward",
    "likelihood_displacement": "logps/chosen",
    "margins_explode": "rewards/margins",
    "reference_mismatch": "rewards/chosen",
}
STATES = {"mistaken": ("#d55e00", "with the mistake"), "cured": ("#0072b2", "with the remedy")}


def curve(folder: Path, metric: str) -> tuple[list[int], list[float]] | None:
    """A metric's steps and values in a run's folder."""
    state = folder / "trainer_state.json"
    if not state.is_file():
        return None
    log = RunLog.of(json.loads(state.read_text(encoding="utf-8"))["log_history"])
    evals = metric.startswith("eval_")
    series = log.series(metric.removeprefix("eval_"), evals=evals)
    return series.steps, series.values


def draw(case: Case, out: Path, seeds: list[int], picture: Path) -> bool:
    """The metric of every seed's mistaken and cured run; whether there was anything to draw."""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axis = figure.subplots()
    metric = SHOWN[case.finds]
    drawn = set()
    for state, (colour, label) in STATES.items():
        for seed in seeds:
            points = curve(out / file_of(out, case, state, seed).stem, metric)
            if points and points[0]:
                axis.plot(
                    *points,
                    color=colour,
                    linewidth=1.2,
                    label=None if state in drawn else label,
                    marker="." if len(points[0]) < 4 else None,
                )
                drawn.add(state)
    if not drawn:
        return False
    axis.set_xlabel("optimizer step")
    axis.set_ylabel(metric)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})
    return True


def paragraph(case: Case, runs: list[dict[str, Any]]) -> str:
    """What happened, in figures."""
    mine = [r for r in runs if (r["case"], r["kind"], r["note"]) == (case.finds, case.kind, case.note)]
    sick, cured = ([r for r in mine if r["state"] == state] for state in ("mistaken", "cured"))
    steps = [f["step"] for r in sick for f in r["found"] if f["name"] == case.finds]
    kind = "the exam" if case.kind != "reward" else "held-out pair accuracy"
    text = f"The mistake ({case.kind}): {case.note}. Named in {len(steps)} of {len(sick)} runs"
    text += f", first at step {int(statistics.median(steps))}." if steps else "."
    if cured:
        changes = next((f["changes"] for r in sick for f in r["found"] if f["name"] == case.finds), {})
        settings = case.cure if case.cure is not None else changes
        shown = case.cured_by or ", ".join(f"`{name}: {value}`" for name, value in settings.items())
        gone = sum(case.finds not in [f["name"] for f in r["found"]] for r in cured)
        before, after = (statistics.median(r["well"] for r in part) for part in (sick, cured))
        text += f" The remedy{f', {shown},' if shown else ''} made the finding go in {gone} of {len(cured)}; {kind}: "
        text += f"{before:.0%} before, {after:.0%} after (medians)."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/doctor"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    runs = results(args.out)
    for name in SHOWN:
        parts = []
        for number, case in enumerate(case for case in CASES if case.finds == name):
            if not any((r["case"], r["kind"], r["note"]) == (name, case.kind, case.note) for r in runs):
                continue
            picture = DOCS / "images" / "diagnostics" / f"{name}{number or ''}.svg"
            if draw(case, args.out, args.seeds, picture):
                parts.append(
                    f"![{SHOWN[name]} with the mistake and with the remedy](../images/diagnostics/{picture.name})"
                )
            parts.append(paragraph(case, runs))
        page = DOCS / "diagnostics" / f"{name}.md"
        before, rest = page.read_text(encoding="utf-8").split(START)
        made = "\n\n".join(parts) or "Not measured yet."
        page.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
