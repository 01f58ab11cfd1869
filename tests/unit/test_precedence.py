"""What the command line says wins: over the file after --config, and over the recipe's own defaults, by any name."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import ModelConfig

from tests.helpers import FLAGS
from tests.parity import tiny
from trl_ext import PPOConfig, launch
from trl_ext.launch.precedence import given_on, settled, split_config
from trl_ext.launch.settings import recipe_file
from trl_ext.runs import without_secrets

ROOT = Path(__file__).parents[2]
TYPES: dict[str, tuple[Any, ...]] = {
    "ppo": (launch.DataArguments, PPOConfig, ModelConfig),
    "dpo": (launch.DataArguments, launch.DPOConfig, ModelConfig),
}


def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str, recipe: str = "ppo", config: str = "") -> Any:
    """Data, trainer's and model's settings of a recipe that gets these words, and this text as its --config."""
    script = tmp_path / f"{recipe}_lora.py"
    if not script.exists():
        text = (ROOT / "recipes" / f"{recipe}_lora.yaml").read_text(encoding="utf-8")
        kept = [line for line in text.splitlines() if not line.startswith(("reward_adapter:", "value:", "yardstick:"))]
        script.with_suffix(".yaml").write_text("\n".join(kept), encoding="utf-8")
    words = [*given.split(), *FLAGS]
    if config:
        (tmp_path / "mine.yaml").write_text(config, encoding="utf-8")
        words += ["--config", str(tmp_path / "mine.yaml")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    return launch.parse(str(script), *TYPES[recipe])


@pytest.mark.parametrize("spelling", ["--max_steps 2", "--max-steps 2", "--max_steps=2", "--max-steps=2"])
def test_steps_on_the_command_line_take_the_place_of_episodes(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, args, _ = parsed(monkeypatch, tmp_path, spelling)
    assert (args.max_steps, args.total_episodes) == (2, None)
    _, args, _ = parsed(monkeypatch, tmp_path, spelling, config="model_name_or_path: demo\ntotal_episodes: 640\n")
    assert (args.max_steps, args.total_episodes) == (2, None)
    _, args, _ = parsed(monkeypatch, tmp_path, "--num_train_epochs 1")
    assert (args.num_train_epochs, args.total_episodes) == (1, None)


def test_the_nearest_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = "model_name_or_path: demo\nlearning-rate: 0.5\nlora_r: 4\nload_in_4bit: true\nsave_strategy: 'no'\n"
    _, args, model = parsed(monkeypatch, tmp_path, "--lora_r 2 --load_in_8bit --save_steps 5", config=config)
    assert (args.learning_rate, model.lora_r, args.save_steps, args.save_strategy.value) == (0.5, 2, 5, "steps")
    assert (model.load_in_4bit, model.load_in_8bit) == (False, True)
    assert (model.use_peft, model.lora_target_modules, args.output_dir) == (True, "all-linear", "runs/ppo_lora")
    _, args, _ = parsed(monkeypatch, tmp_path, "--eval_steps 5")
    assert (args.eval_steps, args.eval_strategy.value) == (5, "steps")


@pytest.mark.parametrize(
    ("given", "config", "sentence"),
    [
        (
            "--max_steps 2 --total-episodes 64",
            "",
            "The command line says both total_episodes 64 and max_steps 2, which name one thing: leave one",
        ),
        ("", "model_name_or_path: demo\nmax_steps: 2\ntotal_episodes: 64\n", "says both total_episodes 64 and max_ste"),
        ("--save_strategy no --save_steps 5", "", "says save_steps 5.0 and save_strategy 'no': leave one of them out."),
        ("--config one.yaml --config=two.yaml", "", "--config is given 2 times (one.yaml, two.yaml)"),
        ("--config", "", "--config names no file"),
        ("", "lora_r: 2\nlora-r: 3\n", "has 'lora_r' twice: leave one of them out."),
        ("--use_peft false", "", "use_peft is false, but the recipes train LoRA adapters over a frozen base"),
        ('--model_init_kwargs {"dtype":"float16"}', "", "model_init_kwargs is given, but a recipe loads its base"),
        (
            "",
            "model_name_or_path: demo\nno_such_setting: 3\n",
            "Unknown arguments from config file: ['--no_su",
        ),
    ],
)
def test_contradictions_are_refused(
    given: str, config: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError) as raised:
        parsed(monkeypatch, tmp_path, given, config=config)
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_what_is_switched_off_contradicts_nothing() -> None:
    levels = [("The command line", {"max_steps": 2, "total_episodes": None, "load_in_8bit": True})]
    assert settled([*levels, ("file", {"load_in_4bit": False, "num_train_epochs": 3.0})]) == {
        "max_steps": 2,
        "total_episodes": None,
        "load_in_8bit": True,
    }


def test_who_scores_and_who_starts_are_one_thing_each() -> None:
    file = {"reward_funcs": ["a.b"], "lora_r": 8, "lora_alpha": 16, "eval_split": "test"}
    nearer = {"reward_adapter": "runs/reward", "policy_adapter": "out/sft", "eval_rows": 8}
    assert settled([("The command line", nearer), ("file", file)]) == nearer
    for both in ({"reward_funcs": ["a.b"], "reward_adapter": "x"}, {"policy_adapter": "out", "lora_r": 4}):
        with pytest.raises(ValueError, match="which name one thing"):
            settled([("file", both)])


def test_the_file_may_be_named_in_either_spelling() -> None:
    assert split_config(["--seed", "1", "--config", "a.yaml"]) == ("a.yaml", ["--seed", "1"])
    assert split_config(["--config=a.yaml", "--seed", "1"]) == ("a.yaml", ["--seed", "1"])
    assert split_config(["--seed", "1"]) == (None, ["--seed", "1"])


# The demo's settings -------------------------------------------------------------------------------------------------


def test_the_demos_settings_are_for_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given in ("", "--model_name_or_path demo", "--dataset demo --seed 3"):
        data, args, model = parsed(monkeypatch, tmp_path, given)
        assert (args.learning_rate, args.max_completion_length, args.total_episodes) == (1e-3, 16, 3200)
        assert (data.dataset, model.model_name_or_path) == ("demo", "demo")


@pytest.mark.parametrize("given", ["--model_name_or_path {base}", "--dataset mine.jsonl", "--dataset=mine.jsonl"])
@pytest.mark.parametrize("recipe", ["ppo", "dpo"])
def test_the_demos_settings_reach_no_other_model_or_data(
    recipe: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.config_of("llama"))
    _, args, model = parsed(monkeypatch, tmp_path, given.format(base=base), recipe)
    usual = {"ppo": PPOConfig, "dpo": launch.DPOConfig}[recipe]
    for name in ("learning_rate", "gradient_checkpointing", "num_train_epochs", "warmup_steps", "eval_strategy"):
        default = usual.__dataclass_fields__[name].default
        assert getattr(args, name) in (default, getattr(default, "value", default)), name
    if recipe == "ppo":
        assert (args.max_completion_length, args.total_episodes, args.kl_coef) == (256, None, 0.05)
        assert args.score_normalization == "none"
    else:
        assert args.loss_type == ["sigmoid"] and args.loss_weights is None
    assert (model.use_peft, model.lora_r, model.lora_dropout) == (True, 16, 0.0)
    assert args.output_dir == f"runs/{recipe}_lora"


# Adapters and precision ----------------------------------------------------------------------------------------------


def test_an_adapter_as_model_brings_its_own_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.config_of("llama"))
    sft = tiny.save_policy_adapter(tmp_path / "sft", base, seed=1)
    named = f"--model_name_or_path {sft}"
    parsed(monkeypatch, tmp_path, named)
    parsed(monkeypatch, tmp_path, named, config="lora_r: 8\n")  # the command line wins
    for given, config in ((f"{named} --lora_r 8", ""), ("--lora_r 8", f"model_name_or_path: {sft}\n")):
        with pytest.raises(ValueError, match=r"is an adapter over '.*base', which is.*leave lora_r out"):
            parsed(monkeypatch, tmp_path, given, config=config)


def test_the_header_says_what_is_trained_on_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.config_of("llama"))
    sft = tiny.save_policy_adapter(tmp_path / "sft", base, seed=1)
    *_, model = parsed(monkeypatch, tmp_path, f"--model_name_or_path {base} --lora_r 8")
    assert launch.described(model) == f"{base}, and on it a new LoRA of rank 8 on all-linear"
    assert launch.described(model, "out") == f"{base}, and on it the adapter out, trained further"
    *_, model = parsed(monkeypatch, tmp_path, f"--model_name_or_path {sft}")
    assert launch.described(model) == f"{base}, and on it the adapter {sft}, trained further"


def test_the_precision_of_accelerate_launch_is_not_contradicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    parsed(monkeypatch, tmp_path, "")
    with pytest.raises(ValueError, match=r"accelerate launch says mixed_precision bf16, and the settings say 'no'"):
        parsed(monkeypatch, tmp_path, "--bf16 false")


def test_one_value_in_a_file_stands_for_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = "model_name_or_path: demo\ncolumns: text=completion\nlora_target_modules: q_proj\n"
    data, _, model = parsed(monkeypatch, tmp_path, "", config=config)
    assert data.columns == ["text=completion"] and model.lora_target_modules in ("q_proj", ["q_proj"])


def test_a_file_of_settings_asks_for_no_precision_that_the_device_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for recipe in ("ppo", "dpo"):
        config = "model_name_or_path: demo\ndataset: mine.jsonl\n"
        _, args, _ = parsed(monkeypatch, tmp_path, "", recipe, config)
        assert args.bf16 is False
    _, args, _ = parsed(monkeypatch, tmp_path, "", "dpo", f"{config}fp16: false\nbf16: true\n")
    assert args.bf16 is True, "where it is asked for"


def test_a_quantised_base_computes_in_half_where_the_gpu_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's ModelConfig says float32, in which its 4 bits would be computed."""
    asked = []
    monkeypatch.setenv("SOME_GPU", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: asked.append(os.environ["SOME_GPU"]) is None)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    config = "model_name_or_path: demo\ndataset: mine.jsonl\nuse_cpu: true\nbf16: false\nenv: {SOME_GPU: '1'}\n"
    for given, dtype in (("", "float32"), ("load_in_4bit: true\n", "bfloat16")):
        *_, model = parsed(monkeypatch, tmp_path, "", "dpo", config + given)
        assert model.dtype == dtype
    *_, model = parsed(monkeypatch, tmp_path, "", "dpo", f"{config}load_in_4bit: true\ndtype: float32\n")
    assert model.dtype == "float32", "where it is asked for"
    assert set(asked) == {"1"}, "variables are set before anybody asks for a GPU"


def test_variables_of_a_script_s_own_file_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed(monkeypatch, tmp_path, "")
    (tmp_path / "ppo_lora.py").touch()
    file = tmp_path / "ppo_lora.yaml"
    file.write_text(file.read_text(encoding="utf-8") + "\nenv: {SOME_KEY: beside}\n", encoding="utf-8")
    monkeypatch.delenv("SOME_KEY", raising=False)
    parsed(monkeypatch, tmp_path, "")
    assert os.environ.pop("SOME_KEY") == "beside"


def test_what_is_written_down_of_a_run_has_no_secrets_and_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_base(tmp_path / "base", tiny.config_of("llama"))
    sft = tiny.save_policy_adapter(tmp_path / "sft", base, seed=1)
    (tmp_path / "mine.yaml").write_text(f"model_name_or_path: {sft}\nhub_token: hf_mine\nenv: {{SOME_KEY: mine}}\n")
    within = without_secrets({"pad_token": "<pad>", "reward": {"hub_token": "hf_mine", "eos_token": "<eos>"}})
    assert within == {"pad_token": "<pad>", "reward": {"eos_token": "<eos>"}}, "tokens of a tokenizer are none"
    script = recipe_file("ppo_lora")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SOME_KEY", raising=False)
    types = runpy.run_path(str(script))["TYPES"]
    words = [str(script), *FLAGS, "--config", "mine.yaml", "--output_dir", "out"]
    monkeypatch.setattr(sys, "argv", words)
    _, args, _ = launch.parse(str(script), *types)
    assert args.hub_token == "hf_mine" and os.environ.pop("SOME_KEY") == "mine"
    written = yaml.safe_dump(args.recipe["settings"])
    assert "mine" not in written and "lora" not in written
    (tmp_path / "again.yaml").write_text(written)
    monkeypatch.setattr(sys, "argv", [str(script), "--config", "again.yaml", "--output_dir", "again"])
    _, again, _ = launch.parse(str(script), *types)
    assert again.learning_rate == args.learning_rate


def test_a_setting_that_extends_is_only_there_where_it_is_said() -> None:
    assert given_on(["--columns", "a=b", "--column", "c=d"], (launch.DataArguments,)) == {"columns": ["a=b", "c=d"]}
    assert given_on(["--eval_rows", "3"], (launch.DataArguments,)) == {"eval_rows": 3}


def test_a_setting_that_is_read_beside_another_only() -> None:
    with pytest.raises(ValueError, match="kl_horizon is 400, but nothing reads it without kl_target"):
        settled([("The command line", {"kl_horizon": 400}), ("The recipe", {})])
    both = [("The command line", {"kl_horizon": 400}), ("The recipe", {"kl_target": 3.0})]
    assert settled(both) == {"kl_horizon": 400, "kl_target": 3.0}
