"""A remedy tried on real trainers: forks from a checkpoint and from a recipe's folder."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, rows_with
from trl_ext import DiagnosticsCallback, PPOTrainer
from trl_ext.cli import main
from trl_ext.diagnostics import Finding, Remedy, diagnose, read_run, try_remedies
from trl_ext.launch.remaking import trainer_maker

STEPS = {"num_ppo_epochs": 1, "num_mini_batches": 2, "per_device_train_batch_size": 8}


def maker(tmp_path: Path, made: list[PPOTrainer], **settings: Any) -> Any:
    def make_trainer(changes: dict[str, Any]) -> PPOTrainer:
        chosen = {**STEPS, **settings, **changes}
        args = config(Path(chosen.pop("output_dir", tmp_path / "out")), **chosen)
        model, callbacks = saved_model(tmp_path / "model"), [DiagnosticsCallback()]
        made.append(
            PPOTrainer(
                model, cats, args, prompt_dataset(64), None, word_tokenizer(), callbacks=callbacks, peft_config=LORA
            )
        )
        return made[-1]

    return make_trainer


def test_forks_from_a_checkpoint_take_the_runs_steps_and_the_new_learning_rate(tmp_path: Path) -> None:
    """Without the remedy the fork goes on as the run did; with it, at the rate that the schedule of the checkpoint does
    not know."""
    settings = {"learning_rate": 1e-7, "total_episodes": 16 * 12, "evidence": False}
    whole = maker(tmp_path, [], save_strategy="steps", save_steps=2, **settings)({})
    whole.train()
    whole.save_state()
    run_dir = tmp_path / "out"
    log = read_run(run_dir)
    finding = Finding(
        name="steps_too_small",
        severity="problem",
        title="Steps",
        steps=(2, 24),
        evidence="Small.",
        figures={},
        cause="Rate.",
        remedy=Remedy(text="Raise it.", changes={"learning_rate": 1e-2}, moves="approxkl", direction="up"),
    )
    assert "steps_too_small" in {one.name for one in diagnose(log)}
    made: list[PPOTrainer] = []
    (trial,) = try_remedies(maker(tmp_path, made, **settings), [finding], tmp_path / "trial", log, run_dir)
    without, with_ = made
    # The first sign is at the sixth rollout, step 12; the last checkpoint before it at step 10. Both end at the eighth
    # log: one and a half times what the sign took from there, rounded up.
    assert (trial.start, trial.logs, trial.verdict) == (10, 2, "cured")
    names = ("objective/scores", "policy/approxkl_avg", "val/explained_variance")
    for one, other in zip(rows_with(whole, names[0]), rows_with(without, names[0]), strict=False):
        assert {name: one[name] for name in names} == {name: other[name] for name in names}
    assert rows_with(without, "learning_rate")[-1]["learning_rate"] == pytest.approx(1e-7)
    assert rows_with(with_, "learning_rate")[-1]["learning_rate"] == pytest.approx(1e-2)
    assert rows_with(with_, names[0])[4] == rows_with(without, names[0])[4], "one history until they part"
    assert not list((tmp_path / "trial").glob("*/checkpoint-*"))


@pytest.mark.long
def test_a_recipes_run_is_tried_from_its_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not touched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    small = ["--total_episodes", "128", "--per_device_train_batch_size", "8", "--num_ppo_epochs", "1"]
    main(["ppo", "--output_dir", "run", "--learning_rate", "1e-7", "--eval_strategy", "no", *small])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(["doctor", "run", "--try"]) == 0
    (first, *_) = json.loads((tmp_path / "run-try" / "trial.json").read_text())
    assert first["finding"] == "steps_too_small" and first["verdict"] in ("cured", "not cured")
    assert 100 * max(first["without"]["values"]) < first["with"]["values"][-1]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_folder_that_no_recipe_wrote(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"settings": {}}))
    with pytest.raises(ValueError, match="try_remedies"):
        trainer_maker(tmp_path)
