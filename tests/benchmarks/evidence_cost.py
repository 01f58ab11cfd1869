"""What the evidence beside training costs: its share of a run's time.

python tests/benchmarks/evidence_cost.py          # the demo, scored by its reward role and by a function; minutes

A share is the seconds of `time/evidence` over those of all of a run's updates: generation, scoring, evidence and
training. Short runs pay most, for the first rollout measures everything.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trl_ext.diagnostics import read_run

ROOT = Path(__file__).parents[2]
EPISODES = 64  # of a rollout of the demo
SCORED_BY = {"the reward role": [], "a reward function": ["--reward_funcs", "trl_ext.demo.exact"]}


def seconds(more: list[str], rollouts: int, folder: str) -> list[tuple[float, float]]:
    """Of each rollout: of evidence, and of the whole update."""
    command = [sys.executable, str(ROOT / "recipes" / "ppo_lora.py"), "--output_dir", folder, "--eval_strategy", "no"]
    command += ["--eval_on_start", "false", "--disable_tqdm", "true"]
    command += ["--total_episodes", str(EPISODES * rollouts), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=folder)
    rows = read_run(Path(folder)).rows
    return [(row["time/evidence"], sum(v for k, v in row.items() if k.startswith("time/"))) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="of which each figure is the median")
    parser.add_argument("--rollouts", type=int, nargs="+", default=[10, 20])
    args = parser.parse_args()
    print("| scored by | rollouts | evidence's share | most of one rollout, over the median rollout |")
    print("|---|---|---|---|")
    for name, more in SCORED_BY.items():
        for rollouts in args.rollouts:
            shares, firsts = [], []
            for _ in range(args.runs):
                with tempfile.TemporaryDirectory() as folder:
                    spent = seconds(more, rollouts, folder)
                shares.append(sum(one for one, _ in spent) / sum(whole for _, whole in spent))
                usual = statistics.median(whole - one for one, whole in spent)
                firsts.append(max(one for one, _ in spent) / usual)
            print(
                f"| {name} | {rollouts} | {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) | "
                f"{statistics.median(firsts):.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
