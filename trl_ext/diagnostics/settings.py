"""Settings far from where papers and recipes have them, and the problems that each can make.

A setting is suspected where a problem is found that it can make and that nothing else explains; one that is off by a
factor of `Limits.far_off` is told before the first rollout, until the score rises. On its own an unusual value is no
mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_ext.diagnostics.distributions import (
    PLAIN_SAMPLING,
    advantages_are_normalised,
    coefficient_now,
    kl_field,
    suggested_kl_coef,
)
from trl_ext.diagnostics.finding import Finding, Remedy, worst
from trl_ext.diagnostics.graph import roots
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog
from trl_ext.diagnostics.remedies import why_idle

PPO_PAPER = "Schulman et al. 2017, arXiv:1707.06347"
N_PLUS = "Huang et al. 2024, arXiv:2403.17031"
ANDRYCHOWICZ = "Andrychowicz et al. 2021, arXiv:2006.05990"
ADAM = "Kingma and Ba 2015, arXiv:1412.6980"
LORA = "Hu et al. 2021, arXiv:2106.09685"
GAE = "Schulman et al. 2016, arXiv:1506.02438"
ZIEGLER = "Ziegler et al. 2019, arXiv:1909.08593"
DUAL = "Ye et al. 2020, arXiv:1912.09729"

# What a run shows whose steps are too small, or whose signal is lost; and one whose steps are too large.
STANDS = ("steps_too_small", "no_progress", "value_not_learning", "kl_drowns_score")
FLIES = (
    *("clipping_saturated", "gradients_explode", "gradients_not_finite", "value_loss_explodes", "entropy_collapse"),
    *("mode_collapse", "entropy_rises", "kl_runs_away", "over_optimisation", "repetition_exploitation"),
    *("completions_shrink", "negative_kl", "no_progress", "value_not_learning", "value_starts_far_off"),
)


@dataclass(frozen=True)
class Side:
    """What lies beyond one end of a range.

    Attributes:
        why: what such a value does, a clause.
        makes: findings that it can make.
    """

    why: str
    makes: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """Where papers and recipes have a setting.

    Attributes:
        setting: its name.
        low, high: the range. Its ends are chosen, wide of what papers and recipes use.
        instead: what to set it to.
        source: where the setting is made or studied.
        below, above: what a value outside does; None: nothing that is known.
        origin: from where distances are counted: of a discount from 1, as its horizon is 1 / (1 - gamma).
        value: it, from the log, where it is not the setting's own; NaN where it is unknown.
        unit: what the range counts, where that is not the setting itself.
        off: the value that switches it off, as a usual choice; it then counts as infinite.
    """

    setting: str
    low: float
    high: float
    instead: Any
    source: str
    below: Side | None = None
    above: Side | None = None
    origin: float = 0.0
    value: Callable[[RunLog], float] | None = None
    unit: str = ""
    off: float | None = None

    def now(self, log: RunLog) -> float:
        """The value in a run; NaN where it is unknown or not a number."""
        if self.value is not None:
            return self.value(log)
        found = log.setting(self.setting)
        if found is not None and found == self.off:
            return math.inf
        return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else math.nan


@dataclass(frozen=True)
class Doubt:
    """A setting of a run that is far from the usual.

    Attributes:
        setting: its name.
        text: what it is and what is usual, a clause.
        side: what that does.
        instead: what to set it to.
        source: where the setting is made or studied.
        far: how far outside, as a factor of at least 1; infinite where that cannot be said.
        sure: told whatever the run shows.
    """

    setting: str
    text: str
    side: Side
    instead: Any
    source: str
    far: float
    sure: bool = False


def _share_of_run(name: str, per: Callable[[RunLog], float]) -> Callable[[RunLog], float]:
    """A setting that counts something, over how many of it the run has; below 1 it is a share already, as Transformers
    reads warmup_steps."""

    def share(log: RunLog) -> float:
        found, count = float(log.setting(name, 0.0)), per(log)
        if 0 < found < 1:
            return found
        return found / count if count > 0 else math.nan

    return share


def _steps(log: RunLog) -> float:
    return float(log.setting("steps_of_run", log.setting("max_steps", 0.0)))


def _rollouts(log: RunLog) -> float:
    return _steps(log) / (float(log.setting("num_ppo_epochs", 4)) * float(log.setting("num_mini_batches", 1)))


def _rollouts_by(setting: str) -> Callable[[RunLog], float]:
    """The rollouts of a run whose length is set by that setting."""

    def rollouts(log: RunLog) -> float:
        set_so = float(log.setting(setting, 0.0)) > 0
        return _rollouts(log) if log.kind == "ppo" and set_so and _steps(log) > 0 else math.nan

    return rollouts


def _steps_of_one_epoch(log: RunLog) -> float:
    """Where more epochs would make more of them."""
    return _steps(log) if log.setting("num_ppo_epochs", 4) == 1 and _steps(log) > 0 else math.nan


def _completions_of_a_step(log: RunLog) -> float:
    size, parts = log.setting("rollout_batch_size"), log.setting("num_mini_batches", 1)
    return float(size) / float(parts) if size else math.nan


def _prompts_of_a_rollout(log: RunLog) -> float:
    size = log.setting("rollout_batch_size")
    return float(size) / float(log.setting("num_generations", 1)) if size else math.nan


def _lora_scaling(log: RunLog) -> float:
    alpha, rank = log.setting("lora_alpha"), log.setting("lora_r")
    if alpha is None or not rank:
        return math.nan
    return float(alpha) / (math.sqrt(float(rank)) if log.setting("lora_rslora") else float(rank))


RANGES: tuple[Range, ...] = (
    Range(
        "learning_rate",
        1e-7,
        3e-3,
        3e-4,
        LORA,
        below=Side("steps of such a size move nothing", STANDS),
        above=Side("each step overshoots", (*FLIES, "truncation", "gradients_absent", "steps_too_small")),
    ),
    Range(
        "adam_epsilon",
        0.0,
        1e-4,
        1e-5,
        f"{ADAM}; {N_PLUS}",
        above=Side("it outweighs the gradient's size in Adam's denominator, so steps shrink with the gradient", STANDS),
    ),
    Range(
        "adam_beta1",
        0.0,
        0.95,
        0.9,
        ADAM,
        above=Side("steps go on in the direction of rollouts long past", FLIES),
        origin=1.0,
    ),
    Range(
        "adam_beta2",
        0.9,
        0.9999,
        0.999,
        ADAM,
        below=Side("steps are scaled by the latest gradients alone", FLIES),
        above=Side("the first gradients set the scale of all steps", (*STANDS, *FLIES)),
        origin=1.0,
    ),
    Range(
        "weight_decay",
        0.0,
        0.1,
        0.0,
        "Loshchilov and Hutter 2019, arXiv:1711.05101",
        above=Side("each step takes back a part of what was learned, towards adapters of 0", STANDS),
    ),
    Range(
        "max_grad_norm",
        0.05,
        20.0,
        1.0,
        f"{ANDRYCHOWICZ}, section 3.3",
        below=Side("every gradient is shrunk to it, down to Adam's epsilon", STANDS),
        above=Side("no gradient is ever clipped", ("gradients_explode", "gradients_not_finite", "clipping_saturated")),
        off=0.0,
    ),
    Range(
        "warmup_steps",
        0.0,
        0.3,
        0,
        "Goyal et al. 2017, arXiv:1706.02677, section 2.2",
        above=Side("the learning rate hardly gets to its setting", STANDS),
        value=_share_of_run("warmup_steps", _steps),
        unit="of the run",
    ),
    *(
        Range(
            setting,
            20,
            math.inf,
            unset,
            ZIEGLER,
            below=Side("the run ends before much can be learned", ("no_progress", "noise_drowns_signal")),
            value=_rollouts_by(setting),
            unit="rollouts",
        )
        for setting, unset in (("total_episodes", None), ("max_steps", -1))
    ),
    Range(
        "num_ppo_epochs",
        80,
        math.inf,
        4,
        f"{PPO_PAPER}; {ANDRYCHOWICZ}, section 3.5",
        below=Side(
            "one epoch makes so few steps that the run ends before much can be learned",
            ("no_progress", "noise_drowns_signal"),
        ),
        value=_steps_of_one_epoch,
        unit="optimizer steps in the run",
    ),
    Range(
        "num_ppo_epochs",
        1,
        10,
        4,
        f"{PPO_PAPER}; {ANDRYCHOWICZ}, section 3.5",
        above=Side("so many passes over one rollout move the policy far from where it sampled", FLIES),
    ),
    Range(
        "gradient_accumulation_steps",
        8,
        math.inf,
        16,
        "McCandlish et al. 2018, arXiv:1812.06162",
        below=Side(
            "a step follows so few completions that chance decides where it goes", (*FLIES, "noise_drowns_signal")
        ),
        value=_completions_of_a_step,
        unit="completions a step (times per_device_train_batch_size)",
    ),
    Range(
        "num_generations",
        8,
        math.inf,
        1,
        "McCandlish et al. 2018, arXiv:1812.06162",
        below=Side("so few prompts decide where a rollout's steps go", (*STANDS, *FLIES, "noise_drowns_signal")),
        value=_prompts_of_a_rollout,
        unit="prompts a rollout",
    ),
    Range(
        "cliprange",
        0.05,
        0.5,
        0.2,
        PPO_PAPER,
        below=Side("tokens are clipped as soon as the policy moves", (*STANDS, "clipping_saturated")),
        above=Side("nothing holds a step back", FLIES),
    ),
    Range(
        "cliprange_value",
        0.02,
        10.0,
        0.2,
        PPO_PAPER,
        below=Side("values may not move as far as scores lie from them", ("value_not_learning", "no_progress")),
        above=Side("nothing holds the values' steps back", ("value_loss_explodes",)),
    ),
    Range(
        "dual_clip",
        1.5,
        math.inf,
        3.0,
        DUAL,
        below=Side("what is bad is hardly unlearned", (*STANDS, "kl_runs_away", "entropy_rises")),
        origin=1.0,
    ),
    Range(
        "vf_coef",
        0.01,
        2.0,
        0.1,
        f"{PPO_PAPER}; {N_PLUS}",
        below=Side("the value role gets next to no gradient", ("value_not_learning", "no_progress")),
        above=Side(
            "the value's gradient takes the norm to which both are clipped",
            (*STANDS, "gradients_explode", "value_loss_explodes", "clipping_saturated", "kl_runs_away"),
        ),
    ),
    Range(
        "gamma",
        0.95,
        1.0,
        1.0,
        N_PLUS,
        below=Side("a score at the end reaches only the last tokens", (*STANDS, "credit_fades")),
        origin=1.0,
    ),
    Range(
        "lam",
        0.8,
        1.0,
        0.95,
        GAE,
        below=Side("tokens learn from the values after them alone, which know little yet", (*STANDS, "credit_fades")),
        origin=1.0,
    ),
    Range(
        "lam_value",
        0.8,
        1.0,
        None,
        GAE,
        below=Side("values learn from the values after them alone", ("value_not_learning", "no_progress")),
        origin=1.0,
    ),
    Range(
        "entropy_coef",
        0.0,
        0.03,
        0.0,
        f"{ANDRYCHOWICZ}, section 3.8",
        above=Side("the bonus pays for noise", (*FLIES, "term_drowns_score", "truncation")),
    ),
    Range(
        "max_approx_kl",
        0.003,
        math.inf,
        0.05,
        "Dossa et al. 2021, doi:10.1109/ACCESS.2021.3106662",
        below=Side("epochs end before the policy has moved", STANDS),
    ),
    Range(
        "max_ratio",
        1.05,
        math.inf,
        10.0,
        "TRL 0.11's ratio_threshold",
        below=Side("minibatches are left out as soon as the policy moves", STANDS),
        origin=1.0,
    ),
    Range(
        "value_warmup_rollouts",
        0.0,
        0.25,
        0,
        "VeRL's critic_warmup; Yuan et al. 2025, arXiv:2503.01491",
        above=Side("the policy stays where it is for so long", STANDS),
        value=_share_of_run("value_warmup_rollouts", _rollouts),
        unit="of the run",
    ),
    Range(
        "penalty_target",
        5e-4,
        0.2,
        0.01,
        PPO_PAPER,
        below=Side("the penalty grows until updates hardly move the policy", (*STANDS, "gradients_explode")),
        above=Side("the penalty shrinks until nothing holds an update back", FLIES),
    ),
    Range(
        "penalty_coef",
        0.01,
        100.0,
        1.0,
        PPO_PAPER,
        below=Side("nothing holds an update back", FLIES),
        above=Side("the penalty outweighs the score until it has been halved often enough", STANDS),
    ),
    Range(
        "temperature",
        0.5,
        1.5,
        1.0,
        f"{ZIEGLER}, section 2.1",
        below=Side("completions hardly differ", ("entropy_collapse", *STANDS)),
        above=Side("completions are noise", (*FLIES, "truncation", "score_ignores_prompt", "score_unrelated")),
    ),
    Range(
        "normalization_samples",
        32,
        math.inf,
        256,
        N_PLUS,
        below=Side("mean and spread of so few completions are chance", ("score_scale", *STANDS, "kl_runs_away")),
    ),
    Range(
        "lora_alpha",
        0.25,
        8.0,
        None,
        f"{LORA}; of use_rslora Kalajdzievski 2023, arXiv:2312.03732",
        below=Side("what the adapter learns hardly counts", STANDS),
        above=Side("a small step of the adapter is a large one of the model", FLIES),
        value=_lora_scaling,
        unit="times what the adapter says",
    ),
)


# What makes a step, as PPOConfig has it by default, and a constant rate. Settings hold each other in balance: what a
# run says otherwise often came from another library or paper as a set.
DEFAULTS: dict[str, Any] = {
    "objective": "clip",
    "baseline": "leave_one_out",
    "penalty_coef": 1.0,
    "penalty_target": 0.01,
    "num_ppo_epochs": 4,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "dual_clip": None,
    "max_approx_kl": None,
    "max_ratio": None,
    "vf_coef": 0.1,
    "entropy_coef": 0.0,
    "gamma": 1.0,
    "lam": 0.95,
    "lam_value": None,
    "whiten_rewards": False,
    "whiten_advantages": True,
    "value_warmup_rollouts": 0,
    "num_generations": 1,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-5,
    "lr_scheduler_type": "constant",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "temperature": 1.0,
    **PLAIN_SAMPLING,
}


LENGTH = ("total_episodes", "max_steps", "num_train_epochs")  # what says how long a run is


def to_defaults(log: RunLog) -> dict[str, Any]:
    """What takes a run of our PPOTrainer back to `DEFAULTS`; empty where less than two settings are others than the
    trainer's own defaults, whose rate is linear."""
    if log.kind != "ppo" or not log.setting("rollout_batch_size"):
        return {}
    others = {name: value for name, value in DEFAULTS.items() if name in log.config and log.config[name] != value}
    own = log.setting("lr_scheduler_type") == "linear"
    return others if len(others) - own > 1 else {}


def doubts(log: RunLog, limits: Limits) -> list[Doubt]:
    """The settings of a run that are far from the usual, the farthest first."""
    few = list(_few_steps(log))
    found = [
        *(one for one in _outside(log) if not few or one.setting not in (*LENGTH, "num_ppo_epochs")),
        *_weights(log, limits),
        *_coefficient(log, limits),
        *_clip_range(log),
        *_sampling(log),
        *_kinds(log),
        *few,
    ]
    return sorted(found, key=lambda doubt: -doubt.far)


def _outside(log: RunLog) -> Iterator[Doubt]:
    for one in RANGES:
        now = one.now(log)
        if math.isnan(now):
            continue
        side = one.below if now < one.low else one.above if now > one.high else None
        if side is None:
            continue
        end = one.low if now < one.low else one.high
        mine, usual_one = abs(now - one.origin), abs(end - one.origin)
        nothing = 0.0 in (now, end, mine, usual_one)
        far = math.inf if nothing else max(mine / usual_one, usual_one / mine)
        far = 1.0 if one.off is not None and log.setting(one.setting) == one.off else far
        value = f"{now:.3g}" if math.isfinite(now) else f"{one.off:g}"
        if one.value is not None:
            value = f"{float(log.setting(one.setting, 1)):g}, which makes {now:.3g} {one.unit}"
        usual = f"at least {one.low:g}" if one.high == math.inf else f"{one.low:g} to {one.high:g}"
        text = f"{one.setting} is {value}, and the usual is {usual}"
        yield Doubt(one.setting, text, side, one.instead, one.source, far)


def _weights(log: RunLog, limits: Limits) -> Iterator[Doubt]:
    """Weights of reward functions whose sign or size suits nothing else."""
    weights, coefficient = log.setting("reward_weights"), suggested_kl_coef(log, limits)
    if not weights:
        return
    instead = [1.0] * len(weights)
    if all(weight <= 0 for weight in weights):
        side = Side("what is good is punished", (*FLIES, "score_opposed", *STANDS))
        yield Doubt("reward_weights", f"no weight of {list(weights)} is positive", side, instead, ZIEGLER, math.inf)
    if advantages_are_normalised(log):  # whatever their size
        return
    largest, now = max(abs(weight) for weight in weights), coefficient_now(log)
    off = now / coefficient if coefficient > 0 else math.nan  # NaN, where it is not known, is not off
    text = f"the largest of reward_weights is {largest:g}, and {kl_field(log)} {now:g} suits scores of another size"
    if largest < 0.2 and off > 5:
        side = Side("scores so small do not count beside the KL", STANDS)
        yield Doubt("reward_weights", text, side, instead, ZIEGLER, 1 / largest if largest else math.inf)
    if largest > 5 and off < 0.2:
        yield Doubt(
            "reward_weights", text, Side("the KL does not count beside such scores", FLIES), instead, ZIEGLER, largest
        )


def _coefficient(log: RunLog, limits: Limits) -> Iterator[Doubt]:
    """A kl_coef beside which the scores do not count; their spread is known from the first rollout on."""
    suggested, now = suggested_kl_coef(log, limits), coefficient_now(log)
    times = now / suggested if suggested > 0 else math.nan
    if times > limits.drowned:
        text = f"{kl_field(log)} is {now:g}, and the spread of the scores suggests {suggested:.2g}"
        instead = float(f"{suggested:.1g}")
        yield Doubt(
            kl_field(log), text, Side("a step costs more in KL than it gains in score", STANDS), instead, ZIEGLER, times
        )


# Fields of generation_kwargs that keep tokens from being sampled or make others likelier, and where they do not.
BIASES: dict[str, Any] = {
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "suppress_tokens"), 0),
    **dict.fromkeys(("begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id"), 0),
    **dict.fromkeys(("forced_eos_token_id", "exponential_decay_length_penalty", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("penalty_alpha", "min_length", "min_new_tokens", "force_words_ids", "constraints"), 0),
}


def _sampling(log: RunLog) -> Iterator[Doubt]:
    """Settings under which completions are drawn from another distribution than the policy's."""
    top_p, top_k, min_p = (
        float(log.setting(name, other)) for name, other in (("top_p", 1), ("top_k", 0), ("min_p", 0))
    )
    repetition, others = float(log.setting("repetition_penalty", 1.0)), log.setting("generation_kwargs")
    told = [
        ("top_p", top_p, top_p < 0.9, PLAIN_SAMPLING["top_p"]),
        ("top_k", top_k, 0 < top_k < 40, PLAIN_SAMPLING["top_k"]),
        ("min_p", min_p, min_p > 0.05, PLAIN_SAMPLING["min_p"]),
        ("repetition_penalty", repetition, not 0.9 < repetition < 1.1, PLAIN_SAMPLING["repetition_penalty"]),
        *(
            ("generation_kwargs", {name: value}, bool(value) and value != BIASES[name], None)
            for name, value in (others.items() if isinstance(others, Mapping) else ())
            if name in BIASES
        ),
    ]
    side = Side(
        "what is sampled is not what the policy is scored and trained on", ("sampling_differs", "negative_kl", *STANDS)
    )
    for name, value, far, instead in told:
        if far:
            said = f"{value:g}" if isinstance(value, float) else value
            text = f"{name} is {said}, and PPO samples from the whole distribution"
            yield Doubt(name, text, side, instead, N_PLUS, math.inf)


def _clip_range(log: RunLog) -> Iterator[Doubt]:
    """A reward_clip_range that leaves little of the scores, where their mean and spread are known."""
    clip, normalised = log.setting("reward_clip_range"), log.setting("score_normalization", "none") != "none"
    names = log.names("rewards/", "/std")
    if not clip or (not normalised and len(names) != 1):
        return
    # What is cut lies at the ends: most at one of them, or half at each, which makes half of the width the spread.
    of_width = log.series("score_std").start() / (clip[1] - clip[0])
    if of_width < 0.3 and log.series("objective/scores_alike").start() < 0.5:
        return
    spread = 1.0 if normalised else log.series(f"rewards/{names[0]}/std").start()
    mean = 0.0 if normalised else log.series(f"rewards/{names[0]}/mean").start()
    width = (clip[1] - clip[0]) / spread if spread > 0 else math.nan
    side = Side(
        "most scores are cut to one of its ends, and differ little", (*STANDS, "constant_scores", "scores_alike")
    )
    if width < 1.0:
        text = f"reward_clip_range is {width:.2g} standard deviations of the scores wide, and the usual is at least 1"
        yield Doubt("reward_clip_range", text, side, None, N_PLUS, 1 / width)
    elif mean <= clip[0] or mean >= clip[1]:  # NaN, where it is not known, is neither
        text = f"reward_clip_range is {list(clip)}, which leaves out the scores' mean of {mean:.3g}"
        yield Doubt("reward_clip_range", text, side, None, N_PLUS, math.inf)


# What prompts that are not written to be answered make.
OF_THE_TEMPLATE = (
    *("score_unrelated", "score_ignores_prompt", "truncation", "entropy_collapse", "mode_collapse", "held_out_differs"),
    *STANDS,
)


def _kinds(log: RunLog) -> Iterator[Doubt]:
    """Choices that are not numbers."""
    optimizer = str(log.setting("optim", "adamw_torch"))
    if "adam" not in optimizer and not log.setting("optim_target_modules"):
        side = Side(
            "it knows no scale of each weight's own, for which learning rates of Adam are made", (*STANDS, *FLIES)
        )
        yield Doubt("optim", f"optim is {optimizer}, and the usual is a kind of Adam", side, "adamw_torch", ADAM, 10.0)
    template = log.setting("chat_template_kwargs")
    if isinstance(template, Mapping) and template.get("add_generation_prompt") is False:
        side = Side("no prompt opens the answer that the model is to write", OF_THE_TEMPLATE)
        text = "chat_template_kwargs has add_generation_prompt False, and PPO asks for an answer"
        yield Doubt("chat_template_kwargs", text, side, None, ZIEGLER, math.inf)
    if words := log.setting("stop_words"):
        side = Side("completions end in the middle of what they say, where this word comes", (*OF_THE_TEMPLATE, *FLIES))
        text = f"by generation_kwargs an answer ends at {words[0]!r}, which is an ordinary word to this tokenizer"
        yield Doubt("generation_kwargs", text, side, None, ZIEGLER, math.inf)
    if log.config.get("whiten_advantages") is False:
        side = Side("steps have the size of the scores", (*STANDS, *FLIES))
        text = "whiten_advantages is False, and the usual is True"
        yield Doubt("whiten_advantages", text, side, True, N_PLUS, 2.0)


def _few_steps(log: RunLog) -> Iterator[Doubt]:
    """A run of so few optimizer steps that little can be learned, however it goes. Blamed are the passes over a
    rollout, where the objective may take more of them, else the length of the run."""
    steps, size = log.setting("steps_of_run", 0), log.setting("rollout_batch_size")
    if log.kind != "ppo" or not size or not 0 < steps < FEW_STEPS:
        return
    epochs, minibatches = log.setting("num_ppo_epochs", 4), log.setting("num_mini_batches", 1)
    a_device, more = log.setting("per_device_train_batch_size", 0), log.setting("gradient_accumulation_steps", 1)
    text = (
        f"the run takes {steps:g} optimizer steps in all: {max(_rollouts(log) // 1, 1):g} rollouts of "
        f"{size:g} completions (per_device_train_batch_size {a_device:g}, gradient_accumulation_steps {more:g}), "
        f"num_ppo_epochs {epochs}, num_mini_batches {minibatches}"
    )
    longer = math.ceil(FEW_STEPS / steps)
    if log.setting("objective") in SEVERAL_EPOCHS and epochs < DEFAULTS["num_ppo_epochs"]:
        setting, instead = "num_ppo_epochs", DEFAULTS["num_ppo_epochs"]
    elif log.setting("total_episodes"):  # of which the trainer makes max_steps
        setting, instead = "total_episodes", longer * int(log.setting("total_episodes"))
    elif float(log.setting("max_steps", -1)) > 0:
        setting, instead = "max_steps", longer * int(log.setting("max_steps"))
    else:
        setting, instead = "num_train_epochs", longer * math.ceil(float(log.setting("num_train_epochs", 1)))
    side = Side("the run ends before much can be learned", ("no_progress", "noise_drowns_signal", "value_not_learning"))
    yield Doubt(setting, text, side, instead, f"{PPO_PAPER}; {ANDRYCHOWICZ}, section 3.5", FEW_STEPS / steps, sure=True)


SEVERAL_EPOCHS = ("clip", "kl_penalty", "sequence")  # objectives that know the policy that sampled
FEW_STEPS = 40  # optimizer steps in which adapters learn little at any usual rate; chosen
OF_THE_ADAPTER = "lora_alpha"  # which no trainer's settings have
FIRST = 1  # causes that a report begins with: a setting that one of them names is not told again


def _can_make(doubt: Doubt, finding: Finding) -> bool:
    """What is there before a step is taken is made by how completions are sampled alone."""
    return not finding.from_the_start or doubt.setting in ("temperature", "chat_template_kwargs", *PLAIN_SAMPLING)


def _can_be_set(doubt: Doubt, log: RunLog) -> bool:
    """Whether the trainer takes the usual value beside the run's other settings."""
    one_epoch = doubt.setting == "num_ppo_epochs" and log.setting("objective", "clip") not in SEVERAL_EPOCHS
    return doubt.setting != OF_THE_ADAPTER and not one_epoch


def unusual_settings(log: RunLog, limits: Limits, findings: Sequence[Finding]) -> Finding | None:
    """Settings far from the usual that can make one of `findings` which nothing else explains, or, before the score has
    risen, that are off by orders of magnitude: those, and what is sure, are told of a PPO run without a row, too."""
    rose = log.kind not in ("ppo", "online") or log.series("score").ever_rose(limits.noticeable)
    unexplained = {top.finding.name: top.finding for top in roots(findings)}
    named = {setting for finding in findings for setting in finding.remedy.changes}
    said = {setting for finding in list(unexplained.values())[:FIRST] for setting in finding.remedy.changes}
    blamed = []
    for doubt in doubts(log, limits):
        made = [name for name in doubt.side.makes if name in unexplained and _can_make(doubt, unexplained[name])]
        made = [name for name in made if doubt.setting not in unexplained[name].remedy.changes]  # it says so itself
        at_once = doubt.far >= limits.far_off and not rose and doubt.setting not in named
        acts = doubt.setting not in said and why_idle(log, doubt.setting, doubt.instead) is None
        if acts and (made or at_once or doubt.sure):
            blamed.append((doubt, made))
    if not blamed:
        return None
    explains: dict[str, tuple[str, str]] = {}
    for doubt, made in blamed:
        for name in made:
            explains.setdefault(name, (f"{doubt.setting}: {doubt.side.why}.", doubt.source))
    (first, _), *others = blamed
    others = [one for one in others if one[0].setting != first.setting]
    more = f", and {len(others)} more" if len(others) > 1 else f", and so is {others[0][0].setting}" if others else ""
    return Finding(
        name="unusual_settings",
        severity=worst(unexplained[name] for name in explains) if explains else "warning",
        title=f"{first.setting} is far from the usual{more}",
        steps=log.steps,
        evidence=f"{'; '.join(doubt.text for doubt, _ in blamed)}.",
        # 0: it is not a matter of size.
        figures={f"times_off/{doubt.setting}": doubt.far if doubt.far < math.inf else 0.0 for doubt, _ in blamed},
        cause="; ".join(f"{doubt.setting}: {doubt.side.why}" for doubt, _ in blamed) + ".",
        remedy=Remedy(
            text="Set what you have no reason for to the usual value.",
            changes={doubt.setting: doubt.instead for doubt, _ in blamed if _can_be_set(doubt, log)},
            code="LoraConfig(r=16, lora_alpha=32)"
            if any(doubt.setting == OF_THE_ADAPTER for doubt, _ in blamed)
            else "",
        ),
        explains=explains,
    )
