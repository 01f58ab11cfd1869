"""Score and KL of finished runs, drawn one above the other.

python tests/benchmarks/curve.py docs/images/smollm2.svg float32=runs/ppo_smollm2 NF4=runs/ppo_smollm2_nf4
"""

import argparse
import json
from pathlib import Path

COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("runs", nargs="+", help="LABEL=FOLDER, the folder with a trainer_state.json")
    arguments = parser.parse_args()

    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "trl_ext"
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.8), layout="constrained")
    for (label, folder), colour in zip((run.split("=", 1) for run in arguments.runs), COLOURS, strict=False):
        state = json.loads(Path(folder, "trainer_state.json").read_text(encoding="utf-8"))
        rows = [row for row in state["log_history"] if "objective/kl" in row]
        episodes = [row["episode"] for row in rows]
        above.plot(episodes, [row["objective/scores"] for row in rows], color=colour, label=label, marker="o", ms=3)
        below.plot(episodes, [row["objective/kl"] for row in rows], color=colour, marker="o", ms=3)
    above.set_ylabel("score")
    above.legend(frameon=False, loc="upper left")
    below.set_ylabel("KL, nats per completion")
    below.set_xlabel("answers")
    for axis in (above, below):
        axis.spines[["top", "right"]].set_visible(False)
    arguments.picture.parent.mkdir(exist_ok=True)
    figure.savefig(arguments.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
