"""Every recipe on the embedded default, three seeds, float32 and NF4, in one table.

python tests/benchmarks/recipes.py

Each run is a process of its own with an output folder of its own; the demo's cache is used, and filled where it is
empty (the first run then builds the model, and the first PPO run of a precision its reward adapter).
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUTCOMES = {
    "reward": ["held-out pair accuracy"],
    "ppo": ["exam before", "exam after", "KL to the reference"],
    "dpo": ["exam before", "exam after", "KL to the reference"],
}


def run(recipe: str, seed: int, four_bit: bool) -> tuple[list[str], float]:
    """What a recipe's result.json says of each outcome, and the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        script = f"recipes/{recipe}_lora.py"
        command = [sys.executable, script, "--output_dir", folder, "--seed", str(seed), "--disable_tqdm", "true"]
        command += ["--load_in_4bit"] if four_bit else []
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        seconds = time.perf_counter() - started
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    return [re.findall(r"[\d.]+(?:%| nats)", result[name])[0] for name in OUTCOMES[recipe]], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipes", nargs="+", default=list(OUTCOMES))
    arguments = parser.parse_args()
    print("| recipe | base | seed | before | after | KL | seconds |\n|---|---|---|---|---|---|---|")
    for recipe in arguments.recipes:
        for four_bit in (False, True):
            for seed in arguments.seeds:
                outcomes, seconds = run(recipe, seed, four_bit)
                before, after, kl = outcomes if len(outcomes) == 3 else ("", *outcomes, "")
                base = "NF4" if four_bit else "float32"
                print(f"| {recipe} | {base} | {seed} | {before} | {after} | {kl} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
