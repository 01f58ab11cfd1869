"""Rules about distributions: sampled, scored, trained, and kept near the reference."""

from __future__ import annotations

import math
from typing import Any

from trl_ext.diagnostics.finding import CANNOT_TELL, TRY_EACH, Finding, Remedy, Suspect
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Series
from trl_ext.diagnostics.updates import GONE, large_steps, lower_rate

# Sampling from the plain softmax: of all sampling settings, PPO's log-probabilities know the temperature alone.
PLAIN_SAMPLING = {"top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0, "generation_kwargs": None}
CORRECTION = "vllm_importance_sampling_correction"


def sampling_differs(log: RunLog, limits: Limits) -> Finding | None:
    """Completions are drawn from another distribution than they are scored and trained under. Where importance weights
    correct for it, it is worth a look only. Under `rollouts_ahead` the policy has moved since it sampled: only what
    that does not explain counts."""
    if (told := _told_wrongly(log, limits)) is not None:
        return told
    if log.setting("rollouts_ahead"):
        return _drawn_otherwise(log, limits)
    z, gap, cut = (log.series(name) for name in ("val/sampling_gap_z", "val/sampling_gap", "sampling/weight_cut"))
    if not z:
        return None
    total = sum(z.values) / math.sqrt(len(z))
    if not (abs(total) >= limits.sampling_gap_z and abs(gap.recent(len(gap))) >= limits.sampling_gap):
        return None
    share = cut.recent(len(cut))
    corrected = f" Importance weights correct for it; their bounds cut {share:.1%} of the weight." if cut else ""
    return Finding(
        name="sampling_differs",
        severity="warning" if cut else "problem",
        title="Completions are sampled from another distribution than they are scored under",
        steps=(z.steps[0], z.steps[-1]),
        evidence=(
            f"Sampled tokens are {gap.recent(len(gap)):+.3f} nats more surprising than the policy's entropy says, "
            f"{abs(total):.0f} standard errors from 0.{corrected}"
        ),
        figures={"gap": gap.recent(len(gap)), "z": total, **({"weight_cut": share} if cut else {})},
        cause=(
            "generation settings that the log-probabilities leave out: top_k, top_p, min_p, a repetition penalty, or "
            "generation_kwargs that forbid or force tokens; or a generator of another precision."
        ),
        remedy=_closer_sampling(log) if cut else _plain_sampling(log),
        samples=log.last_samples(),
    )


def _told_wrongly(log: RunLog, limits: Limits) -> Finding | None:
    """The generator tells log-probabilities of other draws than its own: of its own, log mu - log pi has a mean of
    KL(mu || pi), which is not below 0."""
    told = log.series("val/sampling_kl")
    uncorrected = log.config.get(CORRECTION) is False  # then nobody reads what is reported
    if len(told) < 3 or uncorrected or not max(told.recent(3), *told.values[-2:]) < -limits.sampling_told:
        return None
    return Finding(
        name="sampling_differs",
        severity="problem",
        title="The generator reports log-probabilities that it has not sampled with",
        steps=(told.steps[0], told.steps[-1]),
        evidence=(
            f"They lie {-told.recent(3):.2g} nats a token below those that the policy gives the same tokens; of tokens "
            "that were drawn with them they would lie above."
        ),
        figures={"told": told.recent(3)},
        cause=(
            "log-probabilities that were added up, of other tokens (shifted by one, say) or under another temperature "
            "than the draws, so that the importance weights are wrong."
        ),
        remedy=Remedy(
            text="Mend what the generator reports; until then correct nothing.",
            changes={CORRECTION: False} if CORRECTION in log.config and not log.setting("rollouts_ahead") else {},
        ),
        samples=log.last_samples(),
    )


def _drawn_otherwise(log: RunLog, limits: Limits) -> Finding | None:
    z, gap = log.series("val/weighted_gap_z"), log.series("val/weighted_gap")
    if not z:
        return None
    total, mean = sum(z.values) / math.sqrt(len(z)), gap.recent(len(gap))
    if not (abs(total) >= limits.sampling_gap_z and abs(mean) >= limits.sampling_gap):
        return None
    return Finding(
        name="sampling_differs",
        severity="problem",
        title="Completions are sampled from another distribution than the generator says",
        steps=(z.steps[0], z.steps[-1]),
        evidence=(
            f"Sampled tokens are {mean:+.3f} nats more surprising than the policy's entropy says, though each is "
            f"weighed by its probability under the policy over the reported one: {abs(total):.0f} standard errors from "
            "0. That the policy has moved since it sampled does not explain it."
        ),
        figures={"gap": mean, "z": total},
        cause=(
            "generation settings that keep tokens from being sampled (top_k, top_p, min_p), or a generator that "
            "samples otherwise than it reports, so that importance weights are wrong."
        ),
        remedy=_plain_sampling(log),
        samples=log.last_samples(),
    )


def base_damaged(log: RunLog, limits: Limits) -> Finding | None:
    """Before it has learned anything the policy is close to knowing nothing: it writes noise."""
    surprise, gap = log.surprise(), log.series("val/sampling_gap")
    if not surprise or not log.has_the_first or float(log.setting("temperature", 1.0)) > 1.0:
        return None  # at a high temperature any model writes noise
    entropy = surprise.values[0] - (gap.values[0] if gap else 0.0)
    if not entropy > limits.noise_at_start:
        return None
    return Finding(
        name="base_damaged",
        severity="problem",
        title="The model writes noise from the start",
        steps=(surprise.steps[0], surprise.steps[0]),
        evidence=f"In the first rollout a token has {entropy:.2g} nats of entropy; language models have about 2.5.",
        figures={"entropy": entropy},
        cause=(
            "a base that is not what its files hold: weights that were missing and drawn anew (Transformers says so "
            "when it loads them), output weights that are no longer tied, a broken quantisation; or no language model "
            "yet."
        ),
        remedy=Remedy(
            text="Let the base write by itself, without trl_ext, and read what Transformers said when it loaded it.",
            code="transformers.pipeline('text-generation', model=name)('The', max_new_tokens=20)",
        ),
        samples=log.last_samples(),
        from_the_start=True,
    )


def negative_kl(log: RunLog, limits: Limits) -> Finding | None:
    """The estimated KL to the reference is below 0, which no true KL is."""
    kl, spread = log.series("kl"), log.series("objective/kl_std")
    if len(kl) < 3:
        return None
    recent = kl.recent(3)
    count = float(log.setting("rollout_batch_size", 1))
    error = (spread.recent(3) / math.sqrt(count) if spread else kl.noise()) / math.sqrt(3)
    if recent > -limits.negative_kl or recent > -limits.noticeable * error:
        return None
    return Finding(
        name="negative_kl",
        severity="problem",
        title="The KL to the reference is negative",
        steps=(kl.steps[-3], kl.steps[-1]),
        evidence=f"The last three logs: a mean KL of {recent:.2f} nats per completion (standard error {error:.2f}).",
        figures={"kl": recent, "error": error},
        cause="the policy was trained on completions that it would not have sampled: sampling and scoring differ.",
        remedy=_plain_sampling(log),
        samples=log.last_samples(),
    )


def _plain_sampling(log: RunLog) -> Remedy:
    changes = _unlike_plain(log)
    if not changes and log.config.get(CORRECTION) is False:
        return Remedy(text="Weigh each token by its importance.", changes={CORRECTION: True})
    return Remedy(
        text="Sample from the whole distribution, at the temperature that is scored.",
        changes=changes or PLAIN_SAMPLING,
    )


def _closer_sampling(log: RunLog) -> Remedy:
    return Remedy(
        text=(
            "While little is cut, leave it. Else bring the sampler nearer to the policy: plain sampling, the same "
            "precision and the same quantization."
        ),
        changes=_unlike_plain(log),
    )


def _unlike_plain(log: RunLog) -> dict[str, Any]:
    return {k: v for k, v in PLAIN_SAMPLING.items() if k in log.config and log.config[k] != v}


def first_ratio(log: RunLog, limits: Limits) -> Finding | None:
    """The probability ratio is not 1 before the first step on a rollout, though the weights are the same."""
    first = log.series("policy/first_approxkl")
    if not first or first.recent() < (limits.first_approxkl_half if log.in_half_precision else limits.first_approxkl):
        return None
    return Finding(
        name="first_ratio",
        severity="problem",
        title="The probability ratio is not 1 before the first step on a rollout",
        steps=(first.steps[0], first.steps[-1]),
        evidence=(f"Policy and sampling policy differ by {first.recent():.2g} nats per token, with the same weights."),
        figures={"first_approxkl": first.recent()},
        cause=(
            "training computes other log-probabilities than scoring did: dropout in training, another precision, or a "
            "callback that changed log-probabilities or completions."
        ),
        remedy=Remedy(
            text="Switch dropout off, and let forwards with and without gradient run in the same precision.",
            changes={"disable_dropout": True},
        ),
    )


def first_kl(log: RunLog, limits: Limits) -> Finding | None:
    """Before any step the policy is not where the reference is, and nobody said that it should be.

    Judged on the log of the run's first rollout alone, and only where the reference is the default one.
    """
    kl, spread, length = (log.series(name) for name in ("kl", "objective/kl_std", "length"))
    rollout, named = log.setting("rollout_batch_size"), log.setting("reference_named")
    if named is not False or not rollout or not (kl and spread and length) or log.rows[0].get("episode") != rollout:
        return None
    first, error = kl.values[0], spread.values[0] / math.sqrt(float(rollout))
    least = limits.first_kl_half if log.in_half_precision else limits.first_kl
    if first < least * length.values[0] or first < limits.noticeable * error:
        return None
    return Finding(
        name="first_kl",
        severity="warning",
        title="The reference is not where the policy starts",
        steps=(log.rows[0]["step"], log.rows[0]["step"]),
        evidence=(
            f"The first rollout, sampled before any step, has a KL of {first:.2f} nats per completion (standard error "
            f"{error:.2f}); to the model that it starts from it would be 0."
        ),
        figures={"kl": first, "error": error},
        cause=(
            "the policy goes on from a saved adapter, or one that does not start at 0 (init_lora_weights), and the "
            "reference is the bare base. Either that is meant, or the penalty pulls back what the adapter had learned."
        ),
        remedy=Remedy(
            text="Take a frozen copy of the adapter as reference; or, if the bare base is meant, name it: 'base'.",
            code="SharedBase.from_pretrained(..., policy=adapter, reference='copy')",
        ),
    )


def reference_moves(log: RunLog, limits: Limits) -> Finding | None:
    """The KL to the reference is exactly 0 in every rollout, though updates move the policy."""
    kl, figures = log.series("kl"), _no_kl_after_updates(log, limits)
    if figures is None or _is_always_the_same(log):
        return None
    return Finding(
        name="reference_moves",
        severity="problem",
        title="The reference moves with the policy",
        steps=(kl.steps[0], kl.steps[-1]),
        evidence=(
            f"In {len(kl)} rollouts the KL to the reference is {figures['kl']:.1g} nats, though an update moves "
            f"the policy {figures['approxkl']:.2g} nats per token."
        ),
        figures=figures,
        cause=(
            "the reference is the adapter that is trained, no frozen copy of it, so that nothing holds the policy; "
            "where nothing is learned, perhaps the policy is put back before each rollout, as evaluations would show."
        ),
        remedy=Remedy(
            text="Give the reference weights of its own: the base, or a frozen copy of where the policy starts.",
            code="SharedBase.from_pretrained(..., policy=adapter, reference='copy')",
        ),
    )


def policy_is_reset(log: RunLog, limits: Limits) -> Finding | None:
    """The KL to the reference is exactly 0 in every rollout, though updates move the policy, and evaluations stay."""
    kl, figures = log.series("kl"), _no_kl_after_updates(log, limits)
    if figures is None or not _is_always_the_same(log):
        return None
    return Finding(
        name="policy_is_reset",
        severity="problem",
        title="Every rollout begins with the policy that the run began with",
        steps=(kl.steps[0], kl.steps[-1]),
        evidence=(
            f"An update moves the policy {figures['approxkl']:.2g} nats per token, and in all {len(kl)} rollouts "
            "the KL to the reference is 0 again; evaluations score the same each time."
        ),
        figures=figures,
        cause=(
            "something writes the first weights back into the policy before a rollout: a generator that copies the "
            "wrong way, a checkpoint that is loaded again, an optimizer that steps on a copy."
        ),
        remedy=Remedy(
            text="Look for who writes to the policy's adapter between updates, the generator first.",
            code="print(trainer.model.get_parameter(name).sum())  # before and after generating",
        ),
        samples=log.last_samples(),
    )


def _no_kl_after_updates(log: RunLog, limits: Limits) -> dict[str, float] | None:
    """The figures, where the KL is exactly 0 in every rollout and updates move the policy."""
    kl, spread, approxkl = (log.series(name) for name in ("kl", "objective/kl_std", "approxkl"))
    if len(kl) < 2 or len(spread) < len(kl) or not approxkl.recent() > limits.tiny_approxkl:
        return None
    if max(abs(value) for value in (*kl.values, *spread.values)) > limits.no_kl:
        return None
    return {"kl": max(map(abs, kl.values)), "approxkl": approxkl.recent()}


def _is_always_the_same(log: RunLog) -> bool:
    """Whether evaluations, which draw the same numbers each time, score the same each time."""
    held_out, spread = log.series("eval_score"), log.series("eval_score_std")
    return len(held_out) > 1 and 0.0 <= max(held_out.values) - min(held_out.values) < 1e-3 * spread.start()


def advantages_are_normalised(log: RunLog) -> bool:
    """Whether advantages are divided by the scores' spread, so that the scores' scale is none of the loss: GRPOTrainer
    does where nobody says otherwise, RLOOTrainer where it is told to."""
    if log.kind != "online":
        return False
    if "normalize_advantages" in log.config:
        return bool(log.config["normalize_advantages"])
    return log.setting("scale_rewards", "group") not in (False, "none")


def suggested_kl_coef(log: RunLog, limits: Limits) -> float:
    """The coefficient at which spending the KL budget costs one standard deviation of the scores, as they enter the
    loss; NaN if unknown."""
    spread, length = log.series("score_std"), log.series("length")
    if not spread or not length or spread.start() == 0.0:
        return math.nan
    return (1.0 if advantages_are_normalised(log) else spread.start()) / limits.budget_of(length.start())


def stronger(log: RunLog, limits: Limits) -> dict[str, float]:
    """A larger coefficient: the suggested one, or four times the present one where that is more; empty if unknown."""
    now = coefficient_now(log)
    value = max(v for v in (suggested_kl_coef(log, limits), 4 * now, 0.0) if not math.isnan(v))
    return {kl_field(log): float(f"{value:.1g}")} if value else {}


def weaker(log: RunLog) -> dict[str, float]:
    """A quarter of the present coefficient; empty where there is none."""
    now = coefficient_now(log)
    return {kl_field(log): float(f"{now / 4:.1g}")} if now else {}


def pays(log: RunLog, limits: Limits) -> bool:
    """Whether the score is higher than at the start: only then can it be what the policy follows. True where it is not
    known: of few rows, or of scores that are brought to one mean as they rise."""
    functions = log.names("rewards/", "/mean")
    if log.setting("score_normalization") == "running":
        score = log.series(f"rewards/{functions[0]}/mean") if len(functions) == 1 else Series([], [])
    else:
        score = log.series("score")
    if len(score) < 8:
        return True
    return max(score.rise()[1], score.rise(len(score) // 2)[1]) > limits.noticeable


def movers(log: RunLog, limits: Limits) -> tuple[Suspect, ...]:
    """What may have moved the policy to where the score is no higher."""
    penalty = stronger(log, limits)
    return (
        *large_steps(log),
        *([Suspect(cause="the KL penalty is too weak", experiment=GONE, changes=penalty)] if penalty else []),
        Suspect(
            cause="something else moves it than the loss: gradients that are kept, a callback, a generator that writes",
            experiment="compare the weights before and after what is no optimizer step.",
        ),
    )


def if_paid(log: RunLog, limits: Limits, cause: str, remedy: Remedy) -> dict[str, Any]:
    """Cause, remedy and suspects of what a score may pay for: these, or, where it does not, what else may have moved
    the policy."""
    if pays(log, limits):
        return {"cause": cause, "remedy": remedy}
    unpaid = f"{CANNOT_TELL}: the score has not risen, so it is not what the policy follows."
    return {"cause": unpaid, "remedy": TRY_EACH, "suspects": movers(log, limits)}


def coefficient_now(log: RunLog) -> float:
    """The coefficient of the KL penalty as last logged, else as set."""
    now = log.series("kl_coef").recent()
    return float(log.setting(kl_field(log), 0.0)) if math.isnan(now) else now


def kl_field(log: RunLog) -> str:
    """The setting that weighs the KL."""
    return "beta" if log.kind == "online" else "kl_coef"


def _coefficient(changes: dict[str, float]) -> Remedy:
    return Remedy(
        text=(
            "Choose a coefficient at which a moderate KL costs about the spread of the scores, or let "
            "AdaptiveKLCallback hold a target."
        ),
        changes=changes,
    )


def kl_runs_away(log: RunLog, limits: Limits) -> Finding | None:
    """The policy moves away from the reference, and nothing holds it."""
    kl, length, coefficient = log.series("kl"), log.series("length"), log.series("kl_coef")
    if len(kl) < 3:
        return None
    # Without lengths, as in TRL 1.12's logs, 24 nats: Ziegler et al. 2019 held 6 per completion, and lost words at 40.
    tokens = max(length.recent(), 1.0) if length else 60.0
    # Completions that have become shorter may spend what they could while they were long.
    spent = kl.recent() / max(length.start(), 1.0) if length else math.inf
    if kl.recent() < limits.budget and spent < limits.kl_per_token:
        return None
    if min(kl.recent(), kl.lasting()) < limits.kl_per_token * tokens or kl.recent() < kl.start():
        return None
    under = f" with kl_coef {coefficient.recent():.3g}" if coefficient else ""
    return Finding(
        name="kl_runs_away",
        severity="problem",
        title="The KL to the reference runs away",
        steps=(kl.steps[0], kl.steps[-1]),
        evidence=(
            f"It went from {kl.start():.2f} to {kl.recent():.2f} nats per completion, which is "
            f"{kl.recent() / tokens:.2f} a token{under}."
        ),
        figures={"kl": kl.recent(), "kl_per_token": kl.recent() / tokens},
        samples=log.last_samples(),
        **if_paid(
            log,
            limits,
            "the penalty is too weak for the scale of the scores, so the policy follows the score wherever it goes.",
            _coefficient(stronger(log, limits)),
        ),
    )


def kl_drowns_score(log: RunLog, limits: Limits) -> Finding | None:
    """The KL penalty is so strong that the score does not count."""
    kl, length, coefficient, score = (log.series(name) for name in ("kl", "length", "kl_coef", "score"))
    suggested = suggested_kl_coef(log, limits)
    if len(kl) < limits.least_rows or not coefficient or math.isnan(suggested):
        return None
    stays = abs(kl.recent()) < limits.stays * limits.budget_of(length.recent())
    gained = score.rise()[1] > limits.noticeable
    if not stays or gained or coefficient.recent() < limits.drowned * max(suggested, 1e-6):
        return None
    return Finding(
        name="kl_drowns_score",
        severity="problem",
        title="The KL penalty drowns the score",
        steps=log.steps,
        evidence=(
            f"kl_coef is {coefficient.recent():.3g}; the spread of the scores ({log.series('score_std').start():.2g}) "
            f"suggests {suggested:.2g}. The KL stays at {kl.recent():.3f} nats per completion, and the score does not "
            "rise."
        ),
        figures={"kl": kl.recent(), "kl_coef": coefficient.recent(), "suggested": suggested},
        cause="any step away from the reference costs more than it gains in score.",
        remedy=_coefficient({kl_field(log): float(f"{suggested:.1g}")}),
    )


def entropy_collapse(log: RunLog, limits: Limits) -> Finding | None:
    """The policy does not explore: its entropy is near 0, or was from the start."""
    entropy = log.series("entropy")
    if len(entropy) < limits.least_rows or entropy.recent() > limits.entropy:
        return None
    sharp = float(log.setting("temperature", 1.0)) < limits.temperature
    # Of a rollout the entropy is a mean over its training; what was sampled surprises before a step is taken.
    first = max(series.values[0] for series in (entropy, log.surprise()) if series)
    from_the_start = log.has_the_first and first <= limits.entropy
    return Finding(
        name="entropy_collapse",
        severity="problem",
        title="The policy does not explore" if sharp or from_the_start else "The policy's entropy has collapsed",
        from_the_start=from_the_start,
        steps=(entropy.steps[0], entropy.steps[-1]),
        evidence=(
            f"It went from {entropy.start():.3f} to {entropy.recent():.4f} nats per token: completions are certain, "
            "so PPO has no differences to learn from."
        ),
        figures={"entropy": entropy.recent(), "start": entropy.start()},
        samples=log.last_samples(),
        **_why_certain(log, limits, sharp, from_the_start),
    )


def _why_certain(log: RunLog, limits: Limits, sharp: bool, from_the_start: bool) -> dict[str, Any]:
    """Cause, remedy and suspects."""
    if sharp:
        return {
            "cause": (
                f"completions are sampled at temperature {float(log.setting('temperature')):g}, and PPO learns from "
                "the differences between completions."
            ),
            "remedy": Remedy(
                text="Sample at temperature 1 in training; use a lower one with the trained model.",
                changes={"temperature": 1.0},
            ),
        }
    bonus = {"entropy_coef": max(0.01, 2 * float(log.setting("entropy_coef", 0.0)))} if log.kind != "online" else {}
    if from_the_start:
        suspect = Suspect(
            cause="the model is certain by itself: trained to one answer, or its logits are sharpened",
            experiment="its entropy rises if this is it.",
            changes=bonus,
        )
        cause = f"{CANNOT_TELL}: it was so before a step was taken."
        return {"cause": cause, "remedy": TRY_EACH, "suspects": (suspect,)}
    return if_paid(
        log,
        limits,
        "too large steps, or too weak a KL penalty, let the policy settle on what it happened to try first.",
        Remedy(
            text="Smaller steps, a stronger KL penalty, or an entropy bonus.", changes={**lower_rate(log, 3), **bonus}
        ),
    )


def entropy_rises(log: RunLog, limits: Limits) -> Finding | None:
    """The policy becomes noisier and noisier, and the score does not rise by it."""
    entropy = log.series("entropy")
    if len(entropy) < limits.least_rows or not log.series("score"):
        return None
    now, start = entropy.recent(), entropy.start()
    if now < limits.entropy_growth * start or now < start + limits.entropy_gain:
        return None
    if entropy.rise()[1] < limits.noticeable or log.series("score").rise()[1] > limits.noticeable:
        return None
    bonus, pulls = float(log.setting("entropy_coef", 0.0)), log.series("evidence/gradient/entropy").recent()
    score = log.series("evidence/gradient/score").recent()
    by_bonus = bonus > 0 and not pulls < score  # also where either is unknown
    return Finding(
        name="entropy_rises",
        severity="problem",
        title="The policy's entropy rises until completions are noise",
        steps=(entropy.steps[0], entropy.steps[-1]),
        evidence=f"It went from {start:.2f} to {now:.2f} nats per token, and the score does not rise.",
        figures={"entropy": now, "start": start},
        cause=(
            f"the entropy bonus: entropy_coef is {bonus:g}"
            f"{f', and its gradient {pulls:.2g} beside {score:.2g} of the score' if pulls >= score else ''}."
            if by_bonus
            else f"{CANNOT_TELL}: no bonus asks for it."
        ),
        remedy=Remedy(text="Weigh the bonus far less, or leave it out.", changes={"entropy_coef": 0.0})
        if by_bonus
        else TRY_EACH,
        samples=log.last_samples(),
        suspects=()
        if by_bonus
        else (
            *large_steps(log),
            Suspect(
                cause="the score is noise, or falls for everything that the policy knows",
                experiment="read the completions with the highest scores, and score them twice.",
            ),
        ),
    )
