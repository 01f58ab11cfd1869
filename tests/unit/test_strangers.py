"""The mistakes that the doctor is measured on: divided once, and possible."""

import importlib.util
import json
from pathlib import Path

import pytest

from trl_ext import PPOConfig

FOLDER = Path(__file__).parents[1] / "benchmarks" / "strangers"
HALVES = json.loads((FOLDER / "halves.json").read_text(encoding="utf-8"))
HEALTHY = {"per_device_train_batch_size": 32, "num_mini_batches": 2, "score_normalization": "reference"}
SETTINGS = [
    pytest.param(mistake["settings"], id=f"{name}#{i}")
    for half in HALVES.values()
    for name, mistakes in half["groups"].items()
    for i, mistake in enumerate(mistakes)
    if "settings" in mistake
]


def test_the_halves_are_what_the_script_draws() -> None:
    spec = importlib.util.spec_from_file_location("split", FOLDER / "split.py")
    assert spec is not None and spec.loader is not None
    split = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(split)
    assert split.halves() == HALVES
    assert not set(HALVES["work"]["groups"]) & set(HALVES["measure"]["groups"])
    everything = {name for kind in split.groups().values() for name in kind}
    assert everything == {*HALVES["work"]["groups"], *HALVES["measure"]["groups"]}


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_mistaken_setting_can_be_set(settings: dict, tmp_path: Path) -> None:
    """A mistake that PPOConfig refuses would be no mistake that a run could make."""
    if settings.get("generation_kwargs", {}).get("suppress_tokens") == "eos":
        settings = {"generation_kwargs": {"suppress_tokens": [1]}}
    PPOConfig(str(tmp_path), use_cpu=True, **{**HEALTHY, **settings})
