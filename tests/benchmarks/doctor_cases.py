"""Plausible mistakes on the embedded default, each with its cure: what tests/benchmarks/doctor.py runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache, partial
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig

from trl_ext import SharedBase, demo, feedback
from trl_ext.generation import Answers, TransformersGenerator
from trl_ext.rewards.texts import length_penalty
from trl_ext.types import as_text

Settings = dict[str, Any]

# recipes/ppo_lora.yaml, a third as long.
PPO: Settings = {
    "total_episodes": 1280,
    "per_device_train_batch_size": 32,
    "num_ppo_epochs": 4,
    "num_mini_batches": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_completion_length": 16,
    "missing_eos_penalty": 1.0,
    "score_normalization": "reference",
    "kl_coef": 0.4,
    "gradient_checkpointing": False,
}
REWARD: Settings = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "center_rewards_coefficient": 0.001,
    "eval_strategy": "steps",
    "eval_steps": 40,
    "logging_steps": 10,
}
DPO: Settings = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 5e-4,
    "beta": 0.1,
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 1.0],
    "logging_steps": 5,
}


ONLINE: Settings = {"learning_rate": 5e-4, "logging_steps": 5, "max_steps": 200, "max_completion_length": 16}


@dataclass(frozen=True)
class Case:
    """A mistake and its cure.

    Attributes:
        finds: the finding that the doctor should name.
        kind: "ppo", "reward", "dpo" or "online".
        settings: the mistaken ones.
        cure: settings in their place; None: what the finding's remedy says.
        functions: reward functions in the mistaken run; empty: the demo's reward role.
        cured_functions: in the cured run; None: the same.
        arguments: what the trainer is given otherwise.
        lora: further arguments of the policy's LoraConfig.
        prompts, pairs: what the mistake does to the data.
        cured_pairs: what the cure does to the pairs in its place; None: the same as the mistake, or nothing where the
            cure is to leave it.
        roles: what the mistake does to the roles, once they are loaded.
        generator: what the mistake answers with, made from the roles.
        note: the mistake in words.
        cured_by: the cure in words, where it is not one of settings.
    """

    finds: str
    kind: str
    note: str
    settings: Settings = field(default_factory=dict)
    cure: Settings | None = None
    functions: tuple[Any, ...] = ()
    cured_functions: tuple[Any, ...] | None = None
    lora: Settings = field(default_factory=dict)
    prompts: Callable[[Dataset], Dataset] | None = None
    pairs: Callable[[Dataset, int], Dataset] | None = None
    cured_pairs: Callable[[Dataset, int], Dataset] | None = None
    arguments: Settings = field(default_factory=dict)
    roles: Callable[[SharedBase], None] | None = None
    generator: Callable[[SharedBase], Any] | None = None
    cured_by: str = ""


def _texts(completions: list[Any]) -> list[str]:
    return [as_text(completion) for completion in completions]


def never_matches(completions: list[Any], **kwargs: Any) -> list[float]:
    """Meant to reward answers that end in a full stop; the pattern has an anchor too many."""
    return [1.0 if re.match(r"\.$", text) else 0.0 for text in _texts(completions)]


def in_percent(prompts: list[Any], completions: list[Any], capital: list[str], **kwargs: Any) -> list[float]:
    """The exact rating, in percent and without bounds."""
    return [100 * score for score in demo.rate(prompts, completions, capital)]


def changes_unit(
    prompts: list[Any], completions: list[Any], capital: list[str], trainer_state: Any, **kwargs: Any
) -> list[float]:
    """The exact rating, from step 56 on in thousandths: its server was updated."""
    unit = 1000 if trainer_state.global_step >= 56 else 1
    return [unit * score for score in demo.rate(prompts, completions, capital)]


def never_reset(
    prompts: list[Any], completions: list[Any], capital: list[str], trainer_state: Any, **kwargs: Any
) -> list[float]:
    """The exact rating, on top of a sum that grows with every batch and should have been begun anew."""
    return [trainer_state.global_step / 2 + score for score in demo.rate(prompts, completions, capital)]


def errors(prompts: list[Any], completions: list[Any], capital: list[str], **kwargs: Any) -> list[float]:
    """How far the exact rating is from the best one, as a penalty."""
    return [score - 5 for score in demo.rate(prompts, completions, capital)]


def words(completions: list[Any], **kwargs: Any) -> list[float]:
    """More words seem more helpful."""
    return [len(text.split()) / 4 for text in _texts(completions)]


def on_topic(completions: list[Any], **kwargs: Any) -> list[float]:
    """How often the answer names its topic."""
    return [float(text.count("capital")) for text in _texts(completions)]


def on_topic_once(completions: list[Any], **kwargs: Any) -> list[float]:
    """Whether the answer names its topic."""
    return [float("capital" in text) for text in _texts(completions)]


def share_right(prompts: list[Any], completions: list[Any], capital: list[str], **kwargs: Any) -> list[float]:
    """The exact rating, from 0 to 1."""
    return [score / 5 for score in demo.rate(prompts, completions, capital)]


def detail(completions: list[Any], **kwargs: Any) -> list[float]:
    """A point for every character."""
    return [float(len(text)) for text in _texts(completions)]


def same_reference(completions: list[Any], **kwargs: Any) -> list[float]:
    """Similarity to a reference, the same one for every prompt where each should have its own."""
    reference = "The capital of France is Paris."
    return [8 * SequenceMatcher(None, reference, text).ratio() for text in _texts(completions)]


def long_questions(prompts: list[Any], **kwargs: Any) -> list[float]:
    """Meant to reward long answers; it measures the questions."""
    return [float(len(as_text(prompt))) for prompt in prompts]


def of_four(rows: Dataset) -> Dataset:
    """The first four prompts, again and again."""
    return rows.select([i % 4 for i in range(len(rows))])


def open_books(rows: Dataset) -> Dataset:
    """What may be answered stands before each question."""

    def told(row: dict[str, Any]) -> dict[str, Any]:
        answers = f"It is {row['capital']}. The capital of {row['country']} is {row['capital']}."
        return {"prompt": [{"role": "user", "content": f"{answers} {as_text(row['prompt'])}"}]}

    return rows.map(told)


class OnceACall(TransformersGenerator):
    """A cache whose key leaves out the prompt: all get what the first one is answered."""

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `trl_ext.generation.Generator`."""
        return Answers(super().answers(prompt_ids[:1], config, role).ids * len(prompt_ids))


def adapters_in(dtype: torch.dtype, base: SharedBase) -> None:
    """The adapters that are trained, in another precision."""
    for name, parameter in base.model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.to(dtype)


def its_own_reference(base: SharedBase) -> None:
    """The reference is the adapter that is trained."""
    base.adapters["reference"] = base.adapters["policy"]


@torch.no_grad()
def drawn_anew(base: SharedBase) -> None:
    """The base's matrices, as Transformers draws those that a checkpoint lacks."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in base.model.named_parameters():
        if weight.dim() == 2 and "lora_" not in name:
            weight.copy_(base.config.initializer_range * torch.randn(weight.shape, generator=generator))


def cut_prompts(rows: Dataset) -> Dataset:
    """Some facts before each question, none to eleven of them, and of all that the first 16 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    facts = [f"The capital of {name} is {capital}." for name, capital in capitals().items()]

    def cut(row: dict[str, Any], i: int) -> dict[str, Any]:
        text = " ".join([*facts[: i % 12], as_text(row["prompt"])])
        ids = tokenizer(text, truncation=True, max_length=16)["input_ids"]
        return {"prompt": [{"role": "user", "content": tokenizer.decode(ids)}]}

    return rows.map(cut, with_indices=True)


def longer_wins(pairs: Dataset, seed: int) -> Dataset:
    """Collected from raters who like long answers: nearly all pairs whose shorter side was chosen are gone."""
    rows = [
        i
        for i, row in enumerate(pairs)
        if len(as_text(row["chosen"])) > len(as_text(row["rejected"])) or (i + seed) % 10 == 0
    ]
    return pairs.select(rows)


def balanced(pairs: Dataset, seed: int) -> Dataset:
    """The cure of `longer_wins`."""
    return feedback.balance_lengths(longer_wins(pairs, seed), seed)


def mixed_up(pairs: Dataset, seed: int) -> Dataset:
    """Half of the pairs have their two sides exchanged."""

    def turn(row: dict[str, Any], i: int) -> dict[str, Any]:
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if (i + seed) % 2 else {}

    return pairs.map(turn, with_indices=True)


def in_percent_of_scale(pairs: Dataset, seed: int) -> Dataset:
    """Margins in percent of the scale of ratings."""
    return _with_margins(pairs, 25.0)


def in_points(pairs: Dataset, seed: int) -> Dataset:
    """Margins of at most 2 points."""
    return _with_margins(pairs, 0.5)


def _with_margins(pairs: Dataset, unit: float) -> Dataset:
    rows = demo.load("pairs", "train").map(
        lambda row: {"margin": unit * (row["chosen_rating"] - row["rejected_rating"])}
    )
    return rows.select_columns([*pairs.column_names, "margin"])


def mostly_good(rows: Dataset, seed: int) -> Dataset:
    """Labels as a thumbs-up button gives them: one bad one in ten is kept."""
    return rows.select([i for i, good in enumerate(rows["label"]) if good or (i + seed) % 10 == 0])


def balanced_labels(rows: Dataset, seed: int) -> Dataset:
    """The cure of `mostly_good`."""
    return feedback.balance_labels(mostly_good(rows, seed))


def as_they_are(pairs: Dataset, seed: int) -> Dataset:
    """The pairs without the mistake."""
    return pairs


def few(pairs: Dataset, seed: int) -> Dataset:
    """A few pairs only."""
    return pairs.shuffle(seed=seed).select(range(80))


@cache
def capitals() -> dict[str, str]:
    """Every country's."""
    return {row["country"]: row["capital"] for row in demo.load("exam")}


CASES: tuple[Case, ...] = (
    Case("kl_runs_away", "ppo", "no KL penalty", {"kl_coef": 0.0}),
    Case("kl_drowns_score", "ppo", "kl_coef 10", {"kl_coef": 10.0}),
    Case(
        "sampling_differs",
        "ppo",
        "a repetition penalty in generation that log-probs do not know",
        {"repetition_penalty": 1.3},
    ),
    Case(
        "negative_kl",
        "ppo",
        "answers forced on to 16 tokens, and scored by their errors",
        {"generation_kwargs": {"min_new_tokens": 16}, "score_normalization": "none", "whiten_advantages": False},
        functions=(errors,),
    ),
    Case("first_ratio", "ppo", "LoRA dropout 0.1 left on", {"disable_dropout": False}, lora={"lora_dropout": 0.1}),
    Case("entropy_collapse", "ppo", "answers sampled at temperature 0.1", {"temperature": 0.1}),
    Case("clipping_saturated", "ppo", "a learning rate ten times too large", {"learning_rate": 1e-2}),
    Case("steps_too_small", "ppo", "the learning rate of full fine-tuning, 3e-6", {"learning_rate": 3e-6}),
    Case(
        "constant_scores",
        "ppo",
        "a reward function whose pattern never matches",
        functions=(never_matches,),
        cured_functions=(demo.rate,),
        cure={},
        cured_by="the demo's exact ratings instead",
    ),
    Case("score_scale", "ppo", "scores in percent", {"score_normalization": "none"}, functions=(in_percent,)),
    Case("value_not_learning", "ppo", "vf_coef 1e-7", {"vf_coef": 1e-7}),
    Case(
        "value_loss_explodes",
        "ppo",
        "a reward with a sum that is never reset",
        {"score_normalization": "none"},
        functions=(never_reset,),
        cured_functions=(demo.rate,),
        cure={},
        cured_by="the rating without the sum",
    ),
    Case(
        "gradients_explode",
        "ppo",
        "scores that come in thousandths from the eighth rollout on",
        {"score_normalization": "none"},
        functions=(changes_unit,),
    ),
    Case("gradients_absent", "ppo", "vf_coef 0", {"vf_coef": 0.0}),
    Case("gradients_not_finite", "ppo", "a learning rate of 30", {"learning_rate": 30.0}),
    Case("truncation", "ppo", "at most 5 tokens an answer", {"max_completion_length": 5}),
    Case(
        "length_exploitation",
        "ppo",
        "a reward for every word",
        {"kl_coef": 0.02, "score_normalization": "none", "missing_eos_penalty": None, "max_completion_length": 32},
        functions=(words,),
        cured_functions=(words, length_penalty(soft=8, hard=16)),
        cure={"reward_weights": [1.0, 10.0]},
        cured_by="`length_penalty(soft=8, hard=16)` beside it, with ten times the weight",
    ),
    Case(
        "repetition_exploitation",
        "ppo",
        "a reward for every mention of the topic, and nothing else",
        {
            "kl_coef": 0.0,
            "score_normalization": "none",
            "missing_eos_penalty": None,
            "max_completion_length": 32,
            "total_episodes": 1920,
        },
        functions=(on_topic,),
        cured_functions=(demo.rate, on_topic_once),
        cure={"kl_coef": 0.4, "score_normalization": "reference"},
        cured_by="the rating, one mention counting as much as ten, and a KL penalty",
    ),
    Case(
        "mode_collapse",
        "ppo",
        "one reference text for all prompts",
        {"kl_coef": 0.01, "total_episodes": 1920},
        functions=(same_reference,),
    ),
    Case(
        "over_optimisation",
        "ppo",
        "kl_coef 0.02 for a reward model that can be fooled",
        {"kl_coef": 0.02, "total_episodes": 1920},
    ),
    Case(
        "functions_at_odds",
        "ppo",
        "a rating from 0 to 1, and a point for every character",
        {"kl_coef": 0.05, "score_normalization": "none"},
        functions=(share_right, detail),
    ),
    Case(
        "prompts_truncated", "ppo", "prompts cut to 16 tokens", prompts=cut_prompts, cure={}, cured_by="whole prompts"
    ),
    Case("few_prompts", "ppo", "four prompts in all", {"eval_strategy": "steps", "eval_steps": 80}, prompts=of_four),
    Case(
        "prompts_hold_completions",
        "ppo",
        "prompts that tell what they ask for",
        {"eval_strategy": "steps", "eval_steps": 80},
        functions=(demo.rate,),
        prompts=open_books,
        cure={},
        cured_by="the questions alone",
    ),
    Case(
        "copied_completions",
        "ppo",
        "a generator whose cache leaves the prompt out of its key",
        generator=lambda base: OnceACall(base, 64),
        cure={},
        cured_by="Transformers' generate",
    ),
    Case(
        "score_ignores_completion",
        "ppo",
        "a reward function that measures the question",
        functions=(long_questions,),
        cured_functions=(demo.rate,),
        cure={},
        cured_by="the demo's exact ratings instead",
    ),
    Case(
        "penalty_dominates",
        "ppo",
        "a penalty of 50 for a missing EOS, at most 9 tokens an answer, five rollouts",
        {
            **{"missing_eos_penalty": 50.0, "max_completion_length": 9, "total_episodes": 320},
            **{"score_normalization": "none", "learning_rate": 1e-4},
        },
        functions=(demo.rate,),
    ),
    Case(
        "term_drowns_score",
        "ppo",
        "entropy_coef 20, five rollouts",
        {"entropy_coef": 20.0, "total_episodes": 320, "learning_rate": 1e-4},
    ),
    Case("first_kl", "ppo", "adapters that do not start at 0", lora={"init_lora_weights": False}),
    Case("reference_moves", "ppo", "a reference that is the policy", roles=its_own_reference),
    Case("base_damaged", "ppo", "a base whose matrices were drawn anew", roles=drawn_anew),
    Case(
        "lost_to_rounding",
        "ppo",
        "adapters in bfloat16, a tenth of the rate",
        {"learning_rate": 1e-4},
        roles=partial(adapters_in, torch.bfloat16),
    ),
    Case(
        "wrong_checkpoint",
        "ppo",
        "the checkpoint with the lowest KL is kept",
        {
            **{"eval_strategy": "steps", "eval_steps": 40, "save_strategy": "steps", "save_steps": 40},
            **{"load_best_model_at_end": True, "metric_for_best_model": "objective/kl", "greater_is_better": False},
        },
    ),
    Case("overfit", "reward", "80 pairs, 40 epochs", {"num_train_epochs": 40, "eval_steps": 20}, pairs=few),
    Case(
        "length_bias",
        "reward",
        "pairs of raters who like long answers",
        pairs=longer_wins,
        cured_pairs=balanced,
        cure={},
        cured_by="`feedback.balance_lengths`",
    ),
    Case(
        "chance_level",
        "reward",
        "half of the pairs turned round",
        pairs=mixed_up,
        cured_pairs=as_they_are,
        cure={},
        cured_by="the pairs as they were",
    ),
    Case(
        "saturated",
        "reward",
        "margins in percent",
        pairs=in_percent_of_scale,
        cured_pairs=in_points,
        cure={},
        cured_by="margins of at most 2",
    ),
    Case(
        "uncentred",
        "reward",
        "labels of which nearly all are good",
        {"objective": "binary"},
        pairs=mostly_good,
        cured_pairs=balanced_labels,
        cure={},
        cured_by="`feedback.balance_labels`",
    ),
    Case(
        "likelihood_displacement",
        "dpo",
        "DPO's sigmoid loss alone",
        {"loss_type": ["sigmoid"], "loss_weights": None, "learning_rate": 1e-3},
    ),
    Case("chance_level", "dpo", "a learning rate of 1e-8", {"learning_rate": 1e-8}),
    Case("margins_explode", "dpo", "beta 10, two epochs", {"beta": 10.0, "num_train_epochs": 2}),
    Case("chance_level", "dpo", "a learning rate of 0.1", {"learning_rate": 0.1}),
    Case(
        "reference_mismatch",
        "dpo",
        "a reference that is not where training starts",
        arguments={"ref": "other"},
        cure={},
        cured_by="no `ref_model`",
    ),
)
