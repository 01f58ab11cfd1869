"""Our callbacks and reward functions in TRL's own trainers of today, really training."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from tests.helpers import QUIET, prompt_dataset, saved_model, tiny_classifier, word_tokenizer
from tests.reward_server import Server
from trl_ext import AdaptiveKLCallback, AdaptiveKLController, DiagnosticsCallback, PIKLController, SharedBase
from trl_ext.diagnostics import Limits, diagnose, read_run
from trl_ext.rewards.models import classifier, fluency, reward_role
from trl_ext.rewards.remote import remote
from trl_ext.rewards.sentiment import vader_sentiment
from trl_ext.rewards.similarity import chrf
from trl_ext.rewards.texts import (
    forbidden,
    json_schema,
    keywords,
    length_penalty,
    limited,
    matches,
    repetition_penalty,
)

pytestmark = pytest.mark.host

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


ONLINE: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "logging_steps": 1,
    "max_completion_length": 6,
    "learning_rate": 1e-2,
    "beta": 0.05,
    **QUIET,
}


def judge_model(folder: Path) -> str:
    tiny_classifier().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def judged_base(tmp_path: Path, model: str) -> SharedBase:
    SharedBase.from_pretrained(model).save_pretrained(tmp_path / "judge")
    return SharedBase.from_pretrained(model, reward=str(tmp_path / "judge" / "value"))


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_online_trainers(tmp_path: Path, reward_server: Server, trainer_class: Any, config_class: Any) -> None:
    """Every ready-made reward function, and a KL controller."""
    model = saved_model(tmp_path / "model")
    base, tokenizer = judged_base(tmp_path, model), word_tokenizer()
    rewards = [
        length_penalty(2, 6),
        repetition_penalty(2),
        matches(".*cat.*"),
        limited([keywords(["cat", "dog"])], [forbidden(["bird"])], worst=-1.0),
        json_schema({"type": "object"}),
        chrf("animal"),
        vader_sentiment,
        classifier(judge_model(tmp_path / "classifier")),
        fluency(base, tokenizer),
        reward_role(base, tokenizer),
        remote(reward_server.url),
    ]
    settings = config_class(str(tmp_path / "out"), max_steps=3, **ONLINE)
    trainer = trainer_class(model, rewards, settings, prompt_dataset(16), peft_config=LORA)
    controller = PIKLController(init=0.05, target=2.0)
    trainer.add_callback(AdaptiveKLCallback(controller, trainer=trainer))
    trainer.train()
    logs = [row for row in trainer.state.log_history if "kl" in row]
    assert len(logs) == 3
    expected = PIKLController(init=0.05, target=2.0)
    for row in logs:
        assert row["objective/kl_coef"] == pytest.approx(expected.value, rel=1e-6), "what was in force"
        expected.update(row["kl"] * row["completions/mean_length"], 4)
    assert trainer.beta == controller.value != 0.05
    names = [reward.__name__ for reward in rewards]
    assert len(set(names)) == len(rewards)
    assert all(f"rewards/{name}/mean" in logs[0] for name in names)
    assert len(reward_server.requests) == 3
    assert -20 < logs[0]["rewards/fluency/mean"] < 0


def test_the_controllers_state_survives_resuming_in_trls_trainers(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")

    def run(checkpoint: str | None) -> dict[str, float]:
        saving = {"save_strategy": "steps", "save_steps": 2}
        settings = RLOOConfig(str(tmp_path / "out"), max_steps=4, **{**ONLINE, **saving})
        trainer = RLOOTrainer(model, keywords(["cat"]), settings, prompt_dataset(16), peft_config=LORA)
        controller = PIKLController(init=0.05, target=2.0, horizon=20)
        trainer.add_callback(AdaptiveKLCallback(controller, trainer=trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
        return controller.state_dict()

    whole = run(None)
    assert run(str(tmp_path / "out" / "checkpoint-2")) == pytest.approx(whole, rel=1e-4)


def offline_trainer(kind: str, tmp_path: Path, pairs: Dataset | None = None, **how: Any) -> Any:
    model = saved_model(tmp_path / "model")
    if pairs is None:
        pairs = Dataset.from_dict({"prompt": ["the cat"] * 8, "chosen": [" sat on"] * 8, "rejected": [" ran"] * 8})
    shared = {"per_device_train_batch_size": 4, "max_steps": 2, **QUIET, **how}
    if kind == "dpo":
        return DPOTrainer(model, args=DPOConfig(str(tmp_path / "out"), **shared), train_dataset=pairs, peft_config=LORA)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    return RewardTrainer(
        model, args=RewardConfig(str(tmp_path / "out"), **shared), train_dataset=pairs, peft_config=lora
    )


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_controller_that_cannot_act_says_so_before_training(tmp_path: Path, kind: str) -> None:
    trainer = offline_trainer(kind, tmp_path)
    for callback in (AdaptiveKLCallback(), AdaptiveKLCallback(trainer=trainer)):
        trainer.add_callback(callback)
        with pytest.raises(ValueError, match=r"^AdaptiveKLCallback cannot act in a trainer with \w+: it has no KL"):
            trainer.train()
        trainer.remove_callback(callback)
    assert trainer.state.global_step == 0


def test_a_controller_without_the_trainer_or_without_beta_says_so(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")

    def trainer_with(beta: float) -> Any:
        settings = RLOOConfig(
            str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2, max_steps=1, beta=beta, **QUIET
        )
        return RLOOTrainer(model, keywords(["cat"]), settings, prompt_dataset(8), peft_config=LORA)

    trainer = trainer_with(0.05)
    trainer.add_callback(AdaptiveKLCallback(AdaptiveKLController()))
    with pytest.raises(
        ValueError, match=r"RLOOConfig: it copies args\.beta .* pass AdaptiveKLCallback\(\.\.\., trainer=trainer\)"
    ):
        trainer.train()
    trainer = trainer_with(0.0)
    trainer.add_callback(AdaptiveKLCallback(AdaptiveKLController(), trainer=trainer))
    with pytest.raises(ValueError, match="built with beta=0 and computes no KL"):
        trainer.train()


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_the_doctor_in_online_trainers(tmp_path: Path, trainer_class: Any, config_class: Any) -> None:
    """Answers of a random model hardly ever end within six tokens, and this is found in what TRL logs."""
    model = saved_model(tmp_path / "model")
    settings = config_class(str(tmp_path / "out"), max_steps=4, **ONLINE)
    trainer = trainer_class(model, keywords(["cat"]), settings, prompt_dataset(16), peft_config=LORA)
    callback = DiagnosticsCallback()
    trainer.add_callback(callback)
    trainer.train()
    assert "truncation" in [finding.name for finding in callback.findings]
    trainer.save_state()
    assert "truncation" in [finding.name for finding in diagnose(read_run(tmp_path / "out"))]


@pytest.mark.parametrize(("kind", "expected"), [("dpo", "chance_level"), ("reward", "chance_level")])
def test_the_doctor_in_offline_trainers(tmp_path: Path, kind: str, expected: str) -> None:
    """Pairs whose two sides are exchanged at random teach nothing."""
    sides = [" sat on", " ran"]
    rows = {"chosen": [sides[i % 2] for i in range(8)], "rejected": [sides[(i + 1) % 2] for i in range(8)]}
    pairs = Dataset.from_dict({"prompt": ["the cat"] * 8, **rows})
    how = {"logging_steps": 1, "max_steps": 10, "learning_rate": 1e-8}
    trainer = offline_trainer(kind, tmp_path, pairs=pairs, **how)
    callback = DiagnosticsCallback(limits=Limits(chance_pairs=30))
    trainer.add_callback(callback)
    trainer.train()
    names = [finding.name for finding in callback.findings]
    assert expected in names, names
    logged = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert logged[0] == 1


def test_a_bias_for_length_is_seen_in_the_pairs(tmp_path: Path) -> None:
    pairs = Dataset.from_dict({"prompt": ["the cat"] * 8, "chosen": [" sat on a tree"] * 8, "rejected": [" ran"] * 8})
    trainer = offline_trainer("reward", tmp_path, pairs=pairs, logging_steps=1)
    callback = DiagnosticsCallback()
    trainer.add_callback(callback)
    trainer.train()
    (finding,) = [finding for finding in callback.findings if finding.name == "length_bias"]
    assert finding.figures["longer_chosen"] == 1.0


def test_the_first_step_is_logged_whatever_the_interval(tmp_path: Path) -> None:
    trainer = offline_trainer("dpo", tmp_path, logging_steps=100)
    trainer.add_callback(DiagnosticsCallback())
    trainer.train()
    assert next(row["step"] for row in trainer.state.log_history if "rewards/chosen" in row) == 1
