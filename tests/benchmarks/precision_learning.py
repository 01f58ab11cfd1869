"""PPO on the embedded default in each precision of the base: exam, KL, and the score at equal KL.

python tests/benchmarks/precision_learning.py --out FOLDER [--seeds 1 2 3]     # Markdown

Each run is `recipes/ppo_lora.py` in a process of its own; a run that is in the folder is not made again. Scores are the
reward role's, on the same base in the same precision. The points of a run's curve are means of `WINDOW` rollouts; its
score at a KL is that of the first point whose KL is as large.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, median

import torch
from timing import head, row

ROOT = Path(__file__).parents[2]
PRECISIONS = {
    "float32": ["--dtype", "float32"],
    "bfloat16": ["--dtype", "bfloat16"],
    "bfloat16 with autocast": ["--dtype", "bfloat16", "--bf16", "true"],
    "NF4": ["--load_in_4bit"],
}
WINDOW = 3
LEVELS = (0.3, 0.6, 0.9)  # nats a completion

Point = tuple[float, float]  # KL, score


def curve(log: list[dict[str, float]]) -> list[Point]:
    """Of a trainer's log, smoothed."""
    rollouts = [entry for entry in log if "objective/kl" in entry]
    parts = [rollouts[end - WINDOW : end] for end in range(WINDOW, len(rollouts) + 1)]
    return [tuple(mean(r[f"objective/{name}"] for r in part) for name in ("kl", "scores")) for part in parts]


def score_at(points: list[Point], kl: float) -> float | None:
    """The score where the KL is first as large; None if it never is."""
    return next((score for at, score in points if at >= kl), None)


def run(precision: str, seed: int, folder: Path) -> tuple[float, list[Point]]:
    """Exam in percent, and the curve."""
    if not (folder / "result.json").is_file():
        command = [sys.executable, "recipes/ppo_lora.py", "--output_dir", str(folder), "--overwrite", "true"]
        on_cpu = str(not torch.cuda.is_available())  # where autocast must be asked for with it
        command += ["--disable_tqdm", "true", "--use_cpu", on_cpu, "--seed", str(seed), *PRECISIONS[precision]]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    result, state = (json.loads((folder / name).read_text("utf-8")) for name in ("result.json", "trainer_state.json"))
    return float(re.findall(r"([\d.]+)% right", result["exam after"])[0]), curve(state["log_history"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    chosen = parser.parse_args()
    levels = [f"score at KL {kl}" for kl in LEVELS]
    print(head("precision of the base", "exam", "last KL", "last score", *levels))
    for precision in PRECISIONS:
        runs = [run(precision, seed, chosen.out.resolve() / f"{precision}-{seed}") for seed in chosen.seeds]
        figures = [[points[-1][0] for _, points in runs], [points[-1][1] for _, points in runs]]
        figures += [[s for _, points in runs if (s := score_at(points, kl)) is not None] for kl in LEVELS]
        cells = [f"{median(part):.2f} ({', '.join(f'{x:.2f}' for x in part)})" if part else "never" for part in figures]
        exams = [exam for exam, _ in runs]
        print(row(precision, f"{median(exams):.0f}% ({', '.join(f'{x:.0f}' for x in exams)})", *cells), flush=True)


if __name__ == "__main__":
    main()
