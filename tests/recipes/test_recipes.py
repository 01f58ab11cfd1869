"""The recipes: their YAML files, what they say to wrong input, and that each runs to its end on the demo."""

import json
import os
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from tests.helpers import FLAGS
from trl_ext import SharedBase, demo, launch

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = {"ppo": RECIPES / "ppo_lora.py", "reward": RECIPES / "reward_lora.py", "dpo": RECIPES / "dpo_lora.py"}
SCRIPTS["rlhf"] = RECIPES / "rlhf_loop.py"
YAMLS = sorted([*RECIPES.glob("*.yaml"), *(RECIPES / "configs").glob("*.yaml")])
QUICK = {
    "ppo": ["--total_episodes", "16", "--per_device_train_batch_size", "8"],
    "reward": ["--max_steps", "2"],
    "dpo": ["--max_steps", "2"],
}


def types_of(recipe: str) -> tuple[Any, ...]:
    types: tuple[Any, ...] = runpy.run_path(str(SCRIPTS[recipe]))["TYPES"]
    return types


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nobody has runs of their own, as there are in a clone in which the recipes were tried."""
    monkeypatch.chdir(tmp_path)


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
            assert getattr(owners[0], name) in (value, [value]), name


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
    measured = {
        "reward": ["held-out pair accuracy"],
        "ppo": ["exam before", "exam after", "held-out score"],
        "dpo": ["exam after", "held-out loss"],
    }
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
    if recipe == "ppo":
        assert re.fullmatch(r"-?[0-9.]+ before, -?[0-9.]+ after", result["held-out score"])
        assert result["held-out score"] in " ".join(said.split())
    if recipe == "dpo":
        before, after = re.findall(r"[0-9.]+", result["held-out loss"])
        assert float(after) < float(before)


@pytest.mark.long
def test_an_ensemble_is_trained_and_scores_in_ppo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two adapters that differ; what an interrupted run had finished is not trained again."""
    out = tmp_path / "out"
    ensemble = ["--ensemble", "2", *QUICK["reward"], "--output_dir", str(out)]
    run(monkeypatch, "reward", *ensemble)
    said = capsys.readouterr().out
    folders = [out / "0", out / "1"]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert not torch.equal(tensor, weights[1][name]), name
    seeds = [torch.load(folder / "training_args.bin", weights_only=False).seed for folder in folders]
    assert seeds == [42, 43]
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert result["accuracy of each"].count("%") == 2
    assert "share on which two agree" in said and f"--reward_adapter {folders[0]} {folders[1]}\n" in said
    assert all((folder / "README.md").is_file() and (folder / "report.html").is_file() for folder in folders)

    with pytest.raises(SystemExit, match="holds a run already"):
        run(monkeypatch, "reward", *ensemble)
    (folders[1] / "trainer_state.json").unlink()
    before = [(folder / "adapter_model.safetensors").stat().st_mtime_ns for folder in folders]
    run(monkeypatch, "reward", *ensemble, "--resume_from_checkpoint", "true")
    after = [(folder / "adapter_model.safetensors").stat().st_mtime_ns for folder in folders]
    assert after[0] == before[0] and after[1] != before[1]
    again = load_file(folders[1] / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights[1].items())

    both = ["--reward_adapter", *map(str, folders), "--reward_ensemble", "min"]
    run(monkeypatch, "ppo", *QUICK["ppo"], *both, "--output_dir", str(tmp_path / "ppo"))
    state = json.loads((tmp_path / "ppo" / "trainer_state.json").read_text(encoding="utf-8"))
    assert any("objective/score_spread" in row and "rewards/reward_1/mean" in row for row in state["log_history"])
    assert sorted(path.name for path in (tmp_path / "ppo").glob("reward_*")) == ["reward_0", "reward_1"]


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
