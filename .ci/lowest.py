"""Print constraints.txt with every package of ours at the lowest version that pyproject.toml claims.

torch stays: of the lowest one there is no build for these checks (see pyproject.toml).
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What the lowest Transformers and datasets allow of the packages that they share with nobody else here.
THEIRS = {
    "dill": "0.4.0",
    "fsspec": "2026.2.0",
    "huggingface-hub": "1.33.0",
    "multiprocess": "0.70.18",
    "tokenizers": "0.22.2",
}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
claimed = list(project["dependencies"])
for extra in ("sentiment", "rewards", "remote", "feedback"):
    claimed += project["optional-dependencies"][extra]
pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
pins = {normalised(name): version for name, version in pins.items()} | THEIRS
for requirement in claimed:
    name, floor = re.match(r"([\w.-]+)>=([\d.]+)", requirement).groups()
    if name != "torch":
        pins[normalised(name)] = floor
print(*(f"{name}=={version}" for name, version in sorted(pins.items())), sep="\n")
