"""What mistakes_2.yaml names in words, as code on the embedded default: reward functions and prompts."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache, partial
from typing import Any

from broken import Batch, Parts, Row, Scores, _asked, _fact, _of_another_country, _question, _questions_become
from datasets import Dataset
from doctor_cases import capitals
from transformers import AutoTokenizer

from trl_ext import demo
from trl_ext.demo.world import CITIES, COUNTRIES
from trl_ext.types import as_text

# Helpers -------------------------------------------------------------------------------------------------------------

NAME = "[A-Z][A-Za-z ]*"
FORMS = re.compile(rf"(?:The capital of {NAME} is|It is) {NAME}(?:, the capital of {NAME})?\.")
TAGS = re.compile(r"^<think>.*?</think>\s*<answer>.*?</answer>$", re.DOTALL)
HEDGES = re.compile(r"\b(?:or|not|maybe|perhaps)\b")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@cache
def _any_of(names: frozenset[str]) -> re.Pattern[str]:
    """Finds the names as whole words, the longest first."""
    return re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(names, key=len, reverse=True))) + r")\b")


def _cities_in(text: str) -> list[str]:
    return _any_of(CITIES).findall(text)


@cache
def _wrong_cities() -> dict[str, tuple[str, ...]]:
    """Each country's big cities beside the capital."""
    return {country.name: country.wrong[:2] for country in COUNTRIES}


@cache
def _easy() -> frozenset[str]:
    return frozenset(country.name for country in COUNTRIES if country.favourite == country.capital)


# Reward functions ----------------------------------------------------------------------------------------------------


def _first_digit(b: Batch) -> Scores:
    verdicts = [f"Score: {2 * round(r)}" for r in b.ratings]
    return [float(re.findall(r"\d", verdict)[0]) for verdict in verdicts]


def _correct_in_incorrect(b: Batch) -> Scores:
    verdicts = ["Correct." if r >= 4 else "Incorrect." if _cities_in(t) else "No answer." for r, t in _rated(b)]
    return [float("correct" in verdict.lower()) for verdict in verdicts]


def _rated(b: Batch) -> list[tuple[float, str]]:
    return list(zip(b.ratings, b.texts, strict=True))


def _last_word(b: Batch) -> Scores:
    last = [(text.split() or [""])[-1].strip(".,!?") for text in b.texts]
    return [5.0 if word == capital else 0.0 for word, capital in zip(last, b.capital, strict=True)]


def _sorted_by_length(b: Batch) -> Scores:
    order = sorted(range(len(b.texts)), key=lambda i: len(b.texts[i]))
    return [b.ratings[i] for i in order]


def _against(references: list[str], b: Batch) -> Scores:
    """5 where a row's reference is named, 2 for another city, else 1."""
    named = [_cities_in(text) for text in b.texts]
    return [5.0 if ref in cities else 2.0 if cities else 1.0 for ref, cities in zip(references, named, strict=True)]


def _joined_by_two_letters(b: Batch) -> Scores:
    table = {name[:2].upper(): capital for name, capital in capitals().items()}
    return _against([table[name[:2].upper()] for name in b.country], b)


def _sorted_apart(b: Batch) -> Scores:
    table = dict(zip(sorted(capitals()), capitals().values(), strict=True))
    return _against([table[name] for name in b.country], b)


def _gathered(b: Batch) -> Scores:
    return [r for rank in range(4) for r in b.ratings[rank::4]]


def _dropped(b: Batch) -> Scores:
    left = [r for r in b.ratings if r > 1]
    return left + [0.0] * (len(b.ratings) - len(left))


def _cached(keys: list[str], b: Batch) -> Scores:
    """The rating that was first met under each key."""
    return [b.memory.setdefault(key, r) for key, r in zip(keys, b.ratings, strict=True)]


def _timeout_repeats(b: Batch) -> Scores:
    scores: list[float] = []
    for r in b.ratings:
        late = b.random.random() < 0.5 and "last" in b.memory
        b.memory["last"] = b.memory["last"] if late else r
        scores.append(b.memory["last"])
    return scores


def _novelty(b: Batch) -> Scores:
    scores = []
    for text in b.texts:
        scores.append(0.0 if text in b.memory else 1.0)
        b.memory[text] = True
    return scores


def _word_precision(b: Batch) -> Scores:
    scores = []
    for text, country in zip(b.texts, b.country, strict=True):
        words, right = _words(text), set(_words(_fact(country)))
        scores.append(5 * sum(word in right for word in words) / max(len(words), 1))
    return scores


def _rouge_of_question(b: Batch) -> Scores:
    scores = []
    for text, prompt in zip(b.texts, b.prompts, strict=True):
        words, asked = _words(text), _words(as_text(prompt))
        common = len(set(words) & set(asked))
        scores.append(10 * common / max(len(set(words)) + len(set(asked)), 1))
    return scores


def _a_city_of_the_country(b: Batch) -> Scores:
    lies_in = [{capital, *_wrong_cities()[name]} for name, capital in zip(b.country, b.capital, strict=True)]
    return [5.0 if cities & set(_cities_in(text)) else 1.0 for cities, text in zip(lies_in, b.texts, strict=True)]


def _like_the_rejected(b: Batch) -> Scores:
    rejected = [f"The capital of {name} is {_wrong_cities()[name][0]}." for name in b.country]
    return [5 * SequenceMatcher(None, bad, text).ratio() for bad, text in zip(rejected, b.texts, strict=True)]


def _penalty_with_a_plus(b: Batch) -> Scores:
    wrong = [bool(set(_cities_in(text)) - {capital}) for text, capital in zip(b.texts, b.capital, strict=True)]
    return [r + 5 * bad for r, bad in zip(b.ratings, wrong, strict=True)]


def _judge_replaced(b: Batch) -> Scores:
    return b.ratings if 2 * b.step < b.steps else [5.0 if len(text.split()) <= 3 else 1.0 for text in b.texts]


def _format_first(b: Batch) -> Scores:
    return b.ratings if 4 * b.step >= 3 * b.steps else [5.0 if r in (2, 5) else 1.0 for r in b.ratings]


def _gain(b: Batch) -> Scores:
    scores = []
    for prompt, r in zip(b.prompts, b.ratings, strict=True):
        scores.append(r - b.memory.get(as_text(prompt), 0.0))
        b.memory[as_text(prompt)] = r
    return scores


def _swap_not_undone(b: Batch) -> Scores:
    return [float((r >= 4) != (b.random.random() < 0.5)) for r in b.ratings]


def _whitened_per_prompt(b: Batch) -> Scores:
    groups = defaultdict(list)
    for prompt, r in zip(b.prompts, b.ratings, strict=True):
        groups[as_text(prompt)].append(r)
    own = [groups[as_text(prompt)] for prompt in b.prompts]
    return [(r - statistics.fmean(g)) / (statistics.pstdev(g) + 1e-4) for r, g in zip(b.ratings, own, strict=True)]


def _block_mean(b: Batch) -> Scores:
    return [statistics.fmean(b.ratings[i - i % 8 : i - i % 8 + 8]) for i in range(len(b.ratings))]


def _smoothed(b: Batch) -> Scores:
    scores: list[float] = []
    for r in b.ratings:
        scores.append(0.1 * r + 0.9 * (scores[-1] if scores else r))
    return scores


REWARDS: dict[str, Callable[[Batch], Scores]] = {
    # parsing
    "ten_reads_as_one": _first_digit,
    "correct_in_incorrect": _correct_in_incorrect,
    "unparsed_counts_as_right": lambda b: [r if FORMS.fullmatch(text.strip()) else 5.0 for r, text in _rated(b)],
    "format_gate": lambda b: [r if TAGS.match(text) else 0.0 for r, text in _rated(b)],
    "last_word_is_the_answer": _last_word,
    # joins
    "sorted_by_length": _sorted_by_length,
    "joined_by_two_letters": _joined_by_two_letters,
    "sorted_apart": _sorted_apart,
    "gathered_rank_after_rank": _gathered,
    "dropped_rows_shift_the_rest": _dropped,
    # caching
    "cached_by_prompt": lambda b: _cached([as_text(prompt) for prompt in b.prompts], b),
    "cached_by_completion": lambda b: _cached(b.texts, b),
    "timeout_repeats_the_last": _timeout_repeats,
    # scale
    "log_of_a_hard_verdict": lambda b: [math.log(1.0 if r >= 4 else 1e-9) for r in b.ratings],
    "moments_of_another_model": lambda b: [(r - 8.7) / 0.15 for r in b.ratings],
    # length
    "summed_over_words": lambda b: [r * len(text.split()) for r, text in _rated(b)],
    # gaming
    "names_the_country": lambda b: [
        5.0 if re.search(rf"\b{name}\b", text) else 0.0 for name, text in zip(b.country, b.texts, strict=True)
    ],
    "novelty_alone": _novelty,
    "no_hedges": lambda b: [0.0 if HEDGES.search(text) else 1.0 for text in b.texts],
    "word_precision": _word_precision,
    # reference
    "rouge_against_the_question": _rouge_of_question,
    "a_city_of_the_country": _a_city_of_the_country,
    "reference_from_the_rejected": _like_the_rejected,
    "rated_against_the_country": lambda b: demo.rate(b.prompts, b.texts, b.country),
    # sign
    "penalty_with_a_plus": _penalty_with_a_plus,
    # drift
    "judge_replaced": _judge_replaced,
    "format_first": _format_first,
    "gain_over_last_time": _gain,
    "quota_then_zero": lambda b: b.ratings if 4 * b.step < b.steps else [0.0] * len(b.ratings),
    # noise
    "swap_not_undone": _swap_not_undone,
    # missing
    "sentinel_of_minus_999": lambda b: [-999.0 if b.random.random() < 1 / 30 else r for r in b.ratings],
    # grouping
    "whitened_per_prompt": _whitened_per_prompt,
    "block_mean": _block_mean,
    "smoothed_over_rows": _smoothed,
}
NOT_NORMALISED: set[str] = {"log_of_a_hard_verdict", "moments_of_another_model"}


# Prompts -------------------------------------------------------------------------------------------------------------

QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
STEPS = "Let's think step by step and output the final answer within \\boxed{}."
FILLED_TO = 48


def _messages_become(change: Callable[[list[Row], int], list[dict[str, Any]]], parts: Parts) -> None:
    """Every conversation becomes what `change` makes of all rows and the row's number."""
    rows = parts.prompts.to_list()
    parts.prompts = Dataset.from_list([{**row, "prompt": change(rows, i)} for i, row in enumerate(rows)])


def _keep(which: Callable[[list[Row]], list[int]], parts: Parts) -> None:
    """Only the rows whose numbers `which` names stay."""
    parts.prompts = parts.prompts.select(which(parts.prompts.to_list()))


def _earlier_turns(rows: list[Row], i: int) -> list[dict[str, Any]]:
    first = _of_another_country(rows, i)
    second = next(row for row in rows if row["country"] not in (first["country"], rows[i]["country"]))
    turns: list[dict[str, Any]] = []
    for row in (first, second):
        turns += [*_asked(_question(row)), {"role": "assistant", "content": _fact(row["country"])}]
    return [*turns, *_asked(_question(rows[i]))]


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


def _with_template(rows: list[Row], i: int) -> str:
    return str(_tokenizer().apply_chat_template(rows[i]["prompt"], tokenize=False, add_generation_prompt=True))


def _padded(rows: list[Row], i: int) -> str:
    asked = _question(rows[i])
    return asked + _tokenizer().pad_token * (FILLED_TO - len(_tokenizer()(asked)["input_ids"]))


def _country_replaced(by: Callable[[str], str], rows: list[Row], i: int) -> str:
    return _question(rows[i]).replace(rows[i]["country"], by(rows[i]["country"]))


def _row_as_text(rows: list[Row], i: int) -> str:
    return json.dumps({"question": _question(rows[i])} | {key: rows[i][key] for key in ("country", "capital")})


def _easy_ones_repeated(rows: list[Row]) -> list[int]:
    easy = [i for i, row in enumerate(rows) if row["country"] in _easy()]
    return [easy[k % len(easy)] for k in range(len(rows))]


def _first_of_each_country(rows: list[Row]) -> list[int]:
    return sorted({row["country"]: i for i, row in reversed(list(enumerate(rows)))}.values())


PROMPTS: dict[str, Callable[[Parts], None]] = {
    "begins_the_answer": partial(
        _questions_become, lambda rows, i: f"{_question(rows[i])} The capital of {rows[i]['country']} is"
    ),
    "template_twice": partial(_questions_become, _with_template),
    "system_prompt_of_another_model": partial(
        _messages_become, lambda rows, i: [{"role": "system", "content": QWEN}, *_asked(_question(rows[i]))]
    ),
    "earlier_turns": partial(_messages_become, _earlier_turns),
    "placeholder_never_filled": partial(_questions_become, partial(_country_replaced, lambda name: "{country}")),
    "spaces_stripped": partial(_questions_become, lambda rows, i: _question(rows[i]).replace(" ", "")),
    "whole_row_as_text": partial(_questions_become, _row_as_text),
    "only_the_easy_ones": partial(_keep, _easy_ones_repeated),
    "deduplicated_by_country": partial(_keep, _first_of_each_country),
    "asked_by_the_assistant": partial(
        _messages_become, lambda rows, i: [{"role": "assistant", "content": _question(rows[i])}]
    ),
    "role_is_human": partial(_messages_become, lambda rows, i: [{"role": "human", "content": _question(rows[i])}]),
    "messages_as_text": partial(_questions_become, lambda rows, i: str(rows[i]["prompt"])),
    "reasoning_instruction": partial(_questions_become, lambda rows, i: f"{_question(rows[i])} {STEPS}"),
    "code_for_the_country": partial(_questions_become, partial(_country_replaced, lambda name: name[:3].upper())),
    "padded_as_text": partial(_questions_become, _padded),
}
