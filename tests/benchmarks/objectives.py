"""The four objectives on the embedded default, in one table: exam, KL, time, memory.

python tests/benchmarks/objectives.py            # prints the table and writes it into docs/objectives.md

Each objective runs `recipes/ppo_lora.py` in a process of its own, seed after seed; the table has medians.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "objectives.md"
START, END = "<!-- objectives: begin -->", "<!-- objectives: end -->"
ON_POLICY = "--num_ppo_epochs 1 --num_mini_batches 8 --per_device_train_batch_size 8 --num_generations 4"
VARIANTS = {
    "clip": [],
    "kl_penalty": ["--objective", "kl_penalty"],
    "reinforce, leave one out": ["--objective", "reinforce", *ON_POLICY.split()],
    "sequence": ["--objective", "sequence"],
}


def run(arguments: list[str]) -> dict[str, float]:
    """One recipe run: exam (share right), KL (nats per completion), seconds, peak resident memory (MiB)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "recipes/ppo_lora.py", "--output_dir", folder, "--disable_tqdm", "true", *arguments]
        started = time.perf_counter()
        # The child's own peak: one child, one wrapper.
        probe = (
            "import resource, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        )
        probe += "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        done = subprocess.run(
            [command[0], "-c", probe, *command[1:]], cwd=ROOT, check=True, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
        result = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    peak = int(re.findall(r"PEAK (\d+)", done.stdout)[-1]) / 1024
    return {
        "exam": float(re.findall(r"([\d.]+)% right", result["exam after"])[0]),
        "KL": float(result["KL to the reference"].split()[0]),
        "seconds": seconds,
        "memory": peak,
    }


def table(seeds: list[int], further: list[str]) -> str:
    """Medians over `seeds` as a Markdown table."""
    lines = [
        "| objective | exam (each seed) | KL, nats per completion | seconds | peak memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for name, arguments in VARIANTS.items():
        runs = [run([*arguments, "--seed", str(seed), *further]) for seed in seeds]
        exams = ", ".join(f"{one['exam']:.1f}%" for one in runs)
        medians = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        lines.append(
            f"| `{name}` | {medians['exam']:.1f}% ({exams}) | {medians['KL']:.2f} | {medians['seconds']:.0f} | "
            f"{medians['memory']:.0f} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments, further = parser.parse_known_args()
    made = table(arguments.seeds, further)
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    PAGE.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
