"""Files that commands write."""

from __future__ import annotations

from pathlib import Path


def check_new(file: Path) -> None:
    """Say before any work that the file cannot be written."""
    if file.exists():
        raise FileExistsError(f"{file} exists already: name another file, or remove it.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"The folder {str(file.parent)!r} does not exist: make it, or name another file.")
