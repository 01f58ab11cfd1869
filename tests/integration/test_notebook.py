"""What a notebook shows, heard by a stand-in for IPython."""

import html
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers import saved_model
from tests.integration.test_hub import ppo


class Page:
    """What `display` was given, each thing as it was last updated."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def display(self, content: str, display_id: bool = False) -> Any:
        page, place = self.shown, len(self.shown)
        page.append(content)

        class Handle:
            def update(self, content: str) -> None:
                page[place] = content

        return Handle()


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Page]:
    page, display = Page(), ModuleType("IPython.display")
    vars(display).update(HTML=str, display=page.display)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    sys.modules["IPython"].display = display  # type: ignore[attr-defined]
    notebook = import_module("transformers.utils.notebook")
    # As Transformers does where `is_in_notebook()`.
    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", notebook.NotebookProgressCallback)
    yield page
    del sys.modules["transformers.utils.notebook"]


def cells(table: str) -> list[list[str]]:
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr")[1:]]


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_notebook_shows_score_kl_and_length(evaluated: bool, tmp_path: Path, page: Page) -> None:
    changes = {"disable_tqdm": False, "eval_strategy": "steps" if evaluated else "no"}
    trainer = ppo(tmp_path, saved_model(tmp_path / "model"), **changes)
    trainer.evaluate()  # before there is a table
    trainer.train()
    (progress,) = [content for content in page.shown if "max='3'" in content]
    head, *rows = cells(progress)
    logs = [row for row in trainer.state.log_history if "objective/kl" in row]
    evals = [row for row in trainer.state.log_history if "eval_objective/kl" in row]
    names = {"score": "objective/scores", "KL": "objective/kl", "length": "completions/mean_length"}
    for i, row in enumerate(rows):
        said = dict(zip(head, row, strict=True))
        assert said["Step"] == str(i + 1) == str(logs[i]["step"])
        for label, name in names.items():
            assert float(said[label]) == pytest.approx(logs[i][name], rel=1e-2, abs=1e-3)
            if evaluated:
                assert float(said[f"{label}, held out"]) == pytest.approx(evals[i][f"eval_{name}"], rel=1e-2, abs=1e-3)
    assert len(rows) == 3 and ("score, held out" in head) == evaluated and "loss" not in head


def test_the_report_is_a_page_of_its_own_within_the_notebook(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, saved_model(tmp_path / "model"))
    trainer.train()
    shown = trainer.report()._repr_html_()
    match = re.fullmatch(r'<iframe sandbox="allow-scripts" style="[^"<>]*" srcdoc="([^"<>]*)"></iframe>', shown)
    assert match is not None
    whole = html.unescape(match[1])
    assert whole.startswith("<!doctype html>") and "KL to the reference" in whole and whole.endswith("</html>")
