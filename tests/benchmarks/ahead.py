"""What `rollouts_ahead` saves: server and trainer on a core each, with and without.

PYTHONPATH=. python tests/benchmarks/ahead.py --vllm ENVIRONMENT/bin/vllm --model FOLDER --reviews FILE
PYTHONPATH=. python tests/benchmarks/ahead.py --stand-in      # the embedded default and the tests' server: no vLLM

Without, the two take turns, so that run also says how long each takes alone. "Training" is all that is not generation:
scoring, the evidence beside training, the update. The first rollout is not counted. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from tests.engines.served import SETTINGS, WAIT, Served, base_of, prompts_of
from tests.vllm_server import StandIn
from trl_ext import PPOConfig, PPOTrainer, RolloutCallback, demo
from trl_ext.rewards import vader_sentiment


class Clock(RolloutCallback):
    """When each update has ended, seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_update_end(self, experience: Any, metrics: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Of a rollout, on average."""
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


class StandInServed:
    """The tests' stand-in in a process of its own: beside the trainer in one, it would share its lock."""

    def __init__(self, model: str) -> None:
        command = [sys.executable, __file__, "--model", model, "--serve-stand-in"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def kill(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def serve_stand_in(model: str) -> None:
    """Say where it is, and serve until whoever started it is gone."""
    torch.set_num_threads(1)
    server = StandIn(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    print(server.url, flush=True)
    sys.stdin.read()


def run(chosen: argparse.Namespace, url: str, folder: Path, ahead: int) -> tuple[float, float]:
    """Seconds of a rollout, and those of them that the trainer waited for completions."""
    base, tokenizer, clock = base_of(chosen.model, 1), AutoTokenizer.from_pretrained(chosen.model), Clock()
    args = PPOConfig(
        str(folder),
        seed=1,
        per_device_train_batch_size=min(8, chosen.rows),
        gradient_accumulation_steps=max(1, chosen.rows // 8),
        num_ppo_epochs=chosen.epochs,
        max_completion_length=chosen.tokens,
        learning_rate=1e-5,
        total_episodes=chosen.updates * chosen.rows,
        **SETTINGS,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        vllm_server_timeout=WAIT,
        rollouts_ahead=ahead,
    )
    texts = prompts_of(chosen.reviews) if chosen.reviews else demo.load("prompts", "train")["prompt"]
    rewards = vader_sentiment if chosen.reviews else lengths
    data = Dataset.from_dict({"prompt": list(texts)})
    trainer = PPOTrainer(base, rewards, args, data, processing_class=tokenizer, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "time/generate" in row]
    return clock.seconds, fmean(row["time/generate"] for row in rows[1:])


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Say little."""
    return [-float(len(ids)) for ids in completion_ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="its command, in its own environment")
    parser.add_argument("--serve", default="", help="further arguments of vllm serve")
    parser.add_argument("--model", help="without --stand-in; with it: the embedded default")
    parser.add_argument("--reviews", help="texts whose first six words are prompts; without: those of the demo")
    parser.add_argument("--port", type=int, default=8178)
    parser.add_argument("--cores", type=int, nargs=2, default=[0, 1], help="of the server, and of the trainer")
    parser.add_argument("--rows", type=int, default=32, help="completions of a rollout")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of a completion")
    parser.add_argument("--epochs", type=int, default=4, help="of each rollout")
    parser.add_argument("--updates", type=int, default=6, help="of each run, the first not counted")
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--serve-stand-in", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.stand_in and not chosen.model:
        chosen.model = str(demo.model_path())
    if not chosen.model or not (chosen.stand_in or chosen.serve_stand_in or chosen.vllm):
        parser.error("give --vllm and --model, or --stand-in")
    if chosen.serve_stand_in:
        serve_stand_in(chosen.model)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        os.sched_setaffinity(0, {chosen.cores[0]})  # a process takes over where its parent may run
        server: Any = StandInServed(chosen.model) if chosen.stand_in else Served(chosen, work / "vllm.log")
        os.sched_setaffinity(0, {chosen.cores[1]})
        try:
            turns, generation = run(chosen, server.url, work / "turns", ahead=0)
            ahead, waited = run(chosen, server.url, work / "ahead", ahead=1)
        except Exception:
            if not chosen.stand_in:
                print((work / "vllm.log").read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            if server.process.poll() is None:
                server.kill()
    training = turns - generation
    ratio = ahead / max(generation, training)
    print(f"rollouts_ahead 0: {turns:.2f} s a rollout, of which {generation:.2f} generation, {training:.2f} training")
    print(f"rollouts_ahead 1: {ahead:.2f} s a rollout, {waited:.2f} of them waiting; {ratio:.2f} times the longer one")
    found = {"turns": turns, "generation": generation, "training": training, "ahead": ahead, "ratio": ratio}
    print(json.dumps({name: round(seconds, 3) for name, seconds in found.items()}))


if __name__ == "__main__":
    main()
