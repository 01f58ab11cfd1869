"""What every trainer of `ppo_vs_trl.py` is given, and how it is measured. Runs in each peer's own environment."""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ANIMALS = ["cat", "dog", "horse", "mouse", "fox", "bear", "wolf", "owl"]
PLACES = ["forest", "city", "desert", "castle", "garden", "harbour", "valley", "library"]
PROMPTS = [f"Tell me a short story about a {a} and a {p}." for a in ANIMALS for p in PLACES]


def arguments() -> argparse.Namespace:
    """The same command line for every peer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", required=True, help="to write to")
    parser.add_argument("--updates", type=int, default=4, help="the first of them is not counted")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro_batch", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--natural", action="store_true", help="answers end where they end, at half of the most tokens")
    parser.add_argument("--variant", default="", help="of this peer")
    parser.add_argument("--reviews", help="file of prompts: learn to continue them so that they sound positive")
    parser.add_argument("--minutes", type=float, default=25, help="to learn for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    return given


def tokenizer_of(model: str) -> Any:
    """Padded on the left."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    except ValueError:  # saved by a Transformers of today, read by one of 2024
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def prompts(given: argparse.Namespace) -> list[str]:
    """As many as all updates take; or every review, in an order of the seed's."""
    if given.reviews:
        lines = Path(given.reviews).read_text(encoding="utf-8").splitlines()
        return random.Random(given.seed).sample([json.loads(line)["prompt"] for line in lines], len(lines))
    return [PROMPTS[i % len(PROMPTS)] for i in range(given.batch * given.updates)]


def by_length(completions: list[str], **_: Any) -> list[float]:
    """A reward function that costs nothing."""
    return [len(text) / 100 for text in completions]


class EndAt(LogitsProcessor):
    """Rows end after a given number of tokens, EOS included, and not before."""

    def __init__(self, lengths: list[int], prompt: int, eos: int) -> None:
        self.lengths, self.prompt, self.eos = torch.tensor(lengths), prompt, eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt + 1
        ends = (self.lengths[: len(scores)] == step).to(scores.device)
        scores = scores.clone()
        forced = torch.full_like(scores, -1e4)
        forced[:, self.eos] = 0.0
        scores[:, self.eos] = -1e4
        return torch.where(ends.unsqueeze(1), forced, scores)


def end_answers(given: argparse.Namespace, eos: int) -> None:
    """Let every `generate` of this process end its rows at the lengths of `given`: evenly spread from 1 to the most
    tokens, so about half of them in the mean; or, without `natural`, never before the most. Reviews end by
    themselves."""
    if given.reviews:
        return
    most, plain = given.new_tokens, GenerationMixin.generate
    lengths = [1 + (i * (most - 1)) // (given.batch - 1) for i in range(given.batch)]
    drawn = [lengths[(7 * i) % given.batch] for i in range(given.batch)] if given.natural else [most + 1] * given.batch

    def generate(self: Any, inputs: Any = None, **kwargs: Any) -> Any:
        ids = inputs if inputs is not None else kwargs["input_ids"]
        kwargs["logits_processor"] = LogitsProcessorList([EndAt(drawn, ids.shape[1], eos)])
        return plain(self, inputs, **kwargs) if inputs is not None else plain(self, **kwargs)

    GenerationMixin.generate = generate


class Clock:
    """Seconds by phase and update, and the peak of memory."""

    def __init__(self) -> None:
        self.updates: list[dict[str, float]] = []
        self._phase, self._since = "", time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> None:
        """The phase before ends here."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._phase:
            self._seconds[self._phase] += now - self._since
        self._phase, self._since = phase, now

    def end_update(self) -> None:
        """An update ends here."""
        self.enter("")
        self.updates.append(dict(self._seconds))
        self._seconds.clear()

    def add(self, seconds: dict[str, float]) -> None:
        """An update whose phases another clock has measured."""
        self.updates.append(seconds)

    def around(self, owner: Any, name: str, phase: str, then: str) -> None:
        """`owner.name(...)` is `phase`, and what follows is `then`."""
        plain = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(phase)
            try:
                return plain(*args, **kwargs)
            finally:
                self.enter(then)

        setattr(owner, name, timed)

    def report(self, given: argparse.Namespace) -> None:
        """The last line of output, for the driver: every update but the first."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Path(given.folder).mkdir(parents=True, exist_ok=True)
        print(json.dumps({"updates": self.updates[1:], "peak": peak}))


class OutOfTimeError(Exception):
    """The minutes are over."""


def learn(trainer: Any, curve: TrainerCallback) -> None:
    """Train until time is over. (TRL 1.12's PPOTrainer does not ask `control` whether to stop.)"""
    trainer.add_callback(curve)
    with suppress(OutOfTimeError):
        trainer.train()


class Curve(TrainerCallback):
    """Writes score and KL (nats per completion) against seconds of training, a line an update, until time is over."""

    def __init__(self, given: argparse.Namespace, score: str, kl: str, kl_is_per_token: bool = False) -> None:
        self.file, self.limit = Path(given.folder, "curve.jsonl"), 60 * given.minutes
        self.score, self.kl, self.kl_is_per_token = score, kl, kl_is_per_token
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("")
        self.began = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **__: Any) -> None:
        if self.score not in (logs or {}):
            return
        seconds = time.perf_counter() - self.began
        kl = logs[self.kl] * (logs["completions/mean_length"] if self.kl_is_per_token else 1.0)
        with self.file.open("a") as file:
            file.write(json.dumps({"seconds": seconds, "score": logs[self.score], "kl": kl}) + "\n")
        if seconds > self.limit:
            raise OutOfTimeError


class Updates(TrainerCallback):
    """Tells the clock of the steps of a trainer that takes `steps` of them in an update."""

    def __init__(self, clock: Clock, steps: int = 1) -> None:
        self.clock, self.steps = clock, steps

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.enter("train")

    def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % self.steps == 0:
            self.clock.end_update()
