"""Which of several sources a setting comes from: the command line, the --config file, the recipe's own defaults.

The nearest to the user wins, also where it says the same thing by another name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

LORA = tuple(f.name for f in fields(ModelConfig) if f.name.startswith(("lora_", "use_rslora", "use_dora")))
# Names of one thing: each row's entries exclude each other.
SAME: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("total_episodes",), ("max_steps",), ("num_train_epochs",)),
    (("reward_funcs",), ("reward_adapter",)),
    (("policy_adapter",), LORA),
    (("eval_split",), ("eval_rows",)),
    (("load_in_4bit",), ("load_in_8bit",)),
    (("bf16",), ("fp16",)),
)
# What nothing reads without another.
NEEDS = {"kl_horizon": "kl_target"}


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file after --config, and the other arguments.

    Raises:
        ValueError: there are two, or --config is the last word.
    """
    found, rest, words = [], [], iter(arguments)
    for word in words:
        if word == "--config":
            path = next(words, "")
            found.append("" if path.startswith("--") else path)
        elif word.startswith("--config="):
            found.append(word.partition("=")[2])
        else:
            rest.append(word)
    if len(found) > 1:
        raise ValueError(f"--config is given {len(found)} times ({', '.join(found)}): put the settings into one file.")
    if found == [""]:
        raise ValueError("--config names no file: give a YAML file after it.")
    return (found[0] if found else None), rest


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        OSError: it cannot be read.
        ValueError, yaml.YAMLError: it is no mapping, or says something twice.
    """
    with open(path, encoding="utf-8") as file:
        node: Any = yaml.compose(file, Loader=yaml.SafeLoader)
        file.seek(0)
        content = yaml.safe_load(file)
    if not isinstance(content, dict):
        raise ValueError(f"Config file {path} must contain a YAML mapping.")
    names = [str(key.value).replace("-", "_") for key, _ in node.value]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"Config file {path} has {twice!r} twice: leave one of them out.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def given_on(arguments: Sequence[str], types: Sequence[Any]) -> dict[str, Any]:
    """What a command line says, in whatever spelling, without any default."""
    parser = TrlParser(types, allow_abbrev=False)
    unsaid, settings = object(), [field for kind in types for field in fields(kind)]
    extended = {
        field.name for field in settings if field.metadata.get("action") == "extend"
    }  # argparse begins with None
    parser.set_defaults(**{field.name: None if field.name in extended else unsaid for field in settings})
    said, _ = parser.parse_known_args([word for word in arguments if word not in ("-h", "--help")])
    return {
        name: value
        for name, value in vars(said).items()
        if value is not unsaid and not (name in extended and value is None)
    }


def settled(levels: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """One value a setting.

    Args:
        levels: the sources, the nearest to the user first, each with its name in a sentence.

    Raises:
        ValueError: one source says the same thing twice, or a setting is read only beside another.
    """
    settings: dict[str, Any] = {}
    for source, level in levels:
        level = _with_strategies(dict(level), source)
        for row in SAME:
            named = [next(name for name in names if _says(level, name)) for names in row if _any(level, names)]
            if len(named) > 1:
                said = " and ".join(f"{name} {level[name]}" for name in named)
                raise ValueError(f"{source} says both {said}, which name one thing: leave one of them out.")
            nearer = [names for names in row if _any(settings, names)]
            others = {name for names in row if nearer and names not in nearer for name in names}
            level = {name: value for name, value in level.items() if name not in others}
        settings = level | settings
    for name, other in NEEDS.items():
        if _says(settings, name) and not _says(settings, other):
            raise ValueError(f"{name} is {settings[name]}, but nothing reads it without {other}: give both or none.")
    return settings


def _with_strategies(level: dict[str, Any], source: str) -> dict[str, Any]:
    """Who says every how many steps means steps."""
    for what in ("eval", "logging", "save"):
        steps, strategy = f"{what}_steps", f"{what}_strategy"
        if not _says(level, steps):
            continue
        when = level.setdefault(strategy, "steps")
        when = getattr(when, "value", when)
        if when != "steps":
            raise ValueError(f"{source} says {steps} {level[steps]} and {strategy} {when!r}: leave one of them out.")
    return level


def _says(level: dict[str, Any], name: str) -> bool:
    """Whether a source asks for something: False, -1 and nothing are what the setting is without it."""
    return level.get(name) not in (None, False, -1, [])


def _any(level: dict[str, Any], names: Sequence[str]) -> bool:
    return any(_says(level, name) for name in names)
