"""PPO over a real `vllm serve`: greedy completions, log-probabilities, a run, a server that is killed in the middle.

python tests/engines/served.py --vllm ENVIRONMENT/bin/vllm --model FOLDER --reviews FILE [--quick]

`run.sh` beside it makes the environment. The task: 24 tokens that continue a film review, scored by how positive they
sound (VADER). With the server as with `generate` PPO is to learn the same, and in the last run the server is killed
while it answers, and started again. Status 1 where something is not as it should be.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, GenerationConfig

from trl_ext import PPOConfig, PPOTrainer, SharedBase
from trl_ext.generation import TransformersGenerator, VLLMServerGenerator, VLLMServers, vllm_probe
from trl_ext.generation.vllm_probe import differences
from trl_ext.rewards import vader_sentiment
from trl_ext.tokens import eos_ids, tokenize_prompts

LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
SERVE = "--enable-lora --max-lora-rank 16 --dtype bfloat16 --max-model-len 512 --max-num-seqs 64"
SURROUNDINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
WAIT = 900.0  # seconds for it to start
SETTINGS: dict[str, Any] = {
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}
PROBED = 3 * vllm_probe.PROMPTS  # completions at the start of a run
wrong: list[str] = []


class Served:
    """A `vllm serve` of this script's own."""

    def __init__(self, chosen: argparse.Namespace, log: Path) -> None:
        self.chosen, self.log = chosen, log
        self.url = f"http://127.0.0.1:{chosen.port}"
        self.start()

    def start(self) -> None:
        where = ["--host", "127.0.0.1", "--port", str(self.chosen.port)]
        command = [self.chosen.vllm, "serve", self.chosen.model, *where, *SERVE.split(), *self.chosen.serve.split()]
        environment = {**os.environ, **SURROUNDINGS}
        environment.pop("PYTHONPATH", None)  # it is another Python's
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def kill(self) -> None:
        """With all the processes that it has started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def say(what: str, good: bool = True) -> None:
    print(("" if good else "WRONG: ") + what, flush=True)
    if not good:
        wrong.append(what)


def prompts_of(file: str) -> list[str]:
    """The first six words of each review."""
    lines = pd.read_csv(file, sep="\t") if file.endswith(".tsv") else pd.read_json(file, lines=True)
    texts = lines["prompt"] if "prompt" in lines else lines["text"]
    return [" ".join(text.split()[:6]) for text in texts if len(text.split()) >= 6]


def base_of(model: str, seed: int) -> SharedBase:
    torch.manual_seed(seed)
    return SharedBase.from_pretrained(model, policy=LORA, value="head", dtype="float32")


def compare(chosen: argparse.Namespace, prompts: list[str], folder: Path) -> None:
    """Greedy completions and log-probs of the server beside our own, under an adapter and under the bare base."""
    base, tokenizer = base_of(chosen.model, 0), AutoTokenizer.from_pretrained(chosen.model)
    draws = torch.Generator().manual_seed(1)
    for parameter in base.trainable_parameters("policy"):
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=draws)
    servers = VLLMServers([f"http://127.0.0.1:{chosen.port}"], WAIT)
    started = time.perf_counter()
    generator = VLLMServerGenerator(base, servers, folder, vllm_probe.TOLERANCE)
    say(f"the server is up and agrees after {time.perf_counter() - started:.0f} s; processed: {generator.processed}")
    asked = tokenize_prompts(prompts[:8], tokenizer)
    usual: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": eos_ids(base.causal_lm, tokenizer)}
    usual |= {"pad_token_id": tokenizer.pad_token_id, "top_k": 0}
    greedy, drawn = (GenerationConfig(do_sample=sampled, **usual) for sampled in (False, True))
    for role in ("policy", "reference"):
        ours = TransformersGenerator(base, 8).answers(asked, greedy, role).ids
        theirs = generator.answers(asked, greedy, role).ids
        alike = sum(x == y for x, y in zip(ours, theirs, strict=True))
        gaps = [gap(base, role, *rows) for rows in zip(asked, ours, theirs, strict=True)]
        told = f"greedy, {role}: {alike} of {len(ours)} completions are ours to the last token"
        say(f"{told}; where one parts, ours is {max(gaps):.2f} nats likelier at most", max(gaps) < 0.2)
        apart = differences(base, role, asked, generator.answers(asked, drawn, role))
        middle, mean, most = median(apart), fmean(apart), max(apart)
        told = f"log-probs, {role}: {middle:.3f} nats apart in the median, {mean:.3f} on average, {most:.2f} at most"
        say(told, middle < vllm_probe.TOLERANCE)


def gap(base: SharedBase, role: str, asked: list[int], ours: list[int], theirs: list[int]) -> float:
    """How much likelier our own token is than the other, by our log-probs, where two greedy completions part; 0 where
    they do not. Rounding may decide between two that are nearly the same."""
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        return 0.0
    rows = torch.tensor([asked + ours[:at] + [row[at]] for row in (ours, theirs)])
    with torch.no_grad():
        own, other = base.logprobs(rows, torch.ones_like(rows), 1, role)[:, 0].tolist()
    return float(own - other)


def train(chosen: argparse.Namespace, prompts: list[str], seed: int, folder: Path, **settings: Any) -> list[dict]:
    """The logs of a run, a row a rollout."""
    base, tokenizer = base_of(chosen.model, seed), AutoTokenizer.from_pretrained(chosen.model)
    args = PPOConfig(
        str(folder),
        seed=seed,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=chosen.rows // 8,
        max_completion_length=24,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        total_episodes=chosen.updates * chosen.rows,
        **SETTINGS,
        **settings,
    )
    data = Dataset.from_dict({"prompt": prompts})
    trainer = PPOTrainer(base, vader_sentiment, args, data, processing_class=tokenizer)
    trainer.train()
    return [row for row in trainer.state.log_history if "objective/kl" in row]


def shown(name: str, rows: list[dict]) -> str:
    """Score, KL and seconds of each update in a line."""
    scores, kls = ([f"{row[key]:.2f}" for row in rows] for key in ("objective/scores", "objective/kl"))
    seconds = [f"{row['time/generate']:.0f}+{row['time/roles'] + row['time/train']:.0f}" for row in rows]
    off = [f"{row['val/sampling_kl']:.4f}" for row in rows if "val/sampling_kl" in row]
    cut = [f"{row['sampling/weight_cut']:.1%}" for row in rows if "sampling/weight_cut" in row]
    parts = {"score": scores, "KL": kls, "s to generate + to train": seconds, "sampling KL": off, "weight cut": cut}
    return f"{name}: " + "; ".join(f"{what} {', '.join(values)}" for what, values in parts.items() if values)


@contextmanager
def killed(server: Served, after: int, pause: float) -> Any:
    """Within, the server is killed while it writes, once it has ended so many more completions, and started again."""
    done = threading.Event()

    def watch() -> None:
        begun = figure(server, "request_success_total")
        while not done.is_set():
            ended, running = (figure(server, name) for name in ("request_success_total", "num_requests_running"))
            if ended - begun >= after and running:
                server.kill()
                say(f"the server is killed while it writes {running:.0f} completions")
                time.sleep(pause)
                server.start()
                done.set()
            time.sleep(0.2)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        killed_it = done.is_set()
        done.set()
        thread.join()
        if not killed_it:
            say("the server was not killed in time", good=False)


def figure(server: Served, name: str) -> float:
    """One of the server's own figures, summed over its labels; 0 where it does not answer."""
    try:
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"vllm:{name}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="its command, in its own environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--reviews", required=True)
    parser.add_argument("--port", type=int, default=8177)
    parser.add_argument("--serve", default="", help="further arguments of vllm serve")
    parser.add_argument("--updates", type=int, default=6, help="0: only compare")
    parser.add_argument("--rows", type=int, default=64, help="completions of an update")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="three updates of 16 completions, one seed")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.updates, chosen.rows, chosen.seeds = 3, 16, chosen.seeds[:1]
    prompts, runs = prompts_of(chosen.reviews), {}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        server = Served(chosen, work / "vllm.log")
        served: dict[str, Any] = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
        served["vllm_server_timeout"] = WAIT
        try:
            compare(chosen, prompts, work / "adapters")
            for seed in chosen.seeds if chosen.updates else ():
                for how, settings in (("generate", {}), ("vLLM", served)):
                    rows = train(chosen, prompts, seed, work / f"{how}-{seed}", **settings)
                    say(shown(f"{how}, seed {seed}", rows))
                    runs[how, seed] = rows
            for what in ("objective/scores", "objective/kl") if runs and len(chosen.seeds) > 1 else ():
                # Over all updates: an update's 64 completions alone have a standard error as large as what is learned.
                means = {run: fmean(row[what] for row in rows) for run, rows in runs.items()}
                ours, theirs = ([means[how, seed] for seed in chosen.seeds] for how in ("generate", "vLLM"))
                apart, spread = abs(fmean(ours) - fmean(theirs)), max(ours) - min(ours)
                told = f"{what}, mean over {chosen.updates} updates: {apart:.3f} apart, the seeds {spread:.3f}"
                say(told, apart <= spread)
            if chosen.updates:
                with killed(server, PROBED + chosen.rows, pause=2.0):
                    rows = train(chosen, prompts, chosen.seeds[0], work / "killed", **served)
                say(shown("vLLM, killed and started again", rows), len(rows) == chosen.updates)
        except Exception:
            print((work / "vllm.log").read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            if server.process.poll() is None:
                server.kill()
    print(json.dumps({"wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
