"""The records: picking rows, moving, and joining rows whose padding lies on different sides."""

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import rollout
from trl_ext.types import Experience, Rollout, ScorePass, Scores, as_text, concatenate

LENGTHS, ENDED, PROMPT_LENGTHS = [3, 1, 2], [False, True, True], [1, 3, 2]


@pytest.fixture
def record() -> Experience:
    """Three rows; every number tells its row (hundreds), its field and its column."""
    answers = rollout(LENGTHS, ENDED, PROMPT_LENGTHS)

    def tokens(field: int) -> Tensor:
        return 100.0 * torch.arange(3).unsqueeze(1) + 10 * field + torch.arange(3)

    pass_ = ScorePass(tokens(1), tokens(2), tokens(3), tokens(4), torch.tensor([[0.0], [100.0], [200.0]]))
    by_function = torch.tensor([[2.0, 3.0], [102.0, 103.0], [202.0, 203.0]])
    scores = Scores(torch.tensor([1.0, 101.0, 201.0]), by_function, torch.tensor([4.0, 104.0, 204.0]))
    answers = replace(answers, sampling_logprobs=tokens(9))
    return Experience(answers, scores, pass_, tokens(5), tokens(6), answers.completion_mask, tokens(7), tokens(8))


def leaves(record: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(record):
        value = getattr(record, f.name)
        found |= leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return found


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def test_prompt_and_completion_side_by_side() -> None:
    answers = rollout(LENGTHS, ENDED, PROMPT_LENGTHS)
    assert answers.input_ids.tolist() == [
        [0, 0, 102, 500, 501, 502],
        [103, 104, 105, 1, 0, 0],
        [0, 107, 108, 506, 1, 0],
    ]
    assert torch.equal(answers.attention_mask, answers.input_ids != 0)
    assert answers.lengths.tolist() == LENGTHS


@pytest.mark.parametrize("index", [[2, 0, 1], [1], [0, 0, 2], []])
def test_rows(record: Experience, index: list[int]) -> None:
    picked = leaves(record.rows(torch.tensor(index, dtype=torch.long)))
    for name, value in leaves(record).items():
        if isinstance(value, list):
            assert picked[name] == [value[i] for i in index], name
        else:
            assert picked[name].tolist() == [value.tolist()[i] for i in index], name


def test_what_is_not_known_stays_unknown() -> None:
    """A generator that tells no log-probs."""
    answers = rollout(LENGTHS, ENDED, PROMPT_LENGTHS)
    assert answers.sampling_logprobs is None
    assert answers.rows(torch.tensor([1])).sampling_logprobs is None
    assert concatenate([answers, answers], 0).sampling_logprobs is None
    told = replace(answers, sampling_logprobs=torch.zeros(answers.completion_ids.shape))
    for parts in ([told, answers], [answers, told]):
        assert concatenate(parts, 0).sampling_logprobs is None, "not known of all is not known of the whole"


def test_rows_leaves_the_original_alone(record: Experience) -> None:
    picked = record.rows(torch.tensor([0]))
    picked.rewards.fill_(-1.0)
    assert record.rewards[0].tolist() == [60.0, 61.0, 62.0]


def test_to_moves_every_tensor_and_nothing_else(record: Experience) -> None:
    moved = leaves(record.to("meta"))
    for name, value in leaves(record).items():
        if isinstance(value, Tensor):
            assert moved[name].device.type == "meta", name
            assert moved[name].dtype == value.dtype, name
            assert value.device.type == "cpu", name
        else:
            assert moved[name] == value, name


def test_records_are_frozen(record: Experience) -> None:
    with pytest.raises(FrozenInstanceError):
        record.rewards = record.kl  # type: ignore[misc]


def test_prompts_grow_on_the_left_and_completions_on_the_right() -> None:
    narrow = Rollout(
        prompts=["p"],
        completions=["c"],
        prompt_ids=torch.tensor([[11]]),
        prompt_mask=torch.tensor([[True]]),
        completion_ids=torch.tensor([[21]]),
        completion_mask=torch.tensor([[True]]),
        has_eos=torch.tensor([False]),
    )
    wide = Rollout(
        prompts=["q"],
        completions=["d"],
        prompt_ids=torch.tensor([[12, 13, 14]]),
        prompt_mask=torch.tensor([[False, True, True]]),
        completion_ids=torch.tensor([[22, 23]]),
        completion_mask=torch.tensor([[True, True]]),
        has_eos=torch.tensor([True]),
    )
    for first, second, rows in ((narrow, wide, [0, 1]), (wide, narrow, [1, 0])):
        joined = concatenate([first, second], pad_token_id=9).rows(torch.tensor(rows))
        assert joined.prompts == ["p", "q"]
        assert joined.completions == ["c", "d"]
        assert joined.prompt_ids.tolist() == [[9, 9, 11], [12, 13, 14]]
        assert joined.prompt_mask.tolist() == [[False, False, True], [False, True, True]]
        assert joined.completion_ids.tolist() == [[21, 9], [22, 23]]
        assert joined.completion_mask.tolist() == [[True, False], [True, True]]
        assert joined.has_eos.tolist() == [False, True]
        assert joined.prompt_mask.dtype == joined.completion_mask.dtype == torch.bool
        assert joined.prompt_ids.dtype == joined.completion_ids.dtype == torch.int64


def test_numbers_a_token_grow_on_the_right_with_zeros_and_not_the_pad_id() -> None:
    def record(width: int, value: float) -> ScorePass:
        return ScorePass(*[torch.full((1, width), value + i) for i in range(4)], torch.tensor([[value]]))

    joined = concatenate([record(1, 1.0), record(3, 10.0)], pad_token_id=9)
    for i, name in enumerate(("logprobs", "entropy", "ref_logprobs", "values")):
        assert getattr(joined, name).tolist() == [[1.0 + i, 0.0, 0.0], [10.0 + i] * 3], name
    assert joined.reward_scores.tolist() == [[1.0], [10.0]]


def test_cut_and_joined_again_is_the_same(record: Experience) -> None:
    parts = [record.rows(torch.tensor(index)) for index in ([0], [1, 2])]
    joined = leaves(concatenate(parts, pad_token_id=0))
    assert all(same(value, joined[name]) for name, value in leaves(record).items())
    alone = leaves(concatenate([record], pad_token_id=0))
    assert all(same(value, alone[name]) for name, value in leaves(record).items())


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("as it is", "as it is"),
        ([], ""),
        ([{"role": "user", "content": "the first"}, {"role": "user", "content": "the last"}], "the last"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}],
            "in parts",
        ),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], ""),
        ([{"role": "assistant", "tool_calls": [{}]}], ""),
    ],
)
def test_as_text(item: Any, text: str) -> None:
    assert as_text(item) == text
