"""Ready-made reward functions, on answers whose scores can be counted by hand."""

import json
from collections import Counter
from typing import Any

import pytest

from trl_ext.rewards.protocol import arguments_of
from trl_ext.rewards.similarity import chrf
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
    texts = [json.dumps({"city": "Paris"}), '{"city": 3}', "[1, 2]", "Paris", "", "[" * 100_000, "NaN", "Infinity"]
    assert score(completions=texts) == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_json_that_the_validator_cannot_reckon_with() -> None:
    score = json_schema({"type": "number", "multipleOf": 0.01})
    assert score(completions=["2", "1" * 400, "1e400"]) == [1.0, 0.5, 0.5]


def test_keywords_are_whole_words() -> None:
    score = keywords(["cat", "red dog"])
    assert score(completions=["A CAT and a red dog.", "concatenate", "the cat"]) == [1.0, 0.0, 0.5]
    assert forbidden(["kill"])(completions=["a skill", "to kill!", ""]) == [1.0, 0.0, 1.0]
    rude = forbidden(["笨蛋", "ばか", " kill "])  # no spaces between words there
    assert rude(completions=["你是笨蛋吗", "聪明", "おばかさん", "kill"]) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("word", "text", "is_there"),
    [
        ("コーヒー", "コーヒーを飲む", True),  # its last sign is of no script alone
        ("人々", "多くの人々が", True),
        ("ﾊﾞｶ", "おﾊﾞｶさん", True),
        ("Python", "我喜欢Python编程", True),  # what stands beside it has no spaces
        ("Python", "Pythonista", False),
        ("कम", "कमी", False),  # a vowel sign goes on with the word
        ("café", "a café".replace("é", "e\u0301"), True),
        ("resume", "resume\u0301", False),
        ("ไทย", "ภาษาไทยยาก", True),
        ("C++", "in C++.", True),
    ],
)
def test_words_of_any_script(word: str, text: str, is_there: bool) -> None:
    assert keywords([word])(completions=[text]) == [float(is_there)]
    assert forbidden([word])(completions=[text]) == [float(not is_there)]


def test_repetition_where_there_are_no_spaces() -> None:
    loop, said = repetition_penalty()(completions=["我喜欢猫" * 50, "今天天气很好，我们去公园。"])
    assert loop == pytest.approx(-(1 - 4 / 198)) and said == 0.0


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0, 4.0], [1.0], 1.0])
def test_a_function_of_wrong_length_in_limited(values: Any) -> None:
    def judge(completions: list[str], **_: Any) -> Any:
        return values

    for score in (limited([judge], [], worst=-1.0), limited([], [judge], worst=-1.0)):
        with pytest.raises(ValueError, match=r"'judge' in limited returned .* for 2 completions: return one each"):
            score(completions=["a", "b"])


def test_limited_passes_on_the_prompts_ids_to_who_names_them() -> None:
    def reads(completions: list[str], prompt_ids: list[list[int]] | None = None) -> list[float | None]:
        return [float(len(ids)) for ids in prompt_ids or [[]]]

    score = limited([reads], [], worst=-1.0)
    offered = {"completions": ["a"], "prompt_ids": [[1, 2]]}
    assert score(**{name: offered[name] for name in arguments_of(score, offered)}) == [2.0]
    assert score(completions=["a"]) == [0.0], "of a trainer that has none"


def test_a_broken_limit_gives_the_worst_score() -> None:
    def judge(completions: list[str], **_: Any) -> list[float | None]:
        return [10.0, 20.0, None]

    named = limited([lambda completions: (len(text) for text in completions)], [], worst=-5.0)
    assert named(prompts=["p", "p"], completions=["a", "bb"]) == [1.0, 2.0], "it gets what it names, and may yield"
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
        (lambda: forbidden(["rude", ""]), "is blank: drop it"),
        (lambda: keywords("cat"), r"give a list, \['cat'\]"),
        (lambda: limited([], [], -1.0, weights=[1.0]), "1 weights for 0 rewards"),
    ],
)
def test_bad_settings(build: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
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


def test_chrf_against_its_definition() -> None:
    """chrF, Popovic 2015: F score (beta 2) of mean precision and recall over character 1- to 6-grams, spaces aside."""

    def grams(text: str, n: int) -> Counter[str]:
        text = text.replace(" ", "")
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    def by_hand(answer: str, reference: str) -> float:
        precisions, recalls = [], []
        for n in range(1, 7):
            a, r = grams(answer, n), grams(reference, n)
            if a and r:
                same = sum((a & r).values())
                precisions.append(same / sum(a.values()))
                recalls.append(same / sum(r.values()))
        p, r_ = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
        return 5 * p * r_ / (4 * p + r_) if p + r_ else 0.0

    answers, references = ["the cat sat down", "a big red dog", "anything"], ["the cat sat on it", "a big red dog", ""]
    got = chrf("target")(completions=answers, target=references)
    assert got[:2] == pytest.approx([by_hand(a, r) for a, r in zip(answers[:2], references[:2], strict=True)], rel=1e-6)
    assert got[1] == pytest.approx(1.0)
    assert got[2] is None
    with pytest.raises(ValueError, match="no column 'target'"):
        chrf("target")(completions=answers)
