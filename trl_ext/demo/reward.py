"""The demo's reward adapter: what recipes/reward_lora.py would train, made on demand for those who start with PPO."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

from filelock import FileLock

from trl_ext._trl import train_in_float32
from trl_ext.demo.store import DONE, build, is_complete, load

# What torchrun and accelerate tell each process that they launch.
LAUNCHER = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
SETTINGS = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "center_rewards_coefficient": 0.001,
}


def reward_adapter(cache_dir: str | Path | None = None, load_in_4bit: bool = False) -> str:
    """The folder of a reward adapter for the demo model, as TRL's RewardTrainer saves it; trained first where needed.

    Args:
        cache_dir: as in `build`.
        load_in_4bit: trained over the NF4 base, for a policy over the same.
    """
    demo = build(cache_dir)
    folder = demo / f"reward-{'nf4' if load_in_4bit else 'float32'}"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_complete(folder):
        _train_alone({"cache_dir": str(demo.parent), "load_in_4bit": load_in_4bit})
        return str(folder)
    with FileLock(folder.with_suffix(".lock")):
        if not is_complete(folder):
            print(f"training the demo's reward adapter into {folder} ...", file=sys.stderr, flush=True)
            temporary = demo / f".{folder.name}-{uuid.uuid4().hex}"
            try:
                _train(temporary, demo, cache_dir, load_in_4bit)
                (temporary / DONE).write_text("{}", encoding="utf-8")
                shutil.rmtree(folder, ignore_errors=True)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return str(folder)


def _train_alone(arguments: dict[str, Any]) -> None:
    """`reward_adapter` in a process outside the launched group. Inside it, RewardTrainer would wait for the other
    processes, while they wait for the lock."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    code = "import json, sys; from trl_ext.demo import reward_adapter; reward_adapter(**json.loads(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], env=variables, check=True)


def _train(folder: Path, demo: Path, cache_dir: str | Path | None, load_in_4bit: bool) -> None:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import RewardConfig, RewardTrainer

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with torch.random.fork_rng():
        trainer = RewardTrainer(
            model=str(demo / "model"),
            args=RewardConfig(
                output_dir=str(folder),
                model_init_kwargs={"dtype": "float32"},
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                **SETTINGS,
            ),
            train_dataset=load("pairs", "train", cache_dir).select_columns(["prompt", "chosen", "rejected"]),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
            quantization_config=nf4 if load_in_4bit else None,
        )
        train_in_float32(trainer.model)
        trainer.train()
        trainer.save_model()
