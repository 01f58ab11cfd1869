"""The pages for people who come from elsewhere: what they say to write runs, and the names in their tables are ours."""

import json
import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, ModelConfig

from tests.helpers import FLAGS, QUIET, prompt_dataset, saved_model, tiny_classifier, word_tokenizer
from trl_ext import PPOConfig, PPOTrainer, SharedBase

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "migration"
RECIPE = ROOT / "recipes" / "ppo_lora.py"
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def ours(page: str, language: str) -> str:
    """The page's one block of this language that starts with "# trl_ext"."""
    text = (PAGES / page).read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{language}\n# trl_ext\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return block


def run_recipe(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **local: Any) -> dict[str, Any]:
    """Run the page's YAML with local names for what it loads; return what the file says."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(row) for row in prompt_dataset(40)), encoding="utf-8")
    said = yaml.safe_load(ours(page, "yaml"))
    output = {"output_dir": str(tmp_path / "out"), "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    small = {"num_train_epochs": 1, "eval_rows": 8, "max_completion_length": 6, "bf16": False}
    config = tmp_path / "ppo.yaml"
    config.write_text(yaml.safe_dump({**said, **small, **output, "dataset": str(prompts), **local}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(RECIPE), "--config", str(config), *FLAGS])
    runpy.run_path(str(RECIPE), run_name="__main__")
    return said


def save_llama_factory_reward_model(folder: Path, base: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    model.save_pretrained(folder)
    head = torch.nn.Linear(model.config.hidden_size, 1)
    state = {f"v_head.summary.{key}": tensor.detach() for key, tensor in head.state_dict().items()}
    save_file(state, folder / "value_head.safetensors")


def test_from_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "model")
    save_llama_factory_reward_model(tmp_path / "reward", base)
    reward = {"model_name_or_path": base, "reward_adapter": str(tmp_path / "reward")}
    said = run_recipe("llama_factory.md", tmp_path, monkeypatch, **reward)
    assert said["load_in_4bit"] and said["value"] == "head"
    run = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    row = next(row for row in run["log_history"] if "objective/kl_coef" in row)
    assert row["objective/kl_target"] == 6.0 and row["objective/kl_coef"] == pytest.approx(0.2, rel=0.01)
    assert row["rewards/reward_role/std"] > 0


@pytest.mark.long
def test_from_ms_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path / "model")
    tiny_classifier(pad_token_id=0).save_pretrained(tmp_path / "judge")
    word_tokenizer().save_pretrained(tmp_path / "judge")
    local = {"model_name_or_path": base, "reward_funcs": [str(tmp_path / "judge")], "dtype": "float32"}
    run_recipe("ms_swift.md", tmp_path, monkeypatch, **local)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_from_unsloth(tmp_path: Path) -> None:
    names: dict[str, Any] = {
        "name": saved_model(tmp_path / "model"),
        "reward": lambda completions, **_: [float(len(text)) for text in completions],
        "args": PPOConfig(
            str(tmp_path / "out"), per_device_train_batch_size=4, total_episodes=8, max_completion_length=4, **QUIET
        ),
        "prompts": prompt_dataset(8),
    }
    exec(compile(ours("unsloth.md", "python"), "unsloth.md", "exec"), names)
    assert names["trainer"].state.global_step == 8
    assert names["base"].model.peft_config["policy"].target_modules == {"q_proj", "v_proj"}


def test_from_grpo(tmp_path: Path) -> None:
    """The variant without a value role trains; it compares the completions of a prompt."""
    text = (PAGES / "grpo.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"PPOConfig": PPOConfig}
    exec(compile(block, "grpo.md", "exec"), names)
    chosen = {name: getattr(names["args"], name) for name in ("objective", "num_generations", "kl_coef")}
    args = PPOConfig(str(tmp_path), total_episodes=16, max_completion_length=4, **chosen, **QUIET)
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), policy=LORA)
    trainer = PPOTrainer(base, lambda completions, **_: [float(len(t)) for t in completions], args, prompt_dataset(8))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    assert len(rows) == 2 and "loss/value_avg" not in rows[0]


def our_names(page: str) -> list[str]:
    """Names in backticks in the second column of the page's tables, where it is not a value or a call."""
    rows = re.findall(r"^\|([^|]*)\|([^|]*)\|", (PAGES / page).read_text(encoding="utf-8"), re.MULTILINE)
    names = []
    for theirs, second in rows:
        column = theirs if second.strip() == "the same" else second
        names += [name for name in re.findall(r"`([a-z_0-9]+)(?::[^`]*)?`", column) if name != "args"]
    assert names
    return names


@pytest.mark.parametrize("page", ["llama_factory.md", "ms_swift.md", "grpo.md"])
def test_names_of_the_tables_exist(page: str) -> None:
    arguments = runpy.run_path(str(RECIPE))["PPOArguments"]
    known = {field.name for kind in (PPOConfig, ModelConfig, arguments) for field in fields(kind)}
    assert [name for name in our_names(page) if name not in known] == []


def test_names_of_grpo_exist() -> None:
    text = (PAGES / "grpo.md").read_text(encoding="utf-8")
    theirs = [cell for cell in re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE) if "..." not in cell]
    names = [name for cell in theirs for name in re.findall(r"`(\w+)`", cell)]
    known = {field.name for field in fields(GRPOConfig)}
    assert len(names) > 20 and [name for name in names if name not in known] == []
