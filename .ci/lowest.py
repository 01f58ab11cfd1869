"""Print constraints.txt with TRL at the lowest version that pyproject.toml claims."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
(floor,) = (match[1] for d in dependencies if (match := re.match(r"trl>=([\d.]+)", d)))
constraints, count = re.subn(r"(?m)^trl==.*$", f"trl=={floor}", (ROOT / "constraints.txt").read_text())
assert count == 1, "constraints.txt must pin trl once"
print(constraints, end="")
