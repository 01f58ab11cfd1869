"""The recipes: their YAML files, what they say to wrong input, and that each runs to its end on the demo."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import AutoPeftModelForCausalLM
from trl import DPOConfig, ModelConfig

from tests.helpers import FLAGS
from trl_ext import FeedbackRewardConfig, PPOConfig, SharedBase, demo, launch

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = {"ppo": RECIPES / "ppo_lora.py", "reward": RECIPES / "reward_lora.py", "dpo": RECIPES / "dpo_lora.py"}
YAMLS = sorted([*RECIPES.glob("*.yaml"), *(RECIPES / "configs").glob("*.yaml")])
QUICK = {
    "ppo": ["--total_episodes", "16", "--per_device_train_batch_size", "8"],
    "reward": ["--max_steps", "2"],
    "dpo": ["--max_steps", "2"],
}


def types_of(recipe: str) -> tuple[Any, ...]:
    if recipe == "ppo":
        return (runpy.run_path(str(SCRIPTS["ppo"]))["PPOArguments"], PPOConfig, ModelConfig)
    return (launch.DataArguments, {"reward": FeedbackRewardConfig, "dpo": DPOConfig}[recipe], ModelConfig)


def run(monkeypatch: pytest.MonkeyPatch, recipe: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[recipe]), *arguments, *FLAGS, "--disable_tqdm", "true"])
    runpy.run_path(str(SCRIPTS[recipe]), run_name="__main__")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_sets_fields_that_exist(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = path.stem.split("_")[0]
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # This machine may lack the GPU that the file is for.
    overrides = ["--use_cpu", "true", "--bf16", "false"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[recipe]), "--config", str(path), *overrides])
    parsed = launch.parse(str(SCRIPTS[recipe]), *types_of(recipe))
    for name, value in content.items():
        owners = [part for part in parsed if hasattr(part, name)]
        assert owners, name
        if name not in (
            "bf16",
            "lora_target_modules",
            "report_to",
            "save_strategy",
            "lr_scheduler_type",
            "logging_steps",
        ):
            assert getattr(owners[0], name) == value, name


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_yaml_is_one(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.num_processes == (1 if path.stem == "single_gpu" else 2)


def test_recipes_are_thin() -> None:
    assert all(len(script.read_text(encoding="utf-8").splitlines()) < 100 for script in SCRIPTS.values())


@pytest.mark.parametrize("recipe", ["reward", "ppo", "dpo"])
def test_a_recipe_runs_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    out = tmp_path / "out"
    run(monkeypatch, recipe, *QUICK[recipe], "--output_dir", str(out))
    said = capsys.readouterr().out
    assert "Result" in said
    assert "saved in" in said
    assert (out / "adapter_model.safetensors").is_file()
    card, result = (out / "README.md").read_text(encoding="utf-8"), json.loads((out / "result.json").read_text("utf-8"))
    measured = {"reward": ["held-out pair accuracy"], "ppo": ["exam before", "exam after"], "dpo": ["exam after"]}
    assert all(f"| {name} | {result[name]} |" in card for name in measured[recipe])
    assert "library_name: peft" in card and "## The run" in card and str(tmp_path) not in card
    if recipe == "reward":
        base = SharedBase.from_pretrained(demo.model_path(), value="head", reward=out)
        assert base.has_role("reward")
        assert "held-out pair accuracy" in said
        judged = json.loads((out / "judgement.json").read_text(encoding="utf-8"))
        assert judged["pairs"] > 100 and 0 <= judged["expected_calibration_error"] <= 1
    else:
        assert "exam before" in said
        assert "exam after" in said
        assert "KL to the reference" in said
        assert AutoPeftModelForCausalLM.from_pretrained(out) is not None


def test_ratings_of_one_answer_a_prompt_make_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two answers to a prompt, so no pair: answers are judged by their ratings."""
    file, out = tmp_path / "rated.jsonl", tmp_path / "out"
    rows = [{"prompt": f"Question {i}?", "completion": f"It is {i % 5}.", "rating": i % 5} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = [
        "--objective",
        "regression",
        "--dataset",
        str(file),
        "--eval_rows",
        "20",
        "--max_steps",
        "2",
        "--save_strategy",
        "no",
    ]
    run(monkeypatch, "reward", *given, "--output_dir", str(out))
    shown = json.loads((out / "result.json").read_text(encoding="utf-8"))["held-out pair accuracy"]
    assert shown == "none (no two of the answers belong to one prompt and were judged unlike)"
    judged = json.loads((out / "judgement.json").read_text(encoding="utf-8"))
    assert judged["answers"] == 20 and judged["pairs"] == 0 and -1 <= judged["spearman"] <= 1
    with pytest.raises(SystemExit, match="holds a run already"):
        run(monkeypatch, "reward", *given, "--output_dir", str(out))
    with pytest.raises(SystemExit, match="holds no checkpoint to go on from"):
        run(monkeypatch, "reward", *given, "--output_dir", str(out), "--resume_from_checkpoint", "true")


def test_the_tracebacks_are_there_for_who_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRL_EXT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        run(monkeypatch, "ppo", "--dataset", "missing.jsonl")
