"""A problem's page names every threshold that its rule reads."""

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest

from trl_ext.diagnostics.limits import Limits

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "diagnostics").glob("*.md")}
LIMITS = asdict(Limits())
GENERAL = {"least_rows", "enough", "noticeable"}  # of most rules: index.md has them
IN_WORDS = {0.1: "tenth", 0.2: "fifth", 0.25: "quarter", 0.5: "half|most", 1: "one", 2: "twice|two|double"}
IN_WORDS |= {3: "three", 4: "four", 5: "five", 6: "six", 10: "ten", 12: "twelve", 20: "twenty", 100: "hundred"}


@cache
def modules() -> list[dict[str, ast.FunctionDef]]:
    """The functions of each of the doctor's modules, by name."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "trl_ext" / "diagnostics").glob("*.py"))
    return [{node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)} for tree in trees]


def limits_of(name: str, module: dict[str, ast.FunctionDef], seen: frozenset[str] = frozenset()) -> set[str]:
    """The limits that a function reads, itself or by what it calls, in its own module or by a public name."""
    if name not in module:
        module = next((other for other in modules() if name in other and not name.startswith("_")), {})
    if name not in module or name in seen:
        return set()
    found: set[str] = set()
    for node in ast.walk(module[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "limits":
            found |= {node.attr} & LIMITS.keys()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found |= limits_of(node.func.id, module, seen | {name})
    return found


def told(value: float, text: str) -> bool:
    """Whether a text has a number: as a figure, in percent or in words."""
    numbers = [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w])", text)]
    percents = [float(number) / 100 for number in re.findall(r"(\d+(?:\.\d+)?)%", text)]
    words = IN_WORDS.get(abs(value))
    return any(math.isclose(abs(value), one) for one in [*numbers, *percents]) or bool(
        words and re.search(rf"\b({words})", text, re.IGNORECASE)
    )


def rules() -> Iterator[tuple[str, str]]:
    for module in modules():
        for name in sorted(module.keys() & PAGES.keys()):
            yield from ((name, limit) for limit in sorted(limits_of(name, module) - GENERAL))


@pytest.mark.parametrize(("rule", "limit"), list(rules()))
def test_a_page_tells_the_limits_of_its_rule(rule, limit):
    by_hand = PAGES[rule].split("## Measured")[0].split("## What `--try`")[0]
    assert told(LIMITS[limit], by_hand), f"docs/diagnostics/{rule}.md does not name {limit}, {LIMITS[limit]}"


def test_what_most_rules_ask_for_is_told_once():
    assert all(told(LIMITS[limit], PAGES["index"].split("```")[0]) for limit in GENERAL)


def test_most_limits_are_read_by_a_rule_that_has_a_page():
    read = {limit for _, limit in rules()} | GENERAL
    assert len(read) > 0.9 * len(LIMITS), sorted(LIMITS.keys() - read)


@pytest.mark.parametrize(
    ("value", "text", "is_told"),
    [
        (0.03, "below 0.03 nats", True),
        (0.03, "a range of 3% of it", True),
        (2e-5, "below 2e-5 nats", True),
        (-0.5, "below -0.5.", True),
        (0.5, "Half of them", True),
        (0.03, "below 0.3 or 0.031", False),
        (3.0, "below 0.3, or 1.3", False),
        (5.0, "in 5e-4 of them", False),
    ],
)
def test_told(value, text, is_told):
    assert told(value, text) is is_told
