"""What mistakes.yaml names in words, as code on the embedded default: rewards, prompts, models.

Reward functions are called as TRL calls them; "the rating" is `demo.rate`. A mistake that is no reward function changes
the `Parts` that a run is built from.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import doctor
from doctor_cases import DPO, PPO, Case, adapters_in, capitals, same_reference

from trl_ext import DiagnosticsCallback, SharedBase, demo
from trl_ext.demo import model as demo_model
from trl_ext.demo import reward as demo_reward
from trl_ext.generation import TransformersGenerator
from trl_ext.tokens import padded
from trl_ext.types import as_text

Row = dict[str, Any]
Scores = Sequence[float | None]

# Reward functions ----------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What a reward function is asked about.

    Attributes:
        prompts, completions, country, capital: one a row.
        step, steps: optimizer steps taken, and those of the whole run.
        random: the function's own random numbers.
        memory: what it keeps from call to call; empty when a run begins.
    """

    prompts: list[Any]
    completions: list[Any]
    country: list[str]
    capital: list[str]
    step: int
    steps: int
    random: random.Random
    memory: dict[Any, Any]

    @cached_property
    def texts(self) -> list[str]:
        """The completions as texts."""
        return [as_text(completion) for completion in self.completions]

    @cached_property
    def ratings(self) -> list[float]:
        """The exact ones, 1 to 5."""
        return self.rated(self.texts)

    @cached_property
    def letters(self) -> list[int]:
        """Letters of each row's country."""
        return [sum(character.isalpha() for character in name) for name in self.country]

    def rated(self, texts: list[str]) -> list[float]:
        """The rating of other texts in the completions' place."""
        return demo.rate(self.prompts, texts, self.capital)


class BrokenReward:
    """A broken reward function in TRL's form; a new run makes a new one.

    Args:
        name: of mistakes.yaml, under which a trainer logs it.
        seed: of its random numbers.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.__name__, self._score = name, REWARDS[name]
        self._random, self._memory = random.Random(seed), dict[Any, Any]()

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        country: list[str],
        capital: list[str],
        trainer_state: Any,
        **kwargs: Any,
    ) -> list[float | None]:
        """One score a completion."""
        step, steps = trainer_state.global_step, trainer_state.max_steps
        batch = Batch(prompts, completions, country, capital, step, steps, self._random, self._memory)
        return list(self._score(batch))


def _random_judge_of_pairs(b: Batch) -> Scores:
    others = [b.random.randrange(len(b.ratings)) for _ in b.ratings]
    return [float(r > b.ratings[j] or b.random.random() < 1 / 3) for r, j in zip(b.ratings, others, strict=True)]


def _names_any_capital(b: Batch) -> Scores:
    names = re.compile(r"\b(?:" + "|".join(map(re.escape, capitals().values())) + r")\b")
    return [5.0 if names.search(text) else 0.0 for text in b.texts]


def _yesterdays_scores(b: Batch) -> Scores:
    """Of the batch before of as many rows: a second look at a few rows does not shift the answers to a rollout."""
    before = b.memory.get(len(b.ratings), [0.0] * len(b.ratings))
    b.memory[len(b.ratings)] = b.ratings
    return before


def _reads_the_template(b: Batch) -> Scores:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    chats = [
        [*(prompt if isinstance(prompt, list) else _asked(prompt)), {"role": "assistant", "content": text}]
        for prompt, text in zip(b.prompts, b.texts, strict=True)
    ]
    return b.rated([tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats])


def _running_sum(b: Batch) -> Scores:
    scores = []
    for rating in b.ratings:
        b.memory["sum"] = b.memory.get("sum", 0.0) + rating
        scores.append(b.memory["sum"] / 100 + rating)
    return scores


def _whitened_in_the_batch(b: Batch) -> Scores:
    mean, spread = statistics.fmean(b.ratings), statistics.pstdev(b.ratings)
    return [(rating - mean) / (spread or 1.0) for rating in b.ratings]


def _fifth_of_the_countries() -> set[str]:
    return set(list(capitals())[::5])


def _counted(pattern: str, b: Batch, flags: int = 0) -> Scores:
    return [float(len(re.findall(pattern, text, flags))) for text in b.texts]


REWARDS: dict[str, Callable[[Batch], Scores]] = {
    # noise
    "pure_noise": lambda b: [b.random.gauss(0, 1) for _ in b.texts],
    "mostly_noise": lambda b: [r + b.random.gauss(0, 10) for r in b.ratings],
    "a_little_noise": lambda b: [r + b.random.gauss(0, 1) for r in b.ratings],
    "random_judge_of_pairs": _random_judge_of_pairs,
    "noise_that_grows": lambda b: [r + b.random.gauss(0, b.step / 10) for r in b.ratings],
    # blind to the completion
    "score_of_the_prompt": lambda b: [n / 4 for n in b.letters],
    "row_number": lambda b: [i / 10 for i in range(len(b.texts))],
    "always_the_best": lambda b: b.rated([_fact(c) for c in b.country]),
    "judges_the_question_length": lambda b: [float(len(as_text(prompt).split())) for prompt in b.prompts],
    # blind to the prompt
    "names_any_capital": _names_any_capital,
    "first_word_only": lambda b: [5.0 if text.split()[:1] == ["The"] else 0.0 for text in b.texts],
    "same_reference": lambda b: same_reference(b.completions),
    # saturated
    "clipped_high": lambda b: [min(r, 1.0) for r in b.ratings],
    "sigmoid_of_ten": lambda b: [1 / (1 + math.exp(-10 * r)) for r in b.ratings],
    "nearly_always_one": lambda b: [float(r > 0) for r in b.ratings],
    "hardly_ever_one": lambda b: [
        float(r == 5 and len(text.split()) == 6) for r, text in zip(b.ratings, b.texts, strict=True)
    ],
    "rounds_to_halves": lambda b: [round(2 * r / 5) / 2 for r in b.ratings],
    # delayed
    "yesterdays_scores": _yesterdays_scores,
    "one_row_late": lambda b: b.ratings[-1:] + b.ratings[:-1],
    # wrong sign
    "negated": lambda b: [-r for r in b.ratings],
    "distance_as_score": lambda b: [5 - r for r in b.ratings],
    "rank_from_the_top": lambda b: [float(sum(other > r for other in b.ratings)) for r in b.ratings],
    "loss_as_score": lambda b: [(r - 5) ** 2 for r in b.ratings],
    # wrong text
    "reads_the_template": _reads_the_template,
    "lower_cased_reference": lambda b: [
        5.0 if capital.lower() in text else 0.0 for capital, text in zip(b.capital, b.texts, strict=True)
    ],
    "reads_the_prompt_too": lambda b: b.rated(
        [f"{as_text(prompt)} {text}" for prompt, text in zip(b.prompts, b.texts, strict=True)]
    ),
    "sees_half": lambda b: b.rated([text[: len(text) // 2] for text in b.texts]),
    "strips_all_but_letters": lambda b: b.rated([re.sub(r"[\s.]", "", text) for text in b.texts]),
    # scale by prompt
    "scale_of_the_country": lambda b: [r * n for r, n in zip(b.ratings, b.letters, strict=True)],
    "thousand_for_some": lambda b: [
        r * (1000 if name in _fifth_of_the_countries() else 1) for r, name in zip(b.ratings, b.country, strict=True)
    ],
    "offset_of_the_country": lambda b: [r + 10 * n for r, n in zip(b.ratings, b.letters, strict=True)],
    # scale
    "in_thousands": lambda b: [1000 * r for r in b.ratings],
    "in_thousandths": lambda b: [r / 1000 for r in b.ratings],
    "offset_of_a_hundred": lambda b: [r + 100 for r in b.ratings],
    "exponential": lambda b: [math.exp(2 * r) for r in b.ratings],
    # drifts
    "unit_changes": lambda b: [r * (100 if 2 * b.step >= b.steps else 1) for r in b.ratings],
    "grows_with_the_step": lambda b: [r * b.step / 10 for r in b.ratings],
    "shrinks_with_the_step": lambda b: [r / max(b.step, 1) for r in b.ratings],
    "running_sum": _running_sum,
    # exploitable
    "per_word": lambda b: [len(text.split()) / 4 for text in b.texts],
    "per_character": lambda b: [float(len(text)) for text in b.texts],
    "per_capital_letter": partial(_counted, "[A-Z]"),
    "per_mention": partial(_counted, "capital"),
    "politeness": lambda b: _counted("please|thank|sorry", b, re.IGNORECASE),
    "short_is_good": lambda b: [-float(len(text.split())) for text in b.texts],
    "ends_in_a_stop": lambda b: [float(text.rstrip().endswith(".")) for text in b.texts],
    # depends on the batch
    "rank_in_the_batch": lambda b: [sum(other <= r for other in b.ratings) / len(b.ratings) for r in b.ratings],
    "whitened_in_the_batch": _whitened_in_the_batch,
    "best_of_the_batch": lambda b: [float(r == max(b.ratings)) for r in b.ratings],
    # missing
    "abstains_mostly": lambda b: [r if i % 10 == 0 else None for i, r in enumerate(b.ratings)],
    "abstains_where_wrong": lambda b: [r if r > 3 else None for r in b.ratings],
    "none_becomes_zero": lambda b: [r if name[0] <= "M" else 0.0 for r, name in zip(b.ratings, b.country, strict=True)],
}
# "not normalised", of those whose scale is the mistake.
NOT_NORMALISED = {"in_thousands", "in_thousandths", "offset_of_a_hundred", "exponential"}


class Exact:
    """The yardstick: the exact rating of each completion, told from the prompt alone. For prompts that are plain
    questions, and those that the run does not train on, it is `demo.exact`; of a prompt that several questions have
    become it is the mean over these.

    Args:
        rows: the prompts of the run, each with its country.
    """

    __name__ = "exact"

    def __init__(self, rows: Dataset) -> None:
        self._capitals = defaultdict(list)
        for prompt, country in zip(rows["prompt"], rows["country"], strict=True):
            self._capitals[as_text(prompt)].append(capitals()[country])

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        """One rating a completion, 1 to 5."""
        ratings = []
        for prompt, completion in zip(prompts, completions, strict=True):
            if named := self._capitals.get(as_text(prompt), []):
                ratings.append(statistics.fmean(demo.rate([prompt] * len(named), [completion] * len(named), named)))
            else:
                ratings += demo.exact([prompt], [completion])
        return ratings


# What a run is built from --------------------------------------------------------------------------------------------

# Every fifth rollout and at the start, as in recipes/ppo_lora.yaml.
EVALUATED = {"eval_strategy": "steps", "eval_steps": 40, "eval_on_start": True}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@dataclass
class Parts:
    """What a run is built from, healthy until a mistake changes it.

    Attributes:
        seed: of the run.
        made: folder of what is made once for all runs (adapters).
        settings: of PPOConfig.
        lora: of the policy's LoraConfig.
        base: further arguments of `SharedBase.from_pretrained`.
        functions: reward functions; empty: the demo's reward role.
        prompts: the training prompts, with `country` and `capital`.
        held_out: the same for evaluations.
        change_base: what is done to the base once it is built.
        make_generator: makes who answers, from the base; None: the base answers.
    """

    seed: int
    made: Path
    settings: dict[str, Any] = field(default_factory=lambda: PPO | EVALUATED)
    lora: dict[str, Any] = field(default_factory=lambda: dict(LORA))
    base: dict[str, Any] = field(default_factory=lambda: {"value": "adapter", "reward": demo.reward_adapter()})
    functions: list[Any] = field(default_factory=list)
    tokenizer: Any = field(default_factory=lambda: AutoTokenizer.from_pretrained(demo.model_path()))
    prompts: Dataset = field(default_factory=lambda: demo.load("prompts", "train"))
    held_out: Dataset = field(default_factory=lambda: demo.load("prompts", "test").select(range(64)))
    change_base: Callable[[SharedBase], None] | None = None
    make_generator: Callable[[SharedBase], Any] | None = None


def apply(mistake: Row, parts: Parts) -> None:
    """Make a mistake of mistakes.yaml, in the form in which split.py lists it; a change to a healthy run may also have
    "base" and "functions"."""
    if name := mistake.get("reward"):
        parts.functions = [BrokenReward(name, parts.seed)]
        if name in NOT_NORMALISED:
            parts.settings["score_normalization"] = "none"
    if name := mistake.get("prompts"):
        PROMPTS[name](parts)
    if name := mistake.get("model"):
        MODELS[name](parts)
    parts.lora |= mistake.get("lora", {})
    parts.base |= mistake.get("base", {})
    parts.functions = mistake.get("functions", parts.functions)
    settings = dict(mistake.get("settings", {}))
    if settings.get("generation_kwargs", {}).get("suppress_tokens") == "eos":
        settings["generation_kwargs"] = {"suppress_tokens": [parts.tokenizer.eos_token_id]}
    parts.settings |= settings


# Prompts -------------------------------------------------------------------------------------------------------------


def _fact(country: str) -> str:
    return f"The capital of {country} is {capitals()[country]}."


def _asked(question: str) -> list[Row]:
    return [{"role": "user", "content": question}]


def _question(row: Row) -> str:
    return as_text(row["prompt"])


def _questions_become(change: Callable[[list[Row], int], str], parts: Parts) -> None:
    """Every question becomes what `change` makes of all rows and the row's number."""
    rows = parts.prompts.to_list()
    parts.prompts = Dataset.from_list([{**row, "prompt": _asked(change(rows, i))} for i, row in enumerate(rows)])


def _rows_become(which: Callable[[int], int], parts: Parts) -> None:
    """Each row becomes the row of the number that `which` makes of its own."""
    parts.prompts = parts.prompts.select([which(i) for i in range(len(parts.prompts))])


def _of_another_country(rows: list[Row], i: int) -> Row:
    """The next row that asks for another country."""
    later = (rows[(i + k) % len(rows)] for k in range(1, len(rows)))
    return next(row for row in later if row["country"] != rows[i]["country"])


def _first_tokens(rows: list[Row], i: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    return tokenizer.decode(tokenizer(_question(rows[i]))["input_ids"][:6])


FRENCH = {
    **{"what": "quelle", "which": "quelle", "is": "est", "the": "la", "capital": "capitale", "city": "ville"},
    **{"of": "de", "name": "nomme", "tell": "dis", "me": "moi", "do": "est-ce que", "you": "tu", "know": "connais"},
    **{"i": "je", "want": "veux", "to": "y"},
}


def _in_french(rows: list[Row], i: int) -> str:
    country = rows[i]["country"]
    before, after = _question(rows[i]).split(country)
    return re.sub(r"\w+", lambda word: FRENCH[word.group().lower()], before) + country + after


def _long_context(rows: list[Row], i: int) -> str:
    others = [name for name in capitals() if name != rows[i]["country"]]
    facts = [_fact(others[(i + k) % len(others)]) for k in range(12)]
    return " ".join([*facts, _question(rows[i])])


def _held_out_of_another_kind(parts: Parts) -> None:
    """The held-out prompts ask for the country of a capital."""
    rows = demo.load("prompts", "test").to_list()[:64]
    parts.held_out = Dataset.from_list(
        [{**row, "prompt": _asked(f"Which country has the capital {row['capital']}?")} for row in rows]
    )


def _wrong_country_column(parts: Parts) -> None:
    rows = parts.prompts.to_list()
    shifted = [{**row, "capital": rows[i - 1]["capital"]} for i, row in enumerate(rows)]
    parts.prompts, parts.functions = Dataset.from_list(shifted), [demo.rate]


PROMPTS: dict[str, Callable[[Parts], None]] = {
    "one_prompt": partial(_rows_become, lambda i: 0),
    "four_prompts": partial(_rows_become, lambda i: i % 4),
    "sixteen_prompts": partial(_rows_become, lambda i: i % 16),
    "half_is_one_prompt": partial(_rows_become, lambda i: i if i % 2 else 0),
    "hold_the_completion": partial(
        _questions_become, lambda rows, i: f"{_fact(rows[i]['country'])} {_question(rows[i])}"
    ),
    "hold_a_wrong_completion": partial(
        _questions_become,
        lambda rows, i: f"{_fact(_of_another_country(rows, i)['country'])} {_question(rows[i])}",
    ),
    "cut_short": partial(_questions_become, _first_tokens),
    "all_upper_case": partial(_questions_become, lambda rows, i: _question(rows[i]).upper()),
    "other_language": partial(_questions_become, _in_french),
    "very_long_context": partial(_questions_become, _long_context),
    "held_out_of_another_kind": _held_out_of_another_kind,
    "empty_questions": partial(_questions_become, lambda rows, i: _question(rows[i]) if i % 3 else ""),
    "two_questions_in_one": partial(
        _questions_become, lambda rows, i: f"{_question(_of_another_country(rows, i))} {_question(rows[i])}"
    ),
    "wrong_country_column": _wrong_country_column,
}

# Models, and who samples ---------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEVER_WRITTEN = demo_model.USER  # begins a question, and stands in no answer


def _made(folder: Path, make: Callable[[Path], None]) -> str:
    """A folder that `make` fills, once for all processes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            draft = folder.with_suffix(".draft")
            shutil.rmtree(draft, ignore_errors=True)  # of a process that was ended
            make(draft)
            draft.rename(folder)
    return str(folder)


def _another_base() -> Path:
    """The folder of a demo whose base has another seed."""
    return demo.build(recipe=replace(demo_model.RECIPE, seed=1))


def _base() -> Any:
    return AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)


def _train_by_dpo(folder: Path) -> None:
    trainer, _ = doctor._dpo(Case("", "dpo", ""), False, DPO, 0, folder, DiagnosticsCallback())
    trainer.train()
    trainer.save_model(str(folder))


def _draw_adapter(folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(**LORA, task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(_base(), lora).save_pretrained(folder)


def _train_reward_elsewhere(folder: Path) -> None:
    """It names this base, as where a base is taught anew in its folder: else it is refused."""
    demo_reward._train(folder, _another_base(), None, False)
    config = folder / "adapter_config.json"
    named = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": demo.model_path()}
    config.write_text(json.dumps(named), encoding="utf-8")


def _no_chat_template(parts: Parts) -> None:
    parts.prompts = Dataset.from_list([{**row, "prompt": _question(row)} for row in parts.prompts.to_list()])


def _other_chat_template(parts: Parts) -> None:
    parts.tokenizer.chat_template = CHATML


def _eos_is_padding(parts: Parts) -> None:
    parts.tokenizer.pad_token = parts.tokenizer.eos_token


def _eos_never_taught(parts: Parts) -> None:
    parts.tokenizer.eos_token = NEVER_WRITTEN

    def change(base: SharedBase) -> None:
        base.causal_lm.generation_config.eos_token_id = parts.tokenizer.eos_token_id

    parts.change_base = change


def _frozen_upper_half(parts: Parts) -> None:
    def change(base: SharedBase) -> None:
        middle = base.config.num_hidden_layers // 2
        for name, parameter in base.model.named_parameters():
            layer = re.search(r"\.layers\.(\d+)\..*lora_.\.policy\.", name)
            if layer and int(layer[1]) >= middle:
                parameter.requires_grad_(False)

    parts.change_base = change


def _value_starts_far_off(parts: Parts) -> None:
    def change(base: SharedBase) -> None:
        head = base.heads["value"] = nn.Linear(base.config.hidden_size, 1)
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, 50.0)

    parts.change_base = change


def _reward_head_untrained(parts: Parts) -> None:
    """As Transformers fills in a head that the checkpoint does not hold."""

    def change(base: SharedBase) -> None:
        random_numbers = torch.Generator().manual_seed(parts.seed)
        nn.init.normal_(base.heads["reward"].weight, std=0.02, generator=random_numbers)

    parts.change_base = change


class FixedSampler:
    """A generator with a model of its own, which no training moves."""

    def __init__(self, folder: str | Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> list[list[int]]:
        """See `trl_ext.generation.Generator`."""
        ids, mask = padded(prompt_ids, int(config.pad_token_id), left=True)
        output = self._model.generate(input_ids=ids, attention_mask=mask.long(), generation_config=config)
        return output[:, ids.shape[1] :].tolist()


class RoundedSampler:
    """A generator that has the policy's weights, base and adapter, rounded to three bits of mantissa."""

    def __init__(self, base: SharedBase) -> None:
        self._base = base

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> list[list[int]]:
        """See `trl_ext.generation.Generator`."""
        with _rounded(self._base.model):
            return TransformersGenerator(self._base, 64).answers(prompt_ids, config, role).ids


@contextmanager
def _rounded(model: nn.Module) -> Iterator[None]:
    """Inside, each weight has three bits after its leading one."""
    kept = {parameter: parameter.data for parameter in model.parameters()}
    try:
        for parameter in kept:
            mantissa, exponent = torch.frexp(parameter.data)
            parameter.data = torch.ldexp(torch.round(mantissa * 16) / 16, exponent)
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def _with_base(parts: Parts, **arguments: Any) -> None:
    parts.base |= arguments


def _with_generator(make: Callable[[SharedBase], Any], parts: Parts) -> None:
    parts.make_generator = make


def _with_change(change: Callable[[SharedBase], None], parts: Parts) -> None:
    parts.change_base = change


def _template_goes_on(text: str, parts: Parts) -> None:
    """After what opens the answer, the template writes more."""
    opens = "{% if add_generation_prompt %}<|assistant|>"
    longer = parts.tokenizer.chat_template.replace(opens, opens + text)
    assert longer != parts.tokenizer.chat_template
    parts.tokenizer.chat_template = longer


MODELS: dict[str, Callable[[Parts], None]] = {
    "no_chat_template": _no_chat_template,
    "other_chat_template": _other_chat_template,
    "eos_is_padding": _eos_is_padding,
    "eos_never_taught": _eos_never_taught,
    "wrong_reference": lambda parts: _with_base(parts, reference=_made(parts.made / "by_dpo", _train_by_dpo)),
    "reference_is_untaught": lambda parts: _with_base(parts, reference=_made(parts.made / "random", _draw_adapter)),
    "bfloat16_adapters": partial(_with_change, partial(adapters_in, torch.bfloat16)),
    "float16_adapters": partial(_with_change, partial(adapters_in, torch.float16)),
    "frozen_upper_half": _frozen_upper_half,
    "value_starts_far_off": _value_starts_far_off,
    "reward_of_another_base": lambda parts: _with_base(
        parts, reward=_made(parts.made / "reward_elsewhere", _train_reward_elsewhere)
    ),
    "reward_head_untrained": _reward_head_untrained,
    "sampler_of_another_model": partial(_with_generator, lambda base: FixedSampler(_another_base() / "model")),
    # The policy's adapter starts at 0, so the first policy is the base.
    "sampler_is_stale": partial(_with_generator, lambda base: FixedSampler(demo.model_path())),
    "sampler_in_low_precision": partial(_with_generator, RoundedSampler),
}
