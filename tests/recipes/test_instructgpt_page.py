"""docs/instructgpt.md, with fewer steps: its commands and its code run, and each step stands on the one before."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers import FLAGS
from trl_ext import PPOTrainer, cli, demo

PAGE = Path(__file__).parents[2] / "docs" / "instructgpt.md"
HEAD = "base_model.model.score.weight"


def blocks(language: str) -> list[str]:
    """The page's code, with 8 steps of 4 rows where it takes longer than SFT."""
    text = re.sub(r"(num_train_epochs|total_episodes)(\W+)(1|3|3200)\b", r"max_steps\g<2>8", PAGE.read_text("utf-8"))
    text = re.sub(r"(per_device_train_batch_size\W+)16\b", r"\g<1>4", text)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


DEMONSTRATIONS, *STEPS, COMPARISON = blocks("python")


def execute(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, PAGE.name, "exec"), names)


def command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, name, *options = shlex.split(line.replace("\\\n", " ").replace("$BASE", demo.model_path()))
    options += [*FLAGS, "--disable_tqdm", "true"]
    if program == "trl-ext":
        assert cli.main([name, *options]) == 0
        return
    assert program == "trl"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])  # what `trl NAME` launches
    runpy.run_module(f"trl.scripts.{name}", run_name="__main__")


def saved(name: str) -> dict[str, Tensor]:
    return load_file(Path("runs", name, "adapter_model.safetensors"))


def test_the_code_is_short() -> None:
    assert len(STEPS) == 3 and all(len(code.splitlines()) <= 10 for code in blocks("python"))


@pytest.mark.long
def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    texts = (json.dumps({"text": f"The river {i} runs to the sea."}) + "\n" for i in range(9))
    Path("pretraining.jsonl").write_text("".join(texts), encoding="utf-8")
    names: dict[str, Any] = {}
    execute(DEMONSTRATIONS, names)
    _, *lines = blocks("sh")
    for line in lines:
        command(line, monkeypatch)
    for name in ("sft", "reward", "ppo", "ppo_ptx", "dpo"):
        config = json.loads(Path("runs", name, "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == demo.model_path(), "one base"
    assert saved("reward").keys() == saved("sft").keys() | {HEAD}
    for name, pretraining in (("ppo", False), ("ppo_ptx", True)):
        log = json.loads(Path("runs", name, "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        assert ("loss/ptx" in log[0]) == pretraining
        assert log[0]["objective/kl"] == pytest.approx(0, abs=1e-4), "the policy starts at the reference"
    capsys.readouterr()
    execute(COMPARISON, names)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("None", "runs/"))]
    assert [row[0] for row in rows[::2]] == ["None", "runs/sft", "runs/dpo", "runs/ppo"]
    assert float(rows[0][2]) > 0.2, "the base's KL to SFT"
    for by_role, by_truth in zip(rows[::2], rows[1::2], strict=True):
        assert by_role[2] == by_truth[2], "the same completions"
        assert by_role[0] != "runs/sft" or float(by_role[2]) == 0, "KL to itself"
        assert 1 <= float(by_truth[1]) <= 5, "the true rating"


@pytest.mark.slow
def test_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What PPO starts from is compared with the files that the steps before have saved."""
    monkeypatch.chdir(tmp_path)
    begun: dict[str, dict[str, Tensor]] = {}
    train = PPOTrainer.train

    def noted(trainer: PPOTrainer) -> Any:
        for role, name in trainer.base.adapters.items():
            weights = get_peft_model_state_dict(trainer.base.model, adapter_name=name)
            begun[role] = {key: tensor.clone() for key, tensor in weights.items()}
        for role in ("value", "reward"):
            begun[role][HEAD] = trainer.base.heads[role].weight.detach().clone()
        return train(trainer)

    monkeypatch.setattr(PPOTrainer, "train", noted)
    names: dict[str, Any] = {}
    for code in (DEMONSTRATIONS, *STEPS):
        execute(code, names)
    for role, step in {"policy": "sft", "reference": "sft", "reward": "reward", "value": "reward"}.items():
        weights = saved(step)
        assert begun[role].keys() == weights.keys(), role
        assert all(torch.equal(begun[role][key], weights[key]) for key in weights), role
    key = next(key for key in saved("sft") if "lora_B" in key)
    assert not torch.equal(saved("reward")[key], saved("sft")[key]), "trained further"
    assert not torch.equal(saved("ppo")[key], saved("sft")[key])
