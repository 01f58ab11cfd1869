"""What importance weights are good for where another distribution samples than the one that is trained, on the embedded
default, whose sampler is off on purpose: it computes in bfloat16, and a fixed noise of 0.1 or 1 nat lies on its logits.

python tests/benchmarks/sampling_correction.py --work FOLDER          # prints the table, writes it into docs/vllm.md
python tests/benchmarks/sampling_correction.py --work FOLDER --quick  # two short rollouts, one seed; prints alone

Each run's numbers are a file in FOLDER: a second call goes on where the first stopped. The table has medians over the
seeds. "The base itself" samples as it is trained.
"""

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from doctor import ALWAYS, USUAL
from peft import LoraConfig
from transformers import AutoTokenizer, GenerationConfig

from trl_ext import PPOConfig, PPOTrainer, SharedBase, demo
from trl_ext.generation import Answers, TransformersGenerator

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
START, END = "<!-- sampling correction: begin -->", "<!-- sampling correction: end -->"
NOISES = (0.1, 1.0)  # nats, one standard deviation
CORRECTED = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
HEAD = (
    "sampler, correction",
    "exam (each seed)",
    "KL, nats per completion",
    "sampling_kl, nats per token",
    "weight cut",
)


class Off:
    """The base as its own sampler, in bfloat16 and with a fixed noise on its logits."""

    def __init__(self, base: SharedBase, batch_size: int, noise: float) -> None:
        self.inner = TransformersGenerator(base, batch_size, tell=True)
        words = base.config.get_text_config().vocab_size
        drawn = noise * torch.randn(words, generator=torch.Generator().manual_seed(0))
        self.bias = {(i,): x for i, x in enumerate(drawn.tolist())}

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `trl_ext.generation.Generator.answers`."""
        config = copy.deepcopy(config)
        config.sequence_bias = self.bias
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.inner.answers(prompt_ids, config, role)


def run(noise: float, mode: str | None, seed: int, further: dict[str, Any]) -> dict[str, float]:
    """Exam (share right), KL, sampling_kl and share of weight cut of one run."""
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    base = SharedBase.from_pretrained(demo.model_path(), policy=lora, reward=demo.reward_adapter(), dtype="float32")
    correction: dict[str, Any] = {"vllm_importance_sampling_correction": mode is not None}
    if mode is not None:
        correction["vllm_importance_sampling_mode"] = mode
    with tempfile.TemporaryDirectory() as folder:
        settings = {**ALWAYS, **USUAL["ppo"], **correction, **further}
        args = PPOConfig(folder, seed=seed, **settings)
        generator = Off(base, args.local_rollout_forward_batch_size, noise) if noise else None
        prompts = demo.load("prompts", "train")
        trainer = PPOTrainer(base, None, args, prompts, processing_class=tokenizer, generator=generator)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    last = rows[-4:]
    return {
        "exam": 100 * demo.run_exam(base, tokenizer).covered,
        "KL": statistics.fmean(row["objective/kl"] for row in last),
        "sampling_kl": statistics.fmean(row.get("val/sampling_kl", 0.0) for row in rows),
        "cut": statistics.fmean(row.get("sampling/weight_cut", 0.0) for row in rows),
    }


def measured(work: Path, noise: float, mode: str | None, seed: int, further: dict[str, Any]) -> dict[str, float]:
    """What `run` gives, or gave before."""
    file = work / f"{noise}-{mode}-{seed}.json"
    if not file.is_file():
        file.write_text(json.dumps(run(noise, mode, seed, further)), encoding="utf-8")
    figures: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
    print(file.stem, figures, flush=True)
    return figures


def table(work: Path, seeds: list[int], further: dict[str, Any]) -> str:
    """Medians over `seeds` as a Markdown table."""
    variants = [(0.0, None), *((noise, mode) for noise in NOISES for mode in (None, *CORRECTED))]
    by_seed = [[measured(work, *variant, seed, further) for variant in variants] for seed in seeds]
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for (noise, mode), runs in zip(variants, zip(*by_seed, strict=True), strict=True):
        exams = ", ".join(f"{one['exam']:.1f}%" for one in runs)
        medians = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        name = f"off by {noise:g}, {f'`{mode}`' if mode else 'none'}" if noise else "the base itself, none"
        cells = [name, f"{medians['exam']:.1f}% ({exams})", f"{medians['KL']:.2f}"]
        cells += [f"{medians['sampling_kl']:.4f}" if noise else "", f"{medians['cut']:.2%}" if mode else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    if chosen.quick:
        print(table(chosen.work, chosen.seeds[:1], {"total_episodes": 128}))
        return
    made = table(chosen.work, chosen.seeds, {})
    print(made)
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
