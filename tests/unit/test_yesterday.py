"""Names of yesterday: one sentence with today's name, in Python and on the command line."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from trl import DPOConfig, ModelConfig, RLOOConfig

from tests.helpers import QUIET
from trl_ext import PPOConfig, PPOTrainer, launch
from trl_ext.ppo.yesterday import ARGUMENTS, SETTINGS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("old", "value", "sentence"),
    [
        ("response_length", 53, "PPOConfig has no 'response_length': it is max_completion_length here."),
        ("stop_token", "eos", "PPOConfig has no 'stop_token': leave it out: a completion ends at the model's EOS."),
        ("beta", 0.1, "PPOConfig has no 'beta': it is kl_coef here."),
        ("epsilon", 0.2, "PPOConfig has no 'epsilon': it is cliprange here."),
        (
            "loss_type",
            "dr_grpo",
            "PPOConfig has no 'loss_type': use objective, whose loss is the mean over a minibatch's tokens.",
        ),
        ("init_kl_coef", 0.2, "PPOConfig has no 'init_kl_coef': it is kl_coef here."),
        ("exp_name", "mine", "PPOConfig has no 'exp_name': it is run_name here."),
        ("rloo_k", 2, "PPOConfig has no 'rloo_k': it is num_generations here."),
        ("sync_ref_model", True, "PPOConfig has no 'sync_ref_model': there is nothing of the kind; leave it out."),
    ],
)
def test_a_setting_of_yesterday(old: str, value: Any, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError) as raised:
        PPOConfig("run", **QUIET, **{old: value})
    assert str(raised.value) == sentence
    monkeypatch.setattr(sys, "argv", ["ppo_lora.py", f"--{old.replace('_', '-')}={value}"])
    script = str(DOCS.parent / "recipes" / "ppo_lora.py")
    with pytest.raises(ValueError) as refused:
        launch.parse(script, launch.DataArguments, PPOConfig, ModelConfig)
    assert str(refused.value) == sentence


def test_what_another_trainer_knows_is_left_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["dpo_lora.py", "--beta", "0.5", "--use_cpu", "--output_dir", str(tmp_path)])
    script = str(DOCS.parent / "recipes" / "dpo_lora.py")
    assert launch.parse(script, launch.DataArguments, DPOConfig, ModelConfig)[1].beta == 0.5


def test_every_name_of_today_is_one() -> None:
    for names, today in (
        (SETTINGS, {part.name for part in fields(PPOConfig)}),
        (ARGUMENTS, set(inspect.signature(PPOTrainer.__init__).parameters)),
    ):
        assert {instead for instead in names.values() if " " not in instead} <= today
        assert not set(names) & today


def test_the_migration_page_and_the_sentences_name_the_same() -> None:
    """Where the page has a new name for an old one, the sentence has it too."""
    rows = re.findall(r"^\| `(\w+)`[^|]*\| `(\w+)`[^|]*\|", (DOCS / "migration.md").read_text(encoding="utf-8"), re.M)
    today = {part.name for part in fields(PPOConfig)}
    renamed = {old: new for old, new in rows if old in SETTINGS and new in today}
    assert {"beta", "response_length", "init_kl_coef", "ppo_epochs"} <= set(renamed)
    for old, new in renamed.items():
        assert new in SETTINGS[old], old


def test_the_arguments_of_yesterday() -> None:
    args: Any = PPOConfig("run", **QUIET)
    with pytest.raises(TypeError, match=r"^PPOTrainer has no 'ref_model': use SharedBase.from_pretrained\(reference="):
        PPOTrainer("model", ref_model=None, args=args)
    with pytest.raises(TypeError, match=r"^PPOTrainer has no 'reward_model': it is reward_funcs here\.$"):
        PPOTrainer(args=args, processing_class=None, model="model", reward_model="judge")
    # TRL 1.12: args, processing_class, model, ref_model, reward_model, train_dataset, value_model. TRL 0.11: config,
    # model, ref_model, tokenizer.
    for order in ((args, None, "policy", None, "judge", None), (args, "policy", None, None)):
        with pytest.raises(TypeError, match=r"^PPOTrainer got its settings first.*\(model, reward_funcs, args,"):
            PPOTrainer(*order)
    with pytest.raises(TypeError, match=r"^args must be a trl_ext\.PPOConfig, not RLOOConfig: give its settings"):
        PPOTrainer("model", len, RLOOConfig("run", use_cpu=True, bf16=False))
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl_coeff'"):
        PPOConfig("run", kl_coeff=0.1)
    assert list(inspect.signature(PPOTrainer).parameters)[:4] == ["model", "reward_funcs", "args", "train_dataset"]
