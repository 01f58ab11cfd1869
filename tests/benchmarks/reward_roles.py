"""Every reward objective on the embedded default, and PPO with what it made as the reward role.

python tests/benchmarks/reward_roles.py            # prints the table and writes it into docs/recipes/reward.md
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes" / "reward.md"
START, END = "<!-- reward roles: begin -->", "<!-- reward roles: end -->"
# A batch of rankings of eight answers holds four of them; a probe's scores differ more between prompts than within
# one, so the same KL weighs more against them.
REWARD = {"ranking": ["--per_device_train_batch_size", "4"], "all_pairs": ["--per_device_train_batch_size", "4"]}
PPO = {"probe": ["--kl_coef", "0.22"]}
OBJECTIVES = ("pairwise", "regression", "binary", "ranking", "all_pairs", "probe")


def recipe(name: str, folder: Path, *arguments: str) -> dict[str, str]:
    """A recipe's result.json."""
    command = [sys.executable, f"recipes/{name}.py", "--output_dir", str(folder), *arguments]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result: dict[str, str] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def row(objective: str, seed: int) -> str:
    """The table's row of one objective."""
    with tempfile.TemporaryDirectory() as folder:
        adapter, seed_arguments = Path(folder, "reward"), ["--seed", str(seed)]
        reward = recipe("reward_lora", adapter, "--objective", objective, *REWARD.get(objective, []), *seed_arguments)
        more = PPO.get(objective, [])
        ppo = recipe("ppo_lora", Path(folder, "ppo"), "--reward_adapter", str(adapter), *more, *seed_arguments)
    exam = re.findall(r"([\d.]+%) right", ppo["exam after"])[0]
    settings = f"`{' '.join(more)}`" if more else ""
    kl = ppo["KL to the reference"].split()[0]
    return f"| `{objective}` | {reward['held-out pair accuracy']} | {exam} | {kl} | {settings} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    args = parser.parse_args()
    lines = ["| objective | held-out pair accuracy | exam after PPO | KL | PPO with |", "|---|---|---|---|---|"]
    for objective in args.only:
        lines.append(row(objective, args.seed))
        print(lines[-1], flush=True)
    if tuple(args.only) == OBJECTIVES:
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        made = "\n".join(lines)
        PAGE.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
