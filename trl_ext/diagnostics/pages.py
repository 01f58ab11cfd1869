"""The pages about training problems, which are part of the docs and of the installed package."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

INSTALLED = Path(__file__).parent / "texts"
IN_A_CLONE = Path(__file__).parents[2] / "docs" / "diagnostics"
NO_PROBLEM = {"index", "sources", "strangers"}  # pages about all of them


def page(name: str) -> str:
    """The page of a problem of the catalogue, as Markdown.

    Raises:
        ValueError: there is none of that name.
    """
    folder = INSTALLED if INSTALLED.is_dir() else IN_A_CLONE
    known = sorted(path.stem for path in folder.glob("*.md") if path.stem not in NO_PROBLEM)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ValueError(
            f"There is no problem {name!r} in the catalogue{f': do you mean {near[0]!r}?' if near else '.'} It knows "
            f"{', '.join(known)}."
        )
    return (folder / f"{name}.md").read_text(encoding="utf-8")
