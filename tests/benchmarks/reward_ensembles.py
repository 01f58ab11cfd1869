"""One reward role and four, combined in three ways, where the policy may go far: the embedded default at kl_coef 0.05.

python tests/benchmarks/reward_ensembles.py --work FOLDER            # trains, runs, writes docs/recipes/reward.md
python tests/benchmarks/reward_ensembles.py --work FOLDER --table    # the table of what has been run

For each seed `recipes/reward_lora.py --ensemble 4` trains four reward models, and PPO runs by the first alone and by
all four. Each run's result is a file of its own in FOLDER: a second call goes on where the first stopped. `--quick`
takes a few steps of everything, to see that it runs.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes" / "reward.md"
START, END = "<!-- reward ensembles: begin -->", "<!-- reward ensembles: end -->"
MEMBERS = 4
VARIANTS: dict[str, list[str]] = {
    "one": [],
    "four, `mean`": ["--reward_ensemble", "mean"],
    "four, `min`": ["--reward_ensemble", "min"],
    "four, `uncertainty`": ["--reward_ensemble", "uncertainty"],
}

Result = dict[str, Any]


def recipe(name: str, folder: Path, arguments: list[str]) -> dict[str, str]:
    """A recipe's result.json."""
    command = [sys.executable, f"recipes/{name}.py", "--output_dir", str(folder), "--disable_tqdm", "true"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} of {folder} failed:\n{done.stderr[-2000:]}")
    result: dict[str, str] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def ensemble(work: Path, seed: int, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The folders of the reward models of this seed, trained where they are not yet, and what the recipe says of
    them."""
    folder = work / f"reward-{seed}"
    if not (folder / "result.json").is_file():
        # Each ensemble has seeds that no other one has.
        again = ["--resume_from_checkpoint", "true"] if folder.exists() else []
        recipe("reward_lora", folder, ["--ensemble", str(MEMBERS), "--seed", str(100 * seed), *arguments, *again])
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return [str(folder / str(i)) for i in range(MEMBERS)], result


def run(name: str, seed: int, folders: list[str], work: Path, arguments: list[str]) -> Result:
    """One PPO run's numbers."""
    folder = work / f"ppo-{re.sub(r'[^a-z]+', '-', name).strip('-')}-{seed}-{time.time_ns()}"
    started = time.perf_counter()
    members = folders if VARIANTS[name] else folders[:1]
    said = recipe("ppo_lora", folder, ["--reward_adapter", *members, *VARIANTS[name], "--seed", str(seed), *arguments])
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    last = [row for row in state["log_history"] if "objective/scores" in row][-5:]
    covered, uncovered = re.findall(r"([\d.]+)%", said["exam after"])
    return {
        "exam": float(covered),
        "uncovered": float(uncovered),
        "kl": float(said["KL to the reference"].split()[0]),
        "score": fmean(row["objective/scores"] for row in last),
        "spread": fmean(row["objective/score_spread"] for row in last) if VARIANTS[name] else None,
        "seconds": time.perf_counter() - started,
    }


def table(results: dict[str, dict[int, Result]]) -> str:
    """Each variant's numbers, seed by seed."""
    lines = [
        "| reward roles | exam | countries without feedback | KL, nats per completion | score | spread | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in results.items():
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        columns = [("exam", ".1f", "%"), ("uncovered", ".1f", "%"), ("kl", ".1f", ""), ("score", ".2f", "")]
        cells = [", ".join(f"{one[key]:{form}}{unit}" for one in runs) for key, form, unit in columns]
        cells.append(", ".join(f"{one['spread']:.2f}" for one in runs if one["spread"] is not None))
        cells.append(", ".join(f"{one['seconds']:.0f}" for one in runs))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="reward models, runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kl_coef", default="0.05")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--table", action="store_true", help="run nothing")
    chosen = parser.parse_args()
    work = chosen.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    train, ppo = (["--max_steps", "2"], ["--total_episodes", "128"]) if chosen.quick else ([], [])
    results: dict[str, dict[int, Result]] = {name: {} for name in VARIANTS}
    for seed in chosen.seeds:
        if not chosen.table:
            folders, said = ensemble(work, seed, train)
            print(f"seed {seed}: {said['accuracy of each']}; two agree on {said['two agree on']}", flush=True)
        for name in VARIANTS:
            file = work / f"{list(VARIANTS).index(name)}-{chosen.kl_coef}-{seed}.json"
            if not file.is_file() and not chosen.table and name in chosen.only:
                result = run(name, seed, folders, work, ["--kl_coef", chosen.kl_coef, *ppo])
                partial = file.with_suffix(".part")
                partial.write_text(json.dumps(result), encoding="utf-8")
                partial.replace(file)
                print(f"seed {seed}, {name}: {result}", flush=True)
            if file.is_file():
                results[name][seed] = json.loads(file.read_text(encoding="utf-8"))
    made = table({name: by_seed for name, by_seed in results.items() if by_seed})
    print(made)
    whole = all(set(by_seed) == set(chosen.seeds) for by_seed in results.values())
    if whole and not chosen.quick and not chosen.table:
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        PAGE.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
