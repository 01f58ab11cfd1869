"""Rules about the samples: prompts, and the completions to them."""

from __future__ import annotations

import math

from trl_ext.diagnostics.distributions import if_paid, movers, pays, stronger, weaker
from trl_ext.diagnostics.finding import CANNOT_TELL, TRY_EACH, Finding, Remedy, Suspect
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog


def truncation(log: RunLog, limits: Limits) -> Finding | None:
    """Completions do not end; a warning where they did not at the start, and have learned to."""
    cut = log.series("truncated")
    if not log.suffices(cut, limits.enough) or not max(cut.recent(3), cut.start()) >= limits.truncated:
        return None
    now, from_the_start = cut.recent(3) >= limits.truncated, cut.values[0] >= limits.truncated
    longest, penalty = log.setting("max_completion_length"), float(log.setting("missing_eos_penalty", 0.0))
    longer = {"max_completion_length": 2 * int(longest), "missing_eos_penalty": max(1.0, penalty)} if longest else {}
    sampler = _ended_by_who_samples(log)
    known = bool(sampler) or not now or (not from_the_start and pays(log, limits))
    return Finding(
        name="truncation",
        severity="problem" if now else "warning",
        title="Completions are cut off before they end" if now else "Completions were cut off before they ended",
        steps=(cut.steps[-3:][0], cut.steps[-1]) if now else (cut.steps[0], cut.steps[:3][-1]),
        evidence=(
            f"{cut.recent(3):.0%} of the completions reach the length limit{f' of {longest}' if longest else ''} "
            f"without EOS; {cut.start():.0%} did at the start."
        ),
        figures={"truncated": cut.recent(3), "start": cut.start()},
        from_the_start=from_the_start,
        cause=(
            sampler
            if sampler
            else "too short a limit for what the policy had to say, so that it learned to say less."
            if not now
            else "a reward for length or for what has no end, or a limit too short for answers that rightly grew."
            if known
            else f"{CANNOT_TELL} from the log alone."
        ),
        remedy=Remedy(
            text="Let the generator, or the server behind it, write up to max_completion_length, and give the EOS back."
        )
        if sampler
        else Remedy(
            text="Raise the limit, and take a penalty off the score of a completion that was cut.", changes=longer
        )
        if known
        else TRY_EACH,
        samples=log.last_samples(),
        suspects=()
        if known
        else (
            Suspect(
                cause="the limit is too short for what there is to say",
                experiment="far fewer are cut if this is it.",
                changes=longer,
            ),
            *(_NEVER_ENDS if from_the_start else movers(log, limits)),
        ),
    )


def _ended_by_who_samples(log: RunLog) -> str:
    """What ends completions that are cut off, and of which none is as long as it may be; empty where some are."""
    names = ("truncated", "length", "completions/min_length", "completions/max_length")
    each = list(zip(*(log.series(name).values for name in names), strict=False))
    written = max((most for *_, most in each), default=math.nan)
    if not written < int(log.setting("max_completion_length") or 0):
        return ""
    # At a limit all that are cut have its length, and the others at least the least; a hundredth for rounding.
    if all(mean >= 0.99 * (cut * most + (1 - cut) * least) for cut, mean, least, most in each):
        return f"who samples has a limit of its own: no completion is longer than {written:.0f} tokens."
    return (
        "who samples ends them: they are of different lengths and below the limit. It takes the EOS off, or stops at "
        "marks that are not it."
    )


# What the model makes of its prompts, or is, where what it writes is no answer.
UNREAD = Suspect(
    cause="prompts are not written as the model was taught to read them, or its weights are not what its files hold",
    experiment="the base alone, by Transformers' generate and its own template, answers well if this is it.",
)
_NEVER_ENDS = (
    Suspect(
        cause="the model was not taught to end, or generation waits for another EOS than it writes",
        experiment="compare the ids in which its answers end with those that generation waits for.",
    ),
    UNREAD,
)


def length_exploitation(log: RunLog, limits: Limits) -> Finding | None:
    """Completions grow because length is rewarded; a warning where the log does not correlate score and length."""
    length, pull = log.series("length"), log.series("completions/score_length_correlation")
    if len(length) < limits.least_rows or length.rise()[1] < limits.noticeable:
        return None
    is_scored = pull.start() > limits.length_is_scored
    if not is_scored and length.recent() < limits.length_growth * length.start():
        return None
    if pull and max(pull.start(), pull.recent()) < limits.length_correlation:
        return None
    shown = f" Score and length correlate at {max(pull.start(), pull.recent()):.2f}." if pull else ""
    return Finding(
        name="length_exploitation",
        severity="problem" if pull else "warning",
        title="Completions grow because length is rewarded" if pull else "Completions grow",
        steps=(length.steps[0], length.steps[-1]),
        evidence=f"The mean length went from {length.start():.1f} to {length.recent():.1f} tokens.{shown}",
        figures={"length": length.recent(), "start": length.start()},
        cause=f"a reward that is higher for longer completions{'' if pull else ', or a task that takes more words'}.",
        remedy=Remedy(
            text="Add a penalty on length beyond what a completion needs.",
            code=f"reward_funcs=[..., trl_ext.rewards.texts.length_penalty(soft={length.start():.0f}, "
            f"hard={2 * length.start():.0f})]",
        ),
        samples=log.last_samples(),
    )


def completions_shrink(log: RunLog, limits: Limits) -> Finding | None:
    """Completions end sooner and sooner, though nothing gets better by it or because that is rewarded."""
    length, pull = log.series("length"), log.series("completions/score_length_correlation")
    start, now = _length_of_ended(log), length.recent()
    if len(length) < limits.least_rows or length.rise()[1] > -limits.noticeable:
        return None
    weakest = min(pull.start(), pull.recent()) if pull else math.nan
    rewarded = weakest < -limits.length_correlation
    halved = now < limits.length_shrinkage * start
    if rewarded and not now < start / limits.length_growth:
        return None
    if not rewarded and (not halved or log.series("score").rise()[1] > limits.noticeable):
        return None
    nothing_left = now < 2.5  # tokens, the EOS among them
    shown = f" Score and length correlate at {weakest:.2f}." if pull else ""
    return Finding(
        name="completions_shrink",
        severity="problem" if nothing_left or (rewarded and halved) else "warning",
        title="Completions shrink because that is rewarded" if rewarded else "Completions shrink",
        steps=(length.steps[0], length.steps[-1]),
        evidence=(f"Those that ended had {start:.1f} tokens at the start; the mean length is {now:.1f} now.{shown}"),
        figures={"length": now, "start": start},
        cause=(
            "a score that is higher for shorter completions: a sum of penalties, each of which needs something written."
            if rewarded
            else f"{CANNOT_TELL}: the score does not rise, and is not seen to favour short completions."
        ),
        remedy=Remedy(
            text="Score an empty completion and a good one, and let the empty one be worse.",
            code="print(reward_func(prompts=[p, p], completions=['', good]))",
        ),
        samples=log.last_samples(),
        suspects=()
        if rewarded
        else (
            Suspect(
                cause="the KL penalty is paid for every token, and a completion of none pays nothing",
                experiment="completions grow again if this is it.",
                changes=weaker(log),
            ),
            Suspect(
                cause="the score is less for each thing that is written",
                experiment="an empty completion scores more than a good one if this is it.",
            ),
        ),
    )


def _length_of_ended(log: RunLog) -> float:
    """The mean length at the start of completions that ended by EOS; NaN where it is not known: who learns to end
    becomes shorter, too."""
    length, cut, longest = (
        log.series("length").start(),
        log.series("truncated").start(),
        log.setting("max_completion_length"),
    )
    if not cut > 0:
        return length
    return (length - cut * float(longest)) / (1 - cut) if longest and cut < 0.5 else math.nan


def repetition_exploitation(log: RunLog, limits: Limits) -> Finding | None:
    """Completions repeat themselves because that is rewarded."""
    repeated = log.series("completions/repetition")
    if len(repeated) < 3 or repeated.recent(3) < limits.repetition + repeated.start():
        return None
    return Finding(
        name="repetition_exploitation",
        severity="problem",
        title="Completions repeat themselves",
        steps=(repeated.steps[0], repeated.steps[-1]),
        evidence=(
            f"{repeated.recent(3):.0%} of a completion's trigrams occurred in it before, {repeated.start():.0%} at the "
            "start."
        ),
        figures={"repetition": repeated.recent(3), "start": repeated.start()},
        samples=log.last_samples(),
        **if_paid(
            log,
            limits,
            "a reward that counts something that a completion can repeat.",
            Remedy(
                text="Add a penalty on repetition, or count each thing once.",
                code="reward_funcs=[..., trl_ext.rewards.texts.repetition_penalty()]",
            ),
        ),
    )


def mode_collapse(log: RunLog, limits: Limits) -> Finding | None:
    """Different prompts get the same completion."""
    distinct, prompts = log.series("completions/distinct"), log.series("prompts/distinct")
    if len(distinct) < 3 or not prompts:
        return None
    share = distinct.recent(3) / max(prompts.recent(3), 1e-6)
    if share > limits.distinct or distinct.recent(3) > 0.5 * distinct.start():
        return None
    why = if_paid(
        log,
        limits,
        "a reward that does not look at the prompt, and too weak a KL penalty.",
        Remedy(
            text="Let the reward look at the prompt, and hold the policy nearer to the reference.",
            changes=stronger(log, limits),
        ),
    )
    if log.series("evidence/score/moved_by_prompt").start() > limits.reads_prompt:
        overrated = [_OVERRATED] if pays(log, limits) else []
        suspects = (*overrated, *movers(log, limits))
        why = {"cause": f"{CANNOT_TELL}: the score looks at the prompt.", "remedy": TRY_EACH, "suspects": suspects}
    return Finding(
        name="mode_collapse",
        severity="problem",
        title="Different prompts get the same completion",
        steps=(distinct.steps[0], distinct.steps[-1]),
        evidence=f"{distinct.recent(3):.0%} of the completions are distinct, {distinct.start():.0%} were at the start.",
        figures={"distinct": distinct.recent(3), "start": distinct.start()},
        samples=log.last_samples(),
        **why,
    )


_OVERRATED = Suspect(
    cause="the score overrates this one completion, whatever was asked",
    experiment="score it as the answer to ten prompts: it earns more than good answers if this is it.",
)


def copied_completions(log: RunLog, limits: Limits) -> Finding | None:
    """Completions are the same from the first rollout on, though each is too improbable to be sampled twice."""
    distinct, prompts = log.series("completions/distinct"), log.series("prompts/distinct")
    surprise, entropy = log.series("objective/entropy"), log.series("entropy")
    judged, size = min(len(distinct), 3), float(log.setting("rollout_batch_size", 0))
    if not (judged and prompts and surprise and entropy) or (judged < 3 and not size):
        return None
    if size and judged * size * (1 - distinct.start()) < limits.repeats:
        return None
    # Greedy decoding repeats itself, too, but takes what surprises the policy less than its entropy says.
    if surprise.start() < 0.7 * entropy.start() * log.series("length").start():
        return None
    share = distinct.start() / max(prompts.start(), 1e-6)
    one_for_all = share < limits.distinct and surprise.start() > limits.improbable
    one_a_prompt = prompts.start() < 0.8 and 0.8 < share < 1.05 and surprise.start() > limits.unlikely_twice
    if not (one_for_all or one_a_prompt):
        return None
    return Finding(
        name="copied_completions",
        severity="problem",
        title="Different prompts get the same completion from the start"
        if one_for_all
        else "The completions of one prompt are copies",
        steps=(distinct.steps[0], distinct.steps[judged - 1]),
        evidence=(
            f"In the first rollouts {distinct.start():.0%} of the completions and {prompts.start():.0%} of the prompts "
            f"are distinct. Each has a log-probability of {-surprise.start():.1f} nats under the policy: so many are "
            "not alike by chance."
        ),
        figures={"distinct": distinct.start(), "prompts": prompts.start(), "surprise": surprise.start()},
        cause=(
            "a generator that returns one answer for all."
            if one_for_all
            else "several samplers with one seed, or a generator that answers a repeated prompt once."
        ),
        remedy=Remedy(
            text="Give each sampler a seed of its own, and let the generator sample anew for every prompt it is given.",
            code="print(generator.answers([prompt_ids] * 4, config, 'policy'))",
        ),
        samples=log.last_samples(),
    )


def prompts_truncated(log: RunLog, limits: Limits) -> Finding | None:
    """Something cut the prompts to one length: most have it exactly, and the others are shorter by far.

    Prompts of one form are alike in length too, but all of them: they are all equally long, or nearly.
    """
    share, shortest, longest = (log.series(f"prompts/{name}") for name in ("at_max_length", "min_length", "max_length"))
    mean = share.recent(len(share))
    if not share or not limits.prompts_at_max_length <= mean < 1:
        return None
    ends = (min(shortest.values), max(longest.values)) if shortest and longest else None
    if ends is not None and ends[1] - ends[0] < limits.prompts_spread:
        return None
    lengths = f": {ends[1]:.0f} tokens. The shortest has {ends[0]:.0f}." if ends is not None else "."
    return Finding(
        name="prompts_truncated",
        severity="warning",
        title="Prompts look cut to one length",
        steps=(share.steps[0], share.steps[-1]),
        evidence=f"{mean:.0%} of the prompts are exactly as long as the longest{lengths}",
        figures={"at_max_length": mean},
        cause=(
            "the prompts were truncated before they reached the trainer, so the model answers questions that it "
            "cannot see."
        ),
        remedy=Remedy(
            text="Filter long prompts out instead of cutting them.",
            code="dataset.filter(lambda row: len(row['prompt']) < limit)",
        ),
        samples=log.last_samples(),
    )


def few_prompts(log: RunLog, limits: Limits) -> Finding | None:
    """Each rollout has the same few prompts again and again."""
    distinct, size = log.series("prompts/distinct"), float(log.setting("rollout_batch_size") or 0)
    room = size / float(log.setting("num_generations", 1))
    if room < 16 or not log.suffices(distinct, limits.enough):
        return None
    count = distinct.recent(len(distinct)) * size
    if count > limits.few_prompts * room:
        return None
    return Finding(
        name="few_prompts",
        severity="problem" if count < 0.1 * room else "warning",
        title="The same few prompts come again and again",
        steps=log.steps,
        evidence=f"A rollout has room for {room:.0f} prompts, and {count:.0f} distinct ones on average.",
        figures={"prompts": count, "room": room},
        cause="a dataset of few prompts, or one in which most rows are the same.",
        remedy=Remedy(
            text="Take more prompts, of all kinds that the policy will meet, and keep each once.",
            code="print(len(set(map(str, dataset['prompt']))), len(dataset))",
        ),
    )


def prompts_in_order(log: RunLog, limits: Limits) -> Finding | None:
    """Rollouts are about a few things each, as prompts come in the order of a sorted dataset."""
    key, alike, count = log.setting("prompts_order", ("", 0.0, 0))
    room = float(log.setting("rollout_batch_size", math.inf)) / float(log.setting("num_generations", 1))
    if alike < limits.in_order or count < 2 * room:  # one rollout of all prompts has no order
        return None
    return Finding(
        name="prompts_in_order",
        severity="warning",
        title="The prompts come in order",
        steps=log.steps,
        evidence=(
            f"By {key} neighbouring prompts are {1 - alike:.1%} as far apart as prompts drawn at random, and "
            "shuffle_dataset is False."
        ),
        figures={"alike": alike, "prompts": float(count)},
        cause="a sorted or grouped dataset that is not shuffled: each rollout teaches what the next one unteaches.",
        remedy=Remedy(
            text="Shuffle the prompts; of a curriculum keep the order of its stages alone, and shuffle within each.",
            changes={"shuffle_dataset": True},
        ),
    )


def prompts_hold_completions(log: RunLog, limits: Limits) -> Finding | None:
    """What the policy is to write stands in its prompt already."""
    held = log.series("prompts/hold_completion")
    if not log.suffices(held, limits.enough):
        return None
    if not max(held.start(), held.recent()) >= limits.holds:
        return None
    return Finding(
        name="prompts_hold_completions",
        severity="warning",
        title="Prompts hold what is to be written",
        steps=log.steps,
        evidence=(
            f"{held.recent():.0%} of the completions stand word for word in their prompt, {held.start():.0%} did at "
            "the start."
        ),
        figures={"start": held.start(), "now": held.recent()},
        cause="prompts that end with the answer, or were made from whole conversations; or a task that is to copy.",
        remedy=Remedy(
            text="Unless copying is the task, end each prompt before the answer.",
            code="print(dataset[0]['prompt'])",
        ),
        samples=log.last_samples(),
    )


def empty_prompts(log: RunLog, limits: Limits) -> Finding | None:
    """Prompts without a text."""
    empty = log.series("prompts/empty")
    if not log.suffices(empty, limits.enough):
        return None
    if not empty.recent(len(empty)) >= limits.empty_prompts:
        return None
    share = empty.recent(len(empty))
    return Finding(
        name="empty_prompts",
        severity="warning",
        title="Some prompts are empty",
        steps=log.steps,
        evidence=f"{share:.0%} of the prompts have no text, or their last message has none.",
        figures={"empty": share},
        cause="a column that was lost on the way, or a field that some rows lack.",
        remedy=Remedy(
            text="Leave such rows out.",
            code="dataset = dataset.filter(lambda row: trl_ext.types.as_text(row['prompt']).strip())",
        ),
    )
