"""Seconds and memory of a PPO update: trl_ext beside TRL's own trainers, each in an environment of its own.

python tests/benchmarks/ppo_vs_trl.py --model FOLDER --work FOLDER [--rounds 2] [--only full natural one_epoch]
python tests/benchmarks/ppo_vs_trl.py --work FOLDER --table           # the tables again, from what was measured

Every contender gets the same model, prompts, number of answers, tokens, passes, precision, and LoRA of the same rank on
the same layers. They take turns; what is printed are medians over all updates but the first of each process. An
environment that is missing under --work is made with pip; --env NAME=PYTHON names one that is there.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from timing import head, row

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
        "vaderSentiment==3.3.2",
    ],
    "trl-0.11.4": ["trl==0.11.4", TORCH, "transformers==4.45.2", "peft==0.13.2", "accelerate==0.34.2", "rich", "tyro"],
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
ONE = ["--epochs", "1"]
SETS: dict[str, tuple[str, dict[str, Contender]]] = {
    "full": ("Answers of full length", ALL),
    "natural": (
        "Answers of natural length, half of the most tokens in the mean",
        {name: (*ALL[name][:3], ["--natural", *ALL[name][3]]) for name in (HEAD, ADAPTER, TRL_112)},
    ),
    "one_epoch": (
        "One pass, scored by a function",
        {
            "trl_ext, value on the trunk, one pass": (None, "ours.py", "head,by_length", ONE),
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


def start(contender: Contender, folder: Path, chosen: argparse.Namespace) -> str:
    """One process of a contender, to its end: what it printed."""
    environment, script, variant, more = contender
    command = [python_of(environment, chosen), str(PEERS / script), "--model", str(chosen.model)]
    command += ["--folder", str(folder), "--variant", variant, *more]
    paths = os.pathsep.join([str(PEERS), str(ROOT)])
    variables = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def run(contender: Contender, chosen: argparse.Namespace) -> dict[str, Any]:
    """The updates of one process, and its peak of memory."""
    *how, more = contender
    said = start((*how, [*more, "--updates", str(chosen.updates)]), chosen.work / "out", chosen)
    measured: dict[str, Any] = json.loads(said.splitlines()[-1])
    return measured


def table(name: str, runs: dict[str, list[dict[str, Any]]], tokens: int) -> str:
    """Markdown: medians, and each contender's ratios to the peers."""
    title, contenders = SETS[name]
    peers = [peer for peer in contenders if not peer.startswith("trl_ext") and peer in runs]
    phases = ("generate", "score", "train")
    seconds, memory = {}, {}
    for contender in contenders:
        if contender in runs:
            updates = [update for one in runs[contender] for update in one["updates"]]
            seconds[contender] = {phase: median(update[phase] for update in updates) for phase in phases}
            seconds[contender]["all"] = median(sum(update.values()) for update in updates)
            memory[contender] = median(one["peak"] for one in runs[contender]) / 2**30
    names = ["", "s / update", *phases, "new tokens / s", "peak GiB"]
    names += [f"time / {peer}" for peer in peers] + [f"memory / {peer}" for peer in peers]
    lines = [f"### {title}", "", head(*names)]
    for contender, took in seconds.items():
        cells = [f"{took['all']:.1f}", *(f"{took[phase]:.1f}" for phase in phases)]
        cells += [f"{tokens / took['all']:.1f}", f"{memory[contender]:.2f}"]
        cells += [f"{took['all'] / seconds[peer]['all']:.2f}" for peer in peers]
        cells += [f"{memory[contender] / memory[peer]:.2f}" for peer in peers]
        lines.append(row(contender, *cells))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="environments, outputs, and measured.json")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=3, help="of a process, the first of them not counted")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--env", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    record = chosen.work / "measured.json"
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    for _ in range(0 if chosen.table else chosen.rounds):
        for name in chosen.only:
            for contender, how in SETS[name][1].items():
                measured = run(how, chosen)
                known.setdefault(name, defaultdict(list)).setdefault(contender, []).append(measured)
                record.write_text(json.dumps(known, indent=1))
                print(f"{name}: {contender}: {[round(sum(u.values()), 1) for u in measured['updates']]} s", flush=True)
    for name in SETS:
        if name in known:
            tokens = 16 * 48 if name != "natural" else 16 * 49 // 2
            print("\n" + table(name, known[name], tokens))


if __name__ == "__main__":
    main()
