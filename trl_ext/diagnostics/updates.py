"""Rules about optimizer steps: their size, their gradients, and the value role."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import dropwhile
from statistics import median
from typing import Any

from trl_ext.diagnostics.finding import CANNOT_TELL, TRY_EACH, Finding, Remedy, Suspect
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Series
from trl_ext.diagnostics.remedies import NO_EPSILON, value_weight_is_idle
from trl_ext.diagnostics.signal import noise_of


def gradients_not_finite(log: RunLog, limits: Limits) -> Finding | None:
    """Gradients that are NaN or infinite."""
    for name in ("grad_norm", "grad_norm/policy", "grad_norm/value"):
        norms = log.series(name, finite=False)
        broken = [step for step, value in zip(norms.steps, norms.values, strict=True) if not math.isfinite(value)]
        # In float16 gradients are scaled up until they overflow, again and again: such a step is skipped.
        lasting = len(broken) >= limits.least_rows and broken[-limits.least_rows :] == norms.steps[-limits.least_rows :]
        if broken and (lasting or not log.setting("fp16")):
            return Finding(
                name="gradients_not_finite",
                severity="problem",
                title="Gradients are not finite",
                steps=(broken[0], broken[-1]),
                evidence=f"{name} is NaN or infinite in {len(broken)} logs, first at step {broken[0]}.",
                figures={"logs": float(len(broken))},
                **_why_not_finite(log),
            )
    return None


def _why_not_finite(log: RunLog) -> dict[str, Any]:
    """Cause and remedy. Adam divides by the size of each weight's gradients. At the first step that is 0 for an
    adapter's A, for B is 0 there."""
    if float(log.setting("adam_epsilon", math.nan)) < NO_EPSILON:
        text = "Keep a small number in Adam's denominator."
        return {
            "cause": "adam_epsilon is 0 or nearly so: a weight that has no gradient yet is divided by nothing.",
            "remedy": Remedy(text=text, changes={"adam_epsilon": 1e-8}),
        }
    return {
        "cause": (
            "an overflow in half precision, a division by 0 in a reward function, or steps so large that weights blew "
            "up."
        ),
        "remedy": Remedy(text="Lower the learning rate; in fp16 change to bf16.", changes=lower_rate(log, 10)),
    }


def gradients_absent(log: RunLog, limits: Limits) -> Finding | None:
    """Gradients that never arrive at a role."""
    for role in ("policy", "value"):
        norms = log.series(f"grad_norm/{role}")
        if len(norms) >= 2 and max(norms.values[-3:]) == 0.0 and log.series("score_std").recent(3) != 0.0:
            return Finding(
                name="gradients_absent",
                severity="problem",
                title=f"No gradient reaches the {role} role",
                steps=(norms.steps[-3:][0], norms.steps[-1]),
                evidence=f"grad_norm/{role} has been exactly 0 in the last {len(norms.values[-3:])} logs.",
                figures={"grad_norm": 0.0},
                cause=f"the {role}'s adapter or head is frozen, or its loss has weight 0.",
                remedy=Remedy(
                    text=(
                        f"Let trainer.base.trainable_parameters({role!r}) require gradients, and give its loss a "
                        "weight."
                    ),
                    changes={"vf_coef": 0.1} if role == "value" else {},
                ),
            )
    return None


def gradients_explode(log: RunLog, limits: Limits) -> Finding | None:
    """Gradients a hundred times as large as at the start."""
    # Trainers log the norm of one step, which tells little about the others; ours also logs a mean for each role.
    roles = [log.series(f"grad_norm/{role}") for role in log.names("grad_norm/")]
    for norms in roles or [log.series("grad_norm")]:
        began = list(dropwhile(lambda norm: norm == 0, norms.values))  # the value role may be trained alone at first
        usual = median(began[: min(limits.least_rows, len(began) // 2)] or [0.0])
        if len(norms) <= limits.least_rows or norms.lasting() < limits.gradient_growth * max(usual, 1e-8):
            continue
        spread = log.series("score_std")
        rescaled = bool(spread) and spread.recent(2) > limits.score_drift * spread.start()
        return Finding(
            name="gradients_explode",
            severity="problem",
            title="Gradients explode",
            steps=(norms.steps[0], norms.steps[-1]),
            evidence=f"The gradient norm is {norms.recent(2):.3g}, at the start it was {usual:.3g}.",
            figures={"grad_norm": norms.recent(2), "start": usual},
            **_why_gradients_explode(log, limits, rescaled),
        )
    return None


def _why_gradients_explode(log: RunLog, limits: Limits, rescaled: bool) -> dict[str, Any]:
    """Cause, remedy and suspects."""
    if rescaled:
        text = "Normalise the scores, so that their scale does not matter."
        remedy = Remedy(text=text, changes={"score_normalization": "running"})
        return {"cause": "scores of another scale than before.", "remedy": remedy}
    moved, slower, clipped = log.series("approxkl").recent(), lower_rate(log, 10), {"max_grad_norm": 1.0}
    if moved > limits.large_approxkl:
        return {
            "cause": f"steps are too large: an update moves the policy {moved:.2g} nats per token.",
            "remedy": Remedy(text="Lower the learning rate and clip gradients.", changes={**slower, **clipped}),
        }
    why = "the log does not say how far an update moves the model" if math.isnan(moved) else "steps are not large"
    returns = Suspect(
        cause="some returns are far off, as of a score without bounds or an empty completion",
        experiment="print the highest and the lowest score of a rollout in which the norm is large.",
    )
    return {
        "cause": f"{CANNOT_TELL}: {why}.",
        "remedy": TRY_EACH,
        "suspects": (
            *large_steps(log),
            Suspect(cause="a few gradients are far larger than the others", experiment=GONE, changes=clipped),
            *([returns] if log.kind in ("ppo", "online") else []),
        ),
    }


def gradients_pile_up(log: RunLog, limits: Limits) -> Finding | None:
    """All minibatches have one gradient, which is no gradient of theirs."""
    signal, noise = (log.series(f"evidence/gradient/{name}") for name in ("signal", "noise"))
    if len(signal) < limits.least_rows or len(noise) < len(signal):
        return None
    ratios = [ours / max(theirs, 1e-30) for ours, theirs in zip(signal.values, noise.values, strict=False)]
    completions = float(log.setting("rollout_batch_size", 0)) / log.gradients  # of one: the more, the less noise
    if not (clear := median(ratios)) > limits.too_clear * max(1.0, completions / 32):  # NaN is 1
        return None
    return Finding(
        name="gradients_pile_up",
        severity="problem",
        title="Gradients of earlier steps are in the present one",
        steps=(signal.steps[0], signal.steps[-1]),
        evidence=(
            f"What a rollout's gradients have in common is {clear:.3g} times what they have not (squared, in the "
            "middle of all rollouts), though each is of other completions."
        ),
        figures={"ratio": clear},
        cause=(
            "gradients that are never set back to zero, a hook that adds to them, or a term of the loss that is the "
            "same whatever was written and drowns the rest."
        ),
        remedy=Remedy(
            text="Look for who keeps gradients: each step must begin at zero.",
            code="trainer.optimizer.zero_grad()  # and no hook on the adapter's weights",
        ),
    )


def clipping_saturated(log: RunLog, limits: Limits) -> Finding | None:
    """So many tokens are clipped that most of each update is lost; or steps are too large for clipping to hold them."""
    clipped, approxkl = log.series("clipfrac"), log.series("approxkl")
    if len(clipped) < 3:
        return None
    saturated = clipped.recent(3) >= limits.clipfrac or approxkl.recent(3) > limits.huge_approxkl
    if not saturated and not (len(approxkl) >= limits.least_rows and median(approxkl.values) > limits.large_approxkl):
        return None
    narrow = float(log.setting("cliprange", 0.2)) < 0.1
    moved = (
        f", and an update moves the policy {approxkl.recent(3):.2g} nats per token, {median(approxkl.values):.2g} in "
        "the middle of all"
        if approxkl
        else ""
    )
    return Finding(
        name="clipping_saturated",
        severity="problem" if saturated else "warning",
        title="The clip range is too narrow" if narrow else "Updates are too large: the clip range does not hold them",
        steps=(clipped.steps[-3], clipped.steps[-1]),
        evidence=f"{clipped.recent(3):.0%} of the tokens are clipped{moved}.",
        figures={"clipfrac": clipped.recent(3), **({"approxkl": approxkl.recent(3)} if approxkl else {})},
        cause="the clip range is too narrow."
        if narrow
        else "steps are too large, or too many are taken on one rollout.",
        remedy=(
            Remedy(text="Widen it to the usual one.", changes={"cliprange": 0.2})
            if narrow
            else Remedy(
                text="Take smaller steps or fewer epochs, or end the epochs at max_approx_kl.",
                changes=lower_rate(log, 10),
            )
        ),
    )


def steps_too_small(log: RunLog, limits: Limits) -> Finding | None:
    """Updates hardly change the policy: the score does not rise, or it rises more slowly than it could."""
    approxkl, score = _at_full_rate(log, "approxkl"), log.series("score")
    if len(approxkl) < 2 or log.series("score_std").recent() == 0.0:
        return None
    if log.series("entropy").recent() < limits.entropy:
        return None  # a policy without entropy gets no gradient: that is `entropy_collapse`
    rises, rate = score.rise()[1] > limits.noticeable, float(log.setting("learning_rate", math.nan))
    # It is measured before each step, so with one step a rollout it is always 0. The KL is that of all of them.
    known = log.setting("num_ppo_epochs", 4) * log.setting("num_mini_batches", 1) > 1
    small = approxkl.recent() <= limits.tiny_approxkl if known else _has_not_moved(log, limits)
    tiny = small and not rises
    stands = tiny and len(approxkl) >= limits.least_rows
    if not tiny and not _learns_slowly(log, approxkl if known else None, limits):
        return None
    moved = approxkl.recent() if tiny else median(approxkl.values) if known else math.nan
    kl = log.series("kl").recent()
    more, cause = larger_steps(log)
    known_rate = {} if math.isnan(rate) else {"learning_rate": rate}
    with_rate = f" (learning rate {rate:.1g})" if known_rate else ""
    by_step = f"An update moves the policy {moved:.1g} nats per token, and"
    by_rollout = f"In {len(score)} rollouts of one step the KL came to {kl:.2g} nats, and"
    return Finding(
        name="steps_too_small",
        severity="problem" if stands else "warning",
        title="Steps are too small to learn" if tiny else "Steps are small or few, and learning is slow",
        steps=log.steps,
        evidence=(
            f"{by_step if known else by_rollout} the score {'rises slowly' if rises else 'does not rise'}{with_rate}."
        ),
        figures={**known_rate, **({"approxkl": moved} if known else {"kl": kl})},
        cause=cause
        if more
        else f"{CANNOT_TELL}: the learning rate is {'unknown' if math.isnan(rate) else 'not small'}.",
        remedy=Remedy(text="Take larger steps, or more of them.", changes=more) if more else TRY_EACH,
        suspects=() if more else _lost_steps(log),
    )


def _has_not_moved(log: RunLog, limits: Limits) -> bool:
    """Whether all rollouts together have moved the policy less than an update should: by the spread of its log-ratios
    to the reference, whose square is twice the KL where that is small and has less noise, else by the KL."""
    kl, spread, length = log.series("kl"), log.series("objective/kl_std"), log.series("length")
    if len(kl) < limits.least_rows + log.setting("value_warmup_rollouts", 0):
        return False
    nats = spread.recent() ** 2 / 2 if spread else abs(kl.recent())
    return nats <= limits.tiny_approxkl * length.recent()


def _lost_steps(log: RunLog) -> tuple[Suspect, ...]:
    """What may take the steps away where the learning rate is not small."""
    skipped, shows = log.series("policy/skipped_minibatches"), "an update moves the policy and the score rises."
    guard = {"max_ratio": None} if log.setting("max_ratio") and skipped and max(skipped.values) > 0 else {}
    suspects = (
        ("Adam's epsilon outweighs the gradient's size", {"adam_epsilon": 1e-8}),
        ("the guard leaves out minibatches whose ratio is large", guard),
        ("this model wants larger steps than most", _faster(log, 3)),
    )
    return tuple(Suspect(cause=cause, experiment=shows, changes=changes) for cause, changes in suspects if changes)


def _learns_slowly(log: RunLog, approxkl: Series | None, limits: Limits) -> bool:
    """Whether little has been spent of the KL that a completion may well spend, and most updates are small; where that
    is not known, whether the score still rises."""
    score, kl, length = log.series("score"), log.series("kl"), log.series("length")
    if len(score) < 2 * limits.least_rows or not kl or not length:
        return False
    if not kl.recent() < limits.unspent * limits.budget_of(length.recent()):
        return False
    if approxkl:
        return median(approxkl.values) <= limits.small_approxkl
    half = len(score) // 2
    return replace(score, steps=score.steps[half:], values=score.values[half:]).rise()[1] > limits.noticeable


def larger_steps(log: RunLog) -> tuple[dict[str, float], str]:
    """What makes a rollout move the policy more, and why it moves it so little; empty where neither can be said."""
    if higher := higher_rate(log):
        return higher, "a learning rate that suits full fine-tuning; LoRA wants one 10 to 100 times as large."
    if log.setting("num_ppo_epochs", 4) > 1:
        return {}, ""
    rows, parts = int(log.setting("per_device_train_batch_size", 1)), int(log.setting("num_mini_batches", 1))
    if log.setting("objective") != "reinforce":  # which has no ratio that would hold a second epoch
        return {"num_ppo_epochs": 4}, "one epoch takes few steps on each rollout."
    if rows < 4:
        return {}, ""
    smaller: dict[str, float] = {"per_device_train_batch_size": rows // 4, "num_mini_batches": 4 * parts}
    return smaller, "large minibatches take few steps on each rollout."


# By finding: what goes further in the direction of its remedy, from the log of a run that has the remedy. Settings that
# came as a set had a learning rate that suited them.
STRONGER: dict[str, Callable[[RunLog], dict[str, float]]] = {
    "steps_too_small": lambda log: larger_steps(log)[0],
    "unusual_settings": lambda log: _faster(log, 3),
}


def _at_full_rate(log: RunLog, name: str) -> Series:
    """A metric where the learning rate is at least half of its setting: neither warming up nor running out."""
    full = float(log.setting("learning_rate", 0.0))
    return replace(log, rows=[row for row in log.rows if row.get("learning_rate", full) >= full / 2]).series(name)


# Schedules that rise at most once, while they warm up, and of these the ones that end near 0.
SCHEDULES = {"linear", "cosine", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"}
DECAYING = {"linear", "cosine", "polynomial"}
CONSTANT = {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}


def rate_off_schedule(log: RunLog, limits: Limits) -> Finding | None:
    """The learning rate does not do what its lr_scheduler_type says, or what the schedule plans is no use."""
    rates, kind = log.series("learning_rate"), str(log.setting("lr_scheduler_type", ""))
    done = [_share_done(log, row) for row in log.rows if math.isfinite(row.get("learning_rate", math.nan))]
    planned = log.setting("planned_rates", [])
    if len(rates) < limits.least_rows and planned:
        rates = Series([step for step, _ in planned], [rate for _, rate in planned])
        done = [step / planned[-1][0] if planned[-1][0] else math.nan for step in rates.steps]
    if not rates or log.setting("rate_changed") or not max(rates.values) > 0:
        return None
    if max(rates.values) > 2 * float(log.setting("learning_rate", math.inf)):
        return _above_its_setting(rates, log)
    if len(rates) < limits.least_rows:
        return None
    plain = kind in SCHEDULES and not log.setting("lr_scheduler_kwargs")
    returns = "restarts" in kind or "num_cycles" in (log.setting("lr_scheduler_kwargs") or {})
    # No schedule but one that returns is meant to end in the first half of a run.
    looks = [] if returns else [_ends_early(rates, done)]
    looks += [_rises_again(rates), _stays(rates, done, kind), _warms_up_long(rates, done)] if plain else []
    for told in looks:
        if told is not None:
            title, at, cause, direction, changes = told
            return Finding(
                name="rate_off_schedule",
                severity="warning",
                title=title,
                steps=(rates.steps[0], rates.steps[at]),
                evidence=(
                    f"It is {rates.values[at]:.2g} at step {rates.steps[at]}"
                    f"{f', {done[at]:.0%} of the run' if math.isfinite(done[at]) else ''}, and "
                    f"{max(rates.values):.2g} at its highest; lr_scheduler_type is {kind!r}."
                ),
                figures={"learning_rate": rates.values[at], "highest": max(rates.values)},
                cause=cause,
                remedy=Remedy(
                    text=(
                        "Let the schedule and the run count the same steps: a rollout makes num_ppo_epochs * "
                        "num_mini_batches of them."
                    ),
                    changes=changes if plain else CONSTANT,
                    code="print(trainer.state.max_steps, trainer.lr_scheduler)",
                    direction=direction,
                ),
            )
    return None


def _above_its_setting(rates: Series, log: RunLog) -> Finding:
    highest, set_to = max(rates.values), float(log.setting("learning_rate"))
    at, kwargs = rates.values.index(highest), log.setting("lr_scheduler_kwargs")
    return Finding(
        name="rate_off_schedule",
        severity="warning",
        title="The learning rate is higher than its setting",
        steps=(rates.steps[0], rates.steps[at]),
        evidence=f"It is {highest:.2g} at step {rates.steps[at]}, and learning_rate is {set_to:.2g}"
        f"{f'; lr_scheduler_kwargs is {kwargs}' if kwargs else ''}.",
        figures={"learning_rate": set_to, "highest": highest},
        cause="a schedule with a floor above the rate, or an optimizer that was made with another one.",
        remedy=Remedy(
            text="Let nothing but learning_rate set it.",
            changes=CONSTANT if kwargs else {},
            code="" if kwargs else "print(trainer.optimizer.param_groups[0]['lr'], trainer.args.learning_rate)",
            direction="down",
        ),
    )


def _share_done(log: RunLog, row: dict[str, Any]) -> float:
    """How much of the whole run is over at a log; NaN where its length is unknown."""
    steps = float(log.setting("max_steps", 0))
    if steps > 0:
        return float(row["step"]) / steps
    return float(row.get("epoch", math.nan)) / float(log.setting("num_train_epochs", math.nan))


# Title, which log shows it, cause, where to the remedy moves the rate, and the settings that do.
Told = tuple[str, int, str, str, dict[str, Any]]


def _ends_early(rates: Series, done: list[float]) -> Told | None:
    peak = 0.0
    for at, rate in enumerate(rates.values):
        peak = max(peak, rate)
        if rate < 0.05 * peak and done[at] < 0.5:
            cause = (
                "the schedule counts fewer steps than the run has, is stepped more than once a step, or lowers the "
                "rate at a sign that is none."
            )
            return "The learning rate is near 0 in the first half of the run", at, cause, "up", {}
    return None


def _rises_again(rates: Series) -> Told | None:
    highest = max(rates.values)
    peak = trough = rates.values[0]
    for at, rate in enumerate(rates.values):
        if trough < peak - 0.05 * highest and rate > trough + 0.05 * highest:
            cause = "a schedule that is stepped past its end, or a second one, or one that began anew."
            return "The learning rate rises again after it has fallen", at, cause, "down", {}
        peak = max(peak, rate)
        trough = rate if rate == peak else min(trough, rate)
    return None


def _stays(rates: Series, done: list[float], kind: str) -> Told | None:
    last = [at for at, share in enumerate(done) if share > done[-1] - 0.4]  # of the run, in which each of them falls
    if kind not in DECAYING or not done[-1] >= 0.5 or len(last) < 3:
        return None
    if max(rates.values[at] for at in last) - min(rates.values[at] for at in last) >= 1e-3 * max(rates.values):
        return None
    cause = "the scheduler is never stepped, or the trainer was given another one."
    return "The learning rate stays where it is", len(done) - 1, cause, "down", {}


def _warms_up_long(rates: Series, done: list[float]) -> Told | None:
    peak = rates.values.index(max(rates.values))
    rising = all(b > a for a, b in zip(rates.values[:peak], rates.values[1 : peak + 1], strict=True))
    if not done[peak] > 0.5 or not rising or rates.values[0] > rates.values[peak] / 2:
        return None
    cause = "a warm-up longer than half of the run: warmup_steps counts optimizer steps, not rollouts or episodes."
    return "The learning rate warms up for half of the run", peak, cause, "up", {"warmup_steps": 0}


def value_not_learning(log: RunLog, limits: Limits) -> Finding | None:
    """The value role does not predict the returns."""
    explained = log.series("val/explained_variance")
    if len(explained) < 2 * limits.least_rows or log.series("score_std").recent() == 0.0:
        return None
    if not log.series("value_loss") or explained.recent() > limits.explained_variance:
        return None
    why = _why_values_do_not_learn(log, limits)
    known = "suspects" not in why  # a symptom whose cause nobody knows is worth a look, and no more
    return Finding(
        name="value_not_learning",
        severity="problem" if known and max(explained.values[-4:]) < limits.explained_nothing else "warning",
        title="The value role does not learn",
        steps=log.steps,
        evidence=(
            f"After {len(explained)} logs it explains {explained.recent():.0%} of the returns' variance, and "
            f"{explained.start():.0%} at the start."
        ),
        figures={"explained_variance": explained.recent()},
        **why,
    )


def _why_values_do_not_learn(log: RunLog, limits: Limits) -> dict[str, Any]:
    """Cause, remedy and suspects: the first cause that the log shows, or, where it shows none, how to find out."""
    weight = {"vf_coef": 0.1 if float(log.setting("vf_coef", 0.1)) < 0.1 else 1.0}
    if value_weight_is_idle(log, weight["vf_coef"]) is None:
        return {
            "cause": "its loss has no weight, its steps are too small, or scores are far from 0, where it starts.",
            "remedy": Remedy(
                text=(
                    "Give it a weight and an adapter of its own; scores at mean 0 and standard deviation 1 are learned "
                    "sooner."
                ),
                changes={**weight, "score_normalization": "running"},
            ),
        }
    reach = float(log.setting("cliprange_value", 0.2)) * max(len(log.rows), 1)
    spread, mean = log.series("score_std").recent(), abs(log.series("score").recent())
    if max(spread, mean) > reach:
        return {
            "cause": (
                f"scores lie up to {max(spread, mean):.3g} from 0, where values start, and cliprange_value lets values "
                f"move by {reach:.3g} in {len(log.rows)} updates."
            ),
            "remedy": Remedy(
                text="Bring the scores to a few units, or let values move further.",
                changes={"score_normalization": "running", "cliprange_value": float(f"{max(spread, mean):.1g}")},
            ),
        }
    measured = noise_of(log)
    repeats = bool(measured) and max(share for share, _ in measured.values()) < limits.noise
    unpredictable = Suspect(
        cause="the returns cannot be predicted, because the score is noise or is given for what comes late",
        experiment="score the same completions twice: what differs no value role can learn.",
    )
    slow = Suspect(
        cause="the value role's steps are too small",
        experiment="val/explained_variance rises within ten rollouts if this is it.",
        changes=_faster(log, 5),
    )
    return {
        "cause": f"{CANNOT_TELL}: its gradient is not small, and scores are within its reach.",
        "remedy": TRY_EACH,
        "suspects": (
            *([] if repeats else [unpredictable]),
            *([slow] if slow.changes else []),
            Suspect(
                cause="the policy changes faster than values follow",
                experiment="val/explained_variance rises during the warm-up if this is it.",
                changes={"value_warmup_rollouts": 10},
            ),
        ),
    }


def _faster(log: RunLog, times: float) -> dict[str, float]:
    """So many times the learning rate, up to 3e-3, above which it suits nothing; empty where it is unknown or there."""
    rate = float(log.setting("learning_rate") or math.inf)
    faster = min(times * rate, 3e-3)
    return {"learning_rate": float(f"{faster:.1g}")} if faster > 1.5 * rate else {}


def value_loss_explodes(log: RunLog, limits: Limits) -> Finding | None:
    """The value role's errors grow far beyond the spread of the scores."""
    loss, spread, score = log.series("value_loss"), log.series("score_std"), log.series("score")
    if len(loss) < limits.least_rows:
        return None
    now = loss.lasting()
    if now < limits.value_loss_growth * max(loss.values[0], 1e-8):
        return None
    if not spread:
        return None  # TRL's PPOTrainer logs none, and scores that grow make the loss grow
    # The loss is half a squared error: for a value role that predicts the mean score it would be half the variance.
    if now < limits.value_error * 0.5 * spread.recent(2) ** 2:
        return None
    errors = 2 * now / max(spread.recent(2) ** 2, 1e-8)
    scores = f"score {score.start(2):.3g} to {score.recent(2):.3g}, " if score else ""
    wandering = abs(score.recent(2) - score.start(2)) > limits.score_drift * spread.recent(2)
    return Finding(
        name="value_loss_explodes",
        severity="problem",
        title="The value loss explodes",
        steps=(loss.steps[0], loss.steps[-1]),
        evidence=(
            f"From {loss.values[0]:.3g} to {now:.3g}, {errors:.3g} times what the mean "
            f"score alone would cost ({scores}spread {spread.recent(2):.3g})."
        ),
        figures={"value_loss": now, "start": loss.values[0]},
        cause=(
            "scores that drift faster than values can follow: a sum that is never reset, a reward without bounds."
            if wandering
            else "too large steps for the value role, or a clip range that does not suit the scale of the scores."
        ),
        remedy=(
            Remedy(
                text=(
                    "Score the same completion twice, some rollouts apart: a reward function must give it the same "
                    "score again."
                ),
                code="print(reward_func(prompts=prompts, completions=completions, trainer_state=trainer.state))",
            )
            if wandering
            else Remedy(text="Lower the learning rate.", changes=lower_rate(log, 10))
        ),
    )


def value_starts_far_off(log: RunLog, limits: Limits) -> Finding | None:
    """Values are far from the returns from the first rollout on, farther than a role that says 0."""
    loss, rollout = log.series("value_loss"), log.setting("rollout_batch_size")
    if not loss or not rollout or log.rows[0].get("episode") != rollout:
        return None
    # Half a squared error. What is asked of values is the score, less a KL that is 0 before the first step.
    error = math.sqrt(2 * max(loss.values[0], 0.0))
    returns = [abs(log.series(name).start(1)) for name in ("score", "objective/rlhf_reward", "score_std")]
    of_zero = max((one for one in returns if not math.isnan(one)), default=math.nan)
    if not error >= limits.value_far_off * max(of_zero, 1.0):
        return None
    return Finding(
        name="value_starts_far_off",
        severity="problem",
        title="Values start far from the returns",
        steps=(loss.steps[0], loss.steps[0]),
        evidence=(
            f"In the first rollout values are {error:.3g} off; a role that says 0 would be {of_zero:.3g} off. Until "
            "they have come to the returns, what advantages tell is how far a token is from the end."
        ),
        figures={"error": error, "of_zero": of_zero},
        cause="a value role that goes on from a head for scores of another scale, or steps that ruin it at once.",
        remedy=Remedy(
            text="Let the value role begin anew, or from the reward role whose scores it is to predict.",
            code="SharedBase.from_pretrained(..., value='adapter')",
        ),
    )


def lower_rate(log: RunLog, times: float) -> dict[str, float]:
    """A lower learning rate, and one that LoRA can take."""
    rate = log.setting("learning_rate")
    return {"learning_rate": float(f"{min(float(rate) / times, 1e-3):.1g}")} if rate else {}


GONE = "it does not come back if this is it."


def large_steps(log: RunLog) -> list[Suspect]:
    """That steps overshoot, and what shows it; nothing where the rate is not known."""
    slower, cause = lower_rate(log, 10), "steps are too large, or too many are taken on one rollout"
    return [Suspect(cause=cause, experiment=GONE, changes=slower)] if slower else []


def higher_rate(log: RunLog) -> dict[str, float]:
    """A higher learning rate, and one at which LoRA learns something in a short run; empty where it is as high."""
    rate = float(log.setting("learning_rate") or math.inf)
    higher = min(max(30 * rate, 3e-4), 1e-3)
    return {"learning_rate": float(f"{higher:.1g}")} if higher > 2 * rate else {}
