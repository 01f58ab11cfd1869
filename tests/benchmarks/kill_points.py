"""A run killed again and again, and resumed, against the same run left alone: bit for bit.

python tests/benchmarks/kill_points.py             # 24 kills on the embedded default, a few minutes

Every optimizer step is followed by a checkpoint, so that many kills fall into the writing of one. What is compared at
the end: all trained weights, every logged number but clocks and memory, the sampled completions, the findings.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from doctor_cases import exact
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from trl_ext import (
    AdaptiveKLCallback,
    AdaptiveKLController,
    DiagnosticsCallback,
    PPOConfig,
    PPOTrainer,
    SharedBase,
    demo,
)

CLOCKS = ("time/", "memory/", "eps", "train_")


def train(folder: Path) -> None:
    """The run, from its last checkpoint where there is one."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    torch.manual_seed(0)  # from_pretrained draws the adapters
    base = SharedBase.from_pretrained(demo.model_path(), policy=lora, value="adapter", dtype="float32")
    config = PPOConfig(
        str(folder),
        total_episodes=32 * 10,
        per_device_train_batch_size=16,
        num_mini_batches=2,
        num_ppo_epochs=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        max_completion_length=12,
        score_normalization="running",
        kl_coef=0.2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        log_completions=True,
        num_completions_to_print=0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        base,
        demo.rate,
        config,
        demo.load("prompts", "train"),
        processing_class=tokenizer,
        callbacks=[
            AdaptiveKLCallback(AdaptiveKLController(init=0.2, target=1.0, horizon=500)),
            DiagnosticsCallback(yardstick=exact),
        ],
    )
    trainer.train(resume_from_checkpoint=folder.is_dir() and get_last_checkpoint(str(folder)))
    trainer.save_model()
    trainer.save_state()


def child(folder: Path) -> int:
    """`train` in a process of its own; its id. A fork: nothing is imported anew."""
    process = os.fork()
    if process == 0:
        quiet = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            train(folder)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        os._exit(0)
    return process


def ended(process: int, folder: Path) -> bool:
    """Whether the child is through; SystemExit with its last words where it failed."""
    done, status = os.waitpid(process, os.WNOHANG)
    if done and status:
        raise SystemExit(folder.with_suffix(".log").read_text(encoding="utf-8")[-500:])
    return bool(done)


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be the same."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rows = [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in history]
    tables = [pd.read_parquet(path) for path in sorted((folder / "completions").glob("*.parquet"))]
    found = json.loads((folder / "diagnostics.json").read_text(encoding="utf-8"))
    return {
        "logs": rows,
        "completions": pd.concat(tables).to_csv(index=False),
        "findings": [finding["name"] for finding in found["findings"]],
        "samples": found["samples"],
        "weights": {
            str(path.relative_to(folder)): load_file(path)
            for path in sorted(folder.rglob("*.safetensors"))
            if "checkpoint" not in str(path)
        },
    }


def differences(whole: dict[str, Any], killed: dict[str, Any]) -> list[str]:
    """Names of what is not the same, to the bit."""
    names = [name for name in ("completions", "findings", "samples") if whole[name] != killed[name]]
    if len(whole["logs"]) != len(killed["logs"]):
        names.append(f"{len(killed['logs'])} logs instead of {len(whole['logs'])}")
    for row, other in zip(whole["logs"], killed["logs"], strict=False):
        names += [f"step {row['step']}: {name}" for name in row if str(row[name]) != str(other.get(name))]
    for file, tensors in whole["weights"].items():
        names += [f"{file}: {n}" for n, t in tensors.items() if not torch.equal(t, killed["weights"][file][n])]
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    demo.model_path()
    rng, kills, writing, runs = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        process = child(Path(root, "whole"))
        while not ended(process, Path(root, "whole")):
            time.sleep(0.05)
        length = time.perf_counter() - started
        whole = outcome(Path(root, "whole"))
        print(f"the run left alone: {length:.0f} s, {len(whole['logs'])} logs", flush=True)
        while kills < args.kills:
            folder = Path(root, f"killed-{runs}")
            process, deadline = child(folder), time.perf_counter() + rng.uniform(1.0, 0.6 * length)
            while not ended(process, folder):
                if time.perf_counter() > deadline and kills < args.kills:
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)
                    kills += 1
                    half = list(folder.glob("unfinished/checkpoint-*"))
                    writing += bool(half)
                    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
                    where = Path(last).name if last else "before any checkpoint"
                    print(f"kill {kills}: {where}{', while writing the next' if half else ''}", flush=True)
                    process, deadline = child(folder), time.perf_counter() + rng.uniform(1.0, 0.6 * length)
                time.sleep(0.002)
            runs += 1
            found = differences(whole, outcome(folder))
            if found:
                sys.exit(f"run {runs} differs from the one left alone: {found[:10]}")
            print(f"run {runs}: the same to the bit", flush=True)
    print(f"{kills} kills, {writing} of them in the writing of a checkpoint; {runs} runs, all the same to the bit")


if __name__ == "__main__":
    main()
