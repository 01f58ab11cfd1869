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
EXTRAS = PROJECT["optional-dependencies"]
LISTS = [PROJECT["dependencies"], *(lines for name, lines in EXTRAS.items() if name != "vllm")]  # needs a GPU
CLAIMED = [line.lower() for lines in LISTS for line in lines if ">=" in line]


def pins(text: str) -> dict[str, str]:
    """What a file of constraints says of each package: '==1.2', or '<=1.2'."""
    return dict(re.findall(r"^([\w-]+)([=<]=\S+)$", text.lower().replace("_", "-"), flags=re.MULTILINE))


def test_the_lowest_environment_has_every_floor(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / ".ci" / "lowest.py"))
    lowest = pins(capsys.readouterr().out)
    tested = pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert len(CLAIMED) > 25 and set(lowest) == set(tested) >= {"torch", "transformers", "huggingface-hub"}
    expected = {name: "<" + pin[1:] for name, pin in tested.items()}  # what others need may be older
    for requirement in CLAIMED:
        name, _, bounds = requirement.partition(">=")
        expected[name.partition("[")[0]] = "==" + bounds.partition(",")[0]
    expected["torch"] = tested["torch"]  # of its floor there is no build for these checks
    assert lowest == expected


def test_the_newest_trl_is_the_tested_one() -> None:
    assert pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))["trl"].startswith(f"=={NEWEST}.")


def test_a_trl_without_a_name_is_met_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.base_config", ModuleType("trl.trainer.base_config"))
    with pytest.raises(
        ImportError, match=rf"^TRL \S+ lacks a name that trl_ext needs \(.*_BaseConfig.*\): .*'trl=={NEWEST}"
    ):
        runpy.run_path(str(ROOT / "trl_ext" / "_trl.py"))
