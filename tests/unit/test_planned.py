"""What is known of a run before it begins."""

from __future__ import annotations

import math
import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.optim.lr_scheduler import LambdaLR, MultiplicativeLR, SequentialLR
from transformers import get_scheduler

from tests.helpers import word_tokenizer
from trl_ext.diagnostics.planned import order, planned, rates, stop_words

draw = random.Random(1)
PROMPTS = [" ".join(draw.choices(["a", "the", "cat", "sat", "on", "mats"], k=draw.randint(3, 12))) for _ in range(400)]
UNIQUE = [f"{draw.random()} {text}" for text in PROMPTS]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "cosine_with_restarts"])
def test_rates_are_those_that_the_schedule_will_make(kind: str) -> None:
    schedule = get_scheduler(kind, optimizer(), num_warmup_steps=20, num_training_steps=100)
    told = dict(rates(SimpleNamespace(scheduler=schedule), 100))  # as accelerate wraps it
    assert len(told) == 41 and min(told) == 0 and max(told) == 99
    for step in range(100):
        assert step not in told or told[step] == pytest.approx(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()


class Counting:
    calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: MultiplicativeLR(optimizer, lambda step: 0.95),  # factors of the last rate
        lambda optimizer: LambdaLR(optimizer, partial(list.__getitem__, [1.0] * 10)),  # nobody knows the rest
        lambda optimizer: LambdaLR(optimizer, lambda step: [1.0][step]),
        lambda optimizer: LambdaLR(optimizer, Counting()),
        lambda optimizer: SequentialLR(optimizer, [LambdaLR(optimizer, lambda step: 1.0)] * 2, [5]),
        lambda optimizer: None,
    ],
)
def test_other_schedules_tell_nothing_and_are_left_alone(make: Any) -> None:
    schedule = make(optimizer())
    before = Counting.calls
    assert rates(schedule, 100) == [] and Counting.calls == before
    assert rates(get_scheduler("constant", optimizer()), 1) == [(0, 1e-3)]
    assert rates(get_scheduler("constant", optimizer()), -1) == []


@pytest.mark.parametrize("format_", [None, "torch", "numpy", "pandas"])
@pytest.mark.parametrize(
    ("columns", "by"),
    [
        ({"prompt": sorted(UNIQUE)}, "prompt"),
        ({"prompt": sorted(UNIQUE, key=len)}, "the prompt's length"),
        ({"prompt": UNIQUE, "task": ["b"] * 130 + ["a"] * 130 + ["c"] * 140}, "task"),
        ({"prompt": UNIQUE, "hardness": sorted(draw.random() for _ in range(400))}, "hardness"),
        ({"prompt": [[{"role": "user", "content": text}] for text in sorted(UNIQUE)]}, "prompt"),
    ],
)
def test_prompts_that_come_in_order(columns: dict[str, Any], by: str, format_: str | None) -> None:
    found = order(Dataset.from_dict(columns).with_format(format_))
    assert found is not None and found[0] == by and found[1] > 0.9 and found[2] == 400


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"id": [*range(400)]},
        {"id": [*range(900, 500, -1)]},
        {"hard": [False] * 392 + [True] * 8},
        {"id": [f"train-{i:05d}" for i in range(400)]},
        {"id": [float(i) for i in range(400)]},
        {"score": [math.nan] * 400},
        {"score": [float(i) if i % 3 else math.nan for i in range(400)]},
        {"note": [None] * 400},
        {"score": [None, *range(399)]},
        {"score": [0.0] * 400},
        {"kind": ["a", "b"] * 200},
        {"tags": [["x"]] * 400},
    ],
)
def test_prompts_that_do_not(columns: dict[str, Any]) -> None:
    rows = Dataset.from_dict({"prompt": UNIQUE, **columns})
    for found in (order(rows), order(rows.with_format("torch"))):
        assert found is not None and found[1] < 0.2


def test_a_prompt_that_is_repeated_in_its_place_counts_once() -> None:
    fourfold = [text for text in UNIQUE[:100] for _ in range(4)]
    assert order(Dataset.from_dict({"prompt": fourfold}))[1] < 0.2  # type: ignore[index]
    assert order(Dataset.from_dict({"prompt": [UNIQUE[0]] * 400})) is None


def test_where_there_is_no_order_to_look_at() -> None:
    assert order(None) is None and order(IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))) is None
    assert order(Dataset.from_dict({"prompt": UNIQUE[:10]})) is None
    assert order(Dataset.from_dict({"text": UNIQUE})) is None
    loader, state = SimpleNamespace(dataset=Dataset.from_dict({"prompt": sorted(UNIQUE)})), SimpleNamespace(max_steps=8)
    args = SimpleNamespace(steps_per_rollout=4, shuffle_dataset=False)
    assert planned(args, state, train_dataloader=loader)["prompts_order"][0] == "prompt"
    args.shuffle_dataset = True
    assert "prompts_order" not in planned(args, state, train_dataloader=loader)
    assert planned(SimpleNamespace(shuffle_dataset=False), state, train_dataloader=loader) == {"planned_rates": []}


def test_ends_that_are_ordinary_words() -> None:
    """Ids of another model's EOS; a mark, a newline and a stop are where some mean to end."""
    tokenizer = word_tokenizer()
    cat = tokenizer.convert_tokens_to_ids("cat")
    assert stop_words([tokenizer.eos_token_id, 3, 4, cat], tokenizer) == ["cat"]
    assert stop_words([cat], None) == []
    words = ["<|end|>", "[SEP]", "cat"]  # a vocabulary that has marks among its words
    unmarked = SimpleNamespace(all_special_ids=[], get_added_vocab=dict, decode=lambda ids: words[ids[0]])
    assert stop_words([0, 1, 2], unmarked) == ["cat"]
    args = SimpleNamespace(generation_kwargs={"eos_token_id": [1, cat]}, steps_per_rollout=1, shuffle_dataset=True)
    assert planned(args, SimpleNamespace(max_steps=0), processing_class=tokenizer)["stop_words"] == ["cat"]
    of_trl = SimpleNamespace(generation_kwargs={"eos_token_id": cat})  # which may be a number, beside any processor
    assert "stop_words" not in planned(of_trl, SimpleNamespace(max_steps=0), processing_class=object())
