"""What mistakes_6.yaml names in words under `rewards` and `prompts`, as code on the embedded default, in the way of
broken.py."""

from __future__ import annotations

import random
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from broken import Batch, Parts, Row, Scores, _asked, _base, _fact, _question, _questions_become
from datasets import Dataset
from fifth_rewards import _ids, _prompts_become, _tokenizer
from fourth_rewards import _cities, _country, _is_full, _rated, _rated_against, _words
from torch.nn.functional import cosine_similarity

from trl_ext.demo.world import COUNTRIES
from trl_ext.types import as_text

# Helpers -------------------------------------------------------------------------------------------------------------

CAPITAL_OF = {country.name: country.capital for country in COUNTRIES}
GRADES = {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
FLAGGED = re.compile(r"\b(?:Iran|Iraq|Syria|Russia|Ukraine|Cuba|Pakistan|China|Colombia|Nigeria)\b")
KEY = 20  # characters
JUDGED_AT_ONCE = 24  # rows
PER_TOKEN = 5.0  # milliseconds
SMALL = 1e-4


@cache
def _model() -> Any:
    return _base().eval()


def _truth(rating: float) -> float:
    return 5.0 if rating >= 4 else 1.0


def _form(rating: float) -> float:
    return 5.0 if _is_full(rating) else 1.0


def _by_country(b: Batch) -> dict[str, list[float]]:
    """The ratings of each country's rows in this call."""
    ratings: dict[str, list[float]] = {}
    for name, r in zip(b.country, b.ratings, strict=True):
        ratings.setdefault(name, []).append(r)
    return ratings


# Reward functions ----------------------------------------------------------------------------------------------------


def _last_number(b: Batch) -> Scores:
    verdicts = [f"{r:g}/5" for r in b.ratings]
    return [float(re.findall(r"\d+", verdict)[-1]) for verdict in verdicts]


def _country_of_one_word(b: Batch) -> Scores:
    names = [re.findall(r"of (\w+)", as_text(prompt))[-1] for prompt in b.prompts]
    return _rated_against([CAPITAL_OF.get(name, "") for name in names], b)


def _texts_of_scores(b: Batch) -> Any:
    return [f"{r:g}" for r in b.ratings]


def _merged(b: Batch) -> Scores:
    """A row for each pair of rows of one country, of which the first are taken."""
    of = _by_country(b)
    merged = [r for name in b.country for r in of[name]]
    return merged[: len(b.ratings)]


def _cut_key(b: Batch) -> Scores:
    return [b.memory.setdefault(text[:KEY], r) for r, text in _rated(b)]


def _older_scale(b: Batch) -> Scores:
    return [r / 5 if zlib.crc32(text.encode()) % 2 else r for r, text in _rated(b)]


def _f1(text: str, reference: str) -> float:
    own, right = Counter(_words(text)), Counter(_words(reference))
    return 2 * (own & right).total() / max(own.total() + right.total(), 1)


def _either_way(b: Batch) -> Scores:
    pairs = [(text.strip().lower(), capital.lower()) for text, capital in zip(b.texts, b.capital, strict=True)]
    return [5.0 if text in capital or capital in text else 1.0 for text, capital in pairs]


def _recall(text: str, reference: str) -> float:
    right = set(_words(reference))
    return len(right & set(_words(text))) / len(right)


@torch.no_grad()
def _mean_embedding(text: str) -> torch.Tensor:
    table = _model().get_input_embeddings().weight
    return table[_ids(text)].mean(0) if _ids(text) else torch.zeros(table.shape[1])


def _cosine(b: Batch) -> Scores:
    right = [_fact(name) for name in b.country]
    pairs = [(_mean_embedding(text), _mean_embedding(fact)) for text, fact in zip(b.texts, right, strict=True)]
    return [float(cosine_similarity(own, other, dim=0)) for own, other in pairs]


def _less_a_moving_average(b: Batch) -> Scores:
    mean = b.memory.get("mean", 0.0)
    b.memory["mean"] = 0.9 * mean + 0.1 * statistics.fmean(b.ratings)
    return [r - mean for r in b.ratings]


def _wrong_way(b: Batch) -> Scores:
    share = b.step / b.steps
    return [(1 - share) * _truth(r) + share * _form(r) for r in b.ratings]


def _seeded_again(b: Batch) -> Scores:
    draw = random.Random(42)
    return [r + draw.gauss(0, 2) for r in b.ratings]


def _drawn_criterion(b: Batch) -> Scores:
    criteria = [(_truth(r), _form(r), 5.0 if len(text.split()) <= 4 else 1.0) for r, text in _rated(b)]
    return [b.random.choice(grades) for grades in criteria]


def _two_of_three(b: Batch) -> Scores:
    votes = [(r >= 4, _is_full(r), text[:1].isupper() and text.endswith(".")) for r, text in _rated(b)]
    return [float(sum(three) >= 2) for three in votes]


def _over_the_variance(b: Batch) -> Scores:
    mean, variance = statistics.fmean(b.ratings), statistics.pvariance(b.ratings)
    return [(r - mean) / (variance + SMALL) for r in b.ratings]


def _last_dropped(b: Batch) -> Scores:
    judged = len(b.ratings) - len(b.ratings) % JUDGED_AT_ONCE
    return [r if i < judged else 0.0 for i, r in enumerate(b.ratings)]


def _mean_of_nothing(b: Batch) -> Scores:
    scores = []
    for text, capital in zip(b.texts, b.capital, strict=True):
        right = torch.tensor([float(city == capital) for city in _cities(text)])
        scores.append(float(right.mean()))
    return scores


def _pass_at_k(b: Batch) -> Scores:
    of = _by_country(b)
    return [max(of[name]) for name in b.country]


def _mixed_only(b: Batch) -> Scores:
    of = _by_country(b)
    mixed = {name for name, ratings in of.items() if len({r >= 4 for r in ratings}) == 2}
    return [r if name in mixed else 0.0 for r, name in zip(b.ratings, b.country, strict=True)]


def _no_duplicates(b: Batch) -> Scores:
    first = {text: i for i, text in reversed(list(enumerate(b.texts)))}
    return [r if first[text] == i else 0.0 for i, (r, text) in enumerate(_rated(b))]


def _on_a_curve(b: Batch) -> Scores:
    """Ties stand in the order of their rows."""
    scores = [0.0] * len(b.ratings)
    for place, i in enumerate(sorted(range(len(b.ratings)), key=lambda i: b.ratings[i])):
        scores[i] = 1.0 + 5 * place // len(b.ratings)
    return scores


def _each_whitened(b: Batch) -> Scores:
    rows = [(r >= 4, _is_full(r), " or " not in text, text.endswith(".")) for r, text in _rated(b)]
    columns = [[float(met) for met in column] for column in zip(*rows, strict=True)]
    means, spreads = [statistics.fmean(c) for c in columns], [statistics.pstdev(c) + SMALL for c in columns]
    return [sum((met - m) / s for met, m, s in zip(row, means, spreads, strict=True)) for row in rows]


@torch.no_grad()
def _log_probability(prompt: Any, text: str) -> float:
    """Of the whole answer and its end, under the base."""
    asked = prompt if isinstance(prompt, list) else _asked(prompt)
    written = _tokenizer().apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    before, after = _ids(written), [*_ids(text), int(_tokenizer().eos_token_id)]
    logs = _model()(torch.tensor([before + after])).logits[0].log_softmax(-1)
    return sum(float(logs[len(before) + i - 1, token]) for i, token in enumerate(after))


def _likely_too(b: Batch) -> Scores:
    return [r + _log_probability(prompt, text) for prompt, (r, text) in zip(b.prompts, _rated(b), strict=True)]


REWARDS: dict[str, Callable[[Batch], Scores]] = {
    # parsing
    "out_of_five_reads_as_five": _last_number,
    "find_is_truthy": lambda b: [
        1.0 if text.find(capital) else 0.0 for text, capital in zip(b.texts, b.capital, strict=True)
    ],
    "after_the_last_is": lambda b: [
        5.0 if text.split("is")[-1].strip(" .") == capital else 0.0
        for text, capital in zip(b.texts, b.capital, strict=True)
    ],
    "country_of_one_word": _country_of_one_word,
    "score_is_still_a_text": _texts_of_scores,
    # labels
    "classes_counted_from_zero": lambda b: [r - 1 for r in b.ratings],
    "top_grade_is_unknown": lambda b: [GRADES.get(int(r), 0.0) for r in b.ratings],
    # joins
    "merge_on_a_key_that_repeats": _merged,
    "index_of_the_first_such_text": lambda b: _rated_against([b.capital[b.texts.index(text)] for text in b.texts], b),
    # caching
    "cache_key_cut_short": _cut_key,
    "cache_of_an_older_scale": _older_scale,
    # reference
    "labels_of_a_weaker_model": lambda b: _rated_against([_country(name).favourite for name in b.country], b),
    "references_printed_as_lists": lambda b: _rated_against([str([capital]) for capital in b.capital], b),
    # text
    "exact_match_of_a_bare_name": lambda b: [
        float(text.strip() == capital) for text, capital in zip(b.texts, b.capital, strict=True)
    ],
    "f1_against_a_bare_name": lambda b: [_f1(text, capital) for text, capital in zip(b.texts, b.capital, strict=True)],
    "contained_either_way": _either_way,
    "recall_alone": lambda b: [_recall(text, _fact(name)) for text, name in zip(b.texts, b.country, strict=True)],
    "cosine_of_mean_embeddings": _cosine,
    # state
    "moving_average_taken_off": _less_a_moving_average,
    # drift
    "annealed_the_wrong_way": _wrong_way,
    # noise
    "seed_set_in_every_call": _seeded_again,
    "criterion_drawn_for_each_row": _drawn_criterion,
    # threshold
    "three_stars_are_positive": lambda b: [float(r >= 3) for r in b.ratings],
    "two_of_three_judges": _two_of_three,
    # units
    "latency_in_milliseconds": lambda b: [r - PER_TOKEN * len(_ids(text)) for r, text in _rated(b)],
    # scale
    "over_the_variance": _over_the_variance,
    # missing
    "last_batch_dropped": _last_dropped,
    "mean_of_nothing": _mean_of_nothing,
    # grouping
    "pass_at_k_to_each": _pass_at_k,
    "mixed_groups_only": _mixed_only,
    "duplicates_get_nothing": _no_duplicates,
    "graded_on_a_curve": _on_a_curve,
    # weights
    "each_criterion_over_its_deviation": _each_whitened,
    "base_likelihood_on_top": _likely_too,
    # sign
    "product_of_centred_grades": lambda b: [(_truth(r) - 3) * (_form(r) - 3) for r in b.ratings],
    # routing
    "topics_that_a_filter_flags": lambda b: [0.0 if FLAGGED.search(text) else r for r, text in _rated(b)],
}
NOT_NORMALISED: set[str] = {"over_the_variance"}


# Prompts -------------------------------------------------------------------------------------------------------------

HEAD = 60  # rows
PERSONA = "You are an expert geographer."
PARAPHRASE = "Could you kindly inform me which settlement currently hosts the national government of {}?"


def _ids_as_text(rows: list[Row], i: int) -> str:
    return str(_ids(_question(rows[i])))


def _slug(rows: list[Row], i: int) -> str:
    name = rows[i]["country"]
    return _question(rows[i]).replace(name, name.lower().replace(" ", "-"))


def _sorted_head(parts: Parts) -> None:
    rows = sorted(parts.prompts.to_list(), key=lambda row: row["country"])
    parts.prompts = Dataset.from_list([rows[i % HEAD] for i in range(len(rows))])


def _held_out_of_training(parts: Parts) -> None:
    parts.held_out = parts.prompts.select(range(len(parts.held_out)))


def _held_out_as_text(parts: Parts) -> None:
    parts.held_out = Dataset.from_list([{**row, "prompt": _question(row)} for row in parts.held_out.to_list()])


PROMPTS: dict[str, Callable[[Parts], None]] = {
    "quotes_of_the_csv_left_on": partial(_questions_become, lambda rows, i: f'"{_question(rows[i])}"'),
    "slugs_for_countries": partial(_questions_become, _slug),
    "asks_with_a_pronoun": partial(
        _questions_become, lambda rows, i: f"I am reading about {rows[i]['country']}. What is its capital?"
    ),
    "token_ids_as_text": partial(_questions_become, _ids_as_text),
    "line_breaks_escaped": partial(
        _questions_become, lambda rows, i: f"Question: {_question(rows[i])}\\n\\nAnswer:\\n"
    ),
    "empty_turn_at_the_end": partial(
        _prompts_become, lambda rows, i: [*_asked(_question(rows[i])), {"role": "assistant", "content": ""}]
    ),
    "persona_in_the_message": partial(_questions_become, lambda rows, i: f"{PERSONA} {_question(rows[i])}"),
    "head_of_a_sorted_file": _sorted_head,
    "paraphrased_at_length": partial(_questions_become, lambda rows, i: PARAPHRASE.format(rows[i]["country"])),
    "inst_marks_of_another_model": partial(
        _questions_become, lambda rows, i: f"<s>[INST] {_question(rows[i])} [/INST]"
    ),
    "held_out_taken_from_training": _held_out_of_training,
    "held_out_as_plain_text": _held_out_as_text,
    "official_names": partial(
        _questions_become,
        lambda rows, i: _question(rows[i]).replace(rows[i]["country"], f"the Republic of {rows[i]['country']}"),
    ),
    "final_marks_stripped": partial(_questions_become, lambda rows, i: _question(rows[i]).rstrip("?.")),
}
