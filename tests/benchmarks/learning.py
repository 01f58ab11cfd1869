"""Score against the clock: trl_ext, TRL 1.12.0's PPOTrainer and today's RLOOTrainer learn the same task, one by one.

python tests/benchmarks/learning.py --model FOLDER --reviews FILE --work FOLDER [--seeds 0 1] [--minutes 25]
python tests/benchmarks/learning.py --work FOLDER --table [--picture FILE.svg]      # from what was measured

The task: 24 tokens that continue a film review, scored by how positive they sound (VADER). `--reviews` is a file of
{"prompt": text}. All train LoRA of rank 16 on all linear layers at the same learning rate, 64 answers an update.
Compared are means of scores over the last 128 answers, less the mean of every run's first update.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

from ppo_vs_trl import Contender, start
from timing import head, panels, row, save

OURS, TRL_112, RLOO = "trl_ext", "TRL 1.12.0 PPOTrainer", "RLOOTrainer of today"
CONTENDERS: dict[str, Contender] = {
    OURS: (None, "ours.py", "head,sentiment", []),
    TRL_112: ("trl-1.12.0", "trl_112.py", "full", []),
    RLOO: (None, "rloo.py", "", ["--epochs", "1"]),
}
TASK = {"batch": 64, "micro_batch": 16, "new_tokens": 24, "learning_rate": 1e-4, "updates": 1000}
COLOURS = {OURS: "#0072b2", TRL_112: "#e69f00", RLOO: "#009e73"}
WINDOW = 128 // int(TASK["batch"])  # updates

Point = dict[str, float]


def learn(name: str, seed: int, folder: Path, chosen: argparse.Namespace) -> None:
    """One run; its curve lands in `folder`."""
    task = {**TASK, "reviews": chosen.reviews, "seed": seed, "minutes": chosen.minutes}
    *how, more = CONTENDERS[name]
    start((*how, [*more, *(word for key, value in task.items() for word in (f"--{key}", str(value)))]), folder, chosen)


def smooth(points: list[Point], base: float) -> list[Point]:
    """Gain over `base` and KL as means over the last few updates."""
    curve = []
    for end in range(1, len(points) + 1):
        window = points[max(0, end - WINDOW) : end]
        gain, kl = mean(p["score"] for p in window) - base, mean(p["kl"] for p in window)
        curve.append({"seconds": points[end - 1]["seconds"], "gain": gain, "kl": kl})
    return curve


def table(curves: dict[str, list[list[Point]]], gains: list[float]) -> str:
    """Markdown: when each contender had gained so much, for each run; and where it stood at the end."""
    lines = [head("", "updates", *(f"gain of {gain}: s (KL)" for gain in gains), "last gain (KL)")]
    reached: dict[str, dict[float, list[float]]] = {}
    for name, runs in curves.items():
        cells = [", ".join(str(len(run)) for run in runs)]
        for gain in gains:
            first = [next((p for p in run if p["gain"] >= gain), None) for run in runs]
            reached.setdefault(name, {})[gain] = [p["seconds"] for p in first if p]
            cells.append(", ".join("never" if p is None else f"{p['seconds']:.0f} ({p['kl']:.1f})" for p in first))
        cells.append(", ".join(f"{run[-1]['gain']:.2f} ({run[-1]['kl']:.1f})" for run in runs))
        lines.append(row(name, *cells))
    for peer in (TRL_112, RLOO):
        for gain in gains:
            ours, theirs = (reached.get(name, {}).get(gain, []) for name in (OURS, peer))
            if ours and theirs:
                lines.append(f"\nTime to a gain of {gain}: {median(ours) / median(theirs):.2f} of {peer}'s.")
    return "\n".join(lines)


def draw(curves: dict[str, list[list[Point]]], picture: Path) -> None:
    """Gain and KL against minutes."""
    figure, axes = panels(2, 1, sharex=True, figsize=(7, 4.8))
    above, below = axes[:, 0]
    for name, runs in curves.items():
        for i, run in enumerate(runs):
            minutes = [p["seconds"] / 60 for p in run]
            for axis, what in zip((above, below), ("gain", "kl"), strict=True):
                label = name if i == 0 else None
                axis.plot(minutes, [p[what] for p in run], color=COLOURS[name], label=label, ls=["-", "--", ":"][i % 3])
    above.set_ylabel("gain in score")
    above.legend(frameon=False, loc="lower right")
    below.set_ylabel("KL, nats per completion")
    below.set_xlabel("minutes")
    save(figure, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--reviews", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="environments and curves")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--env", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--gains", type=float, nargs="+", default=[0.25, 0.45])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    folders = {
        (name, seed): chosen.work / script[:-3] / str(seed)
        for name, (_, script, *_) in CONTENDERS.items()
        for seed in chosen.seeds
    }
    for seed in () if chosen.table else chosen.seeds:
        for name in chosen.only:
            learn(name, seed, folders[name, seed], chosen)
            print(f"{name}, seed {seed}: done", flush=True)
    raw: dict[str, list[list[Any]]] = {}
    for (name, _), folder in folders.items():
        if (folder / "curve.jsonl").exists():
            lines = (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
            raw.setdefault(name, []).append([json.loads(line) for line in lines])
    base = mean(run[0]["score"] for runs in raw.values() for run in runs)
    curves = {name: [smooth(run, base) for run in runs] for name, runs in raw.items()}
    print(f"Score of the first updates: {base:.2f}\n\n{table(curves, chosen.gains)}")
    if chosen.picture:
        draw(curves, chosen.picture)


if __name__ == "__main__":
    main()
