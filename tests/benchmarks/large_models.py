"""A 7B or 14B shape on one GPU: memory and seconds by phase of a PPO update, and what faster options change.

python tests/benchmarks/large_models.py --shape 7b --work FOLDER
python tests/benchmarks/large_models.py --shape tiny --work FOLDER        # tries the script where there is no GPU

Random weights in NF4, LoRA of rank 16 on every linear layer: policy, a value adapter of its own, and a reward role; 8
prompts of 128 tokens and 384 new ones, gradient checkpointing. Each variant is a process of its own. The last column is
the largest difference in log-probabilities that the variant causes on one fixed batch.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import head, row
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from tests.helpers import WORDS, word_tokenizer
from trl_ext import PPOConfig, PPOTrainer, RolloutCallback, SharedBase

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "14b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}
VOCABULARY = {"7b": 32_000, "14b": 152_064, "tiny": 512}
VARIANTS = (
    "plain",
    "value on the trunk",
    "static cache",
    "torch.compile",
    "bf16 adapters",
    "continuous batching",
    "vLLM",
)
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class Peaks(RolloutCallback):
    """Seconds by phase of each update, and the GPU's peak."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called with every log."""
        if "time/train" in (logs or {}):
            self.logs.append({name: value for name, value in logs.items() if name.startswith(("time/", "memory/"))})


def weights(shape: str, folder: Path, device: str) -> Path:
    """Random weights on disk, in bfloat16."""
    if not (folder / "config.json").exists():
        config = LlamaConfig(vocab_size=VOCABULARY[shape], max_position_embeddings=2048, **SHAPES[shape])
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
    return folder


def fixed_logprobs(base: SharedBase, tokens: int) -> torch.Tensor:
    """Of one batch that every variant says the same of, or nearly."""
    ids = torch.randint(5, 25, (2, tokens), generator=torch.Generator().manual_seed(0)).to(base.device)
    with torch.no_grad():
        return base.logprobs(ids, torch.ones_like(ids), tokens // 2).float().cpu()


def measure(chosen: argparse.Namespace) -> None:
    """One variant: prints its figures as a line of JSON."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = weights(chosen.shape, chosen.work / chosen.shape, device)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    how: dict[str, Any] = {"quantization_config": nf4, "device_map": device, "policy": LoraConfig(**LORA)}
    judge = chosen.work / f"{chosen.shape}-judge"
    if not judge.exists():
        SharedBase.from_pretrained(str(folder), **how).save_pretrained(judge)
    value = "head" if chosen.variant == "value on the trunk" else "adapter"
    base = SharedBase.from_pretrained(str(folder), value=value, reward=judge / "value", **how)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    if chosen.variant == "bf16 adapters":
        for name, parameter in base.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.bfloat16()
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    sampling: dict[str, Any] = {"min_new_tokens": chosen.new_tokens}
    if chosen.variant == "static cache":
        sampling["cache_implementation"] = "static"
    args = PPOConfig(
        str(chosen.work / "out"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        total_episodes=8 * chosen.updates,
        num_ppo_epochs=chosen.epochs,
        max_completion_length=chosen.new_tokens,
        generation_kwargs=None if chosen.variant in ("continuous batching", "vLLM") else sampling,
        use_vllm=chosen.variant == "vLLM",
        use_transformers_continuous_batching=chosen.variant == "continuous batching",
        use_cpu=device == "cpu",
        torch_compile=chosen.variant == "torch.compile",
        gradient_checkpointing=chosen.variant != "torch.compile",  # which cannot follow recomputation
        local_rollout_forward_batch_size=8,
        bf16=True,
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        log_completions=False,
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"prompt": [" ".join(WORDS[i % 20] for i in range(128))] * (8 * chosen.updates)})
    peaks = Peaks()
    trainer = PPOTrainer(base, None, args, rows, None, word_tokenizer(), callbacks=[peaks])
    saved = chosen.work / f"{chosen.shape}-logprobs.pt"
    with trainer.accelerator.autocast():
        said = fixed_logprobs(base, chosen.new_tokens)
    if chosen.variant == "plain":
        torch.save(said, saved)
    # With the value on the trunk the policy's weights are drawn otherwise.
    difference = float((said - torch.load(saved)).abs().max()) if value == "adapter" else None
    started = time.perf_counter()
    trainer.train()
    kept = peaks.logs[1:] or peaks.logs
    figures = {name: median(log[name] for log in kept) for name in kept[0]}
    figures |= {"seconds": (time.perf_counter() - started) / chosen.updates, "difference": difference}
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--updates", type=int, default=3, help="the first one is not counted")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--new_tokens", type=int, default=384)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.variant:
        measure(chosen)
        return
    print(head("variant", "peak GiB", "generate, s", "train, s", "new tokens / s", "largest difference, nats"))
    for variant in chosen.variants:
        again = [sys.executable, *sys.argv, "--variant", variant]
        done = subprocess.run(again, capture_output=True, text=True)
        if done.returncode:
            print(
                row(variant, f"does not run here ({(done.stderr.splitlines() or ['?'])[-1][:120]})", *[""] * 4),
                flush=True,
            )
            continue
        got = json.loads(done.stdout.splitlines()[-1])
        speed = 8 * chosen.new_tokens / got["time/generate"]
        cells = (
            f"{got['memory/peak_gib']:.2f}",
            f"{got['time/generate']:.1f}",
            f"{got['time/train']:.1f}",
            f"{speed:.0f}",
        )
        difference = "not compared" if got["difference"] is None else f"{got['difference']:.1e}"
        print(row(variant, *cells, difference), flush=True)


if __name__ == "__main__":
    main()
