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
    BitsAndBytesConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

PRECISIONS = ("float32", "bf16", "autocast", "nf4")
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
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--natural", action="store_true", help="answers end where they end, at half of the most tokens")
    parser.add_argument("--variant", default="", help="of this peer")
    parser.add_argument("--reviews", help="file of prompts: learn to continue them so that they sound positive")
    parser.add_argument("--minutes", type=float, default=25, help="to learn for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    return given


def lora(given: argparse.Namespace, task_type: str = "CAUSAL_LM") -> dict[str, Any]:
    """The same adapter for every peer."""
    return {
        "r": given.rank,
        "lora_alpha": 2 * given.rank,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "task_type": task_type,
    }


def weights(precision: str) -> dict[str, Any]:
    """How a model is loaded. 4 bits are computed with in what the device is good at."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if precision == "float32" or (precision, device) == ("nf4", "cpu") else torch.bfloat16
    if precision != "nf4":
        return {"dtype": dtype}
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"dtype": dtype, "quantization_config": nf4, "device_map": {"": device}}


def place(precision: str) -> dict[str, Any]:
    """Where a Trainer computes, and whether under autocast, which it refuses on a CPU that it was not told of."""
    return {"use_cpu": not torch.cuda.is_available(), "bf16": precision == "autocast"}


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
    """Those of one update, the same in every one, so that each has the same work in whatever order they come; or every
    review, in an order of the seed's."""
    if given.reviews:
        lines = Path(given.reviews).read_text(encoding="utf-8").splitlines()
        return random.Random(given.seed).sample([json.loads(line)["prompt"] for line in lines], len(lines))
    return [PROMPTS[i % len(PROMPTS)] for i in range(given.batch)]


def by_length(completions: list[str], **_: Any) -> list[float]:
    """A reward function that costs nothing."""
    return [len(text) / 100 for text in completions]


class EndAt(LogitsProcessor):
    """A row ends when its completion has as many tokens as its prompt's number says, EOS included, and not before.

    What a row begins with tells its prompt, so rows may come in any order, leave, and go on in a later `generate`. A
    batch without a prompt of the update is none of it (a trainer tries a model out), and ends as it likes.
    """

    def __init__(self, lengths: dict[tuple[int, ...], int], mask: torch.Tensor | None, pad: int, eos: int) -> None:
        self.lengths, self.mask, self.pad, self.eos = lengths, mask, pad, eos
        self.ends = torch.empty(0)

    def _end(self, row: list[int], mask: list[int]) -> int:
        """The column of the row's last token; -1 where it begins with no prompt."""
        start = next((i for i, real in enumerate(mask) if real), 0)
        start = next((i for i in range(start, len(row)) if row[i] != self.pad), len(row))
        known = [size for size in {*map(len, self.lengths)} if tuple(row[start : start + size]) in self.lengths]
        if not known:
            return -1
        if len(known) > 1:
            raise ValueError(f"{len(known)} prompts begin the row {row[start:]}: one was expected.")
        return start + known[0] + self.lengths[tuple(row[start : start + known[0]])] - 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if len(self.ends) != len(input_ids):  # in one `generate` rows keep their places
            masks = [[]] * len(input_ids) if self.mask is None else self.mask.tolist()
            masks = [mask for mask in masks for _ in range(len(input_ids) // len(masks))]  # several of a prompt
            rows = zip(input_ids.tolist(), masks)  # noqa: B905 (Python 3.11 everywhere, but of its day)
            self.ends = torch.tensor([self._end(row, mask) for row, mask in rows], device=scores.device)
            if 0 < int((self.ends < 0).sum()) < len(self.ends):
                raise ValueError("Some rows begin with a prompt of the update, and others with none.")
        if bool((self.ends < 0).all()):
            return scores
        scores = scores.clone()
        forced = torch.full_like(scores, -1e4)
        forced[:, self.eos] = 0.0
        scores[:, self.eos] = -1e4
        return torch.where((self.ends == input_ids.shape[1]).unsqueeze(1), forced, scores)


def end_completions(given: argparse.Namespace, tokenizer: Any) -> None:
    """Let every `generate` of this process end its rows at the lengths of `given`: evenly spread from 1 to the most
    tokens over an update's prompts, so about half of them in the mean; or, without `natural`, never before the most.
    Reviews end by themselves."""
    if given.reviews:
        return
    most, plain, pad = given.new_tokens, GenerationMixin.generate, tokenizer.pad_token_id
    known = [
        ids[next(i for i, token in enumerate(ids) if token != pad) :] for ids in tokenizer(prompts(given))["input_ids"]
    ]
    known = list(dict.fromkeys(map(tuple, known)))
    spread = [1 + (i * (most - 1)) // max(1, len(known) - 1) for i in range(len(known))]
    random.Random(0).shuffle(spread)
    lengths = dict(zip(known, spread if given.natural else [most + 1] * len(known)))  # noqa: B905

    def generate(self: Any, inputs: Any = None, **kwargs: Any) -> Any:
        end = EndAt(lengths, kwargs.get("attention_mask"), pad, tokenizer.eos_token_id)
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), end])
        return plain(self, inputs, **kwargs) if inputs is not None else plain(self, **kwargs)

    GenerationMixin.generate = generate


class Clock:
    """Seconds by phase and update, and the peak of memory, beside what was taken at the start."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            self.start = torch.cuda.memory_allocated()
        else:
            self.start = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])
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
        print(json.dumps({"updates": self.updates[1:], "peak": peak, "start": self.start}))


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
