"""Scores that follow from a completion's text alone: its length, repetitions, form, words.

Each function here makes a reward function in TRL's calling convention, good for trl_ext's PPOTrainer and for TRL's
GRPOTrainer and RLOOTrainer alike.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import regex

from trl_ext.rewards.protocol import arguments_of, listed, name_of
from trl_ext.types import as_text

Reward = Callable[..., "list[float | None]"]
# Scripts that write no spaces between words: those whose characters are words or syllables, and others.
SYLLABLES = r"\p{Han}\p{Hiragana}\p{Katakana}ー"
UNSPACED = rf"{SYLLABLES}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{Myanmar}}"
WORD = regex.compile(rf"[{SYLLABLES}]|[^\s{SYLLABLES}]+")


def length_penalty(soft: int, hard: int) -> Reward:
    """0 up to `soft` tokens, then falling in a straight line to -1 at `hard` tokens and beyond.

    Source: the soft overlong punishment of Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at
    Scale", arXiv:2503.14476, equation 13.

    Raises:
        ValueError: not 0 <= soft < hard.
    """
    if not 0 <= soft < hard:
        raise ValueError(f"length_penalty needs 0 <= soft < hard, not soft {soft} and hard {hard}.")

    def length_penalty(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
        return [-min(max(len(ids) - soft, 0) / (hard - soft), 1.0) for ids in completion_ids]

    return length_penalty


def repetition_penalty(ngram: int = 3) -> Reward:
    """Minus the share of a completion's word n-grams that occurred in it before: 0 where none did, down to -1.

    Words are what stands between spaces; in Chinese and Japanese, which write none, each character counts as one.
    """
    if ngram < 1:
        raise ValueError(f"repetition_penalty needs ngram of at least 1, not {ngram}.")

    def repetition_penalty(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [-_repeated(WORD.findall(as_text(completion).lower()), ngram) for completion in completions]

    return repetition_penalty


def _repeated(words: Sequence[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def matches(pattern: str, flags: int = 0) -> Reward:
    """1 where the regular expression `pattern` matches the whole completion (surrounding space aside), else 0.

    Raises:
        ValueError: no regular expression.
    """
    try:
        compiled = re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error

    def matches(completions: Sequence[Any], **_: Any) -> list[float | None]:
        return [float(compiled.fullmatch(as_text(completion).strip()) is not None) for completion in completions]

    return matches


def json_schema(schema: dict[str, Any]) -> Reward:
    """1 for a completion that is JSON and follows `schema`, 0.5 for other JSON, 0 for anything else.

    Raises:
        ValueError: no JSON schema.
        ImportError: the package jsonschema is missing.
    """
    try:
        import jsonschema
    except ImportError as error:
        raise ImportError("The JSON schema reward needs jsonschema: pip install 'trl-ext[rewards]'.") from error
    cls = jsonschema.validators.validator_for(schema)
    try:
        cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"The schema is no JSON schema: {error.message}.") from error
    validator = cls(schema)

    def json_schema(completions: Sequence[Any], **_: Any) -> list[float | None]:
        scores: list[float | None] = []
        for completion in completions:
            try:
                value = json.loads(as_text(completion), parse_constant=_no_json)
            except (ValueError, RecursionError):
                scores.append(0.0)
                continue
            try:
                scores.append(1.0 if validator.is_valid(value) else 0.5)
            except (ArithmeticError, RecursionError):  # a number or a depth that the validator cannot reckon with
                scores.append(0.5)
        return scores

    return json_schema


def _no_json(constant: str) -> float:
    raise ValueError(f"{constant} is Python's, not JSON's")


def keywords(wanted: Iterable[str]) -> Reward:
    """Share of the `wanted` words or phrases that occur in a completion, upper and lower case alike. They match as
    whole words, where the script has spaces between words.

    Raises:
        TypeError: a text in the place of several.
        ValueError: no word, or a blank one.
    """
    patterns = _patterns("keywords", wanted)

    def keywords(completions: Sequence[Any], **_: Any) -> list[float | None]:
        texts = map(_composed, completions)
        return [sum(pattern.search(text) is not None for pattern in patterns) / len(patterns) for text in texts]

    return keywords


def forbidden(words: Iterable[str]) -> Reward:
    """1 where none of `words` (words or phrases, case aside) occurs in a completion, 0 where one does: a limit
    for `limited`. Words are matched as in `keywords`.

    Raises:
        ValueError: no word, or a blank one.
    """
    patterns = _patterns("forbidden", words)

    def forbidden(completions: Sequence[Any], **_: Any) -> list[float | None]:
        texts = map(_composed, completions)
        return [float(not any(pattern.search(text) for pattern in patterns)) for text in texts]

    return forbidden


def _patterns(function: str, words: Iterable[str]) -> list[regex.Pattern[str]]:
    if isinstance(words, str):
        raise TypeError(f"{function} got the text {words!r}, and would look for its letters: give a list, [{words!r}].")
    patterns = [_whole_words(word) for word in words]
    if not patterns:
        raise ValueError(f"{function} needs at least one word to look for.")
    return patterns


def _whole_words(phrase: str) -> regex.Pattern[str]:
    """What no letter, digit or mark of a script that has spaces may stand beside; in one without spaces any may."""
    phrase = _composed(phrase).strip()
    if not phrase:
        raise ValueError("A word to look for is blank: drop it from the list.")
    beside = rf"[\w--[{UNSPACED}]]"
    before, after = (not regex.match(f"[{UNSPACED}]", phrase[i]) for i in (0, -1))
    pattern = (f"(?<!{beside})" if before else "") + regex.escape(phrase) + (f"(?!{beside})" if after else "")
    return regex.compile(pattern, regex.IGNORECASE | regex.VERSION1)


def _composed(text: Any) -> str:
    """A completion's text with each accent in its letter, where Unicode has one for both."""
    return unicodedata.normalize("NFC", as_text(text))


def limited(
    rewards: Sequence[Reward], limits: Sequence[Reward], worst: float, weights: Sequence[float] | None = None
) -> Reward:
    """The weighted sum of `rewards`; for a completion that breaks one of the `limits`, `worst` instead.

    A limit is a reward function itself; a completion breaks it where it scores 0 or less. Give the result as the only
    reward function, so that nothing is added to the worst score.

    Args:
        rewards: sync reward functions. Where all give None, the completion has no score.
        limits: sync reward functions; None does not break the limit.
        worst: the score of a completion that breaks a limit.
        weights: one for each reward; None: all 1.
    """
    factors = list(weights) if weights is not None else [1.0] * len(rewards)
    if len(factors) != len(rewards):
        raise ValueError(f"limited got {len(factors)} weights for {len(rewards)} rewards: give one each.")

    def limited(prompt_ids: Any = None, **batch: Any) -> list[float | None]:
        if prompt_ids is not None:  # which only goes to who names it
            batch["prompt_ids"] = prompt_ids
        by_reward, by_limit = ([_called(one, batch) for one in functions] for functions in (rewards, limits))
        scores: list[float | None] = []
        for row in range(len(batch["completions"])):
            terms = [w * float(x) for w, s in zip(factors, by_reward, strict=True) if (x := s[row]) is not None]
            total = sum(terms) if terms else None
            is_broken = any((verdict := limit[row]) is not None and verdict <= 0 for limit in by_limit)
            scores.append(worst if is_broken else total)
        return scores

    return limited


def _called(function: Reward, batch: dict[str, Any]) -> list[Any]:
    count = len(batch["completions"])
    values = listed(function(**{name: batch[name] for name in arguments_of(function, batch)}))
    if not isinstance(values, list) or len(values) != count:
        got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"{name_of(function)!r} in limited returned {got} for {count} completions: return one each")
    return values
