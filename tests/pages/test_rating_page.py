"""The page in a real Chromium: its keys, its names, dragging, colours, a phone; nothing from elsewhere, no markup."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pages.conftest import look, write_answers
from trl_ext.rating import Store

pytestmark = pytest.mark.browser

KEYS = {
    "stars": {"1": "1 star", "2": "2 stars", "3": "3 stars", "4": "4 stars", "5": "5 stars"},
    "pairs": {"A": "A is better", "B": "B is better", "T": "Tie"},
    "labels": {"G": "Good", "X": "Bad"},
}
SAID = {"1": (1,), "2": (2,), "3": (3,), "4": (4,), "5": (5,), "G": (1,), "X": (0,)}
FOCUSABLE = "a[href], button:not([disabled]), input:not([type=hidden]), textarea, select, [tabindex]"
# The contrast of every text that is seen with what lies behind it. Disabled controls need none (WCAG 1.4.3).
CONTRASTS = """
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = (e) => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
  if (c.length < 4 || c[3] === 1) return c; if (c[3] > 0) throw "half transparent"; } return [255, 255, 255]; };
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const element = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || element.closest("[disabled], .unseen, select, option")
      || !element.getClientRects().length) continue;
  found.push([element, walk.currentNode.data.trim(), getComputedStyle(element).color]);
}
for (const field of document.querySelectorAll("textarea, input[type=text]"))
  if (field.placeholder) found.push([field, field.placeholder, getComputedStyle(field, "::placeholder").color]);
return found.map(([element, text, colour]) => {
  const [a, b] = [light(parse(colour)), light(behind(element))].sort((x, y) => y - x);
  return [text, (a + .05) / (b + .05)];
});
"""


def press(browser: Any, *keys: str) -> None:
    """Keys, wherever the focus is; after each that leads to another page, that page."""
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def click(element: Any) -> None:
    """A click where it can be seen: what is judged scrolls under the bar with the buttons."""
    element.parent.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def controls(browser: Any) -> dict[str, Any]:
    """Everything that can be pressed or written in, by its accessible name."""
    found = browser.find_elements("css selector", "button, a[href], input:not([type=hidden]), textarea, select")
    return {element.accessible_name: element for element in found if element.is_displayed()}


def wait_for_url(browser: Any, url: str) -> None:
    """The browser tells the new address a moment after the page has changed it."""
    from selenium.webdriver.support import expected_conditions
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(expected_conditions.url_to_be(url))


def wait_for(browser: Any, text: str) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    # A page that goes while it is read is not the one that is waited for.
    patient = WebDriverWait(browser, 20, ignored_exceptions=[StaleElementReferenceException])
    patient.until(lambda b: text in b.find_element("css selector", "body").text)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "feedback.sqlite"


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("mode", KEYS)
def test_keys_and_names(fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path, mode: str) -> None:
    fresh.get(rate(write_answers(tmp_path / "a.jsonl"), "--store", store, "--mode", mode))
    named = controls(fresh)
    assert {*KEYS[mode].values(), "Cannot tell", "Skip", "Undo", "Comment"} <= set(named) and "" not in named
    expected = []
    for number, (key, name) in enumerate(KEYS[mode].items(), 1):
        answers = [e.get_attribute("textContent") for e in fresh.find_elements("css selector", ".answer .text")]
        press(fresh, key.lower() if number % 2 else key)
        wait_for(fresh, f"Saved: {name}")
        wait_for(fresh, f"{number} by you")
        expected.append((key, answers))
    press(fresh, "s")
    wait_for(fresh, "Saved: Skipped")
    press(fresh, "n")
    wait_for(fresh, "Saved: Cannot tell")
    press(fresh, "u")
    wait_for(fresh, "Saved: Skipped")
    click(controls(fresh)["Undo"])
    wait_for(fresh, f"Saved: {name}")
    press(fresh, "m", "because of 1, A, B, T, G, X, S and U")
    assert fresh.switch_to.active_element.get_attribute("value") == "because of 1, A, B, T, G, X, S and U"
    press(fresh, "\ue00c", next(iter(KEYS[mode])))  # Escape leaves the comment
    wait_for(fresh, f"{number + 1} by you")
    with Store.read(store) as kept:
        judgements = sorted((j for j in kept.annotations() if not j.comment), key=lambda j: j.item)
        commented = [j.comment for j in kept.annotations() if j.comment]
    assert commented == ["because of 1, A, B, T, G, X, S and U"]
    assert len(judgements) == len(expected)
    for (key, answers), judgement in zip(expected, judgements, strict=True):
        texts = [answer.completion for answer in judgement.answers]
        assert judgement.verdict is not None
        if mode == "pairs":
            assert [texts[place] for place in judgement.order] == answers
            better = {"A": (0, 1), "B": (1, 0), "T": None}[key]
            ranks = [judgement.verdict[place] for place in judgement.order]
            assert ranks == ([1, 1] if better is None else [1 + better[0], 1 + better[1]])
        else:
            assert judgement.verdict == SAID[key]


def test_a_ranking_by_keys_and_by_buttons(fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    fresh.get(rate(write_answers(tmp_path / "a.jsonl"), "--store", store, "--mode", "ranking"))

    def order() -> str:
        items = fresh.find_elements("css selector", ".ranking li")
        return " ".join(
            f"{e.get_attribute('data-letter')}{e.find_element('css selector', '.number').text}" for e in items
        )

    def comes(expected: str) -> None:
        """A busy browser works off keys and clicks a moment after they were sent."""
        WebDriverWait(fresh, 20).until(lambda _: order() == expected, f"{expected} did not come")

    comes("A1 B2 C3 D4")
    press(fresh, "c")
    assert fresh.switch_to.active_element.get_attribute("data-letter") == "C"
    press(fresh, "d")
    ActionChains(fresh).key_down(Keys.SHIFT).send_keys(Keys.UP, Keys.UP).key_up(Keys.SHIFT).perform()
    comes("A1 D2 B3 C4")
    press(fresh, Keys.DOWN, "t")
    comes("A1 D2 B2 C3")
    assert fresh.find_element("id", "said").get_attribute("textContent") == (
        "Answer B has place 2, tied with the answer above."
    )
    named = controls(fresh)
    click(named["Move answer C up"])
    comes("A1 D2 C2 B2")  # among the tied it is one of them
    click(named["Move answer C up"])
    comes("A1 C2 D3 B3")  # and leaves them so
    assert fresh.switch_to.active_element.accessible_name == "Move answer C up"  # for the next press
    click(named["Tie answer C with the one above"])
    comes("A1 C1 D2 B2")
    click(named["Move answer A down"])
    comes("C1 A2 D3 B3")  # the tie is broken
    click(named["Tie answer A with the one above"])
    comes("C1 A1 D2 B2")
    assert not named["Move answer C up"].is_enabled() and not named["Tie answer C with the one above"].is_enabled()
    shown = {
        e.get_attribute("data-letter"): e.find_element("css selector", ".text").get_attribute("textContent")
        for e in fresh.find_elements("css selector", ".ranking li")
    }
    click(fresh.find_element("css selector", ".ranking li"))
    press(fresh, "a", Keys.ENTER)
    wait_for(fresh, "Saved: A and C, then B and D")
    with Store.read(store) as kept:
        (judgement,) = kept.annotations()
    found = dict(zip((a.completion for a in judgement.answers), judgement.verdict or (), strict=True))
    assert found == {shown["A"]: 1, shown["C"]: 1, shown["B"]: 2, shown["D"]: 2}


def test_a_ranking_by_dragging(fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    fresh.get(rate(write_answers(tmp_path / "a.jsonl"), "--store", store, "--mode", "ranking"))
    look(fresh, height=1600)

    def letters() -> str:
        return "".join(e.get_attribute("data-letter") for e in fresh.find_elements("css selector", ".ranking li"))

    last, first = (fresh.find_element("css selector", f"[data-letter={letter}] .handle") for letter in "DA")
    ActionChains(fresh).click_and_hold(last).move_to_element(first).move_by_offset(0, -20).release().perform()
    assert letters() == "DABC"
    box = fresh.find_element("css selector", "[data-letter=B]")
    handle = fresh.find_element("css selector", "[data-letter=D] .handle")
    ActionChains(fresh).click_and_hold(handle).move_to_element(box).move_by_offset(0, 30).release().perform()
    assert letters() == "ABDC"
    # All at once, as a quick hand does: the pointer is seen at the end alone, and what was passed keeps its order.
    quick = ActionChains(fresh, duration=0)
    for letter, onto, offset, after in (("C", "A", -20, "CABD"), ("C", "D", 30, "ABDC")):
        handle = fresh.find_element("css selector", f"[data-letter={letter}] .handle")
        box = fresh.find_element("css selector", f"[data-letter={onto}]")  # its middle counts, however long it is
        quick.click_and_hold(handle).move_to_element_with_offset(box, 0, offset).release().perform()
        assert letters() == after
    click(controls(fresh)["Save this order"])
    wait_for(fresh, "Saved: A, then B, then D, then C")


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("mode", ["stars", "pairs", "ranking", "labels"])
@pytest.mark.parametrize("conversations", [False, True], ids=["texts", "conversations"])
def test_accessible_in_both_colour_schemes_and_on_a_phone(
    fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path, mode: str, conversations: bool
) -> None:
    answers = write_answers(tmp_path / "a.jsonl", conversations)
    fresh.get(rate(answers, "--store", store, "--mode", mode, "--per-item", "2"))
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            look(fresh, width, scheme)
            contrasts = fresh.execute_script(CONTRASTS)
            assert len(contrasts) > 8
            assert {text: round(value, 2) for text, value in contrasts if value < 4.5} == {}
            page, window = fresh.execute_script(
                "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            assert page <= window == width or width == 1280
            heights = [e.size["height"] for e in fresh.find_elements("css selector", "button, textarea")]
            assert min(h for h in heights if h) >= 44
    assert "" not in controls(fresh)
    # The focus goes down the page as the eye does: order of the document, no tabindex above 0.
    reached, seen = [], fresh.find_elements("css selector", FOCUSABLE)
    fresh.execute_script("document.activeElement.blur(); getSelection().removeAllRanges()")
    for _ in [element for element in seen if element.is_displayed()]:
        press(fresh, "\ue004")
        reached.append(fresh.switch_to.active_element)
    assert reached == [element for element in seen if element.is_displayed()]
    assert not fresh.find_elements("css selector", "[tabindex]:not([tabindex='0'])")
    asked = [json.loads(entry["message"])["message"] for entry in fresh.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"}
    assert len(urls) >= 3 and all(url.startswith("http://127.0.0.1:") for url in urls)
    assert [entry for entry in fresh.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_what_a_model_wrote_is_text(fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path) -> None:
    fresh.get(rate(write_answers(tmp_path / "a.jsonl"), "--store", store, "--mode", "ranking"))
    for _ in range(3):
        title, texts = fresh.title, [e.text for e in fresh.find_elements("css selector", ".answer .text")]
        assert title == "Put the answers in order, the best on top."
        if found := [text for text in texts if "<script>" in text]:
            assert found[0].startswith("  <b>Dear</b> neighbour,\n\n    mind the <script>")  # as it was written
            assert fresh.find_elements("css selector", ".answer b, .answer img, .answer script") == []
            break
        click(controls(fresh)["Save this order"])
    else:
        pytest.fail("the answer with markup was not shown")


def test_a_whole_work_of_two_raters_and_its_end(
    fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path
) -> None:
    link = rate(write_answers(tmp_path / "a.jsonl"), "--store", store, "--mode", "labels", "--per-item", "2")
    for rater, key in (("Ann", "g"), ("Bob", "x")):
        fresh.get(f"{link}?rater={rater}")
        wait_for_url(fresh, link)  # the name is out of the address bar
        for number in range(12):
            wait_for(fresh, f"{number} by you")
            press(fresh, key)
        wait_for(fresh, "Thank you!")
    wait_for(fresh, "Everything is judged")
    text = fresh.find_element("css selector", "main").text
    assert "You agree with others\n0%\n0 of 12" in text and "You: Bad. Another rater: Good." in text
    for scheme in ("light", "dark"):
        look(fresh, 390, scheme)
        assert min(value for _, value in fresh.execute_script(CONTRASTS)) >= 4.5
    press(fresh, "u")
    wait_for(fresh, "11 by you")


def test_another_site_cannot_judge(fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path) -> None:
    """A page of another origin posts the very form; the browser says where it comes from."""
    link = rate(write_answers(tmp_path / "a.jsonl"), "--store", store, "--mode", "stars")
    fresh.get(link)
    token = fresh.find_element("css selector", "form.judge input[name=ask]").get_attribute("value")
    fresh.get("data:text/html,<title>elsewhere</title>")
    fresh.execute_script(
        """document.body.innerHTML = `<form method="post" action="${arguments[0]}judge"><input name="ask"
        value="${arguments[1]}"><input name="verdict" value="1"></form>`; document.forms[0].submit()""",
        link,
        token,
    )
    wait_for(fresh, "another site")
    with Store.read(store) as kept:
        assert kept.annotations() == []


def test_a_link_for_others_works_once_opened(fresh: Any, rate: Callable[..., str], tmp_path: Path, store: Path) -> None:
    link = rate(write_answers(tmp_path / "a.jsonl"), "--store", store, "--mode", "stars", "--host", "0.0.0.0")
    page, _, token = link.partition("?token=")
    assert len(token) > 20
    fresh.get(page)
    wait_for(fresh, "ask whoever started it for the link")
    fresh.get("data:text/html,<title>elsewhere</title>")
    fresh.execute_script("location = arguments[0]", f"{link}&rater=Ann")  # as from a mail
    wait_for(fresh, "Ann")
    wait_for_url(fresh, page)
    assert fresh.execute_script("return getComputedStyle(document.body).display") == "flex"  # the style came too
    press(fresh, "4")
    wait_for(fresh, "Saved: 4 stars")
    fresh.get("data:text/html,<title>elsewhere</title>")
    fresh.execute_script("location = arguments[0]", link)  # the same link again: still Ann
    wait_for(fresh, "Ann")
