"""A recipe's trainer made anew, from what the run's folder says."""

from __future__ import annotations

import inspect
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
from accelerate import PartialState

from trl_ext.launch.precedence import settled
from trl_ext.launch.settings import parse, recipe_file

# What belongs to the run itself, and what would contradict that nothing is saved, or evaluated.
OWN = ("resume_from_checkpoint", "save_steps", "load_best_model_at_end", "log_completions")
EVALUATIONS = ("eval_steps", "eval_on_start")


def trainer_maker(run_dir: str | Path) -> Callable[[dict[str, Any]], Any]:
    """Makes the trainer of the run in `run_dir` with some settings changed, as `diagnostics.try_remedies` asks for it.

    A recipe that trains one thing makes it from its settings. One that trains several, the loop, wrote into run.json
    which "stage" this is: it is given the run's folder too, where the files of the stages before lie beside it.

    Raises:
        ValueError: no recipe of today wrote the folder.
    """
    run = Path(run_dir).resolve()
    about = json.loads((run / "run.json").read_text(encoding="utf-8")) if (run / "run.json").is_file() else {}
    recipe: dict[str, Any] = about.get("recipe") or {}
    script, stage = recipe_file(recipe.get("name", "")), recipe.get("stage")
    names = runpy.run_path(str(script)) if script.is_file() else {}
    beside = [run] if stage is not None else []
    if not names or len(inspect.signature(names["make_trainer"]).parameters) != len(names["TYPES"]) + len(beside):
        raise ValueError(
            f"{str(run_dir)!r} was not written by one of the recipes, so its trainer cannot be made anew: call "
            "trl_ext.diagnostics.try_remedies(make_trainer, findings) with a function that makes it."
        )
    # Of an ensemble each member has its own, of a loop each round.
    seeds = {name: value for name in ("seed", "data_seed") if (value := about["settings"].get(name)) is not None}

    def make_trainer(changes: dict[str, Any]) -> Any:
        changes = {name: str(Path(v).resolve()) if name == "output_dir" else v for name, v in changes.items()}
        settings = recipe["settings"] | seeds
        if stage is not None and stage in settings:  # whose settings lie together under its name
            changes = {stage: changed(settings[stage], changes), "output_dir": changes["output_dir"]}
        settings = changed(settings, changes)
        if (times := about["settings"].get("world_size", 1) // PartialState().num_processes) > 1 and stage is None:
            rows = settings.get("gradient_accumulation_steps", about["settings"]["gradient_accumulation_steps"])
            settings["gradient_accumulation_steps"] = times * rows  # one process does what several did
        with tempfile.TemporaryDirectory() as folder, _called_in(recipe["folder"]):
            file = Path(folder) / "settings.yaml"
            file.write_text(yaml.safe_dump(settings | {"disable_tqdm": True}), encoding="utf-8")
            with _arguments([str(script), "--config", str(file)]):
                parsed = parse(str(script), *names["TYPES"])
            return names["make_trainer"](*parsed, *beside)

    return make_trainer


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A run's settings with `changes` laid over them, without what goes with neither: what was the run's alone, and
    other names of what is changed."""
    left_out = (*OWN, *(EVALUATIONS if changes.get("eval_strategy") == "no" else ()))
    kept = {name: value for name, value in settings.items() if name not in left_out}
    return settled([("The remedy", changes), ("The run", kept)])


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
