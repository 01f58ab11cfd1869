"""Mistakes in two halves: one to write rules with, one that only measures.

python tests/benchmarks/strangers/split.py           # writes halves.json beside it, the same every time

A group (a setting wrong in one direction with all its values, one reward function, one change to prompts or model) goes
to one half as a whole. Each kind of mistake is divided by itself, so that both halves have the same mixture. Pairs of
mistakes are drawn last, each from within one half.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Listed:
    """A list of mistakes.

    Attributes:
        file: beside this one.
        suffix: of the names of its halves.
        seed: of what is drawn.
        pairs: in each half.
    """

    file: str
    suffix: str
    seed: int
    pairs: int


FIRST = Listed("mistakes.yaml", "", 24_112_026, 20)
# Written once the rules had been made with both halves of the first, by authors who had not seen a rule.
SECOND = Listed("mistakes_2.yaml", "_2", 28_112_026, 10)

# By other authors, once both halves of the second had been read.
THIRD = Listed("mistakes_3.yaml", "_3", 28_112_027, 10)

# By other authors again, once both halves of the third had been read.
FOURTH = Listed("mistakes_4.yaml", "_4", 28_112_028, 10)

# By other authors once more, when the measured half of the fourth had been read.
FIFTH = Listed("mistakes_5.yaml", "_5", 28_112_029, 10)

# And by two more, when both halves of the fifth had been read.
SIXTH = Listed("mistakes_6.yaml", "_6", 28_112_030, 10)
LISTS = (FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH)


def groups(of: Listed) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Mistakes by kind and group. A mistake is {"settings": ...}, {"reward": ...}, {"prompts": ...} or {"model": ...}
    with "lora" beside it where LoRA's own settings change."""
    listed = yaml.safe_load((HERE / of.file).read_text(encoding="utf-8"))
    settings = {
        f"{name}:{direction}": [_of_setting(name, value) for value in values]
        for name, directions in listed["settings"].items()
        for direction, values in directions.items()
    }
    rewards = {
        f"{cause}:{name}": [{"reward": name}] for cause, functions in listed["rewards"].items() for name in functions
    }
    prompts = {f"prompts:{name}": [{"prompts": name}] for name in listed["prompts"]}
    models = {f"model:{name}": [{"model": name}] for name in listed["models"]}
    return {"settings": settings, "rewards": rewards, "prompts": prompts, "models": models}


def _of_setting(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"settings": {name: value}}
    settings = {key: inner for key, inner in value.items() if key != "lora"}
    return {key: part for key, part in (("settings", settings), ("lora", value.get("lora"))) if part}


def halves(of: Listed) -> dict[str, Any]:
    """{"work": ..., "measure": ...}, with the list's suffix: each with its groups, and pairs of mistakes from different
    groups."""
    draw = random.Random(of.seed)
    divided: dict[str, dict[str, Any]] = {"work": {}, "measure": {}}
    for kind in groups(of).values():
        names = sorted(kind)
        draw.shuffle(names)
        middle = len(names) // 2 + draw.randrange(2) * (len(names) % 2)
        for half, part in (("work", names[:middle]), ("measure", names[middle:])):
            divided[half] |= {name: kind[name] for name in sorted(part)}
    return {
        f"{name}{of.suffix}": {"groups": half, "pairs": _pairs(half, of.pairs, draw)} for name, half in divided.items()
    }


def _pairs(half: dict[str, list[dict[str, Any]]], count: int, draw: random.Random) -> list[list[str]]:
    """Two groups each, no two of one kind of thing that a run has only once, with the number of the mistake in it."""
    pairs: list[list[str]] = []
    while len(pairs) < count:
        pair = sorted(draw.sample(sorted(half), 2))
        kinds = [{key for key in half[name][0] if key != "settings"} for name in pair]
        same_setting = pair[0].split(":")[0] == pair[1].split(":")[0]
        if not kinds[0] & kinds[1] and not same_setting:
            pairs.append([f"{name}#{draw.randrange(len(half[name]))}" for name in pair])
    return pairs


def main() -> None:
    made = {name: half for of in LISTS for name, half in halves(of).items()}
    (HERE / "halves.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for name, half in made.items():
        print(f"{name}: {len(half['groups'])} groups, {sum(map(len, half['groups'].values()))} mistakes")


if __name__ == "__main__":
    main()
