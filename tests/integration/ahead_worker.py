"""One process of a PPO run whose next rollout is sampled ahead; tests/integration/test_ahead.py starts two of it.

python ahead_worker.py MODEL OUT URL [CHECKPOINT]      # beside what torchrun sets; URL: of a stand-in for a vLLM server
"""

import json
import sys
from pathlib import Path

from accelerate import PartialState
from peft import LoraConfig
from safetensors.torch import save_file

from tests.helpers import prompt_dataset, word_tokenizer
from trl_ext import PPOConfig, PPOTrainer
from trl_ext.generation import vllm_probe

vllm_probe.TOKENS = vllm_probe.PROMPTS = 4


def cats(completions: list[str], **_: object) -> list[float]:
    """Say cat."""
    return [float(text.split().count("cat")) for text in completions]


def main() -> None:
    model, out, url, *checkpoint = sys.argv[1:]
    args = PPOConfig(
        out,
        per_device_train_batch_size=8 // PartialState(cpu=True).num_processes,
        num_ppo_epochs=2,
        total_episodes=8 * 5,
        max_completion_length=6,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        per_device_eval_batch_size=3,
        eval_steps=1,  # in the middle of a rollout, too: the next is under way, on the other process as well
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="steps",
        save_steps=3,
        disable_tqdm=True,
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        vllm_server_timeout=1.0,
        rollouts_ahead=1,
    )
    prompts = prompt_dataset(32)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PPOTrainer(model, cats, args, prompts, prompts.select(range(5)), word_tokenizer(), peft_config=lora)
    trainer.train(resume_from_checkpoint=checkpoint[0] if checkpoint else None)
    if trainer.is_world_process_zero():
        trained = {name: p.detach().clone() for name, p in trainer.base.named_parameters() if p.requires_grad}
        save_file(trained, Path(out) / "trained.safetensors")
        (Path(out) / "logs.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")
    trainer.accelerator.end_training()  # without it a thread of gloo's may outlive the process, which then aborts


if __name__ == "__main__":
    main()
