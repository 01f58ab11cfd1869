"""Rules about scores: their scale, what they stand for, and the functions that give them."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean

from trl_ext.diagnostics.distributions import advantages_are_normalised, stronger, weaker
from trl_ext.diagnostics.finding import CANNOT_TELL, TRY_EACH, Finding, Remedy, Suspect
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import AGREEMENT, MISSED, ONE_VERDICT, SHIFTED, RunLog, Series
from trl_ext.diagnostics.samples import UNREAD
from trl_ext.diagnostics.signal import differs_by, noise_of
from trl_ext.diagnostics.updates import lower_rate


def constant_scores(log: RunLog, limits: Limits) -> Finding | None:
    """Every completion gets the same score: of late, or in many of PPO's first rollouts."""
    spread, score = log.series("score_std"), log.series("score")
    if not log.suffices(spread, limits.enough):
        return None
    now, same = _is_one(spread.recent(3), score.recent(3)), 0
    first = min(len(spread), len(score), 2 * limits.least_rows)
    if log.kind == "ppo" and log.setting("rollout_batch_size", 0) >= 16:  # few may score alike by chance
        same = sum(_is_one(spread.values[i], score.values[i]) for i in range(first))
    often = first >= limits.least_rows and same >= first / 3
    if not now and not often:
        return None
    worth = _of_one_worth(log, 0.99, slice(-3, None) if now else slice(first))
    return Finding(
        name="constant_scores",
        severity="problem" if now or not score.ever_rose(limits.noticeable) else "warning",
        title="All scores are the same" if now else "In many rollouts all scores are the same",
        steps=(spread.steps[-3:][0], spread.steps[-1]) if now else (spread.steps[0], spread.steps[first - 1]),
        evidence=(
            f"The latest rollouts scored {score.recent(3):.3g} with a standard deviation of {spread.recent(3):.1g}."
            if now
            else f"In {same} of the first {first} rollouts all completions had one score."
        ),
        figures={"score": score.recent(3), "score_std": spread.recent(3)} if now else {"share": same / first},
        cause=(
            "a reward function that never matches, reads the wrong column, or is clipped to a constant; or a policy "
            "that gives one completion."
            if now and worth is None
            else "a rank, a threshold or a median that leaves nothing between completions, or a reward that few earn."
            if worth is None
            else f"{CANNOT_TELL}: {worth}."
        ),
        remedy=Remedy(
            text="Score a few of the completions by hand.",
            code="print(reward_func(prompts=prompts, completions=completions))",
        ),
        samples=log.last_samples(),
        suspects=() if worth is None else _OF_ONE_WORTH,
    )


def _is_one(spread: float, score: float) -> bool:
    return spread <= 1e-4 * max(abs(score), 1e-2)


def _of_one_worth(log: RunLog, least: float, rows: slice) -> str | None:
    """What a yardstick says that finds at least so many completions of some rollouts alike: then the score is right
    to."""
    for name in log.names(ONE_VERDICT):
        shares = log.series(f"{ONE_VERDICT}{name}").values[rows]
        if shares and fmean(shares) >= least:
            return f"yardstick {name} says the same of {fmean(shares):.0%} of the completions, too"
    return None


_OF_ONE_WORTH = (
    UNREAD,
    Suspect(
        cause="the prompts are too hard for the model as it is, or too easy",
        experiment="with easier or harder ones, several completions of a prompt differ in score if this is it.",
    ),
)


def no_progress(log: RunLog, limits: Limits) -> Finding | None:
    """The score has never risen. What keeps it down may be found beside it; on its own it says little."""
    score, kl, length = (log.series(name) for name in ("score", "kl", "length"))
    if len(score) < 2 * limits.least_rows or log.series("score_std").recent() == 0.0:
        return None
    if score.ever_rose(limits.noticeable):
        return None
    figures = {"score": score.recent(), "start": score.start(4), "best": score.best()}
    moved = f" The KL is {kl.recent():.2g} nats per completion." if kl else ""
    near = abs(kl.recent()) < limits.stays * limits.budget_of(length.recent())
    by_kl = Suspect(
        cause="the KL penalty is too strong" if near else "steps are too large",
        experiment="the score rises within ten rollouts if this is it.",
        changes=weaker(log) if near else lower_rate(log, 10),
    )
    return Finding(
        name="no_progress",
        severity="warning",
        title="The score does not rise",
        steps=(score.steps[0], score.steps[-1]),
        evidence=(
            f"In {len(score)} logs it went from {score.start(4):.3g} to {score.recent():.3g}; {score.best():.3g} at "
            f"its best is no more than chance makes.{moved}"
        ),
        figures=figures | ({"kl": kl.recent()} if kl else {}),
        cause=f"{CANNOT_TELL} from the log alone.",
        remedy=TRY_EACH,
        samples=log.last_samples(),
        suspects=(
            *([by_kl] if kl else []),
            Suspect(
                cause="the score tells completions apart by what the policy cannot change, or by chance",
                experiment="score a good and a bad completion by hand, each of them twice.",
            ),
            Suspect(
                cause="the policy is as good as it gets",
                experiment="read the completions with the lowest scores.",
            ),
        ),
    )


def _normalise(log: RunLog) -> Remedy:
    """By the setting that this trainer has."""
    settings = {"score_normalization": "running", "scale_rewards": "group", "normalize_advantages": True}
    names = [name for name in settings if name in log.config] or ["score_normalization"]
    return Remedy(text="Normalise the scores, or clip them.", changes={names[0]: settings[names[0]]})


def score_scale(log: RunLog, limits: Limits) -> Finding | None:
    """Scores are too large for a value role that starts at 0, or far from it; or their scale drifts, or is another one
    for a few."""
    spread, start = log.series("score_std"), log.series("score").start()
    half, alike, middle = (log.series(f"objective/scores_{name}").start() for name in ("shorth", "alike", "median"))
    if not log.suffices(spread, limits.enough) or advantages_are_normalised(log):
        return None
    now = min(spread.recent(), spread.lasting())
    drift = now / spread.start() if len(spread) >= limits.least_rows and spread.start() > 1e-6 else 1.0
    cause, remedy, more = "a reward function or reward model without bounds.", _normalise(log), ""
    if min(spread.recent(3), spread.lasting()) > limits.score_std:
        title = "The scores' scale is too large"
    elif drift > limits.score_drift and now > 1.0:
        title = "The scores' scale drifts"
    elif log.series("value_loss") and abs(start) > max(limits.score_std, limits.far_from_0 * spread.start()):
        title, more = "The scores are far from 0", f" Their mean is {start:.3g}, and values start at 0."
    elif 0.0 < half < limits.dwarfed * spread.start() and alike < 0.5:  # where more are one, half of them are
        title, more = "A few scores dwarf all others", f" Half of them lie within {half:.2g}."
        cause = "a function that scores some prompts on another scale than others, so that all the others look alike."
        remedy = Remedy(
            text="Bring all prompts to one scale, or clip the scores.",
            changes={"reward_clip_range": _around(middle, 2 * half)} if math.isfinite(middle) else {},
        )
    else:
        return None
    return Finding(
        name="score_scale",
        severity="problem",
        title=title,
        steps=(spread.steps[0], spread.steps[-1]),
        evidence=f"Their standard deviation is {spread.recent(3):.3g}, at the start {spread.start():.3g}.{more}",
        figures={
            "score_std": spread.recent(3),
            "start": spread.start(),
            **({} if math.isnan(start) else {"mean": start}),
        },
        cause=f"{cause} kl_coef, clipping of values and learning rate all suppose scores of a few units.",
        remedy=remedy,
        samples=log.last_samples(),
    )


def _around(middle: float, width: float) -> list[float]:
    """The range from so much below to so much above, to two digits of the latter."""
    places = 1 - math.floor(math.log10(width))
    return [round(middle - width, places), round(middle + width, places)]


def score_drifts(log: RunLog, limits: Limits) -> Finding | None:
    """Scores depend on when they are given: what they mean changes from one rollout to the next, or their mean changes
    by more than the policy's move can make."""
    return _meaning_changes(log, limits) or _falls_alone(log, limits) or _mean_drifts(log, limits)


def _meaning_changes(log: RunLog, limits: Limits) -> Finding | None:
    """From one rollout on the score goes with the yardstick as it did not before, or no longer does. What a policy
    learns takes longer."""
    for name in log.names(AGREEMENT):
        r = log.series(f"{AGREEMENT}{name}")
        for at in range(3, len(r) - 2):
            before, after = r.values[at - 3 : at], r.values[at : at + 3]
            if max(min(before) - max(after), min(after) - max(before)) > limits.agreement_drop:
                return _drifts(
                    (r.steps[at - 1], r.steps[at]),
                    f"Score and yardstick {name} correlate at {fmean(before):.2f} up to step {r.steps[at - 1]}, and at "
                    f"{fmean(after):.2f} from step {r.steps[at]} on.",
                    {"before": fmean(before), "after": fmean(after)},
                    log,
                )
    return None


def _falls_alone(log: RunLog, limits: Limits) -> Finding | None:
    """The score that is trained on falls, and the yardstick, which it went with at first, does not: completions get
    less than they did."""
    score, kl, length = (log.series(name) for name in ("score", "kl", "length"))
    lost, errors = score.rise()
    if len(score) < limits.least_rows or not errors < -limits.noticeable:
        return None
    if not kl.recent() < limits.budget_of(length.recent()):  # who has moved so far earns other scores
        return None
    for name in log.names(AGREEMENT):
        yardstick, r = log.series(f"yardstick/{name}"), log.series(f"{AGREEMENT}{name}")
        if not yardstick.rise()[1] > -1.0 or not r.start() - r.recent() > limits.agreement_drop:
            continue
        return _drifts(
            (score.steps[0], score.steps[-1]),
            f"The mean score fell by {-lost:.3g}, and the yardstick {name} did not ({yardstick.start():.3g} to "
            f"{yardstick.recent():.3g}); they correlated at {r.start():.2f}, and now at {r.recent():.2f}.",
            {"from": score.start(), "to": score.recent()},
            log,
        )
    return None


def _mean_drifts(log: RunLog, limits: Limits) -> Finding | None:
    """The mean score changes by more than the policy's move can make.

    At a KL of d nats from the reference the mean of a score of spread s is at most s * sqrt(2 d) from the reference's,
    where the score's tails are those of a normal variable (Donsker and Varadhan 1983). The policy moved from where it
    was in the first rollout to the reference, at most, and from there to where it is.
    """
    names = ("score", "score_std", "kl", "objective/kl_std", "prompts/distinct")
    size = float(log.setting("rollout_batch_size", 0))
    of_rollouts = replace(log, rows=[row for row in log.rows if "objective/kl_std" in row])
    score, spread, kl, kl_std, distinct = (of_rollouts.series(name) for name in names)
    if size < 16 or len(score) < 4 or not len(score) == len(spread) == len(kl) == len(kl_std) == len(distinct):
        return None
    errors = [limits.noticeable * std / math.sqrt(size) for std in kl_std.values]
    moves = [math.sqrt(2 * (max(nats, 0.0) + error)) for nats, error in zip(kl.values, errors, strict=True)]
    at, in_a_row = 0, 0
    for at in range(1, len(score)):
        width = max(spread.values[0], spread.values[at])
        chance = limits.noticeable * math.sqrt(2 / (size * max(distinct.values[at], 1 / size)))
        explained = width * (limits.beyond_kl * (moves[0] + moves[at]) + chance)
        in_a_row = in_a_row + 1 if abs(score.values[at] - score.values[0]) > explained else 0
        if in_a_row == 3:
            break
    if in_a_row < 3:
        return None
    return _drifts(
        (score.steps[0], score.steps[at]),
        f"The mean score went from {score.values[0]:.3g} to {score.values[at]:.3g}, at a KL of {kl.values[at]:.2f} "
        f"nats per completion; with a spread of {spread.values[0]:.3g} such a policy can change it by "
        f"{spread.values[0] * math.sqrt(2 * max(kl.values[at], 0.0)):.2g}.",
        {"from": score.values[0], "to": score.values[at], "kl": kl.values[at]},
        log,
    )


def _drifts(steps: tuple[int, int], evidence: str, figures: dict[str, float], log: RunLog) -> Finding:
    return Finding(
        name="score_drifts",
        severity="problem",
        title="Scores change though the policy has hardly moved",
        steps=steps,
        evidence=evidence,
        figures=figures,
        cause=(
            "a reward function whose scores depend on when it is called: a sum that is never reset, a schedule, a "
            "judge that changed; or prompts that come sorted."
        ),
        remedy=Remedy(
            text=(
                "Score the same completion twice, some rollouts apart: it must get the same score again. Shuffle the "
                "prompts."
            ),
            code="print(reward_func(prompts=prompts, completions=completions, trainer_state=trainer.state))",
        ),
        samples=log.last_samples(),
    )


def over_optimisation(log: RunLog, limits: Limits) -> Finding | None:
    """The score rises while what it stands for falls."""
    score, kl = log.series("score"), log.series("kl")
    if len(score) < limits.least_rows:
        return None
    at = f"; KL {kl.recent():.2f} nats per completion" if kl else ""
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
            name="over_optimisation",
            severity="problem",
            title="The score rises while what it stands for falls",
            steps=log.steps,
            evidence=(
                f"Score {score.start():.2f} to {score.recent():.2f}; {name} {yardstick.best():.3g} at its best and "
                f"{yardstick.recent():.3g} now{at}."
            ),
            figures={"score": score.recent(), "best": yardstick.best(), "now": yardstick.recent()},
            cause=(
                "the policy has moved away from the completions that the reward model was trained on, to some that it "
                "overrates."
            ),
            remedy=Remedy(
                text=(
                    "Hold the policy nearer to the reference, or rate its latest completions and train the reward "
                    "model again."
                ),
                changes=stronger(log, limits),
            ),
            samples=log.last_samples(),
        )
    return None


def score_opposed(log: RunLog, limits: Limits) -> Finding | None:
    """The score likes best those completions that the yardstick likes least, from the first rollouts on."""
    for name, first, error, rows in _early_agreement(log, limits):
        if first + limits.noticeable * error > (0.0 if rows == limits.least_rows else limits.opposed):
            continue
        if first > limits.opposed:
            continue
        return Finding(
            name="score_opposed",
            severity="problem",
            title="The score is the opposite of what it stands for",
            steps=(log.rows[0]["step"], log.rows[rows - 1]["step"]),
            evidence=f"Over the completions of {_first(rows)} the score and {name} correlate at {first:.2f}.",
            figures={"correlation": first},
            cause=(
                "the wrong sign: a distance, an error or a loss returned as the score; or a score for something that "
                "good completions have less of."
            ),
            remedy=Remedy(
                text="Score a good and a bad completion by hand: the good one must get more.",
                code="print(reward_func(prompts=[p, p], completions=[good, bad]))",
            ),
            samples=log.last_samples(),
        )
    return None


def score_misaligned(log: RunLog, limits: Limits) -> Finding | None:
    """Scores are those of other rows: places decide, or they go with the yardstick's verdicts some places away."""
    of_its_own = max((log.series(f"{AGREEMENT}{name}").start() for name in log.names(AGREEMENT)), default=math.nan)
    for name in () if of_its_own >= limits.in_part else noise_of(log):  # ties may be broken by place
        place, chance = differs_by(log, "place", name), differs_by(log, "chance", name)
        if place > limits.noise and chance < limits.same_again:
            return _misaligned(
                log.steps,
                f"{min(place, 1.0):.0%} of the variance of {name} changes when the same completions are scored in "
                f"another order, and {chance:.0%} when they are scored again in the same one: their places decide.",
                {"by_place": place, "by_chance": chance},
                "scores or references that are joined to the completions by place, not by what they belong to; or a "
                "function that goes on from row to row, and gives a row what those before it have left.",
                log,
                severity="warning" if of_its_own >= limits.related else "problem",  # which a policy learns from
            )
    for name in log.names(SHIFTED):
        own, other = log.series(f"{AGREEMENT}{name}"), log.series(f"{SHIFTED}{name}")
        if not log.suffices(other, limits.enough) or not own.start() < limits.unrelated:
            continue
        if other.start() < limits.misaligned:
            continue
        return _misaligned(
            (other.steps[0], other.steps[:3][-1]),
            f"The score of a completion and {name}'s verdict on it correlate at {own.start():.2f}, with that on "
            f"another row, always as many places away, at {other.start():.2f}.",
            {"own": own.start(), "other": other.start()},
            "a list that is off by some rows: scores that come late, sorted back wrongly or joined by place.",
            log,
        )
    return None


def _misaligned(
    steps: tuple[int, int],
    evidence: str,
    figures: dict[str, float],
    cause: str,
    log: RunLog,
    severity: str = "problem",
) -> Finding:
    return Finding(
        name="score_misaligned",
        severity=severity,
        title="Scores belong to other rows",
        steps=steps,
        evidence=evidence,
        figures=figures,
        cause=cause,
        remedy=Remedy(
            text="Score a good and a bad completion by hand, in both orders: each must keep its score.",
            code="print(reward_func(prompts=[p, p], completions=[good, bad]))",
        ),
        samples=log.last_samples(),
    )


def score_unrelated(log: RunLog, limits: Limits) -> Finding | None:
    """The score says nothing of what it is to stand for, from the first rollouts on; in part is a warning."""
    related = _early_agreement(log, limits)
    if not related or score_opposed(log, limits) is not None:
        return None
    name, first, error, rows = max(related, key=lambda one: one[1])
    sure = max(first + limits.noticeable * error for _, first, error, _ in related) <= 2 * limits.unrelated
    # Where nearly all scores are one, chance decides whether the few that differ go against it.
    few_differ = first <= -limits.unrelated and log.series("objective/scores_alike").start() >= limits.alike
    unrelated = first < limits.unrelated and sure and not few_differ
    if not unrelated and not (rows >= limits.least_rows and limits.unrelated <= first < limits.in_part - error):
        return _wrong_for_some(log, limits) if first >= limits.in_part - error else None
    title = "The score has nothing to do with what it stands for"
    if first < -limits.unrelated:
        title = "The score goes against what it stands for rather than with it"
    return Finding(
        name="score_unrelated",
        severity="problem" if unrelated else "warning",
        title=title if unrelated else "The score follows what it stands for only in part",
        steps=(log.rows[0]["step"], log.rows[rows - 1]["step"]),
        evidence=(
            f"Over the completions of {_first(rows)} the score and {name} correlate at {first:.2f} (standard error "
            f"{error:.2f})."
        ),
        figures={"correlation": first, "error": error},
        cause=(
            "a reward model that was not loaded, or over another base or template than it was trained with; a function "
            "that reads the wrong column, row or part of the text; or one for something else."
        ),
        remedy=Remedy(
            text="Score a good and a bad completion by hand, and compare each text with what the function was handed.",
            code="print(reward_func(prompts=[p, p], completions=[good, bad]))",
        ),
        samples=log.last_samples(),
    )


def _wrong_for_some(log: RunLog, limits: Limits) -> Finding | None:
    """Of the completions that the yardstick likes best, some score low, and did so early: before the policy has moved
    far from its start."""
    for name in log.names(MISSED):
        series = log.series(f"{MISSED}{name}")
        rows = min(len(series), 2 * limits.least_rows)
        share, best = series.start(rows), float(log.setting("rollout_batch_size", 0)) * rows / 4  # at the least
        error = math.sqrt(share * (1 - share) / best) if best else math.inf
        if not share > max(limits.missed + error, limits.noticeable * error):
            continue
        return Finding(
            name="score_unrelated",
            severity="warning",
            title="Some completions that should score high score low",
            steps=(series.steps[0], series.steps[:rows][-1]),
            evidence=(
                f"Of the completions that yardstick {name} likes best, {share:.0%} scored no more than the others on "
                f"average in {_first(rows)}, though over all of them the two go together."
            ),
            figures={"missed": share},
            cause=(
                "a function that is wrong for some prompts or spellings: names, numbers or characters that it does not "
                "expect, a list of words that hits others, references that are wrong; or one that fails now and then."
            ),
            remedy=Remedy(
                text="Look at completions that should score high and do not: what do their prompts share?",
                code="print(sorted(zip(scores, completions))[:10])  # of those that should score high",
                moves="missed/",
                direction="down",
            ),
            samples=log.last_samples(),
        )
    return None


def _early_agreement(log: RunLog, limits: Limits) -> list[tuple[str, float, float, int]]:
    """Of each yardstick its correlation with the score over the first rollouts, a mean, the standard error of that, and
    how many rollouts it is of. Early, while the policy is near its start: later ones differ by what was learned.

    The error is that of so many independent completions (Fisher 1915), or what rollouts differ by where that is more.
    """
    found = []
    for name, r in _correlations_with_score(log).items():
        rows = min(len(r), limits.least_rows)
        completions = float(log.setting("rollout_batch_size", 0)) * rows
        if not rows or (rows < limits.least_rows and completions < limits.enough):
            continue
        early = Series(r.steps[:rows], r.values[:rows])
        mean, error = early.start(rows), early.noise() / math.sqrt(rows) if rows > 1 else 0.0
        of_chance = (1 - mean * mean) / math.sqrt(max(completions - 3, 1.0)) if completions else 0.0
        found.append((name, mean, max(error, of_chance), rows))
    return found


def _first(rows: int) -> str:
    return f"the first {rows} rollouts" if rows > 1 else "the first rollout"


def scores_alike(log: RunLog, limits: Limits) -> Finding | None:
    """Nearly all completions get the same score from the start, so there is little to learn from."""
    alike, spread = log.series("objective/scores_alike"), log.series("score_std")
    if not log.suffices(alike, limits.enough):
        return None
    if not limits.alike <= alike.start() or spread.start() == 0.0:
        return None
    worth = _of_one_worth(log, limits.alike, slice(3))
    return Finding(
        name="scores_alike",
        severity="warning" if log.series("score").ever_rose(limits.noticeable) else "problem",
        title="Nearly all completions get the same score",
        steps=(alike.steps[0], alike.steps[:3][-1]),
        evidence=(
            f"In the first rollouts {alike.start():.0%} of the completions have one score, {alike.recent():.0%} now."
        ),
        figures={"alike": alike.start(), "now": alike.recent()},
        cause=(
            "a reward that hardly any completion earns, or nearly every one; or scores that are cut to one end of "
            "their range."
            if worth is None
            else f"{CANNOT_TELL}: {worth}."
        ),
        remedy=Remedy(
            text=(
                "Give part of the reward for a part of the way, start with easier prompts (or harder ones), and take "
                "several completions of each prompt."
            ),
            code="print(collections.Counter(reward_func(prompts=prompts, completions=completions)))",
        ),
        samples=log.last_samples(),
        suspects=() if worth is None else _OF_ONE_WORTH,
    )


def mostly_unscored(log: RunLog, limits: Limits) -> Finding | None:
    """Reward functions abstain from most completions."""
    unscored, size = log.series("objective/unscored"), log.setting("rollout_batch_size")
    if not size or not log.suffices(unscored, limits.enough):
        return None
    if not unscored.recent(len(unscored)) >= limits.unscored * float(size):
        return None
    share = unscored.recent(len(unscored)) / float(size)
    return Finding(
        name="mostly_unscored",
        severity="problem",
        title="Most completions get no score",
        steps=log.steps,
        evidence=f"Of {share:.0%} of the completions the reward functions return None, so they are not learned from.",
        figures={"unscored": share},
        cause="a parser or a judge that fails on most completions, or a function made for another kind of prompt.",
        remedy=Remedy(
            text="Look at completions without a score; where a completion cannot be read, let it score low.",
            code="print([c for c, s in zip(completions, reward_func(prompts, completions)) if s is None])",
        ),
        samples=log.last_samples(),
    )


def _correlations_with_score(log: RunLog) -> dict[str, Series]:
    """Of each yardstick, its correlation with the score over a rollout's completions; of a function of weight 0 with
    the one function that is trained on, where it is one."""
    series = {f"yardstick {name}": log.series(f"{AGREEMENT}{name}") for name in log.names(AGREEMENT)}
    weights = weights_of(log)
    active = [name for name, weight in weights.items() if weight]
    for pair in log.names("rewards/correlation/"):
        both = pair.split("~")
        idle = [name for name in both if weights.get(name) == 0]
        if len(active) == 1 and len(idle) == 1 and active[0] in both and weights[active[0]] > 0:
            series[f"{idle[0]} (weight 0)"] = log.series(f"rewards/correlation/{pair}")
    return series


def yardsticks(log: RunLog) -> dict[str, Series]:
    """The series that measure what the score stands for: `yardstick/...`, and reward functions of weight 0."""
    series = {f"yardstick {name}": log.series(f"yardstick/{name}") for name in log.names("yardstick/")}
    for name, weight in weights_of(log).items():
        if weight == 0:
            series[f"{name} (weight 0)"] = log.series(f"rewards/{name}/mean")
    return series


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
    members = log.series("objective/score_spread")  # several reward roles, none of which has a weight of its own
    if len(active) < 2 or len(log.rows) < 3 or len(members):
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
                    text=f"Decide which one counts: lower the weight of {both[1]}.",
                    changes=_reweighted(names, weights, both[1], 0.2),
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
            Remedy(text="Bring them to one scale.", changes=_reweighted(names, weights, name, second / first)),
        )
    return None


def _each_scaled(log: RunLog) -> bool:
    """Whether each function's scores are divided by their spread before they are weighted."""
    here = log.setting("score_normalization", "none") != "none"
    return here or log.setting("multi_objective_aggregation") == "normalize_then_sum"


def _odds(title: str, log: RunLog, evidence: str, figures: dict[str, float], remedy: Remedy) -> Finding:
    cause = "reward functions of different scales, or with conflicting aims, summed as they are."
    return Finding(
        name="functions_at_odds",
        severity="problem",
        title=title,
        steps=log.steps,
        evidence=evidence,
        figures=figures,
        cause=cause,
        remedy=remedy,
    )


def _reweighted(names: list[str], weights: dict[str, float], changed: str, factor: float) -> dict[str, list[float]]:
    new = [weights.get(name, 1.0) * (factor if name == changed else 1.0) for name in names]
    return {"reward_weights": [float(f"{weight:.2g}") for weight in new]}
