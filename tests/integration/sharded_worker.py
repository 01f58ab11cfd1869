"""One process of a PPO run whose base FSDP2 shares out, or of the same run where it does not;
tests/integration/test_sharding.py starts one of it, or two.

python sharded_worker.py MODEL OUT [WORD ...]      # beside what torchrun sets

The words say what the run has: gradient "checkpointing", a value "head" and a warm-up for it, an "nf4" base, a "nan";
and the folder of a checkpoint to go on from.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

from tests.helpers import prompt_dataset, word_tokenizer
from tests.integration.sharding import shard_on_a_cpu
from trl_ext import PPOConfig, PPOTrainer, RolloutCallback, SharedBase
from trl_ext.roles.sharding import whole

SHARDED = "ACCELERATE_USE_FSDP" in os.environ


def cats(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """Say cat, and be brief, above all after a long prompt."""
    return [
        text.count("cat") - 0.01 * len(text) * len(prompt) for prompt, text in zip(prompts, completions, strict=True)
    ]


class Watch(RolloutCallback):
    """Notes how many decoder layers of a sharded base are whole when one has computed, and how long answers are."""

    def __init__(self, base: SharedBase) -> None:
        self.lengths: list[list[int]] = []
        self.whole_at_once = 0
        self._base, self._layers = base, base.causal_lm.model.layers
        for layer in self._layers:
            layer.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        weights = [layer.mlp.up_proj.base_layer.weight for layer in self._layers]
        if self._base.sharded:
            self.whole_at_once = max(self.whole_at_once, sum(not isinstance(weight, DTensor) for weight in weights))

    def on_rollout_end(self, args: Any, state: Any, control: Any, rollout: Any, **_: Any) -> None:
        """On each process, of its own answers."""
        self.lengths.append(rollout.completion_mask.sum(dim=1).tolist())


def spoilt(trainer: PPOTrainer) -> Any:
    """Its loss, not a number in the third step, on the last process alone."""
    plain = trainer.updater._loss

    def loss(*args: Any) -> torch.Tensor:
        wrong = trainer.state.global_step == 2 and PartialState().is_last_process
        return plain(*args) * (float("nan") if wrong else 1.0)

    return loss


def main() -> None:
    model, out, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if SHARDED:
        shard_on_a_cpu()
    processes = PartialState(cpu=not SHARDED).num_processes
    args = PPOConfig(
        str(out),
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=2,
        num_mini_batches=2,
        num_ppo_epochs=2,
        total_episodes=32 * 3,
        max_completion_length=6,
        local_rollout_forward_batch_size=3,
        # The same answers however prompts are dealt out, and of unlike length: many words end one.
        generation_kwargs={"do_sample": False, "eos_token_id": [1, *range(13, 20)]},
        score_normalization="reference",
        normalization_samples=15,  # not as many in each process
        whiten_rewards=True,
        value_warmup_rollouts=int("head" in words),
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.05,
        eval_strategy="steps",
        eval_steps=8,
        per_device_eval_batch_size=4 // processes,
        gradient_checkpointing="checkpointing" in words,
        use_cpu=not SHARDED,
        logging_steps=1,
        report_to="none",
        save_strategy="steps",
        save_steps=6,
        disable_tqdm=True,
    )
    dtype = torch.bfloat16 if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" else torch.float32
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if SHARDED else torch.uint8,  # FSDP2 shares out floats alone
    )
    set_seed(1)
    base = SharedBase.from_pretrained(
        model,
        quantization_config=nf4 if "nf4" in words else None,
        policy=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        value="head" if "head" in words else "adapter",
        dtype=dtype,
    )
    watch, prompts = Watch(base), prompt_dataset(70)
    trainer = PPOTrainer(
        base, [cats], args, prompts, prompts.select(range(5)), processing_class=word_tokenizer(), callbacks=[watch]
    )
    if "nan" in words:
        trainer.updater._loss = spoilt(trainer)
    trainer.train(resume_from_checkpoint=next((word for word in words if "checkpoint-" in word), None))
    trainer.save_model()
    trained = {name: whole(p.detach()).clone() for name, p in trainer.base.named_parameters() if p.requires_grad}
    ids = torch.arange(5, 17).view(2, 6)
    logprobs = trainer.base.logprobs(ids, torch.ones_like(ids), 3)
    watched = {
        "dtype": str(logprobs.dtype),
        "lengths": watch.lengths,
        "whole": watch.whole_at_once,
        "logprobs": logprobs.tolist(),
    }
    (out / f"watched_{trainer.args.process_index}.json").write_text(json.dumps(watched), encoding="utf-8")
    if trainer.is_world_process_zero():
        save_file(trained, out / "trained.safetensors")
        (out / "logs.json").write_text(json.dumps([processes, trainer.state.log_history]), encoding="utf-8")


if __name__ == "__main__":
    main()
