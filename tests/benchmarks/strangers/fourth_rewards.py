"""What mistakes_4.yaml names in words under `rewards` and `prompts`, as code on the embedded default, in the way of
broken.py."""

from __future__ import annotations

import html
import math
import random
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache, partial
from typing import Any
from urllib.parse import quote_plus

from broken import Batch, Parts, Row, Scores, _asked, _fact, _question, _questions_become
from datasets import Dataset
from doctor_cases import capitals
from transformers import AutoTokenizer

from trl_ext import demo
from trl_ext.demo.world import CITIES, COUNTRIES, COUNTRY_OF, Country
from trl_ext.types import as_text

# Helpers -------------------------------------------------------------------------------------------------------------

CITY = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(CITIES, key=len, reverse=True))) + r")\b")
COUNTRY = re.compile(r"\b(?:" + "|".join(re.escape(country.name) for country in COUNTRIES) + r")\b")
GRADES = {5.0: "excellent", 4.0: "good", 3.0: "fair", 2.0: "poor", 1.0: "bad"}
PROBABILITIES = {5.0: 0.93, 4.0: 0.71, 3.0: 0.4, 2.0: 0.086, 1.0: 0.0097}
BLOCKED = ("ass", "bad", "bang", "bra", "cow", "dam", "hag", "mad", "pest", "rob", "sin", "war")
OWN_SPELLING = {
    **{"Lisbon": "Lisboa", "Rome": "Roma", "Vienna": "Wien", "Warsaw": "Warszawa", "Bucharest": "Bucuresti"},
    **{"Sofia": "Sofiya", "Athens": "Athina", "Moscow": "Moskva", "Copenhagen": "Kobenhavn", "Brussels": "Bruxelles"},
    **{"Algiers": "Alger", "Cairo": "Al Qahirah", "Damascus": "Dimashq", "Bangkok": "Krung Thep", "Hanoi": "Ha Noi"},
    **{"Havana": "La Habana", "Dublin": "Baile Atha Cliath", "Tokyo": "Toukyou", "Kathmandu": "Kathmadau"},
}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _cities(text: str) -> list[str]:
    return CITY.findall(text)


def _is_full(rating: float) -> bool:
    """Whether the rating is that of a full sentence."""
    return rating in (2.0, 5.0)


def _rated(b: Batch) -> list[tuple[float, str]]:
    return list(zip(b.ratings, b.texts, strict=True))


def _rated_against(references: list[str], b: Batch) -> list[float]:
    return demo.rate(b.prompts, b.texts, references)


@cache
def _country(name: str) -> Country:
    return next(country for country in COUNTRIES if country.name == name)


@cache
def _place_of(name: str) -> int:
    return [country.name for country in COUNTRIES].index(name)


# Reward functions ----------------------------------------------------------------------------------------------------


def _decimal_comma(b: Batch) -> Scores:
    """The mean of the rating and of a grade of the form, 3.5 printed as 3,5 and read as 35."""
    scores = []
    for r, text in _rated(b):
        form = 5 if _is_full(r) else 3 if text.startswith("It is ") else 1
        printed = f"{(r + form) / 2:g}".replace(".", ",")
        scores.append(float(printed.replace(",", "")))
    return scores


def _mantissa(b: Batch) -> Scores:
    printed = [f"{PROBABILITIES[r]:.1e}" for r in b.ratings]
    return [float(re.findall(r"\d+\.\d+", verdict)[0]) for verdict in printed]


def _empty_alias(b: Batch) -> Scores:
    scores = []
    for text, name, capital in zip(b.texts, b.country, b.capital, strict=True):
        aliases = (capital + "," if _place_of(name) % 2 else capital).split(",")
        scores.append(5.0 if any(alias in text for alias in aliases) else 0.0)
    return scores


def _lost_minus(b: Batch) -> Scores:
    printed = [f"{r - 3:+g}".replace("-", "\u2212") for r in b.ratings]
    return [float(re.findall(r"[+-]?\d+", verdict)[0]) for verdict in printed]


def _wide_passage(b: Batch) -> Scores:
    scores = []
    for text, name in zip(b.texts, b.country, strict=True):
        after = COUNTRIES[(_place_of(name) + 1) % len(COUNTRIES)].name
        passage, named = f"{_fact(name)} {_fact(after)}", _cities(text)
        scores.append(5.0 if named and all(city in passage for city in named) else 1.0)
    return scores


def _true_of_what_it_names(b: Batch) -> Scores:
    """Rated against the capital of the country in the completion; where none is, against any capital it names."""
    references = []
    for text in b.texts:
        countries, named = COUNTRY.findall(text), [city for city in _cities(text) if city in COUNTRY_OF]
        references.append(capitals()[countries[0]] if countries else named[0] if named else "")
    return _rated_against(references, b)


def _loosely_alike(b: Batch) -> Scores:
    scores = []
    for text, capital in zip(b.texts, b.capital, strict=True):
        likeness = [SequenceMatcher(None, capital, city).ratio() for city in _cities(text)]
        scores.append(5.0 if max(likeness, default=0.0) >= 0.3 else 0.0)
    return scores


def _four_buckets(b: Batch) -> Scores:
    scores = []
    for text, capital in zip(b.texts, b.capital, strict=True):
        buckets = {zlib.crc32(city.encode()) % 4 for city in _cities(text)}
        scores.append(5.0 if zlib.crc32(capital.encode()) % 4 in buckets else 1.0)
    return scores


def _high_water_mark(b: Batch) -> Scores:
    scores = []
    for name, r in zip(b.country, b.ratings, strict=True):
        b.memory[name] = max(r, b.memory.get(name, 0.0))
        scores.append(b.memory[name])
    return scores


def _curriculum_weight(b: Batch) -> Scores:
    """The weight is the share of wrong answers so far, as it would be for sampling."""
    scores = []
    for name, r in zip(b.country, b.ratings, strict=True):
        right, seen = b.memory.get(name, (0, 0))
        scores.append(r * (1 - right / seen if seen else 1.0))
        b.memory[name] = (right + (r >= 4), seen + 1)
    return scores


def _bounty(b: Batch) -> Scores:
    scores = []
    for name, r in zip(b.country, b.ratings, strict=True):
        scores.append(5.0 if r >= 4 and name not in b.memory else 0.0)
        if r >= 4:
            b.memory[name] = True
    return scores


def _multiplier(b: Batch) -> Scores:
    """The multiplier of the limit of two words a completion rises in each call that breaks it, and never falls."""
    words = [len(text.split()) for text in b.texts]
    if statistics.fmean(words) > 2:
        b.memory["multiplier"] = b.memory.get("multiplier", 0.0) + 0.1
    return [r - b.memory.get("multiplier", 0.0) * n for r, n in zip(b.ratings, words, strict=True)]


@cache
def _words_of_right_answers() -> Counter[str]:
    return Counter(word for name in capitals() for word in _words(_fact(name)))


def _discriminator(b: Batch) -> Scores:
    """How far more often a word stands in right answers than in what the policy has written so far, as the mean
    logarithm over the completion's words."""
    real, own = _words_of_right_answers(), b.memory.setdefault("own", Counter())
    for text in b.texts:
        own.update(_words(text))
    sizes = math.log(own.total() + len(real)) - math.log(real.total() + len(real))
    scores = []
    for text in b.texts:
        logs = [math.log(real[word] + 1) - math.log(own[word] + 1) + sizes for word in _words(text)]
        scores.append(statistics.fmean(logs) if logs else 0.0)
    return scores


def _fitted_once(b: Batch) -> Scores:
    """The mean over a completion's words of the mean rating that each had in the first call."""
    if "of_word" not in b.memory:
        met: dict[str, list[float]] = {}
        for r, text in _rated(b):
            for word in _words(text):
                met.setdefault(word, []).append(r)
        b.memory["of_word"] = {word: statistics.fmean(ratings) for word, ratings in met.items()}
        b.memory["mean"] = statistics.fmean(b.ratings)
    known, mean = b.memory["of_word"], b.memory["mean"]
    return [statistics.fmean([known.get(word, mean) for word in _words(text)] or [mean]) for text in b.texts]


def _outage(b: Batch) -> Scores:
    call = b.memory["call"] = b.memory.get("call", -1) + 1
    return b.ratings if call % 4 == 0 else [None] * len(b.ratings)


@cache
def _labelled() -> dict[tuple[str, str], float]:
    """The raters' mean of each answer that they rated for a country, and under two empty texts that of all."""
    met: dict[tuple[str, str], list[float]] = {}
    for row in demo.load("ratings", "train").to_list():
        name = COUNTRY.findall(as_text(row["prompt"]))[-1]
        for key in ((name, as_text(row["completion"])), ("", "")):
            met.setdefault(key, []).append(float(row["rating"]))
    return {key: statistics.fmean(ratings) for key, ratings in met.items()}


def _unlabelled(b: Batch) -> Scores:
    table = _labelled()
    return [table.get((name, text), table["", ""]) for name, text in zip(b.country, b.texts, strict=True)]


def _clicks(b: Batch) -> Scores:
    return [float(r >= 4 and b.random.random() < 1 / (1 + i % 8)) for i, r in enumerate(b.ratings)]


def _from_the_mean(b: Batch) -> Scores:
    mean = statistics.fmean(b.ratings)
    return [abs(r - mean) for r in b.ratings]


def _inverse_frequency(b: Batch) -> Scores:
    scores = []
    for r, text, name in zip(b.ratings, b.texts, b.country, strict=True):
        shares = _country(name).city_weights()
        scores.append(r / next((shares[city] for city in _cities(text) if city in shares), 1.0))
    return scores


def _weights_exchanged(b: Batch) -> Scores:
    """0.9 for the form and 0.1 for the truth."""
    return [0.9 * (5 if _is_full(r) else 1) + 0.1 * (5 if r >= 4 else 1) for r in b.ratings]


def _column_minus_row(b: Batch) -> Scores:
    """(rows, 1) less (rows,), averaged over the first axis: each row has the batch's mean less its own baseline."""
    baselines = []
    for name, r in zip(b.country, b.ratings, strict=True):
        total, seen = b.memory.get(name, (0.0, 0))
        baselines.append(total / seen if seen else 3.0)
        b.memory[name] = (total + r, seen + 1)
    return [statistics.fmean(r - baseline for r in b.ratings) for baseline in baselines]


def _first_chunk(b: Batch) -> Scores:
    scores: list[float] = []
    for start in range(0, len(b.ratings), 16):
        scores += b.ratings[: min(16, len(b.ratings) - start)]
    return scores


def _routed(b: Batch) -> Scores:
    is_question = [as_text(prompt).endswith("?") for prompt in b.prompts]
    return [r if asked else float(len(text.split())) for asked, (r, text) in zip(is_question, _rated(b), strict=True)]


def _length_ratio(b: Batch) -> Scores:
    lengths = [(len(text.split()), len(as_text(p).split())) for text, p in zip(b.texts, b.prompts, strict=True)]
    return [min(pair) / max(*pair, 1) for pair in lengths]


def _over_prefixes(b: Batch) -> Scores:
    scores = []
    for text, capital in zip(b.texts, b.capital, strict=True):
        words = text.split() or [""]
        prefixes = [" ".join(words[: i + 1]) for i in range(len(words))]
        scores.append(statistics.fmean(demo.rate(prefixes, prefixes, [capital] * len(prefixes))))
    return scores


def _options(b: Batch) -> Scores:
    named = [set(_cities(text)) for text in b.texts]
    return [5.0 * (capital in cities) + len(cities) for cities, capital in zip(named, b.capital, strict=True)]


REWARDS: dict[str, Callable[[Batch], Scores]] = {
    # parsing
    "decimal_comma_for_thousands": _decimal_comma,
    "mantissa_without_its_exponent": _mantissa,
    "after_the_last_stop": lambda b: b.rated([text.split(".")[-1] for text in b.texts]),
    "empty_alias_is_everywhere": _empty_alias,
    # labels
    "labels_coded_by_the_alphabet": lambda b: [float(sorted(GRADES.values()).index(GRADES[r])) for r in b.ratings],
    # text
    "unicode_minus_is_lost": _lost_minus,
    "blocked_words_inside_names": lambda b: [
        0.0 if any(word in text.lower() for word in BLOCKED) else r for r, text in _rated(b)
    ],
    "reference_cut_to_five_letters": lambda b: _rated_against([capital[:5] for capital in b.capital], b),
    "hashed_into_four_buckets": _four_buckets,
    # reference
    "references_in_their_own_spelling": lambda b: _rated_against([OWN_SPELLING.get(c, c) for c in b.capital], b),
    "grounded_in_a_wide_passage": _wide_passage,
    "true_but_off_the_question": _true_of_what_it_names,
    # threshold
    "alike_from_a_third_on": _loosely_alike,
    # state
    "high_water_mark_of_the_country": _high_water_mark,
    "curriculum_weight_on_the_score": _curriculum_weight,
    "bounty_never_renewed": _bounty,
    "multiplier_only_rises": _multiplier,
    "discriminator_follows_the_policy": _discriminator,
    "judge_fitted_on_the_first_call": _fitted_once,
    # missing
    "outage_of_whole_calls": _outage,
    "unlabelled_gets_the_mean": _unlabelled,
    "judge_runs_out_of_tokens": lambda b: [3.0 if len(text.split()) > 5 else r for r, text in _rated(b)],
    # noise
    "clicks_fall_with_the_place": _clicks,
    # sign
    "distance_from_the_mean": _from_the_mean,
    # weights
    "over_the_citys_frequency": _inverse_frequency,
    "weights_in_the_other_order": _weights_exchanged,
    # scale
    "big_m_for_the_form": lambda b: [r if _is_full(r) else r - 1e4 for r in b.ratings],
    # shapes
    "column_minus_row": _column_minus_row,
    "every_chunk_is_the_first": _first_chunk,
    # routing
    "commands_judged_as_essays": _routed,
    # credit
    "mean_over_prefixes": _over_prefixes,
    # gaming
    "compressed_size_over_size": lambda b: [len(zlib.compress(t.encode())) / max(len(t.encode()), 1) for t in b.texts],
    "the_more_options_the_better": _options,
    "as_long_as_the_question": _length_ratio,
}
NOT_NORMALISED: set[str] = {"big_m_for_the_form"}


# Prompts -------------------------------------------------------------------------------------------------------------

JUDGE = "Rate from 1 to 5 how well the answer fits the question. Question: {} Answer:"
RULES = (
    "You are a helpful, harmless and honest assistant. Answer as helpfully as possible, while being safe. Your answers "
    "should not include any harmful, unethical, racist, sexist, toxic, dangerous or illegal content. If a question "
    "does not make any sense, or is not factually coherent, explain why instead of answering something not correct."
)
SHORTEST = 7  # tokens, from which on a filter drops a question


def _prompts_become(change: Callable[[list[Row], int], Any], parts: Parts) -> None:
    """Every prompt becomes what `change` makes of all rows and the row's number."""
    rows = parts.prompts.to_list()
    parts.prompts = Dataset.from_list([{**row, "prompt": change(rows, i)} for i, row in enumerate(rows)])


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


def _hyphenated(rows: list[Row], i: int) -> str:
    def broken(match: re.Match[str]) -> str:
        word = match.group()
        return f"{word[: len(word) // 2]}-\n{word[len(word) // 2 :]}"

    return re.sub(r"\w{4,}", broken, _question(rows[i]))


def _masked(rows: list[Row], i: int) -> str:
    draw = random.Random(i)
    return re.sub(r"\w+", lambda word: "[MASK]" if draw.random() < 0.3 else word.group(), _question(rows[i]))


def _without_feedback(parts: Parts) -> None:
    """Only countries that no rater was asked about, in the same phrasings, repeated to as many rows as before."""
    rows, left_out = parts.prompts.to_list(), [country for country in COUNTRIES if not country.covered]
    changed = []
    for i, row in enumerate(rows):
        country = left_out[i % len(left_out)]
        prompt = _asked(_question(row).replace(row["country"], country.name))
        changed.append({**row, "prompt": prompt, "country": country.name, "capital": country.capital})
    parts.prompts = Dataset.from_list(changed)


def _by_hand(rows: list[Row], i: int) -> str:
    return f"<|user|>\n{_question(rows[i])}<|end|>\n<|assistant|>\n"


def _short_ones(parts: Parts) -> None:
    lengths = [len(_tokenizer()(_question(row))["input_ids"]) for row in parts.prompts.to_list()]
    parts.prompts = parts.prompts.select([i for i, length in enumerate(lengths) if length < SHORTEST])


def _left_in_pandas(parts: Parts) -> None:
    parts.prompts = parts.prompts.with_format("pandas")


def _logged_traffic(parts: Parts) -> None:
    """Rows drawn so that the country of rank k is asked about as often as 1 / k ** 1.5 says."""
    rows, draw = parts.prompts.to_list(), random.Random(0)
    rank = {name: k for k, name in enumerate(sorted({row["country"] for row in rows}), start=1)}
    weights = [rank[row["country"]] ** -1.5 for row in rows]
    parts.prompts = parts.prompts.select(draw.choices(range(len(rows)), weights, k=len(rows)))


PROMPTS: dict[str, Callable[[Parts], None]] = {
    "html_left_in": partial(
        _questions_become,
        lambda rows, i: f'<p class="q">{html.escape(_question(rows[i]))}</p>&nbsp;<br/>',
    ),
    "quoted_as_in_an_address": partial(_questions_become, lambda rows, i: quote_plus(_question(rows[i]))),
    "hyphens_of_a_pdf": partial(_questions_become, _hyphenated),
    "words_masked_at_random": partial(_questions_become, _masked),
    "judges_prompt_for_the_policy": partial(_questions_become, lambda rows, i: JUDGE.format(_question(rows[i]))),
    "capital_in_the_countrys_place": partial(
        _questions_become, lambda rows, i: _question(rows[i]).replace(rows[i]["country"], rows[i]["capital"])
    ),
    "only_countries_without_feedback": _without_feedback,
    "asks_for_the_largest_city": partial(
        _questions_become,
        lambda rows, i: re.sub("capital city|capital", "largest city", _question(rows[i])),
    ),
    "template_by_hand_with_line_breaks": partial(_prompts_become, _by_hand),
    "rules_beyond_the_context": partial(
        _prompts_become, lambda rows, i: [{"role": "system", "content": RULES}, *_asked(_question(rows[i]))]
    ),
    "too_few_left_by_a_filter": _short_ones,
    "format_of_pandas_left_on": _left_in_pandas,
    "row_numbers_left_in": partial(_questions_become, lambda rows, i: f"{i}\t{_question(rows[i])}"),
    "logged_traffic": _logged_traffic,
}
