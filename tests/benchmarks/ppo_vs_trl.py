"""Seconds and memory of a PPO update: trl_ext beside TRL's own trainers, each in an environment of its own.

python tests/benchmarks/ppo_vs_trl.py --model FOLDER --work FOLDER [--precision float32 bf16 autocast nf4]
python tests/benchmarks/ppo_vs_trl.py --work FOLDER --table [--picture FILE.svg]     # again, from what was measured

Every contender gets the same model, prompts, number of completions, tokens, epochs, precision, and LoRA of the same
rank on the same layers. They take turns; what is printed are medians over all updates but the first of each process.

bf16: weights in bfloat16, no autocast. autocast: the same weights, and `bf16=True`. nf4: 4-bit weights, computed with
in bfloat16 on a GPU and in float32 on a CPU.

A run that was interrupted goes on where it was, if --batch, --new_tokens and --epochs are the same. An environment that
is missing under --work is made with pip; --env NAME=PYTHON names one that is there.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from statistics import median
from typing import Any

from timing import PALETTE, device_name, head, panels, read, row, save, write

PRECISIONS = ("float32", "bf16", "autocast", "nf4")
ROOT = Path(__file__).parents[2]
PEERS = Path(__file__).parent / "peers"
TORCH = "torch==2.13.0"
PACKAGES = {
    "trl-1.12.0": [
        "trl==1.12.0",
        TORCH,
        "transformers==5.23.0",
        "peft==0.21.2",
        "accelerate==1.15.0",
        "bitsandbytes==0.50.2",
        "vaderSentiment==3.3.2",
    ],
    "trl-0.11.4": [
        "trl==0.11.4",
        TORCH,
        "transformers==4.45.2",
        "peft==0.13.2",
        "accelerate==0.34.2",
        "bitsandbytes==0.50.2",
        "rich",
        "tyro",
    ],
}
# Contender: environment (None: this one), script, variant, further arguments.
HEAD, ADAPTER = "trl_ext, value on the policy's trunk", "trl_ext, value adapter of its own"
SMALL = "trl_ext, value on the trunk, micro-batches of 4"
TRL_112, TRL_112_LORA = "TRL 1.12.0 PPOTrainer", "TRL 1.12.0 PPOTrainer, LoRA on the value model too"
TRL_011, RLOO = "TRL 0.11.4 PPOTrainer, one base", "RLOOTrainer of today"
Contender = tuple[str | None, str, str, list[str]]
ALL: dict[str, Contender] = {
    HEAD: (None, "ours.py", "head", []),
    SMALL: (None, "ours.py", "head", ["--micro_batch", "4"]),
    ADAPTER: (None, "ours.py", "adapter", []),
    TRL_112: ("trl-1.12.0", "trl_112.py", "full", []),
    TRL_112_LORA: ("trl-1.12.0", "trl_112.py", "lora", []),
    TRL_011: ("trl-0.11.4", "trl_011.py", "", []),
}
PHASES = ("generate", "score", "train")
ONE = ["--epochs", "1"]
SETS: dict[str, tuple[str, dict[str, Contender]]] = {
    "full": ("completions of full length", ALL),
    "natural": (
        "completions of natural length, half of the most tokens in the mean",
        {name: (*ALL[name][:3], ["--natural", *ALL[name][3]]) for name in (HEAD, ADAPTER, TRL_112, TRL_112_LORA)},
    ),
    "one_epoch": (
        "one epoch, scored by a function",
        {
            "trl_ext, value on the trunk, one epoch": (None, "ours.py", "head,by_length", ONE),
            RLOO: (None, "rloo.py", "", ONE),
        },
    ),
}


def python_of(environment: str | None, chosen: argparse.Namespace) -> str:
    """The interpreter of an environment, made where it is missing."""
    if environment is None:
        return sys.executable
    given = dict(pair.split("=", 1) for pair in chosen.env)
    if environment in given:
        return given[environment]
    folder = chosen.work / environment
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES[environment]], check=True)
    return str(python)


class Failed(SystemExit):
    """A contender's process did not reach its end."""

    def __init__(self, command: list[str], errors: str) -> None:
        super().__init__(f"{' '.join(command)} failed:\n{errors[-3000:]}")
        lines = [line for line in errors.splitlines() if line and not line.startswith(" ")]
        self.why = lines[-1].rstrip(".") if lines else "it was killed"


def start(contender: Contender, folder: Path, chosen: argparse.Namespace) -> str:
    """One process of a contender, to its end: what it printed.

    Raises:
        Failed: it did not reach it.
    """
    environment, script, variant, more = contender
    command = [python_of(environment, chosen), str(PEERS / script), "--model", str(chosen.model)]
    command += ["--folder", str(folder), "--variant", variant, *more]
    paths = os.pathsep.join([str(PEERS), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise Failed(command, done.stderr)
    return done.stdout


def run(contender: Contender, chosen: argparse.Namespace, **task: object) -> dict[str, Any]:
    """The updates of one process, and its peak of memory."""
    *how, more = contender
    given = [word for key, value in task.items() for word in (f"--{key}", str(value))]
    said = start((*how, [*given, *more, "--updates", str(chosen.updates)]), chosen.work / "out", chosen)
    measured: dict[str, Any] = json.loads(said.splitlines()[-1])
    return measured


def asked(name: str, precision: str) -> dict[str, Contender | str]:
    """The contenders of a set, or why one cannot be there. 4-bit weights cannot be trained themselves, so over those
    TRL 1.12.0 has LoRA on the value model at natural length too."""
    contenders: dict[str, Contender | str] = dict(SETS[name][1])
    if TRL_112 in contenders and precision == "nf4":
        contenders[TRL_112] = "4-bit weights cannot be trained: its value model needs LoRA"
    elif name == "natural":
        del contenders[TRL_112_LORA]
    return contenders


def measure(known: dict[str, Any], record: Path, chosen: argparse.Namespace) -> None:
    """All rounds that `known` lacks. A contender that fails once is not tried again in this run."""
    task = {"batch": chosen.batch, "micro_batch": chosen.batch, "new_tokens": chosen.new_tokens}
    places = [(precision, name) for precision in chosen.precision for name in chosen.only]
    failed = set()
    for turn in range(chosen.rounds):
        for precision, name in places:
            for contender, how in asked(name, precision).items():
                here = known.setdefault(precision, {}).setdefault(name, {}).setdefault(contender, {"runs": []})
                if chosen.again and turn == 0:
                    here["runs"] = []
                if len(here["runs"]) > turn or (precision, name, contender) in failed:
                    continue
                where = f"{precision}, {name}: {contender}"
                try:
                    if isinstance(how, str):
                        here["cannot"] = how
                        continue
                    measured = run(how, chosen, **task, epochs=chosen.epochs, precision=precision)
                except Failed as error:
                    if how[0] is None:  # ours must not
                        raise
                    failed.add((precision, name, contender))
                    here["cannot"] = error.why
                    print(f"{where}: cannot: {error.why}", flush=True)
                else:
                    here.pop("cannot", None)
                    here["runs"].append(measured)
                    print(f"{where}: {[round(sum(u.values()), 1) for u in measured['updates']]} s", flush=True)
                write(record, known)


class Figures:
    """Medians of one set in one precision.

    Attributes:
        seconds: by contender and phase, and of "all".
        memory: peak in GiB, by contender.
        cannot: why a contender has no figures.
    """

    def __init__(self, name: str, measured: dict[str, Any]) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.memory: dict[str, float] = {}
        self.cannot: dict[str, str] = {}
        for contender in SETS[name][1]:
            runs = measured.get(contender, {}).get("runs", [])
            if runs:
                updates = [update for one in runs for update in one["updates"]]
                self.seconds[contender] = {phase: median(update[phase] for update in updates) for phase in PHASES}
                self.seconds[contender]["all"] = median(sum(update.values()) for update in updates)
                self.memory[contender] = median(one["peak"] for one in runs) / 2**30
            elif "cannot" in measured.get(contender, {}):
                self.cannot[contender] = measured[contender]["cannot"]

    def relative(self, contender: str) -> tuple[float, float] | None:
        """Time and memory, of those of TRL 1.12.0."""
        peer = next((peer for peer in (TRL_112, TRL_112_LORA) if peer in self.seconds), None)
        if peer is None or contender not in self.seconds:
            return None
        time = self.seconds[contender]["all"] / self.seconds[peer]["all"]
        return time, self.memory[contender] / self.memory[peer]


def table(precision: str, name: str, figures: Figures, task: dict[str, Any]) -> str:
    """Markdown: medians, and each contender's ratios to the peers."""
    new = task["batch"] * (task["new_tokens"] if name != "natural" else (task["new_tokens"] + 1) / 2)
    peers = [peer for peer in figures.seconds if not peer.startswith("trl_ext")]
    names = ["", "s / update", *PHASES, "new tokens / s", "peak GiB"]
    names += [f"time / {peer}" for peer in peers] + [f"memory / {peer}" for peer in peers]
    epochs = f"{task['epochs']} epochs, " if name != "one_epoch" else ""
    what = f"{task['batch']} prompts, {task['new_tokens']} new tokens, {epochs}{task['device']}"
    lines = [f"### {precision}: {SETS[name][0]}", "", f"{what}.", "", head(*names)]
    for contender in SETS[name][1]:
        if contender in figures.seconds:
            took, memory = figures.seconds[contender], figures.memory[contender]
            cells = [f"{took['all']:.1f}", *(f"{took[phase]:.1f}" for phase in PHASES)]
            cells += [f"{new / took['all']:.1f}", f"{memory:.2f}"]
            cells += [f"{took['all'] / figures.seconds[peer]['all']:.2f}" for peer in peers]
            cells += [f"{memory / figures.memory[peer]:.2f}" for peer in peers]
            lines.append(row(contender, *cells))
        elif contender in figures.cannot:
            lines.append(row(contender, "cannot", *[""] * (len(names) - 2)))
    lines += [f"\n{contender} cannot: {why}." for contender, why in figures.cannot.items()]
    return "\n".join(lines) + "\n"


def draw(measured: dict[tuple[str, str], Figures], picture: Path) -> None:
    """Time and memory relative to TRL 1.12.0, by precision, at full and at natural length."""
    precisions = [precision for precision in PRECISIONS if any(of == precision for of, _ in measured)]
    contenders = [HEAD, SMALL, ADAPTER, TRL_011]
    figure, axes = panels(2, 2, sharex=True, sharey="row", figsize=(7, 4.8))
    for column, name in enumerate(("full", "natural")):
        for line, what in enumerate(("time", "memory")):
            axis = axes[line][column]
            axis.axhline(1, color=PALETTE[4], linewidth=1.4, label="TRL 1.12.0 PPOTrainer")
            for i, contender in enumerate(contenders):
                found = [
                    measured[of, name].relative(contender) if (of, name) in measured else None for of in precisions
                ]
                points = [(at, ratios[line]) for at, ratios in enumerate(found) if ratios]
                if points:
                    at, heights = zip(*points, strict=True)
                    bars = axis.bar([x + 0.2 * (i - 1.5) for x in at], heights, 0.2, color=PALETTE[i], label=contender)
                    axis.bar_label(bars, fmt="%.2f", fontsize=6)
            axis.set_ylabel(f"{what} / TRL 1.12.0" if column == 0 else "")
            axis.set_xticks(range(len(precisions)), precisions)
        axes[0][column].set_title(SETS[name][0].partition(",")[0], fontsize="medium")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    save(figure, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="environments, outputs, and what was measured")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3, help="of a process, the first of them not counted")
    parser.add_argument("--batch", type=int, default=16, help="completions of an update")
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--env", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--again", action="store_true", help="measure what was measured already")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--picture", type=Path)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    record = chosen.work / f"measured-{chosen.batch}x{chosen.new_tokens}x{chosen.epochs}.json"
    known = read(record)
    if not chosen.table:
        task = {key: getattr(chosen, key) for key in ("batch", "new_tokens", "epochs")}
        task |= {"model": str(chosen.model), "device": device_name()}
        if known.setdefault("task", task) != task:
            raise SystemExit(f"{record} has figures of {known['task']}: give another --work for {task}.")
        measure(known, record, chosen)
    figures = {
        (precision, name): Figures(name, known[precision][name])
        for precision in PRECISIONS
        for name in SETS
        if name in known.get(precision, {})
    }
    for (precision, name), of in figures.items():
        print("\n" + table(precision, name, of, known["task"]))
    if chosen.picture:
        draw(figures, chosen.picture)


if __name__ == "__main__":
    main()
