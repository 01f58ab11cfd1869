"""Feedback read, converted and looked at, on records small enough to count by hand."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from trl_ext import cli, feedback
from trl_ext.feedback import FeedbackError, Label, Pair, Ranking, Rating
from trl_ext.feedback.records import key_of

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
PARIS, LYON = [{"role": "assistant", "content": "Paris."}], [{"role": "assistant", "content": "Lyon."}]


def jsonl(folder: Path, *rows: Any, name: str = "feedback.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


# Reading -------------------------------------------------------------------------------------------------------------

FORMS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "ratings": (
        [{"prompt": "p", "completion": "a", "ratings": [1, None, 3]}],
        Rating("p", "a", (1.0, math.nan, 3.0)),
    ),
    "rankings": (
        [{"prompt": CHAT, "completions": [PARIS, LYON, PARIS], "ranks": [1, 2, 1]}],
        Ranking(CHAT, (PARIS, LYON, PARIS), (1, 2, 1)),
    ),
    "pairs": ([{"prompt": CHAT, "chosen": PARIS, "rejected": LYON, "strength": 2}], Pair(CHAT, PARIS, LYON, 2.0)),
    "labels": ([{"prompt": "p", "completion": "a", "label": False}], Label("p", "a", False)),
}


def same(a: Any, b: Any) -> bool:
    """Whatever the order of keys, which files of columns do not keep; NaN is NaN."""
    return type(a) is type(b) and json.dumps(asdict(a), sort_keys=True) == json.dumps(asdict(b), sort_keys=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset"])
def test_every_form_from_every_kind_of_file(form: str, kind: str, tmp_path: Path) -> None:
    rows, expected = FORMS[form]
    source: Any = tmp_path / f"feedback.{kind}"
    if kind == "jsonl":
        source = jsonl(tmp_path, *rows)
    elif kind == "json":
        source.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(source)
    else:
        source = Dataset.from_list(rows)
    read = feedback.read(source)
    assert read.form == form
    assert len(read.records) == 1 and same(read.records[0], expected)


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_tables_as_text(suffix: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / f"ratings.{suffix}"
    text = '"a ""quoted"" answer"' if suffix == "csv" else 'a "quoted" answer'
    path.write_text(separator.join(["text", "ratings"]) + f"\n{text}{separator}1 2 3\n", encoding="utf-8")
    read = feedback.read(path, columns={"text": "completion"})
    assert read.records == [Rating("", 'a "quoted" answer', (1.0, 2.0, 3.0))]


def test_lists_in_a_table_are_json(tmp_path: Path) -> None:
    path = tmp_path / "rankings.csv"
    frame = pd.DataFrame({"prompt": ["p"], "completions": [json.dumps(["a", "b"])], "ranks": ["[2, 1]"]})
    frame.to_csv(path, index=False)
    assert feedback.read(path).records == [Ranking("p", ("a", "b"), (2, 1))]


def test_several_raters_of_one_answer_come_together(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": c, "rating": r} for c, r in (("a", 1), ("b", 5), ("a", 2.5))]
    assert feedback.read(jsonl(tmp_path, *rows)).records == [Rating("p", "a", (1.0, 2.5)), Rating("p", "b", (5.0,))]


@pytest.mark.parametrize(
    ("word", "label"),
    [("good", True), ("Bad ", False), (1, True), (0.0, False), ("yes", True), (True, True), (-1, False)],
)
def test_words_for_good_and_bad(word: Any, label: bool) -> None:
    rows = Dataset.from_list([{"completion": "a", "label": word}])
    assert feedback.read(rows).records == [Label("", "a", label)]


BAD: list[tuple[dict[str, Any] | str, str]] = [
    ({"completion": "a", "rating": "lots"}, "column 'rating': 'lots' is not a number"),
    ({"completion": "a", "rating": True}, "column 'rating': True is not a number"),
    ({"completion": "a", "rating": 1e999}, "column 'rating': inf is not a number"),
    ({"completion": "a", "ratings": []}, "column 'ratings': no rating was given"),
    ({"completion": "a", "ratings": [None]}, "column 'ratings': no rating was given"),
    ({"completion": " ", "rating": 1}, "column 'completion': empty"),
    ({"completion": None, "rating": 1}, "column 'completion': missing"),
    (
        {"completion": [{"content": "a"}], "rating": 1},
        "column 'completion': [{'content': 'a'}]: give a text, or a list",
    ),
    ({"prompt": 7, "completion": "a", "rating": 1}, "column 'prompt': 7"),
    ({"completions": ["a"], "ranks": [1]}, "column 'completions': a ranking needs two"),
    ({"completions": ["a", "b"], "ranks": [1]}, "column 'ranks': 1 ranks for 2 completions"),
    ({"completions": ["a", "b"], "ranks": [0, 1]}, "column 'ranks': [0, 1] are not whole numbers from 1"),
    ({"completions": ["a", "b"], "ranks": [1, 1.5]}, "column 'ranks': [1, 1.5] are not whole numbers from 1"),
    ({"completions": "a, b", "ranks": [1, 2]}, "column 'completions': 'a, b' is not a list"),
    ({"chosen": "a", "rejected": ""}, "column 'rejected': empty"),
    ({"chosen": "a", "rejected": "b\ud800"}, "column 'rejected': half of a surrogate pair"),
    ({"prompt": CHAT, "chosen": PARIS, "rejected": "b"}, "column 'rejected': a text, where others are messages"),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "column 'chosen': a text, where others are messages"),
    ({"chosen": PARIS, "rejected": LYON}, "column 'prompt': the conversations begin with no message in common"),
    (
        {"prompt": "Why?", "chosen": [*CHAT, *PARIS], "rejected": [*CHAT, *LYON]},
        "column 'prompt': a text that the conversations do not begin with",
    ),
    ({"chosen": "a", "rejected": "b", "margin": "wide"}, "column 'margin': 'wide' is not a number"),
    ({"completion": "a", "rating": 10**400}, "is not a number"),
    ({"chosen": "a", "rejected": "b", "strength": -1}, "column 'strength': -1 is not above 0"),
    ({"completion": "a", "label": "meh"}, "column 'label': 'meh' is neither good nor bad"),
    ("{broken", "not JSON ("),
    ("[1, 2]", "not a JSON object"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_record_is_named_or_listed(row: Any, message: str, tmp_path: Path) -> None:
    form = (
        "rankings"
        if "completions" in row
        else "pairs"
        if "chosen" in row
        else "labels"
        if "label" in row
        else "ratings"
    )
    good = FORMS[form][0][0]
    path = jsonl(tmp_path, good, row, good)
    with pytest.raises(FeedbackError) as raised:
        feedback.read(path, form)
    whole_line = "JSON" in message  # no column is at fault
    assert str(raised.value).startswith(f"{path}: line 2: " if whole_line else f"{path}: line 2, column ")
    assert message in str(raised.value)
    read = feedback.read(path, form, on_error="drop")
    assert [problem.line for problem in read.dropped] == [2]
    assert message in str(read.dropped[0])
    assert len(read.records) == (1 if form == "ratings" else 2)


def test_broken_unicode_names_its_line(tmp_path: Path) -> None:
    for suffix, header in (("jsonl", b""), ("csv", b"completion,rating\n")):
        good = b'{"completion": "a", "rating": 1}' if suffix == "jsonl" else b"a,1"
        path = tmp_path / f"feedback.{suffix}"
        bad = good.replace(b"1", b"lots" if suffix == "csv" else b'"lots"')
        path.write_bytes(header + good + b"\n\xff\xfe\n" + good.replace(b"a", b"b", 1) + b"\n" + bad)
        line = 2 + header.count(b"\n")
        with pytest.raises(FeedbackError, match=rf"line {line}: byte 1 is not UTF-8"):
            feedback.read(path)
        read = feedback.read(path, on_error="drop")
        assert [problem.line for problem in read.dropped] == [line, line + 2]


def test_a_line_that_is_no_text_takes_its_whole_record_along(tmp_path: Path) -> None:
    """And no other: its quotes count."""
    path = tmp_path / "feedback.csv"
    cells = ('"First.\nIl a été là.\nLast."', '"one\nd\'été"', "fine")
    rows = ["prompt,completion,rating", *(f"q{i},{cell},{i}" for i, cell in enumerate(cells))]
    path.write_bytes("\n".join(rows).encode("latin-1"))
    read = feedback.read(path, on_error="drop")
    assert [(record.prompt, record.completion) for record in read.records] == [("q2", "fine")]
    assert [problem.line for problem in read.dropped] == [3, 6] and "is not UTF-8" in str(read.dropped[0])


def test_keys_without_a_value_are_no_difference() -> None:
    message = {"role": "user", "content": "hi"}
    assert key_of([message]) == key_of([{**message, "name": None}]) != key_of([{**message, "name": "x"}])


def test_a_line_with_too_few_fields(tmp_path: Path) -> None:
    path = tmp_path / "feedback.csv"
    path.write_text("completion,rating\na,1\nb\nc,2,3\n", encoding="utf-8")
    read = feedback.read(path, on_error="drop")
    assert [str(problem) for problem in read.dropped] == [
        "line 3: 1 fields under 2 columns",
        "line 4: 3 fields under 2 columns",
    ]


def test_a_line_of_10_megabytes(tmp_path: Path) -> None:
    for suffix in ("jsonl", "csv"):
        path = tmp_path / f"long.{suffix}"
        text = "x" * 10_000_000
        row = json.dumps({"completion": text, "rating": 1}) if suffix == "jsonl" else f"completion,rating\n{text},1"
        path.write_text(row, encoding="utf-8")
        assert len(feedback.read(path).records[0].completion) == 10_000_000


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "excel.csv"
    path.write_text("completion,rating\na,1\n", encoding="utf-8-sig")
    assert feedback.read(path).records == [Rating("", "a", (1.0,))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "holds no feedback."),
        ("empty.csv", "completion,rating\n", "holds no feedback."),
        ("odd.jsonl", '{"question": "a"}', r"has the columns \['question'\], which are no form of feedback"),
        ("file.txt", "a", "is of no known kind: give one of .jsonl"),
        ("object.json", "{}", "holds dict, not a list"),
        ("broken.json", "[", "is not JSON"),
        ("broken.parquet", "a", "is not a Parquet file"),
    ],
)
def test_files_without_feedback(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(FeedbackError, match=message):
        feedback.read(tmp_path / name)


def test_a_json_file_may_hold_a_record_a_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"completion": text, "rating": 1} for text in "ab"), name="ratings.json")
    assert feedback.read(path).records == [Rating("", "a", (1.0,)), Rating("", "b", (1.0,))]


def test_what_is_read_may_have_a_name() -> None:
    with pytest.raises(FeedbackError, match=r"^hub/ratings: line 1, column 'rating'"):
        feedback.read(Dataset.from_list([{"completion": "a", "rating": "x"}]), name="hub/ratings")


def test_nothing_left_names_the_first_reason(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"completion": "a", "rating": "x"}, {"completion": "b", "rating": "y"})
    with pytest.raises(FeedbackError, match=r"all 2 records were dropped, the first for line 1, column 'rating'"):
        feedback.read(path, on_error="drop")


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match=r"^The feedback file 'none\.csv' does not exist\.$"):
        feedback.read("none.csv")


# Converting ----------------------------------------------------------------------------------------------------------

RATED = feedback.Feedback(
    "ratings",
    [
        Rating("p", "a", (1.0, 2.0)),
        Rating("p", "b", (2.0, 5.0)),
        Rating("p", "c", (1.5, math.nan)),
        Rating("q", "d", (4.0,)),
    ],
    "here",
)
RANKED = feedback.Feedback("rankings", [Ranking("p", ("a", "b", "c", "d"), (2, 1, 2, 4))], "here")
LABELLED = feedback.Feedback("labels", [Label("p", "a", True), Label("p", "b", False), Label("p", "c", False)], "here")
PAIRED = feedback.Feedback("pairs", [Pair("p", "a", "b", None), Pair("p", "c", "d", 2.0)], "here")


def test_ratings_to_pairs_keep_margin_and_agreement() -> None:
    rows = feedback.to_preference(RATED).to_list()
    pairs = {(row["chosen"], row["rejected"]): (row["margin"], row["agreement"]) for row in rows}
    # b against a: 2>1, 2=2, 5>1, 5>2: 3.5 of 4. b against c: 2>1.5, 5>1.5. a and c are tied at 1.5.
    assert pairs == {("b", "a"): (2.0, 0.875), ("b", "c"): (2.0, 1.0)}
    assert feedback.to_preference(RATED, min_gap=2.0).num_rows == 2
    with pytest.raises(FeedbackError, match="makes no pair"):
        feedback.to_preference(RATED, min_gap=2.1)


def test_rankings_to_pairs_leave_out_ties() -> None:
    rows = feedback.to_preference(RANKED).to_list()
    pairs = {(row["chosen"], row["rejected"]): row["margin"] for row in rows}
    expected = {("b", "a"): 1 / 3, ("b", "c"): 1 / 3, ("b", "d"): 1.0, ("a", "d"): 2 / 3, ("c", "d"): 2 / 3}
    assert pairs == pytest.approx(expected)


def test_labels_and_pairs_to_pairs() -> None:
    assert [(r["chosen"], r["rejected"]) for r in feedback.to_preference(LABELLED)] == [("a", "b"), ("a", "c")]
    assert [r["margin"] for r in feedback.to_preference(PAIRED)] == [0.0, 2.0]


def test_each_answer_is_in_so_many_pairs_at_most() -> None:
    records = [Rating("p", f"answer {i}", (float(i),)) for i in range(50)]
    for most in (1, 3, 4):
        rows = feedback.to_preference(feedback.Feedback("ratings", records, "here"), pairs_per_answer=most).to_list()
        counts = {record.completion: 0 for record in records}
        for row in rows:
            assert int(row["chosen"].split()[1]) > int(row["rejected"].split()[1])
            counts[row["chosen"]] += 1
            counts[row["rejected"]] += 1
        assert max(counts.values()) <= most and min(counts.values()) >= 1
        assert len({(row["chosen"], row["rejected"]) for row in rows}) == len(rows)


def test_to_unpaired() -> None:
    rows = {row["completion"]: (row["label"], row["weight"]) for row in feedback.to_unpaired(RATED, threshold=2.0)}
    # a: mean 1.5, one rater of two below 2; b: one of two above; c: its one rater; d: its one.
    assert rows == {"a": (False, 0.5), "b": (True, 0.5), "c": (False, 1.0), "d": (True, 1.0)}
    scale = feedback.Feedback("ratings", [feedback.Rating("p", "a", (1.0, 4.0)), feedback.Rating("p", "b", (5.0,))], "")
    # The middle of 1 to 5 is 3: a's mean of 2.5 is below it.
    assert [(r["completion"], r["label"]) for r in feedback.to_unpaired(scale)] == [("a", False), ("b", True)]
    assert [(r["completion"], r["label"]) for r in feedback.to_unpaired(PAIRED)] == [
        ("a", True), ("b", False), ("c", True), ("d", False),
    ]  # fmt: skip
    labels = {row["completion"]: row["label"] for row in feedback.to_unpaired(RANKED)}
    assert labels == {"a": True, "b": True, "c": True, "d": False}


def test_to_ratings_and_prompts() -> None:
    rows = feedback.to_ratings(RATED).to_list()
    assert [(row["completion"], row["rating"], row["weight"]) for row in rows] == [
        ("a", 1.5, 1.0), ("b", 3.5, 1.0), ("c", 1.5, 0.5), ("d", 4.0, 0.5),
    ]  # fmt: skip
    assert feedback.to_prompts(RATED)["prompt"][:] == ["p", "q"]
    with pytest.raises(FeedbackError, match="has pairs, which give no answer a number"):
        feedback.to_ratings(PAIRED)


def test_to_rankings() -> None:
    (row,) = feedback.to_rankings(RATED).to_list()
    assert dict(zip(row["completions"], row["ranks"], strict=True)) == {"b": 1, "a": 2, "c": 2}
    (row,) = feedback.to_rankings(RANKED).to_list()
    assert row["ranks"] == [2, 1, 2, 3], "gaps closed"
    assert [row["ranks"] for row in feedback.to_rankings(PAIRED)] == [[1, 2], [1, 2]]
    many = feedback.Feedback("ratings", [Rating("p", str(i), (float(i),)) for i in range(10)], "here")
    assert [len(row["ranks"]) for row in feedback.to_rankings(many, size=4)] == [4, 4, 2]


def test_the_parts_of_a_split_share_no_prompt() -> None:
    records = [Rating(f"p{i % 10}", str(i), (1.0,)) for i in range(40)]
    train, test = feedback.split_by_prompt(feedback.Feedback("ratings", records, "here"), held_out=0.3)
    prompts = [{record.prompt for record in part.records} for part in (train, test)]
    assert not prompts[0] & prompts[1] and len(prompts[1]) == 3
    assert len(train.records) + len(test.records) == 40
    alone = feedback.Feedback("ratings", [Rating("", str(i), (1.0,)) for i in range(10)], "here")
    train, test = feedback.split_by_prompt(alone, held_out=0.3)
    assert (len(train.records), len(test.records)) == (7, 3)


@pytest.mark.parametrize("form", ["pairs", "rankings"])
def test_records_without_prompts_are_split_by_their_answers(form: str) -> None:
    records: list[Any] = [Pair("", f"a{i // 2}", f"b{i // 2}", None) for i in range(20)]
    if form == "rankings":
        records = [Ranking("", (f"a{i // 2}", f"b{i // 2}"), (1, 2)) for i in range(20)]
    whole = feedback.Feedback(form, records, "here")
    train, test = feedback.split_by_prompt(whole, held_out=0.3)
    assert (len(train.records), len(test.records)) == (14, 6)
    assert not {repr(record) for record in train.records} & {repr(record) for record in test.records}


def test_a_split_has_something_on_both_sides() -> None:
    two = feedback.Feedback("ratings", [Rating(f"p{i % 2}", str(i), (1.0,)) for i in range(40)], "here")
    for share in (0.01, 0.99):
        train, test = feedback.split_by_prompt(two, held_out=share)
        assert len(train.records) == len(test.records) == 20
    with pytest.raises(FeedbackError, match="here cannot be split: all of it is about one answer to one prompt"):
        feedback.split_by_prompt(feedback.Feedback("labels", [Label("p", "a", True)] * 4, "here"), 0.5)


def test_the_prompt_of_two_conversations_is_what_both_begin_with(tmp_path: Path) -> None:
    pairs = jsonl(tmp_path, {"chosen": [*CHAT, *PARIS], "rejected": [*CHAT, *LYON]})
    assert feedback.read(pairs).records == [Pair(CHAT, PARIS, LYON, None)]
    repeated = jsonl(tmp_path, {"prompt": CHAT[0]["content"], "chosen": [*CHAT, *PARIS], "rejected": [*CHAT, *LYON]})
    assert feedback.read(repeated).records == [Pair(CHAT, PARIS, LYON, None)]
    texts = jsonl(tmp_path, {"chosen": "the cat", "rejected": "the dog"})
    assert feedback.read(texts).records == [Pair("", "the cat", "the dog", None)]


@pytest.mark.parametrize(
    ("prompt", "completion", "ratings", "expected"),
    [
        (json.dumps(CHAT), json.dumps(PARIS), "[3, 4]", Rating(CHAT, PARIS, (3.0, 4.0))),
        ("[1]", "[x] is a cross", "1;2", Rating("[1]", "[x] is a cross", (1.0, 2.0))),  # only looks like a list
    ],
)
def test_lists_stand_as_json_in_tables(
    prompt: str, completion: str, ratings: str, expected: Rating, tmp_path: Path
) -> None:
    table = tmp_path / "rated.csv"
    pd.DataFrame([{"prompt": prompt, "completion": completion, "ratings": ratings}]).to_csv(table, index=False)
    assert feedback.read(table).records == [expected]


# Looking -------------------------------------------------------------------------------------------------------------


def test_facts_of_pairs() -> None:
    pairs = [
        Pair("p", "long answer", "short", None),
        Pair("p", "short", "long answer", None),  # the other way round
        Pair("q", "a", "bb", None),
        Pair("q", "bb", "ccc", None),
        Pair("q", "ccc", "a", None),  # a circle
        Pair("r", "same", "same", None),
        Pair("r", "itself", "itself", None),
        Pair("s", "x", "y", 1.0),
        Pair("s", "x", "y", 1.0),  # twice
    ]
    report = feedback.check(feedback.Feedback("pairs", pairs, "here"))
    facts = report.facts
    assert (facts["records"], facts["prompts"], facts["pairs"]) == (9, 4, 9)
    assert facts["duplicates"] == 1
    assert facts["contradictory pairs"] == 1
    assert facts["prompts with a cycle of preferences"] == 1
    assert facts["identical answers in a pair"] == 2
    assert facts["longer answer preferred"] == "40.0%"  # of five pairs whose lengths differ, two
    assert len(report.advice) == 4


@pytest.mark.parametrize("which", ["longer", "shorter"])
def test_length_bias_is_named(which: str) -> None:
    chosen, rejected = ("a long answer", "short") if which == "longer" else ("short", "a long answer")
    pairs = [Pair(f"p{i}", chosen, rejected, None) for i in range(10)]
    advice = feedback.check(feedback.Feedback("pairs", pairs, "here")).advice
    assert any(f"The {which} answer wins 100% of the pairs" in sentence for sentence in advice)


def test_raters_who_agree_moderately() -> None:
    noise = [0.0, 1.0, -1.0, 0.0]
    records = [Rating(f"p{i}", "a", tuple(i % 5 + n for n in noise)) for i in range(20)]
    report = feedback.check(feedback.Feedback("ratings", records, "here"))
    assert 0.667 <= report.facts["Krippendorff's alpha (interval)"] < 0.8
    assert any("Raters agree moderately" in sentence for sentence in report.advice)


def test_what_cannot_be_made_is_said() -> None:
    middle = feedback.Feedback("ratings", [Rating("p", "a", (3.0,)), Rating("p", "b", (3.0,))], "here")
    with pytest.raises(FeedbackError, match="all of them stand in the middle"):
        feedback.to_unpaired(middle)
    alone = feedback.Feedback("ratings", [Rating("p", "a", (3.0,)), Rating("q", "b", (4.0,))], "here")
    with pytest.raises(FeedbackError, match="makes no ranking: every prompt has one answer only"):
        feedback.to_rankings(alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"on_error": "skip"}, "choose raise or drop"), ({"form": "stars"}, "form is 'stars': choose")],
)
def test_what_reading_cannot_do(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        feedback.read(jsonl(tmp_path, FORMS["ratings"][0][0]), **arguments)


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    records = [Rating(f"p{i % 10}", f"answer {i}", (float(i % 7),)) for i in range(100)]
    whole = feedback.Feedback("ratings", records, "here")
    pairs = feedback.to_preference(whole)
    draws: list[Any] = [
        lambda seed: list(feedback.to_preference(whole, pairs_per_answer=2, seed=seed)),
        lambda seed: list(feedback.to_rankings(whole, size=3, seed=seed)),
        lambda seed: list(feedback.balance_lengths(pairs, seed=seed)),
        lambda seed: list(feedback.to_prompts(feedback.split_by_prompt(whole, 0.3, seed=seed)[1])),
    ]
    for draw in draws:
        assert draw(0) == draw(0) != draw(1)


def test_alpha_against_the_definition() -> None:
    """alpha = 1 - D_o / D_e with squared differences, over all pairs of ratings within, and of all, answers."""
    units = [[1.0, 2.0, 2.0], [4.0, 5.0], [3.0, 3.0, 1.0]]
    alone = [[9.0], [math.nan, -7.0]]  # nobody to agree with
    everyone = [rating for unit in units for rating in unit]
    n = len(everyone)
    observed = sum(sum((a - b) ** 2 for a in unit for b in unit) / (len(unit) - 1) for unit in units) / n
    expected = sum((a - b) ** 2 for a in everyone for b in everyone) / (n * (n - 1))
    assert feedback.agreement_alpha([*units, *alone]) == pytest.approx(1 - observed / expected, rel=1e-9)
    assert feedback.agreement_alpha([[2.0, 2.0], [2.0, 2.0, 2.0], [4.0]]) == 1.0


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([Rating("", "a", (1.0,)), Rating("", "b", (2.0,))], "Each answer has one rater"),
        ([Rating("", "a", (3.0, 3.0)), Rating("", "b", (3.0, 3.0))], "Every rating is the same"),
        (
            [Rating("", "a", (1.0, 5.0)), Rating("", "b", (5.0, 1.0)), Rating("", "c", (2.0, 3.0))],
            "Raters hardly agree",
        ),
        ([Label("", "a", True), Label("", "b", True)], "All labels are the same"),
        ([Label("", "a", True), Label("x", "b", False)], "No pair can be made"),
    ],
)
def test_what_to_do_about_it(records: list[Any], sentence: str) -> None:
    form = "ratings" if isinstance(records[0], Rating) else "labels"
    assert any(sentence in advice for advice in feedback.check(feedback.Feedback(form, records, "here")).advice)


def test_shared_prompts_are_counted() -> None:
    train = feedback.Feedback("pairs", [Pair(p, "a", "b", None) for p in "pqr"], "here")
    test = feedback.Feedback("pairs", [Pair(p, "a", "b", None) for p in "rst"], "there")
    report = feedback.check(train, test)
    assert report.facts["held-out prompts also in the training part"] == "1 of 3"
    assert any("split by prompt" in sentence for sentence in report.advice)


def test_conversations_without_a_prompt_make_no_pairs() -> None:
    """TRL's trainers of pairs stop at an empty list of messages, or not, as the hash of a string will have it."""
    rated = feedback.Feedback(
        "ratings", [Rating("", [*CHAT, *PARIS], (2.0,)), Rating("", [*CHAT, *LYON], (1.0,))], "here"
    )
    with pytest.raises(FeedbackError, match="here has conversations without a prompt"):
        feedback.to_preference(rated)
    assert len(feedback.to_ratings(rated)) == 2


def test_messages_keep_their_own_keys() -> None:
    named = [{"role": "assistant", "content": [{"type": "text", "text": "Paris."}], "name": "Ada"}]
    (row,) = feedback.to_preference(feedback.Feedback("pairs", [Pair(CHAT, named, LYON, None)], "here"))
    assert (row["prompt"], row["chosen"], row["rejected"]) == (CHAT, named, LYON)
    rows = feedback.to_rankings(feedback.Feedback("rankings", [Ranking(CHAT, (named, LYON), (1, 2))], "here"))
    assert rows[0]["completions"] == [named, LYON]


def test_a_split_by_number_holds_out_whole_prompts() -> None:
    records = [Rating(f"p{i % 10}", str(i), (1.0,)) for i in range(40)]
    for number, size in ((1, 4), (4, 4), (5, 8), (39, 36), (400, 36)):
        train, test = feedback.split_by_prompt(feedback.Feedback("ratings", records, "here"), held_out=number)
        assert (len(train.records), len(test.records)) == (40 - size, size)


# Balancing ------------------------------------------------------------------------------------------------------------


def test_lengths_are_balanced_by_repeating_the_rarer_pairs() -> None:
    pairs = [("long answer", "short")] * 5 + [("tiny", "a longer one"), ("few", "many words")] + [("same", "size")]
    rows = Dataset.from_list([{"chosen": chosen, "rejected": rejected} for chosen, rejected in pairs])
    balanced = [(row["chosen"], row["rejected"]) for row in feedback.balance_lengths(rows)]
    counts = [balanced.count(pair) for pair in dict.fromkeys(pairs)]
    assert counts in ([5, 3, 2, 1], [5, 2, 3, 1])
    assert len(feedback.balance_lengths(rows.select([7]))) == 1
    with pytest.raises(FeedbackError, match="In every pair the longer answer was chosen"):
        feedback.balance_lengths(rows.select(range(5)))


@pytest.mark.parametrize("weighted", [True, False])
def test_labels_are_balanced_by_their_weights(weighted: bool) -> None:
    rows = Dataset.from_dict({"completion": list("abcd"), "label": [True, True, True, False]})
    rows = rows.add_column("weight", [1.0, 0.5, 0.5, 0.5]) if weighted else rows
    balanced = feedback.balance_labels(rows)
    expected = [0.25, 0.125, 0.125, 0.5] if weighted else [1 / 3, 1 / 3, 1 / 3, 1.0]
    assert list(balanced["weight"]) == pytest.approx(expected)
    assert balanced["completion"] == rows["completion"]
    with pytest.raises(FeedbackError, match="Every label is good"):
        feedback.balance_labels(rows.select(range(3)))


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": t, "ratings": r} for t, r in (("a", [1, 2, 1]), ("bb", [4, 5, 5]), ("c", [2, 2, 3]))]
    path = jsonl(tmp_path, *rows, "{broken")
    picture = tmp_path / "histogram.png"
    status = cli.main(["feedback", "check", str(path), "--column", "text=completion", "--picture", str(picture)])
    shown = capsys.readouterr().out
    assert status == 0
    assert "dropped: line 4" in shown and "Krippendorff's alpha" in shown and "1 to 5" in shown
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.csv"], "'none.csv' does not exist"),
        (["x.jsonl", "--column", "text"], "is not of the kind THEIRS=OURS"),
        (["x.jsonl", "--strict"], "line 1: "),
        (["pairs.jsonl", "--picture", "p.png"], "There are no ratings to draw"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path, "{broken", {"completion": "a", "rating": 1}, name="x.jsonl")
    jsonl(tmp_path, {"chosen": "a", "rejected": "b"}, name="pairs.jsonl")
    assert cli.main(["feedback", "check", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("trl-ext: error: ") and message in error and error.count("\n") == 1
