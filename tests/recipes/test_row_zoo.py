"""Rows of every kind, drawn at random: through the recipes' readers and the trainers' checks each gives a result, or
one sentence with its row and column.

TRL_EXT_ZOO_ROWS=2000 draws so many data sets a test instead of a few.
"""

import csv
import json
import math
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from tests.helpers import CHAT_TEMPLATE, QUIET, word_tokenizer
from trl_ext import FeedbackRewardConfig, PPOConfig
from trl_ext.launch import DataArguments, load_feedback, load_pairs, load_rows
from trl_ext.ppo.checks import check_run
from trl_ext.reward_models.rows import check_written
from trl_ext.reward_models.trainer import REWARD_OBJECTIVES, Scale, checked, encode

EXAMPLES = int(os.environ.get("TRL_EXT_ZOO_ROWS", "20"))
ZOO = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=(Phase.generate,),
)
# What is said of a data set as a whole.
OF_ALL = re.compile(
    r"holds no feedback|no form of feedback|cannot be split|nothing can be learned|makes no (pair|ranking|good or bad)|"
    r"conversations without a prompt|are held out|has no '|holds no rows|give no answer a number|rescale them|"
    r"is empty: it needs|longer than max_length|have no chat template|has no chat template|but one rollout takes"
)
# What is said of one row; a line that is no record has no column.
OF_ROW = re.compile(r"(line \d+|[Rr]ow \d+ of \w+), column '\w+'[: ]|The prompt in row \d+ of \w+ |line \d+: ")


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


USER, A, B = turn("user", "the cat"), turn("assistant", "sat"), turn("assistant", "ran")
MESSAGES = st.sampled_from(
    [
        [USER],
        [turn("system", "the dog"), USER],
        [USER, A],
        [A],
        [A, USER],
        [USER, USER],
        [turn("critic", "the")],
        [turn("", "the")],
        [turn("user", None)],
        [turn("user", 7)],
        [turn("user", [{"type": "text", "text": "the"}])],
        [turn("user", [{"type": "image", "text": None}, {"type": "text", "text": "the"}])],
        [turn("user", [])],
        [turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
        [turn("tool", "3")],
        [{"content": "the"}],
        [{"from": "human", "value": "the"}],
        [turn("user", "the \ud83d")],
        ["the"],
        [[USER]],
    ]
)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", " ", "\n", "NaN", "3", "x" * 100_000, "\ud800", "\x00", "[", "[1]", "null", 10**400, 1e308]),
    st.lists(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.sampled_from(["a", "role"]), st.integers(), max_size=2),
    MESSAGES,
)
TEXTS = st.sampled_from(["the cat", "a dog sat", "on", "the bird flew under the tree"])
GOOD: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "pairs": {"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS},
    "margins": {"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS, "margin": st.sampled_from([0.5, 1, -2.0, None])},
    "conversations": {
        "prompt": st.sampled_from([[USER], "the cat"]),
        "chosen": st.sampled_from([[USER, A], [A]]),
        "rejected": st.sampled_from([[USER, B], [B]]),
    },
    "ratings": {"prompt": TEXTS, "completion": TEXTS, "rating": st.sampled_from([1, 2.5, "4", 5])},
    "labels": {"prompt": TEXTS, "completion": TEXTS, "label": st.sampled_from([True, False, 1, 0, "good"])},
    "rankings": {
        "prompt": TEXTS,
        "completions": st.sampled_from([["the", "a"], ["cat", "dog"]]),
        "ranks": st.sampled_from([[1, 2], [2, 1], [1, 1]]),
    },
}
OBJECTIVES = {
    "pairs": ["pairwise", "probe"],
    "margins": ["pairwise"],
    "conversations": ["pairwise"],
    "ratings": ["regression"],
    "labels": ["binary"],
    "rankings": ["ranking", "all_pairs"],
}


@st.composite
def rows_of(draw: st.DrawFn, columns: dict[str, st.SearchStrategy[Any]], most_odd: int = 2) -> list[dict[str, Any]]:
    """Three to six rows, in which some cells are odd and some are not there."""
    rows = [draw(st.fixed_dictionaries(columns)) for _ in range(draw(st.integers(3, 6)))]
    for _ in range(draw(st.integers(0, most_odd))):
        row, column = draw(st.sampled_from(rows)), draw(st.sampled_from(list(columns)))
        if draw(st.integers(0, 5)):
            row[column] = draw(ODD)
        else:
            row.pop(column, None)
    return rows


def dataset_of(rows: list[dict[str, Any]]) -> Dataset:
    """These rows; a missing cell is None."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, on_mixed_types="use_json")


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str | None:
    """A file of these rows; None where such a file cannot hold them."""
    path, names = folder / f"rows.{kind}", list(dict.fromkeys(name for row in rows for name in row))
    try:
        if kind in ("json", "jsonl"):
            lines = [json.dumps(row) for row in rows]
            path.write_text("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
        elif kind == "parquet":
            dataset_of(rows).to_parquet(path)
        else:
            with path.open("w", encoding="utf-8", newline="") as file:
                values = [[row.get(name) for name in names] for row in rows]
                cells = [
                    ["" if v is None else v if isinstance(v, str) else json.dumps(v) for v in row] for row in values
                ]
                if kind == "csv":
                    csv.writer(file).writerows([names, *cells])
                elif any(mark in cell for row in cells for cell in row for mark in "\t\r\n"):
                    return None  # TSV knows no quoting
                elif not all(any(row) for row in cells):
                    return None  # an empty line is no row
                else:
                    file.writelines("\t".join(row) + "\n" for row in [names, *cells])
    except Exception:  # Arrow knows no such column, UTF-8 no such text
        return None
    return str(path)


def told(call: Callable[[], Any]) -> Any:
    """What it gives; None where it refuses in one sentence that names the row and the column."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        said = str(error)
        assert "\n" not in said.strip() and len(said) < 700, said
        assert OF_ROW.search(said) or OF_ALL.search(said), f"{type(error).__name__}: {said}"
        return None


KINDS = ["jsonl", "json", "csv", "tsv", "parquet"]


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", GOOD)
def test_feedback_through_the_recipes_readers(form: str, kind: str) -> None:
    @ZOO
    @given(rows_of(GOOD[form]))
    def holds(rows: list[dict[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = written(Path(folder), kind, rows)
            if file is None:
                return
            data = DataArguments(file, eval_rows=1)
            if (pairs := told(lambda: load_pairs(data))) and form in ("pairs", "margins", "conversations"):
                assert len(pairs[0]) + len(pairs[1]) == len(rows), "none is dropped"
            for objective in OBJECTIVES[form]:
                loaded = told(lambda objective=objective: load_feedback(data, objective))
                if loaded and form != "ratings":  # ratings of one answer come together
                    assert len(loaded.train) + len(loaded.test) == len(rows), "none is dropped"

    holds()


PROMPTS = {"texts": {"prompt": TEXTS, "answer": ODD}, "conversations": {"prompt": st.just([USER])}}


def judge(**_: Any) -> list[float]:
    """A reward function that takes every column."""
    return []


def run_settings(folder: str, **changes: Any) -> PPOConfig:
    return PPOConfig(folder, per_device_train_batch_size=1, max_completion_length=4, **QUIET, **changes)


@pytest.mark.parametrize("kind", [*KINDS, "dataset"])
@pytest.mark.parametrize("form", PROMPTS)
def test_prompts_through_reader_and_checks(form: str, kind: str, tmp_path: Path) -> None:
    args, tokenizer = run_settings(str(tmp_path / "out")), word_tokenizer(CHAT_TEMPLATE)
    model = type("Model", (), {"config": LlamaConfig(vocab_size=25, max_position_embeddings=64)})()

    @ZOO
    @given(rows_of(PROMPTS[form]))
    def holds(rows: list[dict[str, Any]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if kind == "dataset":
                try:
                    loaded = [dataset_of(rows)]
                except Exception:  # what no Dataset can hold
                    return
            else:
                file = written(Path(folder), kind, rows)
                loaded = told(lambda: load_rows(DataArguments(file, eval_rows=1), "prompts")) if file else None
            if not loaded:
                return
            train, test = loaded[0], loaded[1] if len(loaded) > 1 else None
            assert len(train) + (len(test) if test else 0) == len(rows), "none is dropped"
            if not told(lambda: check_run(args, train, test, tokenizer, [judge], model)):
                return
            for row in train:  # what was let through is what a model can read
                prompt = row["prompt"]
                ids = (
                    tokenizer(prompt)["input_ids"]
                    if isinstance(prompt, str)
                    else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)[
                        "input_ids"
                    ]
                )
                assert 0 < len(ids) <= 60 and max(ids) < 25

    holds()


@pytest.mark.parametrize("form", GOOD)
def test_rows_through_the_reward_trainers_checks(form: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    columns = GOOD[form] | {"weight": st.just(1.0)} if form in ("ratings", "labels") else GOOD[form]

    @ZOO
    @given(rows_of(columns))
    def holds(rows: list[dict[str, Any]]) -> None:
        try:
            dataset = dataset_of(rows)
        except Exception:  # what no Dataset can hold
            return
        for objective in OBJECTIVES[form]:
            args = FeedbackRewardConfig(str(tmp_path), objective=objective, max_length=64, **QUIET)

            def prepared(objective: str = objective, args: Any = args) -> Dataset:
                ready = checked(dataset, "train_dataset", objective)
                check_written(ready, "train_dataset", tokenizer, None, args.max_length)
                if REWARD_OBJECTIVES[objective].loss is None:
                    return ready
                return encode(ready, "train_dataset", tokenizer, args, Scale.of(ready, objective))

            ready = told(prepared)
            if ready is None:
                continue
            if "sequences" in ready.column_names:
                numbers = [x for row in ready for x in [*row["targets"], *row["weights"]]]
                assert all(math.isfinite(x) for x in numbers)
                short = sum(all(len(str(answer)) < 1000 for answer in row.values()) for row in rows)
                assert len(ready) >= short, "none is dropped but for its length"
            else:
                assert len(ready) == len(rows)
                kinds = {type(row[name]) for row in ready for name in ("chosen", "rejected")}
                assert len(kinds) == 1, "texts, or messages"

    holds()
