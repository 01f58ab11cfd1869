"""A recipe's trainer made anew, from what the run's folder says."""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from trl_ext.launch.settings import parse

PACKAGE = Path(__file__).parents[1]
# What belongs to the run itself, and what would contradict that nothing is saved and evaluated.
OWN = (
    "resume_from_checkpoint",
    "eval_steps",
    "save_steps",
    "eval_on_start",
    "load_best_model_at_end",
    "log_completions",
)


def trainer_maker(run_dir: str | Path) -> Callable[[dict[str, Any]], Any]:
    """Makes the trainer of the run in `run_dir` with some settings changed, as `diagnostics.try_remedies` asks for it.

    Raises:
        ValueError: no recipe wrote the folder, or one that makes no trainer by itself.
    """
    path = Path(run_dir) / "run.json"
    recipe = json.loads(path.read_text(encoding="utf-8")).get("recipe") if path.is_file() else None
    script = recipe_file(recipe["name"]) if recipe else None
    names = runpy.run_path(str(script)) if script is not None else {}
    if recipe is None or "make_trainer" not in names:
        raise ValueError(
            f"{str(run_dir)!r} was not written by the recipe ppo_lora, so its trainer cannot be made anew: call "
            "trl_ext.diagnostics.try_remedies(make_trainer, findings) with a function that makes it."
        )

    def make_trainer(changes: dict[str, Any]) -> Any:
        changes = {name: str(Path(v).resolve()) if name == "output_dir" else v for name, v in changes.items()}
        settings = {name: value for name, value in recipe["settings"].items() if name not in OWN} | changes
        with tempfile.TemporaryDirectory() as folder, _called_in(recipe["folder"]):
            file = Path(folder) / "settings.yaml"
            file.write_text(yaml.safe_dump(settings | {"disable_tqdm": True}), encoding="utf-8")
            with _arguments([str(script), "--config", str(file)]):
                parsed = parse(str(script), *names["TYPES"])
            return names["make_trainer"](*parsed)

    return make_trainer


def recipe_file(name: str) -> Path:
    """A recipe's script. A wheel has the recipes inside the package, a clone beside it."""
    folder = next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if path.is_dir())
    return folder / f"{name}.py"


@contextmanager
def _called_in(folder: str) -> Iterator[None]:
    """Relative paths mean what they meant in the run."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _arguments(words: Sequence[str]) -> Iterator[None]:
    before, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = before
