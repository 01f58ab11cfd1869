"""A 7B, 8B or 14B shape on one GPU: memory and seconds by phase of a PPO update, and what faster options change.

python tests/benchmarks/large_models.py --shape 8b
python tests/benchmarks/large_models.py --shape 8b --rows 8 1 --profile     # also with one row, and a profile
python tests/benchmarks/large_models.py --shape tiny        # tries the script where there is no GPU

Random weights in NF4, made where they stay, and four roles: LoRA of rank 16 on every linear layer for policy, value and
reward, the bare base as reference. The rows of a rollout travel together in every forward; activations are recomputed.
All but the last tokens of a completion (--written) are made up: only those cost time to generate, and yet keys, values,
scores and training are those of whole completions. The last column is the largest difference in the policy's
log-probabilities that a variant causes on one fixed batch, with the same numbers in every adapter.

`backends.py` compares engines, vLLM among them, on a model that lies on disk.
"""

import argparse
import copy
import faulthandler
import gc
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from timing import head, row
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM, PrinterCallback

from tests.helpers import WORDS, word_tokenizer
from trl_ext import PPOConfig, PPOTrainer, RolloutCallback, SharedBase
from trl_ext.generation import Answers, Generator

LLAMA_3 = {"num_key_value_heads": 8, "vocab_size": 128_256}
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        **LLAMA_3,
    },
    "14b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "vocab_size": 152_064,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
}
VARIANTS = (
    "plain",
    "value on the trunk",
    "bf16 adapters",
    "static cache",
    "continuous batching",
    "continuous batching, CUDA graphs",
    "torch.compile",
)
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STARTED = time.perf_counter()


def say(what: str) -> None:
    """To the log, beside the table."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {what}", file=sys.stderr, flush=True)


# Weights and roles ----------------------------------------------------------------------------------------------------


def random_model(shape: str) -> Any:
    """Random weights in NF4, never on disk and never in the CPU's memory."""
    config = LlamaConfig(max_position_embeddings=2048, **SHAPES[shape])
    with torch.device("meta"):
        names = LlamaForCausalLM(config).state_dict()
    torch.manual_seed(0)
    weights = {
        name: torch.ones(like.shape, dtype=torch.bfloat16, device=DEVICE)
        if like.dim() == 1
        else torch.randn(like.shape, dtype=torch.bfloat16, device=DEVICE).mul_(0.02)
        for name, like in names.items()
    }
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    how: dict[str, Any] = {"quantization_config": nf4, "dtype": torch.bfloat16, "device_map": {"": DEVICE}}
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, **how)
    model.config.name_or_path = ""
    return model


class Roles:
    """The roles over one base that stays where it is: laid on it anew for a variant that needs other ones."""

    def __init__(self, model: Any, judge: Path) -> None:
        self.judge = judge
        self.base = SharedBase.from_model(model, policy=LoraConfig(**LORA))
        self.base.save_pretrained(judge)  # a reward role comes from a folder
        self.kind: tuple[str, torch.dtype] | None = None

    def laid(self, value: str, dtype: torch.dtype) -> SharedBase:
        """Policy, value and reward, the same numbers in them every time."""
        if self.kind != (value, dtype):
            model = self.base.model.unload()
            self.base = SharedBase.from_model(
                model, policy=LoraConfig(**LORA), value=value, reward=self.judge / "value"
            )
            self.kind = (value, dtype)
        for name, parameter in self.base.named_parameters():
            if "lora_" in name:
                drawn = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
                scale = 0.01 if "lora_B" in name else parameter.shape[1] ** -0.5
                numbers = scale * torch.randn(parameter.shape, generator=drawn, device=DEVICE)
                parameter.data = numbers.to(dtype)
            elif "heads." in name:
                torch.nn.init.zeros_(parameter)
        return self.base


def fixed_logprobs(base: SharedBase) -> torch.Tensor:
    """Of one batch that every variant says the same of, or nearly."""
    ids = torch.randint(5, 25, (2, 256), generator=torch.Generator().manual_seed(0)).to(base.device)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        return base.logprobs(ids, torch.ones_like(ids), 128).float().cpu()


# One update -----------------------------------------------------------------------------------------------------------


class Figures(RolloutCallback):
    """Seconds by phase of each update, and the GPU's peak."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Called with every log."""
        if "time/train" in (logs or {}):
            names = ("time/", "memory/", "policy/first_approxkl")
            self.logs.append({name: value for name, value in logs.items() if name.startswith(names)})
            say(", ".join(f"{name} {value:.4g}" for name, value in self.logs[-1].items()))


class MadeUp:
    """Completions of which all but the last `written` tokens are made up, and the rest come from `generator`."""

    def __init__(self, generator: Generator, written: int) -> None:
        self.generator, self.written = generator, written

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `Generator.answers`."""
        shape = len(prompt_ids), config.max_new_tokens - self.written
        made = torch.randint(5, 25, shape, generator=torch.Generator().manual_seed(0)).tolist()
        config = copy.deepcopy(config)
        config.max_new_tokens = self.written
        if config.min_new_tokens is not None:
            config.min_new_tokens = self.written
        begun = [[*prompt, *ids] for prompt, ids in zip(prompt_ids, made, strict=True)]
        written, _ = self.generator.answers(begun, config, role)
        return Answers([[*ids, *rest] for ids, rest in zip(made, written, strict=True)])


def trainer_for(base: SharedBase, variant: str, rows: int, updates: int, chosen: argparse.Namespace) -> PPOTrainer:
    """The real trainer, its completions partly made up."""
    sampling: dict[str, Any] = {"min_new_tokens": chosen.new_tokens}
    if variant == "static cache":
        sampling["cache_implementation"] = "static"
    continuous = variant.startswith("continuous batching")
    # One interval is the padding of the cached tokens that a graph reads: the default of 16,384 is for large batches.
    graphs = {"use_cuda_graph": True, "kv_padding_interval_size": 1024}
    args = PPOConfig(
        str(chosen.work / "out"),
        per_device_train_batch_size=rows,
        total_episodes=rows * updates,
        num_ppo_epochs=chosen.epochs,
        max_completion_length=chosen.new_tokens,
        generation_kwargs=None if continuous else sampling,
        use_transformers_continuous_batching=continuous,
        transformers_continuous_batching_config=graphs if variant.endswith("CUDA graphs") else None,
        use_cpu=DEVICE == "cpu",
        torch_compile=variant == "torch.compile",
        gradient_checkpointing=variant != "torch.compile",  # which cannot follow recomputation
        local_rollout_forward_batch_size=rows,
        bf16=True,
        learning_rate=1e-5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    prompt = " ".join(WORDS[i % len(WORDS)] for i in range(chosen.prompt_tokens))
    data = Dataset.from_dict({"prompt": [prompt] * (rows * updates)})
    trainer = PPOTrainer(base, None, args, data, None, word_tokenizer())
    trainer.remove_callback(PrinterCallback)
    if chosen.written < chosen.new_tokens:
        trainer.collector.generator = MadeUp(trainer.collector.generator, chosen.written)
    return trainer


@contextmanager
def fresh_peak() -> Iterator[None]:
    """The peak inside is nobody's else."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


def measure(
    roles: Roles, variant: str, rows: int, updates: int, chosen: argparse.Namespace, plain: torch.Tensor
) -> str:
    """One variant: its row of the table."""
    half = variant == "bf16 adapters"
    base = roles.laid(
        "head" if variant == "value on the trunk" else "adapter", torch.bfloat16 if half else torch.float32
    )
    difference = float((fixed_logprobs(base) - plain).abs().max())
    with fresh_peak():
        trainer = trainer_for(base, variant, rows, updates, chosen)
        figures = Figures()
        trainer.add_callback(figures)
        trainer.train()
    kept = figures.logs[1:] or figures.logs
    got = {name: median(log[name] for log in kept) for name in kept[0]}
    peak = max(log["memory/peak_gib"] for log in figures.logs)
    seconds = [got[f"time/{phase}"] for phase in ("generate", "roles", "train")]
    speed = rows * min(chosen.written, chosen.new_tokens) / seconds[0]
    cells = (f"{peak:.2f}", *(f"{s:.2f}" for s in seconds), f"{speed:.0f}", f"{got['policy/first_approxkl']:.0e}")
    return row(variant, rows, *cells, f"{difference:.1e}")


# Where the time goes --------------------------------------------------------------------------------------------------


def profiled(roles: Roles, rows: int, chosen: argparse.Namespace) -> None:
    """What generation, and what scoring and training, spend their time on."""
    short = argparse.Namespace(**{**vars(chosen), "written": min(8, chosen.new_tokens)})
    base = roles.laid("adapter", torch.float32)
    trainer = trainer_for(base, "plain", rows, 1, short)
    prompts, config = [[6] * chosen.prompt_tokens] * rows, trainer.collector.generation_config
    generator = trainer.collector.generator
    with trainer.accelerator.autocast():
        generator.answers(prompts, config, "policy")  # the first one is slow
        with spent(f"prompt and {short.written} tokens"):
            generator.answers(prompts, config, "policy")
    short.written = 1
    trainer = trainer_for(base, "plain", rows, 1, short)
    with spent("one update, a single token written"):
        trainer.train()


@contextmanager
def spent(name: str) -> Iterator[None]:
    """Prints the ten longest kernels of what is done inside, and the ten longest waits and calls of the CPU."""
    which = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=which) as seen:
        started = time.perf_counter()
        yield
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - started)
    sums: dict[bool, defaultdict[str, list[float]]] = {True: defaultdict(list), False: defaultdict(list)}
    for event in seen.events() or []:
        on_device = event.device_type != DeviceType.CPU
        if on_device and not getattr(event, "is_user_annotation", False):
            sums[True][event.name].append(event.time_range.elapsed_us() / 1e3)
        elif not on_device:
            sums[False][event.name].append(event.self_cpu_time_total / 1e3)
    busy = sum(map(sum, sums[True].values()))
    print(f"\n{name}: {wall:.0f} ms under the profiler, kernels {busy:.0f} ms ({busy / wall:.0%})", flush=True)
    for on_device, title in ((True, "kernel on the device"), (False, "call on the CPU, itself")):
        if not sums[on_device]:
            continue
        print(head(title, "ms", "times", "share"))
        longest = sorted(sums[on_device].items(), key=lambda item: -sum(item[1]))[:10]
        for what, times in longest:
            print(row(what.replace("|", "/")[:100], f"{sum(times):.1f}", len(times), f"{sum(times) / wall:.0%}"))
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[8], help="of a rollout; any but the first for the first variant alone"
    )
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=512)
    parser.add_argument("--written", type=int, default=128, help="of the new tokens; the others are made up")
    parser.add_argument("--updates", type=int, default=2, help="the first one, which warms up, is not counted")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="what the time goes to, after the first variant")
    parser.add_argument("--limit", type=float, default=600, help="seconds; then every thread's stack, and the end")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "trl_ext_large_models")
    chosen = parser.parse_args()
    chosen.written = min(chosen.written, chosen.new_tokens)
    faulthandler.dump_traceback_later(chosen.limit, exit=True)
    faulthandler.register(signal.SIGTERM, chain=True)  # whoever ends it may see where it was
    say(f"{chosen.shape} on {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'the CPU'}")
    roles = Roles(random_model(chosen.shape), chosen.work / f"{chosen.shape}-judge")
    say("weights are there")
    plain = fixed_logprobs(roles.laid("adapter", torch.float32))
    say(f"roles are there: {', '.join(f'{name} {size / 2**30:.2f} GiB' for name, size in roles.base.memory().items())}")
    phases = ("generate, s", "score, s", "train, s", "new tokens / s", "first approxkl", "largest difference, nats")
    print(head("variant", "rows", "peak GiB", *phases), flush=True)
    failed = 0
    cases = [(chosen.variants[0], rows) for rows in chosen.rows] + [(v, chosen.rows[0]) for v in chosen.variants[1:]]
    for number, (variant, rows) in enumerate(cases):
        faulthandler.dump_traceback_later(chosen.limit, exit=True)
        say(f"{variant}, {rows} rows")
        try:
            updates = chosen.updates - (number > 0)  # warm by then
            print(measure(roles, variant, rows, max(1, updates), chosen, plain), flush=True)
        except Exception as error:
            traceback.print_exc()
            print(row(variant, rows, f"does not run here ({str(error)[:120]})", *[""] * 6), flush=True)
            failed += 1
        if chosen.profile and number == 0:
            faulthandler.dump_traceback_later(chosen.limit, exit=True)
            say("profile")
            profiled(roles, rows, chosen)
            print(head("variant", "rows", "peak GiB", *phases), flush=True)
    say("done")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
