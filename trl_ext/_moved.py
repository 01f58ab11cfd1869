"""Old names that still work, with a warning."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(module: str, names: dict[str, str], until: str = "0.3") -> Callable[[str], Any]:
    """`__getattr__` for `module`, some of whose names went elsewhere: each old name with its new dotted path."""

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is {names[name]} now; the old name goes in trl_ext {until}."
        warnings.warn(message, FutureWarning, stacklevel=2)
        place, _, attribute = names[name].rpartition(".")
        return getattr(import_module(place), attribute)

    return find
