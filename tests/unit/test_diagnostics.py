"""The doctor's rules: each on a log in which its problem stands, and on the same log without it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import TrainerState, get_scheduler

from trl_ext import DiagnosticsCallback
from trl_ext.cli import main
from trl_ext.diagnostics import Finding, Limits, Remedy, RunLog, Sample, diagnose, read_run, roots
from trl_ext.diagnostics.distributions import suggested_kl_coef
from trl_ext.diagnostics.log import Series
from trl_ext.diagnostics.pages import page
from trl_ext.diagnostics.scores import functions_at_odds, over_optimisation
from trl_ext.diagnostics.settings import unusual_settings
from trl_ext.diagnostics.signal import noise_drowns_signal
from trl_ext.diagnostics.updates import SCHEDULES

WIGGLE = [0.03, -0.02, 0.01, -0.03, 0.02, -0.01]


def rows(count: int = 16, **metrics: Any) -> list[dict[str, float]]:
    """Logs of steps 8, 16, ...; a metric is a number (with a little noise), a list, or a function of 0 to 1."""
    made = []
    for i in range(count):
        row: dict[str, float] = {"step": 8 * (i + 1)}
        for name, value in metrics.items():
            if callable(value):
                row[name] = value(i / (count - 1))
            elif isinstance(value, list):
                row[name] = value[i]
            else:
                row[name] = value * (1 + WIGGLE[i % 6])
        made.append(row)
    return made


HEALTHY: dict[str, Any] = {
    "objective/kl": lambda t: 0.1 + 0.8 * t,
    "objective/kl_std": 1.0,
    "objective/kl_coef": 0.4,
    "objective/scores": lambda t: 1.2 * t + 0.05 * math.sin(40 * t),
    "objective/scores_std": 1.0,
    "objective/entropy": lambda t: 2.4 - 0.8 * t,
    "policy/entropy_avg": lambda t: 0.3 - 0.1 * t,
    "policy/approxkl_avg": 0.01,
    "policy/first_approxkl": 1e-13,
    "policy/clipfrac_avg": 0.05,
    "loss/value_avg": lambda t: 0.5 - 0.3 * t,
    "val/explained_variance": lambda t: 0.4 * t,
    "val/sampling_gap": 0.001,
    "val/sampling_gap_z": lambda t: math.sin(50 * t),
    "completions/mean_length": 8.0,
    "completions/clipped_ratio": 0.02,
    "completions/repetition": 0.0,
    "completions/distinct": 0.7,
    "completions/score_length_correlation": 0.1,
    "prompts/distinct": 0.9,
    "prompts/at_max_length": 0.2,
    "prompts/mean_length": 12.0,
    "grad_norm": 0.5,
    "grad_norm/policy": 0.4,
    "grad_norm/value": 0.2,
    "rewards/judge/mean": lambda t: t,
    "rewards/judge/std": 1.0,
    "evidence/score/within_prompt": 0.5,
    "evidence/score/repeats": 16.0,
    "evidence/noise/judge": 0.0,
    "evidence/share_of/judge": 1.0,
    "evidence/share/missing_eos_penalty": 0.01,
    "evidence/share/kl": 0.0,
    "evidence/reward_std": 1.0,
    "evidence/credit/mean": 0.8,
    "evidence/gradient/score": 0.2,
    "evidence/gradient/kl": 0.1,
    "evidence/gradient/entropy": 0.01,
    "evidence/gradient/signal": 1e-4,
    "evidence/gradient/noise": 1e-3,
    "agreement/exact": 0.85,
    "objective/scores_alike": 0.1,
    "objective/unscored": 0.0,
    "prompts/empty": 0.0,
    "prompts/hold_completion": 0.0,
    "yardstick/exact": lambda t: 3 + t,
    "evidence/lost_to_rounding": 1e-12,
}
CONFIG = {"learning_rate": 1e-3, "max_completion_length": 16, "rollout_batch_size": 64, "kl_coef": 0.4}

# A judge whose scores are those of places.
PLACED = {
    "evidence/noise/judge": 0.9,
    "evidence/noise_by_place/judge": 0.9,
    "evidence/noise_by_chance/judge": 0.0,
    "agreement/exact": 0.2,
}
# One whose scores are those of the rows beside.
COMPARED = {"evidence/noise/judge": 0.9, "evidence/noise_by_place/judge": 0.0, "evidence/noise_by_chance/judge": 0.0}

SICK: dict[str, dict[str, Any]] = {
    "sampling_differs": {"val/sampling_gap": -0.05, "val/sampling_gap_z": -4.0},
    "negative_kl": {"objective/kl": -0.8, "objective/kl_std": 0.5},
    "first_ratio": {"policy/first_approxkl": 0.01},
    "kl_runs_away": {"objective/kl": lambda t: 7 * t, "objective/kl_coef": 0.01},
    "kl_drowns_score": {"objective/kl": 0.001, "objective/kl_coef": 10.0, "objective/scores": 0.1},
    "entropy_collapse": {"policy/entropy_avg": lambda t: 0.3 * math.exp(-8 * t)},
    "gradients_not_finite": {"grad_norm": [0.5] * 15 + [math.nan]},
    "gradients_absent": {"grad_norm/value": 0.0},
    "gradients_explode": {"grad_norm/value": [0.5] * 10 + [400.0, 900.0] * 3},
    "clipping_saturated": {"policy/clipfrac_avg": 0.6},
    "steps_too_small": {"policy/approxkl_avg": 1e-8, "objective/scores": 0.1},
    "value_not_learning": {"val/explained_variance": 0.0},
    "value_loss_explodes": {"loss/value_avg": lambda t: 0.5 * math.exp(5 * t), "objective/scores": lambda t: 60 * t},
    "constant_scores": {"objective/scores_std": 0.0, "objective/scores": 0.0},
    "score_scale": {"objective/scores_std": 130.0},
    "truncation": {"completions/clipped_ratio": 0.9},
    "length_exploitation": {
        "completions/mean_length": lambda t: 8 + 8 * t + 0.1 * math.sin(40 * t),
        "completions/score_length_correlation": 0.8,
    },
    "repetition_exploitation": {"completions/repetition": lambda t: 0.7 * t},
    "mode_collapse": {"completions/distinct": lambda t: 0.7 - 0.65 * min(1.0, 2 * t)},
    "over_optimisation": {
        "yardstick/exact": lambda t: 3 + t - 3 * max(0.0, t - 0.5) + 0.02 * math.sin(40 * t),
        "objective/kl": lambda t: 3 * t,
    },
    "functions_at_odds": {
        "rewards/other/mean": 0.0,
        "rewards/other/std": 1.0,
        "rewards/correlation/judge~other": -0.8,
    },
    "score_ignores_completion": {"evidence/score/within_prompt": 0.0, "objective/scores": 0.1},
    "score_not_repeatable": {"evidence/noise/judge": 0.9, "val/explained_variance": 0.0},
    "penalty_dominates": {
        "evidence/share/missing_eos_penalty": 0.95,
        "evidence/share_of/judge": 0.04,
        "evidence/reward_std": 5.0,
        "objective/scores_std": 50.0,
    },
    "credit_fades": {"evidence/credit/mean": 0.2, "objective/scores": 0.1},
    "lost_to_rounding": {"evidence/lost_to_rounding": 0.8, "policy/approxkl_avg": 1e-8, "objective/scores": 0.1},
    "term_drowns_score": {"evidence/gradient/entropy": 4.0, "evidence/cosine/score~entropy": -0.2},
    "held_out_differs": {"eval_evidence/held_out/score_gap": 2.0, "eval_evidence/held_out/score_gap_z": 9.0},
    "first_kl": {"objective/kl": lambda t: 2.0 - t, "episode": lambda t: 64 + 960 * t},
    "completions_shrink": {
        "completions/mean_length": lambda t: 8 - 6 * t + 0.05 * math.sin(40 * t),
        "completions/score_length_correlation": -0.8,
    },
    "entropy_rises": {"policy/entropy_avg": lambda t: 0.3 + 2 * t, "objective/scores": 0.1},
    "rate_off_schedule": {"learning_rate": lambda t: 1e-3 * max(0.0, 1 - 3 * t)},
    "noise_drowns_signal": {
        "evidence/gradient/signal": [1e-5, -1e-5] * 8,
        "evidence/gradient/noise": 1e-3,
        "objective/scores": 0.1,
    },
    "score_opposed": {"agreement/exact": -0.9, "yardstick/exact": lambda t: 3 - t},
    "copied_completions": {
        "completions/distinct": 0.05,
        "objective/entropy": 12.0,
        "policy/entropy_avg": 1.5,
    },
    "score_misaligned": {"agreement/exact": 0.1, "agreement_shifted/exact": 0.9},
    "value_starts_far_off": {"loss/value_avg": lambda t: 900 * (1 - t / 2), "episode": lambda t: 64 + 960 * t},
    "reference_moves": {"objective/kl": 0.0, "objective/kl_std": 0.0},
    "policy_is_reset": {
        "objective/kl": 0.0,
        "objective/kl_std": 0.0,
        "objective/scores": 0.1,
        "eval_objective/scores": lambda t: 0.1,
        "eval_objective/scores_std": 1.0,
    },
    "no_progress": {"objective/scores": 0.1},
    "score_unrelated": {"agreement/exact": [0.1, -0.1] * 8},
    "score_drifts": {"objective/scores": lambda t: 6 * t, "objective/kl": 0.1, "objective/kl_std": 0.2},
    "score_ignores_prompt": {"evidence/score/moved_by_prompt": 0.0, "agreement/exact": [0.1, -0.1] * 8},
    "prompts_unlike_the_model": {"evidence/prompts/unknown_markers": 1.0, "completions/clipped_ratio": 0.9},
    "scores_alike": {"objective/scores_alike": 0.97, "objective/scores": 0.1},
    "mostly_unscored": {"objective/unscored": 50.0},
    "few_prompts": {"prompts/distinct": 1 / 16},
    "base_moves": {"evidence/base_moved": lambda t: 0.02 * t, "objective/kl": -0.8, "objective/kl_std": 0.5},
    "base_damaged": {"objective/entropy": 60.0, "completions/mean_length": 9.0},
    "gradients_pile_up": {"evidence/gradient/signal": 1e-2, "evidence/gradient/noise": 1e-4},
    "prompts_in_order": {},
    "wrong_checkpoint": {"eval_objective/scores": lambda t: t, "eval_yardstick/exact": lambda t: 3 + t},
    "empty_prompts": {"prompts/empty": 0.3},
    "prompts_hold_completions": {"prompts/hold_completion": 0.8},
    "unusual_settings": {"objective/scores": 0.1},
    "prompts_truncated": {
        "prompts/at_max_length": 0.9,
        "prompts/min_length": [9.0, 14.0] * 8,
        "prompts/max_length": [24.0] * 16,
    },
}


# What makes the problem beside what it looks like.
SETTINGS: dict[str, dict[str, Any]] = {
    "credit_fades": {"gamma": 0.5},
    "penalty_dominates": {"missing_eos_penalty": 100.0},
    "term_drowns_score": {"entropy_coef": 1.0},
    "first_kl": {"reference_named": False},
    "entropy_rises": {"entropy_coef": 0.1},
    "rate_off_schedule": {"lr_scheduler_type": "linear", "max_steps": 128},
    "noise_drowns_signal": {"per_device_train_batch_size": 8},
    "prompts_in_order": {"prompts_order": ("prompt", 0.99, 1000), "shuffle_dataset": False},
    "wrong_checkpoint": {
        "load_best_model_at_end": True,
        "metric_for_best_model": "objective/scores",
        "greater_is_better": False,
    },
    "unusual_settings": {"cliprange": 1e-3},
}


# Of each problem, what is not yet one: just on the other side of one limit, or what healthy runs do.
NOT_YET: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("first_kl", {"objective/kl": [0.07] + [0.9] * 15}, {}),  # under 0.01 for each of 8 tokens
    ("first_kl", {"objective/kl_std": 8.0}, {}),  # two standard errors
    ("first_kl", {"objective/kl": [0.35] + [0.9] * 15}, {"bf16": True}),  # as much as its rounding may make
    ("first_kl", {"episode": lambda t: 128 + 960 * t}, {}),  # a log from the second rollout on, or of two at once
    ("first_kl", {}, {"reference_named": True}),  # meant
    ("first_kl", {}, {"reference_named": None}),  # of another trainer
    ("completions_shrink", {"completions/mean_length": lambda t: 8 - 2 * t + 0.05 * math.sin(40 * t)}, {}),
    ("completions_shrink", {"completions/score_length_correlation": -0.4}, {}),  # and the score rises
    # 9.6 tokens: 40% are cut at 16, and the others have 5.3, as all have who learned to end.
    (
        "completions_shrink",
        {
            "completions/clipped_ratio": [0.4] * 4 + [0.0] * 12,
            "completions/mean_length": [9.6, 9.5, 9.7, 9.6] + [4.5, 4.4] * 6,
        },
        {},
    ),
    ("entropy_rises", {"policy/entropy_avg": lambda t: 0.6 + 0.55 * t}, {}),  # not twice its start
    ("entropy_rises", {"policy/entropy_avg": lambda t: 0.1 + 0.5 * t}, {}),  # twice, but of hardly any
    ("entropy_rises", {"objective/scores": HEALTHY["objective/scores"]}, {}),
    ("rate_off_schedule", {"learning_rate": lambda t: 1e-3 * (1 - t)}, {}),
    ("rate_off_schedule", {"learning_rate": lambda t: 1e-3 * (1 - t)}, {"lr_scheduler_type": "cosine_with_restarts"}),
    ("rate_off_schedule", {}, {"lr_scheduler_kwargs": {"num_cycles": 2}}),
    ("rate_off_schedule", {}, {"rate_changed": True}),  # by the doctor
    ("rate_off_schedule", {}, {"max_steps": 40}),  # the run is over where the rate is 0
    ("noise_drowns_signal", {"evidence/gradient/noise": 3e-4}, {}),  # four times the 9e-6 that the signal may be
    ("noise_drowns_signal", {"objective/scores": lambda t: min(1.2, 6 * t) + 0.02 * math.sin(40 * t)}, {}),  # converged
    ("noise_drowns_signal", {"objective/scores": lambda t: math.sin(3 * t)}, {}),  # rose, and fell
    ("noise_drowns_signal", {}, {"per_device_train_batch_size": 1}),  # more micro-batches for the noise to cancel in
    ("score_opposed", {"agreement/exact": -0.45}, {}),
    ("score_opposed", {"agreement/exact": [0.4] * 6 + [-0.9] * 10}, {}),  # exploited, later
    ("score_opposed", {"agreement/exact": [-1.0, 0.9, -1.0, -0.9, -1.0, -1.0] + [-1.0] * 10}, {}),  # noise
    ("score_unrelated", {"agreement/exact": [0.85, 0.7] * 8}, {}),
    ("score_unrelated", {"agreement/exact": -0.4, "objective/scores_alike": 0.95}, {}),
    ("reference_moves", {"objective/kl": 1e-4}, {}),
    ("reference_moves", {"objective/kl_std": 1e-4}, {}),
    ("reference_moves", {"policy/approxkl_avg": 1e-8}, {}),  # neither moves
    (
        "reference_moves",
        {"eval_objective/scores": lambda t: 0.1, "eval_objective/scores_std": 1.0},
        {},
    ),  # that is policy_is_reset
    ("base_damaged", {"objective/entropy": 30.0}, {}),
    ("base_damaged", {"val/sampling_gap": 5.0}, {}),  # what was drawn surprises, and the policy is no noise
    ("base_damaged", {"episode": lambda t: 128 + 960 * t}, {}),  # a log of later rollouts
    ("gradients_pile_up", {"evidence/gradient/signal": [1e-2] * 7 + [1e-4] * 9}, {}),
    ("gradients_pile_up", {"evidence/gradient/noise": 1e-2}, {}),
    (
        "gradients_pile_up",
        {},
        {"rollout_batch_size": 64 * 32, "per_device_train_batch_size": 64 * 32},
    ),  # gradients of so many have little noise
    ("base_damaged", {}, {"temperature": 1.4}),
    ("policy_is_reset", {"eval_objective/scores": lambda t: t}, {}),  # it learns: reference_moves
    ("policy_is_reset", {"eval_objective/scores_std": 0.0}, {}),  # nothing can be told
    ("policy_is_reset", {"policy/approxkl_avg": 1e-8}, {}),
    ("policy_is_reset", {"objective/kl": 1e-4}, {}),
    ("rate_off_schedule", {"learning_rate": lambda t: 1e-3 * (1 + 0.9 * t)}, {}),
    ("score_unrelated", {"agreement/exact": -0.9}, {}),  # that is score_opposed
    ("score_misaligned", {"agreement_shifted/exact": 0.5}, {}),
    ("score_misaligned", {"agreement_shifted/exact": 0.1, **PLACED, "evidence/noise_by_place/judge": 0.15}, {}),
    ("score_misaligned", {"agreement_shifted/exact": 0.1, **PLACED, "evidence/noise_by_chance/judge": 0.9}, {}),
    ("score_misaligned", {"agreement_shifted/exact": 0.1, **PLACED, "agreement/exact": 0.8}, {}),  # ties by place
    ("score_ignores_completion", COMPARED, {}),  # two answers of a prompt beside each other, for the measurement
    ("kl_runs_away", {"objective/kl": lambda t: 3.1 * t, "completions/mean_length": lambda t: 12 - 9 * t}, {}),
    ("score_misaligned", {"agreement/exact": 0.3}, {}),  # prompts alike: other rows' verdicts are its own
    ("value_starts_far_off", {"loss/value_avg": lambda t: 10 * (1 - t / 2)}, {}),  # 4.5, and scores lie 1 from 0
    ("value_starts_far_off", {"objective/scores": lambda t: 10 + t}, {}),  # whose own distance is as far: score_scale
    ("value_starts_far_off", {"episode": lambda t: 128 + 960 * t}, {}),  # a log of later rollouts, too
    ("score_drifts", {"objective/scores": 0.1, "agreement/exact": [0.9] * 8 + [0.3] * 8}, {}),
    ("score_drifts", {"objective/scores": 0.1, "agreement/exact": lambda t: 0.9 - 2 * t}, {}),  # bit by bit
    ("score_unrelated", {"agreement/exact": [0.9, -0.9] * 8}, {}),  # too noisy to say
    ("score_unrelated", {"agreement/exact": [0.85] * 6 + [0.0] * 10}, {}),  # exploited, later
    ("score_drifts", {"objective/kl": lambda t: 0.1 + 5 * t}, {}),  # the policy has moved
    ("score_drifts", {"objective/kl": [8.0] + [0.1] * 15}, {}),  # it came back from where it began
    ("score_drifts", {"objective/kl_std": 20.0}, {}),  # or may have
    ("score_drifts", {"objective/scores": lambda t: 1.5 * t}, {}),  # 1.5 of 2 x 0.45 + 0.53 that it can make
    ("score_drifts", {"prompts/distinct": 1 / 64}, {}),  # one prompt a rollout, each another one
    ("score_drifts", {"objective/scores": [0.1] * 10 + [6.0] * 2 + [0.1] * 4}, {}),  # two rollouts
    ("score_ignores_prompt", {"evidence/score/moved_by_prompt": 0.1}, {}),
    ("score_ignores_prompt", {"agreement/exact": 0.9}, {}),  # no harm is done
    # A problem that has nothing to do with it.
    ("score_ignores_prompt", {"agreement/exact": 0.9, "completions/clipped_ratio": 0.9}, {}),
    ("score_ignores_prompt", {"objective/scores_std": 0.0}, {}),  # that is constant_scores
    ("prompts_unlike_the_model", {"evidence/prompts/unknown_markers": 0.2}, {}),
    ("prompts_unlike_the_model", {"completions/clipped_ratio": 0.1}, {}),  # it can read them
    ("score_scale", {"objective/scores_std": 1.0, "objective/scores": lambda t: 8 + t}, {}),
    ("score_scale", {"objective/scores_std": 6.0, "objective/scores": lambda t: 12 + t}, {}),  # twice its spread
    ("score_scale", {"objective/scores_std": 1.0, "objective/scores_shorth": 0.2, "objective/scores_alike": 0.1}, {}),
    ("score_scale", {"objective/scores_std": 1.0, "objective/scores_shorth": 0.0, "objective/scores_alike": 0.8}, {}),
    (
        "length_exploitation",
        {
            "completions/mean_length": lambda t: 8 + 2 * t + 0.1 * math.sin(40 * t),
            "completions/score_length_correlation": 0.6,
        },
        {},
    ),
    ("scores_alike", {"objective/scores_alike": 0.85}, {}),
    ("scores_alike", {"objective/scores_alike": [0.4] * 4 + [0.97] * 12}, {}),  # converged
    ("scores_alike", {"objective/scores_std": 0.0}, {}),  # that is constant_scores
    ("mostly_unscored", {"objective/unscored": 30.0}, {}),
    ("value_loss_explodes", {"loss/value_avg": [0.5] * 15 + [20.0]}, {}),  # one rollout
    ("kl_runs_away", {"objective/kl": [0.9] * 15 + [30.0]}, {}),  # one rollout
    ("score_scale", {"objective/scores_std": [1.0] * 15 + [40.0]}, {}),  # one rollout
    ("few_prompts", {"prompts/distinct": 0.65}, {}),
    ("base_moves", {"evidence/base_moved": 1e-6}, {}),  # an adapter that was merged and taken out again
    ("prompts_in_order", {}, {"prompts_order": ("prompt", 0.5, 1000)}),
    ("prompts_in_order", {}, {"prompts_order": ("prompt", 0.99, 100)}),  # a rollout has most of them
    ("prompts_in_order", {}, {"prompts_order": None}),  # not known
    ("truncation", {"completions/clipped_ratio": [0.4] * 4 + [0.0] * 12}, {}),
    ("clipping_saturated", {"policy/clipfrac_avg": 0.1, "policy/approxkl_avg": 0.05}, {}),
    ("clipping_saturated", {"policy/clipfrac_avg": 0.1, "policy/approxkl_avg": [0.01] * 15 + [0.5]}, {}),  # one update
    ("steps_too_small", {"policy/approxkl_avg": 5e-4}, {}),
    # Small steps, but the policy has spent what it may.
    ("steps_too_small", {"policy/approxkl_avg": 1e-4, "objective/scores": HEALTHY["objective/scores"]}, {}),
    ("few_prompts", {"prompts/distinct": 1 / 4}, {"num_generations": 4}),  # all that there is room for
    ("few_prompts", {}, {"rollout_batch_size": 8}),
    ("empty_prompts", {"prompts/empty": 0.03}, {}),
    ("prompts_hold_completions", {"prompts/hold_completion": 0.3}, {}),
    ("no_progress", {"objective/scores": lambda t: math.sin(3 * t)}, {}),  # rose, and fell
    ("unusual_settings", {"objective/scores": HEALTHY["objective/scores"]}, {}),  # it works
    ("unusual_settings", {}, {"cliprange": 0.1}),
    ("copied_completions", {"completions/distinct": 0.25}, {}),
    ("copied_completions", {"objective/entropy": 4.0, "policy/entropy_avg": 0.5}, {}),  # it may well say so twice
    ("copied_completions", {"objective/entropy": 8.0}, {}),  # of 12 by its entropy: greedy decoding
    ("copied_completions", {"completions/distinct": [0.9] * 4 + [0.05] * 12}, {}),  # later: mode_collapse
]


def log_of(**changes: Any) -> RunLog:
    return RunLog.of(rows(**{**HEALTHY, **changes}), CONFIG)


def sick_log(name: str) -> RunLog:
    return with_evaluations({**HEALTHY, **SICK[name]}, {**CONFIG, **SETTINGS.get(name, {})})


def with_evaluations(metrics: dict[str, Any], config: dict[str, Any]) -> RunLog:
    """Evaluations have logs of their own."""
    history = []
    for row in rows(**metrics):
        evaluated = {key: value for key, value in row.items() if key.startswith("eval_")}
        history.append({key: value for key, value in row.items() if key not in evaluated})
        history += [{"step": row["step"], **evaluated}] if evaluated else []
    return RunLog.of(history, config)


def test_a_healthy_run_has_no_finding() -> None:
    assert diagnose(log_of()) == []


@pytest.mark.parametrize("name", SICK)
def test_each_problem_is_named(name: str) -> None:
    findings = diagnose(sick_log(name))
    names = [finding.name for finding in findings]
    assert name in names[:2], names
    finding = findings[names.index(name)]
    assert finding.evidence.endswith(".") and finding.cause.endswith(".") and str(finding.remedy)
    assert all(isinstance(value, float) for value in finding.figures.values())
    assert finding.page == f"docs/diagnostics/{name}.md"
    json.dumps(finding.remedy.changes)  # an exact setting


def test_scores_far_from_where_values_start() -> None:
    offset = {**HEALTHY, "objective/scores": lambda t: 100 + t}
    (finding,) = [one for one in diagnose(RunLog.of(rows(**offset), CONFIG)) if one.name == "score_scale"]
    assert finding.title == "The scores are far from 0" and "values start at 0" in finding.evidence
    assert finding.remedy.changes == {"score_normalization": "running"}
    without = {name: value for name, value in offset.items() if name != "loss/value_avg"}
    assert "score_scale" not in names_of(RunLog.of(rows(**without), CONFIG)), "no value role has to get there"


def test_small_steps_are_a_warning_where_the_score_rises_and_little_kl_is_spent() -> None:
    slow = {**HEALTHY, "policy/approxkl_avg": 2e-4, "objective/kl": 0.3}
    for settings, changes in (({}, {}), ({"num_ppo_epochs": 1, "num_mini_batches": 2}, {"num_ppo_epochs": 4})):
        (finding,) = diagnose(RunLog.of(rows(**slow), {**CONFIG, **settings}))
        assert (finding.name, finding.severity) == ("steps_too_small", "warning")
        assert "0.0002 nats per token, and the score rises slowly" in finding.evidence
        assert finding.remedy.changes == changes
    assert diagnose(RunLog.of(rows(**{**slow, "policy/approxkl_avg": 5e-4}), CONFIG)) == []


def test_tiny_steps_are_told_of_two_rollouts_and_are_a_problem_once_the_score_has_had_time() -> None:
    tiny = {**HEALTHY, **SICK["steps_too_small"]}
    for count, severities in ((1, []), (2, ["warning"]), (5, ["warning"]), (6, ["problem"])):
        found = diagnose(RunLog.of(rows(**tiny)[:count], {**CONFIG, "learning_rate": 3e-6}))
        assert [one.severity for one in found if one.name == "steps_too_small"] == severities, count


@pytest.mark.parametrize(
    ("kl", "score", "told"), [(1e-5, 0.1, True), (-1e-5, 0.1, True), (5e-3, 0.1, False), (1e-5, None, False)]
)
def test_one_step_a_rollout_that_leaves_the_kl_at_0_is_too_small(kl: float, score: float | None, told: bool) -> None:
    """The KL of each update is measured before its first step, and there is no other."""
    one = {**CONFIG, "num_ppo_epochs": 1, "num_mini_batches": 1, "learning_rate": 1e-6}
    still = {**HEALTHY, "policy/approxkl_avg": 0.0, "objective/kl": kl, "objective/kl_std": math.sqrt(2 * abs(kl))}
    still |= {} if score is None else {"objective/scores": score}
    problems = [one for one in diagnose(RunLog.of(rows(**still), one)) if one.severity == "problem"]
    found = [one for one in problems if one.name == "steps_too_small"]
    assert len(found) == told
    assert not told or (
        found[0].remedy.changes == {"learning_rate": 3e-4} and "of one step the KL came to" in found[0].evidence
    )


def test_where_the_rate_is_not_small_what_takes_the_steps_away_is_suspected() -> None:
    still, usual = {**HEALTHY, **SICK["steps_too_small"]}, {**CONFIG, "learning_rate": 1e-3, "adam_epsilon": 1e-5}

    def suspected(**more: Any) -> list[dict[str, Any]]:
        found = diagnose(RunLog.of(rows(**{**still, **more}), usual))
        (finding,) = [one for one in found if one.name == "steps_too_small"]
        assert finding.remedy.changes == {} and "cannot tell" in finding.cause
        return [one.changes for one in finding.suspects]

    faster, epsilon, guard = {"learning_rate": 3e-3}, {"adam_epsilon": 1e-8}, {"max_ratio": None}
    large = {"grad_norm/policy": 1.0}
    assert suspected(**{"grad_norm/policy": 1e-4}) == [epsilon, faster]
    assert suspected(**large) == [faster], "such a gradient is larger than the epsilon"
    assert suspected(**large, **{"policy/skipped_minibatches": 1.0}) == [faster], "by another guard"
    usual |= {"max_ratio": 1.1}
    assert suspected(**large, **{"policy/skipped_minibatches": 1.0}) == [guard, faster]
    assert suspected(**large, **{"policy/skipped_minibatches": 0.0}) == [faster]
    usual |= {"adam_epsilon": 1e-8, "learning_rate": 2e-3}
    assert suspected(**{"grad_norm/policy": 1e-6}) == [], "it is so already, and such a rate suits nothing"


def test_the_kl_says_nothing_while_the_value_role_is_trained_alone() -> None:
    one = {**CONFIG, "num_ppo_epochs": 1, "num_mini_batches": 1, "learning_rate": 1e-3, "value_warmup_rollouts": 10}
    still = {
        **HEALTHY,
        "policy/approxkl_avg": 0.0,
        "objective/kl": 0.0,
        "objective/kl_std": 0.0,
        "objective/scores": 0.1,
    }
    for count, told in ((12, False), (16, True)):
        found = [one.name for one in diagnose(RunLog.of(rows(count, **still), one)) if one.severity == "problem"]
        assert ("steps_too_small" in found) == told, count
    plain = {name: value for name, value in still.items() if name != "objective/kl_std"}
    assert "steps_too_small" in names_of(RunLog.of(rows(16, **plain), one)), "by the KL itself"


def test_one_step_a_rollout_may_be_too_few() -> None:
    slow = {**HEALTHY, "policy/approxkl_avg": 0.0, "objective/kl": lambda t: 0.3 * t}
    one = {**CONFIG, "num_ppo_epochs": 1, "num_mini_batches": 1, "per_device_train_batch_size": 64}
    (finding,) = diagnose(RunLog.of(rows(**slow), one))
    assert (finding.name, finding.severity) == ("steps_too_small", "warning")
    assert "rollouts of one step the KL came to 0.27 nats" in finding.evidence
    assert finding.remedy.changes == {"num_ppo_epochs": 4}
    (finding,) = diagnose(RunLog.of(rows(**slow), {**one, "objective": "reinforce"}))
    assert finding.remedy.changes == {"per_device_train_batch_size": 16, "num_mini_batches": 4}
    assert diagnose(RunLog.of(rows(**{**slow, "objective/kl": lambda t: 2 * t}), one)) == [], "it has moved"
    there = {**slow, "objective/scores": lambda t: min(3 * t, 1.0) + 0.02 * math.sin(40 * t)}
    assert diagnose(RunLog.of(rows(**there), one)) == [], "the score has got to where it stays"


def test_large_updates_are_a_warning() -> None:
    (finding,) = diagnose(log_of(**{"policy/approxkl_avg": [0.05, 0.2] * 8 + [0.2]}))
    assert (finding.name, finding.severity) == ("clipping_saturated", "warning")
    assert finding.remedy.changes == {"learning_rate": 1e-4}


def test_clipping_is_told_of_trainers_that_log_no_kl_of_an_update() -> None:
    without = {name: value for name, value in HEALTHY.items() if name != "policy/approxkl_avg"}
    (finding,) = diagnose(RunLog.of(rows(**{**without, "policy/clipfrac_avg": 0.6}), CONFIG))
    assert finding.evidence.endswith("% of the tokens are clipped.") and set(finding.figures) == {"clipfrac"}


def test_completions_that_were_cut_at_the_start_explain_what_came_of_it() -> None:
    cut = {"completions/clipped_ratio": [0.9] * 4 + [0.0] * 12, "objective/kl": lambda t: 7 * t}
    (top,) = roots(diagnose(log_of(**cut)))
    assert top.finding.name == "truncation" and [one.finding.name for one in top][1:] == ["kl_runs_away"]
    assert top.finding.severity == "warning" and top.severity == "problem"
    assert top.finding.title == "Completions were cut off before they ended" and top.finding.from_the_start
    assert top.finding.remedy.changes["max_completion_length"] == 32


def test_a_judge_that_is_replaced_is_told_by_its_agreement() -> None:
    replaced = log_of(**{"agreement/exact": [0.95] * 8 + [-0.1, 0.0] * 4})
    (finding,) = [one for one in diagnose(replaced) if one.name == "score_drifts"]
    assert finding.severity == "problem"
    assert "correlate at 0.95 up to step" in finding.evidence and "at -0.07 from step" in finding.evidence
    assert finding.steps == (replaced.rows[7]["step"], replaced.rows[8]["step"])


def test_a_score_that_follows_its_purpose_in_part_is_a_warning() -> None:
    (finding,) = diagnose(log_of(**{"agreement/exact": 0.45}))
    assert (finding.name, finding.severity) == ("score_unrelated", "warning") and "only in part" in finding.title


@pytest.mark.parametrize(
    ("missed", "rollouts", "found"),
    [
        (0.1, 16, True),
        (0.04, 16, False),  # as much as a correlation of 0.75 makes
        ([0.0] * 12 + [0.9] * 4, 16, False),  # later, when the policy has moved
        ([0.0, 0.3] * 8, 1, False),
        (0.06, 16, False),  # of 192, which may be 0.043
        (0.25, 1, False),  # four of sixteen may be chance, by three standard errors
        (0.4, 1, True),
        (0.25, 2, True),
    ],
)
def test_scores_that_are_wrong_for_some(missed: Any, rollouts: int, found: bool) -> None:
    """A correlation hardly sees them."""
    log = RunLog.of(rows(**{**HEALTHY, "agreement/exact": 0.9, "missed/exact": missed})[:rollouts], CONFIG)
    told = diagnose(log)
    assert [(one.name, one.severity) for one in told] == ([("score_unrelated", "warning")] if found else [])
    assert all("likes best" in one.evidence for one in told)


def test_scores_that_go_with_the_yardstick_over_all_do_not_explain_that_they_part() -> None:
    exploited = {**HEALTHY, **SICK["over_optimisation"], "agreement/exact": 0.9, "missed/exact": 0.12}
    tops = [top.finding.name for top in roots(diagnose(RunLog.of(rows(**exploited), CONFIG)))]
    assert "over_optimisation" in tops and "score_unrelated" in tops
    agreement = [0.0, 0.2, 0.6] * 5 + [0.6]
    in_part = RunLog.of(rows(**{**HEALTHY, "agreement/exact": agreement, "missed/exact": 0.3})[:3], CONFIG)
    assert diagnose(in_part) == [], "over all of them the two hardly go together"


@pytest.mark.parametrize("kwargs", [None, {"min_lr": 0.1}])
def test_a_rate_above_its_setting(kwargs: dict[str, float] | None) -> None:
    settings = {**CONFIG, "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    found = diagnose(RunLog.of(rows(**{**HEALTHY, "learning_rate": 0.1, "objective/kl": lambda t: 7 * t}), settings))
    (top,) = roots(found)
    assert top.finding.name == "rate_off_schedule" and "It is 0.1 at step" in top.finding.evidence
    assert [one.finding.name for one in top][1:] == ["kl_runs_away"]
    changes = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}
    assert top.finding.remedy.changes == (changes if kwargs else {})
    assert diagnose(RunLog.of(rows(**{**HEALTHY, "learning_rate": 0.1}), {**settings, "rate_changed": True})) == []


def test_scores_may_come_to_mean_something_else_for_the_better_too() -> None:
    names = names_of(log_of(**{"agreement/exact": [0.1, -0.1] * 4 + [1.0] * 8}))
    assert "score_drifts" in names


def test_held_out_prompts_tell_a_wrong_reward_from_wrong_training_prompts() -> None:
    wrong = {**HEALTHY, "agreement/exact": [0.1, -0.1] * 8}
    evals = [{"step": 40 * i, "eval_agreement/exact": 0.8} for i in (1, 2)]
    (top,) = roots(diagnose(RunLog.of([*rows(**wrong), *evals], CONFIG)))
    assert (top.finding.name, top.finding.severity) == ("held_out_differs", "problem")
    assert "correlate at 0.80, on training prompts at 0.00" in top.finding.evidence
    assert [one.finding.name for one in top][1:] == ["score_unrelated"]
    later = {**wrong, "agreement/exact": [0.1, -0.1] * 4 + [0.8] * 8}
    assert "held_out_differs" not in names_of(RunLog.of([*rows(**later), *evals], CONFIG)), "by then both are right"
    evals = [{"step": 40 * i, "eval_agreement/exact": 0.3} for i in (1, 2)]
    assert names_of(RunLog.of([*rows(**wrong), *evals], CONFIG)) == ["score_unrelated"]


@pytest.mark.parametrize(
    ("nats", "error", "told"), [(22.0, 1.0, True), (5.0, 0.5, True), (22.0, 3.0, False), (12.0, 0.1, False)]
)
def test_training_prompts_that_surprise_the_model_more_or_less_than_held_out_ones(
    nats: float, error: float, told: bool
) -> None:
    surprise = {"evidence/prompts/surprise": nats, "evidence/prompts/surprise_error": error}
    evals = [{"step": 40, "eval_evidence/prompts/surprise": 11.0, "eval_evidence/prompts/surprise_error": error}]
    found = diagnose(RunLog.of([*rows(**{**HEALTHY, **surprise}), *evals], CONFIG))
    assert [one.name for one in found] == ["held_out_differs"] * told
    for one in found:
        assert one.severity == "warning" and "nats a token, held-out ones by 11.0 (" in one.evidence


def test_few_scores_that_dwarf_all_others() -> None:
    few = {"objective/scores_shorth": 0.02, "objective/scores_alike": 0.2, "objective/scores_median": 5.103}
    (finding,) = diagnose(log_of(**few))
    assert finding.name == "score_scale" and "Half of them lie within 0.02" in finding.evidence
    clip = finding.remedy.changes["reward_clip_range"]
    assert clip[1] - clip[0] == pytest.approx(0.08, rel=0.05), "0.02 four times"
    assert clip[0] < 5.1 < clip[1], "around those that are alike, not around the mean"
    assert "reward_clip_range" not in str(diagnose(log_of(**{**few, "objective/scores_median": math.nan})))


def test_length_that_is_scored_is_told_before_completions_have_grown_much() -> None:
    grows = {"completions/mean_length": lambda t: 8 + 2 * t + 0.1 * math.sin(40 * t)}
    assert names_of(log_of(**grows, **{"completions/score_length_correlation": 0.8})) == ["length_exploitation"]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("constant_scores", {}),
        ("scores_alike", {"objective/scores_alike": 0.97}),
        ("mostly_unscored", {}),
        ("few_prompts", {}),
        ("empty_prompts", {}),
        ("prompts_hold_completions", {}),
        ("score_scale", {}),
        ("truncation", {}),
        ("score_opposed", {}),
        ("score_not_repeatable", {}),
    ],
)
def test_what_many_completions_share_is_told_of_the_first_rollout(name: str, changes: dict[str, Any]) -> None:
    first = rows(**{**HEALTHY, **SICK[name], **changes})[:1]
    assert name in names_of(RunLog.of(first, {**CONFIG, **SETTINGS.get(name, {})}))
    if name not in ("score_not_repeatable", "score_opposed"):
        few = {**CONFIG, "rollout_batch_size": 16}
        assert name not in names_of(RunLog.of(first, few)), "16 completions may well be alike"


@pytest.mark.parametrize(
    ("rate", "changes"), [(3e-6, {"learning_rate": 3e-4}), (1e-4, {"learning_rate": 1e-3}), (1e-3, {}), (30.0, {})]
)
def test_a_learning_rate_that_is_high_is_not_raised(rate: float, changes: dict[str, float]) -> None:
    found = diagnose(RunLog.of(rows(**{**HEALTHY, **SICK["steps_too_small"]}), {**CONFIG, "learning_rate": rate}))
    (finding,) = [one for one in found if one.name == "steps_too_small"]
    assert finding.remedy.changes == changes and ("cannot tell" in finding.cause) is not bool(changes)
    assert ("unusual_settings" in [one.name for one in found]) is (rate == 30.0)


@pytest.mark.parametrize(
    ("r", "rollouts", "name"),
    [
        (-0.9, 1, "score_opposed"),
        (-0.6, 1, "score_unrelated"),  # 64 completions: three standard errors from -0.5 are 0.24
        (-0.6, 6, "score_opposed"),
        (-0.4, 1, "score_unrelated"),
        (-0.4, 6, "score_unrelated"),
        (0.0, 1, "score_unrelated"),
        (0.2, 1, None),  # may be 0.57
        (0.4, 1, None),  # in part, perhaps
        (0.4, 6, "score_unrelated"),
        (0.2, 6, "score_unrelated"),
    ],
)
def test_how_sure_the_first_rollouts_make(r: float, rollouts: int, name: str | None) -> None:
    found = names_of(RunLog.of(rows(**{**HEALTHY, "agreement/exact": r})[:rollouts], CONFIG))
    assert [one for one in found if one.startswith("score_")] == ([name] if name else [])


@pytest.mark.parametrize(
    ("gaps", "times", "found"),
    [
        ([0.8] * 4, 20, True),
        ([0.8] * 4, 4, False),  # 3.2 standard errors, four times of the same prompts
        ([3.0, -0.8, 3.0, 3.0], 20, False),
        ([0.8], 20, False),
        ([0.4] * 4, 20, False),
    ],
)
def test_held_out_prompts_of_another_kind_score_to_one_side(gaps: list[float], times: float, found: bool) -> None:
    evals = [{"step": 8 * i, "evidence/held_out/score_gap": gap} for i, gap in enumerate(gaps)]
    evals = [{**one, "evidence/held_out/score_gap_z": times * one["evidence/held_out/score_gap"]} for one in evals]
    log = RunLog("ppo", log_of().rows, evals, CONFIG)
    assert ("held_out_differs" in names_of(log)) is found


def test_what_was_so_before_a_step_was_not_learned() -> None:
    sick = {"completions/clipped_ratio": 0.9, "agreement/exact": [0.1, -0.1] * 8}
    assert [top.finding.name for top in roots(diagnose(log_of(**sick)))] == ["truncation"]
    later = {**sick, "completions/clipped_ratio": lambda t: 0.9 * min(1.0, 4 * t)}
    assert [top.finding.name for top in roots(diagnose(log_of(**later)))] == ["score_unrelated", "truncation"]
    grows = SICK["length_exploitation"]
    tops = roots(diagnose(log_of(**grows, **{"completions/clipped_ratio": 0.9})))
    assert [top.finding.name for top in tops] == ["length_exploitation", "truncation"]
    tops = roots(diagnose(log_of(**grows, **{"completions/clipped_ratio": later["completions/clipped_ratio"]})))
    assert [top.finding.name for top in tops] == ["length_exploitation"]


def test_sampling_that_is_corrected_for_is_a_warning_that_says_how_much_is_cut() -> None:
    sick = {**SICK["sampling_differs"], "sampling/weight_cut": [0.1, 0.3] * 8}
    (finding,) = [f for f in diagnose(log_of(**sick)) if f.name == "sampling_differs"]
    assert finding.severity == "warning"
    assert "their bounds cut 20.0% of the weight." in finding.evidence
    assert finding.figures["weight_cut"] == pytest.approx(0.2)
    assert finding.remedy.changes == {}
    settings = {**CONFIG, "top_k": 5}
    (finding,) = sampling_differs(rows(**{**HEALTHY, **sick}), settings)
    assert finding.remedy.changes == {"top_k": 0}
    del sick["sampling/weight_cut"]
    (finding,) = sampling_differs(rows(**{**HEALTHY, **sick}), {**CONFIG, "vllm_importance_sampling_correction": False})
    assert finding.severity == "problem"
    assert finding.remedy.changes == {"vllm_importance_sampling_correction": True}


def test_a_policy_that_has_moved_since_it_sampled_is_expected_and_a_false_word_is_not() -> None:
    moved = {**HEALTHY, **SICK["sampling_differs"], "sampling/weight_cut": 0.1}
    ahead = {**CONFIG, "rollouts_ahead": 1}
    true, little, false = (
        {"val/weighted_gap": gap, "val/weighted_gap_z": z} for gap, z in ((-0.05, -1.0), (-0.001, -9.0), (-0.05, -3.0))
    )
    assert sampling_differs(rows(**moved), CONFIG)
    assert not sampling_differs(rows(**moved), ahead)
    assert not sampling_differs(rows(**moved, **true), ahead) and not sampling_differs(rows(**moved, **little), ahead)
    (finding,) = sampling_differs(rows(**moved, **false), {**ahead, "top_p": 0.9})
    assert finding.severity == "problem" and finding.remedy.changes == {"top_p": 1.0}
    assert finding.title.endswith("than the generator says")
    assert finding.figures["z"] == pytest.approx(-12.0, rel=0.05)


def sampling_differs(history: list[dict[str, Any]], config: dict[str, Any]) -> list[Any]:
    return [f for f in diagnose(RunLog.of(history, config)) if f.name == "sampling_differs"]


@pytest.mark.parametrize(
    ("name", "config", "changes"),
    [
        ("kl_runs_away", {}, {"kl_coef": 2.0}),  # four times 0.4, where the scores' spread suggests 0.5
        ("entropy_collapse", {"entropy_coef": 0.05}, {"entropy_coef": 0.1}),
        ("truncation", {"missing_eos_penalty": 3.0}, {"missing_eos_penalty": 3.0}),
    ],
)
def test_a_remedy_never_weakens_what_is_there(name: str, config: dict[str, Any], changes: dict[str, Any]) -> None:
    """Suggested from the scores' spread, or a usual value, it may be below the present one."""
    sick = {**SICK[name], **({"objective/kl_coef": 0.4} if name == "kl_runs_away" else {})}
    log = RunLog.of(rows(**{**HEALTHY, **sick}), {**CONFIG, **config})
    (finding,) = [finding for finding in diagnose(log) if finding.name == name]
    proposed = {**finding.remedy.changes, **{k: v for one in finding.suspects for k, v in one.changes.items()}}
    assert {key: proposed[key] for key in changes} == changes


FLAT = {"objective/scores": lambda t: 0.5 + 0.05 * math.sin(40 * t)}


def test_what_is_not_known_of_a_score_changes_no_cause() -> None:
    """Of few rows, and of scores that are brought to one mean as they rise; over many rows halves are compared."""
    sick, draw = {**HEALTHY, **SICK["kl_runs_away"], "episode": 64.0}, random.Random(3)
    noisy = {**sick, "objective/scores": lambda t: 0.3 + 0.3 * t + draw.gauss(0, 0.15)}
    flat = {**sick, **FLAT, "rewards/judge/mean": lambda t: t}
    for metrics, count, normalised, known in (
        (sick, 4, "none", True),  # of which the first four are the last four
        (flat, 16, "running", True),
        (flat, 16, "none", False),
        (noisy, 300, "none", True),
    ):
        log = RunLog.of(rows(count, **metrics), {**CONFIG, "score_normalization": normalised})
        (found,) = [one for one in diagnose(log) if one.name == "kl_runs_away"]
        assert (not found.suspects) == bool(found.remedy.changes) == known, (count, normalised)


@pytest.mark.parametrize("score", [FLAT, {}])
def test_a_policy_that_is_certain_from_the_start_was_not_moved(score: dict[str, Any]) -> None:
    certain = {**HEALTHY, **score, "policy/entropy_avg": 0.01}
    assert not found_in("entropy_collapse", certain).from_the_start  # what was sampled first was no certainty
    found = found_in("entropy_collapse", {**certain, "objective/entropy": 0.05})
    assert "before a step was taken" in found.cause and found.from_the_start
    assert [one.changes for one in found.suspects] == [{"entropy_coef": 0.01}]


def test_completions_that_shrink_may_spend_what_they_could_but_no_more() -> None:
    shrinks = {"completions/mean_length": lambda t: 200 - 190 * t, "completions/score_length_correlation": -0.3}
    found = [
        one.name
        for one in diagnose(RunLog.of(rows(**{**HEALTHY, **shrinks, "objective/kl": lambda t: 60 * t}), CONFIG))
    ]
    assert "kl_runs_away" in found


@pytest.mark.parametrize("name", ["kl_runs_away", "entropy_collapse", "mode_collapse", "repetition_exploitation"])
def test_what_the_score_does_not_pay_for_has_no_known_cause(name: str) -> None:
    """Where the score has not risen, it is not what the policy follows: the likeliest causes are named, each with what
    would show it, and no setting is proposed as the cure."""
    paid, unpaid = (found_in(name, {**HEALTHY, **SICK[name], **score}) for score in ({}, FLAT))
    assert not paid.suspects and "cannot tell" not in paid.cause
    assert "I cannot tell" in unpaid.cause and not unpaid.remedy.changes and unpaid.severity == "problem"
    assert [set(one.changes) for one in unpaid.suspects] == [{"learning_rate"}, {"kl_coef"}, set()]


def test_a_score_that_looks_at_the_prompt_does_not_explain_one_completion_for_all() -> None:
    looks, blind = (
        found_in("mode_collapse", {**HEALTHY, **SICK["mode_collapse"], "evidence/score/moved_by_prompt": moved})
        for moved in (0.9, 0.1)  # a reward model looks at it a little, and overrates a phrase all the same
    )
    assert "looks at the prompt" in looks.cause and not blind.suspects
    assert looks.suspects[0].cause.startswith("the score overrates this one completion")


@pytest.mark.parametrize(
    ("cut", "score", "suspects"),
    [
        (0.9, {}, 3),  # from the start: the limit, the EOS, the prompts
        (lambda t: t, FLAT, 4),  # later, and nothing is gained by it: the limit, and what moves the policy
        (lambda t: t, {}, 0),  # the score rises with it
        (lambda t: 0.9 * (1 - t), {}, 0),  # it has learned to end: the limit was too short
    ],
)
def test_why_completions_are_cut(cut: Any, score: dict[str, Any], suspects: int) -> None:
    finding = found_in("truncation", {**HEALTHY, "completions/clipped_ratio": cut, **score})
    assert len(finding.suspects) == suspects and bool(finding.remedy.changes) == (not suspects)
    longer = finding.suspects[0].changes if suspects else finding.remedy.changes
    assert longer["max_completion_length"] == 32


@pytest.mark.parametrize(("name", "below", "above"), [("constant_scores", 0.95, 1.0), ("scores_alike", 0.4, 0.95)])
def test_a_score_is_right_to_be_one_where_what_is_written_is_of_one_worth(
    name: str, below: float, above: float
) -> None:
    """Where a yardstick sees differences, the score is to blame; where it sees none, the log does not say what is."""
    differ, one = (
        found_in(name, {**HEALTHY, **SICK[name], "one_verdict/exact": lambda t, s=share: s}) for share in (below, above)
    )
    assert not differ.suspects and "cannot tell" not in differ.cause
    assert f"I cannot tell: yardstick exact says the same of {above:.0%}" in one.cause and len(one.suspects) == 2


@pytest.mark.parametrize(("name", "share"), [("scores_alike", 0.95), ("scores_alike", 0.4), ("constant_scores", 1.0)])
def test_completions_that_are_cut_explain_one_score_for_all_where_a_yardstick_agrees(name: str, share: float) -> None:
    metrics = {**HEALTHY, **SICK["truncation"], **SICK[name], "one_verdict/exact": lambda t: share}
    tops = {top.finding.name: top for top in roots(diagnose(RunLog.of(rows(**metrics), CONFIG)))}
    assert (name in tops) == (share < 0.9) and "truncation" in tops


def found_in(name: str, metrics: dict[str, Any]) -> Finding:
    (finding,) = [finding for finding in diagnose(RunLog.of(rows(**metrics), CONFIG)) if finding.name == name]
    return finding


def test_the_coefficient_in_force_is_known_without_being_logged() -> None:
    """GRPOTrainer logs no coefficient."""
    online = {"reward": lambda t: t, "reward_std": 1.0, "completions/mean_length": 8.0, "kl": lambda t: 0.9 * t}
    log = RunLog.of(rows(**online), {"beta": 0.3})
    assert log.kind == "online"
    assert diagnose(log)[0].remedy.changes == {"beta": 1.0}


def test_the_kl_of_an_answer_where_lengths_are_logged_now_and_then() -> None:
    """GRPOTrainer logs a length where it samples, and a KL a token at every step."""
    history = [{"step": 1, "kl": 0.5}, {"step": 2, "kl": 0.1, "reward_std": 1.0, "completions/mean_length": 20.0}]
    log = RunLog.of([*history, {"step": 3, "kl": 0.2}, {"step": 4, "kl": 0.3, "completions/mean_length": 10.0}])
    assert log.kind == "online"
    assert log.series("kl") == Series([2, 3, 4], [2.0, 4.0, 3.0])


def test_a_trainer_that_cannot_be_stopped_is_not_promised_to(tmp_path: Path) -> None:
    args = SimpleNamespace(response_length=8, output_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match="TRL's PPOTrainer ignores a callback's request to stop: let on_problem be 'warn'"
    ):
        DiagnosticsCallback(on_problem="stop").on_train_begin(args, TrainerState(), None)


def test_settings_that_the_trainer_lacks_are_no_remedy() -> None:
    sick = {**HEALTHY, **SICK["score_scale"]}
    known_in_part, all_known = (RunLog.of(rows(**sick), {**CONFIG, **more}) for more in ({}, {"output_dir": "out"}))
    (one,), (other,) = diagnose(known_in_part), diagnose(all_known)
    assert one.remedy.changes == {"score_normalization": "running"}
    assert other.remedy.changes == {} and other.remedy.text == one.remedy.text


@pytest.mark.parametrize(
    ("share", "shortest", "longest", "named"),
    [
        ([1.0] * 16, 24.0, 24.0, False),  # "Name the colour of a lemon.": one form, one length
        ([0.81, 0.87] * 8, 11.0, 12.0, False),  # "What is 17 + 25?" and "What is 7 + 25?"
        ([0.81, 0.87] * 8, 11.0, 64.0, True),
        ([1.0, 0.98] * 8, 11.0, 64.0, True),  # here and there a rollout without a short one
        ([0.7, 0.75] * 8, 11.0, 64.0, False),  # most of a form, the others shorter
    ],
)
def test_prompts_of_one_form_are_not_cut(share: list[float], shortest: float, longest: float, named: bool) -> None:
    lengths = {"prompts/min_length": [shortest] * 16, "prompts/max_length": [longest] * 16}
    found = diagnose(log_of(**{"prompts/at_max_length": share, **lengths}))
    assert [finding.name for finding in found] == ["prompts_truncated"] * named
    assert all("64 tokens. The shortest has 11." in finding.evidence for finding in found)


def test_prompts_that_are_all_equally_long_are_not_cut() -> None:
    """Whether or not the log has their lengths."""
    assert diagnose(log_of(**{"prompts/at_max_length": [1.0] * 16})) == []


def test_one_function_may_drown_the_others() -> None:
    changed = {"rewards/other/mean": 0.0, "rewards/other/std": 0.01, "rewards/correlation/judge~other": 0.0}
    (finding,) = diagnose(log_of(**changed))
    assert finding.title == "judge dominates the other reward functions"
    assert finding.remedy.changes == {"reward_weights": [pytest.approx(0.01, rel=0.2), 1.0]}


def test_reward_roles_have_no_weights_that_could_be_changed() -> None:
    changed = SICK["functions_at_odds"] | {"rewards/other/std": 0.01}
    assert diagnose(log_of(**changed)) and not diagnose(log_of(**changed, **{"objective/score_spread": 0.4}))


def names_of(log: RunLog) -> list[str]:
    return [finding.name for finding in diagnose(log)]


@pytest.mark.parametrize(
    ("name", "value"), [("score_normalization", "running"), ("multi_objective_aggregation", "normalize_then_sum")]
)
def test_functions_that_are_brought_to_one_scale_do_not_drown_each_other(name: str, value: str) -> None:
    config = {**CONFIG, name: value}
    changed = {"rewards/other/mean": 0.0, "rewards/other/std": 0.01, "rewards/correlation/judge~other": 0.0}
    assert names_of(RunLog.of(rows(**{**HEALTHY, **changed}), config)) == []
    changed["rewards/correlation/judge~other"] = -0.8  # but they may fight, whatever their scales
    assert names_of(RunLog.of(rows(**{**HEALTHY, **changed}), config)) == ["functions_at_odds"]


@pytest.mark.parametrize(("name", "changes", "settings"), NOT_YET)
def test_what_is_not_yet_a_problem(name: str, changes: dict[str, Any], settings: dict[str, Any]) -> None:
    metrics = {**HEALTHY, **SICK[name]}
    config = {**CONFIG, **SETTINGS.get(name, {})}
    assert name in names_of(with_evaluations(metrics, config))
    assert name not in names_of(with_evaluations({**metrics, **changes}, {**config, **settings}))


def test_completions_may_shrink_for_a_reason_that_the_log_does_not_show() -> None:
    shrinking = {**SICK["completions_shrink"], "completions/score_length_correlation": 0.0, "objective/scores": 0.1}
    (found,) = [one for one in diagnose(log_of(**shrinking)) if one.name == "completions_shrink"]
    assert found.severity == "warning" and "cannot tell" in found.cause
    assert {"kl_coef": 0.1} in [suspect.changes for suspect in found.suspects]
    assert "completions_shrink" not in names_of(log_of(**{**shrinking, "completions/mean_length": lambda t: 8 - 4 * t}))
    shorter = {**SICK["completions_shrink"], "completions/mean_length": lambda t: 8 - 3.5 * t}
    (found,) = [one for one in diagnose(log_of(**shorter)) if one.name == "completions_shrink"]
    assert found.severity == "warning" and "rewarded" in found.title, "perhaps that is what was meant"
    nothing_left = {**shrinking, "completions/mean_length": lambda t: 8 - 7 * t}
    (found,) = [one for one in diagnose(log_of(**nothing_left)) if one.name == "completions_shrink"]
    assert found.severity == "problem"


def test_entropy_that_no_bonus_raises() -> None:
    rising = SICK["entropy_rises"]
    (found,) = [one for one in diagnose(log_of(**rising)) if one.name == "entropy_rises"]
    assert "cannot tell" in found.cause and found.remedy.changes == {}
    assert {"learning_rate": 1e-4} in [suspect.changes for suspect in found.suspects]
    idle = rows(**{**HEALTHY, **rising, "evidence/gradient/entropy": 0.001})
    (found,) = [
        one for one in diagnose(RunLog.of(idle, {**CONFIG, "entropy_coef": 1e-6})) if one.name == "entropy_rises"
    ]
    assert "cannot tell" in found.cause, "there is a bonus, but the score pulls harder"
    both = rows(**{**HEALTHY, **rising, **SICK["term_drowns_score"], "objective/scores": 0.1})
    (top, *_) = roots(diagnose(RunLog.of(both, {**CONFIG, "entropy_coef": 1.0})))
    assert top.finding.name == "term_drowns_score" and "entropy_rises" in [one.finding.name for one in top]


@pytest.mark.parametrize(
    ("kind", "rate", "title"),
    [
        ("linear", lambda t: 1e-3, "The learning rate stays where it is"),
        ("constant", lambda t: 1e-3, None),
        (
            "cosine",
            lambda t: 5e-4 * (1.2 + math.cos(3 * math.pi * t)),
            "The learning rate rises again after it has fallen",
        ),
        ("linear", lambda t: 1e-3 * min(t / 0.7, (1 - t) / 0.3), "The learning rate warms up for half of the run"),
        ("constant_with_warmup", lambda t: 1e-3 * min(t / 0.7, 1), "The learning rate warms up for half of the run"),
    ],
)
def test_rates_that_are_off_their_schedule(kind: str, rate: Any, title: str | None) -> None:
    """Some of it shows only while it lasts, so each log of the run is judged."""
    made = rows(**{**HEALTHY, "learning_rate": rate})
    logs = [RunLog.of(made[:count], {**CONFIG, "lr_scheduler_type": kind, "max_steps": 128}) for count in range(1, 17)]
    assert {one.title for log in logs for one in diagnose(log)} == ({title} if title else set())


@pytest.mark.parametrize("warmup", [0, 20, 60])
@pytest.mark.parametrize("known", ["max_steps", "num_train_epochs"])
@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_schedules_of_transformers_are_left_alone(kind: str, known: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=128)
    made = []
    for i, row in enumerate(rows(**HEALTHY)):
        for _ in range(8):
            optimizer.step()
            scheduler.step()
        made.append({**row, "learning_rate": scheduler.get_last_lr()[0], "epoch": 3 * (i + 1) / 16})
        config = {**CONFIG, "lr_scheduler_type": kind, "max_steps": -1, "num_train_epochs": 3.0}
        config |= {"max_steps": 128} if known == "max_steps" else {}
        assert names_of(RunLog.of(made, config)) == []


def test_a_function_of_weight_0_is_a_yardstick_of_the_sign() -> None:
    pair = {"rewards/other/mean": 0.0, "rewards/other/std": 1.0, "rewards/correlation/judge~other": -0.9}
    opposed = rows(**{**HEALTHY, **pair})
    names = {"reward_names": ["judge", "other"]}
    assert "score_opposed" in names_of(RunLog.of(opposed, {**CONFIG, **names, "reward_weights": [1.0, 0.0]}))
    negative = RunLog.of(opposed, {**CONFIG, **names, "reward_weights": [-1.0, 0.0]})
    assert "score_opposed" not in names_of(negative), "it is subtracted, and that is right"


@pytest.mark.parametrize(("told", "is_told"), [(-1.3, True), (-0.05, False), (0.4, False)])
def test_a_generator_that_reports_what_it_has_not_sampled_with(told: float, is_told: bool) -> None:
    """The draws are the policy's; a lag, or another precision, lies above 0."""
    own = {**HEALTHY, "val/sampling_kl": told, "sampling/weight_cut": 1.0, "grad_norm/policy": 0.0}
    tops = roots(diagnose(RunLog.of(rows(**own), CONFIG)))
    assert (tops[0].finding.name == "sampling_differs") == is_told
    if is_told:
        assert "gradients_absent" in [one.finding.name for one in tops[0]]
        for one_bad in ([told] + [0.0] * 15, [0.0] * 15 + [told], [0.0] * 14 + [told, 0.0]):
            assert "sampling_differs" not in names_of(RunLog.of(rows(**{**own, "val/sampling_kl": one_bad}), CONFIG))
        ahead = {"vllm_importance_sampling_correction": None, "rollouts_ahead": 1}
        for settings, changes in ((ahead, {}), ({**ahead, "rollouts_ahead": 0}, {next(iter(ahead)): False})):
            top = roots(diagnose(RunLog.of(rows(**own), CONFIG | settings)))[0].finding
            assert (top.name, top.remedy.changes) == ("sampling_differs", changes)
        unread = RunLog.of(rows(**own), {**CONFIG, "vllm_importance_sampling_correction": False})
        assert "sampling_differs" not in names_of(unread), "nobody reads it"


CERTAIN = {"completions/distinct": 1 / 64, "policy/entropy_avg": 0.01, "objective/entropy": 0.1}


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [
        ({}, True),
        ({"completions/distinct": lambda t: 0.9 - 0.88 * min(1.0, 2 * t)}, False),  # it has come to that
        ({"prompts/distinct": 0.04}, False),  # nothing else was asked
        ({"completions/distinct": 2 / 64}, False),  # yes and no
        ({"episode": lambda t: 640 + 64 * 15 * t}, False),  # not of the first rollout
        ({"policy/entropy_avg": lambda t: 0.3 * math.exp(-9 * t)}, False),
    ],
)
def test_a_model_that_has_one_answer_to_all_prompts_before_it_learns(changes: dict[str, Any], is_told: bool) -> None:
    log = RunLog.of(rows(**{**HEALTHY, **CERTAIN, **changes}), CONFIG)
    found = {one.name: one for one in diagnose(log)}
    assert ("prompts_unlike_the_model" in found) == is_told
    if is_told:
        assert "whatever it is asked, the model gives one answer" in found["prompts_unlike_the_model"].evidence
        cold = diagnose(replace(log, config={**CONFIG, "temperature": 0.1}))
        assert "prompts_unlike_the_model" not in [one.name for one in cold]


@pytest.mark.parametrize(
    ("share", "changes", "is_told"),
    [
        (0.2, {}, True),
        (0.06, {}, False),  # what a temperature of 1.4 makes
        (0.2, {"agreement/exact": 0.85}, False),  # it does no harm
        (0.9, {"objective/entropy": 60.0, "policy/entropy_avg": 7.0, "episode": lambda t: 64 + 960 * t}, False),
    ],
)
def test_a_tokenizer_that_takes_texts_to_other_pieces(share: float, changes: dict[str, Any], is_told: bool) -> None:
    """Of a model that writes noise no text is read as it was written."""
    metrics = {**HEALTHY, "agreement/exact": 0.5, "evidence/prompts/other_tokens": share, **changes}
    found = {one.name: one for one in diagnose(RunLog.of(rows(**metrics), CONFIG))}
    assert ("prompts_unlike_the_model" in found) == is_told
    if is_told:
        (top, *_) = roots(list(found.values()))
        assert top.finding.name == "prompts_unlike_the_model" and "21% of the tokens" in top.finding.evidence


@pytest.mark.parametrize(
    ("zeros", "score", "size", "severity"),
    [
        ((0, 1, 4, 6), {"objective/scores": 0.1}, 64, "problem"),
        ((0, 1, 4, 6), {}, 64, "warning"),  # it rises
        ((0, 1, 4, 6), {"objective/scores": 0.1}, 8, None),  # so few may be alike by chance
        ((0, 1, 4), {"objective/scores": 0.1}, 64, None),
        (range(12, 15), {"objective/scores": 0.1}, 64, None),  # what it has learned to do well may score alike
    ],
)
def test_scores_that_are_often_the_same(zeros: Any, score: dict[str, Any], size: int, severity: str | None) -> None:
    """In a third of the first twelve rollouts."""
    spread = {"objective/scores_std": [0.0 if i in zeros else 1.0 for i in range(16)]}
    log = RunLog.of(rows(**{**HEALTHY, **score, **spread}), {**CONFIG, "rollout_batch_size": size})
    found = {one.name: one for one in diagnose(log)}
    assert [one.severity for one in found.values() if one.name == "constant_scores"] == ([severity] if severity else [])
    if severity:
        assert found["constant_scores"].evidence.startswith("In 4 of the first 12 rollouts")


@pytest.mark.parametrize(("longest", "own"), [(6.0, True), (16.0, False), (None, False)])
def test_completions_that_are_cut_before_their_limit_are_cut_by_who_samples(longest: float | None, own: bool) -> None:
    lengths = {"completions/min_length": longest, "completions/mean_length": longest, "completions/max_length": longest}
    written = {} if longest is None else lengths
    log = RunLog.of(rows(**{**HEALTHY, **SICK["truncation"], **written}), {**CONFIG, "max_completion_length": 16})
    (finding,) = [one for one in diagnose(log) if one.name == "truncation"]
    assert ("has a limit of its own: no completion is longer than 6 tokens" in finding.cause) == own
    assert (not finding.suspects and not finding.remedy.changes) == own


@pytest.mark.parametrize(("cut", "mean", "least", "most"), [(0.75, 7.16, 5.0, 9.0), (1.0, 3.5, 2.0, 5.0)])
def test_completions_that_end_at_different_lengths_are_cut_by_no_limit(
    cut: float, mean: float, least: float, most: float
) -> None:
    names = ("clipped_ratio", "mean_length", "min_length", "max_length")
    lengths = {f"completions/{name}": value for name, value in zip(names, (cut, mean, least, most), strict=True)}
    log = RunLog.of(rows(**{**HEALTHY, **lengths}), {**CONFIG, "max_completion_length": 16})
    (finding,) = [one for one in diagnose(log) if one.name == "truncation"]
    assert "takes the EOS off" in finding.cause and "limit of its own" not in finding.cause
    assert not finding.suspects and not finding.remedy.changes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_no_measurement(value: float) -> None:
    """At the first rollout, at the last, or at all of them: a healthy run stays one, but where gradients are meant."""
    healthy = rows(**HEALTHY)
    metrics = {name for row in healthy for name in row if name != "step"}
    for name in metrics - {name for name in metrics if name.startswith("grad_norm")}:
        for places in ([0], [-1], range(len(healthy))):
            log = [dict(row) for row in healthy]
            for i in places:
                log[i][name] = value
            assert not names_of(RunLog.of(log, CONFIG)), (name, places)


@pytest.mark.slow
def test_a_metric_that_is_never_a_number_makes_no_problem_of_its_own() -> None:
    """In no sick log of PPO, and in none of a reward model or of DPO, there also at the first step alone."""
    ppo = [(RunLog.of(rows(**{**HEALTHY, **sick}), CONFIG), False) for sick in SICK.values()]
    reward = [(preference_log(REWARD, sick), True) for sick in ({}, *SICK_REWARD.values())]
    for log, once in (*ppo, *reward, *((preference_log(DPO, sick), True) for sick in ({}, *SICK_DPO.values()))):
        known = set(names_of(log))
        for name in {name for row in log.rows for name in row if name != "step" and not name.startswith("grad_norm")}:
            for spoilt in (log.rows, log.rows[:1]) if once else (log.rows,):
                never = [{**row, name: math.nan} for row in spoilt] + log.rows[len(spoilt) :]
                # Where the root of others is not seen any more, they are.
                new = set(names_of(replace(log, rows=never))) - known
                assert new <= {"no_progress", "unusual_settings"}, (name, new)


def test_a_weight_without_a_gradient_is_divided_by_nothing() -> None:
    log = rows(**{**HEALTHY, **SICK["gradients_not_finite"]})
    for epsilon, changes in ((0.0, {"adam_epsilon": 1e-8}), (1e-8, {"learning_rate": 1e-4})):
        config = {**CONFIG, "adam_epsilon": epsilon, "learning_rate": 1e-3}
        (found,) = [one for one in diagnose(RunLog.of(log, config)) if one.name == "gradients_not_finite"]
        assert found.remedy.changes == changes


def test_why_gradients_explode_is_said_where_something_shows_it() -> None:
    def found(**more: Any) -> Any:
        settings = {**CONFIG, "learning_rate": 1e-3, "max_grad_norm": 0.0}  # which is none
        norms = {**SICK["gradients_explode"], "grad_norm": SICK["gradients_explode"]["grad_norm/value"]}
        log = RunLog.of(rows(**{**HEALTHY, **norms, **more}), settings)
        return next(one for one in diagnose(log) if one.name == "gradients_explode")

    assert found(**{"objective/scores_std": [1.0] * 10 + [500.0] * 6}).remedy.changes == {
        "score_normalization": "running"
    }
    far = found(**{"policy/approxkl_avg": 0.3})
    assert "0.3 nats" in far.cause and far.remedy.changes == {"learning_rate": 1e-4, "max_grad_norm": 1.0}
    unknown = found()
    assert "cannot tell" in unknown.cause and not unknown.remedy.changes
    assert [one.changes for one in unknown.suspects] == [{"learning_rate": 1e-4}, {"max_grad_norm": 1.0}, {}]
    norms = [{"step": i, "loss": 0.5, "accuracy": 0.6, "grad_norm": 0.5 if i < 20 else 500.0} for i in range(40)]
    (other,) = [one for one in diagnose(RunLog.of(norms, {"learning_rate": 1e-3})) if one.name == "gradients_explode"]
    assert "does not say" in other.cause and [one.changes for one in other.suspects] == [
        {"learning_rate": 1e-4},
        {"max_grad_norm": 1.0},
    ]


def test_gradients_that_begin_at_nothing_do_not_explode() -> None:
    norms = {"grad_norm/value": [0.0] * 6 + [0.3] * 10, "objective/scores_std": [0.0] * 6 + [1.0] * 10}
    found = [one.name for one in diagnose(RunLog.of(rows(**{**HEALTHY, **norms}), CONFIG))]
    assert "gradients_explode" not in found and "constant_scores" in found
    late = {"grad_norm/value": 0.2, "grad_norm/policy": [0.0] * 10 + [0.1, 0.1, 0.2, 300.0, 800.0, 900.0]}
    assert "gradients_explode" in [one.name for one in diagnose(RunLog.of(rows(**{**HEALTHY, **late}), CONFIG))]


def test_what_few_prompts_explain_comes_with_learning() -> None:
    """Held-out prompts that score lower are those not learned by heart; how prompts are read was so before."""
    read = {"evidence/prompts/surprise": 18.0, "evidence/prompts/surprise_error": 0.1}
    log = RunLog.of(rows(**{**HEALTHY, **SICK["few_prompts"], **read}), CONFIG)
    lower = {"evidence/held_out/score_gap": 1.0, "evidence/held_out/score_gap_z": 9.0}
    for told, follows in ((lower, ["held_out_differs"]), ({**read, "evidence/prompts/surprise": 9.0}, [])):
        found = diagnose(replace(log, evals=[{"step": step, **told} for step in (8, 64, 128)]))
        assert "held_out_differs" in [one.name for one in found]
        (top,) = [one for one in roots(found) if one.finding.name == "few_prompts"]
        assert [one.finding.name for one in top.follows] == follows


@pytest.mark.parametrize(
    ("trained", "held_out", "logs", "severity"),
    [
        (0.3, 0.86, 16, "warning"),
        (0.2, 0.86, 16, "problem"),
        (0.3, 0.86, 2, None),  # chance
        (0.3, 0.5, 16, None),
        (0.6, 0.86, 16, None),
        (0.1, 0.45, 16, None),  # it is wrong for both
    ],
)
def test_a_score_that_is_right_for_held_out_prompts_alone(
    trained: float, held_out: float, logs: int, severity: str | None
) -> None:
    log = RunLog.of(rows(**{**HEALTHY, "agreement/exact": trained})[:logs], CONFIG)
    found = diagnose(replace(log, evals=[{"step": step, "agreement/exact": held_out} for step in (8, 64)]))
    assert [one.severity for one in found if one.name == "held_out_differs"] == ([severity] if severity else [])
    if severity:
        (top, *_) = roots(found)
        explained = ["score_unrelated"] if severity == "problem" else []
        assert top.finding.name == "held_out_differs" and [one.finding.name for one in top.follows] == explained
    once = diagnose(replace(log, evals=[{"step": 8, "agreement/exact": held_out}]))
    assert "warning" not in [one.severity for one in once if one.name == "held_out_differs"]


def test_places_that_decide_a_part_are_a_warning() -> None:
    """Errors by place, on a score that follows its purpose well enough to be learned from."""
    for agreement, severity in ((0.6, "warning"), (0.4, "problem")):
        found = found_in("score_misaligned", {**HEALTHY, **PLACED, "agreement/exact": agreement})
        assert found.severity == severity


def test_two_completions_of_a_group_that_score_alike() -> None:
    """Where a rollout has groups, a function that scores them alike ignores the completion."""
    metrics = {**HEALTHY, **SICK["score_ignores_completion"], **COMPARED}
    little = {**metrics, "evidence/share_of/judge": 0.2}  # another function makes the score
    for given, changes in ((metrics, {"num_generations": 4}), (little, {})):
        found = [one.name for one in diagnose(RunLog.of(rows(**given), {**CONFIG, **changes}))]
        assert "score_ignores_completion" in found


def test_a_temperature_at_which_no_text_is_read_as_it_was_written_says_nothing_of_the_tokenizer() -> None:
    metrics = {**HEALTHY, "agreement/exact": 0.5, "evidence/prompts/other_tokens": 0.3}
    for temperature, told in ((1.0, True), (1.5, False)):
        found = diagnose(RunLog.of(rows(**metrics), {**CONFIG, "temperature": temperature}))
        assert ("prompts_unlike_the_model" in [one.name for one in found]) == told


def test_suspects_keep_the_settings_that_the_trainer_has() -> None:
    """TRL's trainers have no missing_eos_penalty; where nothing is left of what would show a cause, it is not named."""
    of_trl = {"output_dir": "x", "max_completion_length": 16, "learning_rate": 1e-3, "rollout_batch_size": 64}
    cut = {**HEALTHY, **FLAT, "completions/clipped_ratio": lambda t: t}
    (found,) = [one for one in diagnose(RunLog.of(rows(**cut), of_trl)) if one.name == "truncation"]
    assert [one.changes for one in found.suspects] == [{"max_completion_length": 32}, {"learning_rate": 1e-4}, {}]


def test_copies_of_one_prompt() -> None:
    """Each prompt four times, and one answer for the four."""
    copies = {**SICK["copied_completions"], "prompts/distinct": [0.25] * 16, "completions/distinct": [0.25] * 16}
    (found,) = [one for one in diagnose(log_of(**copies)) if one.name == "copied_completions"]
    assert found.title == "The completions of one prompt are copies"
    short = {**copies, "objective/entropy": 3.5, "policy/entropy_avg": 0.5}
    assert "copied_completions" in names_of(log_of(**short)), "prompt for prompt"
    made = rows(**{**HEALTHY, **short})
    assert "copied_completions" in names_of(RunLog.of(made[:1], CONFIG)), "48 of 64 completions repeat another one"
    assert "copied_completions" not in names_of(RunLog.of(made[:1], {**CONFIG, "rollout_batch_size": 8})), (
        "six of eight"
    )
    certain = {**copies, "objective/entropy": 1.5, "policy/entropy_avg": 0.2}
    assert "copied_completions" not in names_of(log_of(**certain))
    blind_rows = rows(**{**HEALTHY, **short, "evidence/score/within_prompt": 0.0})
    blind = diagnose(RunLog.of(blind_rows, {**CONFIG, "num_generations": 4}))
    assert [top.finding.name for top in roots(blind)] == ["copied_completions"], "copies have one score"
    assert "copied_completions" not in names_of(log_of(**{**copies, "completions/distinct": 0.9}))


def test_rates_and_signals_are_noisy() -> None:
    """A gradient of chance: of two hundred healthy runs whose score does not move, few are called noise."""
    chance, false_alarms = random.Random(2), 0
    for _ in range(200):
        # The signal is a third of a rollout's noise, as in runs that learn; its estimate scatters as much as that.
        signal = [3e-5 + 3e-5 * chance.gauss(0, 1) for _ in range(16)]
        made = log_of(**{**SICK["noise_drowns_signal"], "evidence/gradient/signal": signal})
        log = RunLog(made.kind, made.rows, [], {**CONFIG, "per_device_train_batch_size": 8})
        false_alarms += any(
            noise_drowns_signal(RunLog(log.kind, log.rows[:count], [], log.config), Limits()) for count in range(3, 17)
        )
    assert false_alarms <= 2


def test_a_correlation_over_eight_answers_is_noise() -> None:
    """Two functions that know nothing of each other: r has a standard deviation of 1 / sqrt(7)."""
    chance, false_alarms = random.Random(0), 0
    for _ in range(200):
        drawn = {"rewards/correlation/judge~other": [chance.gauss(0, 7**-0.5) for _ in range(16)]}
        log = log_of(**{**SICK["functions_at_odds"], **drawn})
        logs = (RunLog(log.kind, log.rows[:count], [], CONFIG) for count in range(3, 17))
        false_alarms += any(functions_at_odds(log, Limits()) for log in logs)
    assert false_alarms <= 3


def test_a_plateau_is_no_decline() -> None:
    """The best of many windows lies above the last one by chance alone."""
    chance, false_alarms = random.Random(1), 0
    for _ in range(50):
        exact = [0.5 + 0.06 * chance.gauss(0, 1) for _ in range(300)]
        made = rows(300, **{"objective/scores": HEALTHY["objective/scores"], "yardstick/exact": exact})
        logs = (RunLog("ppo", made[:count]) for count in range(20, 301, 4))
        false_alarms += any(over_optimisation(log, Limits()) for log in logs)
    assert false_alarms <= 5


def test_steps_are_not_small_because_the_rate_is_warming_up_or_they_are_few() -> None:
    small = {**HEALTHY, **SICK["steps_too_small"]}
    warming = rows(**{**small, "learning_rate": lambda t: 4e-4 * t})
    assert names_of(RunLog.of(warming, CONFIG)) == ["no_progress"]
    running_out = rows(**{**small, "learning_rate": lambda t: 1e-3 * (1 - t)})
    assert names_of(RunLog.of(running_out, CONFIG)) == ["steps_too_small", "no_progress"]
    only_step = {**CONFIG, "num_ppo_epochs": 1, "num_mini_batches": 1}
    assert names_of(RunLog.of(rows(**small), only_step)) == ["no_progress"]
    (small_steps, _) = names_of(RunLog.of(rows(**small), {**only_step, "num_mini_batches": 2}))
    assert small_steps == "steps_too_small"


def test_a_penalty_that_long_answers_can_pay() -> None:
    """1,000 tokens do not spend 250 nats, so the default coefficient does not drown a score of spread 1."""
    still = {"objective/kl": 0.05, "objective/scores": 0.1, "completions/mean_length": 1000.0}
    assert names_of(log_of(**{**still, "objective/kl_coef": 0.05})) == ["no_progress"]
    (finding, _) = diagnose(log_of(**{**still, "objective/kl_coef": 0.5}))
    assert finding.name == "kl_drowns_score" and finding.remedy.changes == {"kl_coef": 0.04}


def test_float16_overflows_now_and_then() -> None:
    norms = [0.5, math.inf, math.inf] + [0.5] * 6 + [math.inf] + [0.5] * 6
    log = rows(**{**HEALTHY, "grad_norm": norms})
    assert names_of(RunLog.of(log, {**CONFIG, "fp16": True})) == []
    assert names_of(RunLog.of(log, CONFIG)) == ["gradients_not_finite"]
    lasting = rows(**{**HEALTHY, "grad_norm": [0.5] * 10 + [math.inf] * 6})
    assert names_of(RunLog.of(lasting, {**CONFIG, "fp16": True})) == ["gradients_not_finite"]


def test_answers_that_grow_where_nobody_knows_for_what() -> None:
    online = {"reward": lambda t: t, "reward_std": 1.0, "kl": 0.001}
    made = rows(**online, **{"completions/mean_length": lambda t: 300 + 150 * t})
    (finding,) = diagnose(RunLog.of(made, {"beta": 0.05}))
    assert (finding.name, finding.severity, finding.title) == ("length_exploitation", "warning", "Completions grow")


def test_a_kl_below_0_by_its_noise() -> None:
    """Where no spread is logged, the logs' own scatter says how far a mean of three may lie off."""
    online = {"reward": lambda t: t, "reward_std": 1.0, "completions/mean_length": 1000.0}
    noisy = [3e-4, -1e-4, -4e-4, 1e-4] * 3 + [2e-4, -5e-4, 0.0, -4e-4]
    assert names_of(RunLog.of(rows(**online, kl=noisy), {"beta": 0.05})) == []
    assert names_of(RunLog.of(rows(**online, kl=-5e-4), {"beta": 0.05})) == ["negative_kl"]


def test_several_sets_to_evaluate_on_have_losses_of_their_own() -> None:
    log = preference_log(REWARD, {"eval_accuracy": 0.55, "eval_loss": 0.5})
    evals = [{("a_loss" if name == "loss" else name): value for name, value in row.items()} for row in log.evals]
    (finding,) = diagnose(RunLog(log.kind, log.rows, evals, log.config))
    assert finding.name == "overfit" and "held-out loss" not in finding.evidence


REWARD: dict[str, Any] = {
    "loss": lambda t: 0.7 - 0.4 * t,
    "accuracy": lambda t: 0.55 + 0.35 * t,
    "margin": lambda t: 2 * t,
    "mean_reward": 0.1,
    "min_reward": -2.0,
    "max_reward": 2.0,
}
HELD_OUT: dict[str, Any] = {"eval_loss": lambda t: 0.7 - 0.35 * t, "eval_accuracy": lambda t: 0.55 + 0.33 * t}
SICK_REWARD: dict[str, dict[str, Any]] = {
    "overfit": {"eval_loss": lambda t: 0.6 + 0.9 * t, "eval_accuracy": 0.6, "accuracy": lambda t: 0.6 + 0.4 * t},
    "length_bias": {"data/longer_chosen": [0.9] + [math.nan] * 15},
    "chance_level": {"accuracy": 0.5, "eval_accuracy": 0.51},
    "uncentred": {"mean_reward": lambda t: 3 * t, "min_reward": lambda t: 3 * t - 1, "max_reward": lambda t: 3 * t + 1},
    "saturated": {"margin": lambda t: 20 * t, "mean_reward": 0.0},
}
DPO: dict[str, Any] = {
    "loss": lambda t: 0.69 - 0.3 * t,
    "rewards/chosen": lambda t: 0.5 * t,
    "rewards/rejected": lambda t: -t,
    "rewards/margins": lambda t: 1.5 * t,
    "rewards/accuracies": lambda t: 0.5 + 0.4 * t,
    "logps/chosen": lambda t: -20 + 3 * t,
    "logps/rejected": lambda t: -20 - 5 * t,
}
SICK_DPO: dict[str, dict[str, Any]] = {
    "likelihood_displacement": {
        "logps/chosen": lambda t: -20 - 8 * t + 0.1 * math.sin(40 * t),
        "logps/rejected": lambda t: -20 - 30 * t,
    },
    "chance_level": {"rewards/accuracies": 0.5},
    "margins_explode": {"rewards/margins": lambda t: 40 * t},
    "reference_mismatch": {"rewards/chosen": 1.0, "rewards/rejected": 0.9},
}


def preference_log(healthy: dict[str, Any], changes: dict[str, Any]) -> RunLog:
    """Training and evaluation logs; the first training log is that of step 1."""
    both = {**healthy, **HELD_OUT, **changes} if healthy is REWARD else {**healthy, **changes}
    made = rows(**both)
    made[0]["step"] = 1
    history = []
    for row in made:
        evaluated = {name: value for name, value in row.items() if name.startswith("eval_")}
        history.append({name: value for name, value in row.items() if name not in evaluated and not math.isnan(value)})
        if evaluated:
            history.append({"step": row["step"], **evaluated})
    return RunLog.of(history, {"learning_rate": 1e-3})


@pytest.mark.parametrize("healthy", [REWARD, DPO], ids=["reward", "dpo"])
def test_healthy_preference_training(healthy: dict[str, Any]) -> None:
    log = preference_log(healthy, {} if healthy is REWARD else {"rewards/chosen": lambda t: 0.5 * t})
    assert log.kind == ("reward" if healthy is REWARD else "dpo")
    assert diagnose(log) == []


@pytest.mark.parametrize("name", SICK_REWARD)
def test_each_problem_of_a_reward_model_is_named(name: str) -> None:
    names = [finding.name for finding in diagnose(preference_log(REWARD, SICK_REWARD[name]))]
    assert name in names[:2], names


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({}, "dpo"),
        ({"rewards/chosen": 0.3, "rewards/rejected": -0.2}, "dpo"),
        ({"rewards/chosen": -4.0, "rewards/rejected": -5.0}, "other"),  # 0.1 times each, without a reference: CPO, TPO
        ({"objective/kl": 0.5}, "other"),  # OnlineDPOTrainer
        ({"rewards/accuracies": None}, "other"),  # KTOTrainer
    ],
)
def test_only_dpo_is_read_as_dpo(more: dict[str, Any], kind: str) -> None:
    row = {"step": 1, "logps/chosen": -40.0, "logps/rejected": -50.0, "rewards/accuracies": 0.5, **more}
    log = RunLog.of([row], {"load_best_model_at_end": False})
    assert log.kind == kind
    assert kind == "dpo" or diagnose(log) == []


def test_epochs_to_stop_at_are_fewer_than_the_run_had() -> None:
    """Also where the run's length is not known."""
    history = [{"step": 10 * i, "epoch": i, "eval_loss": loss} for i, loss in ((1, 0.6), (2, 0.5), (3, 0.7))]
    history += [{"step": 10 * i + 1, "accuracy": 0.95, "loss": 0.3} for i in range(1, 4)]
    history += [{"step": 31, "epoch": 3, "eval_loss": 0.7, "eval_accuracy": 0.6}]
    for config in ({}, {"num_train_epochs": 3}, {"num_train_epochs": 3, "lr_scheduler_type": "constant"}):
        (found,) = [one for one in diagnose(RunLog.of(history, config)) if one.name == "overfit"]
        assert found.remedy.changes == {"num_train_epochs": 2}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"scale_rewards": "group", "beta": 0.04}, False),
        ({"scale_rewards": "none", "beta": 0.04}, True),
        ({"normalize_advantages": False, "beta": 0.04}, True),
        ({"normalize_advantages": True, "beta": 0.04}, False),
        ({}, False),
    ],
)
def test_the_scale_of_scores_is_nothing_to_advantages_that_are_normalised(config: dict[str, Any], told: bool) -> None:
    history = [
        {"step": i, "reward": 50 + i, "reward_std": 25.0, "kl": 0.01, "completions/mean_length": 100.0}
        for i in range(1, 9)
    ]
    log = RunLog.of(history, config)
    found = [one for one in diagnose(log) if one.name == "score_scale"]
    assert bool(found) is told
    assert not told or next(iter(found[0].remedy.changes)) in config
    suggested = suggested_kl_coef(log, Limits())
    assert suggested == pytest.approx(1.0 if told else 0.04), "the spread over 25 nats"
    for weights in ([10.0, 1.0], [0.05]):
        unusual = unusual_settings(RunLog.of(history, {**config, "reward_weights": weights}), Limits(), [])
        assert told or unusual is None


def test_a_kl_that_is_not_logged_is_no_evidence() -> None:
    history = [
        {"step": i, "reward": 0.1 * (-1) ** i, "reward_std": 1.0, "completions/mean_length": 9} for i in range(12)
    ]
    (found,) = diagnose(RunLog.of(history, {"learning_rate": 1e-4, "beta": 0.0}))
    assert found.name == "no_progress" and "KL" not in str(found) and "kl" not in found.figures
    assert all(not suspect.changes for suspect in found.suspects)


@pytest.mark.parametrize(("processes", "told"), [(1, False), (8, True)])
def test_noise_is_of_as_many_gradients_as_a_rollout_has(processes: int, told: bool) -> None:
    """64 micro-batches of one process, or two minibatches of several: a mean of fewer has more of the noise."""
    sizes = {"rollout_batch_size": 64, "per_device_train_batch_size": 1, "num_mini_batches": 2}
    log = RunLog.of(rows(**{**HEALTHY, **SICK["noise_drowns_signal"]}), {**CONFIG, **sizes, "world_size": processes})
    assert ("noise_drowns_signal" in names_of(log)) is told
    assert log.gradients == (64 if processes == 1 else 2)


def test_a_few_pairs_say_nothing_about_chance() -> None:
    """Eight pairs a log, a log a step: 38 steps make 300 pairs, and an accuracy is taken over as many."""
    history = [{"step": i + 1, "accuracy": 0.5, "margin": 0.1, "loss": 0.7} for i in range(60)]
    config = {"learning_rate": 1e-3, "per_device_train_batch_size": 8}
    counts = [len(diagnose(RunLog.of(history[:count], config))) for count in (6, 37, 38, 60)]
    assert counts == [0, 0, 1, 1]
    unlucky = [{**row, "accuracy": 0.9 if row["step"] <= 56 else 0.4} for row in history]
    assert diagnose(RunLog.of(unlucky, config)) == [], "four logs of eight pairs are noise"


@pytest.mark.parametrize("name", SICK_DPO)
def test_each_problem_of_dpo_is_named(name: str) -> None:
    names = [finding.name for finding in diagnose(preference_log(DPO, SICK_DPO[name]))]
    assert name in names[:2], names


@pytest.mark.parametrize(
    ("rate", "loss", "changes"),
    [
        (1e-6, 0.69, {"learning_rate": 3e-4}),
        (0.1, [0.7, 3.0] + [0.69] * 14, {"learning_rate": 1e-3}),
        (1e-3, 0.69, {}),  # as large as LoRA takes: the pairs are at fault
    ],
)
def test_chance_level_tells_steps_too_small_from_steps_too_large(
    rate: float, loss: Any, changes: dict[str, float]
) -> None:
    log = preference_log(REWARD, {"accuracy": 0.5, "eval_accuracy": 0.5, "loss": loss})
    log = RunLog(log.kind, log.rows, log.evals, {"learning_rate": rate})
    assert diagnose(log)[0].remedy.changes == changes


def test_a_value_loss_that_grows_is_no_finding_where_the_spread_of_scores_is_unknown() -> None:
    """As in the logs of TRL's PPOTrainer: scores that grow make the loss grow."""
    known = {**HEALTHY, "loss/value_avg": lambda t: 0.5 * math.exp(5 * t)}
    del known["objective/scores_std"]
    assert diagnose(RunLog.of(rows(**known), CONFIG)) == []


def test_training_is_to_end_where_the_held_out_loss_was_lowest() -> None:
    log = preference_log(REWARD, SICK_REWARD["overfit"])
    for i, row in enumerate(log.evals):
        row |= {"epoch": i + 1.0, "loss": 0.6 + 0.05 * abs(i - 4)}
    findings = {finding.name: finding for finding in diagnose(log)}
    assert findings["overfit"].remedy.changes == {"num_train_epochs": 8}
    of_twenty = RunLog(log.kind, log.rows, log.evals, {"num_train_epochs": 20})
    assert diagnose(of_twenty)[0].remedy.changes == {"num_train_epochs": round(10 * (1 - 5 / 40))}
    constant = RunLog(log.kind, log.rows, log.evals, {"lr_scheduler_type": "constant"})
    assert diagnose(constant)[0].remedy.changes == {"num_train_epochs": 5}
    history = [{"step": 4, "epoch": 2.0, "eval_loss": 0.5, "eval_accuracy": 0.6}]
    assert RunLog.of(history).evals == [{"step": 4, "epoch": 2.0, "loss": 0.5, "accuracy": 0.6}]


def test_margins_that_the_data_ask_for_are_not_blamed_on_the_steps() -> None:
    saturated = {**SICK_REWARD["saturated"], "data/margin": [25.0] + [math.nan] * 15}
    (finding,) = diagnose(preference_log(REWARD, saturated))
    assert finding.remedy.changes == {} and "/ 25" in finding.remedy.code
    displaced = preference_log(DPO, SICK_DPO["margins_explode"])
    (finding,) = diagnose(RunLog(displaced.kind, displaced.rows, config={"beta": 10.0}))
    assert finding.remedy.changes == {"beta": 0.1}


def test_trl_s_samplers_are_read_under_their_own_names() -> None:
    """GRPOTrainer and RLOOTrainer log KL a token, and call the coefficient beta."""
    made = rows(
        **{
            "reward": lambda t: t + 0.05 * math.sin(40 * t),
            "reward_std": 1.0,
            "kl": lambda t: 0.9 * t,
            "entropy": 0.4,
            "completions/mean_length": 10.0,
            "completions/clipped_ratio": 0.0,
        }
    )
    log = RunLog.of(made, {"beta": 0.001})
    assert log.kind == "online"
    assert log.series("kl").recent(1) == pytest.approx(0.9 * 10.0, rel=0.05)
    (finding,) = diagnose(log)
    assert finding.name == "kl_runs_away" and set(finding.remedy.changes) == {"beta"}


def test_limits_are_the_users() -> None:
    log = log_of(**SICK["truncation"])
    assert diagnose(log, Limits(truncated=0.99)) == []


def test_rules_are_the_users() -> None:
    def too_long(log: RunLog, limits: Limits) -> Finding | None:
        length = log.series("length").recent()
        if length < 5:
            return None
        return Finding(
            name="too_long",
            severity="warning",
            title="Too long",
            steps=log.steps,
            evidence="Long.",
            figures={},
            cause="Words.",
            remedy=Remedy(text="Fewer."),
        )

    assert [finding.name for finding in diagnose(log_of(), rules=[too_long])] == ["too_long"]


@pytest.mark.parametrize(("kl", "changes"), [(0.01, {"kl_coef": 0.1}), (2.0, {"learning_rate": 1e-4})])
def test_a_score_that_does_not_rise_is_asked_first_what_the_kl_suggests(kl: float, changes: dict[str, float]) -> None:
    (found,) = diagnose(log_of(**{"objective/scores": 0.1, "objective/kl": kl}))
    assert found.name == "no_progress" and found.suspects[0].changes == changes


def test_scores_that_are_alike_and_rise_all_the_same_are_worth_a_look_only() -> None:
    for score, severity in ((0.1, "problem"), (HEALTHY["objective/scores"], "warning")):
        (found,) = [
            one
            for one in diagnose(log_of(**{**SICK["scores_alike"], "objective/scores": score}))
            if one.name == "scores_alike"
        ]
        assert found.severity == severity


def test_one_yardstick_that_agrees_a_little_is_enough() -> None:
    assert names_of(log_of(**{"agreement/exact": 0.8, "agreement/other": 0.0})) == []
    (finding,) = diagnose(log_of(**{"agreement/exact": 0.4, "agreement/other": 0.0}))
    assert finding.severity == "warning"


def test_prompts_that_held_completions_at_the_start_are_named_later_too() -> None:
    held = [0.8] * 3 + [0.1] * 13
    assert "prompts_hold_completions" in names_of(log_of(**{"prompts/hold_completion": held}))


def test_few_prompts_are_a_problem_where_they_are_very_few() -> None:
    for distinct, severity in ((1 / 16, "problem"), (1 / 4, "warning")):
        (found,) = diagnose(log_of(**{"prompts/distinct": distinct}))
        assert (found.name, found.severity) == ("few_prompts", severity)


def test_a_score_may_rise_slowly_or_for_a_while() -> None:
    slowly = [0.07 * i + (-1) ** i for i in range(40)]  # no four logs in a row lie clearly above the first four
    assert Series(list(range(40)), slowly).ever_rose(3.0) and not Series(list(range(20)), slowly[:20]).ever_rose(3.0)
    for_a_while = [0.1 * (-1) ** i + 2.0 * (10 <= i < 16) for i in range(40)]
    assert Series(list(range(40)), for_a_while).ever_rose(3.0)


@pytest.mark.parametrize("logs", [12, 200])
def test_chance_rises_no_oftener_in_a_long_run(logs: int) -> None:
    chance = random.Random(3)
    drawn = (Series(list(range(logs)), [chance.gauss(0, 1) for _ in range(logs)]) for _ in range(500))
    assert sum(one.ever_rose(3.0) for one in drawn) <= 15, "of 500 where nothing rises: 2%, with a margin"


def test_noise_is_not_the_trend() -> None:
    line = Series(list(range(50)), [0.1 * i for i in range(50)])
    assert line.noise() == pytest.approx(0.1 / math.sqrt(2))
    gained, errors = line.rise()
    assert gained == pytest.approx(4.75 - 0.15, abs=1e-9) and errors > 50
    assert Series([0, 1], [2.0, 2.0]).rise() == (0.0, 0.0)


# Folders -------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    history = rows(**{**HEALTHY, **changes})
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 128, "log_history": history}))
    (folder / "run.json").write_text(json.dumps({"settings": CONFIG, "versions": {"trl": "1.16.0"}}))
    return folder


def test_a_run_s_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", **SICK["truncation"])
    (folder / "completions").mkdir()
    table = pd.DataFrame(
        {"step": [8, 8], "prompt": ["a", "b"], "completion": ["x", "y"], "score": [0.5, 2.0], "kl": [0.1, 0.2]}
    )
    table.to_parquet(folder / "completions" / "completions_00008.parquet")
    log = read_run(folder)
    assert log.samples[1] == Sample(step=8, prompt="b", completion="y", score=2.0, kl=0.2)
    assert [finding.samples[0].completion for finding in diagnose(log)] == ["y"]
    assert main(["doctor", str(folder)]) == 0
    assert "Completions are cut off before they end" in capsys.readouterr().out
    assert main(["doctor", str(folder), "--strict", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)[0]["page"] == "docs/diagnostics/truncation.md"


def test_the_page_of_a_problem(capsys: pytest.CaptureFixture[str]) -> None:
    """Every finding names its page, which is there without a clone, too (the wheel holds docs/diagnostics)."""
    for name in {**SICK, **SICK_REWARD, **SICK_DPO}:
        assert page(name).startswith("# ")
    assert main(["explain", "truncation"]) == 0
    assert "Completions are cut off before they end" in capsys.readouterr().out
    assert main(["explain", "truncated"]) == 1
    assert "do you mean 'truncation'?" in capsys.readouterr().err
    assert main(["explain", "sources"]) == 1, "a page about all problems is none of them"
    finding = diagnose(log_of(**SICK["truncation"]))[0]
    assert str(finding).endswith("More: trl-ext explain truncation.")


def test_a_trainer_without_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 5)]
    state = {"global_step": 4, "log_history": rows}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    assert main(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no rules for this trainer" in out and "Nothing stands out" not in out


def test_trl_s_completions_have_a_column_a_function(tmp_path: Path) -> None:
    logged = {f"rewards/{name}/{figure}": 0.5 for name in ("short", "clean") for figure in ("mean", "std")}
    folder = write_run(tmp_path, **logged)
    settings = {"reward_names": ["clean", "short"], "reward_weights": [2.0, 1.0]}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "completions").mkdir()
    table = pd.DataFrame(
        {
            **{"step": [3] * 3, "prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "advantage": [9.0] * 3},
            **{"short": [0.5, 0.5, math.nan], "clean": [0.25, math.nan, math.nan]},  # NaN: it did not score this one
            "answer_length": [230.0] * 3,  # of log_extra
        }
    )
    table.to_parquet(folder / "completions" / "completions_00003.parquet")
    first, second, third = read_run(folder).samples
    assert first.score == 0.5 + 2 * 0.25 and math.isnan(first.kl)
    assert second.score == 0.5 and math.isnan(third.score), "as TRL adds them up"


def test_of_several_checkpoints_the_last_one_counts(tmp_path: Path) -> None:
    for step in (100, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"global_step": step, "log_history": [{"step": step, "objective/kl": 1.0}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    assert read_run(tmp_path).steps == (100, 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no trainer_state.json"), ("{", "is no JSON"), ("[]", "holds no JSON object")],
)
def test_folders_without_a_run(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "trainer_state.json").write_text(content)
    assert main(["doctor", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "nowhere"]) == 1
    assert capsys.readouterr().err == "trl-ext: error: The run folder 'nowhere' does not exist.\n"


def told(**metrics: Any) -> dict[str, Any]:
    return {one.name: one for one in diagnose(RunLog.of(rows(**{**HEALTHY, **metrics}), CONFIG))}


@pytest.mark.parametrize("name", [*HEALTHY, *PLACED])
def test_no_metric_that_is_zero_or_none_or_missing_ends_a_diagnosis(name: str) -> None:
    """A doctor that raises would end the run that it watches."""
    healthy = {**HEALTHY, **PLACED}
    missing = {other: value for other, value in healthy.items() if other != name}
    for metrics in (missing, *({**healthy, name: [value] * 16} for value in (0.0, math.nan, math.inf))):
        for count in (1, 2, 3, 16):
            log = RunLog.of(rows(**metrics)[:count], CONFIG)
            assert all(isinstance(one, Finding) for one in diagnose(log))


def test_scores_that_go_with_the_place_belong_to_other_rows() -> None:
    """In the same order they repeat, in another one they do not."""
    found = told(**PLACED)["score_misaligned"]
    assert found.severity == "problem" and "their places decide" in found.evidence
    (top, *_) = roots(list(told(**PLACED).values()))
    assert top.finding.name == "score_misaligned", "that they do not repeat follows from it"
    assert "score_misaligned" not in told(**{**PLACED, "evidence/noise_by_chance/judge": 0.9})


def test_scores_that_are_compared_with_their_neighbours_are_no_noise() -> None:
    by_chance = told(**{**PLACED, "evidence/noise_by_chance/judge": 0.9})["score_not_repeatable"]
    compared = told(**{**PLACED, "evidence/noise_by_place/judge": 0.0})["score_not_repeatable"]
    unknown = told(**{"evidence/noise/judge": 0.9})["score_not_repeatable"]
    assert (by_chance.severity, compared.severity, unknown.severity) == ("problem", "warning", "problem")
    assert "beside other ones" in compared.title and "beside it" in compared.cause
    assert "draws random numbers" in by_chance.cause and "draws random numbers" in unknown.cause


@pytest.mark.parametrize(
    ("kind", "kwargs", "is_told"),
    [
        ("reduce_lr_on_plateau", None, True),
        ("warmup_stable_decay", {"num_decay_steps": 8}, True),
        ("cosine_with_restarts", None, False),
        ("cosine", {"num_cycles": 2}, False),
    ],
)
def test_a_rate_that_ends_early_is_told_whatever_the_schedule_is_called(
    kind: str, kwargs: dict[str, Any] | None, is_told: bool
) -> None:
    config = {**CONFIG, "lr_scheduler_type": kind, "lr_scheduler_kwargs": kwargs, "max_steps": 128}
    log = RunLog.of(rows(**{**HEALTHY, "learning_rate": lambda t: 1e-3 * max(0.0, 1 - 3 * t)}), config)
    found = {one.name: one for one in diagnose(log)}.get("rate_off_schedule")
    assert (found is not None) == is_told
    if found is not None:
        assert found.remedy.changes == {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}


def test_a_rate_that_warms_up_for_half_of_the_run_is_to_warm_up_for_nothing() -> None:
    config = {**CONFIG, "lr_scheduler_type": "constant_with_warmup", "max_steps": 128}
    log = RunLog.of(rows(**{**HEALTHY, "learning_rate": lambda t: 1e-3 * (0.01 + 0.99 * t)}), config)
    (found,) = [one for one in diagnose(log) if one.name == "rate_off_schedule"]
    assert found.title == "The learning rate warms up for half of the run"
    assert found.remedy.changes == {"warmup_steps": 0}


@pytest.mark.parametrize("logs", [0, 1])
def test_a_rate_that_will_be_off_is_told_before_it_is(logs: int) -> None:
    def told(factor: Any, **config: Any) -> set[str]:
        planned = [(step, 1e-3 * factor(step / 128)) for step in range(0, 129, 4)]
        log = RunLog.of(rows(**{**HEALTHY, "learning_rate": 1e-3})[:logs], CONFIG | config | {"planned_rates": planned})
        return {one.title for one in diagnose(replace(log, kind="ppo")) if one.name == "rate_off_schedule"}

    assert told(lambda t: max(0.0, 1 - 3 * t)) == {"The learning rate is near 0 in the first half of the run"}
    warmed = {"lr_scheduler_type": "constant_with_warmup"}
    assert told(lambda t: min(t / 0.7, 1), **warmed) == {"The learning rate warms up for half of the run"}
    assert told(lambda t: 3.0) == {"The learning rate is higher than its setting"}
    assert told(lambda t: 1.0) == told(lambda t: min(t / 0.1, 1 - t), lr_scheduler_type="linear") == set()


def test_a_setting_that_its_finding_names_is_not_blamed_by_another() -> None:
    """kl_drowns_score says what kl_coef should be, also where another cause comes first."""
    sick = {**SICK["kl_drowns_score"], "evidence/noise/judge": 0.9, "val/explained_variance": 0.0}
    log = RunLog.of(rows(**{**HEALTHY, **sick}), {**CONFIG, "kl_coef": 10.0})
    names = [top.finding.name for top in roots(diagnose(log))]
    assert "kl_drowns_score" in names and "unusual_settings" not in names


def test_the_best_by_a_metric_that_only_a_policy_that_has_not_learned_keeps_low() -> None:
    """Two standard errors are none, and an early one is right where the yardstick says so."""
    best_by_kl = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_objective/kl",
        "greater_is_better": False,
    }

    def told(exact: Any, evals: int = 6, first: int = 0) -> bool:
        history = rows(**HEALTHY)
        for i in range(first, evals):
            evaluated = {
                "eval_objective/kl": 0.1 * (i + 1),
                "eval_objective/scores": 0.0,
                "eval_yardstick/exact": exact(i),
            }
            history.append({"step": 16 * (i + 1), **evaluated})
        return "wrong_checkpoint" in [one.name for one in diagnose(RunLog.of(history, CONFIG | best_by_kl))]

    assert told(lambda i: 3 + 0.2 * i + 0.02 * (-1) ** i)
    assert not told(lambda i: 3 + 0.02 * i + 0.2 * (-1) ** i), "chance"
    assert not told(lambda i: 4 - 0.2 * i), "the first one is the best"
    assert not told(lambda i: 3 + 0.5 * i, evals=2)
    at_start = lambda i: 1.0 if i < 0 else 4 + 0.01 * (-1) ** i  # noqa: E731
    assert not told(at_start, first=-1), "nothing is saved of the evaluation before the run"


def test_the_best_checkpoint_of_trls_trainers_is_judged_by_their_reward() -> None:
    history: list[dict[str, Any]] = [{"step": 8, "reward": 0.0, "reward_std": 1.0, "completions/mean_length": 8.0}]
    history += [{"step": 8 * i, "eval_loss": 0.1 * i, "eval_reward": i + 0.1 * (i % 2)} for i in range(1, 7)]
    (found,) = diagnose(RunLog.of(history, {"load_best_model_at_end": True}))
    assert found.name == "wrong_checkpoint" and "by reward that of step 8 is 4.9 below the last one's" in found.evidence
    assert "metric_for_best_model='reward'" in found.remedy.code


def test_a_score_that_falls_while_the_yardstick_does_not_has_changed_its_meaning() -> None:
    falling: dict[str, Any] = {
        "objective/scores": lambda t: 0.5 - t + 0.03 * math.sin(40 * t),
        "agreement/exact": lambda t: 0.9 - 0.95 * t,
        "yardstick/exact": lambda t: 3 + 0.02 * math.sin(50 * t),
    }

    def told(**metrics: Any) -> set[str]:
        return {one.name for one in diagnose(RunLog.of(rows(**{**HEALTHY, **falling, **metrics}), CONFIG))}

    assert "score_drifts" in told()
    assert "score_drifts" not in told(**{"yardstick/exact": lambda t: 3 - t + 0.02 * math.sin(50 * t)})
    assert "score_drifts" not in told(**{"agreement/exact": lambda t: 0.9 - 0.5 * t})
    assert "score_drifts" not in told(**{"objective/kl": lambda t: 90 * t}), "who has run away earns other scores"
    assert "score_drifts" not in told(**{"objective/scores": lambda t: 0.5 + t + 0.03 * math.sin(40 * t)})


def test_what_nearly_repeats_is_a_state_and_no_place() -> None:
    placed = {**PLACED, "evidence/noise_by_place/judge": 0.35}
    for chance, name in ((0.0, "score_misaligned"), (0.08, "score_not_repeatable")):
        log = RunLog.of(rows(**{**HEALTHY, **placed, "evidence/noise_by_chance/judge": chance}), CONFIG)
        assert roots(diagnose(log))[0].finding.name == name


@pytest.mark.parametrize(
    "settings",
    [
        {"load_best_model_at_end": False},
        {"greater_is_better": True},
        {"greater_is_better": None},  # Transformers takes the highest of what is no loss
        {"metric_for_best_model": "eval_loss"},
        {"metric_for_best_model": "some/metric"},
        {"metric_for_best_model": "objective/scores_std"},
        {"metric_for_best_model": "rewards/judge/std"},
        {"metric_for_best_model": "reward_calls"},
    ],
)
def test_the_best_checkpoint_may_be_the_best(settings: dict[str, Any]) -> None:
    log = sick_log("wrong_checkpoint")
    assert "wrong_checkpoint" in [one.name for one in diagnose(log)]
    assert "wrong_checkpoint" in [one.name for one in diagnose(RunLog("ppo", [], config=log.config))]
    assert diagnose(replace(log, config={**log.config, **settings})) == []


@pytest.mark.parametrize(("agreement", "explains"), [([0.1, -0.1] * 8, True), ([0.5] * 16, False)])
def test_a_score_that_follows_in_part_explains_no_run_that_goes_away(agreement: list[float], explains: bool) -> None:
    away = {"objective/kl": lambda t: 30 * t, "agreement/exact": agreement}
    tops = [top.finding.name for top in roots(diagnose(RunLog.of(rows(**{**HEALTHY, **away}), CONFIG)))]
    assert "score_unrelated" in tops and ("kl_runs_away" not in tops) == explains


@pytest.mark.parametrize(("rate", "explains"), [(1e-3, True), (1e-6, False)])
def test_noise_explains_small_steps_at_a_usual_rate_alone(rate: float, explains: bool) -> None:
    sick = {**HEALTHY, **SICK["noise_drowns_signal"], **SICK["steps_too_small"]}
    log = RunLog.of(rows(**sick), {**CONFIG, **SETTINGS["noise_drowns_signal"], "learning_rate": rate})
    found = [one.name for one in diagnose(log)]
    tops = [top.finding.name for top in roots(diagnose(log))]
    assert {"noise_drowns_signal", "steps_too_small"} <= {*found}
    assert ("steps_too_small" not in tops) == explains
