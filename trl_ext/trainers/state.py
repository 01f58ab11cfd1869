"""All that a run interrupted between two optimizer steps needs to go on exactly, in one place of its checkpoint.

What Transformers saves itself (weights, optimizer, schedule, random numbers, step) is beside it; prompts' and
minibatches' order follow from seed and step.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from trl_ext.types import Experience, Rollout, ScorePass, Scores

TENSORS, TEXTS, NUMBERS = "rollout.safetensors", "rollout.json", "ppo_state.json"
_PARTS = {"rollout": Rollout, "scores": Scores, "score_pass": ScorePass}


def save_numbers(numbers: dict[str, Any], folder: Path) -> None:
    """Write the state dicts of controllers, moments and progress into `folder`."""
    (folder / NUMBERS).write_text(json.dumps(numbers), encoding="utf-8")


def load_numbers(folder: Path) -> dict[str, Any]:
    """What `save_numbers` wrote into `folder`; empty where there is nothing."""
    path = folder / NUMBERS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def save_experience(experience: Experience, folder: Path) -> None:
    """Write `experience` into `folder`: tensors as safetensors, texts as JSON."""
    tensors: dict[str, Tensor] = {}
    texts: dict[str, Any] = {}
    for name, value in _flat(experience):
        if isinstance(value, Tensor):
            tensors[name] = value.contiguous().clone()  # safetensors refuses tensors that share memory
        else:
            texts[name] = value
    save_file(tensors, folder / TENSORS)
    (folder / TEXTS).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def load_experience(folder: Path) -> Experience | None:
    """What `save_experience` wrote into `folder`; None where there is nothing."""
    if not (folder / TENSORS).is_file():
        return None
    values: dict[str, Any] = {
        **load_file(folder / TENSORS),
        **json.loads((folder / TEXTS).read_text(encoding="utf-8")),
    }
    top = {name: value for name, value in values.items() if "." not in name}
    for part, cls in _PARTS.items():
        top[part] = cls(
            **{name.split(".", 1)[1]: value for name, value in values.items() if name.startswith(f"{part}.")}
        )
    return Experience(**top)


def _flat(record: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for f in fields(record):
        value = getattr(record, f.name)
        found += _flat(value, f"{prefix}{f.name}.") if is_dataclass(value) else [(prefix + f.name, value)]
    return found
