"""The examples of docs/extending.md, run as they stand there, and what each is meant to do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import QUIET, prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA
from trl_ext import PPOConfig, SharedBase
from trl_ext.core import clipped_policy_loss, token_mean
from trl_ext.feedback import FeedbackError, Label, Rating, forms, read

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def example(title: str) -> str:
    """The code of the section with this title."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(code)


def run(title: str, tmp_path: Path, **names: Any) -> dict[str, Any]:
    """The names of the section's example after it has run."""
    folder = saved_model(tmp_path / "model")
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "total_episodes": 8, "max_completion_length": 6}
    namespace: dict[str, Any] = {
        "model": SharedBase.from_pretrained(folder, policy=LORA),
        "base": SharedBase.from_pretrained(folder, policy=LORA),
        "reward_funcs": lambda completions, **_: [float(text.count("cat")) for text in completions],
        "output_dir": str(tmp_path / "out"),
        "settings": settings | QUIET,
        "args": PPOConfig(str(tmp_path / "out"), **settings, **QUIET),
        "train_dataset": prompt_dataset(16),
        "tokenizer": word_tokenizer(),
        **names,
    }
    exec("from trl_ext import PPOTrainer", namespace)
    exec(compile(example(title), title, "exec"), namespace)
    return namespace


TITLES = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("title", TITLES)
def test_examples_are_short(title: str) -> None:
    assert len(example(title).splitlines()) <= 30


def test_an_objective(tmp_path: Path) -> None:
    made = run("An objective", tmp_path)
    trainer, objective = made["trainer"], made["ClipHigher"](low=0.2, high=0.2)
    assert type(trainer.args.policy_objective) is made["ClipHigher"] and trainer.state.global_step == 8
    assert '"objective": "ClipHigher"' in trainer.args.to_json_string()
    # With equal ranges it is PPO's own.
    batch, mask = trainer.experience, trainer.experience.loss_mask
    moved = batch.score_pass.logprobs + 0.4 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    terms = objective.terms(moved, batch, trainer.args, 0.0)
    expected = clipped_policy_loss(moved, batch.score_pass.logprobs, batch.advantages, mask, 0.2)
    assert float(token_mean(terms, mask)) == pytest.approx(float(expected), rel=1e-6)


def test_a_reward_function(tmp_path: Path) -> None:
    trainer = run("A reward function", tmp_path)["trainer"]
    rows = [row for row in trainer.state.log_history if "objective/scores" in row]
    assert [row["mentions/share"] for row in rows] == pytest.approx([row["objective/scores"] for row in rows])


def test_a_generation_backend(tmp_path: Path) -> None:
    """Each prompt gets its own completion: under greedy sampling the one that it gets alone."""
    made = run("A generation backend", tmp_path)
    trainer = made["trainer"]
    assert type(trainer.collector.generator) is made["Timed"] and trainer.state.global_step == 8
    assert len(made["generator"].seconds) > 1 and min(made["generator"].seconds) > 0
    config = trainer.collector.generation_config
    config.do_sample = False
    prompts = [[7, 9, 12], [8], [10, 7], [5, 6, 9, 11]]
    together = made["generator"].answers(prompts, config, "policy").ids
    alone = [made["generator"].answers([ids], config, "policy").ids[0] for ids in prompts]
    assert together == alone and len({tuple(ids) for ids in alone}) > 1


def test_a_rule_of_the_doctor(tmp_path: Path) -> None:
    doctor = run("A rule of the doctor", tmp_path)["doctor"]
    (finding,) = [finding for finding in doctor.findings if finding.name == "wordy"]
    assert "tokens per completion" in finding.evidence and finding.steps == (0, 0), (
        "as first seen, before a step was taken"
    )


def test_a_form_of_feedback(tmp_path: Path) -> None:
    before = dict(forms.FORMS)
    try:
        path = tmp_path / "picked.jsonl"
        rows = [
            {"prompt": "p", "completions": ["a", "b", "c"], "best": 1},
            {"prompt": "q", "completions": ["d", "e"], "best": 0},
        ]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        pairs = run("A form of feedback", tmp_path, feedback_file=path)["pairs"]
        assert {(row["prompt"], row["chosen"], row["rejected"]) for row in pairs} == {
            ("p", "b", "a"),
            ("p", "b", "c"),
            ("q", "d", "e"),
        }
        forms.FORMS["mixed"] = forms.Form(
            [{"mixed"}], lambda row: Label("p", "a", True) if row["mixed"] else Rating("p", "a", (1.0,))
        )
        path.write_text('{"mixed": 1}\n{"mixed": 0}')
        with pytest.raises(FeedbackError, match=r"line 2: the form makes a Rating, where the first record is a Label"):
            read(path)
        path.write_text(json.dumps({"prompt": "p", "completions": ["a"], "best": None}), encoding="utf-8")
        with pytest.raises(FeedbackError, match=r"picked\.jsonl: line 1: the form 'picked' raised TypeError: "):
            read(path)
        forms.FORMS["odd"] = forms.Form([{"odd"}], lambda row: row)  # type: ignore[arg-type, return-value]
        path.write_text('{"odd": 1}')
        with pytest.raises(
            FeedbackError, match=r"line 1: the form 'odd' returned dict, not a Rating, Ranking, Pair or"
        ):
            read(path)
        with pytest.raises(TypeError, match=r"^A Form takes a list of sets of column names"):
            forms.Form({"completion", "stars"}, lambda row: row)  # type: ignore[arg-type, return-value]
        path.write_text(json.dumps(rows[0] | {"best": 3}), encoding="utf-8")
        with pytest.raises(
            FeedbackError, match=r"picked\.jsonl: line 1, column 'best': 3 is not the number of an answer"
        ):
            read(path)
    finally:
        forms.FORMS.clear()
        forms.FORMS.update(before)
