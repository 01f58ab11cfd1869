"""The phases of an update against what the machine can do: floating-point operations and bytes a second.

python tests/benchmarks/roofline.py --model FOLDER

Attainable is what a plain matrix product of the model's own shape and a copy reach in the same run. A phase cannot be
faster than its products or its bytes at that rate, whichever takes longer; the last column says how near it comes.
One base, value on the policy's trunk, float32; the reference is the bare base.
"""

import argparse

import torch
from peft import LoraConfig
from timing import head, row, seconds
from transformers import GenerationConfig

from trl_ext import SharedBase

RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=12)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    base = SharedBase.from_pretrained(chosen.model, policy=lora, value="head", dtype=torch.float32, device_map=device)
    config = base.config
    width = chosen.prompt + chosen.new_tokens
    ids = torch.randint(5, config.vocab_size, (chosen.rows, width), device=device)
    mask = torch.ones_like(ids)
    sampling = GenerationConfig(
        max_new_tokens=chosen.new_tokens, min_new_tokens=chosen.new_tokens, do_sample=True, top_k=0, pad_token_id=0
    )
    prompts = {"input_ids": ids[:, : chosen.prompt], "attention_mask": mask[:, : chosen.prompt]}

    def train() -> None:
        with base.use("policy"):
            outputs = base(ids, mask, chosen.new_tokens, roles=("policy", "value"))
            (outputs["logprobs"].mean() + outputs["values"].mean()).backward()
        base.zero_grad()

    def score(role: str) -> None:
        with torch.no_grad():
            base(ids, mask, chosen.new_tokens, roles=(role,) if role != "policy" else ("policy", "value"))

    # What the machine reaches: a product as in the MLP, and a copy larger than any cache.
    a = torch.randn(chosen.rows * width, config.hidden_size, device=device)
    b = torch.randn(config.hidden_size, config.intermediate_size, device=device)
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[1] / seconds(lambda: a @ b, 50)
    block = torch.empty(2**26, device=device)
    copied = torch.empty_like(block)
    bandwidth = 2 * 4 * block.numel() / seconds(lambda: copied.copy_(block), 10)
    thin = 2 * chosen.rows * b.numel() / seconds(lambda: a[: chosen.rows] @ b, 50)
    print(f"attainable: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s")
    print(f"a product of {chosen.rows} rows: {thin / 1e9:.0f} GFLOP/s\n")

    linear = [m for name, m in base.causal_lm.named_modules() if name.endswith("base_layer")]
    weights = sum(m.weight.numel() for m in linear)
    adapters = sum(RANK * (m.in_features + m.out_features) for m in linear)
    lm_head = config.vocab_size * config.hidden_size
    tokens, new = chosen.rows * width, chosen.rows * chosen.new_tokens
    attention = 2 * config.num_hidden_layers * config.hidden_size * width  # a token; scores and weighted values
    trunk = 2 * tokens * (weights + adapters) + 2 * tokens * attention
    parts = {
        # One token a row and step: every weight is read once a step.
        "generate": (
            2 * (tokens * (weights + adapters) + (new + chosen.rows) * lm_head),
            4 * chosen.new_tokens * (weights + adapters + lm_head),
            lambda: base.generate(**prompts, generation_config=sampling),
        ),
        "score: policy and value": (trunk + 2 * new * lm_head, 4 * (weights + lm_head), lambda: score("policy")),
        "score: reference": (
            trunk - 2 * tokens * adapters + 2 * new * lm_head,
            4 * (weights + lm_head),
            lambda: score("reference"),
        ),
        # Backward: the products for the inputs' gradients once more, those of the adapters twice; the head's gradient
        # is made in the forward.
        "train, one pass": (
            2 * trunk + 2 * tokens * adapters + 4 * new * lm_head,
            4 * 2 * (weights + lm_head),
            train,
        ),
    }
    print(head("phase", "GFLOP", "GB of weights", "s", "GFLOP/s", "bound by", "of what is attainable"))
    for name, (operations, size, call) in parts.items():
        taken = seconds(call, chosen.repeats)
        least = max(operations / flops, size / bandwidth)
        bound = "products" if operations / flops >= size / bandwidth else "bytes"
        cells = f"{operations / 1e9:.0f}", f"{size / 1e9:.1f}", f"{taken:.2f}", f"{operations / taken / 1e9:.0f}"
        print(row(name, *cells, bound, f"{least / taken:.0%}"), flush=True)


if __name__ == "__main__":
    main()
