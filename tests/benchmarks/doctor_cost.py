"""What the doctor costs: its share of an update's time, and its memory.

python tests/benchmarks/doctor_cost.py --model smollm2/          # medians of three updates

The callback, the metrics that are computed for it and the gradient norms are timed inside a real run with a log of a
thousand rows before it; an update is generation, scoring and training.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

import trl_ext.ppo.update as ppo_update
from trl_ext import DiagnosticsCallback, PPOConfig, PPOTrainer
from trl_ext.ppo.update import Updater
from trl_ext.rewards.texts import length_penalty

SPENT: list[float] = []
HISTORY = 1_000


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its seconds added to `SPENT`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            SPENT.append(time.perf_counter() - started)

    return run


class Clock(DiagnosticsCallback):
    """Writes down when each update ended, and what the doctor had spent by then."""

    def __init__(self) -> None:
        super().__init__(yardstick=length_penalty(8, 16))
        self.marks: list[tuple[float, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Diagnose on a long log."""
        if len(state.log_history) < HISTORY and logs and "objective/kl" in logs:
            row = state.log_history[-1]
            state.log_history[:0] = [{**row, "step": -i} for i in range(HISTORY, 0, -1)]
        timed(super().on_log)(args, state, control, logs, **kwargs)
        self.marks.append((time.perf_counter(), sum(SPENT)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name or folder")
    parser.add_argument("--updates", type=int, default=4, help="the first one is not counted")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    # All of summarize counts, though most of it is what TRL logs too.
    ppo_update.summarize = timed(ppo_update.summarize)
    Updater._gradients_finite = timed(Updater._gradients_finite)
    DiagnosticsCallback.on_update_begin = timed(DiagnosticsCallback.on_update_begin)
    DiagnosticsCallback.on_update_end = timed(DiagnosticsCallback.on_update_end)
    prompts = Dataset.from_dict({"prompt": [f"Movie review: number {i} was a film that" for i in range(64)]})
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            folder,
            per_device_train_batch_size=16,
            total_episodes=16 * args.updates,
            max_completion_length=48,
            gradient_checkpointing=False,
            learning_rate=1e-5,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=args.cpu,
            model_init_kwargs={"dtype": "float32"},
        )
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        trainer = PPOTrainer(
            args.model, length_penalty(16, 48), config, prompts, None, tokenizer, peft_config=lora, callbacks=[clock]
        )
        trainer.train()
    shares = [
        (spent - before) / (now - then)
        for (then, before), (now, spent) in zip(clock.marks[:-1], clock.marks[1:], strict=True)
    ][: args.updates - 1]
    print(f"the doctor takes {statistics.median(shares):.2%} of an update (each: {[f'{s:.2%}' for s in shares]})")


if __name__ == "__main__":
    main()
