"""The `trl-ext` command starts at once, and runs the recipes. What each command says is tested with its subject."""

import subprocess
import sys
from pathlib import Path

import pytest

from trl_ext.cli import RECIPES, main

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "trl", "accelerate", "bitsandbytes", "datasets", "rich"}


def test_help_imports_nothing_heavy_and_prints_nothing_else() -> None:
    code = "import sys; from trl_ext.cli import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stderr == ""
    usage, _, modules = run.stdout.strip().rpartition("\n")
    assert "doctor" in usage and "feedback" in usage and all(name in usage for name in RECIPES)
    assert HEAVY & set(modules.split()) == set()


@pytest.mark.parametrize(("name", "status"), [("kl_runs_away", 0), ("no_such_problem", 1)])
def test_who_asks_the_doctor_does_not_wait_for_what_trains(name: str, status: int) -> None:
    code = f"import sys; from trl_ext.cli import main\nprint(main(['explain', {name!r}]), *sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    said, *modules = run.stdout.splitlines()[-1].split()
    assert said == str(status) and (HEAVY - {"rich"}) & set(modules) == set()
    assert run.stderr.startswith("trl-ext: error: There is no problem") is bool(status)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipes_run_under_their_names(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # not from the clone
    monkeypatch.setattr(sys, "argv", sys.argv)
    said = rf"^{RECIPES[recipe][0]}\.py: error: The model 'nobody/nothing' cannot be loaded"
    with pytest.raises(SystemExit, match=said):
        main([recipe, "--model_name_or_path", "nobody/nothing", "--report_to", "none"])


def test_a_form_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
    assert main(["feedback", "check", str(tmp_path / "file.jsonl"), "--form", "stars"]) == 1
    assert "choose one of pairs, rankings, ratings, labels" in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_ext.commands.feedback.layouts", interrupted)
    assert main(["feedback", "layouts"]) == 130
    assert capsys.readouterr().err == "trl-ext: interrupted\n"
