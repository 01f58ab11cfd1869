"""The roles inside TRL's own PPOTrainer, which TRL had until 1.12."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.helpers import QUIET, tiny_llama, word_tokenizer
from trl_ext import DiagnosticsCallback, SharedBase

ppo = pytest.importorskip("trl.experimental.ppo", reason="TRL removed its PPOTrainer in 1.13")


def test_policy_and_value_train_and_the_rest_stays(tmp_path: Path) -> None:
    folder, tokenizer = str(tmp_path / "model"), word_tokenizer()
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    judge = SharedBase.from_pretrained(folder)
    torch.nn.init.normal_(judge.heads["value"].weight)
    judge.save_pretrained(tmp_path / "judge")
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    base = SharedBase.from_pretrained(folder, policy=lora, reward=tmp_path / "judge" / "value")
    torch.nn.init.normal_(base.heads["value"].weight, std=0.1)  # from 0 no gradient reaches the value's adapter
    policy, value_model, reward_model = base.as_trl_models()
    doctor = DiagnosticsCallback()

    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(
            str(tmp_path / "out"),
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            total_episodes=24,
            response_length=6,
            stop_token="eos",
            num_ppo_epochs=2,
            num_sample_generations=0,
            learning_rate=1e-3,
            gradient_checkpointing=False,
            **QUIET,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=Dataset.from_dict({"input_ids": [[5 + i % 9, 6, 7] for i in range(32)]}),
        eval_dataset=Dataset.from_dict({"input_ids": [[5, 6, 7]] * 8}),
        callbacks=[doctor],
    )
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in base.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(".policy." in name for name in moved)
    assert any(".value." in name and "lora_" in name for name in moved)
    assert "heads.value.weight" in moved
    assert all(".policy." in name or ".value." in name or name == "heads.value.weight" for name in moved)
    assert trainer.state.log_history[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert doctor.log_of(trainer.state).kind == "ppo"
    assert len(doctor.log_of(trainer.state).series("kl")) == 3
    assert (tmp_path / "out" / "run.json").is_file()
