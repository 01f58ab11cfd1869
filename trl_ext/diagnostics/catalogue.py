"""Which rules look at which runs, causes before their symptoms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trl_ext.diagnostics import checkpoints, distributions, preferences, samples, scores, signal, updates
from trl_ext.diagnostics.finding import SEVERITIES, Finding, Rule
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog
from trl_ext.diagnostics.remedies import bearing
from trl_ext.diagnostics.settings import unusual_settings

GRADIENTS: tuple[Rule, ...] = (updates.gradients_not_finite, updates.gradients_absent, updates.gradients_explode)
SIGNAL: tuple[Rule, ...] = (
    signal.score_ignores_completion,
    signal.score_not_repeatable,
    signal.lost_to_rounding,
    signal.term_drowns_score,
    signal.credit_fades,
    signal.held_out_differs,
    signal.noise_drowns_signal,
)
ON_SAMPLES: tuple[Rule, ...] = (
    *GRADIENTS,
    signal.base_moves,
    updates.gradients_pile_up,
    samples.copied_completions,
    distributions.base_damaged,
    distributions.sampling_differs,
    distributions.negative_kl,
    distributions.first_ratio,
    distributions.first_kl,
    distributions.reference_moves,
    distributions.policy_is_reset,
    scores.constant_scores,
    scores.mostly_unscored,
    scores.score_opposed,
    scores.score_misaligned,
    *SIGNAL,
    scores.scores_alike,
    scores.score_unrelated,
    samples.prompts_truncated,
    samples.few_prompts,
    samples.prompts_in_order,
    samples.empty_prompts,
    samples.prompts_hold_completions,
    updates.rate_off_schedule,
    checkpoints.wrong_checkpoint,
    updates.clipping_saturated,
    updates.steps_too_small,
    samples.repetition_exploitation,
    scores.score_scale,
    scores.score_drifts,
    scores.functions_at_odds,
    samples.length_exploitation,
    samples.completions_shrink,
    samples.mode_collapse,
    samples.truncation,
    signal.penalty_dominates,
    scores.over_optimisation,
    distributions.kl_drowns_score,
    updates.value_starts_far_off,
    updates.value_loss_explodes,
    distributions.entropy_collapse,
    distributions.entropy_rises,
    distributions.kl_runs_away,
    updates.value_not_learning,
    scores.no_progress,
)
RULES: dict[str, tuple[Rule, ...]] = {
    "ppo": ON_SAMPLES,
    "online": ON_SAMPLES,
    "reward": (
        *GRADIENTS,
        preferences.length_bias,
        preferences.chance_level,
        preferences.overfit,
        preferences.saturated,
        preferences.uncentred,
    ),
    "dpo": (
        *GRADIENTS,
        preferences.reference_mismatch,
        preferences.chance_level,
        preferences.margins_explode,
        preferences.likelihood_displacement,
    ),
    "other": GRADIENTS,
}

# Causes that are named only where they made something that was found.
SECOND_LOOK: tuple[Callable[[RunLog, Limits, Sequence[Finding]], Finding | None], ...] = (
    signal.prompts_unlike_the_model,
    signal.score_ignores_prompt,
    unusual_settings,
)


def diagnose(log: RunLog, limits: Limits | None = None, rules: Sequence[Rule] | None = None) -> list[Finding]:
    """What is wrong with a run, problems before warnings, causes before symptoms.

    Args:
        log: the run, see `RunLog.of` and `read_run`.
        limits: thresholds; None: the documented ones.
        rules: functions of (log, limits); None: those of the catalogue for this kind of run.
    """
    limits = limits if limits is not None else Limits()
    results = [rule(log, limits) for rule in (rules if rules is not None else RULES[log.kind])]
    findings = [bearing(finding, log) for finding in results if finding is not None]
    for rule in SECOND_LOOK if rules is None else ():
        if (cause := rule(log, limits, findings)) is not None:
            findings.insert(0, bearing(cause, log))
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def all_clear(log: RunLog) -> str:
    """What to say where `diagnose` finds nothing: for a trainer without rules of its own, that there are none."""
    if log.kind == "other":
        return "There are no rules for this trainer; in its gradients, which every trainer logs, nothing stands out."
    return "Nothing stands out."
