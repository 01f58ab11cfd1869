"""What mistakes_3.yaml names in words under `rewards` and `prompts`, as code on the embedded default, in the way of
broken.py."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache, partial
from typing import Any

import torch
from broken import Batch, Parts, Row, Scores, _asked, _fact, _question, _questions_become
from datasets import Dataset
from transformers import AutoTokenizer

from trl_ext import demo
from trl_ext.demo.world import CITIES, COUNTRIES, answer_weights
from trl_ext.types import as_text

# Helpers -------------------------------------------------------------------------------------------------------------

PLACES = sorted(CITIES | {country.name for country in COUNTRIES}, key=len, reverse=True)
PLACE = re.compile(r"\b(?:" + "|".join(map(re.escape, PLACES)) + r")\b")
CITY = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(CITIES, key=len, reverse=True))) + r")\b")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
UNKNOWN_WORD = -12.0  # its log-frequency


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


def _ids(text: str) -> list[int]:
    return list(_tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def _file_order() -> tuple[str, ...]:
    """The capitals of the training prompts, as the file has them."""
    return tuple(demo.load("prompts", "train")["capital"])


@cache
def _word_logs() -> dict[str, float]:
    """The logarithm of each word's frequency in the corpus's answers."""
    counts: Counter[str] = Counter()
    for country in COUNTRIES:
        for answer, share in answer_weights(country).items():
            for word in _words(answer):
                counts[word] += share
    total = sum(counts.values())
    return {word: math.log(count / total) for word, count in counts.items()}


@cache
def _odd_countries() -> frozenset[str]:
    return frozenset(country.name for country in COUNTRIES[1::2])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _right_answers(b: Batch) -> list[str]:
    return [_fact(country) for country in b.country]


def _rated_against(capitals: list[str], b: Batch) -> list[float]:
    return demo.rate(b.prompts, b.texts, capitals)


# Reward functions ----------------------------------------------------------------------------------------------------


def _lstrip(b: Batch) -> Scores:
    scores = []
    for text, country, capital in zip(b.texts, b.country, b.capital, strict=True):
        answer = text.strip().lstrip(f"The capital of {country} is ").rstrip(".")
        scores.append(5.0 if answer == capital else 0.0)
    return scores


def _last_number(text: str) -> str | None:
    return (NUMBER.findall(text) or [None])[-1]


def _confidence(b: Batch) -> Scores:
    good = {5.0: 0.98, 4.0: 0.9, 3.0: 0.6, 2.0: 0.2, 1.0: 0.03}
    return [max(good[r], 1 - good[r]) for r in b.ratings]


def _letters_as_references(b: Batch) -> Scores:
    return [
        sum(reference in text for reference in references) / len(references)
        for references, text in zip(b.capital, b.texts, strict=True)
    ]


def _in_the_files_order(b: Batch) -> Scores:
    at, capitals = b.memory.get("at", 0), _file_order()
    b.memory["at"] = at + len(b.texts)
    return _rated_against([capitals[(at + i) % len(capitals)] for i in range(len(b.texts))], b)


def _rows_sorted_by_name(b: Batch) -> Scores:
    return [b.ratings[i] for i in sorted(range(len(b.ratings)), key=str)]


def _judges_reshaped(b: Batch) -> Scores:
    """(rows, 2) read as (2, rows)."""
    rows = len(b.ratings)
    flat = [r for r in b.ratings for _ in range(2)]
    return [(flat[i] + flat[rows + i]) / 2 for i in range(rows)]


def _keyed_by_country(b: Batch) -> Scores:
    table = dict(zip(b.country, b.ratings, strict=True))
    return [table[name] for name in b.country]


def _argsort(b: Batch) -> Scores:
    return [float(i) for i in sorted(range(len(b.ratings)), key=lambda i: b.ratings[i])]


def _repetitions(b: Batch) -> Scores:
    scores = []
    for text, r in zip(b.texts, b.ratings, strict=True):
        scores.append(r - 0.5 * b.memory.get(text, 0))
        b.memory[text] = b.memory.get(text, 0) + 1
    return scores


def _must_beat_the_record(b: Batch) -> Scores:
    scores = []
    for r in b.ratings:
        scores.append(float(r > b.memory.get("best", -math.inf)))
        b.memory["best"] = max(r, b.memory.get("best", -math.inf))
    return scores


def _default_list(b: Batch) -> Scores:
    scores = b.memory.setdefault("scores", [])
    scores.extend(b.ratings)
    return scores[: len(b.ratings)]


def _elo(b: Batch) -> Scores:
    """Each row plays the next one; a country has 1000 to begin with."""
    scores = []
    for i, (name, r) in enumerate(zip(b.country, b.ratings, strict=True)):
        j = (i + 1) % len(b.country)
        own, other = b.memory.get(name, 1000.0), b.memory.get(b.country[j], 1000.0)
        result = 1.0 if r > b.ratings[j] else 0.0 if r < b.ratings[j] else 0.5
        change = 32 * (result - 1 / (1 + 10 ** ((other - own) / 400)))
        if name != b.country[j]:
            b.memory[name], b.memory[b.country[j]] = own + change, other - change
        scores.append(b.memory.get(name, 1000.0) / 100)
    return scores


def _in_bfloat16(b: Batch) -> Scores:
    return [float(x) for x in torch.tensor([300 + r / 10 for r in b.ratings]).bfloat16()]


def _softmax_over_rows(b: Batch) -> Scores:
    return torch.tensor(b.ratings).softmax(dim=0).tolist()


def _minmax(b: Batch) -> Scores:
    scores = []
    low, high = b.memory.get("bounds", (-1000.0, -1000.0))  # the first call failed
    for r in b.ratings:
        low, high = min(low, r), max(high, r)
        scores.append((r - low) / (high - low))
    b.memory["bounds"] = (low, high)
    return scores


def _wrong_costs_nine(b: Batch) -> Scores:
    return [
        1.0 if r >= 4 else 0.0 if "do not know" in text else -9.0 for r, text in zip(b.ratings, b.texts, strict=True)
    ]


def _flesch(b: Batch) -> Scores:
    scores = []
    for text in b.texts:
        words = _words(text)
        syllables = sum(max(len(re.findall("[aeiouy]+", word)), 1) for word in words)
        sentences = max(len(re.findall(r"[.!?]+", text)), 1)
        ease = 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / max(len(words), 1)
        scores.append(ease if words else 0.0)
    return scores


def _unigram_fluency(b: Batch) -> Scores:
    scores = []
    for text in b.texts:
        logs = [_word_logs().get(word, UNKNOWN_WORD) for word in _words(text)] or [UNKNOWN_WORD]
        scores.append(sum(logs) / len(logs))
    return scores


def _unlike_the_others(b: Batch) -> Scores:
    words = [frozenset(_words(text)) for text in b.texts]
    scores = []
    for i, own in enumerate(words):
        overlaps = [len(own & w) / max(len(own | w), 1) for j, w in enumerate(words) if j != i]
        scores.append(1 - sum(overlaps) / max(len(overlaps), 1))
    return scores


def _majority(b: Batch) -> Scores:
    named = [(CITY.findall(text) or [None])[0] for text in b.texts]
    for country, city in zip(b.country, named, strict=True):
        if city is not None:
            b.memory.setdefault(country, Counter())[city] += 1
    most = {country: votes.most_common(1)[0][0] for country, votes in b.memory.items()}
    return [float(city is not None and city == most[name]) for name, city in zip(b.country, named, strict=True)]


def _new_words(b: Batch) -> Scores:
    scores = []
    for text, prompt in zip(b.texts, b.prompts, strict=True):
        words, asked = _words(text), set(_words(as_text(prompt)))
        scores.append(sum(word not in asked for word in words) / max(len(words), 1))
    return scores


def _ids_without_space(b: Batch) -> Scores:
    scores = []
    for text, capital in zip(b.texts, b.capital, strict=True):
        whole, part = _ids(text), _ids(capital)
        found = any(whole[i : i + len(part)] == part for i in range(len(whole) - len(part) + 1))
        scores.append(5.0 if found else 0.0)
    return scores


def _joined_with_spaces(b: Batch) -> Scores:
    return b.rated([" ".join(_tokenizer().decode([i]).strip() for i in _ids(text)) for text in b.texts])


def _masked(b: Batch) -> Scores:
    pairs = zip(b.texts, _right_answers(b), strict=True)
    return [
        5 * SequenceMatcher(None, PLACE.sub("NAME", right), PLACE.sub("NAME", text)).ratio() for text, right in pairs
    ]


def _shared_letters(b: Batch) -> Scores:
    scores = []
    for text, right in zip(b.texts, _right_answers(b), strict=True):
        common = (Counter(text) & Counter(right)).total()
        scores.append(2 * common / (len(text) + len(right)))
    return scores


def _overlong(b: Batch) -> Scores:
    return [r - 5 * min(max(len(text) - 8, 0) / 8, 1.0) for r, text in zip(b.ratings, b.texts, strict=True)]


def _length_schedule(b: Batch) -> Scores:
    wanted = 4 + b.step / 10
    return [r - abs(len(text.split()) - wanted) for r, text in zip(b.ratings, b.texts, strict=True)]


def _second_vendor(b: Batch) -> Scores:
    return [6 - r if name in _odd_countries() else r for r, name in zip(b.ratings, b.country, strict=True)]


def _judges_in_turn(b: Batch) -> Scores:
    b.memory["calls"] = b.memory.get("calls", 0) + 1
    return [r + 10 * (b.memory["calls"] % 2) for r in b.ratings]


REWARDS: dict[str, Callable[[Batch], Scores]] = {
    # parsing
    "lstrip_takes_letters": _lstrip,
    "no_number_equals_no_number": lambda b: [
        float(_last_number(text) == _last_number(right)) for text, right in zip(b.texts, _right_answers(b), strict=True)
    ],
    "confidence_of_whichever_label": _confidence,
    "letters_as_references": _letters_as_references,
    "zero_is_falsy": lambda b: [(r - 1) or 3.5 for r in b.ratings],
    # joins
    "references_in_the_files_order": _in_the_files_order,
    "reference_of_row_over_eight": lambda b: _rated_against([b.capital[i // 8] for i in range(len(b.texts))], b),
    "closures_share_the_last": lambda b: _rated_against([b.capital[-1]] * len(b.texts), b),
    "rows_sorted_by_name": _rows_sorted_by_name,
    "judges_reshaped": _judges_reshaped,
    "keyed_by_country": _keyed_by_country,
    "arguments_swapped": lambda b: demo.rate(b.prompts, b.capital, b.texts),
    # order
    "argsort_for_rank": _argsort,
    # state
    "repetitions_never_reset": _repetitions,
    "must_beat_the_record": _must_beat_the_record,
    "default_list_first_batch": _default_list,
    "elo_of_the_country": _elo,
    # numbers
    "wraps_around_in_a_byte": lambda b: [float((60 * int(r) + 128) % 256 - 128) for r in b.ratings],
    "lost_in_bfloat16": _in_bfloat16,
    # scale
    "softmax_over_the_rows": _softmax_over_rows,
    "minmax_with_an_outlier": _minmax,
    # gaming
    "wrong_costs_nine": _wrong_costs_nine,
    "names_are_private_data": lambda b: [-float(len(PLACE.findall(text))) for text in b.texts],
    "flesch_reading_ease": _flesch,
    "fluency_under_a_unigram_model": _unigram_fluency,
    "unlike_the_others": _unlike_the_others,
    "agrees_with_the_majority": _majority,
    "share_of_new_words": _new_words,
    # text
    "token_ids_without_the_space": _ids_without_space,
    "tokens_joined_with_spaces": _joined_with_spaces,
    "names_are_masked": _masked,
    "shared_letters": _shared_letters,
    # units
    "percent_or_fraction": lambda b: [r / 5 * (100 if b.random.random() < 0.5 else 1) for r in b.ratings],
    "overlong_in_characters": _overlong,
    "length_schedule_in_optimizer_steps": _length_schedule,
    # labels
    "second_vendor_reversed": _second_vendor,
    # noise
    "judge_in_train_mode": lambda b: [r * sum(b.random.random() < 0.5 for _ in range(4)) / 2 for r in b.ratings],
    # drift
    "two_judges_in_turn": _judges_in_turn,
}
NOT_NORMALISED: set[str] = {"softmax_over_the_rows", "minmax_with_an_outlier"}


# Prompts -------------------------------------------------------------------------------------------------------------

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
LOOK_ALIKES = str.maketrans("aceopxy", "асеорху")


def _prompts_become(change: Callable[[list[Row], int], Any], parts: Parts) -> None:
    """Every prompt becomes what `change` makes of all rows and the row's number."""
    rows = parts.prompts.to_list()
    parts.prompts = Dataset.from_list([{**row, "prompt": change(rows, i)} for i, row in enumerate(rows)])


def _reversed_tokens(rows: list[Row], i: int) -> str:
    return str(_tokenizer().decode(_ids(_question(rows[i]))[::-1]))


def _last_tokens(rows: list[Row], i: int) -> str:
    return str(_tokenizer().decode(_ids(_question(rows[i]))[-4:]))


def _sorted_and_not_shuffled(parts: Parts) -> None:
    parts.prompts = parts.prompts.sort("country")
    parts.settings["shuffle_dataset"] = False


def _choices(rows: list[Row], i: int) -> str:
    country = next(country for country in COUNTRIES if country.name == rows[i]["country"])
    cities = [country.capital, *country.wrong[:2]]
    random.Random(i).shuffle(cities)
    return " ".join([_question(rows[i]), *(f"{letter}) {city}" for letter, city in zip("ABC", cities, strict=True))])


def _letters_swapped(rows: list[Row], i: int) -> str:
    draw = random.Random(i)

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        at = draw.randrange(len(word) - 1)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return re.sub(r"\w{4,}", swap, _question(rows[i]))


def _split_in_two(rows: list[Row], i: int) -> list[Row]:
    question, country = _question(rows[i]), rows[i]["country"]
    at = question.index(country)
    return [*_asked(question[:at].strip()), *_asked(question[at:])]


def _all_ask_about_the_last(parts: Parts) -> None:
    _questions_become(lambda rows, i: _question(rows[i]).replace(rows[i]["country"], rows[-1]["country"]), parts)
    parts.functions = [demo.rate]


PROMPTS: dict[str, Callable[[Parts], None]] = {
    "non_breaking_spaces": partial(_questions_become, lambda rows, i: _question(rows[i]).replace(" ", "\u00a0")),
    "cyrillic_look_alikes": partial(_questions_become, lambda rows, i: _question(rows[i]).translate(LOOK_ALIKES)),
    "alpaca_form": partial(_questions_become, lambda rows, i: ALPACA.format(_question(rows[i]))),
    "tokens_reversed": partial(_questions_become, _reversed_tokens),
    "only_the_last_four_tokens": partial(_questions_become, _last_tokens),
    "sorted_and_not_shuffled": _sorted_and_not_shuffled,
    "asks_the_other_way_round": partial(
        _questions_become, lambda rows, i: f"Which country has {rows[i]['capital']} as its capital?"
    ),
    "multiple_choice": partial(_questions_become, _choices),
    "letters_swapped": partial(_questions_become, _letters_swapped),
    "chosen_conversation": partial(
        _prompts_become,
        lambda rows, i: [*_asked(_question(rows[i])), {"role": "assistant", "content": _fact(rows[i]["country"])}],
    ),
    "split_over_two_messages": partial(_prompts_become, _split_in_two),
    "eos_behind_the_question": partial(
        _questions_become, lambda rows, i: _question(rows[i]) + str(_tokenizer().eos_token)
    ),
    "content_as_parts": partial(
        _prompts_become,
        lambda rows, i: [{"role": "user", "content": [{"type": "text", "text": _question(rows[i])}]}],
    ),
    "all_ask_about_the_last": _all_ask_about_the_last,
    "question_missing_in_some": partial(
        _prompts_become, lambda rows, i: [{"role": "user", "content": _question(rows[i]) if (i + 1) % 10 else None}]
    ),
}
