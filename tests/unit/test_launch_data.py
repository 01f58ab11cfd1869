"""Rows for the recipes: renamed, split, converted, from files as people have them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from trl_ext.launch import DataArguments, load_feedback, load_pairs, load_rows


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(prompts: int, each: int = 4) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "chosen": f"good {i} {k}", "rejected": f"bad {i} {k}", "strength": 1.0 + k}
        for i in range(prompts)
        for k in range(each)
    ]


def prompts_of(rows: Dataset) -> set[str]:
    return set(rows["prompt"])


def test_held_out_pairs_have_prompts_of_their_own(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", pairs(20))
    train, test = load_pairs(DataArguments(file, eval_rows=10))
    assert len(train) + len(test) == 80 and len(test) == 12, "whole prompts"
    assert not prompts_of(train) & prompts_of(test)
    assert train.column_names == ["prompt", "chosen", "rejected", "margin"] and set(train["margin"]) == {1, 2, 3, 4}
    one = load_pairs(DataArguments(jsonl(tmp_path / "one.jsonl", pairs(1, 30)), eval_rows=10))
    assert [len(rows) for rows in one] == [20, 10]


@pytest.mark.parametrize("name", ["rows", "pairs", "feedback"])
def test_a_second_file_to_evaluate_on(name: str, tmp_path: Path) -> None:
    train, test = (jsonl(tmp_path / f"{part}.jsonl", pairs(n)) for part, n in (("train", 5), ("test", 3)))
    data = DataArguments(train, eval_split=test)
    if name == "feedback":
        found = load_feedback(data, "binary")
        assert (len(found.train), len(found.test)) == (2 * 20, 2 * 12)
    else:
        assert [len(rows) for rows in (load_rows(data, "prompts") if name == "rows" else load_pairs(data))] == [20, 12]


def test_columns_are_renamed_in_files_of_every_kind(tmp_path: Path) -> None:
    rows = [{"question": f"p{i}", "text": f"a{i}", "stars": i % 5} for i in range(50)]
    data = DataArguments(
        jsonl(tmp_path / "rated.jsonl", rows),
        eval_rows=10,
        columns=["question=prompt", "text=completion", "stars=rating"],
    )
    assert load_rows(data, "prompts")[0].column_names == ["prompt", "completion", "rating"]
    found = load_feedback(data, "regression")
    assert (len(found.train), len(found.test)) == (40, 10) and found.judged is not None


def test_good_begins_where_it_does_in_training(tmp_path: Path) -> None:
    """The held-out answers' own scale would have its middle at 7."""
    train = [{"prompt": f"p{i}", "completion": "a", "rating": float(i)} for i in range(11)]
    test = [{"prompt": f"q{i}", "completion": "a", "rating": float(i)} for i in (4, 6, 10)]
    files = [jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    found = load_feedback(DataArguments(files[0], eval_split=files[1]), "binary")
    assert found.test["label"] == [False, True, True]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_an_answer_may_read_none(kind: str, tmp_path: Path) -> None:
    words = ["None", "NA", "null", "nan", "N/A"]
    between = "," if kind == "csv" else "\t"
    lines = [["prompt", "chosen", "rejected", "strength"], *([f"p{i}", word, "no", ""] for i, word in enumerate(words))]
    file = tmp_path / f"pairs.{kind}"
    file.write_text("".join(between.join(line) + "\n" for line in lines))
    train, test = load_pairs(DataArguments(str(file), eval_rows=1))
    assert sorted([*train["chosen"], *test["chosen"]]) == sorted(words)
    assert set(train["margin"]) == {0.0}, "an empty field holds nothing"


@pytest.mark.parametrize(("objective", "most"), [("pairwise", 5 * 180), ("probe", 5 * 180), ("ranking", 23)])
def test_many_answers_without_a_prompt_do_not_explode(objective: str, most: int, tmp_path: Path) -> None:
    """180 answers make 16,110 pairs, or one ranking that fits into no memory."""
    rows = [{"completion": f"answer {i}", "rating": float(i)} for i in range(200)]
    found = load_feedback(DataArguments(jsonl(tmp_path / "rated.jsonl", rows), eval_rows=20), objective)
    assert 20 <= len(found.train) <= most
    assert len(found.judged) == 20 and len(found.pairs) <= 5 * 20
    if objective == "ranking":
        assert max(len(row["completions"]) for row in found.train) == 8


def test_conversations_without_a_prompt_column(tmp_path: Path) -> None:
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": turns(f"q{i % 10}", f"a{i}"), "rejected": turns(f"q{i % 10}", f"b{i}")} for i in range(40)]
    file = jsonl(tmp_path / "pairs.jsonl", rows)
    for found in (
        load_pairs(DataArguments(file, eval_rows=8)),
        load_feedback(DataArguments(file, eval_rows=8), "probe"),
    ):
        train, test = found if isinstance(found, tuple) else (found.train, found.test)
        asked = [{prompt[0]["content"] for prompt in part["prompt"]} for part in (train, test)]
        assert len(asked[0]) == 8 and len(asked[1]) == 2 and not asked[0] & asked[1]
        assert {len(answer) for answer in train["chosen"]} == {1}
