"""How an update grows: time a token with batch and length, memory with vocabulary, batch and rollouts.

python tests/benchmarks/growth.py --model FOLDER --work FOLDER [--only time memory]

Each row is a process of its own (`peers/ours.py`, the value on the policy's trunk).
"""

import argparse
from pathlib import Path
from statistics import median

from ppo_vs_trl import run
from timing import head, row
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

SMALL, LARGE = 50_000, 150_000  # not below what the tokenizer has


def wide_model(folder: Path, vocabulary: int, tokenizer_of: str) -> Path:
    """A small random Llama with a large vocabulary, tied."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    return folder


def attention_share(model: str, tokens: int) -> float:
    """Attention's own share of a forward's products: scores and weighted values against everything with weights."""
    config = AutoConfig.from_pretrained(model)
    size, layers = config.hidden_size, config.num_hidden_layers
    kv = size * config.num_key_value_heads // config.num_attention_heads
    weights = layers * (2 * size * size + 2 * size * kv + 3 * size * config.intermediate_size)
    return layers * 2 * tokens * size / (weights + size * config.vocab_size + layers * 2 * tokens * size)


def time_a_token(chosen: argparse.Namespace) -> None:
    """With twice the batch, and answers twice as long."""
    phases = ("generate", "score", "train")
    print(head("batch", "new tokens", "s / update", *(f"{p}, ms / token" for p in phases), "all", "attention's share"))
    for batch, length in ((8, 48), (16, 48), (8, 96)):
        more = ["--batch", str(batch), "--micro_batch", "8", "--new_tokens", str(length)]
        updates = run((None, "ours.py", "head", more), chosen)["updates"]
        tokens = batch * (length + 12)
        by_phase = [f"{1000 * median(update[p] for update in updates) / tokens:.1f}" for p in phases]
        total = median(sum(update.values()) for update in updates)
        share = attention_share(str(chosen.model), length + 12)
        print(row(batch, length, f"{total:.1f}", *by_phase, f"{1000 * total / tokens:.1f}", f"{share:.1%}"), flush=True)


def memory(chosen: argparse.Namespace) -> None:
    """With the vocabulary, the batch, and the number of updates, over a small random model."""
    print("\n" + head("vocabulary", "batch", "updates", "peak MiB", "logits of the answers would be, MiB"))
    model = str(chosen.model)
    for vocabulary, batch, updates in ((SMALL, 16, 2), (LARGE, 16, 2), (LARGE, 64, 2), (LARGE, 16, 12)):
        chosen.model, chosen.updates = wide_model(chosen.work / f"wide-{vocabulary}", vocabulary, model), updates
        more = ["--batch", str(batch), "--micro_batch", str(batch), "--new_tokens", "64", "--epochs", "1"]
        peak = run((None, "ours.py", "head", more), chosen)["peak"] / 2**20
        print(row(vocabulary, batch, updates, f"{peak:.0f}", f"{batch * 64 * vocabulary * 4 / 2**20:.0f}"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    chosen = parser.parse_args()
    chosen.env = []
    for part in chosen.only:
        {"time": time_a_token, "memory": memory}[part](chosen)


if __name__ == "__main__":
    main()
