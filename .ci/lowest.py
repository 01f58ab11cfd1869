"""Print constraints.txt with every package of ours at the lowest version that pyproject.toml claims.

torch stays at the tested version: of the lowest one there is no build for these checks. What only others ask for may be
older than its pin, as they need it, but not newer.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
claimed = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
floors = {normalised(m[1]): m[2] for line in claimed if (m := re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", line))}
for line in (ROOT / "constraints.txt").read_text().splitlines():
    if pin := re.fullmatch(r"([\w.-]+)==(\S+)", line):
        name, tested = normalised(pin[1]), pin[2]
        exact = tested if name == "torch" else floors.get(name)
        print(f"{name}=={exact}" if exact else f"{name}<={tested}")
