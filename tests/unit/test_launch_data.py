"""Rows for the recipes: renamed, split, converted, from files as people have them."""

import csv
import json
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import feedback
from trl_ext.feedback import FeedbackError
from trl_ext.launch import DataArguments, load_feedback, load_pairs, load_prompts, load_rows
from trl_ext.launch.data import RewardData, _held_out_source

TURN = {"role": "user", "content": "the cat"}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(prompts: int, each: int = 4) -> list[dict[str, Any]]:
    return [
        {"prompt": f"p{i}", "chosen": f"good {i} {k}", "rejected": f"bad {i} {k}", "strength": 1.0 + k}
        for i in range(prompts)
        for k in range(each)
    ]


def halves(rows: RewardData) -> tuple[Dataset, Dataset]:
    return rows.train, rows.test


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


@pytest.mark.parametrize("kind", ["json in jsonl", "pandas", "datasets"])
def test_conversations_in_the_cells_of_a_table(kind: str, tmp_path: Path) -> None:
    """pandas and datasets write what Python does."""
    asked = [{"role": "user", "content": f'it\'s {i} }} {{ "so"'} for i in range(40)]
    begin = [{"role": "user", "content": "Hm?\nWhat?"}, {"role": "assistant", "content": "Ask."}]
    rows, file = [{"prompt": [*begin, one]} for one in asked], tmp_path / "x.csv"
    if kind == "pandas":
        pd.DataFrame(rows).to_csv(file, index=False)
    elif kind == "datasets":
        Dataset.from_list(rows).to_csv(file)
    else:
        file = Path(jsonl(tmp_path / "x.jsonl", [{"prompt": json.dumps(row["prompt"])} for row in rows]))
    train, test = load_rows(DataArguments(str(file), eval_rows=4), "prompts")
    said = {row["prompt"][-1]["content"]: row["prompt"] for part in (train, test) for row in part}
    assert said == {row["prompt"][-1]["content"]: row["prompt"] for row in rows}


def test_texts_that_only_look_like_messages_stay_texts(tmp_path: Path) -> None:
    cells = ['[{"role": "engineer", "salary": 5}]', "[{{}}]", "[{[1]}]", r"['\d+']", "[{'role': 1}]", "[a] b", "[{"]
    file = jsonl(tmp_path / "x.jsonl", [{"prompt": cell, "truth": json.dumps([TURN])} for cell in cells * 6])
    train, _ = load_rows(DataArguments(file, eval_rows=4), "prompts")
    assert set(train["prompt"]) <= set(cells) and set(train["truth"]) == {json.dumps([TURN])}


def test_prompts_are_what_the_reward_model_reads(tmp_path: Path) -> None:
    """A text that is the first turn of the answers' conversations; and what the system says."""

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    beside = [{"prompt": f"q{i}", "chosen": turns(f"q{i}", "a"), "rejected": turns(f"q{i}", "b")} for i in range(40)]
    judged = [{"prompt": f"q{i}", "completion": turns("", "a")[1:], "label": True} for i in range(40)]
    told = [
        {"prompt": turns(f"q{i}"), "system": "Be brief.", "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]}
        for i in range(40)
    ]
    system = [{"role": "system", "content": "Be brief."}]
    for number, (rows, before) in enumerate(((beside, []), (judged, []), (told, system))):
        file = jsonl(tmp_path / f"{number}.jsonl", [{**row, "mine": i} for i, row in enumerate(rows)])
        train, _ = load_rows(DataArguments(file, eval_rows=4), "prompts")
        first = next(row["prompt"] for row in train if row["prompt"][-1]["content"] == "q7")
        assert first == [*before, *turns("q7")] == feedback.read(file).records[7].prompt
        assert "mine" in train.column_names, "reward functions ask for it"


def test_a_prompt_that_its_conversations_do_not_begin_with_is_refused(tmp_path: Path) -> None:
    """As the reward model refuses it: as a text it would be asked without the chat template."""
    says = [TURN, {"role": "assistant", "content": "sat"}]
    file = jsonl(tmp_path / "x.jsonl", [{"prompt": "a dog", "chosen": says, "rejected": says}] * 20)
    with pytest.raises(
        FeedbackError, match=r"^Row 0, column 'prompt': a text that the conversations do not begin with"
    ):
        load_rows(DataArguments(file, eval_rows=4), "prompts")


def test_a_file_among_several_sources_has_no_split(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "mine.jsonl", pairs(20))
    for sources in (f"{file},some/name", f"some/name,{file}"):
        with pytest.raises(ValueError, match=r"the file '.*mine.jsonl' has no splits"):
            _held_out_source(DataArguments(sources, eval_split="test"))


def test_held_out_rows_have_prompts_of_their_own(tmp_path: Path) -> None:
    """Also rows of feedback that are read for their prompts, each as often as it is there."""
    rated = [{"prompt": f"p{i}", "completion": f"c {i} {k}", "rating": k} for i in range(20) for k in range(4)]
    train, test = load_rows(DataArguments(jsonl(tmp_path / "rated.jsonl", rated), eval_rows=10), "prompts")
    assert len(train) + len(test) == 80 and len(test) == 12, "whole prompts"
    assert not prompts_of(train) & prompts_of(test)
    once = [{"prompt": f"p{i}"} for i in range(40)]
    train, test = load_rows(DataArguments(jsonl(tmp_path / "once.jsonl", once), eval_rows=10), "prompts")
    expected = Dataset.from_list(once).train_test_split(test_size=10, seed=0)
    assert (train["prompt"], test["prompt"]) == (expected["train"]["prompt"], expected["test"]["prompt"])
    two = [{"prompt": p} for p in "aabb"]
    train, test = load_rows(DataArguments(jsonl(tmp_path / "two.jsonl", two), eval_rows=3), "prompts")
    assert len(prompts_of(train)) == len(prompts_of(test)) == 1
    same = [{"prompt": "p"}] * 20
    train, test = load_rows(DataArguments(jsonl(tmp_path / "same.jsonl", same), eval_rows=5), "prompts")
    assert (len(train), len(test)) == (15, 5), "one prompt cannot be held out"


def test_prompts_that_are_left_out_are_counted_and_columns_named(tmp_path: Path) -> None:
    twice = [{"prompt": p, "topic": i} for i, p in enumerate("abab")]
    rows, said = load_prompts(jsonl(tmp_path / "twice.jsonl", twice))
    assert rows == twice[:2] and said == "2 rows left out, whose prompt was there before"
    assert load_prompts(jsonl(tmp_path / "once.jsonl", twice[:2])) == (twice[:2], "")
    talk = [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "source": "x"}]
    assert load_prompts(jsonl(tmp_path / "talks.jsonl", talk))[1].endswith("; columns not used: source")


@pytest.mark.parametrize("name", ["rows", "pairs", "feedback"])
def test_a_second_file_to_evaluate_on(name: str, tmp_path: Path) -> None:
    train, test = (jsonl(tmp_path / f"{part}.jsonl", pairs(n)) for part, n in (("train", 5), ("test", 3)))
    data = DataArguments(train, eval_split=test)
    if name == "feedback":
        loaded = load_feedback(data, "binary")
        assert (len(loaded.train), len(loaded.test)) == (2 * 20, 2 * 12)
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
    loaded = load_feedback(data, "regression")
    assert (len(loaded.train), len(loaded.test)) == (40, 10) and loaded.held_out is not None


def test_good_begins_where_it_does_in_training(tmp_path: Path) -> None:
    """The held-out answers' own scale would have its middle at 7."""
    train = [{"prompt": f"p{i}", "completion": "a", "rating": float(i)} for i in range(11)]
    test = [{"prompt": f"q{i}", "completion": "a", "rating": float(i)} for i in (4, 6, 10)]
    files = [jsonl(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    loaded = load_feedback(DataArguments(files[0], eval_split=files[1]), "binary")
    assert loaded.test["label"] == [False, True, True]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_an_answer_may_read_none(kind: str, tmp_path: Path) -> None:
    words = ["None", "NA", "null", "nan", "N/A"]
    between = "," if kind == "csv" else "\t"
    lines = [["prompt", "chosen", "rejected", "strength"], *([f"p{i}", word, "no", ""] for i, word in enumerate(words))]
    file = tmp_path / f"pairs.{kind}"
    file.write_text("".join(between.join(line) + "\n" for line in lines))
    train, test = load_pairs(DataArguments(str(file), eval_rows=1))
    assert sorted([*train["chosen"], *test["chosen"]]) == sorted(words)
    assert train.column_names == ["prompt", "chosen", "rejected"], "an empty field holds nothing"


@pytest.mark.parametrize(("objective", "most"), [("pairwise", 5 * 180), ("probe", 5 * 180), ("ranking", 23)])
def test_many_answers_without_a_prompt_do_not_explode(objective: str, most: int, tmp_path: Path) -> None:
    """180 answers make 16,110 pairs, or one ranking that fits into no memory."""
    rows = [{"completion": f"answer {i}", "rating": float(i)} for i in range(200)]
    loaded = load_feedback(DataArguments(jsonl(tmp_path / "rated.jsonl", rows), eval_rows=20), objective)
    assert 20 <= len(loaded.train) <= most
    assert len(loaded.held_out) == 20 and len(loaded.pairs) <= 5 * 20
    if objective == "ranking":
        assert max(len(row["completions"]) for row in loaded.train) == 8


def test_conversations_without_a_prompt_column(tmp_path: Path) -> None:
    def turns(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": turns(f"q{i % 10}", f"a{i}"), "rejected": turns(f"q{i % 10}", f"b{i}")} for i in range(40)]
    file = jsonl(tmp_path / "pairs.jsonl", rows)
    for loaded in (
        load_pairs(DataArguments(file, eval_rows=8)),
        load_feedback(DataArguments(file, eval_rows=8), "probe"),
    ):
        train, test = loaded if isinstance(loaded, tuple) else (loaded.train, loaded.test)
        asked = [{prompt[0]["content"] for prompt in part["prompt"]} for part in (train, test)]
        assert len(asked[0]) == 8 and len(asked[1]) == 2 and not asked[0] & asked[1]
        assert {len(answer) for answer in train["chosen"]} == {1}


# One reader ----------------------------------------------------------------------------------------------------------

OBJECTIVES = ["pairwise", "probe", "binary", "ranking", "all_pairs"]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("recipe", ["dpo", "reward", "ppo"])
def test_digits_in_a_cell_stay_text(recipe: str, kind: str, tmp_path: Path) -> None:
    between = "," if kind == "csv" else "\t"
    lines = [["prompt", "chosen", "rejected"], *([f"0{i}", "02", "1e3"] for i in range(4))]
    file = tmp_path / f"pairs.{kind}"
    file.write_text("".join(between.join(line) + "\n" for line in lines), encoding="utf-8")
    data = DataArguments(str(file), eval_rows=1)
    if recipe == "ppo":
        parts = load_rows(data, "prompts")
    else:
        parts = load_pairs(data) if recipe == "dpo" else halves(load_feedback(data, "pairwise"))
    rows = [row for part in parts for row in part]
    assert sorted(row["prompt"] for row in rows) == ["00", "01", "02", "03"]
    assert all((row["chosen"], row["rejected"]) == ("02", "1e3") for row in rows)


def test_a_text_that_looks_like_a_date_stays_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "2020-01-01", "rejected": "2021-01-01"} for i in range(4)]
    data = DataArguments(jsonl(tmp_path / "pairs.jsonl", rows), eval_rows=1)
    for parts in (load_pairs(data), load_rows(data, "prompts")):
        assert {row["chosen"] for part in parts for row in part} == {"2020-01-01"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "strength": "lots"},
            "column 'strength': 'lots' is not a number",
        ),
        ({"prompt": "p", "chosen": None, "rejected": "b"}, "column 'chosen': missing: give a text"),
        ({"prompt": "p", "chosen": 7, "rejected": "b"}, "column 'chosen': 7: give a text, or a list of messages"),
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "column 'rejected': empty: give a text"),
    ],
)
def test_a_bad_pair_is_named_by_its_line_and_column(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "pairs.jsonl", [*pairs(2), row, *pairs(2)])
    data = DataArguments(file, eval_rows=2)
    loaders = [load_pairs, *(partial(load_feedback, objective=objective) for objective in OBJECTIVES)]
    for load in loaders:
        with pytest.raises(FeedbackError) as raised:
            load(data)
        assert str(raised.value).startswith(f"{file}: line 9, column ") and message in str(raised.value)


TEXTS = st.one_of(
    st.text(), st.sampled_from(["02", "1e3", "NA", "None", "true", "2020-01-01", " x ", '"', "[1]", "\u2028"])
)
ANSWERS = TEXTS.filter(lambda text: text.strip())
PAIRS = st.lists(
    st.tuples(TEXTS, ANSWERS, ANSWERS, st.none() | st.floats(0.1, 10)),
    min_size=3,
    unique_by=(lambda r: r[0], lambda r: r[1]),
)


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"pairs.{kind}"
    cells = [
        ["" if cell is None else cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()]
        for row in rows
    ]
    if kind == "jsonl":
        return jsonl(path, rows)
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([rows[0].keys(), *cells])
    elif kind == "tsv":
        path.write_bytes("".join("\t".join(line) + "\n" for line in [rows[0].keys(), *cells]).encode())
    else:
        Dataset.from_list(rows).to_parquet(path)
    return str(path)


def by_key(row: Any) -> str:
    """A message is the same however a table orders its keys."""
    return json.dumps(row, sort_keys=True)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@settings(max_examples=25, deadline=None)
@given(PAIRS, st.sampled_from(["texts", "messages", "conversations"]))
def test_pairs_are_the_same_from_every_file(kind: str, drawn: list[Any], form: str) -> None:
    expected, rows = [], []
    for prompt, chosen, rejected, strength in drawn:
        if kind == "tsv":
            prompt, chosen, rejected = (re.sub(r"[\t\r\n]", "_", text) for text in (prompt, chosen, rejected))
        items: list[Any] = [prompt, chosen, rejected]
        if form != "texts":
            roles = "user", "assistant", "assistant"
            items = [[{"role": role, "content": text}] for role, text in zip(roles, items, strict=True)]
        expected.append((*items, strength or 0.0))
        if form == "conversations":
            rows.append({"chosen": items[0] + items[1], "rejected": items[0] + items[2], "strength": strength})
        else:
            rows.append({"prompt": items[0], "chosen": items[1], "rejected": items[2], "strength": strength})
    with tempfile.TemporaryDirectory() as folder:
        data = DataArguments(written(Path(folder), kind, rows), eval_rows=1)
        for parts in (load_pairs(data), halves(load_feedback(data, "pairwise"))):
            assert all(len(part) > 0 for part in parts)
            loaded = [(r["prompt"], r["chosen"], r["rejected"], r.get("margin", 0.0)) for part in parts for r in part]
            assert sorted(map(by_key, loaded)) == sorted(map(by_key, expected))


def test_pairs_of_texts_without_a_prompt_keep_what_both_begin_with(tmp_path: Path) -> None:
    rows = [{"chosen": f"The {i} is blue.", "rejected": f"The {i} is green."} for i in range(4)]
    train, test = load_pairs(DataArguments(jsonl(tmp_path / "pairs.jsonl", rows), eval_rows=1))
    assert set(train["prompt"]) == set(test["prompt"]) == {""}
    assert {text[:4] for part in (train, test) for text in part["chosen"]} == {"The "}


def test_margins_of_trl_are_kept(tmp_path: Path) -> None:
    margins = [0.0, -1.5, None, 3]
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "margin": m} for i, m in enumerate(margins)]
    parts = load_pairs(DataArguments(jsonl(tmp_path / "pairs.jsonl", rows), eval_rows=1))
    assert {row["prompt"]: row.get("margin", 0) for part in parts for row in part} == {
        "p0": 0,
        "p1": -1.5,
        "p2": 0,
        "p3": 3,
    }


def test_ratings_make_pairs_for_dpo(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": text, "rating": len(text)} for i in range(4) for text in ("a", "bb")]
    parts = load_pairs(DataArguments(jsonl(tmp_path / "rated.jsonl", rows), eval_rows=1))
    assert [(r["chosen"], r["rejected"], r["margin"]) for part in parts for r in part] == [("bb", "a", 1.0)] * 4


def test_a_column_to_rename_that_is_not_there(tmp_path: Path) -> None:
    data = DataArguments(jsonl(tmp_path / "pairs.jsonl", pairs(4)), eval_rows=1, columns=["qustion=prompt"])
    with pytest.raises(FeedbackError, match=r"has no column 'qustion' to rename, only \['chosen', 'prompt',"):
        load_pairs(data)


def test_rows_for_ppo_from_lines_of_unlike_columns(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", **({"solution": [i, "x"]} if i % 2 else {"city": 2.5})} for i in range(6)]
    for name in ("rows.jsonl", "rows.json"):
        parts = load_rows(DataArguments(jsonl(tmp_path / name, rows), eval_rows=2), "prompts")
        loaded = {row["prompt"]: (row["solution"], row["city"]) for part in parts for row in part}
        assert loaded == {f"p{i}": ([i, "x"], None) if i % 2 else (None, 2.5) for i in range(6)}


def test_a_broken_line_of_prompts_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text("prompt,city\np0,a\np1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts.csv' cannot be read: line 3: 1 fields under 2 columns"):
        load_rows(DataArguments(str(file)), "prompts")


def test_a_wrong_column_is_told_before_too_few_rows(tmp_path: Path) -> None:
    data = DataArguments(jsonl(tmp_path / "one.jsonl", [{"query": "a"}]))
    with pytest.raises(ValueError, match=r"one\.jsonl has no 'prompt' column, only \['query'\]: rename yours"):
        load_rows(data, "prompts")
    with pytest.raises(FeedbackError, match=r"has the columns \['query'\], which are no form of feedback"):
        load_pairs(data)


def test_an_unknown_answer_to_bad_rows_is_refused_though_no_row_is_bad() -> None:
    with pytest.raises(ValueError, match=r"^on_error is 'dorp': choose raise or drop\.$"):
        DataArguments("prompts.jsonl", on_error="dorp")


def test_several_files_of_prompts_keep_what_they_share_and_name_what_they_do_not(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "answer": "x", "by": 1}])
    two = jsonl(tmp_path / "two.jsonl", [{"prompt": "b", "answer": "y", "place": "z"}])
    data = DataArguments(f"{one},{two}", eval_split=two)
    train, _ = load_rows(data, "prompts")
    assert train[:] == {"prompt": ["a", "b"], "answer": ["x", "y"]}
    assert data.read_as.endswith("not used: by, place")


def test_feedback_without_a_prompt_is_counted_where_ppo_wants_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "chosen": "x", "rejected": "y"} for prompt in ("a", " ", "b")]
    read = feedback.read_prompts(jsonl(tmp_path / "pairs.jsonl", rows))
    assert read.dataset["prompt"][:] == ["a", "b"]
    assert [str(problem) for problem in read.dropped] == ["line 2, column 'prompt': there is no prompt to answer"]
    with pytest.raises(ValueError, match="on_error is 'dorp'"):
        feedback.read_prompts(jsonl(tmp_path / "more.jsonl", rows), on_error="dorp")


@pytest.mark.parametrize(
    ("dataset", "setting", "sentence"),
    [
        ("demo", {"train_split": "test"}, "train_split is 'test', but the demo has rows of its own"),
        ("demo", {"eval_split": "test"}, "eval_split is 'test', but the demo has rows of its own"),
        ("demo", {"eval_rows": 4}, "eval_rows is 4, but the demo has rows of its own"),
        ("demo", {"columns": ["a=b"]}, "columns is ['a=b'], but the demo has rows of its own"),
        ("rows.jsonl,more.csv", {"train_split": "dev"}, "train_split is 'dev', but the file 'rows.jsonl,more.csv' has"),
    ],
)
def test_settings_that_nothing_reads_are_refused(dataset: str, setting: dict[str, Any], sentence: str) -> None:
    for load in (lambda data: load_rows(data, "prompts"), load_pairs, lambda data: load_feedback(data, "pairwise")):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            load(DataArguments(dataset, **setting))
