"""Ready-made reward functions, on answers whose scores can be counted by hand."""

import json
from typing import Any

import pytest

from trl_ext.rewards.texts import forbidden, json_schema, keywords, length_penalty, limited, matches, repetition_penalty

CHAT = [[{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]]


def test_length() -> None:
    score = length_penalty(soft=2, hard=6)
    assert score(completion_ids=[[1] * n for n in (0, 2, 3, 5, 6, 9)]) == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


def test_repetition() -> None:
    score = repetition_penalty(ngram=2)
    # Bigrams: "a b", "b a", "a b": one of three seen before; "x x" three times: two of three; too short; none.
    assert score(completions=["a b A b", "x x x x", "one", ""]) == pytest.approx([-1 / 3, -2 / 3, 0.0, 0.0])


def test_pattern() -> None:
    assert matches(r"\d+ apples")(completions=[" 12 apples\n", "about 12 apples", "apples"]) == [1.0, 0.0, 0.0]
    assert matches("yes|no")(completions=CHAT) == [1.0, 1.0]


def test_json() -> None:
    score = json_schema({"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}})
    texts = [json.dumps({"city": "Paris"}), '{"city": 3}', "[1, 2]", "Paris", "", "[" * 100_000]
    assert score(completions=texts) == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]


def test_keywords_are_whole_words() -> None:
    score = keywords(["cat", "red dog"])
    assert score(completions=["A CAT and a red dog.", "concatenate", "the cat"]) == [1.0, 0.0, 0.5]
    assert forbidden(["kill"])(completions=["a skill", "to kill!", ""]) == [1.0, 0.0, 1.0]


def test_a_broken_limit_gives_the_worst_score() -> None:
    def judge(completions: list[str], **_: Any) -> list[float | None]:
        return [10.0, 20.0, None]

    score = limited([judge, judge], limits=[forbidden(["bad"])], worst=-5.0, weights=[1.0, 0.5])
    assert score(prompts=[], completions=["good", "a bad one", "fine"]) == [15.0, -5.0, None]
    assert score(prompts=[], completions=["bad", "good", "bad"]) == [-5.0, 30.0, -5.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: length_penalty(5, 5), "0 <= soft < hard"),
        (lambda: repetition_penalty(0), "at least 1"),
        (lambda: matches("("), "is no regular expression"),
        (lambda: json_schema({"type": "nothing"}), "is no JSON schema"),
        (lambda: keywords([]), "at least one word"),
        (lambda: limited([], [], -1.0, weights=[1.0]), "1 weights for 0 rewards"),
    ],
)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_names_for_trls_trainers() -> None:
    """TRL's GRPOTrainer asks a reward function for its __name__."""
    made = [
        length_penalty(0, 1),
        repetition_penalty(),
        matches("x"),
        keywords(["x"]),
        forbidden(["x"]),
        json_schema({}),
    ]
    names = ["length_penalty", "repetition_penalty", "matches", "keywords", "forbidden", "json_schema"]
    assert [f.__name__ for f in made] == names
