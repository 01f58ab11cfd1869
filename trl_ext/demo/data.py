"""From the world to rows: the corpus that teaches the base model, the feedback, and the exam; all pure functions."""

import random
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any, TypeVar

from trl_ext.demo.grading import rating
from trl_ext.demo.world import COUNTRIES, FEEDBACK_PHRASINGS, HELD_OUT_PHRASINGS, Country, answer_weights

Row = dict[str, Any]
AnswerPair = tuple[str, str]
T = TypeVar("T")

ANSWERS_A_PHRASING = 20  # corpus: answers a country and phrasing
RATED_A_QUESTION = 8
TRAIN_PAIRS_A_QUESTION = 16  # drawn; about half are too close to call
TEST_PAIRS_A_QUESTION = 4
WITHHELD = 0.1  # share of a country's possible (answer, answer) pairs that only the test split may have

# Raters are off by one now and then, each in their own direction: (name, chance of one too low, of one too high).
RATERS: tuple[tuple[str, float, float], ...] = (("ada", 0.05, 0.05), ("ben", 0.20, 0.02), ("cleo", 0.02, 0.20))
CLEAR_GAP = 2  # a rater prefers one answer to another only from this difference in rating on
SLIP = 0.03  # and then takes the one for the other this often

SPLITS: dict[str, tuple[str, ...]] = {
    "prompts": ("train", "test"),
    "pairs": ("train", "test"),
    "ratings": ("train", "test"),
    "exam": ("test",),
}


def corpus(seed: int) -> list[tuple[str, str, str]]:
    """(country, question, answer) texts for the base model: every country in every phrasing, most answers wrong.

    Each country's answers follow ``answer_weights`` as closely as whole numbers allow, dealt to its phrasings at
    random.
    """
    rng = random.Random(f"corpus {seed}")
    rows: list[tuple[str, str, str]] = []
    for country in COUNTRIES:
        questions = _questions(country, FEEDBACK_PHRASINGS + HELD_OUT_PHRASINGS) * ANSWERS_A_PHRASING
        answers = _quota(answer_weights(country), len(questions))
        rng.shuffle(answers)
        rows += [(country.name, *pair) for pair in zip(questions, answers, strict=True)]
    rng.shuffle(rows)
    return rows


def tables(seed: int) -> dict[str, dict[str, list[Row]]]:
    """Every data set of the demo as ``tables[name][split]``, in TRL's conversational formats."""
    phrasings_of = {"train": FEEDBACK_PHRASINGS, "test": HELD_OUT_PHRASINGS}
    makers: dict[str, Callable[[str, tuple[str, ...], int], list[Row]]] = {
        "prompts": _prompts,
        "pairs": _preference_pairs,
        "ratings": _ratings,
    }
    feedback_tables = {
        name: {split: maker(split, phrasings, seed) for split, phrasings in phrasings_of.items()}
        for name, maker in makers.items()
    }
    return feedback_tables | {"exam": {"test": _exam()}}


def _exam() -> list[Row]:
    """Every country, covered or not, in the phrasings that the feedback never used."""
    return [
        _prompt(question) | _reference(country) | {"covered": country.covered}
        for country in COUNTRIES
        for question in _questions(country, HELD_OUT_PHRASINGS)
    ]


def _prompts(split: str, phrasings: tuple[str, ...], seed: int) -> list[Row]:
    rng = random.Random(f"prompts {split} {seed}")
    rows = [_prompt(question) | _reference(country) for country, question in _covered(phrasings)]
    rng.shuffle(rows)
    return rows


def _ratings(split: str, phrasings: tuple[str, ...], seed: int) -> list[Row]:
    """A few different answers to each question, all rated by one rater."""
    rng = random.Random(f"ratings {split} {seed}")
    rows = []
    for country, question in _covered(phrasings):
        rater = rng.choice(RATERS)
        for answer in _draw(rng, answer_weights(country), RATED_A_QUESTION):
            stars = _noisy_rating(rng, rater, answer, country.capital)
            rows.append(_prompt(question) | {"completion": _message(answer), "rating": stars, "rater": rater[0]})
    return rows


def _preference_pairs(split: str, phrasings: tuple[str, ...], seed: int) -> list[Row]:
    """Preferences between two answers to one question; a tenth of the pairs of answers is kept from the train split."""
    count = TRAIN_PAIRS_A_QUESTION if split == "train" else TEST_PAIRS_A_QUESTION
    rng = random.Random(f"pairs {split} {seed}")
    rows = []
    for country, question in _covered(phrasings):
        weights = answer_weights(country)
        chances = {pair: weights[pair[0]] * weights[pair[1]] for pair in _possible_pairs(country, split, seed)}
        for pair in _draw(rng, chances, count):
            if row := _preference(rng, pair, country.capital):
                rows.append(_prompt(question) | row)
    rng.shuffle(rows)
    return rows


def _possible_pairs(country: Country, split: str, seed: int) -> list[AnswerPair]:
    pairs = list(combinations(answer_weights(country), 2))
    random.Random(f"withheld {country.name} {seed}").shuffle(pairs)
    return pairs[round(len(pairs) * WITHHELD) :] if split == "train" else pairs


def _preference(rng: random.Random, pair: AnswerPair, capital: str) -> Row | None:
    """A noisy rater's preference between two answers; None where they are too close to call."""
    rater = rng.choice(RATERS)
    rated = sorted(((_noisy_rating(rng, rater, answer, capital), answer) for answer in pair), reverse=True)
    (high, better), (low, worse) = rated
    slipped = rng.random() < SLIP
    if high - low < CLEAR_GAP:
        return None
    if slipped:
        better, worse = worse, better
    return {"chosen": _message(better), "rejected": _message(worse), "chosen_rating": high, "rejected_rating": low}


def _noisy_rating(rng: random.Random, rater: tuple[str, float, float], answer: str, capital: str) -> int:
    _, too_low, too_high = rater
    luck = rng.random()
    shift = -1 if luck < too_low else 1 if luck > 1 - too_high else 0
    return min(5, max(1, rating(answer, capital) + shift))


def _draw(rng: random.Random, weights: dict[T, float], count: int) -> list[T]:
    """``count`` different keys, one after another with probability in proportion to their weights."""
    keys = sorted(weights, key=lambda key: rng.random() ** (1 / weights[key]), reverse=True)
    return keys[:count]


def _quota(weights: dict[str, float], total: int) -> list[str]:
    """``total`` keys in proportion to their weights, rounded by largest remainder: no luck in what is common."""
    counts = {key: int(weight * total) for key, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda key: counts[key] - weights[key] * total)
    for key in by_remainder[: total - sum(counts.values())]:
        counts[key] += 1
    return [key for key, count in counts.items() for _ in range(count)]


def _covered(phrasings: tuple[str, ...]) -> Iterable[tuple[Country, str]]:
    return [(country, text) for country in COUNTRIES if country.covered for text in _questions(country, phrasings)]


def _questions(country: Country, phrasings: tuple[str, ...]) -> list[str]:
    return [phrasing.format(country=country.name) for phrasing in phrasings]


def _prompt(question: str) -> Row:
    return {"prompt": [{"role": "user", "content": question}]}


def _reference(country: Country) -> Row:
    return {"country": country.name, "capital": country.capital}


def _message(answer: str) -> list[Row]:
    return [{"role": "assistant", "content": answer}]
