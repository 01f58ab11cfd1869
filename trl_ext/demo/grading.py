"""Reading an answer back: is it right, and which rating from 1 to 5 does it deserve?"""

import re
from collections.abc import Sequence
from typing import Any

from trl_ext.demo.world import CITIES, COUNTRIES, COUNTRY_OF, FULL_FORMS, SHORT_FORMS
from trl_ext.types import as_text

_NAME = r"[A-Z][A-Za-z]*(?: [A-Z][A-Za-z]*)*"


def _pattern(form: str) -> re.Pattern[str]:
    escaped = re.escape(form).replace(r"\{", "{").replace(r"\}", "}").replace(r"\ ", " ")
    return re.compile(escaped.format(country=f"(?P<country>{_NAME})", city=f"(?P<city>{_NAME})"))


_FULL = [_pattern(form) for form in FULL_FORMS]
_SHORT = [_pattern(form) for form in (*SHORT_FORMS, "{city}.", "{city}")]
_ANY_CITY = re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, CITIES), key=len, reverse=True)) + r")\b")


def _claim_of(completion: str, patterns: Sequence[re.Pattern[str]]) -> tuple[str, str | None] | None:
    """The (city, country) that ``completion`` claims when it has one of the forms; country None where it has none."""
    for pattern in patterns:
        if match := pattern.fullmatch(completion.strip()):
            return match["city"], match.groupdict().get("country")
    return None


def _is_right(claim: tuple[str, str | None] | None, capital: str) -> bool:
    if claim is None:
        return False
    city, country = claim
    return city == capital and country in (None, COUNTRY_OF.get(capital, country))


def grade(completion: str, capital: str) -> bool:
    """Whether ``completion`` is exactly right: one known form of answer, naming ``capital`` and nothing else.

    Surrounding white space is ignored; a hedge ("It is Lyon or Paris."), a wrong country or any further word is wrong.
    """
    return _is_right(_claim_of(completion, [*_FULL, *_SHORT]), capital)


def rating(completion: str, capital: str) -> int:
    """The noise-free rating of one answer.

    5: the right city in a full sentence; 4: the right city, clumsily; 3: the right city among other words;
    2: a full sentence that is wrong; 1: anything else.
    """
    claim = _claim_of(completion, _FULL)
    if _is_right(claim, capital):
        return 5
    if grade(completion, capital):
        return 4
    if claim is not None and claim[0] in CITIES:
        return 2
    return 3 if capital in _ANY_CITY.findall(completion) else 1


def rate(
    prompts: Sequence[Any],
    completions: Sequence[str | Sequence[dict[str, Any]]],
    capital: Sequence[str],
    **kwargs: Any,
) -> list[float]:
    """Reward function in TRL's form: the noise-free rating, 1.0 to 5.0, of each completion.

    ``capital`` is the reference column of ``demo.load("prompts")``. Further keyword arguments are accepted, as TRL
    passes every column, and ignored. Raises ValueError when the lists differ in length.
    """
    return [float(rating(as_text(text), answer)) for text, answer in zip(completions, capital, strict=True)]


_CAPITAL_OF = {country.name: country.capital for country in COUNTRIES}
_ANY_COUNTRY = re.compile(r"\b(?:" + "|".join(sorted(map(re.escape, _CAPITAL_OF), key=len, reverse=True)) + r")\b")


def exact(prompts: Sequence[Any], completions: Sequence[str | Sequence[dict[str, Any]]], **kwargs: Any) -> list[float]:
    """A yardstick for the embedded prompts: `rate`, for the country that a prompt asks for, the last that it names.

    It needs no column, so it measures what a score is to stand for whatever became of the data.
    """
    asked = [_ANY_COUNTRY.findall(as_text(prompt)) for prompt in prompts]
    return rate(prompts, completions, [_CAPITAL_OF[names[-1]] if names else "" for names in asked])
