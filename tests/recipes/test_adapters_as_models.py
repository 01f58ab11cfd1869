"""An adapter's folder as --model_name_or_path: each recipe trains it further, and says so.

Expected values are those of a plain PeftModel over the plain base.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import FLAGS, QUIET
from tests.parity import tiny
from tests.parity.test_roles import close
from trl_ext import FeedbackRewardConfig, FeedbackRewardTrainer, PPOConfig, PPOTrainer, SharedBase

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter over it as a policy's trainer saves one, a reward adapter, and rows."""
    folder = tmp_path_factory.mktemp("home")
    tiny.save_base(folder / "base", tiny.config_of("llama"))
    tiny.save_policy_adapter(folder / "sft", folder / "base", seed=1)
    tiny.save_reward_adapter(folder / "judge", folder / "base", seed=2)
    rows = [{"prompt": f"w{i % 9 + 3} w5", "chosen": " w7 w8", "rejected": " w9"} for i in range(24)]
    for name, columns in {"prompts": ("prompt",), "pairs": ("prompt", "chosen", "rejected")}.items():
        lines = (json.dumps({column: row[column] for column in columns}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def run(monkeypatch: pytest.MonkeyPatch, recipe: str, arguments: str) -> None:
    words = [*arguments.split(), *FLAGS, "--disable_tqdm", "true", "--eval_rows", "4", "--save_strategy", "no"]
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{recipe}_lora.py"), *words])
    runpy.run_path(sys.argv[0], run_name="__main__")


def length(completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    "named",
    [
        "model_name_or_path {home}/sft",
        "policy_adapter {home}/sft --model_name_or_path {home}/base --reference_adapter copy",
    ],
)
def test_ppo_starts_at_the_adapter(
    named: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        f"--{named.format(home=home)} --dataset {home}/prompts.jsonl --reward_adapter {home}/judge --max_steps 4 "
        f"--learning_rate 0 --max_completion_length 4 --output_dir {tmp_path}/out --gradient_checkpointing false"
    )
    run(monkeypatch, "ppo", arguments)
    said = capsys.readouterr().out
    assert f"{home}/base, and on it the adapter {home}/sft, trained further" in said
    assert "reference: reference" in said and "bare base" not in said
    assert "0.00 nats per completion" in said  # nothing was learned, and the reference is where it began
    saved, start = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", home / "sft"))
    assert saved.keys() == start.keys() and all(torch.equal(saved[key], start[key]) for key in start)
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_dpo_starts_at_the_adapter(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        f"--model_name_or_path {home}/sft --dataset {home}/pairs.jsonl --max_steps 1 --learning_rate 0 "
        f"--logging_steps 1 --output_dir {tmp_path}/out --gradient_checkpointing false"
    )
    run(monkeypatch, "dpo", arguments)
    said = capsys.readouterr().out
    assert f"{home}/base, and on it the adapter {home}/sft, trained further" in said
    assert "a frozen copy of that adapter" in said
    assert "0.00 nats per completion" in said
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "ln 2: policy and reference agree"
    saved, start = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", home / "sft"))
    assert all(torch.equal(saved[key], start[key]) for key in start)


def test_a_reward_model_starts_at_the_policys_adapter(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        f"--model_name_or_path {home}/sft --dataset {home}/pairs.jsonl --max_steps 1 --learning_rate 0 "
        f"--output_dir {tmp_path}/out --gradient_checkpointing false"
    )
    run(monkeypatch, "reward", arguments)
    assert f"{home}/base, and on it the adapter {home}/sft, trained further" in capsys.readouterr().out
    saved, start = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", home / "sft"))
    assert all(torch.equal(saved[key], start[key]) for key in start)
    assert [key for key in saved if key not in start] == ["base_model.model.score.weight"]
    base = SharedBase.from_pretrained(str(home / "sft"), reward=tmp_path / "out").eval()
    batch = tiny.padded_batch()
    with torch.no_grad():
        close(
            base.scores(batch.ids, batch.mask),
            tiny.plain_scores(tiny.load_classifier(tmp_path / "out", home / "base").eval(), batch),
        )


def test_a_reward_model_is_trained_further(home: Path, tmp_path: Path) -> None:
    args = FeedbackRewardConfig(str(tmp_path / "out"), max_steps=1, learning_rate=0.0, **QUIET)
    pairs = Dataset.from_json(str(home / "pairs.jsonl"))
    trainer = FeedbackRewardTrainer(str(home / "judge"), args, pairs, processing_class=tiny.make_tokenizer())
    batch = tiny.padded_batch()
    with torch.no_grad():
        expected = tiny.plain_scores(tiny.load_classifier(home / "judge", home / "base").eval(), batch)
        close(tiny.plain_scores(trainer.model.eval(), batch), expected)
    assert any(p.requires_grad for name, p in trainer.model.named_parameters() if "score" in name)


def test_ppo_in_python_takes_the_folder_and_what_transformers_loads_from_it(home: Path, tmp_path: Path) -> None:
    prompts = Dataset.from_json(str(home / "prompts.jsonl"))
    batch = tiny.padded_batch()
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "sft").eval()
    with torch.no_grad():
        expected = tiny.plain_logprobs(plain, batch)
    for model in (str(home / "sft"), AutoModelForCausalLM.from_pretrained(home / "sft")):
        trainer = PPOTrainer(model, length, PPOConfig(str(tmp_path / "out"), max_completion_length=4, **QUIET), prompts)
        with torch.no_grad():
            for role in ("policy", "reference"):
                close(trainer.base.eval().logprobs(*batch.args, role=role), expected)


def test_what_cannot_be_meant_is_refused(home: Path, tmp_path: Path) -> None:
    prompts, pairs = (Dataset.from_json(str(home / f"{name}.jsonl")) for name in ("prompts", "pairs"))
    ppo, reward = PPOConfig(str(tmp_path / "out"), **QUIET), FeedbackRewardConfig(str(tmp_path / "out"), **QUIET)
    sft, lora = str(home / "sft"), LoraConfig(task_type="CAUSAL_LM")
    apart = shutil.copytree(home / "sft", tmp_path / "apart")  # as LLaMA-Factory keeps a head
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, apart / "value_head.safetensors")
    loaded = AutoModelForSequenceClassification.from_pretrained(home / "judge", num_labels=1)
    for call, sentence in (
        (lambda: PPOTrainer(sft, length, ppo, prompts, peft_config=lora), "leave peft_config out"),
        (
            lambda: PPOTrainer(str(home / "base"), sft, ppo, prompts),
            "holds no score head: a reward or value role",
        ),
        (lambda: PPOTrainer(str(home / "base"), str(apart), ppo, prompts), "keeps its head in value_head.safetensors"),
        (lambda: FeedbackRewardTrainer(str(apart), reward, pairs), "keeps its head in value_head.safetensors"),
        (lambda: FeedbackRewardTrainer(sft, reward, pairs, peft_config=lora), "leave peft_config out"),
        (lambda: FeedbackRewardTrainer(loaded, reward, pairs), "was loaded with an adapter, over which TRL would lay"),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
