"""Feedback from whatever people hold it in: lists, frames, folders, several at once, Excel's tables."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from trl_ext import cli, feedback
from trl_ext.feedback import FeedbackError, Label, Pair, Rating
from trl_ext.launch import DataArguments, load_feedback, load_pairs, load_rows

PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
RECORDS = [Pair(f"p{i}", f"good {i}", f"bad {i}", None) for i in range(4)]
SHP = [{"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 0}]


def test_lists_frames_and_splits() -> None:
    plain = Dataset.from_list(PAIRS)
    for source in (PAIRS, pd.DataFrame(PAIRS), plain, plain.to_iterable_dataset(), DatasetDict({"only": plain})):
        assert feedback.read(source).records == RECORDS
    both = DatasetDict({"train": plain, "test": plain.select(range(1))})
    assert feedback.read(both, split="test").records == RECORDS[:1]
    with pytest.raises(FeedbackError, match=r"^dataset has several splits: name one of 'train', 'test'\.$"):
        feedback.read(both)
    with pytest.raises(FeedbackError, match=r"has no split 'dev': name one of 'train', 'test'"):
        feedback.read(both, split="dev")


def test_what_a_frame_lacks_is_missing() -> None:
    frame = pd.DataFrame({"prompt": ["p", "q"], "completion": ["a", "b"], "rating": [1.0, None]})
    with pytest.raises(FeedbackError, match="line 2, column 'rating': no rating was given"):
        feedback.read(frame)
    lists = pd.DataFrame({"completion": ["a"], "ratings": [[1, 2]]})
    assert feedback.read(lists).records == [Rating("", "a", (1.0, 2.0))]


def test_saved_folders(tmp_path: Path) -> None:
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(PAIRS), "test": Dataset.from_list(PAIRS[:1])}).save_to_disk(
        tmp_path / "two"
    )
    assert feedback.read(tmp_path / "one").records == RECORDS
    assert feedback.read(str(tmp_path / "two"), split="test").records == RECORDS[:1]
    (tmp_path / "other").mkdir()
    with pytest.raises(FeedbackError, match="was not written by save_to_disk: name a file in it"):
        feedback.read(tmp_path / "other")
    for load in (load_pairs, lambda data: load_rows(data, "prompts")):
        train, test = load(DataArguments(str(tmp_path / "two"), eval_split="test"))
        assert (len(train), len(test)) == (4, 1)


def test_a_name_on_the_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FeedbackError, match=r"^nobody/pairs is neither a file here nor a data set that can be loaded"
    ) as e:
        feedback.read("nobody/pairs")
    assert "\n" not in str(e.value)
    with pytest.raises(FeedbackError, match=r"^nobody/pairs is neither a file"):
        load_rows(DataArguments("nobody/pairs"), "prompts")


def test_what_holds_no_rows() -> None:
    with pytest.raises(TypeError, match="Rows cannot be read from int: give a file"):
        feedback.read(3)
    with pytest.raises(FeedbackError, match="line 2: str instead of a record"):
        feedback.read([PAIRS[0], "text"])


def test_several_at_once(tmp_path: Path) -> None:
    read = feedback.read([PAIRS, SHP])
    assert read.records == [*RECORDS, Pair("q", "b", "a", None)]
    assert (read.layout, read.source) == ("SHP", "dataset and dataset")
    rated = [{"completion": "a", "rating": 1}]
    with pytest.raises(FeedbackError, match="dataset has pairs, dataset has ratings: read them one by one"):
        feedback.read([PAIRS, rated])
    messages = [{"prompt": "p", **{n: [{"role": "assistant", "content": n}] for n in ("chosen", "rejected")}}]
    with pytest.raises(FeedbackError, match="messages, where others are texts"):
        feedback.read([PAIRS, messages])
    files = []
    for name, rows in (("a", PAIRS), ("b", SHP * 4)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataArguments(",".join(map(str, files)), eval_split=str(files[1]))
    assert len(load_pairs(data)[0]) == 8 and data.read_as == "; read as: pairs, SHP layout"
    assert load_rows(data, "prompts")[0]["prompt"][:] == ["p0", "p1", "p2", "p3", "q"]


# Excel ---------------------------------------------------------------------------------------------------------------

TABLES = {
    "ratings": ("Prompt;Completion;Rating\r\nWas ist schön?;Öl, Wein;3,5\r\nUnd?;3,5;4\r\n", [
        Rating("Was ist schön?", "Öl, Wein", (3.5,)), Rating("Und?", "3,5", (4.0,)),
    ]),
    "pairs": ('Prompt;Chosen;Rejected\r\nfür;"a;b";ä\r\n', [Pair("für", "a;b", "ä", None)]),
    "labels": ("PROMPT;Completion ; Label\r\nq;ß;Ja\r\nq;s;No\r\n", [Label("q", "s", False)]),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize("form", ["ratings", "pairs"])
def test_excels_tables(form: str, encoding: str, tmp_path: Path) -> None:
    text, records = TABLES[form]
    path = tmp_path / "table.csv"
    path.write_bytes(text.encode(encoding))
    read = feedback.read(path)
    assert read.records == records
    shown = "cp1252" if encoding == "cp1252" else "UTF-8"
    assert read.read_as == f"{form}, ';' between cells, {shown}"
    train, _ = load_rows(DataArguments(str(path), eval_split=str(path)), "prompts")
    assert train["prompt"][:] == [record.prompt for record in records]
    objective = "regression" if form == "ratings" else "pairwise"
    data = DataArguments(str(path), eval_split=str(path))
    assert load_feedback(data, objective).train["prompt"][:] == [record.prompt for record in records]


def test_a_bad_cell_of_excel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(TABLES["labels"][0].encode("cp1252"))
    with pytest.raises(FeedbackError, match="line 2, column 'label': 'Ja' is neither good nor bad"):
        feedback.read(path)
    assert feedback.read(path, on_error="drop").records == TABLES["labels"][1]


def test_what_may_be_one_number_or_two_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("completion;ratings\na;3,5\n", encoding="utf-8")
    with pytest.raises(FeedbackError, match="line 2, column 'ratings': '3,5' may be one number or several"):
        feedback.read(path)


def test_a_table_with_commas_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("prompt,completion,rating\nq;r,ä,1\n".encode("cp1252"))
    with pytest.raises(FeedbackError, match="line 2: byte 5 is not UTF-8"):
        feedback.read(path)


# What cannot be recognised, and what is converted --------------------------------------------------------------------


def test_lines_that_would_convert_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"query": "q", "good one": "a", "bad one": "b"}]
    file = tmp_path / "odd.jsonl"
    file.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    assert cli.main(["feedback", "check", str(file)]) == 1
    sentence, code = capsys.readouterr().err.split("\n", 1)
    assert sentence.startswith(f"trl-ext: error: {file} has the columns ['bad one', 'good one', 'query'], which are no")
    assert code.count("\n") == 5 and 'row["query"]' in code
    code = code.replace('"chosen": row["..."]', '"chosen": row["good one"]').replace('row["..."]', 'row["bad one"]')
    here = code.replace('open("odd.converted.jsonl"', f"open({str(tmp_path / 'new.jsonl')!r}")
    exec(here, {})
    assert feedback.read(tmp_path / "new.jsonl").records == [Pair("q", "a", "b", None)]


def run_convert(folder: Path, rows: list[dict[str, Any]], *more: str) -> list[Any]:
    file, out = folder / "in.jsonl", folder / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert cli.main(["feedback", "convert", str(file), "--out", str(out), *more]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_convert_writes_our_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*SHP, SHP[0] | {"labels": 1, "score_A": 3}]
    assert run_convert(tmp_path, rows) == [
        {"prompt": "q", "chosen": "b", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    said = capsys.readouterr().out
    assert "read as: pairs, SHP layout\ncolumns not used: score_A\n2 records written to" in said
    assert cli.main(["feedback", "convert", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_convert_leaves_out_what_it_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*SHP, SHP[0] | {"labels": 7}]
    assert run_convert(tmp_path, rows, "--drop") == [{"prompt": "q", "chosen": "b", "rejected": "a"}]
    assert "dropped: line 2, column 'labels': 7 is none of 1, 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "written"),
    [
        ([{"completion": "a", "ratings": [1, None]}], [{"prompt": "", "completion": "a", "ratings": [1.0, None]}]),
        (
            [{"prompt": "p", "completions": ["a", "b"], "ranks": [2, 1]}],
            [{"prompt": "p", "completions": ["a", "b"], "ranks": [2, 1]}],
        ),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b", "strength": 2}],
            [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 2.0}],
        ),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}],
            [{"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1.0}],
        ),
    ],
)
def test_what_is_written_is_read_again(rows: list[Any], written: list[Any], tmp_path: Path) -> None:
    assert run_convert(tmp_path, rows) == written
    assert repr(feedback.read(tmp_path / "out.jsonl").records) == repr(feedback.read(rows).records)


def test_convert_writes_prompts(tmp_path: Path) -> None:
    assert run_convert(tmp_path, [*SHP, *SHP], "--prompts") == [{"prompt": "q"}]


def test_column_and_columns_are_one(tmp_path: Path) -> None:
    rows = [{"q": "p", "text": "a", "rating": 3}]
    expected = [{"prompt": "p", "completion": "a", "ratings": [3.0]}]
    for number, given in enumerate(
        (["--column", "q=prompt", "--column", "text=completion"], ["--columns", "q=prompt", "text=completion"])
    ):
        (tmp_path / str(number)).mkdir()
        assert run_convert(tmp_path / str(number), rows, *given) == expected


def test_the_layouts_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["feedback", "layouts"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{layout.name} ({layout.form}): " in shown for layout in feedback.LAYOUTS)


def test_rows_without_prompts_get_lines_that_make_some(tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text('{"query": "q"}\n' * 3, encoding="utf-8")
    with pytest.raises(ValueError, match=r"odd\.jsonl has no 'prompt' column") as raised:
        load_rows(DataArguments(str(file), eval_rows=1), "prompts")
    (code,) = raised.value.__notes__
    assert 'json.dumps({"prompt": row["query"]})' in code


def test_recipes_say_how_to_do_without_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "shp.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (*SHP * 3, SHP[0] | {"labels": 7})), encoding="utf-8")
    for load in (load_pairs, lambda data: load_rows(data, "prompts")):
        with pytest.raises(FeedbackError, match="line 4, column 'labels'") as raised:
            load(DataArguments(str(file), eval_split=str(file)))
        assert raised.value.__notes__ == ["--on_error drop leaves such rows out, and says how many."]
        data = DataArguments(str(file), eval_split=str(file), on_error="drop")
        assert load(data)
        assert "1 rows dropped, the first for line 4, column 'labels'" in data.read_as


def test_an_index_with_a_name_is_a_column() -> None:
    frame = pd.DataFrame(PAIRS)
    assert feedback.read(frame.set_index("prompt")).records == feedback.read(frame).records


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_unicode_text_of_excel_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes("Prompt\tChosen\tRejected\r\nq\ta\tb\r\n".encode("utf-16"))
    with pytest.raises(FeedbackError, match=f"rows.{kind} is UTF-16, which Excel calls Unicode text: save it as CSV"):
        feedback.read(path)
