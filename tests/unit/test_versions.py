"""The versions that pyproject.toml claims: CI runs each floor; a TRL beyond the tested ones gets a sentence."""

import re
import runpy
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from trl_ext._trl import NEWEST

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = ("sentiment", "rewards", "remote", "feedback")  # the others are for developers
CLAIMED = [*PROJECT["dependencies"], *(line for extra in EXTRAS for line in PROJECT["optional-dependencies"][extra])]


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text.lower().replace("_", "-"), flags=re.MULTILINE))


def test_the_lowest_environment_has_every_floor(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / ".ci" / "lowest.py"))
    lowest = pins(capsys.readouterr().out)
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(CLAIMED) > 15 and set(lowest) >= set(tested) - {"pip"}
    for requirement in CLAIMED:
        name, _, bounds = requirement.lower().partition(">=")
        if name == "torch":  # of its floor there is no build for these checks
            assert lowest["torch"] == tested["torch"]
        else:
            assert lowest[name] == bounds.partition(",")[0], requirement


def test_the_newest_trl_is_the_tested_one() -> None:
    assert pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))["trl"].startswith(f"{NEWEST}.")


def test_a_trl_without_a_name_is_met_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.base_config", ModuleType("trl.trainer.base_config"))
    with pytest.raises(
        ImportError, match=rf"^TRL \S+ lacks a name that trl_ext needs \(.*_BaseConfig.*\): .*'trl=={NEWEST}"
    ):
        runpy.run_path(str(ROOT / "trl_ext" / "_trl.py"))
