"""Who answers fastest: Transformers' `generate`, its static cache, its continuous batching, vLLM where it is installed.

python tests/benchmarks/backends.py --model FOLDER [--new_tokens 128] [--precision float32 nf4] [--cpu]

The policy has a LoRA adapter of rank 16 on all linear layers; questions are of unlike length, and answers end where the
model ends them. All are seeded alike, but draw other random numbers: compare tokens a second.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import mean
from typing import Any

import torch
from score_pass import LORA, loaded
from timing import head, row, seconds
from transformers import AutoTokenizer, GenerationConfig

from trl_ext import SharedBase
from trl_ext.generation import ContinuousGenerator, Generator, TransformersGenerator, VLLMGenerator, generate
from trl_ext.types import Rollout

ASKED = [
    "Name a colour.",
    "What is the capital of France?",
    "Tell me a short story about a cat and a garden.",
    "Write three sentences about the sea.",
    "Say yes or no: is water wet?",
    "How do I boil an egg, step by step?",
    "Give me one word for very happy.",
    "Explain in a paragraph why the sky is blue.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=["nf4", "float32", "bfloat16"])
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--rows", type=int, default=16, help="answered at a time")
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    chosen = parser.parse_args()
    device = "cpu" if chosen.cpu or not torch.cuda.is_available() else "cuda"
    tokenizer = AutoTokenizer.from_pretrained(chosen.model, padding_side="left")
    texts = [ASKED[i % len(ASKED)] for i in range(chosen.questions)]
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in texts] if tokenizer.chat_template else texts
    print(head("base", "backend", "s", "tokens per completion", "tokens / s"))
    for precision in chosen.precision:
        base = SharedBase.from_pretrained(chosen.model, policy=LORA, value="head", **loaded(precision, device))
        for name, (generator, more) in backends(base, chosen).items():
            config = GenerationConfig(
                max_new_tokens=chosen.new_tokens,
                do_sample=True,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                eos_token_id=[tokenizer.eos_token_id],
                **more,
            )
            taken, tokens = measured(partial(generate, generator, prompts, tokenizer, config), chosen.repeats)
            cells = f"{taken:.1f}", f"{tokens / len(prompts):.0f}", f"{tokens / taken:.0f}"
            print(row(precision, name, *cells), flush=True)


def measured(answer: Callable[[], Rollout], repeats: int) -> tuple[float, float]:
    """Seconds and tokens of all answers, always to the same random numbers."""
    rollouts: list[Rollout] = []

    def seeded() -> None:
        torch.manual_seed(0)
        rollouts.append(answer())

    return seconds(seeded, repeats), mean(float(rollout.completion_mask.sum()) for rollout in rollouts)


def backends(base: SharedBase, chosen: argparse.Namespace) -> dict[str, tuple[Generator, dict[str, Any]]]:
    """Who answers, and further settings."""
    plain = TransformersGenerator(base, chosen.rows)
    choices: dict[str, tuple[Generator, dict[str, Any]]] = {
        "generate": (plain, {}),
        "generate, static cache": (plain, {"cache_implementation": "static"}),
        "continuous batching": (ContinuousGenerator(base, chosen.rows), {}),
    }
    if find_spec("vllm"):
        choices["vLLM"] = (VLLMGenerator(base, chosen.model, 0.4, None, 0), {})
    return choices


if __name__ == "__main__":
    main()
