"""The house keeps its arrows: who may import whom, the one door to TRL's internals, and recipes stay short.

Imports are read from the syntax tree, those under TYPE_CHECKING and inside functions included.
"""

import ast
import pkgutil
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "trl_ext"
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))

LOGIC = {
    "types",
    "tokens",
    "core",
    "roles",
    "generation",
    "rewards",
    "feedback",
    "controllers",
    "callbacks",
    "diagnostics",
    "hub",
    "random_state",
    "runs",
}

# room -> rooms that it may import. A room is a folder or a file directly under trl_ext/.
ARROWS: dict[str, set[str]] = {
    "_moved": set(),
    "types": {"_moved"},
    "tokens": {"types"},
    "core": {"types"},
    "controllers": set(),
    "generation": {"tokens", "types", "_moved"},
    "rewards": {"core", "tokens", "types", "_moved"},
    "interop": {"rewards", "types"},
    "feedback": {"types", "_moved"},
    "rating": {"feedback", "types"},
    "roles": {"core", "tokens"},
    "diagnostics": {"core", "random_state", "types"},
    "hub": {"diagnostics", "runs"},
    "random_state": set(),
    "runs": set(),
    "evaluation": {"core", "diagnostics", "feedback", "generation", "rewards", "roles", "runs", "tokens", "types"},
    "callbacks": {"controllers", "core", "diagnostics", "runs", "types"},
    "reward_models": LOGIC | {"_trl"},
    "ppo": LOGIC | {"_trl"},
    "demo": {"types", "_trl"},
    "launch": LOGIC | {"ppo", "reward_models", "demo", "_trl"},
    "loop": LOGIC | {"evaluation", "rating", "ppo", "reward_models", "demo", "launch", "_trl"},
    "cli": {"commands", "launch"},
    "commands": LOGIC | {"loop", "evaluation", "rating", "ppo", "reward_models", "demo", "launch", "_trl"},
    "_trl": set(),
    "trainers": {"_moved"},
    "__init__": LOGIC | {"ppo", "reward_models"},
}

# Rooms that may import nothing but these from outside, beside the standard library.
OUTSIDE: dict[str, set[str]] = {"types": {"torch"}, "core": {"torch"}, "controllers": set()}

MAX_RECIPE_LINES = 100


def imported_names(source: str, module: str) -> Iterator[str]:
    """Full dotted names that `source` imports, being the file of the dotted `module` (packages end in `.__init__`)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*parent, node.module] if node.module else parent)
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """Room of a dotted name in the package: `trl_ext.core.kl` -> `core`; the package's public names -> `__init__`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (parts[1] in ARROWS or _is_room(parts[1])) else "__init__"


def _is_room(name: str) -> bool:
    return (ROOT / PACKAGE / name).is_dir() or (ROOT / PACKAGE / f"{name}.py").is_file()


def _is_inner_trl(name: str) -> bool:
    """True for `trl.trainer.utils` and `trl.trainer`, False for `trl` and a public name such as `trl.DPOTrainer`."""
    parts = name.split(".")
    return parts[0] == "trl" and (len(parts) > 2 or (len(parts) == 2 and parts[1] in _trl_submodules()))


def _trl_submodules() -> set[str]:
    spec = find_spec("trl")
    assert spec is not None
    return {module.name for module in pkgutil.iter_modules(spec.submodule_search_locations)}


def source_violations(source: str, module: str) -> list[str]:
    """What the file of `module` in the package does against the house rules, one sentence each."""
    room = room_of(module)
    if room not in ARROWS:
        return [f"{module}: room `{room}` has no line in ARROWS: say there what it may import"]
    found = []
    allowed = ARROWS[room] | {room}
    for name in imported_names(source, module):
        top = name.split(".")[0]
        if top == PACKAGE:
            target = room_of(name)
            if target not in allowed:
                found.append(f"{module} imports {name}: {room} may import {sorted(ARROWS[room]) or 'nothing of ours'}")
        elif room in OUTSIDE and top not in OUTSIDE[room] | sys.stdlib_module_names:
            found.append(f"{module} imports {name}: {room} may import {sorted(OUTSIDE[room])} and the standard library")
        if room != "_trl" and _is_inner_trl(name):
            found.append(f"{module} imports {name}: only trl_ext/_trl.py may reach inside TRL")
    return found


def recipe_violations(source: str, module: str) -> list[str]:
    """What a recipe does against the house rules: it imports public names only and stays short."""
    found = []
    for name in imported_names(source, module):
        parts = name.split(".")
        if parts[0] == PACKAGE and (len(parts) > 3 or any(part.startswith("_") for part in parts)):
            found.append(f"{module} imports {name}: recipes import public names, from trl_ext or one of its rooms")
        if _is_inner_trl(name):
            found.append(f"{module} imports {name}: recipes import from `trl` itself")
    if len(source.splitlines()) >= MAX_RECIPE_LINES:
        found.append(f"{module} has {len(source.splitlines())} lines: recipes stay under {MAX_RECIPE_LINES}")
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_source(path: Path) -> None:
    assert source_violations(path.read_text(encoding="utf-8"), module_of(path)) == []


@pytest.mark.parametrize("path", RECIPES, ids=module_of)
def test_recipe(path: Path) -> None:
    assert recipe_violations(path.read_text(encoding="utf-8"), module_of(path)) == []


def test_package_is_found() -> None:
    assert len(SOURCES) > 1


def test_arrows_have_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {room for room, targets in ARROWS.items() if room not in done and targets <= done}
        assert ready, f"these rooms import each other: {sorted(set(ARROWS) - done)}"
        done |= ready


def test_ruff_bans_what_this_test_bans() -> None:
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    banned = set(ruff["flake8-tidy-imports"]["banned-api"])
    assert {f"trl.{name}" for name in _trl_submodules()} <= banned
    exempt = {path for path, rules in ruff["per-file-ignores"].items() if "TID251" in rules}
    assert {path for path in exempt if not path.startswith("tests/")} == {"trl_ext/_trl.py"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trl_ext.core.bad", "from trl_ext.roles import SharedBase"),
        ("trl_ext.core.bad", "from ..roles import SharedBase"),
        ("trl_ext.core.bad", "from trl_ext import roles"),
        ("trl_ext.core.bad", "from trl_ext import SharedBase"),
        ("trl_ext.core.bad", "import trl_ext.ppo"),
        ("trl_ext.core.bad", "def f():\n    import transformers"),
        ("trl_ext.types", "import numpy"),
        ("trl_ext.controllers", "import torch"),
        ("trl_ext.rewards.bad", "from trl_ext.roles.base import SharedBase"),
        ("trl_ext.roles.__init__", "from ..ppo import PPOTrainer"),
        ("trl_ext.roles.bad", "if TYPE_CHECKING:\n    from trl_ext.ppo import PPOTrainer"),
        ("trl_ext.rewards.bad", "from trl_ext.interop import RewardModule"),
        ("trl_ext.interop.bad", "from trl_ext.roles import SharedBase"),
        ("trl_ext.callbacks.bad", "from trl_ext.roles import SharedBase"),
        ("trl_ext.demo.bad", "from trl_ext.ppo import PPOTrainer"),
        ("trl_ext.ppo.bad", "from trl.trainer.utils import pad"),
        ("trl_ext.ppo.bad", "from trl.experimental import ppo"),
        ("trl_ext.ppo.bad", "import trl.models"),
        ("trl_ext.ppo.bad", "from trl import trainer"),
        ("trl_ext._trl", "from trl_ext.types import Rollout"),
        ("trl_ext.attic", ""),
    ],
)
def test_checker_finds_a_bad_source(module: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_is_room", lambda name: name in {*ARROWS, "attic"})
    assert len(source_violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "trl_ext.core.kl",
            "import math\nimport torch\nfrom trl_ext.core.masking import masked_mean\nfrom . import gae",
        ),
        ("trl_ext.core.__init__", "from .kl import approx_kl\nfrom ..types import Rollout"),
        ("trl_ext.demo.reward", "import peft\nfrom trl_ext import types\nfrom trl_ext._trl import fused_head"),
        ("trl_ext.ppo.trainer", "from trl import DPOConfig\nfrom trl_ext.callbacks import RolloutCallback"),
        ("trl_ext._trl", "from trl.trainer.base_trainer import _BaseTrainer"),
        ("trl_ext.__init__", "from trl_ext.ppo import PPOTrainer"),
    ],
)
def test_checker_lets_a_good_source_pass(module: str, source: str) -> None:
    assert source_violations(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "from trl_ext._trl import pad",
        "from trl_ext.roles.base import SharedBase",
        "from trl_ext.roles import _base",
        "from trl.trainer import DPOTrainer",
        "\n" * MAX_RECIPE_LINES,
    ],
)
def test_checker_finds_a_bad_recipe(source: str) -> None:
    assert len(recipe_violations(source, "recipes.bad")) == 1


def test_checker_lets_a_good_recipe_pass() -> None:
    source = "from trl import TrlParser\nfrom trl_ext import PPOTrainer\nfrom trl_ext.demo import build\nimport trl_ext"
    assert recipe_violations(source, "recipes.good") == []
