"""The code of the pages about callbacks, rewards, feedback and diagnostics runs as it stands there."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers import QUIET, prompt_dataset, saved_model, word_tokenizer
from tests.unit.test_diagnostics import SICK, SICK_DPO, SICK_REWARD
from trl_ext import AdaptiveKLController, PPOConfig, SharedBase
from trl_ext.diagnostics import RunLog, diagnose
from trl_ext.diagnostics.pages import NO_PROBLEM

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
HAS_TRL_PPO = importlib.util.find_spec("trl.experimental.ppo") is not None


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def names(tmp_path: Path) -> dict[str, Any]:
    """What the pages take for granted: a model, data, settings."""
    folder, tokenizer = saved_model(tmp_path / "model"), word_tokenizer()
    judge = SharedBase.from_pretrained(folder)
    judge.save_pretrained(tmp_path / "judge")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "model": folder,
        "reward_funcs": lambda completions, **_: [float(text.count("cat")) for text in completions],
        "args": PPOConfig(
            str(tmp_path / "ppo"), per_device_train_batch_size=4, total_episodes=8, max_completion_length=6, **QUIET
        ),
        "train_dataset": prompt_dataset(16),
        "tokenizer": tokenizer,
        "output_dir": str(tmp_path / "rloo"),
        "rloo_settings": {
            "per_device_train_batch_size": 4,
            "num_generations": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "max_completion_length": 6,
            **QUIET,
        },
        "rloo_model": lambda: get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora),
        "base": SharedBase.from_pretrained(folder, policy=lora, reward=str(tmp_path / "judge" / "value")),
        "tokenized_dataset": Dataset.from_dict({"input_ids": [[5 + i % 9, 6, 7] for i in range(32)]}),
    }


def trl_settings(tmp_path: Path) -> Any:
    from trl.experimental.ppo import PPOConfig as TRLPPOConfig

    return TRLPPOConfig(
        str(tmp_path / "trl_ppo"),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        total_episodes=24,
        response_length=6,
        num_ppo_epochs=1,
        num_sample_generations=0,
        gradient_checkpointing=False,
        **QUIET,
    )


@pytest.mark.host
def test_callbacks_page(tmp_path: Path) -> None:
    namespace, trainers, skipped = names(tmp_path), [], 0
    for block in blocks("callbacks.md"):
        if block.startswith("# TRL 1.12 only"):
            if not HAS_TRL_PPO:
                skipped += 1
                continue
            namespace["trl_args"] = trl_settings(tmp_path)
        exec(compile(block, "callbacks.md", "exec"), namespace)
        if "trainer" in block:
            trainers.append(namespace["trainer"])
    assert len(trainers) + skipped == 4
    curriculum, held, rloo = trainers[:3]
    assert curriculum.state.global_step > 0
    assert {type(c).__name__ for c in curriculum.callback_handler.callbacks} >= {"ShortAnswers", "Enough"}
    assert held.args.kl_coef != 0.1, "the controller has acted"
    assert rloo.beta != 0.05, "the controller has acted"
    assert [row for row in rloo.state.log_history if "objective/kl_coef" in row]
    if HAS_TRL_PPO:
        expected, seen = AdaptiveKLController(init=0.05, target=1.0, horizon=200), 0
        for row in (row for row in trainers[3].state.log_history if "objective/kl" in row):
            assert row["objective/kl_coef"] == pytest.approx(expected.value) and row["objective/kl_target"] == 1.0
            expected.update(row["objective/kl"], round(row["episode"] - seen))
            seen = row["episode"]
        assert seen == 24 and trainers[3].args.kl_coef == pytest.approx(expected.value) and expected.value < 0.05


def test_every_worked_callback_is_short() -> None:
    worked = [block for block in blocks("callbacks.md") if "RolloutCallback)" in block]
    assert len(worked) == 3
    assert all(len(block.splitlines()) < 30 for block in worked)


def test_feedback_page(tmp_path: Path) -> None:
    path = tmp_path / "ratings.jsonl"
    rows = [
        {"prompt": f"p{i % 10}", "text": f"answer {i}", "ratings": [i // 10 % 5, (i // 10 + 1) % 5]} for i in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    namespace: dict[str, Any] = {"ratings_file": str(path)}
    for block in blocks("feedback.md"):
        exec(compile(block, "feedback.md", "exec"), namespace)
    assert {"chosen", "rejected", "margin", "agreement"} <= set(namespace["pairs"].column_names)
    assert len(namespace["labels"]) > 0


def test_diagnostics_page() -> None:
    namespace: dict[str, Any] = {}
    for block in blocks("diagnostics/index.md"):
        exec(compile(block, "diagnostics/index.md", "exec"), namespace)
    rows = [{"step": step, "objective/kl": 0.1, "completions/mean_length": 250.0} for step in range(3)]
    (finding,) = diagnose(RunLog.of(rows), rules=[namespace["too_chatty"]])
    assert finding.name == "too_chatty" and "250 tokens" in finding.evidence


def test_every_problem_has_its_page_and_every_page_its_problem() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "trl_ext" / "diagnostics").glob("*.py"))
    pages = {path.stem for path in (DOCS / "diagnostics").glob("*.md")} - NO_PROBLEM
    assert [page for page in pages if f'"{page}"' not in source] == []
    assert set(SICK) | set(SICK_REWARD) | set(SICK_DPO) == pages
    overview = (DOCS / "diagnostics" / "index.md").read_text(encoding="utf-8")
    assert all(f"]({page}.md)" in overview for page in pages)


@pytest.mark.parametrize("name", sorted({**SICK, **SICK_REWARD, **SICK_DPO}))
def test_a_page_tells_evidence_mechanism_neighbours_and_remedy(name: str) -> None:
    text = (DOCS / "diagnostics" / f"{name}.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    told = dict(part.split("\n", 1) for part in parts)
    assert list(told)[:4] == ["What you see", "Why", "How to confirm", "The fix"]
    assert all(len(told[part].split()) > 3 for part in list(told)[:4])
    others = {**SICK, **SICK_REWARD, **SICK_DPO}.keys() - {name}
    assert any(re.search(rf"[`\[]{other}[`\]]", told["How to confirm"]) for other in others), "no neighbour"


def test_the_table_of_sources_counts_its_threads() -> None:
    text = (DOCS / "diagnostics" / "sources.md").read_text(encoding="utf-8")
    table, *sections = re.split(r"^### ", text, flags=re.MULTILINE)
    counts = re.findall(r"^\| \[(.+?)\]\(#.+?\) \| (\d+) \|", table, re.MULTILINE)
    threads = {part.split("\n", 1)[0]: re.findall(r"^\| \[.+?\]\((http.+?)\)", part, re.MULTILINE) for part in sections}
    assert {cause: int(count) for cause, count in counts} == {cause: len(links) for cause, links in threads.items()}
    assert [int(count) for _, count in counts] == sorted((int(count) for _, count in counts), reverse=True)
    links = [link for part in threads.values() for link in part]
    assert len(links) == len(set(links)) >= 60
    assert f"\n{len(links)} threads of" in text
    for sure, count in re.findall(r"^- \*(\w+)\* \((\d+)\)", text, re.MULTILINE):
        assert text.count(f" | {sure} | ") == int(count), sure


def test_rewards_page() -> None:
    namespace: dict[str, Any] = {}
    assert sum("limited" in block for block in blocks("rewards.md")) == 1
    for block in blocks("rewards.md"):
        exec(compile(block, "rewards.md", "exec"), namespace)
        if "limited" in block:
            texts = ["The capital is Paris.", "Paris, stupid"]
            assert namespace["reward"](completions=texts, completion_ids=[[1] * 4, [1] * 3]) == [1.0, -2.0]
