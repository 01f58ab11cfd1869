"""Peak memory of TRL 1.12's own PPOTrainer: three models as usual, against three roles of one base.

pip install "trl==1.12.0" && python tests/benchmarks/trl_ppo_memory.py

A random Llama of about 110 million parameters, float32; each set-up runs two updates in a process of its own.
The same script prints how the adaptive KL coefficient moved.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def models(setup: str, folder: str) -> tuple[Any, Any, Any]:
    """Policy, value model and reward model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from trl_ext import SharedBase

    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if setup == "one base":
        judge = str(Path(folder, "judge"))
        SharedBase.from_pretrained(folder, policy=lora).save_pretrained(judge)
        return SharedBase.from_pretrained(folder, policy=lora, reward=f"{judge}/value").as_trl_models()
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora)
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32) for _ in range(2)
    )
    value = get_peft_model(value, LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS"))
    return policy, _Bare(value), reward


def _Bare(model: Any) -> Any:
    """TRL reads the backbone under `base_model_prefix` of the model inside PEFT's wrapper."""
    return model.base_model.model


def train(setup: str, folder: str) -> None:
    """Two updates; prints the coefficient's way and the peak resident memory."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from tests.helpers import word_tokenizer
    from trl_ext import AdaptiveKLCallback, AdaptiveKLController

    policy, value, reward = models(setup, folder)
    prompts = Dataset.from_dict({"input_ids": [[5 + i % 9, 6, 7] * 4 for i in range(32)]})
    trainer = PPOTrainer(
        args=PPOConfig(
            str(Path(folder, "out")),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            total_episodes=16,
            response_length=32,
            num_ppo_epochs=2,
            num_sample_generations=0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=word_tokenizer(),
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[AdaptiveKLCallback(AdaptiveKLController(init=0.05, target=1.0, horizon=100))],
    )
    trainer.train()
    coefficients = [round(row["objective/kl_coef"], 5) for row in trainer.state.log_history if "objective/kl" in row]
    print("RESULT", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, coefficients)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup")
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if arguments.setup:
        train(arguments.setup, arguments.folder)
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        size = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 14, "num_attention_heads": 12}
        LlamaForCausalLM(LlamaConfig(vocab_size=32, **size)).save_pretrained(folder)
        peaks = {}
        for setup in ("three models", "one base"):
            command = [sys.executable, __file__, "--setup", setup, "--folder", folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
            line = next(line for line in output.splitlines() if line.startswith("RESULT"))
            peaks[setup] = float(line.split()[1])
            print(f"{setup}: peak {peaks[setup]:.2f} GiB resident; kl_coef {line.split(maxsplit=2)[2]}", flush=True)
        print(f"one base / three models: {peaks['one base'] / peaks['three models']:.2f}")


if __name__ == "__main__":
    main()
