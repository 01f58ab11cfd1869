"""The report: whole, self-contained, and harmless whatever a model said."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.unit.test_diagnostics import CONFIG, HEALTHY, SICK, rows, write_run
from trl_ext.cli import main
from trl_ext.diagnostics import RunLog, Sample, write_report
from trl_ext.diagnostics.charts import Line, line_chart, number, scatter
from trl_ext.diagnostics.report import Run, render

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = '</td><script>alert(1)</script><img src=x onerror=alert(2)> & "quoted" <b>bold</b>'


class Seen(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*runs: Run) -> Seen:
    seen = Seen()
    seen.feed(render(list(runs)))
    return seen


def run_named(name: str, samples: list[Sample] | None = None, **changes: object) -> Run:
    log = RunLog.of(rows(**{**HEALTHY, **changes}), CONFIG, samples or [])
    return Run(name, log, {"trl": "1.16.0"})


def test_what_a_model_said_is_text() -> None:
    samples = [Sample(step=step, prompt=EVIL, completion=EVIL, score=1.0, kl=0.1, tokens=5) for step in (8, 64, 128)]
    plain = page_of(run_named("run"))
    seen = page_of(run_named(EVIL, samples, **SICK["truncation"]))
    assert seen.tags.count("script") == plain.tags.count("script") == 1
    assert "img" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.text.count(EVIL) >= 6, "prompts and answers are shown as they are"


def test_nothing_is_fetched() -> None:
    html = render([run_named("run")])
    assert "default-src 'none'" in html
    assert not re.findall(r"(?:src|href)=", html) and not re.findall(r"https?://", html)


def test_findings_come_first_and_every_curve_is_there() -> None:
    seen = page_of(run_named("run", **SICK["truncation"]))
    text = seen.text
    assert text.index("Completions are cut off") < text.index("Curves")
    for title in ("Score", "Frontier", "KL to the reference", "KL coefficient", "Entropy", "Clip fraction",
                  "Explained variance", "Length", "Gradient norms", "Reward functions"):  # fmt: skip
        assert title in text, title
    assert seen.tags.count("svg") >= 12


def test_two_runs_share_their_charts_and_show_what_differs() -> None:
    first, second = run_named("one"), run_named("two", **SICK["truncation"])
    second = Run("two", RunLog.of(second.log.rows, {**CONFIG, "kl_coef": 7.5}), {"trl": "1.12.0"})
    seen = page_of(first, second)
    assert "one: training" in seen.text and "two: training" in seen.text
    assert ("class", "differs") in seen.attributes
    assert "7.5" in seen.text and "1.12.0" in seen.text


def test_the_same_prompts_are_shown_at_start_middle_and_end() -> None:
    watched = [
        Sample(step=step, prompt=f"p{i}", completion=f"answer {step}", score=1.0, watched=True)
        for step in (0, 10, 20, 30)
        for i in range(2)
    ]
    passing = [Sample(step=5, prompt="p9", completion="in passing", score=1.0) for _ in range(9)]
    text = page_of(run_named("run", watched + passing)).text
    assert "answer 0" in text and "answer 20" in text and "answer 30" in text
    assert "answer 10" not in text and "in passing" not in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", **SICK["truncation"])
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    other = write_run(tmp_path / "other")
    assert main(["report", str(folder), str(other), "--output", str(tmp_path / "both.html")]) == 0
    assert "other" in (tmp_path / "both.html").read_text()
    reward = tmp_path / "reward"
    reward.mkdir()
    (reward / "trainer_state.json").write_text(json.dumps({"log_history": rows(accuracy=0.7, loss=0.5)}))
    assert main(["report", str(folder), str(reward)]) == 0, "runs of two kinds, which share no curve"
    with pytest.raises(ValueError, match="one run or two, not 3"):
        write_report([folder, other, folder])


@pytest.mark.parametrize("broken", ["{", "[]", "{}", '{"policies": {"a": 1}, "judge": null}'])
def test_an_evaluation_that_is_broken_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    folder = write_run(tmp_path / "run", **SICK["truncation"])
    (folder / "evaluation.json").write_text(broken)
    assert main(["report", str(folder)]) == 0
    said, told = capsys.readouterr()
    assert (
        said.strip() == str(folder / "report.html")
        and "Policies side by side" not in (folder / "report.html").read_text()
    )
    assert told.startswith(f"{folder / 'evaluation.json'} is left out") and told.count("\n") == 1


def test_charts_by_hand() -> None:
    svg = line_chart([Line("a", [0, 10], [1.0, 3.0])], "t")
    assert 'points="46.0,150.0 332.0,8.0"' in svg  # from the lower left corner to the upper right one
    assert ">1<" in svg and ">2<" in svg and ">3<" in svg
    assert line_chart([], "t") == line_chart([Line("a", [0], [float("nan")])], "t") == ""
    assert scatter([Line("a", [0, 1], [1.0, 2.0])], "t").count("<circle") == 2
    long = line_chart([Line("a", list(range(5000)), [float(i) for i in range(5000)])], "t")
    assert 250 <= long.split('points="')[1].split('"')[0].count(" ") + 1 <= 300
    assert "332.0,8.0" in long, "the last point stays"


@pytest.mark.parametrize(("value", "text"), [(0.123456, "0.123"), (12345.6, "1.23e4"), (1e-7, "1e-7"), (3.0, "3")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_runs_nothing_that_a_model_said(tmp_path: Path) -> None:
    """The page's own script sorts tables; one in an answer would change the title."""
    evil = "<script>document.title = 'taken over'</script><img src=x onerror=\"document.title = 'taken over'\">"
    samples = [Sample(step=step, prompt=evil, completion=evil, score=1.0, kl=0.1, tokens=5) for step in (8, 64, 128)]
    page = tmp_path / "report.html"
    page.write_text(render([run_named("run", samples, **SICK["truncation"])]), encoding="utf-8")
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>run</title>" in done.stdout
    assert "taken over" in done.stdout, "shown as text"
