"""docs/api.md lists the public names: those that the public rooms export, no more and no less."""

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
# The rooms whose names are public. `trl_ext` comes first: a name that it exports too is listed under it alone.
ROOMS = (
    "trl_ext",
    "trl_ext.roles",
    "trl_ext.generation",
    "trl_ext.ppo",
    "trl_ext.reward_models",
    "trl_ext.callbacks",
    "trl_ext.controllers",
    "trl_ext.rewards",
    "trl_ext.feedback",
    "trl_ext.rating",
    "trl_ext.evaluation",
    "trl_ext.diagnostics",
    "trl_ext.interop",
    "trl_ext.types",
    "trl_ext.core",
)


def exported(room: ModuleType) -> list[str]:
    """`__all__`; of a room that is one file without it, the public functions and classes defined there."""
    own = [name for name, value in vars(room).items() if getattr(value, "__module__", None) == room.__name__]
    return list(getattr(room, "__all__", [name for name in own if not name.startswith("_")]))


def public_names() -> set[str]:
    """Full dotted names, each object once."""
    first: dict[tuple[str, int], str] = {}
    for path in ROOMS:
        room = import_module(path)
        for name in exported(room):
            first.setdefault((name, id(getattr(room, name))), f"{path}.{name}")
    return set(first.values())


def listed(page: str) -> list[str]:
    return re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)


def test_the_page_lists_what_the_rooms_export() -> None:
    names = listed(PAGE.read_text(encoding="utf-8"))
    assert sorted(names) == sorted(set(names)), "a name is listed twice"
    assert sorted(public_names() - set(names)) == [], "exported, but not in docs/api.md"
    assert sorted(set(names) - public_names()) == [], "in docs/api.md, but not exported"


def test_a_name_more_or_less_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = public_names()
    core = import_module("trl_ext.core")
    monkeypatch.setattr(core, "__all__", [name for name in core.__all__ if name != "approx_kl"] + ["masking"])
    assert before ^ public_names() == {"trl_ext.core.approx_kl", "trl_ext.core.masking"}


def test_a_name_exported_twice_is_listed_once() -> None:
    assert {name for name in public_names() if name.endswith(".SharedBase")} == {"trl_ext.SharedBase"}
    assert {"trl_ext.feedback.FeedbackError", "trl_ext.controllers.KLController"} <= public_names()
