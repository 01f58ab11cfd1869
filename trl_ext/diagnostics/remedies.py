"""Which quantity each remedy moves, and whether a setting can move it in this run at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trl_ext.diagnostics.finding import Finding
from trl_ext.diagnostics.log import RunLog
from trl_ext.diagnostics.signal import share_of_functions

# By finding: the doctor's or the logged name of the metric that its remedy moves, and where to.
MOVES: dict[str, tuple[str, str]] = {
    "base_damaged": ("policy/entropy_avg", "down"),
    "base_moves": ("evidence/base_moved", "down"),
    "chance_level": ("accuracy", "up"),
    "clipping_saturated": ("clipfrac", "down"),
    "completions_shrink": ("length", "up"),
    "constant_scores": ("score_std", "up"),
    "copied_completions": ("completions/distinct", "up"),
    "credit_fades": ("evidence/credit/mean", "up"),
    "empty_prompts": ("prompts/empty", "down"),
    "entropy_collapse": ("entropy", "up"),
    "entropy_rises": ("entropy", "down"),
    "few_prompts": ("prompts/distinct", "up"),
    "first_kl": ("kl", "down"),
    "first_ratio": ("policy/first_approxkl", "down"),
    "functions_at_odds": ("score_std", "down"),
    "gradients_absent": ("grad_norm/value", "up"),
    "gradients_explode": ("grad_norm", "down"),
    "gradients_not_finite": ("grad_norm", "down"),
    "gradients_pile_up": ("evidence/gradient/signal", "down"),
    "held_out_differs": ("eval_evidence/held_out/score_gap", "down"),
    "kl_drowns_score": ("kl", "up"),
    "kl_runs_away": ("kl", "down"),
    "length_bias": ("data/longer_chosen", "down"),
    "length_exploitation": ("length", "down"),
    "likelihood_displacement": ("logps/chosen", "up"),
    "lost_to_rounding": ("evidence/lost_to_rounding", "down"),
    "margins_explode": ("margin", "down"),
    "mode_collapse": ("completions/distinct", "up"),
    "mostly_unscored": ("objective/unscored", "down"),
    "negative_kl": ("kl", "up"),
    "noise_drowns_signal": ("score", "up"),
    "no_progress": ("score", "up"),
    "over_optimisation": ("kl", "down"),
    "overfit": ("eval_loss", "down"),
    "penalty_dominates": ("evidence/share/missing_eos_penalty", "down"),
    "policy_is_reset": ("kl", "up"),
    "prompts_in_order": ("score", "up"),
    "prompts_hold_completions": ("prompts/hold_completion", "down"),
    "prompts_unlike_the_model": ("score", "up"),
    "prompts_truncated": ("prompts/at_max_length", "down"),
    "rate_off_schedule": ("learning_rate", "up"),
    "reference_moves": ("kl", "up"),
    "reference_mismatch": ("rewards/chosen", "down"),
    "repetition_exploitation": ("completions/repetition", "down"),
    "sampling_differs": ("val/sampling_gap_z", "down"),
    "saturated": ("margin", "down"),
    "score_drifts": ("score", "down"),
    "score_ignores_completion": ("evidence/score/within_prompt", "up"),
    "score_ignores_prompt": ("evidence/score/moved_by_prompt", "up"),
    "score_misaligned": ("agreement/", "up"),
    "score_not_repeatable": ("evidence/noise/", "down"),
    "score_opposed": ("agreement/", "up"),
    "score_scale": ("score_std", "down"),
    "score_unrelated": ("agreement/", "up"),
    "scores_alike": ("objective/scores_alike", "down"),
    "steps_too_small": ("approxkl", "up"),
    "term_drowns_score": ("evidence/gradient/", "down"),
    "truncation": ("truncated", "down"),
    "uncentred": ("mean_reward", "down"),
    "unusual_settings": ("score", "up"),
    "value_loss_explodes": ("value_loss", "down"),
    "value_not_learning": ("val/explained_variance", "up"),
    "value_starts_far_off": ("value_loss", "down"),
    "wrong_checkpoint": ("eval_score", "up"),
}


# By an argument of PPOTrainer: what is known to be good and can stand in its place, to see whether it is to blame.
STAND_INS = {
    "reward_funcs": "the yardstick",
    "train_dataset": "the held-out prompts",
    "generator": "Transformers' generate",
    "processing_class": "the tokenizer beside the model",
}
# By finding: the arguments that may be to blame for it, in turn.
BLAMED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("completions_shrink", "constant_scores", "entropy_rises", "functions_at_odds", "length_exploitation"),
            *("mode_collapse", "mostly_unscored", "no_progress", "over_optimisation", "repetition_exploitation"),
            *("score_drifts", "score_ignores_completion", "score_ignores_prompt", "score_misaligned"),
            *("score_not_repeatable", "score_opposed", "score_scale", "score_unrelated", "scores_alike"),
            *("noise_drowns_signal", "value_not_learning", "value_starts_far_off"),
        ),
        ("reward_funcs",),
    ),
    **dict.fromkeys(
        ("empty_prompts", "few_prompts", "prompts_hold_completions", "prompts_in_order", "prompts_truncated"),
        ("train_dataset",),
    ),
    "prompts_unlike_the_model": ("processing_class", "train_dataset"),
    "copied_completions": ("train_dataset", "generator"),
    "held_out_differs": ("train_dataset", "reward_funcs"),
    **dict.fromkeys(("sampling_differs", "truncation"), ("generator",)),
    "base_moves": ("generator",),
    "policy_is_reset": ("generator",),
}


def stand_ins(name: str, log: RunLog) -> list[dict[str, str]]:
    """What can be exchanged in this run to see whether it is to blame for the finding `name`, in turn."""
    if log.kind != "ppo" or not log.setting("rollout_batch_size"):  # TRL's own trainers exchange nothing
        return []
    read = [log.series(f"evidence/prompts/{name}").start() for name in ("otherwise", "other_tokens")]
    there = {
        "reward_funcs": bool(log.names("yardstick/")),
        "train_dataset": bool(log.evals),
        "generator": True,
        "processing_class": any(share > 0 for share in read),  # NaN, where nothing was measured, is not
    }
    return [{part: STAND_INS[part]} for part in BLAMED.get(name, ()) if there[part]]


def normalisation_is_idle(log: RunLog, value: Any) -> str | None:
    """Why normalising the functions' scores would not move the spread; None where it would."""
    if log.setting("score_normalization", "none") != "none":
        return "the scores are normalised already"
    share = share_of_functions(log)
    if share < 0.5:  # NaN, where nothing was measured, is not
        return f"the reward functions make {max(share, 0.0):.0%} of the reward's variance; penalties are not normalised"
    return None


def value_weight_is_idle(log: RunLog, value: Any) -> str | None:
    """Why a larger vf_coef would not make the value role learn; None where it would.

    AdamW divides a gradient by its size, so a weight alone changes no step. It counts where that size nears Adam's
    epsilon, or where the policy's larger gradient takes the common norm to which both are clipped.
    """
    own, policy = log.series("grad_norm/value").recent(), log.series("grad_norm/policy").recent()
    if not own >= 0.1 * policy:  # also where either is unknown
        return None
    return f"the value role's gradient ({own:.2g}) is not small beside the policy's ({policy:.2g})"


def eos_penalty_is_idle(log: RunLog, value: Any) -> str | None:
    """Why a penalty on a missing EOS would move nothing."""
    cut = log.series("truncated")
    return "no completion is cut off" if cut and max(cut.values) == 0.0 else None


def clipping_is_idle(log: RunLog, value: Any) -> str | None:
    """Why clipping gradients would move nothing."""
    norms, now = log.series("grad_norm"), float(log.setting("max_grad_norm", math.inf))
    highest = max((x for x in norms.values if math.isfinite(x)), default=math.inf)
    if 0 < now < min(highest, float(value)):
        return None  # the present one clips
    return f"no gradient is larger than {value}" if highest < float(value) else None


NO_EPSILON = 1e-12  # below it Adam divides what has no gradient by nothing


def epsilon_is_idle(log: RunLog, value: Any) -> str | None:
    """Why another adam_epsilon would move nothing: it is added to the size of each weight's gradient, which is a
    thousandth of the norm of a million of them, and counts from a tenth of that on."""
    now, norm = float(log.setting("adam_epsilon", 1e-8)), log.series("grad_norm/policy").recent()
    if now < NO_EPSILON:
        return None
    norm = min(norm, float(log.setting("max_grad_norm") or math.inf))  # it is logged before it is clipped
    large = max(now, float(value))
    return f"the policy's gradient ({norm:.2g}) is large beside {large:g}" if norm / 1e3 > 10 * large else None


def guard_is_idle(log: RunLog, value: Any) -> str | None:
    """Why a wider max_ratio would move nothing."""
    skipped = log.series("policy/skipped_minibatches")
    return "no minibatch is left out" if skipped and max(skipped.values) == 0.0 else None


# Settings that may be idle in a run: from its log and the new value, the reason; None where the setting bears.
IDLE: dict[str, Callable[[RunLog, Any], str | None]] = {
    "score_normalization": normalisation_is_idle,
    "vf_coef": value_weight_is_idle,
    "missing_eos_penalty": eos_penalty_is_idle,
    "max_grad_norm": clipping_is_idle,
    "adam_epsilon": epsilon_is_idle,
    "max_ratio": guard_is_idle,
}


def why_idle(log: RunLog, name: str, value: Any) -> str | None:
    """Why setting `name` to `value` would move nothing in this run; None where it may."""
    if "output_dir" in log.config and name not in log.config:
        return "this trainer has no such setting"
    return IDLE[name](log, value) if name in IDLE else None


def _is_so(log: RunLog, changes: dict[str, Any]) -> bool:
    """Whether the run has all these settings already."""
    return all(name in log.config and log.config[name] == value for name, value in changes.items())


def bearing(finding: Finding, log: RunLog) -> Finding:
    """The finding with only those settings in its remedy and its suspects that can move its evidence in this run, and
    with the quantity that the remedy moves."""
    moves, direction = MOVES.get(finding.name, ("", ""))
    remedy = finding.remedy
    changes = {name: value for name, value in remedy.changes.items() if why_idle(log, name, value) is None}
    if _is_so(log, changes):
        changes = {}
    idle = {name: why for name, value in remedy.changes.items() if name in IDLE and (why := IDLE[name](log, value))}
    if idle and not changes:
        told = "; ".join(f"{name} would not help: {why}" for name, why in idle.items())
        remedy = replace(remedy, text=f"I know no setting that moves this here ({told}).")
    remedy = replace(remedy, changes=changes, moves=remedy.moves or moves, direction=remedy.direction or direction)
    bear = [
        {name: value for name, value in suspect.changes.items() if why_idle(log, name, value) is None}
        for suspect in finding.suspects
    ]
    suspects = tuple(
        replace(suspect, changes=changes)
        for suspect, changes in zip(finding.suspects, bear, strict=True)
        if not suspect.changes or not _is_so(log, changes)
    )
    return replace(finding, remedy=remedy, suspects=suspects)
