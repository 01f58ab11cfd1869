"""Mutation testing: small changes to the maths and the roles, and whether the tests notice.

pip install mutmut==3.8.1
python tests/benchmarks/mutants.py --work FOLDER                 # about an hour and a half on one core
python tests/benchmarks/mutants.py --work FOLDER --survivors     # what nobody noticed, change by change

Each part is tried on a copy of its own by the tests that are meant for it. A run that was stopped goes on where it was.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from timing import head, row

ROOT = Path(__file__).parents[2]
MATHS = [
    "advantages",
    "devices",
    "kl",
    "logprobs",
    "losses",
    "masking",
    "objectives",
    "probe",
    "reward_losses",
    "shaping",
]
PARTS = {
    "maths": (
        ["trl_ext/core/*", "trl_ext/controllers.py"],
        [*(f"tests/unit/test_core_{name}.py" for name in MATHS), "tests/unit/test_controllers.py"],
        [],
    ),
    "roles": (
        ["trl_ext/roles/*"],
        [
            "tests/unit/test_generation.py",
            "tests/unit/test_lm_head.py",
            "tests/unit/test_model_rewards.py",
            *(
                f"tests/parity/test_{name}.py"
                for name in ("one_base", "roles", "assembly", "reward_role", "saved_roles", "forward", "packing")
            ),
            "tests/recipes/test_bad_calls.py",
        ],
        # The other seven architectures find little more, and take much longer.
        ["-k", "not qwen and not gpt and not mistral and not gemma"],
    ),
}
# What mutmut writes down of a change: tests that failed or took too long noticed it; where no test ran, none did.
NOTICED, UNNOTICED = (1, 3, 24, -24, 36, 152, 255, -11), (0, 5, 33)


def prepare(folder: Path, part: str) -> None:
    """A copy of the project whose pyproject.toml tells mutmut what to change and which tests to run."""
    mutated, tests, options = PARTS[part]
    names = ("trl_ext", "tests", "recipes")
    for name in names:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {
        "source_paths": ["trl_ext"],
        "only_mutate": mutated,
        "also_copy": ["tests", "recipes"],
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": ["-p", "no:cacheprovider", *options],
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / "mutants").mkdir()  # Python forgets a folder on its path that is not there when it starts


def outcomes(folder: Path) -> dict[str, int | None]:
    """Exit status of the tests by mutant; None where they have not been run."""
    found: dict[str, int | None] = {}
    for file in sorted((folder / "mutants").rglob("*.meta")):
        found |= json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def function_lines(source: list[str], name: str) -> list[str]:
    """The body of a function in a file that mutmut wrote."""
    start = next(i for i, line in enumerate(source) if re.match(rf"\s*(async )?def {re.escape(name)}\(", line))
    indent = len(source[start]) - len(source[start].lstrip())
    end = start + 1
    while end < len(source) and (
        not source[end].strip()
        or len(source[end]) - len(source[end].lstrip()) > indent
        or source[end].strip()[0] in ")"
    ):
        end += 1
    return source[start + 1 : end]


def show(folder: Path, mutant: str) -> None:
    """Print what was changed."""
    module, _, name = mutant.rpartition(".")
    source = (folder / "mutants" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines()
    before = function_lines(source, re.sub(r"__mutmut_\d+$", "__mutmut_orig", name))
    after = function_lines(source, name)
    print(mutant)
    for old, new in zip(before, after, strict=False):
        if old != new:
            print(f"  - {old.strip()}\n  + {new.strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--survivors", action="store_true", help="change nothing, list them")
    chosen = parser.parse_args()
    rows, totals = [], Counter[str]()
    for part in chosen.part:
        folder = chosen.work.absolute() / part
        if not folder.exists():
            folder.mkdir(parents=True)
            prepare(folder, part)
        if not chosen.survivors:
            variables = {**os.environ, "PYTHONPATH": str(folder / "mutants"), "OMP_NUM_THREADS": "1"}
            command = ["mutmut", "run", "--max-children", str(chosen.processes)]
            subprocess.run(command, cwd=folder, env=variables, check=True)
        by_module: dict[str, Counter[str]] = {}
        for mutant, status in outcomes(folder).items():
            kind = "noticed" if status in NOTICED else "unnoticed" if status in UNNOTICED else "not tried"
            by_module.setdefault(mutant.rpartition(".")[0], Counter())[kind] += 1
            if chosen.survivors and kind == "unnoticed":
                show(folder, mutant)
        for module, count in by_module.items():
            totals += count
            rows.append(row(f"`{module}`", sum(count.values()), count["unnoticed"], count["not tried"]))
    print(head("module", "changes", "unnoticed", "not tried"))
    print("\n".join(rows))
    share = totals["unnoticed"] / max(1, totals["unnoticed"] + totals["noticed"])
    print(row("all", sum(totals.values()), f"{totals['unnoticed']} ({share:.1%})", totals["not tried"]))


if __name__ == "__main__":
    main()
