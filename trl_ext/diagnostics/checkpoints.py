"""The rule about the checkpoint that a run keeps as its best."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trl_ext.diagnostics.finding import Finding, Remedy
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Series

# Metrics that are meant to rise, and to fall; with "/" at its end the beginning of a name.
RISES = (
    *("objective/scores", "objective/rlhf_reward", "rewards/", "yardstick/", "agreement/", "reward"),
    *("val/explained_variance", "completions/distinct", "completions/eos_rate"),
)
FALLS = ("loss", "completions/clipped_ratio", "completions/repetition", "objective/unscored")


def _is_one_of(name: str, metrics: Sequence[str]) -> bool:
    begins = any(name.startswith(one) for one in metrics if one.endswith("/"))
    return name in metrics or (begins and not name.endswith("/std"))


def wrong_checkpoint(log: RunLog, limits: Limits) -> Finding | None:
    """The checkpoint that is restored at the end as the best is the worst by what says which is best, or one of the
    first by a metric that only a policy which has not learned keeps low."""
    if not log.setting("load_best_model_at_end"):
        return None
    name = str(log.setting("metric_for_best_model", "loss")).removeprefix("eval_")
    greater = bool(log.setting("greater_is_better", not name.endswith("loss")))
    evals = [row for row in log.evals if row["step"] > 0 and math.isfinite(row.get(name, math.nan))]
    score = "reward" if log.kind == "online" else "objective/scores"
    judge = next((f"yardstick/{one}" for one in log.names("yardstick/")), score)
    judged = Series([row["step"] for row in evals], [row.get(judge, math.nan) for row in evals])
    kept = (max if greater else min)(evals, key=lambda row: row[name], default={})
    known = len(evals) >= 3 and all(map(math.isfinite, judged.values))
    lost = judged.values[-1] - kept[judge] if known else 0.0
    upside_down = _is_one_of(name, FALLS if greater else RISES)
    if not (upside_down or lost > limits.noticeable * judged.noise()):  # NaN, where it is not known, is not
        return None
    way = "highest" if greater else "lowest"
    seen = f"; by {judge} that of step {kept['step']:.0f} is {lost:.3g} below the last one's" if lost > 0 else ""
    return Finding(
        name="wrong_checkpoint",
        severity="warning",
        title="The checkpoint that is kept as the best is not",
        steps=log.steps,
        evidence=f"load_best_model_at_end restores the one with the {way} {name} (greater_is_better {greater}){seen}.",
        figures={"lost": lost},
        cause="metric_for_best_model or greater_is_better for another metric than the one that is meant.",
        remedy=Remedy(
            text="Keep the checkpoint with the highest score on the evaluation prompts, or the last one.",
            code=f"metric_for_best_model={judge!r}, greater_is_better=True",
        ),
    )
