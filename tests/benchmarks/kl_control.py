"""KL held at a target, against a fixed coefficient, on the embedded default.

python tests/benchmarks/kl_control.py            # prints a table and draws docs/images/kl_control.svg

For each target: a run with `AdaptiveKLController`, and one with a fixed coefficient, the value that the controller
began with. The table has the mean KL of each run's last third, and how far from the target the mean of any quarter of
it is.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import panels, save

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "kl_control.svg"
TARGETS = (1.0, 3.0, 6.0)
INIT = "0.15"


def run(arguments: list[str]) -> list[tuple[float, float, float]]:
    """(episode, KL, coefficient) at each rollout of a recipe run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "recipes/ppo_lora.py", "--output_dir", folder, "--disable_tqdm", "true"]
        subprocess.run([*command, *arguments], cwd=ROOT, check=True, capture_output=True)
        state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
    rows = [row for row in state["log_history"] if "objective/kl" in row]
    return [(row["episode"], row["objective/kl"], row["objective/kl_coef"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--horizon", default="400")
    parser.add_argument("--episodes", default="7680")
    arguments = parser.parse_args()
    common = ["--logging_steps", "8", "--total_episodes", arguments.episodes, "--kl_coef", INIT]
    curves = {"fixed": run(common)}
    for target in TARGETS:
        curves[f"target {target:g}"] = run([*common, "--kl_target", str(target), "--kl_horizon", arguments.horizon])
    print("| run | mean KL of the last third | farthest that a quarter of it is from the target |")
    print("|---|---|---|")
    for name, rows in curves.items():
        last = [kl for _, kl, _ in rows[-(len(rows) // 3) :]]
        target = float(name.split()[1]) if name != "fixed" else None
        size = max(1, len(last) // 4)
        parts = [statistics.fmean(last[i : i + size]) for i in range(0, len(last) - size + 1, size)]
        off = max(abs(part / target - 1) for part in parts) if target else float("nan")
        print(
            f"| {name} | {statistics.fmean(last):.2f} | {off:.0%} |"
            if target
            else f"| {name} | {statistics.fmean(last):.2f} | |"
        )
    draw(curves)


def draw(curves: dict[str, list[tuple[float, float, float]]]) -> None:
    figure, axes = panels(2, 1, sharex=True, figsize=(7, 5.5))
    above, below = axes[:, 0]
    colours = {"fixed": "#777777", "target 1": "#0072b2", "target 3": "#e69f00", "target 6": "#009e73"}
    for name, rows in curves.items():
        episodes, kls, coefficients = zip(*rows, strict=True)
        above.plot(episodes, kls, color=colours[name], label=name, linewidth=1.4)
        below.plot(episodes, coefficients, color=colours[name], linewidth=1.4)
        if name != "fixed":
            above.axhline(float(name.split()[1]), color=colours[name], linewidth=0.8, linestyle="--")
    above.set_ylabel("KL, nats per completion")
    above.legend(frameon=False, ncols=4, loc="upper left")
    below.set_ylabel("coefficient")
    below.set_yscale("log")
    below.set_xlabel("answers")
    save(figure, PICTURE)


if __name__ == "__main__":
    main()
