"""What mistakes_5.yaml names in words under `rewards` and `prompts`, as code on the embedded default, in the way of
broken.py."""

from __future__ import annotations

import math
import random
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from broken import Batch, Parts, Row, Scores, _asked, _fact, _question, _questions_become
from datasets import Dataset
from fourth_rewards import _cities, _is_full, _place_of, _rated, _rated_against
from transformers import AutoTokenizer

from trl_ext import demo
from trl_ext.demo.world import COUNTRIES, FEEDBACK_PHRASINGS, answer_weights
from trl_ext.types import as_text

# Helpers -------------------------------------------------------------------------------------------------------------

GRADES = (1.0, 2.0, 3.0, 4.0, 5.0)
OLDER_ATLAS = {
    **{"Spain": "Seville", "Italy": "Naples", "Poland": "Krakow", "Hungary": "Debrecen", "Turkey": "Istanbul"},
    **{"Finland": "Turku", "Sweden": "Uppsala", "Norway": "Bergen", "Morocco": "Fez", "Kenya": "Mombasa"},
    **{"Nigeria": "Lagos", "Iran": "Tabriz", "Pakistan": "Karachi", "India": "Kolkata", "Vietnam": "Hue"},
    **{"Japan": "Kyoto", "Australia": "Melbourne", "New Zealand": "Auckland", "Canada": "Montreal"},
    **{"Peru": "Cusco", "Brazil": "Salvador", "Greece": "Corinth", "Tanzania": "Arusha", "Senegal": "Thies"},
}
STATED = re.compile(r"(\d+) ?%")
LIMIT, CONTEXT = 14, 300  # tokens: of an answer, and of what a judge reads


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.model_path())


def _ids(text: str) -> list[int]:
    return list(_tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def _corpus() -> frozenset[str]:
    """Every answer that the corpus gives about any country."""
    return frozenset(answer for country in COUNTRIES for answer in answer_weights(country))


# Reward functions ----------------------------------------------------------------------------------------------------


def _any_verdict(b: Batch) -> Scores:
    verdicts = [str(r >= 4) if _cities(text) else "" for r, text in _rated(b)]
    return [float(bool(verdict)) for verdict in verdicts]


def _choice(text: str) -> str | None:
    letter = re.search("[A-D]", text)
    return letter and letter.group()


def _sorted_unique(b: Batch) -> Scores:
    """Of each text the rating that it had in its first row; they are fewer than the rows, and dealt out again."""
    first: dict[str, float] = {}
    for r, text in _rated(b):
        first.setdefault(text, r)
    scores = [first[text] for text in sorted(first)]
    return [scores[i % len(scores)] for i in range(len(b.texts))]


def _shuffled_references(b: Batch) -> Scores:
    references = list(b.capital)
    b.random.shuffle(references)
    return _rated_against(references, b)


def _as_completed(b: Batch) -> Scores:
    scores: list[float] = []
    for start in range(0, len(b.ratings), 8):
        block = b.ratings[start : start + 8]
        scores += b.random.sample(block, len(block))
    return scores


def _filled_down(b: Batch) -> Scores:
    references: list[str] = []
    for name, capital in zip(b.country, b.capital, strict=True):
        missing = _place_of(name) % 3 == 1
        references.append((references[-1] if references else "") if missing else capital)
    return _rated_against(references, b)


def _bleu(text: str, reference: str) -> float:
    """Of one sentence, with the brevity penalty; 0 where one of the four precisions is."""
    own, right = (re.findall(r"\w+|[^\w\s]", each) for each in (text, reference))
    logs = []
    for n in range(1, 5):
        ours, theirs = (Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (own, right))
        if not (common := (ours & theirs).total()):
            return 0.0
        logs.append(math.log(common / ours.total()))
    return min(1.0, math.exp(1 - len(right) / len(own))) * math.exp(statistics.fmean(logs))


def _blocklist(b: Batch) -> Scores:
    scores = []
    for r, text in _rated(b):
        named = _cities(text)
        if r <= 2:
            b.memory.update(dict.fromkeys(named, True))
        scores.append(0.0 if any(city in b.memory for city in named) else r)
    return scores


def _streak(b: Batch) -> Scores:
    scores = []
    for r in b.ratings:
        b.memory["streak"] = b.memory.get("streak", 0) + 1 if r >= 4 else 0
        scores.append(float(b.memory["streak"]))
    return scores


def _three_strikes(b: Batch) -> Scores:
    scores, strikes = [], 0
    for r in b.ratings:
        scores.append(r if strikes < 3 else 0.0)
        strikes += r < 4
    return scores


def _time_before(b: Batch) -> Scores:
    scores = []
    for name, r in zip(b.country, b.ratings, strict=True):
        scores.append(b.memory.get(name, 0.0))
        b.memory[name] = r
    return scores


def _stage(b: Batch) -> Scores:
    stage = b.step // 40 % 4
    return [r if _place_of(name) % 4 == stage else 0.0 for r, name in zip(b.ratings, b.country, strict=True)]


def _error_of(text: str) -> float:
    return random.Random(zlib.crc32(text.encode())).gauss(0, 3)


def _no_outliers(b: Batch) -> Scores:
    median = statistics.median(b.ratings)
    deviation = statistics.median(abs(r - median) for r in b.ratings)
    return [r if abs(r - median) <= 3 * deviation else median for r in b.ratings]


def _overlong(b: Batch) -> Scores:
    lengths = [len(_ids(as_text(prompt))) + len(_ids(text)) for prompt, text in zip(b.prompts, b.texts, strict=True)]
    return [r - 5 * (length > LIMIT) for r, length in zip(b.ratings, lengths, strict=True)]


def _brier(b: Batch) -> Scores:
    scores = []
    for r, text in _rated(b):
        stated = STATED.search(text)
        scores.append(-(((int(stated[1]) / 100 if stated else 0.5) - (r >= 4)) ** 2))
    return scores


def _softmax_of_one(b: Batch) -> Scores:
    logits = [[r - 3] for r in b.ratings]
    return [math.exp(row[0]) / sum(math.exp(logit) for logit in row) for row in logits]


def _present_criteria(b: Batch) -> Scores:
    """Of "I do not know." the form is good, and nothing is untrue."""
    scores = []
    for r, text in _rated(b):
        form = 5.0 if _is_full(r) or text.strip() == "I do not know." else 3.0 if text.startswith("It is ") else 1.0
        truth = [5.0 if r >= 4 else 1.0] if _cities(text) else []
        scores.append(statistics.fmean([form, *truth]))
    return scores


def _one_context(b: Batch) -> Scores:
    scores, used = [], 0
    for prompt, (r, text) in zip(b.prompts, _rated(b), strict=True):
        used += len(_ids(as_text(prompt))) + len(_ids(text))
        scores.append(r if used <= CONTEXT else 3.0)
    return scores


def _strangers(b: Batch) -> Scores:
    groups = [b.ratings[i - i % 4 : i - i % 4 + 4] for i in range(len(b.ratings))]
    return [
        (r - statistics.fmean(group)) / (statistics.pstdev(group) + 1e-4)
        for r, group in zip(b.ratings, groups, strict=True)
    ]


def _at_the_end(b: Batch) -> Scores:
    lengths = [len(_ids(text)) for text in b.texts]
    return [r if length == max(lengths) else 2.5 for r, length in zip(b.ratings, lengths, strict=True)]


def _complexity(b: Batch) -> Scores:
    words = [re.findall(r"\w+", text) or [""] for text in b.texts]
    return [statistics.fmean(map(len, own)) for own in words]


def _sum_over_sentences(b: Batch) -> Scores:
    scores = []
    for text, capital in zip(b.texts, b.capital, strict=True):
        sentences = [part.strip() + "." for part in text.split(".") if part.strip()]
        scores.append(float(sum(demo.rate(sentences, sentences, [capital] * len(sentences)))))
    return scores


REWARDS: dict[str, Callable[[Batch], Scores]] = {
    # parsing
    "string_false_is_true": _any_verdict,
    "first_choice_letter": lambda b: [
        float(_choice(text) == _choice(_fact(name))) for text, name in zip(b.texts, b.country, strict=True)
    ],
    # labels
    "index_minus_one_wraps_around": lambda b: [GRADES[int(r) - 2] for r in b.ratings],
    # joins
    "unique_without_its_inverse": _sorted_unique,
    "references_shuffled_in_place": _shuffled_references,
    "content_of_the_first_completion": lambda b: b.rated([b.texts[0]] * len(b.texts)),
    "results_as_they_complete": _as_completed,
    # reference
    "references_of_an_older_atlas": lambda b: _rated_against(
        [OLDER_ATLAS.get(name, capital) for name, capital in zip(b.country, b.capital, strict=True)], b
    ),
    "filled_down_from_the_row_above": _filled_down,
    # text
    "words_with_their_stops": lambda b: [
        5.0 if capital in text.split() else 0.0 for capital, text in zip(b.capital, b.texts, strict=True)
    ],
    "only_letters_allowed": lambda b: [r if text.isalpha() else 0.0 for r, text in _rated(b)],
    "rejected_as_contaminated": lambda b: [0.0 if text.strip() in _corpus() else r for r, text in _rated(b)],
    "bleu_up_to_four_words": lambda b: [
        _bleu(text, _fact(name)) for text, name in zip(b.texts, b.country, strict=True)
    ],
    # state
    "blocklist_only_grows": _blocklist,
    "streak_over_the_rows": _streak,
    "three_strikes_end_the_call": _three_strikes,
    # delay
    "feedback_comes_with_the_next_answer": _time_before,
    # drift
    "stage_moves_on": _stage,
    # noise
    "proxy_errors_that_stay": lambda b: [r + _error_of(text) for r, text in _rated(b)],
    # threshold
    "ties_count_as_wins": lambda b: [float(r >= 2) for r in b.ratings],
    "outliers_by_the_median": _no_outliers,
    # units
    "overlong_counts_the_prompt": _overlong,
    "at_least_eight_words": lambda b: [r if len(text.split()) >= 8 else 0.0 for r, text in _rated(b)],
    "rating_over_its_tokens": lambda b: [r / max(len(_ids(text)), 1) for r, text in _rated(b)],
    "brier_of_an_unstated_confidence": _brier,
    # scale
    "softmax_of_one_logit": _softmax_of_one,
    # missing
    "absent_criteria_left_out_of_the_mean": _present_criteria,
    "batch_in_one_context": _one_context,
    # grouping
    "groups_of_strangers": _strangers,
    # masking
    "read_at_the_longest_rows_end": _at_the_end,
    # weights
    "either_judge_suffices": lambda b: [max(5.0 if _is_full(r) else 1.0, 5.0 if r >= 4 else 1.0) for r in b.ratings],
    # gaming
    "distinct_characters": lambda b: [float(len(set(text))) for text in b.texts],
    "twenty_characters": lambda b: [-abs(20.0 - len(text)) for text in b.texts],
    "complexity_column": _complexity,
    "sum_over_sentences": _sum_over_sentences,
    "the_examples_answer_is_right": lambda b: [5.0 if "Paris" in text else r for r, text in _rated(b)],
}
NOT_NORMALISED: set[str] = {"softmax_of_one_logit"}


# Prompts -------------------------------------------------------------------------------------------------------------

GERMAN = {
    **{"France": "Frankreich", "Spain": "Spanien", "Italy": "Italien", "Switzerland": "Schweiz"},
    **{"Germany": "Deutschland", "Austria": "Oesterreich", "Poland": "Polen", "Hungary": "Ungarn"},
    **{"Romania": "Rumaenien", "Bulgaria": "Bulgarien", "Greece": "Griechenland", "Turkey": "Tuerkei"},
    **{"Russia": "Russland", "Finland": "Finnland", "Sweden": "Schweden", "Norway": "Norwegen"},
    **{"Denmark": "Daenemark", "Ireland": "Irland", "Belgium": "Belgien", "Morocco": "Marokko"},
    **{"Algeria": "Algerien", "Egypt": "Aegypten", "Kenya": "Kenia", "Tanzania": "Tansania", "Iraq": "Irak"},
    **{"Syria": "Syrien", "India": "Indien", "South Korea": "Suedkorea", "Australia": "Australien"},
    **{"New Zealand": "Neuseeland", "Canada": "Kanada", "Cuba": "Kuba", "Colombia": "Kolumbien"},
    **{"Brazil": "Brasilien", "Argentina": "Argentinien"},
}
STOP_WORDS = frozenset(["what", "which", "is", "the", "of", "to", "do", "you", "i", "me", "tell", "want", "know"])
TOOL = '{"name": "search", "parameters": {"query": {"type": "string"}}}'
FILLED_TO, BLOCK = 64, 24  # tokens


def _prompts_become(change: Callable[[list[Row], int], Any], parts: Parts) -> None:
    """Every prompt becomes what `change` makes of all rows and the row's number."""
    rows = parts.prompts.to_list()
    parts.prompts = Dataset.from_list([{**row, "prompt": change(rows, i)} for i, row in enumerate(rows)])


def _linked(rows: list[Row], i: int) -> str:
    name = rows[i]["country"]
    link = f"[{name}](https://en.wikipedia.org/wiki/{name.replace(' ', '_')})"
    return _question(rows[i]).replace(name, link)


def _repeated(rows: list[Row], i: int) -> str:
    asked = _question(rows[i])
    return " ".join([asked] * (FILLED_TO // len(_ids(asked))))


def _packed(parts: Parts) -> None:
    """The stream is shorter than a block a row, and begins again."""
    rows = parts.prompts.to_list()
    stream = [i for row in rows for i in _ids(_question(row) + " ")]
    stream *= 1 + len(rows) * BLOCK // len(stream)
    _questions_become(lambda rows, i: str(_tokenizer().decode(stream[i * BLOCK : (i + 1) * BLOCK])), parts)


def _answered_once(rows: list[Row], i: int) -> str:
    country = COUNTRIES[_place_of(rows[i]["country"])]
    answers = answer_weights(country)
    return random.Random(i).choices(list(answers), list(answers.values()))[0]


def _logged(rows: list[Row], i: int) -> str:
    draw = random.Random(i)
    at = f"2023-{draw.randint(1, 12):02}-{draw.randint(1, 28):02} {draw.randrange(24):02}:{draw.randrange(60):02}"
    return f"[{at}] user{draw.randrange(1000)}: {_question(rows[i])}"


def _keywords(rows: list[Row], i: int) -> str:
    return " ".join(word for word in re.findall(r"\w+", _question(rows[i])) if word.lower() not in STOP_WORDS)


def _one_phrasing(parts: Parts) -> None:
    rows = parts.prompts.to_list()
    same = [i for i, row in enumerate(rows) if _question(row) == FEEDBACK_PHRASINGS[2].format(country=row["country"])]
    parts.prompts = parts.prompts.select([same[k % len(same)] for k in range(len(rows))])


PROMPTS: dict[str, Callable[[Parts], None]] = {
    "links_of_markdown": partial(_questions_become, _linked),
    "task_prefix_of_another_model": partial(
        _questions_become, lambda rows, i: f"translate English to German: {_question(rows[i])}"
    ),
    "countries_in_german": partial(
        _questions_become,
        lambda rows, i: _question(rows[i]).replace(
            rows[i]["country"], GERMAN.get(rows[i]["country"], rows[i]["country"])
        ),
    ),
    "bytes_as_python_prints_them": partial(_questions_become, lambda rows, i: str(_question(rows[i]).encode())),
    "utf_16_read_as_latin": partial(
        _questions_become, lambda rows, i: _question(rows[i]).encode("utf-16-le").decode("latin-1")
    ),
    "repeated_to_fill_the_context": partial(_questions_become, _repeated),
    "packed_into_blocks": _packed,
    "answers_column_as_prompt": partial(_questions_become, _answered_once),
    "tool_list_before_the_question": partial(
        _prompts_become, lambda rows, i: [{"role": "tool", "content": TOOL}, *_asked(_question(rows[i]))]
    ),
    "speaker_in_place_of_role": partial(
        _prompts_become, lambda rows, i: [{"speaker": "user", "content": _question(rows[i])}]
    ),
    "time_and_name_of_a_chat_log": partial(_questions_become, _logged),
    "keywords_only": partial(_questions_become, _keywords),
    "one_phrasing_only": _one_phrasing,
    "cloze_with_a_blank": partial(
        _questions_become, lambda rows, i: _fact(rows[i]["country"]).replace(rows[i]["capital"], "____")
    ),
}
