"""The page as a browser without script sees it, and who may come in."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.unit.test_rating_store import rows, write
from trl_ext.cli import main
from trl_ext.rating import Store
from trl_ext.rating.app import app_for, turns
from trl_ext.rating.serving import listening, serve

HERE = "http://127.0.0.1:8765"
VERDICTS = {"stars": "4", "pairs": "tie", "ranking": "ranked", "labels": "bad"}
CONTROLS = {
    "stars": ["1 star", "2 stars", "3 stars", "4 stars", "5 stars"],
    "pairs": ["A is better", "Tie", "B is better"],
    "ranking": ["Save this order"],
    "labels": ["Good", "Bad"],
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "feedback.sqlite", write(tmp_path / "answers.jsonl", rows()), "stars", 2) as store:
        yield store


def browser(store: Store, base: str = HERE, **named: Any) -> TestClient:
    return TestClient(app_for(store, **named), base_url=base)


def token_in(page: str) -> str:
    found = re.search(r'name="ask" value="([^"]+)">\s*<fieldset', page)
    assert found, page
    return found[1]


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


@pytest.mark.parametrize("mode", VERDICTS)
def test_every_mode_works_without_script(tmp_path: Path, mode: str) -> None:
    answers = write(tmp_path / "answers.jsonl", rows(2, ("base", "ppo", "sft")))
    with Store.open(tmp_path / "feedback.sqlite", answers, mode) as store:
        client, judged = browser(store), 0
        while "<fieldset" in (page := client.get("/").text):
            names = re.findall(r'aria-label="([^"]+)"[ >]', page[page.index("<fieldset") :])
            assert [n for n in names if n != "Undo"] == [*CONTROLS[mode], "Cannot tell", "Skip"]
            places = {f"place-{letter}": str(place) for place, letter in enumerate("ABC", 1)}
            form = {"ask": token_in(page), "verdict": VERDICTS[mode], "comment": " fine ", **places}
            answer = client.post("/judge", data=form, follow_redirects=False)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
            judged += 1
        assert "Everything is judged" in page and judged == store.items
        assert {j.comment for j in store.annotations()} == {"fine"}


def test_who_rates_is_in_the_link_or_the_cookie_or_asked_once(store: Store) -> None:
    by_link, by_name = browser(store), browser(store)
    assert "Ann" in text_of(by_link.get("/?rater=Ann").text)
    assert "Ann" in text_of(by_link.get("/").text)
    page = by_name.get("/").text
    assert "You are called rater 2 here" in text_of(page)
    shown = token_in(page)
    assert token_in(by_name.post("/name", data={"name": "  Bob\x00 B "}).text) == shown
    by_name.post("/judge", data={"ask": shown, "verdict": "2"})
    assert [j.rater for j in store.annotations()] == ["Bob B"]
    assert "Your own name" not in by_name.get("/").text
    assert by_name.post("/name", data={"name": " "}).status_code == 400


def test_undo_and_what_was_saved(store: Store) -> None:
    client = browser(store)
    first = token_in(client.get("/?rater=ann").text)
    page = client.post("/judge", data={"ask": first, "verdict": "4"}).text
    assert "Saved: 4 stars" in text_of(page) and "1 of 12 judged, 1 by you" in text_of(page)
    assert token_in(client.post("/undo", data={"ask": first}).text) == first and store.annotations() == []
    assert token_in(client.post("/undo", data={"ask": first}).text) == first  # the same form again


def test_a_form_without_a_judgement_is_refused(store: Store) -> None:
    client = browser(store)
    asked = token_in(client.get("/").text)
    for verdict in ("", "6", "0", "good", "4.5"):
        answer = client.post("/judge", data={"ask": asked, "verdict": verdict})
        assert answer.status_code == 400 and "press one of the buttons" in answer.text
    assert client.post("/judge", content=b"x" * 70_000).status_code == 413
    many = client.post("/judge", content=b"&".join([b"a=1"] * 101))
    assert many.status_code == 400 and "more than 100 fields" in many.text
    assert client.post("/judge", data={"ask": "nobody's", "verdict": "3"}).status_code == 200
    assert store.annotations() == []


def test_another_verdict_on_a_page_that_was_judged_is_told(store: Store) -> None:
    """From a second tab, or after going back: the first stays."""
    client = browser(store)
    first = token_in(client.get("/?rater=ann").text)
    for stars, comment, told in (("4", "a\r\nb", False), ("4", "a\nb", False), ("2", "a\nb", True), ("4", "c", True)):
        page = client.post("/judge", data={"ask": first, "verdict": stars, "comment": comment}).text
        assert ("You had judged that item already" in page) == told and "Saved: 4 stars" in text_of(page)
    assert [(j.verdict, j.comment) for j in store.annotations()] == [((4,), "a\nb")]


def test_a_skip_that_others_have_is_told(tmp_path: Path) -> None:
    answers = write(tmp_path / "answers.jsonl", rows(1, ("base",)))
    with Store.open(tmp_path / "feedback.sqlite", answers) as store:
        ann, bob = browser(store), browser(store)
        skipped = token_in(ann.get("/?rater=ann").text)
        ann.post("/judge", data={"ask": skipped, "verdict": "skip"})
        bob.get("/?rater=bob")
        assert "given to others since" in ann.post("/undo", data={"ask": skipped}).text


def test_names_are_never_cut_and_letters_are_one_however_they_are_typed(store: Store) -> None:
    client = browser(store)
    long = client.get(f"/?rater={'n' * 61}")
    assert long.status_code == 400 and "60 characters at most" in long.text
    assert client.get(f"/?rater={'n' * 60}").status_code == 200
    for typed in ("Ren\u00e9", "Rene\u0301"):
        browser(store).get("/", params={"rater": typed})
    (found,) = store.connection.execute("SELECT count(*) FROM raters WHERE name LIKE 'Ren%'").fetchone()
    assert found == 1


@pytest.mark.parametrize("empty", ["", " \n", [{"role": "assistant", "content": " "}]])
def test_an_empty_answer_is_told(tmp_path: Path, empty: Any) -> None:
    answers = write(tmp_path / "answers.jsonl", [{"completion": empty}])
    with Store.open(tmp_path / "feedback.sqlite", answers) as store:
        assert "An empty answer" in browser(store).get("/").text


def test_the_end_says_what_others_said(store: Store) -> None:
    for rater, stars in (("ann", "4"), ("bob", "2")):
        client = browser(store)
        page = client.get(f"/?rater={rater}").text
        while "<fieldset" in page:
            page = client.post("/judge", data={"ask": token_in(page), "verdict": stars}).text
    assert "You: 2 stars . Another rater: 4 stars ." in text_of(page)
    assert "You agree with others 0% 0 of 6" in text_of(page)


def test_what_a_model_wrote_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\n\n  <b onclick='x'>\"bold\"</b> {{ 'ha' * 7 }}"
    row = {"prompt": [{"role": "<i>user</i>", "content": evil}], "completion": [{"role": "assistant", "content": evil}]}
    with Store.open(tmp_path / "f.sqlite", write(tmp_path / "a.jsonl", [row]), "stars") as store:
        client = browser(store)
        page = client.get("/?rater=<u>ann</u>").text
        client.post("/judge", data={"ask": token_in(page), "verdict": "3", "comment": "<s>no</s>"})
        last = client.get("/").text + client.post("/undo", data={"ask": store.last("<u>ann</u>").token}).text  # type: ignore[union-attr]
    for tag in ("<script>alert", "<b onclick", "<i>", "<u>", "<s>", "hahahahahahaha"):
        assert tag not in (page + last).lower()
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;\n\n  &lt;b onclick=") == 2


def test_nothing_is_loaded_from_elsewhere(store: Store) -> None:
    client = browser(store)
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["cache-control"] == "no-store"
    assert re.findall(r'(?:src|href)="([^"]+)"', answer.text) == [
        "/static/rating.css",
        "/static/rating.js",
        "/figures",
    ]
    assert client.get("/static/rating.js").status_code == client.get("/static/rating.css").status_code == 200
    assert "://" not in client.get("/static/rating.js").text + client.get("/static/rating.css").text
    assert client.get("/static/../store.py").status_code == 404 and client.get("/favicon.ico").status_code == 204


# Who may come in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("localhost:1", 200),
        ("[::1]:8765", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_a_name_that_was_rebound_to_this_machine_is_refused(store: Store, host: str, status: int) -> None:
    answer = browser(store).get("/", headers={"host": host})
    assert answer.status_code == status and ("this machine only" in answer.text) == (status == 403)


@pytest.mark.parametrize(
    ("headers", "taken"),
    [
        ({}, True),
        ({"origin": HERE}, True),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"sec-fetch-site": "same-origin", "origin": HERE}, True),
        ({"sec-fetch-site": "same-site", "origin": HERE}, False),
        ({"sec-fetch-site": "cross-site", "origin": HERE}, False),
    ],
)
def test_another_site_cannot_post(store: Store, headers: dict[str, str], taken: bool) -> None:
    client = browser(store)
    asked = token_in(client.get("/").text)
    for path in ("/judge", "/undo", "/name"):
        form = {"ask": asked, "verdict": "3", "name": "x"}
        answer = client.post(path, data=form, headers=headers, follow_redirects=False)
        assert answer.status_code == (303 if taken else 403)
    assert (
        len(store.connection.execute("SELECT 1 FROM asked WHERE comment != '' OR seconds >= 0").fetchall()) == 0
        or taken
    )
    assert taken or store.annotations() == []


@pytest.mark.parametrize(("fetched", "status"), [("document", 200), ("image", 403), ("iframe", 403), (None, 200)])
def test_another_site_takes_no_items_by_its_images(store: Store, fetched: str | None, status: int) -> None:
    """Which would make a rater each, and hold an item for them."""
    headers = {"sec-fetch-site": "cross-site", **({"sec-fetch-dest": fetched} if fetched else {})}
    assert browser(store).get("/?rater=x", headers=headers).status_code == status
    asked = store.connection.execute("SELECT count(*) FROM asked").fetchone()
    assert asked == (1 if status == 200 else 0,)
    own = {"sec-fetch-site": "same-origin", "sec-fetch-dest": "style"}
    assert browser(store).get("/static/rating.css", headers=own).status_code == 200


def test_cookies_stay_on_this_site(store: Store) -> None:
    client = browser(store, token="secret", host="0.0.0.0")
    kept = client.get("/?token=secret&rater=ann").headers.get_list("set-cookie")
    assert len(kept) == 2
    for cookie in kept:
        assert {"httponly", "samesite=strict"} <= {part.strip().lower() for part in cookie.split(";")}
    asked = token_in(client.get("/").text)
    client.cookies.clear()
    assert client.post("/judge", data={"ask": asked, "verdict": "3"}).status_code == 403
    with_token = client.post("/judge?token=secret", data={"ask": asked, "verdict": "3"})
    assert with_token.status_code == 403 and "Nobody knows who you are" in with_token.text
    assert store.annotations() == []


def test_two_stores_of_the_same_answers_keep_their_cookies_apart(store: Store, tmp_path: Path) -> None:
    """As stars and then labels of one file, on two ports of one machine."""
    with Store.open(tmp_path / "labels.sqlite", store.path.with_name("answers.jsonl"), "labels") as other:
        kept = [
            {cookie.split("=")[0] for cookie in answer.headers.get_list("set-cookie")}
            for answer in (
                browser(each, token="secret", host="0.0.0.0").get("/?token=secret&rater=ann") for each in (store, other)
            )
        ]
    assert len(kept[0] | kept[1]) == 4


def test_without_a_token_none_goes_into_a_header(store: Store) -> None:
    answer = browser(store).get("/?token=x%0d%0aX-Evil:1&rater=ann")
    assert answer.status_code == 200 and "Evil" not in str(answer.headers)


def test_from_another_sites_link_the_page_asks_again_for_its_cookie(store: Store) -> None:
    client = browser(store)
    answer = client.get("/", headers={"sec-fetch-site": "cross-site"})
    assert 'http-equiv="refresh"' in answer.text and not answer.headers.get("set-cookie")
    assert "Ann" in client.get("/?rater=Ann", headers={"sec-fetch-site": "cross-site"}).text


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "rater.example"])
def test_elsewhere_the_link_needs_its_token(store: Store, host: str) -> None:
    client = browser(store, f"http://{host}:8765", host=host, token=str(store.settings["secret"]))
    for wrong in ("/", "/?token=", "/?token=ä", "/figures", "/static/rating.css"):
        assert client.get(wrong).status_code == 403
    assert client.get(f"/?token={store.settings['secret']}").status_code == 200
    assert client.get("/").status_code == client.get("/static/rating.css").status_code == 200  # by the cookie


def test_the_link_of_a_server_for_others_has_the_stores_token(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    said: list[str] = []
    for host in ("127.0.0.1", "0.0.0.0"):
        serve(store, host, 0, browser=False, say=said.append)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", said[0])
    assert re.fullmatch(r"http://[\w.-]+:\d+/\?token=[\w-]{20,}", said[1]) and "0.0.0.0" not in said[1]
    assert said[1].endswith(store.settings["secret"])


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = write(tmp_path / "answers.jsonl", rows())
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        arguments = ["rate", str(answers), "--store", str(tmp_path / "f.sqlite"), "--port", str(port), "--no-browser"]
        assert main(arguments) == 1
        assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in capsys.readouterr().err
        assert main([*arguments, "--host", "192.0.2.1"]) == 1  # for documentation: no machine has it
        assert "cannot listen on 192.0.2.1" in capsys.readouterr().err
    assert main([*arguments, "--port", "70000"]) == 1
    assert "--port is 70000" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"], "no store is left behind"


def test_parts_of_answers_are_sent_at_once() -> None:
    """asyncio sets TCP_NODELAY only on sockets that name their protocol; without it each page waits 40 ms."""
    with listening("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_without_the_extra_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvicorn", None)
    monkeypatch.delitem(__import__("sys").modules, "trl_ext.rating.serving")
    assert main(["rate", "answers.jsonl", "--store", str(tmp_path / "f.sqlite")]) == 1
    assert capsys.readouterr().err == "trl-ext: error: The page needs uvicorn: pip install 'trl-ext[rate]'.\n"
    assert not (tmp_path / "f.sqlite").exists()


def test_a_full_disk_is_told_and_nothing_is_half_done(store: Store) -> None:
    client = browser(store)
    asked = token_in(client.get("/").text)
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages}")
    form = {"ask": asked, "verdict": "3", "comment": "long " * 1900}
    answer = client.post("/judge", data=form)
    assert answer.status_code == 503 and "Nothing was stored (database or disk is full)" in answer.text
    assert store.annotations() == [] and store.done == 0
    store.connection.execute("PRAGMA max_page_count = 1000000")
    assert "1 of 12 judged" in text_of(client.post("/judge", data=form).text)


def test_conversations_are_turns() -> None:
    call = {"function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    (who, text), (_, called) = turns(messages, "")
    assert (who, text) == ("User", "a\nb") and '"name": "add"' in called
    assert turns("x", "Prompt") == [("Prompt", "x")] and turns("", "Prompt") == []
