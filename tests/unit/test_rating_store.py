"""What raters are asked, what is kept of what they said, and what becomes of it."""

import json
import sqlite3
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_ext import feedback
from trl_ext.cli import main
from trl_ext.rating import Store, StoreError, agreements, export
from trl_ext.rating.answers import read_answers
from trl_ext.rating.asking import History, attention_every, due
from trl_ext.rating.modes import MODES, Candidate, as_shown, as_stored
from trl_ext.rating.store import LEASE


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rows(prompts: int = 3, policies: tuple[str, ...] = ("base", "ppo"), samples: int = 1) -> list[dict[str, Any]]:
    return [
        {"id": f"{p}-{policy}-{n}", "prompt": f"prompt {p}", "completion": f"answer {p} {policy} {n}", "policy": policy}
        for p in range(prompts)
        for policy in policies
        for n in range(samples)
    ]


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return write(tmp_path / "answers.jsonl", rows())


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(tmp_path: Path, answers: Path | None, *settings: Any, **named: Any) -> tuple[Store, Clock]:
    store = Store.open(tmp_path / "feedback.sqlite", answers, *settings, **named)
    store.clock = clock = Clock()
    return store, clock


def say(store: Store, rater: str, *numbers: int, comment: str = "") -> str:
    """The rater says this about what is before them; its text."""
    shown = store.next(store.rater(rater))
    assert shown is not None
    assert store.judge(rater, shown.token, "judged", numbers, comment)
    return str(shown.completions[0])


# What is asked -------------------------------------------------------------------------------------------------------


def test_stars_ask_about_every_answer_once_and_the_prompts_in_turn(tmp_path: Path, answers: Path) -> None:
    store, _ = opened(tmp_path, answers, "stars")
    asked = [say(store, "ann", 3) for _ in range(6)]
    assert sorted(asked) == sorted(row["completion"] for row in rows())
    assert {text.split()[1] for text in asked[:3]} == {"0", "1", "2"}  # each prompt before any comes again
    assert store.next("ann") is None and store.progress("ann").done == 6


def test_pairs_are_of_different_policies_and_each_once() -> None:
    candidates = [Candidate(n, f"text {n}", policy) for n, policy in enumerate(["base", "base", "ppo", "ppo"])]
    assert {frozenset(pair) for pair in MODES["pairs"].groups(candidates)} == {
        frozenset(pair) for pair in [(0, 2), (0, 3), (1, 2), (1, 3)]
    }


@pytest.mark.parametrize("size", range(2, 10))
def test_up_to_nine_answers_make_all_their_pairs(size: int) -> None:
    pairs = MODES["pairs"].groups([Candidate(n, f"text {n}", None) for n in range(size)])
    assert sorted(tuple(sorted(pair)) for pair in pairs) == list(combinations(range(size), 2))


def test_many_answers_make_few_pairs_and_short_rankings() -> None:
    candidates = [Candidate(n, f"text {n}", None) for n in range(1000)]
    assert len(MODES["pairs"].groups(candidates)) == 4000
    lists = MODES["ranking"].groups(candidates)
    assert {len(part) for part in lists} == {8} and sorted(sum(lists, ())) == list(range(1000))


def test_answers_that_read_alike_are_asked_about_once_and_tie(tmp_path: Path) -> None:
    texts = ["same", "same", "other"]
    answers = write(
        tmp_path / "a.jsonl",
        [{"prompt": "p", "completion": text, "policy": name} for text, name in zip(texts, "xyz", strict=True)],
    )
    store, _ = opened(tmp_path, answers, "pairs")
    assert store.items == 1 and store.comparisons() == [], "nothing is judged yet"
    better = "other" in str(store.next(store.rater("ann")).completions[0])  # type: ignore[union-attr]
    say(store, "ann", *((1, 2) if better else (2, 1)))
    found = {(c.a, c.b): (c.outcome, c.rater) for c in store.comparisons()}
    # What was said about one of the two counts for the other one.
    assert found == {("x", "y"): (0.5, None), ("x", "z"): (0.0, "ann"), ("y", "z"): (0.0, "ann")}
    with Store.open(tmp_path / "ranking.sqlite", answers, "ranking") as ranked:
        shown = ranked.next(ranked.rater("ann"))
        assert shown is not None and len(shown.completions) == 2
        ranked.judge("ann", shown.token, "judged", (1, 2) if "other" in str(shown.completions[0]) else (2, 1))
        assert {(c.a, c.b): (c.outcome, c.rater) for c in ranked.comparisons()} == found


@pytest.mark.parametrize(("judged", "ties"), [(0, 0), (4, 4), (10, 10)])
def test_there_are_ties_of_answers_that_read_alike_as_far_as_the_others_are_judged(
    tmp_path: Path, judged: int, ties: int
) -> None:
    """Ten prompts answered alike and ten not: the win rate must not hang on how many have been judged."""
    unlike = rows(10)
    alike = [{**row, "prompt": row["prompt"] + "!", "completion": "same", "id": row["id"] + "!"} for row in unlike]
    store, _ = opened(tmp_path, write(tmp_path / "a.jsonl", unlike + alike), "pairs")
    for _ in range(judged):
        shown = store.next(store.rater("ann"))
        assert shown is not None
        say(store, "ann", *((1, 2) if "ppo" in shown.completions[0] else (2, 1)))
    outcomes = Counter((c.outcome, c.rater) for c in store.comparisons())
    assert outcomes == Counter({(0.0, "ann"): judged, (0.5, None): ties})
    for _ in range(10 - judged):  # of what nobody could say nothing is expected
        shown = store.next("ann") if judged else store.next(store.rater("ann"))
        assert shown is not None
        store.judge("ann", shown.token, "skipped", None)
    assert sum(c.rater is None for c in store.comparisons()) == 10


@given(
    share=st.floats(0, 0.5),
    every=st.integers(1, 10),
    there=st.lists(st.sampled_from([{"repeat", "attention"}, {"repeat"}, {"attention"}, set()]), max_size=200),
)
def test_repeats_and_attention_items_keep_their_share(share: float, every: int, there: list[set[str]]) -> None:
    counts = Counter(ask=0, repeat=0, attention=0)
    for available in there:
        kind = next(kind for kind in due(History(**counts), share, every) if kind == "ask" or kind in available)
        counts[kind] += 1
        others = counts["ask"] + counts["repeat"]
        assert counts["repeat"] <= share * others + 1e-6
        assert counts["attention"] * every <= others
    always = Counter(ask=0, repeat=0, attention=0)
    for _ in there:
        always[due(History(**always), share, every)[0]] += 1
        others = always["ask"] + always["repeat"]
        assert always["repeat"] > share * others - 1 - 1e-6 and always["attention"] >= (others - 1) // every


@given(items=st.integers(1, 200), attention=st.integers(1, 30))
def test_attention_items_all_find_a_place_where_there_is_room(items: int, attention: int) -> None:
    every = attention_every(items, attention)
    assert 1 <= every <= 10 and (every * attention <= items or items < attention)


def test_a_repeat_comes_later_and_with_its_sides_drawn_anew(tmp_path: Path) -> None:
    answers = write(tmp_path / "a.jsonl", rows(60))
    store, _ = opened(tmp_path, answers, "pairs", 1, 0.25)
    while (shown := store.next(store.rater("ann"))) is not None:
        better = shown.completions.index(min(shown.completions, key=str))
        store.judge("ann", shown.token, "judged", (1, 2) if better == 0 else (2, 1))
    judgements = store.annotations()
    kinds = Counter(j.kind for j in judgements)
    assert kinds == {"ask": 60, "repeat": 20}  # a quarter of what the rater saw
    orders = Counter((j.kind, j.order) for j in judgements)
    assert all(orders[kind, order] > 0 for kind in kinds for order in [(0, 1), (1, 0)])
    assert str(agreements(judgements, store.mode).self_) == "20 of 20 (100%)"


# Judging -------------------------------------------------------------------------------------------------------------


def test_a_form_that_comes_twice_is_one_judgement(tmp_path: Path, answers: Path) -> None:
    store, _ = opened(tmp_path, answers, "stars")
    shown = store.next(store.rater("ann"))
    assert shown is not None
    for stars in (5, 1):
        assert store.judge("ann", shown.token, "judged", (stars,))
    assert [j.verdict for j in store.annotations()] == [(5,)]
    assert not store.judge(store.rater("bob"), shown.token, "judged", (2,))  # nobody else's


def test_verdicts_are_stored_in_the_items_own_order(tmp_path: Path) -> None:
    answers = write(tmp_path / "a.jsonl", rows(40))
    store, _ = opened(tmp_path, answers, "pairs")
    for _ in range(40):
        shown = store.next(store.rater("ann"))
        assert shown is not None
        ppo_first = "ppo" in shown.completions[0]
        store.judge("ann", shown.token, "judged", (1, 2) if ppo_first else (2, 1))
    assert {(c.a, c.b, c.outcome, c.rater) for c in store.comparisons()} == {("base", "ppo", 0.0, "ann")}
    assert sorted(c.prompt for c in store.comparisons()) == list(range(40))


@given(st.permutations(range(5)), st.lists(st.integers(1, 5), min_size=5, max_size=5))
def test_shown_and_stored_are_inverse(order: list[int], ranks: list[int]) -> None:
    stored = as_stored(tuple(ranks), order)
    assert as_shown(stored, order) == tuple(ranks)
    assert all(stored[answer] == ranks[place] for place, answer in enumerate(order))


def test_places_of_a_ranking_are_numbered_without_gaps() -> None:
    form = {"verdict": "ranked", "place-A": "3", "place-B": "1", "place-C": "3"}
    assert MODES["ranking"].verdict(form, 3) == (2, 1, 2)
    assert MODES["ranking"].verdict({**form, "place-B": ""}, 3) is None


def test_undo_brings_the_item_back_and_again_the_one_before(tmp_path: Path, answers: Path) -> None:
    store, _ = opened(tmp_path, answers, "stars")
    first, second = say(store, "ann", 1, comment="hm"), say(store, "ann", 2)
    waiting = store.next("ann")
    for text in (second, first):
        last = store.last("ann")
        assert last is not None and store.undo("ann", last.token) and store.undo("ann", last.token) is False
        shown = store.next("ann")
        assert shown is not None and shown.completions == (text,) and shown.state == "open"
        assert shown.comment == ("hm" if text == first else "")
    assert store.progress("ann").done == 0 and store.last("ann") is None
    assert [say(store, "ann", 5), say(store, "ann", 4)] == [first, second]
    assert store.next("ann") == waiting  # still before them
    assert [j.verdict for j in store.annotations()] == [(5,), (4,)]


def test_a_skip_leaves_the_item_to_others_and_not_being_able_to_tell_counts(tmp_path: Path) -> None:
    answers = write(tmp_path / "a.jsonl", rows(1, ("base",)))
    store, _ = opened(tmp_path, answers, "stars")
    for rater, state in (("ann", "skipped"), ("bob", "unsure")):
        shown = store.next(store.rater(rater))
        assert shown is not None and store.judge(rater, shown.token, state)
        assert store.next(rater) is None
    assert store.next(store.rater("cy")) is None
    last = store.last("ann")
    assert last is not None and not store.undo("ann", last.token)  # bob has had it since


def test_what_a_closed_browser_held_goes_back_and_is_not_judged_twice(tmp_path: Path) -> None:
    answers = write(tmp_path / "a.jsonl", rows(1, ("base",)))
    store, clock = opened(tmp_path, answers, "stars")
    held = store.next(store.rater("ann"))
    assert held is not None and store.next(store.rater("bob")) is None and store.progress("bob").held == 1
    clock.now += LEASE + 1
    again = store.next("ann")
    assert again is not None and again.token == held.token  # nobody took it: still ann's
    clock.now += LEASE + 1
    assert say(store, "bob", 4)
    assert not store.judge("ann", held.token, "judged", (1,)) and store.next("ann") is None
    assert [(j.rater, j.verdict) for j in store.annotations()] == [("bob", (4,))]


def test_late_is_as_good_as_in_time_where_nobody_took_the_item(tmp_path: Path, answers: Path) -> None:
    store, clock = opened(tmp_path, answers, "stars")
    held = store.next(store.rater("ann"))
    clock.now += 10 * LEASE
    assert held is not None and store.judge("ann", held.token, "judged", (4,))
    assert [j.seconds for j in store.annotations()] == [10 * LEASE]


ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 4), st.sampled_from(["look", "judge", "judge", "skip", "unsure", "undo", "wait", "again"])
    ),
    max_size=120,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS, st.integers(1, 3), st.sampled_from([0.0, 0.3]))
def test_nobody_is_asked_too_often_whatever_raters_do(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[int, str]], per_item: int, repeats: float
) -> None:
    folder = tmp_path_factory.mktemp("store")
    store, clock = opened(folder, write(folder / "a.jsonl", rows(4, ("base",))), "stars", per_item, repeats)
    seen: dict[str, Any] = {}
    for number, action in actions:
        rater = store.rater(f"rater {number}")
        before = seen.get(rater)
        if action == "wait":
            clock.now += LEASE + 1
        elif action == "undo":
            if (last := store.last(rater)) is not None:
                store.undo(rater, last.token)
        elif action == "look" or before is None:
            seen[rater] = store.next(rater)
        else:
            state = {"skip": "skipped", "unsure": "unsure"}.get(action, "judged")
            store.judge(rater, before.token, state, (3,) if state == "judged" else None)
            if action != "again":
                seen[rater] = store.next(rater)
        judgements = store.annotations()
        counted = [j for j in judgements if j.kind == "ask" and j.state != "skipped"]
        places = Counter(j.item for j in counted)
        held = store.connection.execute(
            "SELECT item FROM asked WHERE state = 'open' AND kind = 'ask' AND lease > ?", (clock.now,)
        )
        places.update(item for (item,) in held.fetchall())
        assert max(places.values(), default=0) <= per_item
        assert store.done == len(counted) == sum(n for (n,) in store.connection.execute("SELECT done FROM items"))
        once = Counter((j.item, j.rater, j.kind) for j in judgements)
        assert max(once.values(), default=1) == 1
    store.close()


def test_what_is_done_together_fails_alone(tmp_path: Path, answers: Path) -> None:
    store, _ = opened(tmp_path, answers, "stars")
    shown = store.next(store.rater("ann"))
    assert shown is not None

    def fails() -> None:
        store.connection.execute("UPDATE asked SET comment = 'half'")
        store.done += 7
        raise ValueError("no")

    taken, error = store.together([lambda: store.judge("ann", shown.token, "judged", (4,)), fails])
    assert taken is True and isinstance(error, ValueError)
    assert [(j.verdict, j.comment) for j in store.annotations()] == [((4,), "")] and store.done == 7 + 1 - 7


# Opening -------------------------------------------------------------------------------------------------------------


def test_a_store_goes_on_where_it_was(tmp_path: Path, answers: Path) -> None:
    store, _ = opened(tmp_path, answers, "stars", 2)
    said = say(store, "ann", 4)
    store.close()
    again, _ = opened(tmp_path, None)
    assert again.mode.name == "stars" and again.settings["per_item"] == 2 and again.done == 1
    assert said not in [say(again, "ann", 3) for _ in range(5)]


def test_fewer_raters_an_item_than_before(tmp_path: Path) -> None:
    """Of two items one was judged by three, then one rater an item is enough: the other one is still to be judged."""
    answers = write(tmp_path / "a.jsonl", rows(2, ("base",)))
    store, _ = opened(tmp_path, answers, "stars", 3)
    for rater in ("ann", "bob", "cy"):
        say(store, rater, 3)
    store.close()
    store, _ = opened(tmp_path, None, None, 1)
    progress = store.progress("ann")
    assert (progress.done, progress.needed) == (3, 4)
    last = store.last("ann")
    assert last is not None and store.undo("ann", last.token)
    progress = store.progress("ann")
    assert (progress.done, progress.needed) == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["other.jsonl"], "feedback.sqlite holds judgements of other answers (answers.jsonl), not of other.jsonl"),
        (["answers.jsonl", "--mode", "pairs"], "feedback.sqlite holds stars: leave out --mode pairs"),
        (["empty.jsonl"], "empty.jsonl holds no answers"),
        (["columns.jsonl"], "columns.jsonl, line 1 has the columns ['prompt', 'text']: answers need 'completion'"),
        (["broken.jsonl"], "broken.jsonl: line 2: not JSON"),
        (["tokens.jsonl"], "tokens.jsonl: line 1, column 'tokens': '3.5' is not a whole number from 0 on"),
        (["half.jsonl"], "half.jsonl: line 1, column 'policy': half of a surrogate pair"),
        (
            ["twice.jsonl"],
            "twice.jsonl: line 3, column 'id': '2' is that of line 2 too: give each answer one of its own",
        ),
        (["question.jsonl"], "question.jsonl has no column 'prompt', but 'Question', which nobody would read"),
        (["mixed.jsonl"], "mixed.jsonl: line 2, column 'completion': messages, where others are texts"),
        (["none.jsonl"], "The file of answers 'none.jsonl' does not exist"),
        ([], "The store 'new.sqlite' does not exist: name the file of answers"),
        (["answers.jsonl", "--per-item", "0"], "--per-item is 0"),
        (["answers.jsonl", "--repeats", "0.9"], "--repeats is 0.9"),
        (["answers.jsonl", "--attention", "pairs.jsonl"], "pairs.jsonl holds pairs: --mode stars needs attention"),
        (["answers.jsonl", "--attention", "ten.jsonl"], "ten.jsonl: rating 1 is 8, but --mode stars asks for 1 to 5"),
        (["answers.jsonl", "--port", "70000"], "--port is 70000"),
        (["single.jsonl", "--mode", "pairs"], "--mode pairs needs two different answers to one prompt"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    answers: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("other.jsonl"), rows(2))
    write(Path("single.jsonl"), rows(2, ("base",)))
    write(Path("empty.jsonl"), [])
    write(Path("columns.jsonl"), [{"prompt": "p", "text": "t"}])
    write(Path("mixed.jsonl"), [{"completion": "t"}, {"completion": [{"role": "assistant", "content": "t"}]}])
    write(Path("tokens.jsonl"), [{"completion": "t", "tokens": 3.5}])
    write(Path("half.jsonl"), [{"completion": "t", "policy": "\ud800"}])
    write(Path("twice.jsonl"), [{"completion": "t"}, {"completion": "u"}, {"completion": "v", "id": 2}])
    write(Path("question.jsonl"), [{"Question": "q", "completion": "t"}])
    write(Path("pairs.jsonl"), [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    write(Path("ten.jsonl"), [{"prompt": "p", "completion": "a", "rating": 8}])
    Path("broken.jsonl").write_text('{"completion": "a"}\n{"completion": ')
    Store.open("feedback.sqlite", "answers.jsonl", "stars").close()
    store = "new.sqlite" if arguments in ([], ["single.jsonl", "--mode", "pairs"]) else "feedback.sqlite"
    assert main(["rate", "--port", "0", *arguments, "--store", store, "--no-browser"]) == 1
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1 and said.startswith("trl-ext: error: ")


def test_what_tables_make_of_numbers_and_of_nothing(tmp_path: Path) -> None:
    """A column of numbers with a gap comes as floats and NaN; 0 is a number."""
    given = [{"completion": "a", "id": 0, "tokens": 0, "policy": 7}, {"completion": "b", "tokens": 3.0}]
    given += [{"completion": "c", "tokens": float("nan"), "policy": float("nan"), "id": None}]
    read, _ = read_answers(write(tmp_path / "a.jsonl", given))
    assert [(a.id, a.tokens, a.policy) for a in read] == [("0", 0, "7"), ("2", 3, None), ("3", None, None)]


def test_a_table_of_the_same_answers_is_the_same_answers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("completion\nx\ny\n")
    lines = write(tmp_path / "a.jsonl", [{"completion": "x"}, {"completion": "y"}])
    Store.open(tmp_path / "feedback.sqlite", tmp_path / "a.csv").close()
    Store.open(tmp_path / "feedback.sqlite", lines).close()


@pytest.mark.parametrize("kind", ["text", "database", "folder"])
def test_a_store_that_is_none(tmp_path: Path, answers: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "thing"
    if kind == "text":
        store.write_text("This is a letter to my aunt, and a long one, so that SQLite takes a look at it." * 20)
    elif kind == "folder":
        store.mkdir()
    else:
        with sqlite3.connect(store) as connection:
            connection.execute("CREATE TABLE aunts (name TEXT)")
        connection.close()
    assert main(["rate", str(answers), "--store", str(store), "--no-browser"]) == 1
    assert capsys.readouterr().err.startswith(f"trl-ext: error: {store} is ")


def test_two_starts_on_one_store(tmp_path: Path, answers: Path) -> None:
    code = (
        "import sys; from trl_ext.rating import Store\nstore = Store.open(*sys.argv[1:])\nprint('open', flush=True)\n"
    )
    code += "input()"
    command = [sys.executable, "-c", code, str(tmp_path / "feedback.sqlite"), str(answers)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "open\n"
    with pytest.raises(StoreError, match=r"feedback\.sqlite is in use by another `trl-ext rate`"):
        Store.open(tmp_path / "feedback.sqlite", answers)
    with Store.read(tmp_path / "feedback.sqlite") as store:  # to look is allowed
        assert store.annotations() == []
    other.kill()
    other.wait()
    Store.open(tmp_path / "feedback.sqlite", answers).close()


def test_a_new_store_is_whole_or_not_there(tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(tmp_path, answers)
    store, _ = opened(tmp_path, answers, "labels")
    assert store.mode.name == "labels" and store.items == 6


def test_attention_items_that_cannot_be_used_make_no_store(
    tmp_path: Path, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the store would be of the wrong mode, and refuse the right one."""
    known = write(tmp_path / "known.jsonl", [{"prompt": "k", "chosen": "right", "rejected": "wrong"}])
    store = tmp_path / "feedback.sqlite"
    assert main(["rate", str(answers), "--store", str(store), "--attention", str(known), "--port", "0"]) == 1
    assert "--mode stars needs attention items that are ratings" in capsys.readouterr().err
    Store.open(store, answers, "pairs", attention=known).close()


@pytest.mark.parametrize(
    "said",
    [
        [{"chosen": "a", "rejected": "b"}, {"chosen": "b", "rejected": "a"}],
        [{"chosen": "a", "rejected": "a"}],
    ],
)
def test_attention_items_that_contradict_themselves(tmp_path: Path, answers: Path, said: list[dict[str, Any]]) -> None:
    known = write(tmp_path / "known.jsonl", [{"prompt": "k", **row} for row in said])
    with pytest.raises(feedback.FeedbackError, match="says two things about the same answer"):
        Store.open(tmp_path / "feedback.sqlite", answers, "pairs", attention=known)


def test_a_known_verdict_that_was_wrong_can_be_mended(tmp_path: Path, answers: Path) -> None:
    """The pair is turned round; it is asked about once, and judgements count by what is known now."""
    for chosen, rejected, agreed in (("right", "wrong", 0), ("wrong", "right", 1)):
        known = write(tmp_path / "known.jsonl", [{"prompt": "k", "chosen": chosen, "rejected": rejected}] * 2)
        store, _ = opened(tmp_path, answers, "pairs", attention=known)
        assert store.attention == 1
        while (shown := store.next(store.rater("ann"))) is not None:
            store.judge("ann", shown.token, "judged", (1, 2) if shown.completions[0] in ("wrong", "x") else (2, 1))
        found = agreements(store.annotations(), store.mode).known
        assert (found.agreed, found.of) == (agreed, 1)
        store.close()


# Out again -----------------------------------------------------------------------------------------------------------


def exported(store: Store, file: Path) -> list[dict[str, Any]]:
    export(store, file)
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("mode", "verdict", "form"),
    [
        ("stars", (4,), "ratings"),
        ("pairs", (2, 1), "pairs"),
        ("ranking", (1, 1, 2), "rankings"),
        ("labels", (1,), "labels"),
    ],
)
@pytest.mark.parametrize("messages", [False, True])
def test_feedback_reads_what_is_exported(
    tmp_path: Path, mode: str, verdict: tuple[int, ...], form: str, messages: bool
) -> None:
    policies = ("base", "ppo", "sft") if mode == "ranking" else ("base", "ppo")
    given = rows(3, policies)
    for row in given if messages else []:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    store, clock = opened(tmp_path, write(tmp_path / "a.jsonl", given), mode)
    said = []
    while (shown := store.next(store.rater("ann"))) is not None:
        clock.now += 2
        store.judge("ann", shown.token, "judged", verdict, "fine")
        said.append((shown.prompt, shown.completions))
    written = exported(store, tmp_path / "feedback.jsonl")
    assert {(row["rater"], row["comment"], row["seconds"]) for row in written} == {("ann", "fine", 2.0)}
    read = feedback.read(tmp_path / "feedback.jsonl")
    assert read.form == form and len(read.records) == len(said)
    by_text = {json.dumps([r.prompt, sorted(map(json.dumps, _texts(r)))]): r for r in read.records}
    policy_of = {json.dumps(row["completion"]): row["policy"] for row in given}
    for prompt, completions in said:
        record: Any = by_text[json.dumps([prompt, sorted(map(json.dumps, completions))])]
        if mode == "stars":
            assert record.ratings == (4.0,)
        elif mode == "labels":
            assert record.label is True
        elif mode == "pairs":
            assert (record.chosen, record.rejected) == (completions[1], completions[0])
        else:
            assert dict(zip(map(json.dumps, record.completions), record.ranks, strict=True)) == dict(
                zip(map(json.dumps, completions), verdict, strict=True)
            )
    for row in written:
        for column, policy in (("completion", "policy"), ("chosen", "chosen_policy"), ("rejected", "rejected_policy")):
            assert column not in row or row[policy] == policy_of[json.dumps(row[column])]
        if mode == "ranking":
            assert row["policies"] == [policy_of[json.dumps(answer)] for answer in row["completions"]]


def _texts(record: Any) -> tuple[Any, ...]:
    if hasattr(record, "chosen"):
        return record.chosen, record.rejected
    return record.completions if hasattr(record, "completions") else (record.completion,)


def test_what_says_nothing_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*rows(6), *({"prompt": "q", "completion": text, "policy": name} for text, name in [("", "x"), ("y", "y")])]
    known = write(tmp_path / "known.jsonl", [{"prompt": "k", "chosen": "right", "rejected": "wrong"}])
    store, _ = opened(tmp_path, write(tmp_path / "a.jsonl", given), "pairs", 1, 0, known)
    ties = iter([(1, 1), None, "skip"])
    while (shown := store.next(store.rater("ann"))) is not None:
        if "right" in shown.completions:
            store.judge("ann", shown.token, "judged", (1, 2) if shown.completions[0] == "right" else (2, 1))
        elif "" in shown.completions or (verdict := next(ties, (1, 2))) == (1, 2):
            store.judge("ann", shown.token, "judged", (1, 2))
        elif verdict == (1, 1):
            store.judge("ann", shown.token, "judged", (1, 1))
        else:
            store.judge("ann", shown.token, "unsure" if verdict is None else "skipped")
    assert len(exported(store, tmp_path / "out.jsonl")) == 3
    store.close()
    assert main(["rate", "--store", str(store.path), "--export", str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"3 judgements by 1 raters written to {tmp_path / 'out.jsonl'}"
    counts = {"1 ties", "1 cannot tell", "1 skipped", "1 with an empty answer", "1 attention items"}
    assert set(said[1].removeprefix("left out: ").split(", ")) == counts
    assert said[2:] == ["raters agree with known verdicts: 1 of 1 (100%)"]
    assert main(["rate", "--store", str(store.path), "--export", str(tmp_path / "a.jsonl")]) == 1
    assert "is no export of judgements" in capsys.readouterr().err and len(given) == 14


def test_nothing_to_export(tmp_path: Path, answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = opened(tmp_path, answers)
    assert main(["rate", "--store", str(store.path), "--export", str(tmp_path / "f.jsonl")]) == 1
    assert "holds no judgements to export yet" in capsys.readouterr().err and not (tmp_path / "f.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--export", "f.csv"], "f.csv does not end with .jsonl"),
        (["other.jsonl", "--export", "f.jsonl"], "--export writes what the store holds, and stops: leave out the file"),
        (["--export", "f.jsonl", "--per-item", "2"], "--export writes what the store holds, and stops"),
    ],
)
def test_what_an_export_would_not_heed_is_refused(
    tmp_path: Path,
    answers: Path,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    store, _ = opened(tmp_path, answers)
    say(store, "ann", 4)
    assert main(["rate", "--store", str(store.path), *arguments]) == 1
    assert sentence in capsys.readouterr().err and not list(tmp_path.glob("f.*"))


def test_prompts_without_two_answers_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"two": ["a", "b"], "one": ["a"], "same": ["a", "a"], "other": ["b"]}
    given = [{"prompt": prompt, "completion": text} for prompt, each in texts.items() for text in each]
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    store = tmp_path / "feedback.sqlite"
    arguments = [str(write(tmp_path / "a.jsonl", given)), "--store", str(store), "--no-browser", "--port", "0"]
    assert main(["rate", *arguments, "--mode", "pairs"]) == 0
    said = capsys.readouterr().out
    assert "3 prompts are left out: --mode pairs needs two different answers to one prompt.\n" in said
    with Store.open(tmp_path / "stars.sqlite", tmp_path / "a.jsonl") as stars:
        assert stars.prompts_left_out() == 0


def test_columns_that_nobody_reads_are_named_where_nobody_says_who_wrote_the_answers(
    tmp_path: Path, answers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    given = [{"prompt": "p", "completion": text, "model": text} for text in "ab"]
    for name, file in (("theirs", write(tmp_path / "a.jsonl", given)), ("ours", answers)):
        store = ["--store", str(tmp_path / f"{name}.sqlite"), "--no-browser", "--port", "0"]
        assert main(["rate", str(file), *store]) == 0
        said = "columns not used: model (who wrote an answer stands in 'policy')\n"
        assert (said in capsys.readouterr().out) is (name == "theirs")


def test_ranks_become_comparisons(tmp_path: Path) -> None:
    given = [{**row, "tokens": 10 + n} for n, row in enumerate(rows(1, ("base", "ppo", "sft")))]
    store, _ = opened(tmp_path, write(tmp_path / "a.jsonl", given), "ranking")
    shown = store.next(store.rater("ann"))
    assert shown is not None
    worth = {"base": 2, "ppo": 1, "sft": 2}
    store.judge("ann", shown.token, "judged", tuple(worth[text.split()[2]] for text in shown.completions))
    found = {(c.a, c.b): (c.outcome, c.tokens_a, c.tokens_b, c.id_a, c.prompt) for c in store.comparisons()}
    assert found == {
        ("base", "ppo"): (0.0, 10, 11, "0-base-0", 0),
        ("base", "sft"): (0.5, 10, 12, "0-base-0", 0),
        ("ppo", "sft"): (1.0, 11, 12, "0-ppo-0", 0),
    }


def test_agreement_by_hand(tmp_path: Path) -> None:
    """Stars 5, 3, 1 beside 5, 4, 4: one alike, two at most one apart."""
    known = write(tmp_path / "known.jsonl", [{"prompt": "k", "completion": "bad one", "rating": 1}])
    store, _ = opened(tmp_path, write(tmp_path / "a.jsonl", rows(3, ("base",))), "stars", 2, 0, known)
    stars = {"ann": {"0": 5, "1": 3, "2": 1, "one": 2}, "bob": {"0": 5, "1": 4, "2": 4, "one": 3}}
    for rater, said in stars.items():
        while (shown := store.next(store.rater(rater))) is not None:
            store.judge(rater, shown.token, "judged", (said[shown.completions[0].split()[1]],))
    found = agreements(store.annotations(), store.mode, "ann")
    assert (found.others.agreed, found.others.near, found.others.of) == (1, 2, 3)
    assert (found.known.agreed, found.known.of) == (1, 1) and found.self_.of == 0  # 2 is near enough to 1
    both = agreements(store.annotations(), store.mode)
    assert (both.others.agreed, both.others.of) == (1, 3) and (both.known.agreed, both.known.of) == (1, 2)


def test_rankings_agree_by_their_pairs(tmp_path: Path) -> None:
    """1, 2, 3 beside 1, 3, 2: of three pairs, two stand in the same order."""
    store, _ = opened(tmp_path, write(tmp_path / "a.jsonl", rows(1, ("x", "y", "z"))), "ranking", 2)
    for rater, ranks in {"ann": {"x": 1, "y": 2, "z": 3}, "bob": {"x": 1, "y": 3, "z": 2}}.items():
        shown = store.next(store.rater(rater))
        assert shown is not None
        store.judge(rater, shown.token, "judged", tuple(ranks[text.split()[2]] for text in shown.completions))
    found = agreements(store.annotations(), store.mode, "bob")
    assert (found.others.agreed, found.others.of) == (2, 3)


def test_the_files_that_the_page_needs_are_in_the_package() -> None:
    folder = Path(sys.modules["trl_ext.rating"].__file__ or "").parent
    assert {path.name for path in (folder / "static").iterdir()} == {"rating.css", "rating.js"}
    assert "item.html" in {path.name for path in (folder / "templates").iterdir()}
