"""Rules about the signal that training follows, from what a run measured beside its training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from trl_ext.diagnostics.finding import Finding, Remedy, worst
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import AGREEMENT, RunLog, Series


def within_prompt(log: RunLog) -> tuple[float, float]:
    """The share of the scores' variance that lies within a prompt while completions still differ, and the repeats that
    it is known from; NaN and 0 where it is not known.

    Once the policy is certain, both completions of a prompt are the same whatever the score looks at: only the first
    measurements count, and only of a policy that was not certain from the start.
    """
    share, repeats = log.series("evidence/score/within_prompt"), log.series("evidence/score/repeats")
    if not share or not (log.series("entropy") or log.surprise()).start() > 0.1:
        return math.nan, 0.0
    first = list(zip(share.values, repeats.values, strict=False))[:3]
    known = sum(count for _, count in first)
    return (sum(value * count for value, count in first) / known, known) if known else (math.nan, 0.0)


def noise_of(log: RunLog) -> dict[str, tuple[float, int]]:
    """Of each reward function the share of its variance that does not repeat, a mean, and how often it was measured."""
    series = {name: log.series(f"evidence/noise/{name}") for name in log.names("evidence/noise/")}
    return {name: (fmean(of_one.values), len(of_one)) for name, of_one in series.items()}


def differs_by(log: RunLog, kind: str, name: str) -> float:
    """Of a reward function that does not repeat, the share that differs by "chance" or by "place"; NaN where nobody
    looked."""
    return log.series(f"evidence/noise_by_{kind}/{name}").start()


def is_compared(log: RunLog, name: str, limits: Limits) -> bool:
    """Whether a function's scores differ by who else is scored, and neither by chance nor by place: it compares each
    row with those beside it, which some mean to do."""
    if not noise_of(log)[name][0] > limits.noise:
        return False
    return max(differs_by(log, "chance", name), differs_by(log, "place", name)) < limits.noise


def share_of_functions(log: RunLog) -> float:
    """The share of the whole reward's variance that the reward functions make; NaN where it is not known."""
    shares = [log.series(f"evidence/share_of/{name}").recent() for name in log.names("evidence/share_of/")]
    return sum(shares) if shares else math.nan


SOURCE = "Cobbe et al. 2019, arXiv:1812.02341"


def score_ignores_completion(log: RunLog, limits: Limits) -> Finding | None:
    """Two completions of one prompt get the same score."""
    share, repeats = within_prompt(log)
    if repeats < limits.unlike or share > limits.within_prompt:
        return None
    compared = [name for name in noise_of(log) if is_compared(log, name, limits)]
    of_these = sum(log.series(f"evidence/share_of/{name}").recent() for name in compared)
    if log.setting("num_generations", 1) == 1 and compared and not of_these < 0.5:
        return None  # two answers of one prompt stand side by side for this measurement alone
    return Finding(
        name="score_ignores_completion",
        severity="problem",
        title="The score does not depend on the completion",
        steps=log.steps,
        evidence=(
            f"Of the scores' variance {share:.1%} lies between completions of the same prompt ({repeats:.0f} repeats), "
            "all the rest between prompts."
        ),
        figures={"within_prompt": share, "repeats": repeats},
        cause="the reward function reads the prompt, a column or the row's place, but not what was written.",
        remedy=Remedy(
            text="Let it read the completion, and try it on two different ones.",
            code="print(reward_func(prompts=[p, p], completions=[good, bad]))",
        ),
        samples=log.last_samples(),
    )


# What a score that does not look at the prompt lets happen. Where none of it does, it may be what is wanted: a tone, a
# length, a sentiment.
WITHOUT_A_PROMPT = ("mode_collapse", "entropy_collapse", "over_optimisation", "score_unrelated", "constant_scores")


def score_ignores_prompt(log: RunLog, limits: Limits, findings: Sequence[Finding]) -> Finding | None:
    """A completion gets the same score as the answer to another prompt, and that has done harm."""
    moved, spread = log.series("evidence/score/moved_by_prompt"), log.series("score_std")
    if not moved.start() <= limits.within_prompt or not spread.start() > 0.0:
        return None
    harm = [finding for finding in findings if finding.name in WITHOUT_A_PROMPT]
    if not harm:
        return None
    return Finding(
        name="score_ignores_prompt",
        severity=worst(harm),
        title="The score does not depend on the prompt",
        steps=log.steps,
        evidence=(
            "Scored as answers to other rows' prompts, completions get the same scores: they change by "
            f"{moved.start():.1%} of what unrelated scores differ by."
        ),
        figures={"moved": moved.start()},
        cause=(
            "the reward function reads the completion alone, so what is good for one prompt is good for all; or it "
            "holds completions against a reference that none of them meets, and only their form is left to score."
        ),
        remedy=Remedy(
            text="Let it read the prompt, or a column that goes with it; else hold the policy nearer to the reference.",
            code="print(reward_func(prompts=[p, other], completions=[answer, answer]))",
        ),
        samples=log.last_samples(),
    )


NOT_READ = ("truncation", "score_unrelated", "held_out_differs", "no_progress", "entropy_collapse", "mode_collapse")


def prompts_unlike_the_model(log: RunLog, limits: Limits, findings: Sequence[Finding]) -> Finding | None:
    """Prompts are not written as the model was taught to read them, and that has done harm."""
    names = ("plain", "unknown_markers", "otherwise")
    shares = {name: series.start() for name in names if (series := log.series(f"evidence/prompts/{name}"))}
    harm = [finding for finding in findings if finding.name in NOT_READ]
    if not harm:
        return None
    plain, unknown, otherwise = (shares.get(name, 0.0) for name in names)
    code = "print(tokenizer.decode(ids), AutoTokenizer.from_pretrained(model_path).apply_chat_template(prompt))"
    if unknown > limits.not_read:
        evidence = (
            f"{unknown:.0%} of the markers that the chat template writes are no tokens of the tokenizer, which takes "
            "them to pieces."
        )
        cause, figures = "the chat template of another model.", shares
    elif plain > limits.not_read:
        evidence = (
            f"{plain:.0%} of the prompts are plain texts, though the tokenizer has a chat template: no turn begins or "
            "ends."
        )
        cause, figures = "texts where a chat model expects messages.", shares
        code = "dataset.map(lambda row: {'prompt': [{'role': 'user', 'content': row['prompt']}]})"
    elif otherwise > limits.not_read:
        evidence = f"{otherwise:.0%} of the prompts are other tokens to the tokenizer and template beside the model."
        cause, figures = "another tokenizer or chat template than the model was trained with.", shares
    elif (other := _other_tokens(log, findings)) > limits.other_tokens:
        evidence = (
            f"{other:.0%} of the tokens that the model wrote at the start are others once the tokenizer has read their "
            "text: it takes what it is asked to other pieces than the model knows."
        )
        cause = "a tokenizer that is not the model's, or not whole: merges, casing, a vocabulary."
        figures = {"share": other}
    elif (told := _one_answer(log, limits)) is not None:
        evidence, figures = told
        cause = (
            "a chat template that ends otherwise than in training (a space or a newline more or less will do), that of "
            "another model, or a tokenizer that is not the model's."
        )
        code = "print(repr(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)))"
    else:
        return None
    return Finding(
        name="prompts_unlike_the_model",
        severity=worst(harm),
        title="Prompts are not written as the model was taught to read them",
        steps=log.steps,
        evidence=evidence,
        figures=figures,
        cause=cause,
        remedy=Remedy(
            text="Take the tokenizer of the model that is trained, with its template, and give prompts as messages.",
            code=code,
        ),
        samples=log.last_samples(),
    )


def _other_tokens(log: RunLog, findings: Sequence[Finding]) -> float:
    """The share of the model's first tokens that the tokenizer reads as others; NaN where it is not known, or the model
    writes noise, of which no text is read as it was written."""
    share = log.series("evidence/prompts/other_tokens")
    noise = float(log.setting("temperature", 1.0)) > 1.0 or any(one.name == "base_damaged" for one in findings)
    return share.values[0] if share and log.has_the_first and not noise else math.nan


def _one_answer(log: RunLog, limits: Limits) -> tuple[str, dict[str, float]] | None:
    """Evidence and figures, where before a step was taken the policy was certain of one answer to all prompts."""
    distinct, prompts, entropy = (log.series(name) for name in ("completions/distinct", "prompts/distinct", "entropy"))
    size = float(log.setting("rollout_batch_size", 0))
    plain_sampling = float(log.setting("temperature", 1.0)) >= limits.temperature
    if not (distinct and prompts and entropy and plain_sampling and log.has_the_first):
        return None
    first = distinct.values[0]
    if size * first >= 2 or size * prompts.values[0] < 16 or entropy.values[0] > limits.entropy:
        return None
    evidence = (
        f"In the first rollout all completions were the same, to {size * prompts.values[0]:.0f} different prompts, "
        f"with {entropy.values[0]:.2g} nats per token: whatever it is asked, the model gives one answer."
    )
    return evidence, {"distinct": first, "entropy": entropy.values[0]}


def score_not_repeatable(log: RunLog, limits: Limits) -> Finding | None:
    """The same completion gets another score the second time."""
    noisy = {name: found for name, found in noise_of(log).items() if found[0] > limits.noise}
    if not noisy:
        return None
    name = max(noisy, key=lambda one: noisy[one][0])
    share, count = noisy[name]
    if count < 2 and share < limits.noise_alone:
        return None
    compared = is_compared(log, name, limits)
    by_place = differs_by(log, "place", name) > limits.noise > differs_by(log, "chance", name)
    causes = (
        "it compares each row with those beside it."
        if compared
        else "a row's place among the others decides: it goes on from row to row, or breaks ties by place."
        if by_place
        else "it draws random numbers, or keeps a state."
    )
    return Finding(
        name="score_not_repeatable",
        severity="problem" if share > limits.noise_alone and not compared else "warning",
        title=f"{name} scores the same completion differently {'beside other ones' if compared else 'the second time'}",
        steps=log.steps,
        evidence=f"{min(share, 1.0):.0%} of its variance is not there again when completions are scored once more.",
        figures={"noise": share, "measurements": float(count)},
        cause=causes,
        remedy=Remedy(
            text=(
                "Make it repeat itself: a judge at temperature 0, no state between calls, no ranks within a batch; or "
                "let it take a mean over several verdicts."
            ),
            code="print(reward_func(**row), reward_func(**row))",
        ),
    )


def penalty_dominates(log: RunLog, limits: Limits) -> Finding | None:
    """Whether a completion ended counts for more than what it says."""
    share, spread = log.series("evidence/share/missing_eos_penalty"), log.series("evidence/reward_std")
    if len(share) < 3 or share.recent() < limits.penalty_share:
        return None
    penalty = float(log.setting("missing_eos_penalty", 0.0))
    of_functions = share_of_functions(log)
    known = math.isfinite(of_functions)
    lower = math.sqrt(max(of_functions, 0.0)) * spread.recent() if known else 0.0
    told = f"; the reward functions make {max(of_functions, 0.0):.0%}" if known else ""
    weaker = {"missing_eos_penalty": float(f"{lower:.1g}")} if 0 < lower < penalty / 2 else {}
    return Finding(
        name="penalty_dominates",
        severity="problem",
        title="The penalty for a missing EOS outweighs the score",
        steps=log.steps,
        evidence=f"{share.recent():.0%} of the reward's variance is the penalty of {penalty:g}{told}.",
        figures={"penalty_share": share.recent(), **({"functions_share": max(of_functions, 0.0)} if known else {})},
        cause="a penalty far larger than the spread of the scores, or a length limit that many completions reach.",
        remedy=Remedy(
            text="Let the penalty be about the spread of the scores.",
            changes=weaker,
            code="" if weaker else "max_completion_length: longer than what a completion needs",
        ),
    )


def credit_fades(log: RunLog, limits: Limits) -> Finding | None:
    """The score of a completion hardly reaches the tokens that earned it."""
    mean, decay = log.series("evidence/credit/mean"), float(log.setting("gamma", 1.0)) * float(log.setting("lam", 0.95))
    if len(mean) < limits.least_rows or decay >= 1.0 or log.series("score").rise()[1] > limits.noticeable:
        return None
    half_life = math.log(0.5) / math.log(decay) if decay > 0 else 0.0
    length = log.series("length").recent()
    if half_life > limits.half_life or not half_life < length / 2:
        return None
    changes = {name: usual for name, usual in (("gamma", 1.0), ("lam", 0.95)) if log.setting(name, usual) < usual}
    return Finding(
        name="credit_fades",
        severity="problem",
        title="The score does not reach the tokens that earned it",
        steps=log.steps,
        evidence=(
            f"gamma * lam is {decay:.3g}: a score at the end counts half {half_life:.1f} tokens earlier, and "
            f"completions have {length:.0f}. A token gets {mean.recent():.0%} of it on average, and the score does not "
            "rise."
        ),
        figures={"credit": mean.recent(), "half_life": half_life},
        cause="a discount or a lambda for tasks that are rewarded at every step.",
        remedy=Remedy(text="Do not discount within a completion, and let lambda be 0.95 or more.", changes=changes),
    )


def base_moves(log: RunLog, limits: Limits) -> Finding | None:
    """Weights change that nothing trains."""
    moved = log.series("evidence/base_moved")
    if not moved or not max(moved.values) > limits.base_moved:
        return None
    at = next(i for i, value in enumerate(moved.values) if value > limits.base_moved)
    return Finding(
        name="base_moves",
        severity="problem",
        title="Weights change that nothing trains",
        steps=(moved.steps[at], moved.steps[-1]),
        evidence=(
            f"Of the base and of the adapters that are not trained some numbers have changed by up to "
            f"{max(moved.values):.2g} of their tensor's largest since training began, first seen at step "
            f"{moved.steps[at]}."
        ),
        figures={"moved": max(moved.values)},
        cause=(
            "a generator that merges the policy's adapter into the base and leaves it there, an optimizer that was "
            "given more than the trained weights, or a callback that writes into the model."
        ),
        remedy=Remedy(
            text=(
                "Merge on a copy, or unmerge before the answers are returned; give an optimizer of your own the "
                "trained weights alone. Begin anew: all roles stand on this base."
            ),
            code="[p for p in base.parameters() if p.requires_grad]",
        ),
    )


def lost_to_rounding(log: RunLog, limits: Limits) -> Finding | None:
    """Steps are smaller than what the adapters' numbers can tell apart."""
    lost = log.series("evidence/lost_to_rounding")
    if not lost or lost.recent() < limits.rounding:
        return None
    return Finding(
        name="lost_to_rounding",
        severity="problem",
        title="Steps are lost to rounding",
        steps=(lost.steps[0], lost.steps[-1]),
        evidence=f"Rounding takes {lost.recent():.0%} of a step (by squares) in the adapters' precision.",
        figures={"lost": lost.recent()},
        cause="adapters in half precision: bfloat16 has three digits, and a step of a thousandth of a weight is none.",
        remedy=Remedy(
            text="Keep the adapters in float32, over a base of any precision.",
            code="for p in trainer.base.trainable_parameters('policy'): p.data = p.data.float()",
        ),
    )


# A term of the loss, what it is called, and the setting that weighs it.
TERMS = {
    "entropy": ("the entropy bonus", "entropy_coef"),
    "value": ("the value loss on the shared trunk", "vf_coef"),
    "ptx": ("the pretraining term", "ptx_coef"),
}


def term_drowns_score(log: RunLog, limits: Limits) -> Finding | None:
    """The policy's gradient is mostly another term's than the score's."""
    score = log.series("evidence/gradient/score")
    if not score or fmean(score.values) == 0.0:
        return None
    sizes = {
        name: fmean(series.values) / fmean(score.values)
        for name in TERMS
        if (series := log.series(f"evidence/gradient/{name}"))
    }
    if not sizes or max(sizes.values()) < limits.drowned:
        return None
    name = max(sizes, key=sizes.__getitem__)
    called, setting = TERMS[name]
    cosine = log.series(f"evidence/cosine/score~{name}")
    apart = f", at a cosine of {fmean(cosine.values):.2f}" if cosine else ""
    now = float(log.setting(setting, 0.0))
    return Finding(
        name="term_drowns_score",
        severity="problem",
        title=f"{called[0].upper()}{called[1:]} drowns the score",
        steps=(score.steps[0], score.steps[-1]),
        evidence=f"Its gradient is {sizes[name]:.1f} times as large as that of the score{apart}.",
        figures={"times": sizes[name]},
        cause=f"{setting} is too large for the scale of this run's advantages.",
        remedy=Remedy(
            text="Weigh it so that its gradient is well below the score's.",
            changes={setting: float(f"{now / (3 * sizes[name]):.1g}")} if now else {},
        ),
    )


def noise_drowns_signal(log: RunLog, limits: Limits) -> Finding | None:
    """What a rollout's completions ask for in common is lost in what they do not, and the score has never risen.

    A mean over n gradients has signal plus noise / n for its square (McCandlish et al. 2018, arXiv:1812.06162,
    appendix A.1). Where a run has converged the signal is gone, too: a score that rose at any time speaks against it.
    """
    signal, noise = log.series("evidence/gradient/signal"), log.series("evidence/gradient/noise")
    if len(signal) < 2 * limits.least_rows or not noise or log.series("score").ever_rose(limits.noticeable):
        return None
    if log.series("score_std").recent() == 0.0 or log.series("entropy").recent() < limits.entropy:
        return None  # no differences to learn from: `constant_scores`, `entropy_collapse`
    error = signal.noise() / math.sqrt(len(signal))
    at_most = max(fmean(signal.values), 0.0) + limits.noticeable * error
    of_rollout = fmean(noise.values) / log.gradients
    if not of_rollout >= limits.gradient_noise * at_most:
        return None
    return Finding(
        name="noise_drowns_signal",
        severity="warning",
        title="The gradient is noise",
        steps=(signal.steps[0], signal.steps[-1]),
        evidence=(
            f"In {len(signal)} rollouts the noise of a rollout's gradient is at least "
            f"{of_rollout / max(at_most, 1e-30):.0f} times its signal (by squares), and the score has not risen."
        ),
        figures={"signal": fmean(signal.values), "noise": of_rollout},
        cause="rollouts too small for how much scores vary, or a score that has nothing to do with what is written.",
        remedy=Remedy(
            text="Take larger rollouts, and several completions a prompt, so that their scores can be compared.",
            changes={"gradient_accumulation_steps": 4 * int(log.setting("gradient_accumulation_steps", 1))},
        ),
    )


def held_out_differs(log: RunLog, limits: Limits) -> Finding | None:
    """Prompts that are held out are of another kind than those that are trained on: they are scored for what is meant
    where those that are trained on are not, they surprise the model more or less, or they score otherwise."""
    for name in log.names(AGREEMENT):
        trained, held_out = log.series(f"{AGREEMENT}{name}"), log.series(f"{AGREEMENT}{name}", evals=True)
        of_trained = max(trained.start(limits.least_rows), trained.recent(limits.least_rows))
        if not held_out or not held_out.best(2) > limits.related:
            continue
        if of_trained < limits.unrelated:
            return _scored_otherwise(name, trained, held_out)
        if len(trained) >= 3 and len(held_out) > 1 and min(held_out.values) - of_trained > limits.agreement_gap:
            return _scored_otherwise(name, trained, held_out, severity="warning")
    return _read_otherwise(log, limits) or _scores_elsewhere(log, limits)


def _read_otherwise(log: RunLog, limits: Limits) -> Finding | None:
    trained, held_out = (log.series("evidence/prompts/surprise", evals=of_eval) for of_eval in (False, True))
    errors = [log.series("evidence/prompts/surprise_error", evals=of_eval) for of_eval in (False, True)]
    if not (trained and held_out and all(errors)):
        return None
    # An evaluation always begins with the same prompts, so it is no surer for having been made again.
    gap = trained.start() - held_out.start()
    error = math.hypot(errors[0].start() / math.sqrt(min(len(trained), 3)), errors[1].start())
    if abs(gap) < limits.held_out_z * error or abs(gap) < limits.surprise * held_out.start():
        return None
    return _of_another_kind(
        (trained.steps[0], held_out.steps[0]),
        f"Training prompts surprise the model by {trained.start():.1f} nats a token, held-out ones by "
        f"{held_out.start():.1f} ({abs(gap) / max(error, 1e-12):.0f} standard errors).",
        {"trained": trained.start(), "held_out": held_out.start()},
        "two sources, two templates or languages, or something that is written into the prompts of one of them alone.",
        "Texts of another kind than the model, or its reward, knows are answered and scored by chance.",
    )


def _scores_elsewhere(log: RunLog, limits: Limits) -> Finding | None:
    gap, z = (log.series(f"evidence/held_out/{name}", evals=True) for name in ("score_gap", "score_gap_z"))
    count = min(len(gap), 4)
    if count < 2 or len({value > 0 for value in gap.values[-count:]}) > 1:
        return None
    # Each evaluation has the same prompts, so that several are no surer than one.
    total = z.recent(count)
    if not (abs(gap.recent(count)) >= limits.held_out_gap and abs(total) >= limits.held_out_z):
        return None
    less = "lower" if total > 0 else "higher"
    return _of_another_kind(
        (gap.steps[-count], gap.steps[-1]),
        f"Held-out prompts score {abs(gap.recent(count)):.1f} standard deviations {less} than the training prompts of "
        f"the same step, in {count} evaluations in a row ({abs(total):.0f} standard errors).",
        {"gap": gap.recent(count), "z": total},
        "two sources, two templates, or training prompts so few that the policy knows them by heart.",
    )


def _scored_otherwise(name: str, trained: Series, held_out: Series, severity: str = "problem") -> Finding:
    return _of_another_kind(
        (trained.steps[0], held_out.steps[-1]),
        f"On held-out prompts the score and yardstick {name} correlate at {held_out.best(2):.2f}, on training prompts "
        f"at {trained.start(6):.2f}: the score is right, and something is wrong with the prompts or columns that are "
        "trained on.",
        {"trained": trained.start(6), "held_out": held_out.best(2)},
        "training prompts in another form than the model reads, or columns that belong to other rows.",
        "What is not read, or joined to another row, is not scored for what is meant." if severity == "problem" else "",
        severity=severity,
    )


# What prompts that are not read, or columns of other rows, let the log show.
OF_PROMPTS = ("score_unrelated", "score_ignores_prompt", "scores_alike", "score_opposed", "no_progress", "truncation")


def _of_another_kind(
    steps: tuple[int, int],
    evidence: str,
    figures: dict[str, float],
    cause: str,
    makes: str = "",
    severity: str = "warning",
) -> Finding:
    """`makes`: how it makes `OF_PROMPTS`; empty: it does not."""
    return Finding(
        name="held_out_differs",
        severity=severity,
        title="Held-out prompts are of another kind than those trained on",
        steps=steps,
        evidence=evidence,
        figures=figures,
        cause=cause,
        remedy=Remedy(
            text="Read some training rows beside held-out ones, all their columns, and draw both from one set.",
            code="print(train_dataset[0], eval_dataset[0])",
        ),
        explains=dict.fromkeys(OF_PROMPTS, (makes, SOURCE)) if makes else {},
    )
