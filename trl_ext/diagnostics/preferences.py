"""Rules for reward models and for DPO."""

from __future__ import annotations

import math

from trl_ext.diagnostics.finding import Finding, Remedy
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog
from trl_ext.diagnostics.updates import higher_rate, lower_rate

# Reward models -------------------------------------------------------------------------------------------------------


def overfit(log: RunLog, limits: Limits) -> Finding | None:
    """Held-out pairs get worse while those in training get better."""
    accuracy, held_out = log.series("accuracy"), log.series("accuracy", evals=True)
    loss = log.series("loss", evals=True)
    gap = accuracy.recent() - held_out.recent(1) if accuracy and held_out else 0.0
    growth = loss.values[-1] / max(min(loss.values), 1e-6) if len(loss) >= 2 else 1.0
    # A gap alone does no harm where pairs are few; where the held-out loss is known, it must have got worse.
    rises = growth > limits.overfit_loss and gap > limits.overfit_accuracy / 3
    if not (rises if len(loss) >= 2 else gap > limits.overfit_accuracy):
        return None
    # Of several sets to evaluate on, each has a loss under a name of its own.
    losses = f"; held-out loss {min(loss.values):.3f} at its best and {loss.values[-1]:.3f} now" if loss else ""
    return Finding(
        name="overfit",
        severity="problem",
        title="It learns its pairs by heart",
        steps=log.steps,
        evidence=f"Training accuracy {accuracy.recent():.0%}, held-out {held_out.recent(1):.0%}{losses}.",
        figures={"gap": gap, "growth": growth},
        cause="too many epochs over too few pairs.",
        remedy=Remedy(
            text="Stop where the held-out loss was lowest, or collect more pairs.", changes=_epochs_of_best(log)
        ),
    )


def _epochs_of_best(log: RunLog) -> dict[str, int]:
    """The epochs of a new run with as much learning in all as this one had at its lowest held-out loss.

    The measure is the sum of learning rates, in epochs at the highest rate. Under a schedule that falls to 0 it is
    e (1 - e / 2n) at epoch e of n, and half of a whole run's epochs.
    """
    evals = [row for row in log.evals if "loss" in row and "epoch" in row]
    best = min(evals, key=lambda row: row["loss"], default=None)
    if best is None:
        return {"num_train_epochs": 1}
    epoch, of = best["epoch"], float(log.setting("num_train_epochs", evals[-1]["epoch"]))
    falls = log.setting("lr_scheduler_type", "linear") in ("linear", "cosine")
    epochs = round(2 * epoch * (1 - epoch / (2 * of))) if falls else round(epoch)
    return {"num_train_epochs": max(1, min(epochs, math.ceil(of) - 1))}


def chance_level(log: RunLog, limits: Limits) -> Finding | None:
    """The model orders pairs no better than chance."""
    held_out, trained = log.series("accuracy", evals=True), log.series("accuracy")
    rows, enough = _rows_of_pairs(log, limits)
    learned = trained.recent(rows)
    accuracy = held_out.recent() if held_out else learned
    # Ties count as wrong in TRL's accuracies: a model that has not moved may have fewer than half in order.
    dpo, margin = log.kind == "dpo", log.series("margin")
    still = dpo and abs(margin.recent()) < limits.still
    if not enough or len(trained) < limits.least_rows or (accuracy > 0.5 + limits.chance and not still):
        return None
    if learned > 0.5 + 2 * limits.chance and not still:
        return None  # it learns its pairs, so this is overfitting
    loss = log.series("loss")
    broken = max(loss.values, default=0.0) > 2 * loss.start(1)
    fast = log.setting("learning_rate", 0.0) >= limits.ample_rate
    look = "look at a few pairs" + ("." if dpo else " with `trl-ext feedback check`.")
    return Finding(
        name="chance_level",
        severity="problem",
        title="Accuracy stays at one half" if not still else "Margins stay at 0",
        steps=log.steps,
        evidence=(
            f"{accuracy:.0%} of the pairs are in order, {learned:.0%} of those in training"
            f"{f'; their mean margin is {margin.recent():.2g}' if margin else ''}."
        ),
        figures={"accuracy": accuracy},
        cause=(
            "steps so large that they broke the model: its loss has been twice what it was at the start."
            if broken
            else ("" if fast else "steps too small to learn, ")
            + "pairs whose two sides were mixed up, or answers cut before they differ."
        ),
        remedy=(
            Remedy(text="Lower the learning rate.", changes=lower_rate(log, 100))
            if broken
            else Remedy(text=look.capitalize())
            if fast
            else Remedy(text=f"Raise the learning rate, then {look}", changes=higher_rate(log))
        ),
    )


def _rows_of_pairs(log: RunLog, limits: Limits) -> tuple[int, bool]:
    """How many of the last logs, at least four, cover `chance_pairs` pairs; and whether the run has had so many."""
    batch = int(log.setting("per_device_train_batch_size", 8)) * int(log.setting("gradient_accumulation_steps", 1))
    first, last = log.steps
    a_row = batch * max(1.0, (last - first) / max(len(log.rows) - 1, 1))
    return max(4, math.ceil(limits.chance_pairs / a_row)), batch * last >= limits.chance_pairs


def uncentred(log: RunLog, limits: Limits) -> Finding | None:
    """Scores are far from 0, where PPO's value role starts."""
    mean, low, high = (log.series(f"{name}_reward") for name in ("mean", "min", "max"))
    good = log.series("data/good").recent(1)
    if len(mean) < limits.least_rows or not abs(mean.recent()) >= limits.uncentred * (high.recent() - low.recent()):
        return None  # also where the range is not known
    unequal = not math.isnan(good)
    return Finding(
        name="uncentred",
        severity="warning",
        title="Scores are far from 0",
        steps=log.steps,
        evidence=(
            f"Their mean is {mean.recent():.2f}; in a batch they lie between {low.recent():.2f} and "
            f"{high.recent():.2f}." + (f" {good:.0%} of the labels are good." if unequal else "")
        ),
        figures={"mean": mean.recent(), "low": low.recent(), "high": high.recent()},
        cause=(
            "labels of one kind are much rarer, and their log-odds are part of every score."
            if unequal
            else "the pairwise loss ignores an offset, so the offset drifts."
        ),
        remedy=(
            Remedy(text="Give both labels the same total weight.", code="trl_ext.feedback.balance_labels(rows)")
            if unequal
            else Remedy(text="Keep the scores around 0 while training.", changes={"center_rewards_coefficient": 0.01})
        ),
    )


def saturated(log: RunLog, limits: Limits) -> Finding | None:
    """Margins so large that nothing is learned from them."""
    margin = log.series("margin", evals=True) or log.series("margin")
    demanded = log.series("data/margin").recent(1)
    if not margin or margin.recent() < limits.saturated_margin:
        return None
    wide = demanded > limits.saturated_margin / 2
    return Finding(
        name="saturated",
        severity="problem",
        title="Scores are saturated",
        steps=log.steps,
        evidence=(
            f"The mean margin between chosen and rejected is {margin.recent():.1f}"
            + (f"; the margins in the data have a mean of {demanded:.1f}." if wide else ".")
        ),
        figures={"margin": margin.recent()},
        cause=(
            "the margins in the data are too large: a difference in score is one of log-odds, and 5 of them are nearly "
            "certain."
            if wide
            else "too large steps or too many epochs; PPO would exploit scores of such a scale."
        ),
        remedy=(
            Remedy(
                text="Divide the margins, so that the largest is 2 or 3.",
                code=f'pairs.map(lambda row: {{"margin": row["margin"] / {max(demanded, 1):.0f}}})',
            )
            if wide
            else Remedy(
                text="Smaller steps and centred scores.",
                changes={**lower_rate(log, 10), "center_rewards_coefficient": 0.01},
            )
        ),
    )


def length_bias(log: RunLog, limits: Limits) -> Finding | None:
    """The longer answer wins, whatever its content."""
    share = log.series("data/longer_chosen").recent(1)
    score, people = log.setting("length_correlation"), log.setting("length_correlation_of_people")
    biased = not math.isnan(share) and max(share, 1 - share) > limits.length_bias
    learned = score is not None and people is not None and abs(score) - abs(people) > limits.length_bias - 0.5
    if not biased and not learned:
        return None
    evidence = []
    if biased:
        which = "longer" if share > 0.5 else "shorter"
        evidence.append(f"The {which} answer was chosen in {max(share, 1 - share):.0%} of the pairs.")
    if learned:
        evidence.append(f"Score and length correlate at {score:.2f}, people's verdict and length at {people:.2f}.")
    return Finding(
        name="length_bias",
        severity="problem",
        title="The reward model is taught length",
        steps=log.steps,
        evidence=" ".join(evidence),
        figures={"longer_chosen": share},
        cause="the longer side of the pairs was chosen too often, or the shorter one; raters often favour length.",
        remedy=Remedy(
            text="Balance the pairs: as many in which the shorter answer was chosen.",
            code="trl_ext.feedback.balance_lengths(pairs)",
        ),
    )


# DPO -----------------------------------------------------------------------------------------------------------------


def reference_mismatch(log: RunLog, limits: Limits) -> Finding | None:
    """DPO's rewards are not 0 at the first step, where policy and reference are the same."""
    if not log.rows or log.rows[0]["step"] > 1:
        return None
    chosen, rejected = (log.rows[0].get(f"rewards/{side}", 0.0) for side in ("chosen", "rejected"))
    reward = max(abs(one) for one in (0.0, chosen, rejected) if math.isfinite(one))
    if reward < (limits.reference_gap_half if log.in_half_precision else limits.reference_gap):
        return None
    return Finding(
        name="reference_mismatch",
        severity="problem",
        title="The reference is not where training starts",
        steps=(log.rows[0]["step"], log.rows[0]["step"]),
        evidence=(f"At the first step the rewards are {chosen:+.3f} and {rejected:+.3f}, which should be 0."),
        figures={"reward": reward},
        cause=(
            "another reference model than the one that training starts from, a merged or missing adapter, or dropout."
        ),
        remedy=Remedy(
            text="Leave ref_model out: TRL then takes the starting policy.",
            code="DPOTrainer(model, ref_model=None, ...)",
        ),
    )


def likelihood_displacement(log: RunLog, limits: Limits) -> Finding | None:
    """The chosen answers become less likely too."""
    chosen, rejected = log.series("logps/chosen"), log.series("logps/rejected")
    if len(chosen) < limits.least_rows:
        return None
    fell = chosen.start() - chosen.recent()
    if (
        fell < max(limits.displacement, limits.displaced_share * abs(chosen.start()))
        or not rejected.start() - rejected.recent() >= fell
        or chosen.rise()[1] > -limits.noticeable
    ):
        return None
    return Finding(
        name="likelihood_displacement",
        severity="problem",
        title="Chosen answers become less likely along with rejected ones",
        steps=(chosen.steps[0], chosen.steps[-1]),
        evidence=(
            f"Log-probability of chosen answers {chosen.start():.1f} to {chosen.recent():.1f} nats, of rejected ones "
            f"{rejected.start():.1f} to {rejected.recent():.1f}."
        ),
        figures={"fell": fell},
        cause=(
            "DPO's loss depends on the difference alone (Razin et al. 2024, arXiv:2410.08847): probability moves to "
            "answers outside the data."
        ),
        remedy=Remedy(
            text="Add the likelihood of the chosen answers to the loss.",
            changes={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
        ),
    )


def margins_explode(log: RunLog, limits: Limits) -> Finding | None:
    """DPO's margins are so large that its loss has hardly any gradient left."""
    margin = log.series("margin")
    if len(margin) < 3 or margin.recent() < limits.dpo_margin:
        return None
    beta = float(log.setting("beta", 0.1))
    return Finding(
        name="margins_explode",
        severity="problem",
        title="DPO's margins explode",
        steps=(margin.steps[0], margin.steps[-1]),
        evidence=f"They went from {margin.start():.1f} to {margin.recent():.1f}, in units of beta times nats.",
        figures={"margin": margin.recent()},
        cause=(
            f"beta is {beta:g}, so a difference of one nat already saturates the loss."
            if beta > 1
            else "too large steps, or too many epochs over the same pairs."
        ),
        remedy=(
            Remedy(text="Take a beta as in the paper.", changes={"beta": 0.1})
            if beta > 1
            else Remedy(text="Take smaller steps.", changes=lower_rate(log, 10))
        ),
    )
