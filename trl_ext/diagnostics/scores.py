"""Rules about scores and the answers that earn them."""

from __future__ import annotations

import math

from trl_ext.diagnostics.finding import Finding, Remedy
from trl_ext.diagnostics.kl import stronger
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Series


def constant_scores(log: RunLog, limits: Limits) -> Finding | None:
    """Every answer gets the same score."""
    spread, score = log.series("score_std"), log.series("score")
    if len(spread) < 3 or spread.recent(3) > 1e-4 * max(abs(score.recent(3)), 1e-2):
        return None
    return Finding(
        "constant_scores",
        "problem",
        "All scores are the same",
        (spread.steps[-3], spread.steps[-1]),
        f"The last three rollouts scored {score.recent(3):.3g} with a standard deviation of {spread.recent(3):.1g}.",
        {"score": score.recent(3), "score_std": spread.recent(3)},
        "a reward function that never matches, reads the wrong column, or is clipped to a constant; or a policy that "
        "gives one answer.",
        Remedy(
            "Score a few of the completions by hand.",
            code="print(reward_func(prompts=prompts, completions=completions))",
        ),
        log.last_samples(),
    )


def score_scale(log: RunLog, limits: Limits) -> Finding | None:
    """Scores too spread for a value role that starts at 0, or of a scale that drifts."""
    spread = log.series("score_std")
    if len(spread) < 3:
        return None
    large = spread.recent(3) > limits.score_std
    drift = spread.recent() / spread.start() if len(spread) >= limits.least_rows and spread.start() > 1e-6 else 1.0
    drifts = drift > limits.score_drift and spread.recent() > 1.0
    if not (large or drifts):
        return None
    return Finding(
        "score_scale",
        "problem",
        "The scores' scale is too large" if large else "The scores' scale drifts",
        (spread.steps[0], spread.steps[-1]),
        f"Their standard deviation is {spread.recent(3):.3g}, at the start {spread.start():.3g}.",
        {"score_std": spread.recent(3), "start": spread.start()},
        "a reward function or reward model without bounds; kl_coef, clipping of values and learning rate all suppose "
        "scores of a few units.",
        Remedy("Normalise the scores, or clip them.", {"score_normalization": "running"}),
        log.last_samples(),
    )


def truncation(log: RunLog, limits: Limits) -> Finding | None:
    """Answers do not end."""
    cut = log.series("truncated")
    if len(cut) < 3 or cut.recent(3) < limits.truncated:
        return None
    longest, penalty = log.setting("max_completion_length"), float(log.setting("missing_eos_penalty", 0.0))
    return Finding(
        "truncation",
        "problem",
        "Answers are cut off before they end",
        (cut.steps[-3], cut.steps[-1]),
        f"{cut.recent(3):.0%} of the answers reach the length limit{f' of {longest}' if longest else ''} without EOS; "
        f"{cut.start():.0%} did at the start.",
        {"truncated": cut.recent(3), "start": cut.start()},
        "too short a limit, a reward for length, or a model that was never taught to stop.",
        Remedy(
            "Raise the limit, and take something off the score of an answer that was cut.",
            {"max_completion_length": 2 * int(longest), "missing_eos_penalty": max(1.0, penalty)} if longest else {},
        ),
        log.last_samples(),
    )


def length_exploitation(log: RunLog, limits: Limits) -> Finding | None:
    """Answers grow because length is rewarded; or, where scores are not known, they grow."""
    length, pull = log.series("length"), log.series("completions/score_length_correlation")
    if len(length) < limits.least_rows or length.recent() < limits.length_growth * length.start():
        return None
    if length.rise()[1] < limits.noticeable or (pull and max(pull.start(), pull.recent()) < limits.length_correlation):
        return None
    shown = f" Score and length correlate at {max(pull.start(), pull.recent()):.2f}." if pull else ""
    return Finding(
        "length_exploitation",
        "problem" if pull else "warning",
        "Answers grow because length is rewarded" if pull else "Answers grow",
        (length.steps[0], length.steps[-1]),
        f"From {length.start():.0f} to {length.recent():.0f} tokens.{shown}",
        {"length": length.recent(), "start": length.start()},
        f"a reward that longer answers earn more of{'' if pull else ', or a task that takes more words'}.",
        Remedy(
            "Add a penalty on length beyond what an answer needs.",
            code=f"reward_funcs=[..., trl_ext.rewards.texts.length_penalty(soft={length.start():.0f}, "
            f"hard={2 * length.start():.0f})]",
        ),
        log.last_samples(),
    )


def repetition_exploitation(log: RunLog, limits: Limits) -> Finding | None:
    """Answers repeat themselves because that is rewarded."""
    repeated = log.series("completions/repetition")
    if len(repeated) < 3 or repeated.recent(3) < limits.repetition + repeated.start():
        return None
    return Finding(
        "repetition_exploitation",
        "problem",
        "Answers repeat themselves",
        (repeated.steps[0], repeated.steps[-1]),
        f"{repeated.recent(3):.0%} of an answer's trigrams occurred in it before, {repeated.start():.0%} at the start.",
        {"repetition": repeated.recent(3), "start": repeated.start()},
        "a reward that counts something that can be said again and again.",
        Remedy(
            "Add a penalty on repetition, or count each thing once.",
            code="reward_funcs=[..., trl_ext.rewards.texts.repetition_penalty()]",
        ),
        log.last_samples(),
    )


def mode_collapse(log: RunLog, limits: Limits) -> Finding | None:
    """Different prompts get the same answer."""
    answers, prompts = log.series("completions/distinct"), log.series("prompts/distinct")
    if len(answers) < 3 or not prompts:
        return None
    share = answers.recent(3) / max(prompts.recent(3), 1e-6)
    if share > limits.distinct or answers.recent(3) > 0.5 * answers.start():
        return None
    return Finding(
        "mode_collapse",
        "problem",
        "Different prompts get the same answer",
        (answers.steps[0], answers.steps[-1]),
        f"{answers.recent(3):.0%} of the answers are different ones, {answers.start():.0%} were at the start.",
        {"distinct": answers.recent(3), "start": answers.start()},
        "a reward that does not look at the prompt, and too weak a KL penalty.",
        Remedy(
            "Let the reward look at the prompt, and hold the policy nearer to the reference.",
            stronger(log, limits),
        ),
        log.last_samples(),
    )


def over_optimisation(log: RunLog, limits: Limits) -> Finding | None:
    """The score rises while what it stands for falls."""
    score = log.series("score")
    if len(score) < limits.least_rows:
        return None
    for name, yardstick in yardsticks(log).items():
        lost = yardstick.best() - yardstick.recent()
        error = yardstick.noise() * math.sqrt(2 / 4)
        # Of n means the best and the worst lie sqrt(2 ln n) standard deviations each from the middle by chance alone.
        needed = math.sqrt(limits.noticeable**2 + 4 * math.log(max(len(yardstick) / 4, 1.0)))
        if len(yardstick) < limits.least_rows or error <= 0 or lost < needed * error:
            continue
        if score.rise()[1] < limits.noticeable or lost < 0.1 * abs(yardstick.best()):
            continue
        return Finding(
            "over_optimisation",
            "problem",
            "The score rises while what it stands for falls",
            log.steps,
            f"Score {score.start():.2f} to {score.recent():.2f}; {name} {yardstick.best():.3g} at its best and "
            f"{yardstick.recent():.3g} now; KL {log.series('kl').recent():.2f} nats an answer.",
            {"score": score.recent(), "best": yardstick.best(), "now": yardstick.recent()},
            "the policy has left the answers that the reward model was trained on and found some that it overrates.",
            Remedy(
                "Hold the policy nearer to the reference, or rate its present answers and train the reward model anew.",
                stronger(log, limits),
            ),
            log.last_samples(),
        )
    return None


def yardsticks(log: RunLog) -> dict[str, Series]:
    """What the score is measured by: `yardstick/...`, and reward functions of weight 0."""
    found = {f"yardstick {name}": log.series(f"yardstick/{name}") for name in log.names("yardstick/")}
    for name, weight in weights_of(log).items():
        if weight == 0:
            found[f"{name} (weight 0)"] = log.series(f"rewards/{name}/mean")
    return found


def weights_of(log: RunLog) -> dict[str, float]:
    """Every reward function's weight, in the order in which the trainer was given them: saved logs are sorted by name,
    so that order is a setting of its own."""
    names = log.setting("reward_names") or log.names("rewards/", "/std")
    return dict(zip(names, log.setting("reward_weights", [1.0] * len(names)), strict=False))


def functions_at_odds(log: RunLog, limits: Limits) -> Finding | None:
    """One reward function drowns the others, or two pull apart."""
    weights = weights_of(log)
    names = list(weights)
    active = [name for name in names if weights.get(name, 1.0)]
    if len(active) < 2 or len(log.rows) < 3:
        return None
    scaled = _each_scaled(log)
    spread = {
        name: abs(weights.get(name, 1.0)) * (1.0 if scaled else log.series(f"rewards/{name}/std").recent())
        for name in active
    }
    for pair in log.names("rewards/correlation/"):
        series, both = log.series(f"rewards/correlation/{pair}"), pair.split("~")
        rows = min(len(series), 2 * limits.least_rows)
        r, error = series.recent(rows), series.noise() / math.sqrt(rows)
        fight = rows >= limits.least_rows and r < min(limits.fighting, -limits.noticeable * error)
        if fight and all(name in spread and spread[name] > 0.1 * max(spread.values()) for name in both):
            return _odds(
                f"{both[0]} and {both[1]} pull in opposite directions",
                log,
                f"They correlate at {r:.2f}: what raises one lowers the other.",
                {"correlation": r},
                Remedy(
                    f"Decide which one counts: lower the weight of {both[1]}.", _weights(names, weights, both[1], 0.2)
                ),
            )
    first, second, *_ = sorted(spread.values(), reverse=True)
    if not scaled and first > limits.dominates * max(second, 1e-9) and second > 0:
        name = max(spread, key=spread.__getitem__)
        return _odds(
            f"{name} dominates the other reward functions",
            log,
            f"Its weighted standard deviation is {first:.3g}, that of the next {second:.3g}.",
            {"first": first, "second": second},
            Remedy("Bring them to one scale.", _weights(names, weights, name, second / first)),
        )
    return None


def _each_scaled(log: RunLog) -> bool:
    """Whether each function's scores are divided by their spread before they are weighted."""
    here = log.setting("score_normalization", "none") != "none"
    return here or log.setting("multi_objective_aggregation") == "normalize_then_sum"


def _odds(title: str, log: RunLog, evidence: str, figures: dict[str, float], remedy: Remedy) -> Finding:
    cause = "reward functions of different scales, or with different wishes, added up as they are."
    return Finding("functions_at_odds", "problem", title, log.steps, evidence, figures, cause, remedy)


def _weights(names: list[str], weights: dict[str, float], changed: str, factor: float) -> dict[str, list[float]]:
    new = [weights.get(name, 1.0) * (factor if name == changed else 1.0) for name in names]
    return {"reward_weights": [float(f"{weight:.2g}") for weight in new]}


def prompts_truncated(log: RunLog, limits: Limits) -> Finding | None:
    """Something cut the prompts to one length."""
    share = log.series("prompts/at_max_length")
    if not share or share.recent() < limits.prompts_at_max_length:
        return None
    length = log.series("prompts/mean_length").recent()
    return Finding(
        "prompts_truncated",
        "warning",
        "Prompts look cut to one length",
        (share.steps[0], share.steps[-1]),
        f"{share.recent():.0%} of the prompts are exactly as long as the longest (mean {length:.0f} tokens).",
        {"at_max_length": share.recent()},
        "the prompts were truncated before they came here, so the model answers questions that it cannot see.",
        Remedy(
            "Filter long prompts out instead of cutting them.",
            code="dataset.filter(lambda row: len(row['prompt']) < limit)",
        ),
        log.last_samples(),
    )
