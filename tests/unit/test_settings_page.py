"""docs/settings.md has every setting of ours; `python -m tests.unit.test_settings_page` writes it."""

import runpy
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from trl_ext import PPOConfig, launch, loop
from trl_ext.reward_models import FeedbackRewardConfig

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "settings.md"
HEAD = """# Settings

What a run can be told, beside what Transformers' `TrainingArguments` and TRL's `ModelConfig` (the model, its
precision, its quantisation, its LoRA) have: on a recipe's command line with two dashes, in a `--config` file, or as an
argument of the class.
"""


def settings(kind: Any) -> list[Field[Any]]:
    """Those that `kind` itself says, and no class above it."""
    return [f for f in fields(kind) if f.name in kind.__annotations__ and "help" in f.metadata]


def default(f: Field[Any]) -> str:
    value = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
    return "" if value in (None, "", []) else f"`{value}`"


def page() -> str:
    recipe = runpy.run_path(str(ROOT / "recipes" / "ppo_lora.py"))
    parts = (
        ("PPO: `PPOConfig`", settings(PPOConfig)),
        ("The data of every recipe: `--dataset` and others", settings(launch.DataArguments)),
        ("`recipes/ppo_lora.py` beside these", settings(recipe["PPOArguments"])),
        ("Reward models: `FeedbackRewardConfig`", settings(FeedbackRewardConfig)),
        ("`recipes/reward_lora.py` beside these", settings(launch.RewardArguments)),
        ("`recipes/rlhf_loop.py` beside PPO's", settings(loop.LoopArguments)),
    )
    text = HEAD
    for title, rows in parts:
        text += f"\n## {title}\n\n| setting | default | meaning |\n|---|---|---|\n"
        for f in rows:
            said = " ".join(f.metadata["help"].split()).replace("|", r"\|")
            text += f"| `{f.name}` | {default(f)} | {said} |\n"
    return text


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.unit.test_settings_page"
    own = {f.name for f in fields(PPOConfig)} - {f.name for f in fields(TrainingArguments)}
    assert [name for name in own if f"| `{name}` |" not in page()] == []


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
