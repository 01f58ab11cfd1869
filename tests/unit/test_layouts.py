"""Rows in the layouts of public data sets and of tools, with texts of our own: the records that they mean, by hand."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import cli, feedback
from trl_ext.feedback import LAYOUTS, FeedbackError, Label, Pair, Ranking, Rating
from trl_ext.launch import DataArguments, load_feedback, load_pairs, load_rows

Rows = list[dict[str, Any]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def aspects(*ratings: str) -> dict[str, Any]:
    names = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {name: {"Rating": rating, "Rationale": "so"} for name, rating in zip(names, ratings, strict=True)}


def message(name: str, parent: str | None, role: str, text: str, rank: int | None = None) -> dict[str, Any]:
    return {"message_id": name, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en"}


POST = {"id": "t1", "post": "My boat leaks.", "title": "A boat", "subreddit": "sailing", "article": None}
POST_PROMPT = "SUBREDDIT: r/sailing\n\nTITLE: A boat\n\nPOST: My boat leaks.\n\nTL;DR:"
SPLINT = "\n\nHuman: What holds a mast?\n\nAssistant: Stays.\n\nHuman: Of what?\n\nAssistant:"

# layout -> rows, records, unused columns, rows that prefer nothing
SHOWN: dict[str, tuple[Rows, list[Any], list[str], int]] = {
    "hh-rlhf": (
        [
            {"chosen": f"{SPLINT} Steel, mostly.", "rejected": f"{SPLINT} Steel and hope."},
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?", "rejected": "\n\nHuman: Hi\n\nAssistant: Yes! Human: no"},
        ],
        [
            Pair(SPLINT, " Steel, mostly.", " Steel and hope.", None),
            Pair("\n\nHuman: Hi\n\nAssistant:", " Yes?", " Yes! Human: no", None),
        ],
        [],
        0,
    ),
    "ultrafeedback_binarized": (
        [
            {
                "prompt": "Name a knot.",
                "prompt_id": "7f",
                "chosen": [user("Name a knot."), bot("Bowline.")],
                "rejected": [user("Name a knot."), bot("Bow.")],
                "messages": [user("Name a knot."), bot("Bowline.")],
                "score_chosen": 8.5,
                "score_rejected": 4.0,
            },
            {
                "prompt": "Name a sail.",
                "prompt_id": "8a",
                "chosen": [user("Name a sail."), bot("Jib.")],
                "rejected": [user("Name a sail."), bot("Genoa.")],
                "messages": [user("Name a sail."), bot("Jib.")],
                "score_chosen": 7.0,
                "score_rejected": 7.0,
            },
        ],
        [Pair([user("Name a knot.")], [bot("Bowline.")], [bot("Bow.")], None)],
        ["prompt_id", "messages"],
        1,
    ),
    "UltraFeedback": (
        [
            {
                "source": "mine",
                "instruction": "Name a sail.",
                "models": ["x", "y"],
                "completions": [
                    {"response": "Jib.", "annotations": aspects("5", "4", "5", "4"), "overall_score": 1.0},
                    {"response": "Oar.", "annotations": aspects("1", "N/A", "2", "3"), "fine-grained_score": 2.0},
                ],
            }
        ],
        [Rating("Name a sail.", "Jib.", (4.5,)), Rating("Name a sail.", "Oar.", (2.0,))],
        ["source", "models"],
        0,
    ),
    "HelpSteer2": (
        [{"prompt": "Why?", "response": "Wind.", "helpfulness": 3, "correctness": 4, "verbosity": 1}],
        [Rating("Why?", "Wind.", (3.0,))],
        ["correctness", "verbosity"],
        0,
    ),
    "HelpSteer2 preference": (
        [
            {"split": "train", "prompt": "Why?", "response_1": "Wind.", "response_2": "No.", "preference_strength": -2},
            {"split": "train", "prompt": "How?", "response_1": "So.", "response_2": "Thus.", "preference_strength": 0},
        ],
        [Pair("Why?", "Wind.", "No.", 2.0)],
        ["split"],
        1,
    ),
    "HelpSteer3": (
        [
            {
                "domain": "general",
                "context": [user("Hello"), bot("Ahoy"), user("Port?")],
                "response1": "Right.",
                "response2": "Left.",
                "overall_preference": 3,
            },
            {
                "domain": "general",
                "context": [user("Knots?")],
                "response1": "Speed.",
                "response2": "Rope.",
                "overall_preference": -1,
            },
        ],
        [
            Pair([user("Hello"), bot("Ahoy"), user("Port?")], [bot("Left.")], [bot("Right.")], 3.0),
            Pair([user("Knots?")], [bot("Speed.")], [bot("Rope.")], 1.0),
        ],
        ["domain"],
        0,
    ),
    "SHP": (
        [
            {"history": "Best anchor?", "human_ref_A": "Plough.", "human_ref_B": "Stone.", "labels": 1, "score_A": 9},
            {"history": "Best rope?", "human_ref_A": "Grass.", "human_ref_B": "Hemp.", "labels": 0, "score_A": 2},
        ],
        [Pair("Best anchor?", "Plough.", "Stone.", None), Pair("Best rope?", "Hemp.", "Grass.", None)],
        ["score_A"],
        0,
    ),
    "PKU-SafeRLHF": (
        [
            {
                "prompt": "May I sail drunk?",
                "response_0": "Yes.",
                "response_1": "Better not.",
                "better_response_id": 1,
                "safer_response_id": 1,
            },
            {
                "prompt": "May I sail at night?",
                "response_0": "With lights.",
                "response_1": "No.",
                "better_response_id": 0,
                "safer_response_id": 1,
            },
        ],
        [
            Pair("May I sail drunk?", "Better not.", "Yes.", None),
            Pair("May I sail at night?", "With lights.", "No.", None),
        ],
        ["safer_response_id"],
        0,
    ),
    "arena battles": (
        [
            {
                "model_a": "x",
                "model_b": "y",
                "winner": winner,
                "conversation_a": [user("A?"), bot("a"), user("More?"), bot("aa")],
                "conversation_b": [user("A?"), bot("b"), user("More?"), bot("bb")],
            }
            for winner in ("model_a", "model_b", "tie", "tie (bothbad)")
        ],
        [
            Pair([user("A?")], [bot("a"), user("More?"), bot("aa")], [bot("b"), user("More?"), bot("bb")], None),
            Pair([user("A?")], [bot("b"), user("More?"), bot("bb")], [bot("a"), user("More?"), bot("aa")], None),
        ],
        ["model_a", "model_b"],
        2,
    ),
    "arena table": (
        [
            {
                "id": 1,
                "prompt": '["A?", "More?"]',
                "response_a": '["a", "aa"]',
                "response_b": '["b", "bb"]',
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            },
            {
                "id": 2,
                "prompt": '["B?"]',
                "response_a": '["a"]',
                "response_b": '["b"]',
                "winner_model_a": 0,
                "winner_model_b": 0,
                "winner_tie": 1,
            },
        ],
        [Pair([user("A?")], [bot("b"), user("More?"), bot("bb")], [bot("a"), user("More?"), bot("aa")], None)],
        ["id", "winner_tie"],
        1,
    ),
    "summarize_from_feedback comparisons": (
        [
            {
                "info": POST,
                "summaries": [{"text": " Boat.", "policy": "p"}, {"text": " Leaky boat.", "policy": "q"}],
                "choice": 1,
                "worker": "w",
            }
        ],
        [Pair(POST_PROMPT, " Leaky boat.", " Boat.", None)],
        ["worker"],
        0,
    ),
    "summarize_from_feedback axis": (
        [
            {"info": POST, "summary": {"text": " Boat.", "axes": {"overall": 3, "accuracy": 7}}, "worker": "w"},
            {"info": POST, "summary": {"text": " Boat.", "axes": {"overall": 4, "accuracy": 7}}, "worker": "v"},
            {"info": POST, "summary": {"text": " Sea.", "axes": {"overall": None, "accuracy": 1}}, "worker": "w"},
        ],
        [Rating(POST_PROMPT, " Boat.", (3.0, 4.0))],
        ["worker"],
        1,
    ),
    "oasst1 trees": (
        [
            message("c", "b", "assistant", "Two.", 1),  # in any order
            message("a", None, "prompter", "One?"),
            message("d", "b", "assistant", "2.", 0),
            message("r", "a", "assistant", "Yes, one.", 0),
            message("b", "r", "prompter", "And then?"),
            message("e", "b", "assistant", "Three.", 2),
        ],
        [
            Ranking(
                [user("One?"), bot("Yes, one."), user("And then?")],
                ([bot("Two.")], [bot("2.")], [bot("Three.")]),
                (2, 1, 3),
            )
        ],
        ["lang"],
        1,
    ),
    "orca pairs": (
        [
            {"system": "Be brief.", "question": "Why?", "chosen": "Wind.", "rejected": "Because."},
            {"system": "", "question": "How?", "chosen": "Slowly.", "rejected": "So."},
        ],
        [
            Pair([system("Be brief."), user("Why?")], [bot("Wind.")], [bot("Because.")], None),
            Pair([user("How?")], [bot("Slowly.")], [bot("So.")], None),
        ],
        [],
        0,
    ),
    "Alpaca pairs": (
        [
            {
                "instruction": "Say it in French.",
                "input": "boat",
                "chosen": "bateau",
                "rejected": "bottine",
                "system": "Be brief.",
                "history": [["Ahoy", "Hello"]],
            },
            {"instruction": "Why?", "input": "", "chosen": "Wind.", "rejected": "No.", "system": "", "history": []},
        ],
        [
            Pair(
                [system("Be brief."), user("Ahoy"), bot("Hello"), user("Say it in French.\nboat")],
                [bot("bateau")],
                [bot("bottine")],
                None,
            ),
            Pair([user("Why?")], [bot("Wind.")], [bot("No.")], None),
        ],
        [],
        0,
    ),
    "ShareGPT pairs": (
        [{"conversations": [human("Why?")], "chosen": gpt("Wind."), "rejected": gpt("No.")}],
        [Pair([user("Why?")], [bot("Wind.")], [bot("No.")], None)],
        [],
        0,
    ),
    "KTO": (
        [
            {"prompt": "Why?", "completion": "Wind.", "label": True},
            {"prompt": "Why?", "completion": "No.", "label": False},
        ],
        [Label("Why?", "Wind.", True), Label("Why?", "No.", False)],
        [],
        0,
    ),
    "imdb": (
        [{"text": "A film to sail to.", "label": 1}, {"text": "I sank.", "label": 0}],
        [Label("", "A film to sail to.", True), Label("", "I sank.", False)],
        [],
        0,
    ),
    "Argilla": (
        [
            {
                "id": "1",
                "status": "completed",
                "prompt": "Why?",
                "response": "Wind.",
                "quality.responses": [4, 5, 1],
                "quality.responses.users": ["u", "v", "w"],
                "quality.responses.status": ["submitted", "submitted", "discarded"],
                "quality.suggestion": 2,
            },
            {
                "id": "2",
                "status": "pending",
                "prompt": "Why?",
                "response": "No.",
                "quality.responses": None,
                "quality.responses.users": None,
                "quality.responses.status": None,
                "quality.suggestion": 1,
            },
        ],
        [Rating("Why?", "Wind.", (4.0, 5.0))],
        ["id", "status", "quality.responses.users", "quality.suggestion"],
        1,
    ),
    "Argilla 1": (
        [
            {
                "instruction": "Why?",
                "output": "Wind.",
                "good": [
                    {"user_id": "u", "value": "yes", "status": "submitted"},
                    {"user_id": "v", "value": "no", "status": "draft"},
                ],
                "external_id": None,
                "metadata": "{}",
            }
        ],
        [Label("Why?", "Wind.", True)],
        ["external_id", "metadata"],
        0,
    ),
    "Label Studio": (
        [
            {
                "id": number,
                "data": {"prompt": "Why?", "answer1": "Wind.", "answer2": "No."},
                "annotations": [
                    {
                        "was_cancelled": cancelled,
                        "result": [{"type": "pairwise", "from_name": "pw", "value": {"selected": side}}],
                    }
                ],
            }
            for number, side, cancelled in ((1, "left", False), (2, "right", False), (3, "left", True))
        ],
        [Pair("Why?", "Wind.", "No.", None), Pair("Why?", "No.", "Wind.", None)],
        ["id"],
        1,
    ),
}
FORMS = {Pair: "pairs", Rating: "ratings", Ranking: "rankings", Label: "labels"}


def test_every_layout_is_shown() -> None:
    assert set(SHOWN) | {"ShareGPT turns"} == {layout.name for layout in LAYOUTS}


def jsonl(folder: Path, rows: Rows) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sources(folder: Path, rows: Rows) -> dict[str, Any]:
    """The same rows in every kind of source."""
    plain = Dataset.from_list(rows, on_mixed_types="use_json")
    plain.save_to_disk(folder / "saved")
    plain.to_parquet(folder / "rows.parquet")
    return {
        "file": jsonl(folder, rows),
        "list": rows,
        "dataset": plain,
        "parquet": folder / "rows.parquet",
        "folder": str(folder / "saved"),
    }


@pytest.mark.parametrize("name", SHOWN)
def test_a_layout_is_recognised_and_read(name: str, tmp_path: Path) -> None:
    rows, records, unused, undecided = SHOWN[name]
    for kind, source in sources(tmp_path, rows).items():
        read = feedback.read(source)
        assert (kind, read.layout) == (kind, name)
        assert read.form == FORMS[type(records[0])] and read.read_as == f"{read.form}, {name} layout"
        assert read.records == records, kind
        assert sorted(read.unused) == sorted(unused) and read.undecided == undecided


@pytest.mark.parametrize("name", SHOWN)
def test_a_layout_that_is_named_is_the_one_recognised(name: str) -> None:
    rows, records, _, _ = SHOWN[name]
    assert feedback.read(rows, name).records == records


@pytest.mark.parametrize("name", SHOWN)
def test_the_check_names_layout_and_unused_columns(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, records, unused, _ = SHOWN[name]
    assert cli.main(["feedback", "check", str(jsonl(tmp_path, rows))]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"read as {FORMS[type(records[0])]}, {name} layout" in shown
    assert all(column in shown for column in unused)


def prompts_of(records: list[Any]) -> list[str]:
    return sorted({json.dumps(record.prompt, sort_keys=True) for record in records})


@pytest.mark.parametrize("name", SHOWN)
def test_the_recipes_read_it(name: str, tmp_path: Path) -> None:
    """Three times the rows, so that something can be held out; every prompt is told apart by its number."""
    rows, records, unused, _ = SHOWN[name]
    many = jsonl(tmp_path, rows)
    data = DataArguments(str(many), eval_split=str(many))
    kind = type(records[0])
    objective = {Pair: "pairwise", Rating: "regression", Ranking: "ranking", Label: "binary"}[kind]
    loaded = load_feedback(data, objective)
    assert f"{FORMS[kind]}, {name} layout" in data.read_as and all(column in data.read_as for column in unused)
    if kind is Pair:
        for train in (loaded.train, load_pairs(data)[0]):
            got = [(row["prompt"], row["chosen"], row["rejected"]) for row in train]
            assert got == [(pair.prompt, pair.chosen, pair.rejected) for pair in records]
    elif kind is Ranking:
        assert [(r["prompt"], r["completions"], r["ranks"]) for r in loaded.train] == [
            (r.prompt, list(r.completions), list(r.ranks)) for r in records
        ]
    elif kind is Rating:
        assert [(r["prompt"], r["completion"], r["rating"]) for r in loaded.train] == [
            (r.prompt, r.completion, sum(r.ratings) / len(r.ratings)) for r in records
        ]
    else:
        assert [(r["prompt"], r["completion"], r["label"]) for r in loaded.train] == [
            (r.prompt, r.completion, r.label) for r in records
        ]


@pytest.mark.parametrize("name", [name for name in SHOWN if name != "imdb"])
def test_its_prompts_serve_ppo(name: str, tmp_path: Path) -> None:
    rows, records, _, undecided = SHOWN[name]
    file = str(jsonl(tmp_path, rows))
    train, _ = load_rows(DataArguments(file, eval_split=file), "prompts")
    got = sorted({json.dumps(prompt, sort_keys=True) for prompt in train["prompt"]})
    assert set(prompts_of(records)) <= set(got)
    assert undecided or got == prompts_of(records)


def test_ties_have_prompts_too(tmp_path: Path) -> None:
    file = str(jsonl(tmp_path, SHOWN["HelpSteer2 preference"][0]))
    assert load_rows(DataArguments(file, eval_split=file), "prompts")[0]["prompt"][:] == ["Why?", "How?"]


def test_conversations_without_a_judgement_are_prompts(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "conversations": [human("Why?"), gpt("Wind."), human("How?"), gpt("So.")]},
        {"id": "2", "conversations": [{"from": "system", "value": "Be brief."}, human("Why?"), gpt("Wind.")]},
    ]
    data = DataArguments(str(jsonl(tmp_path, rows)), eval_split=str(jsonl(tmp_path, rows)))
    train, _ = load_rows(data, "prompts")
    assert train["prompt"][:] == [
        [user("Why?"), bot("Wind."), user("How?")],
        [system("Be brief."), user("Why?")],
    ]
    assert data.read_as == "; read as: prompts, ShareGPT turns layout; columns not used: id"
    with pytest.raises(FeedbackError, match="holds prompts without a judgement"):
        feedback.read(rows)


def test_labels_without_a_prompt_hold_none(tmp_path: Path) -> None:
    data = DataArguments(str(jsonl(tmp_path, SHOWN["imdb"][0])))
    with pytest.raises(FeedbackError, match=r"holds no prompts \(read as labels\)"):
        load_rows(data, "prompts")


# hh-rlhf's turns -----------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "b", "Human:", "Assistant:", "\n", "the"]), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), max_size=2), WORDS, WORDS, WORDS, WORDS)
def test_answers_that_begin_alike_keep_their_beginning(
    before: list[tuple[str, str]], question: str, begin: str, first: str, second: str
) -> None:
    asked = "".join(f"\n\nHuman: {q}\n\nAssistant: {a}" for q, a in before) + f"\n\nHuman: {question}\n\nAssistant:"
    chosen, rejected = f" {begin} {first} 1", f" {begin} {second} 2"
    read = feedback.read([{"chosen": asked + chosen, "rejected": asked + rejected}])
    assert read.records == [Pair(asked, chosen, rejected, None)]


def test_turns_inside_an_answer_belong_to_it() -> None:
    asked = "\n\nHuman: Play me.\n\nAssistant:"
    chosen = " Sure.\n\nHuman: Why?\n\nAssistant: Wind."
    read = feedback.read([{"chosen": asked + chosen, "rejected": asked + " Sure, no."}])
    assert read.records == [Pair(asked, chosen, " Sure, no.", None)]


@pytest.mark.parametrize(
    ("rejected", "message"),
    [
        ("\n\nHuman: Hi\n\nAssistant:", "column 'rejected': empty"),
        ("\n\nHuman: Hello\n\nAssistant: Yes?", "column 'rejected': shares no turn with 'chosen'"),
        ("No.", "column 'rejected': 'No.' is no transcript"),
        (None, "column 'rejected': missing"),
    ],
)
def test_a_transcript_that_does_not_fit_is_refused(rejected: Any, message: str) -> None:
    good = SHOWN["hh-rlhf"][0][0]
    with pytest.raises(FeedbackError, match=f"line 2, {message}"):
        feedback.read([good, {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes?", "rejected": rejected}])


def test_transcripts_with_the_line_ends_of_windows() -> None:
    gap = "\r\n\r\n"
    asked = f"{gap}Human: Why?{gap}Assistant:"
    read = feedback.read([{"chosen": f"{asked} Wind.", "rejected": f"{asked} Wind and sea."}])
    assert read.layout == "hh-rlhf" and read.records == [Pair(asked, " Wind.", " Wind and sea.", None)]


# Rows of the same layouts that are easily misread ---------------------------------------------------------------------


def reply(name: str, role: str, text: str, rank: int | None = None, *replies: Any) -> dict[str, Any]:
    return {"message_id": name, "role": role, "text": text, "rank": rank, "replies": list(replies)}


def test_trees_may_be_nested(tmp_path: Path) -> None:
    follow_up = reply(
        "e", "prompter", "And then?", None, reply("f", "assistant", "2."), reply("g", "assistant", "II", 0)
    )
    replies = reply("b", "assistant", "Uno.", 1), reply("c", "assistant", "One.", 0, follow_up)
    rows = [{"message_tree_id": "a", "tree_state": "ready", "prompt": reply("a", "prompter", "Count.", None, *replies)}]
    read = feedback.read(jsonl(tmp_path, rows))
    assert read.read_as == "rankings, oasst1 trees layout"
    assert read.records == [Ranking([user("Count.")], ([bot("Uno.")], [bot("One.")]), (2, 1))]
    file = str(jsonl(tmp_path, rows))
    train, _ = load_rows(DataArguments(file, eval_split=file), "prompts")
    assert train["prompt"][:] == [[user("Count.")], [user("Count."), bot("One."), user("And then?")]]


def test_a_battle_is_judged_up_to_its_turn() -> None:
    """As in MT-bench's human judgements: both turns are in the row, the verdict is about one or both."""
    row = SHOWN["arena battles"][0][0]
    first = feedback.read([row | {"turn": 1}]).records
    assert first == [Pair([user("A?")], [bot("a")], [bot("b")], None)]
    assert feedback.read([row | {"turn": 2}]).records == feedback.read([row]).records


def test_a_tie_of_distilabel_prefers_nothing() -> None:
    rows = [row | {"status": status} for row, status in zip(SHOWN["orca pairs"][0], ["tie", "swapped"], strict=True)]
    read = feedback.read(rows)
    assert (read.undecided, read.records) == (1, SHOWN["orca pairs"][1][1:])


@pytest.mark.parametrize("asked", ["instruction", "question"])
def test_an_input_is_no_question_of_its_own(asked: str) -> None:
    row = {"system": "Be brief.", asked: "Translate.", "input": "boat", "chosen": "bateau", "rejected": "bottine"}
    if asked == "instruction":
        assert feedback.read([row]).records[0].prompt == [system("Be brief."), user("Translate.\nboat")]
    else:
        with pytest.raises(FeedbackError, match="line 1, column 'input': asks beside 'question'"):
            feedback.read([row])


def test_what_the_system_says_comes_before_messages() -> None:
    row = {"system": "Be brief.", "chosen": [user("Why?"), bot("Wind.")], "rejected": [user("Why?"), bot("No.")]}
    pair = Pair([system("Be brief."), user("Why?")], [bot("Wind.")], [bot("No.")], None)
    read = feedback.read([row, row | {"prompt": [user("Why?")]}])
    assert read.records == [pair, pair] and read.unused == []
    rated = {"system": "Be brief.", "prompt": [user("Why?")], "completion": [bot("Wind.")], "rating": 4}
    assert feedback.read([rated]).records == [Rating(pair.prompt, [bot("Wind.")], (4.0,))]
    own = rated | {"prompt": [system("Be long."), user("Why?")]}
    assert feedback.read([own]).records[0].prompt == own["prompt"]


def test_capital_letters_of_a_layout_may_be_written_otherwise() -> None:
    rows = [{name.title(): value for name, value in row.items()} for row in SHOWN["SHP"][0]]
    assert set(rows[0]) == {"History", "Human_Ref_A", "Human_Ref_B", "Labels", "Score_A"}
    assert feedback.read(rows).records == SHOWN["SHP"][1]


@pytest.mark.parametrize("names", [["neg", "pos"], ["pos", "neg"]])
def test_the_names_of_classes_say_what_their_numbers_mean(names: list[str], tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["Fine.", "Dull."], "label": [names.index("pos"), names.index("neg")]})
    rows = rows.cast_column("label", ClassLabel(names=names))
    rows.save_to_disk(tmp_path / "saved")
    for source in (rows, str(tmp_path / "saved"), rows.to_iterable_dataset()):
        assert feedback.read(source).records == [Label("", "Fine.", True), Label("", "Dull.", False)]
    with pytest.raises(FeedbackError, match=r"'(spam|ham)' is none of 1, 0, pos"):
        feedback.read(rows.cast_column("label", ClassLabel(names=["spam", "ham"])), "imdb")


# Rows that do not fit ------------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("SHP", {"labels": 2}, "'labels': 2 is none of 1, 0"),
    ("SHP", {"labels": None}, "'labels': None is none of"),
    ("SHP", {"human_ref_B": ""}, "'human_ref_B': empty"),
    ("SHP", {"history": None}, "'history': missing"),
    ("PKU-SafeRLHF", {"better_response_id": "both"}, "'better_response_id': 'both' is none of 0, 1"),
    ("HelpSteer3", {"overall_preference": 4}, "'overall_preference': 4 is not between -3 and 3"),
    ("HelpSteer3", {"overall_preference": None}, "'overall_preference': None is not a number"),
    ("HelpSteer3", {"context": "Why?"}, "'context': 'Why.*' is not a list of messages"),
    ("HelpSteer3", {"response1": " "}, "'response1': empty"),
    ("HelpSteer2", {"helpfulness": "lots"}, "'helpfulness': 'lots' is not a number"),
    ("HelpSteer2", {"response": None}, "'response': missing"),
    ("arena battles", {"winner": "model_c"}, "'winner': 'model_c' is none of model_a"),
    ("arena battles", {"conversation_b": [user("Z?"), bot("b")]}, "'conversation_b': begins with no message"),
    ("arena battles", {"conversation_b": [user("A?"), bot("")]}, "'conversation_b': empty"),
    ("arena table", {"response_b": "[null, null]"}, "'response_b': a list that holds more than texts"),
    ("arena table", {"response_a": '["a"]'}, "'response_a': 1 answers to 2 prompts"),
    ("arena table", {"winner_model_a": 1}, "'winner_model_b': both models are said to have won"),
    ("UltraFeedback", {"completions": [{"response": "Jib."}]}, "'completions': the answer 'Jib.' has no rating"),
    (
        "ultrafeedback_binarized",
        {"score_chosen": 1.0},
        "'score_chosen': 1.0 is below score_rejected 4.0: the pair is the wrong way round",
    ),
    (
        "UltraFeedback",
        {"completions": [{"response": "Jib.", "annotations": "good"}]},
        "'completions': the annotations 'good' are no record",
    ),
    ("Alpaca pairs", {"history": ["Ahoy"]}, "'history': 'Ahoy' is not a question with its answer"),
    ("UltraFeedback", {"completions": "none"}, "'completions': 'none' is not a list"),
    ("summarize_from_feedback comparisons", {"choice": 2}, "'choice': 2 is none of 0, 1"),
    ("summarize_from_feedback comparisons", {"summaries": [{"text": "a"}]}, "'summaries': 1 where two are compared"),
    ("summarize_from_feedback comparisons", {"info": {"id": 1}}, "'info': holds neither 'post' nor 'article'"),
    ("orca pairs", {"question": None}, "'question': missing"),
    ("ShareGPT pairs", {"conversations": [{"from": "tool", "value": "3"}]}, "'conversations': 'tool' speaks"),
    ("oasst1 trees", {"message_id": "x", "parent_id": "gone"}, "'parent_id': 'gone' is no message of the file"),
    ("oasst1 trees", {"message_id": "x", "role": "cook"}, "'role': 'cook' is none of prompter"),
    ("imdb", {"label": -1}, "'label': -1 is none of 1, 0"),
    ("Argilla", {"quality.responses": ["meh", "meh", "meh"]}, "'quality.responses': .*neither numbers"),
    ("Label Studio", {"annotations": [{"result": [{"value": {"rating": 3}}]}]}, "'annotations': no column holds"),
]


@pytest.mark.parametrize(("name", "changed", "message"), BAD, ids=[f"{name}: {m[:40]}" for name, _, m in BAD])
def test_a_row_that_does_not_fit_is_refused_by_line_and_column(
    name: str, changed: dict[str, Any], message: str
) -> None:
    rows = SHOWN[name][0]
    bad = [*rows, rows[0] | changed]
    with pytest.raises(FeedbackError, match=f"line {len(bad)}, column {message}"):
        feedback.read(bad)
    read = feedback.read(bad, on_error="drop")
    assert len(read.dropped) == 1 and read.records == SHOWN[name][1]


# Columns that change what others mean ---------------------------------------------------------------------------------


def test_a_label_beside_pairs_renamed_by_hand_is_seen(tmp_path: Path) -> None:
    """With A always chosen, the second of these pairs would be the wrong way round."""
    rows = SHOWN["SHP"][0]
    columns = {"history": "prompt", "human_ref_A": "chosen", "human_ref_B": "rejected"}
    with pytest.raises(FeedbackError, match=r"a column 'labels' that says now one and now the other \(0, 1\)"):
        feedback.read(rows, columns=columns)
    renamed = [{columns.get(name, name): value for name, value in row.items()} for row in rows]
    for load in (load_pairs, lambda data: load_feedback(data, "pairwise")):
        with pytest.raises(FeedbackError, match="half of the pairs are the wrong way round"):
            load(DataArguments(str(jsonl(tmp_path, renamed)), eval_rows=1))
    always = [row | {"labels": 1} for row in renamed]
    assert len(feedback.read(always).records) == 2, "a label that never changes turns nothing round"


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("preferred", ("response_a", "response_b")),
        ("winner", ("A wins", "B wins")),
        ("vote", ("left", "right")),
        ("choice", (-1, 1)),
        ("label", ("1", "2")),
        ("overall_preference", (-3, 2)),
        ("preference_strength", (1, -1)),
        ("safer_response_id", (0, 1)),
    ],
)
def test_a_verdict_beside_pairs_is_seen_however_it_is_written(column: str, said: tuple[Any, Any]) -> None:
    rows = [{"prompt": f"{n}?", "chosen": "a", "rejected": "b", column: word} for n, word in enumerate(said)]
    with pytest.raises(FeedbackError, match=f"a column '{column}' that says now one and now the other"):
        feedback.read(rows)
    named = [row | {column: name} for row, name in zip(rows, ("llama", "qwen"), strict=True)]
    assert len(feedback.read(named).records) == 2, "names of models turn nothing round"


def test_answers_that_hold_their_prompt_are_seen() -> None:
    rows = [{"prompt": f"Port {n}?", "chosen": f"Port {n}? Left.", "rejected": f"Port {n}? Right."} for n in range(3)]
    with pytest.raises(FeedbackError, match="repeats the prompt at the beginning of every answer"):
        feedback.read(rows)
    assert len(feedback.read([*rows, rows[0] | {"chosen": "Left."}]).records) == 4, "an answer may quote the question"
    without = [{"chosen": f"User: {n}?\nBot: Left.", "rejected": f"User: {n}?\nBot: Right."} for n in range(3)]
    with pytest.raises(FeedbackError, match="has no prompts, and in each row both answers begin with the same line"):
        feedback.read(without)
    assert len(feedback.read([*without, {"chosen": "Left.\nSo.", "rejected": "Right.\nSo."}]).records) == 4


def test_a_prompt_that_nobody_would_read_is_seen() -> None:
    rows = [{"Question": "Why?", "chosen": "Wind.", "rejected": "No."}]
    with pytest.raises(FeedbackError, match=r"no column 'prompt', but 'Question'.*\(Question=prompt\)"):
        feedback.read(rows)
    assert feedback.read(rows, columns={"Question": "prompt"}).records == [Pair("Why?", "Wind.", "No.", None)]


def test_another_verdict_may_take_the_place_of_the_first() -> None:
    read = feedback.read(SHOWN["PKU-SafeRLHF"][0], columns={"safer_response_id": "better_response_id"})
    assert read.records[1] == Pair("May I sail at night?", "No.", "With lights.", None)
    read = feedback.read(SHOWN["HelpSteer2"][0], columns={"response": "completion", "correctness": "rating"})
    assert read.records == [Rating("Why?", "Wind.", (4.0,))] and read.layout == ""
    assert read.unused == ["helpfulness", "verbosity"]


def test_a_users_form_comes_before_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    form = feedback.Form([{"text", "label"}], lambda row: Label(row["text"], "x", True))
    monkeypatch.setitem(feedback.FORMS, "mine", form)
    assert feedback.read(SHOWN["imdb"][0]).records[0] == Label("A film to sail to.", "x", True)


# The page ------------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "feedback.md"
MARKS = "<!-- layouts: begin -->\n", "<!-- layouts: end -->"


def table() -> str:
    lines = ["| layout | made into | columns | what is read | found in |", "|---|---|---|---|---|"]
    for layout in LAYOUTS:
        columns = " or ".join(", ".join(f"`{name}`" for name in sorted(names)) for names in layout.columns)
        lines.append(f"| {layout.name} | {layout.form} | {columns} | {layout.becomes} | {layout.found_in} |")
    return "\n".join(lines) + "\n"


def test_the_page_lists_the_layouts() -> None:
    """TRL_EXT_WRITE_LAYOUTS=1 writes the table anew."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    listed, after = rest.split(MARKS[1])
    if os.environ.get("TRL_EXT_WRITE_LAYOUTS"):
        PAGE.write_text(f"{before}{MARKS[0]}{table()}{MARKS[1]}{after}", encoding="utf-8")
    else:
        assert listed == table()
