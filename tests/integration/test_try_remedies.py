"""A remedy tried on real trainers: forks from a checkpoint and from a recipe's folder."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import FLAGS, prompt_dataset, saved_model, word_tokenizer
from tests.integration.test_ppo_trainer import LORA, cats, config, rows_with
from trl_ext import DiagnosticsCallback, PPOTrainer, launch
from trl_ext.cli import main
from trl_ext.diagnostics import Finding, Remedy, diagnose, read_run, try_remedies
from trl_ext.generation import TransformersGenerator
from trl_ext.launch.remaking import trainer_maker
from trl_ext.launch.settings import recipe_file
from trl_ext.ppo.pretraining import PretrainMix

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
    (trial, *_) = try_remedies(maker(tmp_path, made, **settings), [finding], tmp_path / "trial", log, run_dir, causes=1)
    without, with_, *_ = made
    # The first sign is at the sixth rollout, step 12; the last checkpoint before it at step 10. Both go on for as many
    # logs as are called recent.
    assert (trial.start, trial.logs, trial.verdict) == (10, 4, "in part")
    names = ("objective/scores", "policy/approxkl_avg", "val/explained_variance")
    for one, other in zip(rows_with(whole, names[0]), rows_with(without, names[0]), strict=False):
        assert {name: one[name] for name in names} == {name: other[name] for name in names}
    assert rows_with(without, "learning_rate")[-1]["learning_rate"] == pytest.approx(1e-7)
    assert rows_with(with_, "learning_rate")[-1]["learning_rate"] == pytest.approx(1e-2)
    assert rows_with(with_, names[0])[4] == rows_with(without, names[0])[4], "one history until they part"
    assert not list((tmp_path / "trial").glob("*/checkpoint-*"))


def yardstick(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(text.count("cat")) for text in completions]


class Plain(TransformersGenerator):
    """Somebody's own."""


def with_parts(tmp_path: Path, **parts: Any) -> PPOTrainer:
    args, own = config(tmp_path / "out", **STEPS), {"callbacks": [DiagnosticsCallback(yardstick=yardstick)], **parts}
    model, held_out = saved_model(tmp_path / "model"), prompt_dataset(20).map(lambda row: {"prompt": "the dog"})
    return PPOTrainer(model, cats, args, prompt_dataset(64), held_out, word_tokenizer(), peft_config=LORA, **own)


def test_the_yardstick_gives_the_scores_alone(tmp_path: Path) -> None:
    trainer = with_parts(tmp_path)
    assert trainer.exchange("reward_funcs")
    trainer.train()
    rows = rows_with(trainer, "agreement/yardstick")
    assert [row["agreement/yardstick"] for row in rows] == pytest.approx([1.0] * len(rows))
    assert all("rewards/yardstick/mean" in row and "rewards/cats/mean" not in row for row in rows)


def test_held_out_prompts_are_trained_on_for_as_many_steps(tmp_path: Path) -> None:
    trainer = with_parts(tmp_path)
    assert trainer.exchange("train_dataset")
    trainer.train()
    plain = with_parts(tmp_path / "plain")
    plain.train()
    assert trainer.state.max_steps == plain.state.max_steps
    assert len(trainer.train_dataset) == len(plain.train_dataset), "an epoch is as long"
    assert set(trainer.experience.rollout.prompts) == {"the dog"} != set(plain.experience.rollout.prompts)


def test_the_base_answers_in_the_place_of_a_generator(tmp_path: Path) -> None:
    trainer = with_parts(tmp_path)
    assert not trainer.exchange("generator"), "it does already"
    trainer = with_parts(tmp_path / "own")
    trainer.collector.generator = Plain(trainer.base, 8, True)
    assert trainer.exchange("generator") and type(trainer.collector.generator) is TransformersGenerator
    trainer.train()


def test_the_tokenizer_beside_the_model_reads_in_the_place_of_another(tmp_path: Path) -> None:
    trainer = with_parts(tmp_path)
    trainer.processing_class.add_tokens(["the dog"])  # one token, which the model has never seen
    trainer.collector.generation_config.pad_token_id = 7
    mix = trainer.updater.pretrain_mix = PretrainMix(None, trainer.processing_class, 8, 0)
    assert trainer.exchange("processing_class")
    assert mix.tokenizer is trainer.callback_handler.processing_class is trainer.processing_class
    trainer.updater.pretrain_mix = None
    trainer.train()
    own = word_tokenizer()
    rollout = trainer.experience.rollout
    assert rollout.prompt_tokens == [own(prompt)["input_ids"] for prompt in rollout.prompts]
    assert trainer.processing_class is trainer.collector.tokenizer
    assert trainer.collector.generation_config.pad_token_id == own.pad_token_id


def test_what_is_not_there_stands_in_for_nothing(tmp_path: Path) -> None:
    trainer = with_parts(tmp_path, callbacks=[DiagnosticsCallback()])
    trainer.eval_dataset = trainer.eval_dataset.select(range(3))
    assert not trainer.exchange("reward_funcs"), "no yardstick"
    assert not trainer.exchange("train_dataset"), "too few for a rollout"
    trainer.train_dataset = prompt_dataset(64, chat=True)
    assert not trainer.exchange("processing_class"), "it writes no conversations"
    trainer.train_dataset = prompt_dataset(64)
    assert trainer.exchange("processing_class")
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    assert not trainer.exchange("processing_class"), "no tokenizer lies beside the model"


@pytest.mark.long
def test_a_reward_that_scores_other_rows_is_told_from_the_rest_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's own model, data and yardstick; a function that gives each row the score of the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = ["from trl_ext import demo", "def late(prompts, completions, capital, **kwargs):"]
    lines += ["    scores = demo.rate(prompts, completions, capital)", "    return scores[-1:] + scores[:-1]"]
    (tmp_path / "mine.py").write_text("\n".join(lines) + "\n")
    small = ["--total_episodes", "768", "--reward_funcs", "mine.late"]
    main(["ppo", "--output_dir", "run", *small])
    assert main(["doctor", "run", "--try"]) == 0
    (first, *_) = json.loads((tmp_path / "run-try" / "trial.json").read_text())
    assert (first["finding"], first["verdict"]) == ("score_misaligned", "cured")
    assert first["changes"] == {"reward_funcs": "the yardstick"}


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
    assert first["finding"] == "steps_too_small" and first["verdict"] in ("cured", "in part", "not cured")
    assert 100 * max(first["without"]["values"]) < first["with"]["values"][-1]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def files(folder: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def train(recipe: str, *arguments: str) -> None:
    """What a recipe does but for what it shows of it: its training, an evaluation at the end, and its log in "run"."""
    file = str(recipe_file(f"{recipe}_lora"))
    names = runpy.run_path(file)
    sys.argv = [file, *arguments, *FLAGS, "--output_dir", "run", "--disable_tqdm", "true"]
    script, args, model_args = launch.parse(file, *names["TYPES"])
    for own in launch.members(args, getattr(script, "ensemble", 1)):
        trainer = names["make_trainer"](script, own, model_args)
        trainer.train()
        trainer.evaluate()
        trainer.save_state()


def tried(run: str) -> Any:
    """What became of the first remedy of a run, which is not touched. The fork without it logs what the run did, where
    the run had drawn its adapters from its own seed."""
    before = files(run)
    assert main(["doctor", run, "--try", "--out", "trial"]) == 0
    assert files(run) == before
    (first, *_) = json.loads(Path("trial/trial.json").read_text())
    assert first["verdict"] in ("cured", "in part", "not cured") and first["changes"] and first["with"]["values"]
    return first


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.mark.long
@pytest.mark.usefixtures("elsewhere")
def test_a_reward_model_of_an_ensemble_is_made_anew_with_its_own_seed() -> None:
    steps = ["--max_steps", "16", "--per_device_train_batch_size", "32", "--logging_steps", "2"]
    train("reward", "--ensemble", "2", "--learning_rate", "1e-4", *steps)
    first = tried("run/1")
    assert (first["finding"], first["changes"]) == ("chance_level", {"learning_rate": 1e-3})
    of_members = [read_run(f"run/{i}").series("accuracy").values[: first["logs"]] for i in range(2)]
    assert first["without"]["values"] == of_members[1] != of_members[0]
    assert first["with"]["values"][-1] > first["without"]["values"][-1]


@pytest.mark.long
@pytest.mark.usefixtures("elsewhere")
def test_dpo_is_made_anew() -> None:
    train("dpo", "--beta", "50", "--learning_rate", "5e-3", "--max_steps", "10", "--logging_steps", "2")
    first = tried("run")
    assert (first["finding"], first["changes"], first["start"]) == ("margins_explode", {"beta": 0.1}, 0)
    assert first["with"]["values"][-1] < 5 < first["without"]["values"][-1] and first["verdict"] == "cured"


@pytest.mark.long
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_stage_of_a_loop_is_made_anew_from_the_files_beside_it(stage: str, loop_of_one_round: Path) -> None:
    shutil.copytree(loop_of_one_round, "moved")  # with its settings comes its way to the stages before it
    first = tried(f"moved/round_1/{stage}")
    finding, metric = {"reward": ("chance_level", "accuracy"), "ppo": ("steps_too_small", "approxkl")}[stage]
    values = read_run(f"moved/round_1/{stage}").series(metric).values
    assert first["finding"] == finding and first["without"]["values"] == values[: first["logs"]]
    assert first["with"]["values"][-1] > values[first["logs"] - 1]


@pytest.fixture(scope="module")
def loop_of_one_round(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whose steps are too small, those of the reward model and those of PPO."""
    out = tmp_path_factory.mktemp("loop") / "loop"
    reward = {"max_steps": 30, "per_device_train_batch_size": 16, "learning_rate": 1e-7, "logging_steps": 3}
    few = ["--rounds", "1", "--mode", "pairs", "--ratings", "60", "--prompts", "30", "--held_out", "4"]
    small = ["--total_episodes", "128", "--per_device_train_batch_size", "8", "--num_ppo_epochs", "1"]
    rates = ["--learning_rate", "1e-7", "--reward", json.dumps(reward)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        assert main(["loop", "--output_dir", str(out), *few, *small, *rates, *FLAGS]) == 0
    return out


@pytest.mark.parametrize(
    "recipe",
    [None, {"name": "my_own"}, {"name": "rlhf_loop"}, {"name": "ppo_lora", "stage": "ppo"}],
    ids=["none", "a script of one's own", "a loop's, without its stage", "no loop's, with a stage"],
)
def test_a_folder_that_no_recipe_wrote(recipe: Any, tmp_path: Path) -> None:
    about = {"settings": {}, "recipe": recipe and {**recipe, "folder": ".", "settings": {}}}
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="try_remedies"):
        trainer_maker(tmp_path)


@pytest.mark.parametrize(
    ("processes", "changes", "rows"), [(1, {}, 2), (4, {}, 8), (4, {"gradient_accumulation_steps": 3}, 12)]
)
def test_a_run_of_several_processes_is_forked_with_as_large_rollouts(
    processes: int, changes: dict[str, Any], rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types = runpy.run_path(str(recipe_file("ppo_lora")))["TYPES"]
    names = {"TYPES": types, "make_trainer": lambda script, args, model: args}
    monkeypatch.setattr("trl_ext.launch.remaking.runpy.run_path", lambda _: names)
    settings = {"gradient_accumulation_steps": 2, "model_name_or_path": "demo", "dataset": "demo", "use_cpu": True}
    recipe = {"name": "ppo_lora", "folder": str(tmp_path), "settings": settings}
    about = {"settings": {"world_size": processes, "gradient_accumulation_steps": 2}, "recipe": recipe}
    (tmp_path / "run.json").write_text(json.dumps(about))
    args = trainer_maker(tmp_path)({**changes, "output_dir": str(tmp_path / "fork")})
    assert args.gradient_accumulation_steps == rows


@pytest.mark.usefixtures("elsewhere")
def test_a_script_of_one_s_own_is_not_taken_for_the_recipe_of_its_name() -> None:
    """Its trainer would be another one than what `--try` makes."""
    for file, known in ((recipe_file("ppo_lora"), True), (Path("ppo_lora.py"), False)):
        Path(file.name).write_text(recipe_file("ppo_lora").read_text(encoding="utf-8"), encoding="utf-8")
        Path("ppo_lora.yaml").write_text(recipe_file("ppo_lora").with_suffix(".yaml").read_text(), encoding="utf-8")
        sys.argv = [str(file), *FLAGS, "--output_dir", f"run-{known}"]
        _, args, _ = launch.parse(str(file), *runpy.run_path(str(recipe_file("ppo_lora")))["TYPES"])
        assert (getattr(args, "recipe", None) is not None) == known
