"""Rules about distributions: sampled, scored, trained, and kept near the reference."""

from __future__ import annotations

import math

from trl_ext.diagnostics.finding import Finding, Remedy
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog
from trl_ext.diagnostics.updates import lower_rate

# What leaves sampling as it is: PPO's log-probabilities know the temperature, and nothing else.
PLAIN_SAMPLING = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}


def sampling_differs(log: RunLog, limits: Limits) -> Finding | None:
    """Answers are drawn from another distribution than they are scored and trained under."""
    z, gap = log.series("val/sampling_gap_z"), log.series("val/sampling_gap")
    if not z:
        return None
    total = sum(z.values) / math.sqrt(len(z))
    if abs(total) < limits.sampling_gap_z or abs(gap.recent(len(gap))) < limits.sampling_gap:
        return None
    return Finding(
        "sampling_differs",
        "problem",
        "Answers are sampled from another distribution than they are scored under",
        (z.steps[0], z.steps[-1]),
        f"Sampled tokens are {gap.recent(len(gap)):+.3f} nats more surprising than the policy's entropy says, "
        f"{abs(total):.0f} standard errors from 0.",
        {"gap": gap.recent(len(gap)), "z": total},
        "generation settings that log-probabilities do not know: top_k, top_p, min_p, a repetition penalty, or "
        "generation_kwargs that forbid or force tokens.",
        _plain_sampling(log),
        log.last_samples(),
    )


def negative_kl(log: RunLog, limits: Limits) -> Finding | None:
    """The KL to the reference is below 0, which no KL is."""
    kl, spread = log.series("kl"), log.series("objective/kl_std")
    if len(kl) < 3:
        return None
    recent = kl.recent(3)
    answers = float(log.setting("rollout_batch_size", 1))
    error = (spread.recent(3) / math.sqrt(answers) if spread else kl.noise()) / math.sqrt(3)
    if recent > -limits.negative_kl or recent > -limits.noticeable * error:
        return None
    return Finding(
        "negative_kl",
        "problem",
        "The KL to the reference is negative",
        (kl.steps[-3], kl.steps[-1]),
        f"The last three logs have a mean KL of {recent:.2f} nats an answer (standard error {error:.2f}).",
        {"kl": recent, "error": error},
        "the policy was trained on answers that it would not have given: sampling and scoring differ.",
        _plain_sampling(log),
        log.last_samples(),
    )


def _plain_sampling(log: RunLog) -> Remedy:
    known = {name: value for name, value in PLAIN_SAMPLING.items() if name in log.config}
    differing = {name: value for name, value in known.items() if log.config[name] != value}
    return Remedy("Sample from the whole distribution, at the temperature that is scored.", differing or PLAIN_SAMPLING)


def first_ratio(log: RunLog, limits: Limits) -> Finding | None:
    """Before the first step on a rollout the policy is the one that sampled it; the losses say that it is not."""
    first = log.series("policy/first_approxkl")
    if not first or first.recent() < (limits.first_approxkl_half if log.in_half_precision else limits.first_approxkl):
        return None
    return Finding(
        "first_ratio",
        "problem",
        "The probability ratio is not 1 before the first step on a rollout",
        (first.steps[0], first.steps[-1]),
        f"Policy and sampling policy are {first.recent():.2g} nats a token apart where they are the same weights.",
        {"first_approxkl": first.recent()},
        "training computes other log-probabilities than scoring did: dropout in training, another precision, or a "
        "callback that changed log-probabilities or completions.",
        Remedy(
            "Switch dropout off, and let forward passes with and without gradient run in the same precision.",
            {"disable_dropout": True},
        ),
    )


def suggested_kl_coef(log: RunLog, limits: Limits) -> float:
    """The coefficient at which spending the KL budget costs one standard deviation of the scores; NaN if unknown."""
    spread, length = log.series("score_std"), log.series("length")
    if not spread or not length or spread.start() == 0.0:
        return math.nan
    return spread.start() / _budget(length.start(), limits)


def _budget(tokens: float, limits: Limits) -> float:
    """The KL that an answer of so many tokens may well spend, nats."""
    return min(limits.budget_per_token * max(tokens, 1.0), limits.budget)


def stronger(log: RunLog, limits: Limits) -> dict[str, float]:
    """A larger coefficient: the suggested one, or four times the present one where that is more; empty if unknown."""
    now = log.series("kl_coef").recent()
    now = now if now == now else float(log.setting(_field(log), 0.0))
    value = max(v for v in (suggested_kl_coef(log, limits), 4 * now, 0.0) if v == v)
    return {_field(log): float(f"{value:.1g}")} if value else {}


def _field(log: RunLog) -> str:
    return "beta" if log.kind == "online" else "kl_coef"


def _coefficient(changes: dict[str, float]) -> Remedy:
    return Remedy(
        "Take a coefficient at which the scores' spread buys a moderate KL, or let AdaptiveKLCallback hold a target.",
        changes,
    )


def kl_runs_away(log: RunLog, limits: Limits) -> Finding | None:
    """The policy leaves the reference without a hold."""
    kl, length, coefficient = log.series("kl"), log.series("length"), log.series("kl_coef")
    if len(kl) < 3:
        return None
    # Without lengths, as in TRL 1.12's logs: Ziegler et al. 2019 held 6 nats an answer, and lost the language at 40.
    tokens = length.recent() if length else 60.0
    if kl.recent() < limits.kl_per_token * tokens or kl.recent() < kl.start():
        return None
    known = f" with kl_coef {coefficient.recent():.3g}" if coefficient else ""
    return Finding(
        "kl_runs_away",
        "problem",
        "The KL to the reference runs away",
        (kl.steps[0], kl.steps[-1]),
        f"From {kl.start():.2f} to {kl.recent():.2f} nats an answer, {kl.recent() / tokens:.2f} a token{known}.",
        {"kl": kl.recent(), "kl_per_token": kl.recent() / tokens},
        "the penalty is too weak for the scale of the scores, so the policy follows the score wherever it goes.",
        _coefficient(stronger(log, limits)),
        log.last_samples(),
    )


def kl_drowns_score(log: RunLog, limits: Limits) -> Finding | None:
    """The penalty is so strong that the score does not count."""
    kl, length, coefficient, score = (log.series(name) for name in ("kl", "length", "kl_coef", "score"))
    suggested = suggested_kl_coef(log, limits)
    if len(kl) < limits.least_rows or not coefficient or suggested != suggested:
        return None
    stays = abs(kl.recent()) < limits.stays * _budget(length.recent(), limits)
    gained = score.rise()[1] > limits.noticeable
    if not stays or gained or coefficient.recent() < limits.drowned * max(suggested, 1e-6):
        return None
    return Finding(
        "kl_drowns_score",
        "problem",
        "The KL penalty drowns the score",
        log.steps,
        f"kl_coef is {coefficient.recent():.3g} where the scores' spread ({log.series('score_std').start():.2g}) suits "
        f"{suggested:.2g}; KL stays at {kl.recent():.3f} nats an answer and the score does not rise.",
        {"kl": kl.recent(), "kl_coef": coefficient.recent(), "suggested": suggested},
        "any step away from the reference costs more than the score can repay.",
        _coefficient({_field(log): float(f"{suggested:.1g}")}),
    )


def entropy_collapse(log: RunLog, limits: Limits) -> Finding | None:
    """The policy has stopped trying anything, or never began to."""
    entropy = log.series("entropy")
    if len(entropy) < limits.least_rows or entropy.recent() > limits.entropy:
        return None
    temperature = float(log.setting("temperature", 1.0))
    sharp = temperature < limits.temperature
    slower, bonus = lower_rate(log, 3), max(0.01, 2 * float(log.setting("entropy_coef", 0.0)))
    return Finding(
        "entropy_collapse",
        "problem",
        "The policy tries nothing" if sharp else "The policy's entropy has collapsed",
        (entropy.steps[0], entropy.steps[-1]),
        f"From {entropy.start():.3f} to {entropy.recent():.4f} nats a token: every answer is certain, and "
        "sampling teaches nothing.",
        {"entropy": entropy.recent(), "start": entropy.start()},
        f"answers are sampled at temperature {temperature:g}, and PPO learns from the differences between answers."
        if sharp
        else "too large steps, or too weak a KL penalty, let the policy settle on what it happened to try first.",
        Remedy("Sample at temperature 1 in training; answer at a lower one afterwards.", {"temperature": 1.0})
        if sharp
        else Remedy(
            "Smaller steps, a stronger KL penalty, or an entropy bonus.",
            {**slower, "entropy_coef": bonus} if log.kind != "online" else slower,
        ),
        log.last_samples(),
    )
