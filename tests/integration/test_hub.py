"""What a run gives to the Hub: a card whose figures are those that were logged, and every role beside the policy."""

import re
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import DatasetInfo
from huggingface_hub import HfApi, ModelCard, constants
from peft import LoraConfig, PeftModel

from tests.helpers import QUIET, prompt_dataset, saved_model, tiny_llama, word_tokenizer
from tests.integration.test_reward_trainer import rows_for
from tests.parity.tiny import save_reward_adapter
from trl_ext import FeedbackRewardConfig, FeedbackRewardTrainer, PPOConfig, PPOTrainer, SharedBase, hub, launch

PPO: dict[str, Any] = {
    **QUIET,
    "per_device_train_batch_size": 4,
    "num_ppo_epochs": 1,
    "total_episodes": 12,
    "max_completion_length": 4,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


def cats(completions: list[str], **_: Any) -> list[float]:
    """How often an answer says cat."""
    return [float(text.split().count("cat")) for text in completions]


def ppo(folder: Path, model: Any, **changes: Any) -> PPOTrainer:
    functions = None if isinstance(model, SharedBase) else [cats]
    args = PPOConfig(str(folder / "out"), **{**PPO, **changes})
    return PPOTrainer(model, functions, args, prompt_dataset(), prompt_dataset(4), word_tokenizer())


def table_of(card: ModelCard, heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading, by their first cell."""
    part = card.text.split(f"## {heading}\n")[1].split("## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def loaded_as_the_card_says(card: ModelCard, parent: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(parent)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_the_card_of_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = ppo(tmp_path, saved_model(tmp_path / "model"), learning_rate=2e-3)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    training = [row for row in trainer.state.log_history if "objective/kl" in row]
    evals = [row for row in trainer.state.log_history if "eval_objective/kl" in row]
    assert len(training) == len(evals) == 3
    names = {"score": "objective/scores", "KL, nats per completion": "objective/kl"}
    names["completion length, tokens"] = "completions/mean_length"
    expected = {label: [training[0][name], training[-1][name]] for label, name in names.items()}
    expected |= {f"{label}, held out": [evals[0][f"eval_{n}"], evals[-1][f"eval_{n}"]] for label, n in names.items()}
    found = table_of(card, "The run")
    assert {name: [float(cell) for cell in cells] for name, cells in found.items()} == {
        name: pytest.approx(values, rel=1e-3) for name, values in expected.items()
    }
    settings = table_of(card, "Settings")
    assert settings["`learning_rate`"] == ["0.002"] and settings["`rollout_batch_size`"] == ["4"]
    assert "Scored by: `cats`." in card.text and card.text.strip().startswith("# out\n")
    assert card.data.library_name == "peft" and {"ppo", "trl", "trl-ext"} <= set(card.data.tags)
    assert str(tmp_path) not in card.content  # though the base lies there

    ids = torch.tensor([[5, 6, 7]])
    model = loaded_as_the_card_says(card, tmp_path, monkeypatch)["model"]
    assert isinstance(model, PeftModel)
    with torch.no_grad(), trainer.base.use("policy"):
        torch.testing.assert_close(model(ids).logits, trainer.base.causal_lm(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_card_of_a_reward_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = FeedbackRewardConfig(
        str(tmp_path / "out"), max_steps=3, logging_steps=1, eval_strategy="steps", eval_steps=1, **QUIET
    )
    rows, lora = rows_for("pairwise"), LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = FeedbackRewardTrainer(saved_model(tmp_path / "model"), args, rows, rows, peft_config=lora)
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    history = trainer.state.log_history
    for label, name in {"loss": "loss", "accuracy": "accuracy", "loss, held out": "eval_loss"}.items():
        values = [row[name] for row in history if name in row]
        assert [float(cell) for cell in table_of(card, "The run")[label]] == pytest.approx(
            [values[0], values[-1]], rel=1e-3
        )
    assert {"reward", "trl", "trl-ext"} <= set(card.data.tags) and str(tmp_path) not in card.content
    trainer.create_model_card("Captain")
    assert ModelCard.load(tmp_path / "out" / "README.md").text.strip().startswith("# Captain\n")
    model = loaded_as_the_card_says(card, tmp_path, monkeypatch)["model"]
    head = trainer.model.state_dict()["base_model.model.score.modules_to_save.default.weight"]
    torch.testing.assert_close(model.state_dict()["base_model.model.score.modules_to_save.default.weight"], head)


def test_a_whole_reward_model_has_trl_s_card(tmp_path: Path) -> None:
    """Ours is about an adapter."""
    args = FeedbackRewardConfig(str(tmp_path / "out"), max_steps=1, **QUIET)
    trainer = FeedbackRewardTrainer(saved_model(tmp_path / "model"), args, rows_for("pairwise"))
    trainer.save_model()
    assert not (tmp_path / "out" / "README.md").exists()
    trainer.create_model_card(tags="mine")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "mine" in card.data.tags and "It has been trained using [TRL]" in card.text


def test_a_base_of_the_hub_is_named(tmp_path: Path) -> None:
    model, data = tiny_llama(), prompt_dataset()
    model.config._name_or_path = "somebody/tiny-llama"
    file = "hf://datasets/somebody/prompts@0123abc/data/train.parquet"
    data._info = DatasetInfo(download_checksums={file: {"num_bytes": 1}}, features=data.features)
    args = PPOConfig(str(tmp_path / "out"), **{**PPO, "eval_strategy": "no"})
    trainer = PPOTrainer(model, cats, args, data, processing_class=word_tokenizer())
    trainer.train()
    trainer.create_model_card(tags="mine")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "somebody/tiny-llama" and card.data.datasets == ["somebody/prompts"]
    assert {"mine", "base_model:adapter:somebody/tiny-llama"} <= set(card.data.tags)
    assert "[somebody/tiny-llama](https://huggingface.co/somebody/tiny-llama)" in card.text
    assert str(tmp_path) not in card.content and "/" + str(tmp_path).split("/")[1] + "/" not in card.content


# Pushing --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What each upload would have sent: names of files."""
    sent: list[set[str]] = []

    def upload_folder(self: Any, *, folder_path: str, ignore_patterns: list[str], **_: Any) -> Any:
        files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        sent.append({file for file in files if not any(fnmatch(file, pattern) for pattern in ignore_patterns)})
        return SimpleNamespace(is_done=lambda: True, done=lambda: True)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return sent


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_every_role_is_pushed(strategy: str, tmp_path: Path, uploads: list[set[str]]) -> None:
    name = saved_model(tmp_path / "model")
    reward = save_reward_adapter(tmp_path / "reward", Path(name), seed=3)
    pushing = {"push_to_hub": True, "hub_token": "hf_mine", "hub_strategy": strategy}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    trainer = ppo(tmp_path, SharedBase.from_pretrained(name, reward=reward), **pushing, **saving)
    trainer.train()
    assert len(uploads) == {"end": 0, "every_save": 3}[strategy]
    trainer.save_model()
    whole = {"adapter_model.safetensors", "value/adapter_model.safetensors", "reward/adapter_model.safetensors"}
    assert all(whole | {"README.md", "tokenizer.json", "adapter_config.json"} <= files for files in uploads)
    assert uploads and not any("checkpoint" in file for files in uploads for file in files)


@pytest.mark.parametrize("kind", [PPOConfig, FeedbackRewardConfig, launch.DPOConfig])
def test_the_token_is_not_in_what_is_pushed_beside_the_model(kind: Any, tmp_path: Path) -> None:
    args = kind(str(tmp_path), hub_token="hf_mine", **QUIET)
    torch.save(args, tmp_path / "training_args.bin")
    again = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (again.hub_token, again.learning_rate, args.hub_token) == (None, args.learning_rate, "hf_mine")


@pytest.mark.parametrize(
    ("offline", "token", "sentence"),
    [(True, "hf_mine", "HF_HUB_OFFLINE switches the Hub off"), (False, None, "there is no token for the Hub")],
)
def test_a_run_that_could_not_push_does_not_begin(
    offline: bool, token: str | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(ValueError, match=sentence):  # before a model is looked for
        ppo(tmp_path, "nobody/nothing", push_to_hub=True)
    args = FeedbackRewardConfig(str(tmp_path / "out"), push_to_hub=True, **QUIET)
    with pytest.raises(ValueError, match=sentence):
        FeedbackRewardTrainer("nobody/nothing", args, rows_for("pairwise"))
