"""The circle on a tiny model: its files, that it goes on where it stopped, and what it says to wrong input."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainingArguments
from trl import ModelConfig

from tests.helpers import PLACE
from tests.parity.tiny import config_of, save_base
from trl_ext import PPOConfig, PPOTrainer, feedback, loop, runs
from trl_ext.loop import overview, raters, stages
from trl_ext.loop.picking import NothingNew, chosen, known_of
from trl_ext.loop.settings import SEEN
from trl_ext.rating import Store, serving

pytestmark = pytest.mark.slow  # rounds of a tiny loop, some seconds each
HERE = "tests.unit.test_loop"
PROMPTS = [{"prompt": f"w{3 + i} w{10 + i}"} for i in range(12)]


def stars(completions: list[str], **_: Any) -> list[float]:
    """1 to 5, by the last word."""
    return [1.0 + int(text.split()[-1].removeprefix("w")) % 5 if text.split() else 1.0 for text in completions]


def nonsense(completions: list[str], **_: Any) -> list[float]:
    return [9.0] * len(completions)


def gone(**_: Any) -> list[float]:
    raise ConnectionError("nobody is at home")


def silent(completions: list[str], **_: Any) -> list[float | None]:
    return [None] * len(completions)


def needs_a_colour(completions: list[str], colour: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("loop") / "base", config_of("llama"))


def circle_of(base: Path, out: Path, ppo: dict[str, Any] | None = None, **changes: Any) -> loop.Circle:
    settings: dict[str, Any] = {
        "dataset": "prompts.jsonl",
        "rater": f"{HERE}.stars",
        "rounds": 2,
        "ratings": 8,
        "per_prompt": 2,
        "reward": {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2},
    }
    args = PPOConfig(
        str(out),
        total_episodes=16,
        per_device_train_batch_size=4,
        num_mini_batches=2,
        num_ppo_epochs=1,
        learning_rate=1e-2,
        max_completion_length=5,
        gradient_checkpointing=False,
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        **(PLACE | (ppo or {})),
    )
    model = ModelConfig(str(base), dtype="float32", use_peft=True, lora_r=4, lora_target_modules=["all-linear"])
    return loop.Circle(loop.LoopArguments(**(settings | changes)), args, model, PROMPTS, PROMPTS[:3])


@pytest.mark.parametrize("in_4bit", [False, True])
def test_the_loop_samples_where_its_trainings_are(
    in_4bit: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the base lies there whole, quantised or not."""
    made, gpu = circle_of(base, tmp_path / "loop"), torch.device("cuda", 0)
    made.model_args.load_in_4bit = in_4bit
    monkeypatch.setattr("trl_ext.loop.circle.PartialState", lambda: SimpleNamespace(device=gpu))
    assert (made.loading["device_map"], made.loading["dtype"]) == ({"": gpu}, "float32")
    assert ("quantization_config" in made.loading) == in_4bit


def weights(out: Path) -> dict[str, Tensor]:
    """Every trained weight of a loop, by its file and name."""
    files = [file for file in sorted(out.rglob("*.safetensors")) if "checkpoint" not in str(file)]
    return {f"{file.relative_to(out)} {name}": tensor for file in files for name, tensor in load_file(file).items()}


def figures(out: Path) -> Any:
    return json.loads((out / "rounds.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop that nobody disturbed."""
    out = tmp_path_factory.mktemp("loop") / "whole"
    loop.run(circle_of(base, out))
    return out


# The circle ----------------------------------------------------------------------------------------------------------


def test_the_files_between_the_stages(whole: Path) -> None:
    for number in (1, 2):
        folder = whole / f"round_{number}"
        names = ("answers.jsonl", "feedback.jsonl", "evaluation.json", "reward", "ppo", "ppo/value")
        assert all((folder / name).exists() for name in names)
        assert not list(folder.rglob("checkpoint-*")) and not list(folder.glob("*.unfinished"))
        rated = feedback.read(str(folder / "feedback.jsonl"))
        assert rated.form == "ratings" and len(rated.records) == 8
        assert [r.ratings for r in rated.records] == [(x,) for x in stars([r.completion for r in rated.records])]
        evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        assert list(evaluation["policies"]) == ["round_2", "round_1", "base"][2 - number :]
        assert evaluation["judge"] == f"function:{HERE}.stars"
    answers = [json.loads(line) for line in (whole / "round_2/answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["policy"] for row in answers} == {"round_1"}
    rows = figures(whole)
    assert [row["ratings"] for row in rows] == [8, 16]
    assert rows[0]["accuracy_before"] is None and rows[0]["kl"] is not None
    assert (whole / "rounds.svg").is_file()


def test_nothing_is_judged_twice(whole: Path) -> None:
    judged = [known_of(feedback.read(str(whole / f"round_{n}/feedback.jsonl")).records) for n in (1, 2)]
    first, second = ({(prompt, answers) for prompt in known for answers in known[prompt]} for known in judged)
    assert len(first) == len(second) == 8 and not first & second


def test_a_loop_that_is_done_changes_nothing(base: Path, whole: Path) -> None:
    files = [file for file in whole.rglob("*") if file.is_file() and file.parent != whole]
    before = {file: file.stat().st_mtime_ns for file in files}
    outcome = loop.run(circle_of(base, whole))
    assert before == {file: file.stat().st_mtime_ns for file in files} and len(outcome.rows) == 2


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("reference", ["first", "last"])
def test_where_a_round_begins(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    """Round 2 starts at the policy and the value role of round 1, with its own reward model."""
    begun: list[dict[str, dict[str, Tensor]]] = []
    named: list[bool] = []
    train = PPOTrainer.train

    def noted(trainer: PPOTrainer, **how: Any) -> Any:
        adapters = {role: name for role, name in trainer.base.adapters.items() if name is not None}
        named.append(trainer.base.reference_named)
        begun.append(
            {
                role: {
                    k: v.clone() for k, v in get_peft_model_state_dict(trainer.base.model, adapter_name=name).items()
                }
                for role, name in adapters.items()
            }
        )
        return train(trainer, **how)

    monkeypatch.setattr(PPOTrainer, "train", noted)
    loop.run(circle_of(base, tmp_path / "out", reference=reference))
    first, second = tmp_path / "out/round_1", tmp_path / "out/round_2"
    expected = {"policy": first / "ppo", "value": first / "ppo/value", "reward": second / "reward"}
    if reference == "last":
        expected["reference"] = first / "ppo"
    assert begun[1].keys() == expected.keys()
    assert named[1], "the doctor takes the first policy for the reference that is meant"
    for role, folder in expected.items():
        saved = load_file(folder / "adapter_model.safetensors")
        lora = {name for name in saved if "lora_" in name}
        assert lora and all(torch.equal(begun[1][role][name], saved[name]) for name in lora), role
    assert not torch.equal(*(next(iter(one["policy"].values())) for one in begun))


def test_the_reward_model_learns_from_all_feedback(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int, Any]] = []
    made = stages.FeedbackRewardTrainer

    def noted(**kwargs: Any) -> Any:
        trained.append((len(kwargs["train_dataset"]), Path(kwargs["model"])))
        return made(**kwargs)

    monkeypatch.setattr(stages, "FeedbackRewardTrainer", noted)
    loop.run(circle_of(base, tmp_path / "out", ensemble=2, reward_from="last", pick="disagreement"))
    last = [tmp_path / f"out/round_1/reward/{i}" for i in range(2)]
    assert trained == [(8, base), (8, base), (16, last[0]), (16, last[1])]


def test_people_compare_in_pairs(base: Path, tmp_path: Path) -> None:
    loop.run(circle_of(base, tmp_path / "out", mode="pairs", rounds=1, per_prompt=3))
    pairs = feedback.read(str(tmp_path / "out/round_1/feedback.jsonl"))
    assert pairs.form == "pairs"
    for pair in pairs.records:
        better, worse = stars([pair.chosen, pair.rejected])
        assert better > worse


# Stopped, and gone on with -------------------------------------------------------------------------------------------


def _nth(name: str, owner: Any, count: int, after: bool = True) -> Callable[[], None]:
    """Arranges that this process is killed at the `count`-th call of a function."""

    def arrange() -> None:
        function, calls = getattr(owner, name), [0]

        def deadly(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            result = function(*args, **kwargs) if after or calls[0] < count else None
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, deadly)

    return arrange


OFTEN = ("ppo, round 2",)  # the others take minutes together


def kill_points() -> dict[str, Callable[[], None]]:
    from trl_ext import FeedbackRewardTrainer
    from trl_ext.evaluation import evaluating, sampling

    return {
        "sampling": _nth("append", sampling, 1),
        "answers": _nth("write_rows", stages, 1, after=False),
        "rating": _nth("append", raters, 1),
        "feedback": _nth("write_rows", raters, 1, after=False),
        "reward": _nth("training_step", FeedbackRewardTrainer, 3),
        "reward, round 2": _nth("training_step", FeedbackRewardTrainer, 7),
        "reward is moved": _nth("_move", stages, 1, after=False),
        "ppo begins": _nth("training_step", PPOTrainer, 1, after=False),  # the roles are drawn, and not saved yet
        "ppo": _nth("training_step", PPOTrainer, 3),
        "ppo, round 2": _nth("training_step", PPOTrainer, 6),
        "ppo is moved": _nth("_move", stages, 2, after=False),
        "evaluation": _nth("write_whole", evaluating, 1, after=False),
        "evaluated": _nth("write_whole", stages, 2, after=False),
    }


@pytest.mark.parametrize(
    "point", [pytest.param(name, marks=[] if name in OFTEN else pytest.mark.long) for name in kill_points()]
)
def test_killed_in_a_stage(base: Path, whole: Path, tmp_path: Path, point: str) -> None:
    """SIGKILL, the same command again, and every trained weight is the same."""

    def killed() -> None:
        kill_points()[point]()
        loop.run(circle_of(base, tmp_path / "out"))

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    loop.run(circle_of(base, tmp_path / "out"))
    expected, found = weights(whole), weights(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert figures(tmp_path / "out") == figures(whole)


def test_ppo_goes_on_from_its_checkpoint(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rollout that a checkpoint holds is sampled again, and no judgement asked for again."""
    asked, steps, step = [0], [0], PPOTrainer.training_step

    def third(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    def counted(rows: Any) -> Any:
        asked[0] += len(rows)
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "training_step", third)
        with pytest.raises(KeyboardInterrupt):
            loop.run(circle_of(base, tmp_path / "out", rounds=1))
    monkeypatch.setattr(PPOTrainer, "training_step", third)
    monkeypatch.setattr(raters, "_asked", counted)
    steps[0] = 10
    loop.run(circle_of(base, tmp_path / "out", rounds=1))
    assert steps[0] == 11 and asked == [0]  # one step was left of four


# Raters --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rater", "why"), [("nonsense", "said 9, which is no number of stars"), ("gone", "at home")])
def test_a_rater_that_is_gone_or_makes_no_sense(base: Path, tmp_path: Path, rater: str, why: str) -> None:
    with pytest.raises(loop.RaterError, match=why):
        loop.run(circle_of(base, tmp_path / "out", rater=f"{HERE}.{rater}"))
    assert not (tmp_path / "out/round_1/feedback.jsonl").exists()


def test_a_rater_that_says_nothing_ends_the_loop(base: Path, tmp_path: Path) -> None:
    outcome = loop.run(circle_of(base, tmp_path / "out", rater=f"{HERE}.silent"))
    assert outcome.rows == [] and outcome.last is None and "nothing to learn" in outcome.ended


def test_what_a_rater_said_is_asked_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge goes away after four answers; of the eight, the other four are asked when it is back."""
    monkeypatch.setattr(raters, "AT_A_TIME", 2)
    calls: list[int] = []

    def add_scores(rows: Any, *_: Any) -> None:
        calls.append(len(rows))
        if len(calls) == 3:
            raise ConnectionError("gone")
        for row, score in zip(rows, stars([row["completion"] for row in rows]), strict=True):
            row["score"] = score

    monkeypatch.setattr(stages, "add_scores", add_scores)
    circle = circle_of(base, tmp_path / "out", rounds=1)
    with pytest.raises(loop.RaterError, match="after 4 answers, which are kept"):
        loop.run(circle)
    loop.run(circle)
    assert calls == [2, 2, 2, 2, 2]
    assert len(feedback.read(str(tmp_path / "out/round_1/feedback.jsonl")).records) == 8


def test_a_file_is_waited_for(base: Path, tmp_path: Path) -> None:
    circle = circle_of(base, tmp_path / "out", rater="file", rounds=1)
    with pytest.raises(loop.Waiting, match=r"Round 1 waits for feedback: .*feedback\.jsonl"):
        loop.run(circle)
    folder = tmp_path / "out/round_1"
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    rated = [
        {**row, "rating": rating} for row, rating in zip(rows, stars([r["completion"] for r in rows]), strict=True)
    ]
    (folder / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated), encoding="utf-8")
    assert len(loop.run(circle).rows) == 1


def serve_some(count: int, verdict: Any = None) -> Callable[..., None]:
    """A rater who judges `count` items on the page and leaves."""

    def serve(store: Store, until: Callable[[], bool], **_: Any) -> None:
        name = store.rater("ada")
        for _ in range(count):
            if until() or (shown := store.next(name)) is None:
                return
            says = {"skip": ("skipped", None), "unsure": ("unsure", None), "tie": ("judged", (1, 1))}
            stand = says[verdict] if verdict else ("judged", (int(stars(list(shown.completions))[0]),))
            store.judge(name, shown.token, *stand)

    return serve


def test_people_on_the_page(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost when the page is closed in the middle; with the last judgement the loop goes on by itself."""
    circle = circle_of(base, tmp_path / "out", rater="page", rounds=1)
    monkeypatch.setattr("trl_ext.rating.serving.serve", serve_some(3))
    with pytest.raises(loop.Waiting, match="Round 1 has 3 of 8 judgements, which are kept"):
        loop.run(circle)
    monkeypatch.setattr("trl_ext.rating.serving.serve", serve_some(100))
    assert len(loop.run(circle).rows) == 1
    assert len(feedback.read(str(tmp_path / "out/round_1/feedback.jsonl")).records) == 8


def prefer_by_alphabet(count: int, asked: list[str]) -> Callable[..., None]:
    """Compares `count` pairs on the page."""

    def serve(store: Store, until: Callable[[], bool], **_: Any) -> None:
        name = store.rater("ada")
        for _ in range(count):
            if until() or (shown := store.next(name)) is None:
                return
            a, b = shown.completions
            asked.append(str(shown.prompt))
            store.judge(name, shown.token, "judged", (1, 2) if a < b else (2, 1))

    return serve


def test_people_compare_the_policies(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round's policy beside the one before it; what was said stays, and is not asked again."""
    asked: list[str] = []
    circle = circle_of(base, tmp_path / "out", rounds=1, judge="people", comparisons=3)
    monkeypatch.setattr("trl_ext.rating.serving.serve", prefer_by_alphabet(1, asked))
    with pytest.raises(loop.Waiting, match="Round 1 has 1 of 3 judgements, which are kept"):
        loop.run(circle)
    monkeypatch.setattr("trl_ext.rating.serving.serve", prefer_by_alphabet(100, asked))
    [row] = loop.run(circle).rows
    assert len(asked) == len(set(asked)) == len(PROMPTS[:3])
    said: dict[str, dict[str, str]] = {}
    for line in (tmp_path / "out/round_1/to_compare.jsonl").read_text(encoding="utf-8").splitlines():
        answer = json.loads(line)
        said.setdefault(answer["prompt"], {})[answer["policy"]] = answer["completion"]
    assert row["win_rate"] == sum(two["round_1"] < two["base"] for two in said.values()) / 3


def test_policies_that_say_the_same_are_not_compared(base: Path, tmp_path: Path) -> None:
    """Nobody is asked, and the loop ends with a sentence."""
    circle = circle_of(base, tmp_path / "out", judge="people")
    outcome = loop.run(replace(circle, args=replace(circle.args, learning_rate=1e-12)))
    assert outcome.rows == [] and outcome.ended.endswith(
        "its policy says what the one before said, to every held-out prompt."
    )


def test_the_page_that_is_not_installed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said before anything is sampled."""
    monkeypatch.setitem(sys.modules, "trl_ext.rating.serving", None)
    for changes in ({"rater": "page"}, {"judge": "people"}):
        with pytest.raises(ImportError, match=r"pip install 'trl-ext\[rate\]'"):
            loop.run(circle_of(base, tmp_path / "out", **changes))
    assert not (tmp_path / "out/round_1/answers.all.jsonl").exists()


def test_people_who_contradict_each_other(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    circle = circle_of(base, tmp_path / "out", rater="file", rounds=1)
    with pytest.raises(loop.Waiting):
        loop.run(circle)
    folder = tmp_path / "out/round_1"
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    both = [{**row, "ratings": [1 + i % 5, 5 - i % 3]} for i, row in enumerate(rows)]
    (folder / "feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in both), encoding="utf-8")
    loop.run(circle)
    assert "Feedback so far: Raters hardly agree (alpha" in capsys.readouterr().out


def test_the_page_closes_when_the_budget_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is more to judge."""
    round_ = loop.Round(tmp_path, 1)
    round_.folder.mkdir()
    rows = [{"id": str(i), "prompt": f"p {i}", "completion": f"w{i}"} for i in range(3)]
    round_.answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr("trl_ext.rating.serving.serve", serve_some(100))
    raters.rate_on_page(round_, "stars", 2, 0, False)
    assert len(feedback.read(str(round_.feedback)).records) == 2


@pytest.mark.parametrize(("mode", "says"), [("stars", "skip"), ("pairs", "tie"), ("pairs", "unsure")])
def test_people_of_whom_nothing_can_be_learned(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, says: str
) -> None:
    circle = circle_of(base, tmp_path / "out", rater="page", rounds=1, mode=mode)
    monkeypatch.setattr("trl_ext.rating.serving.serve", serve_some(100, says))
    outcome = loop.run(circle)
    assert outcome.rows == [] and "nobody could tell anything about its answers, or all" in outcome.ended


def test_a_port_in_use(base: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port} .*name another with --port"):
            loop.run(circle_of(base, tmp_path / "out", rater="page", port=port, browser=False))


def test_the_page_closes_by_itself(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what was judged last is taken back, and judged again."""
    monkeypatch.setattr(serving, "POLL", 0.01)
    monkeypatch.setattr(serving, "LAST_LOOK", 0.01)
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "p", "completion": "c"}\n', encoding="utf-8")
    verdicts, said = iter([False, True, False, True, True, True]), []
    with Store.open(tmp_path / "store.sqlite", answers) as store:
        serving.serve(store, port=0, browser=False, say=said.append, until=lambda: next(verdicts))
    assert len(said) == 1 and said[0].startswith("http://127.0.0.1:") and list(verdicts) == [True]


# Wrong input ---------------------------------------------------------------------------------------------------------


def test_other_settings_are_refused(base: Path, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"was made with kl_coef 0\.05, and not with 0\.4"):
        loop.run(circle_of(base, whole, ppo={"kl_coef": 0.4}))
    with pytest.raises(ValueError, match="was made with ratings 8, and not with 9"):
        loop.run(circle_of(base, whole, ratings=9))
    with pytest.raises(ValueError, match="was made with disable_dropout True, and not with False"):
        loop.run(circle_of(base, whole, ppo={"disable_dropout": False}))
    with pytest.raises(ValueError, match="was made with train_prompts 12"):
        loop.run(replace(circle_of(base, whole), train=PROMPTS[:5]))


@pytest.mark.parametrize("what", ["model", "judge"])
def test_models_that_were_trained_further_in_their_place_are_refused(
    what: str, base: Path, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "model")
    shutil.copytree(whole / "round_1/reward", tmp_path / "judge")
    config = tmp_path / "judge/adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace(str(base), str(tmp_path / "model")), encoding="utf-8")
    circle = circle_of(tmp_path / "model", tmp_path / "out", judge=f"reward:{tmp_path / 'judge'}")
    circle.check()
    circle.check()
    [file] = (tmp_path / what).glob("*.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"was made with files of the {what} .*, and not with"):
        circle_of(tmp_path / "model", tmp_path / "out", judge=f"reward:{tmp_path / 'judge'}").check()


def test_of_ppos_own_settings_none_may_change_but_what_is_seen_of_a_run() -> None:
    own = PPOConfig.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    assert {name for name in own if name.startswith(SEEN)} == {"log_completions"}


def test_two_starts_on_one_folder(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / runs.LOCK), pytest.raises(ValueError, match="is in use by another run"):
        loop.run(circle_of(base, out))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"rater": "nobody"}, "rater is 'nobody'"),
        ({"rater": "demo"}, "the embedded default only"),
        ({"mode": "hearts"}, "mode is 'hearts': choose one of stars"),
        ({"pick": "disagreement"}, "set ensemble to 2 or more"),
        ({"pick": "closeness"}, "set mode to pairs"),
        ({"rounds": 0}, "rounds is 0"),
        ({"mode": "pairs", "per_prompt": 1}, "set per_prompt to 2"),
        ({"judge": "peopel"}, "must be reward:FOLDER"),
        ({"judge": "people", "comparisons": 0}, "comparisons is 0"),
        ({"reward": "3"}, "give settings of FeedbackRewardConfig"),
    ],
)
def test_settings_that_make_no_sense(base: Path, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        circle_of(base, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"reward": {"epochs": 3}}, "reward has the setting 'epochs'"),
        ({"rater": "page", "patience": 1}, "patience goes by who wins"),
        ({"rater": "reward:nowhere"}, "nowhere"),
        ({"rater": f"{HERE}.needs_a_colour"}, "colour"),
        ({"judge": "reward:nowhere"}, "nowhere"),
    ],
)
def test_what_the_circle_refuses_before_it_begins(
    base: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=why):
        loop.run(circle_of(base, tmp_path / "out", **changes))
    assert not (tmp_path / "out/settings.json").exists()


@pytest.mark.parametrize(
    ("ppo", "model", "why"),
    [
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            {},
            "chat_template_kwargs is .*which the loop's reward models are not",
        ),
        ({"top_p": 0.9}, {}, "top_p is 0.9, .* leave it at 1.0"),
        ({}, {"model_revision": "step1000"}, "the loop's sampling takes 'main'"),
    ],
)
def test_what_would_reach_ppo_alone_is_refused(
    base: Path, tmp_path: Path, ppo: dict[str, Any], model: dict[str, Any], why: str
) -> None:
    circle = circle_of(base, tmp_path / "out", ppo)
    for name, value in model.items():
        setattr(circle.model_args, name, value)
    with pytest.raises(ValueError, match=why):
        circle.check()


def test_rounds_that_would_push_over_each_other(base: Path, tmp_path: Path) -> None:
    circle = circle_of(base, tmp_path / "out")
    circle.args.push_to_hub = True
    with pytest.raises(ValueError, match="would push over the one before"):
        circle.check()


# Pure parts ----------------------------------------------------------------------------------------------------------


def rows_of(*completions: str, prompt: str = "p") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": c, "scores": {"a": float(len(c))}} for c in completions]


def test_answers_that_are_worth_judging() -> None:
    rows = rows_of("x", "x", "yy", " ", "zzz")
    picked = chosen(rows, "stars", "random", 9, {"p": [{"yy"}]}, seed=0)
    assert sorted(row["completion"] for row in picked) == ["x", "zzz"]
    with pytest.raises(NothingNew, match="every answer was judged before"):
        chosen(rows[:2], "stars", "random", 9, {"p": [{"x"}]}, seed=0)


def test_one_pair_a_prompt_the_closest() -> None:
    rows = rows_of("a", "bb", "cccc", prompt="p") + rows_of("a", "bbbb", prompt="q") + rows_of("c", "c", prompt="r")
    picked = chosen(rows, "pairs", "closeness", 9, {}, seed=0)
    assert [(row["prompt"], row["completion"]) for row in picked[:2]] in (
        [("p", "a"), ("p", "bb")],
        [("p", "bb"), ("p", "a")],
    )
    assert {row["prompt"] for row in picked[2:]} == {"q"} and len(picked) == 4
    assert len(chosen(rows, "pairs", "closeness", 1, {}, seed=0)) == 2
    with pytest.raises(NothingNew, match="no two answers to a prompt differ"):
        chosen(rows[-2:], "pairs", "random", 9, {}, seed=0)


def test_what_the_policy_says_most_is_judged_first() -> None:
    said = {"a": -3.0, "b": -1.0, "c": -9.0, "d": -2.0}
    rows = [{**row, "logprob": said[row["completion"]]} for row in rows_of("a", "b", "a", "c", "d")]
    picked = chosen(rows, "pairs", "likelihood", 1, {}, seed=0)
    assert {row["completion"] for row in picked} == {"b", "d"}
    picked = chosen(rows, "stars", "likelihood", 2, {"p": [{"b"}]}, seed=0)
    assert [row["completion"] for row in picked] == ["d", "a"]


def test_rankings_have_all_answers_to_a_prompt() -> None:
    rows = rows_of("a", "bb", "a", prompt="p") + rows_of("a", "b", prompt="q")
    picked = chosen(rows, "ranking", "random", 1, {}, seed=0)
    assert len(picked) == 2 and len({row["prompt"] for row in picked}) == 1


def test_pairs_and_lists_that_were_judged_are_not_judged_again() -> None:
    rows = rows_of("a", "bb", prompt="p") + rows_of("a", "bb", "ccc", prompt="q")
    known = {"p": [{"a", "bb", "other"}], "q": [{"a", "bb"}]}  # a list of three, and a pair
    for mode in ("pairs", "ranking"):
        picked = chosen(rows, mode, "random", 9, known, seed=0)
        assert {row["prompt"] for row in picked} == {"q"} and "ccc" in {row["completion"] for row in picked}
    with pytest.raises(NothingNew, match="no two answers to a prompt differ that were not judged"):
        chosen(rows[:2], "pairs", "random", 9, known, seed=0)


@pytest.mark.parametrize(
    ("judging", "score", "own"),
    [("score/gold", -1.0, 3.0), ("score/reward", 3.0, 3.0), ("score/gold/reward", None, 3.0), (None, None, 3.0)],
)
def test_the_judge_s_score_is_not_the_round_s_own(
    tmp_path: Path, judging: str | None, score: float | None, own: float
) -> None:
    metrics = {"score/reward": {"mean": 3.0}, "score/gold": {"mean": -1.0}}
    result = {"policies": {"round_1": {"metrics": metrics}, "base": {"metrics": metrics}}, "win_rates": {}}
    accuracy = {"before": None, "after": None}
    row = overview.line(loop.Round(tmp_path, 1), result, accuracy, {}, judging, ["score/reward"], 8)
    assert (row["score"], row["own_score"]) == (score, own)


def test_a_policy_that_is_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while its checkpoints were being removed."""
    round_ = loop.Round(tmp_path, 1)
    draft = stages.unfinished(round_.ppo)
    draft.mkdir(parents=True)
    (draft / stages.TRAINER_STATE_NAME).write_text("{}")
    monkeypatch.setattr(stages, "_policy_trainer", None)  # which would be called
    stages.train_policy(SimpleNamespace(seed=int), round_)  # type: ignore[arg-type]
    assert (round_.ppo / stages.TRAINER_STATE_NAME).is_file() and not draft.exists()


def test_rounds_that_do_not_win() -> None:
    rows = [{"win_rate": rate} for rate in (0.9, 0.5, 0.6, 0.5, None, 0.4)]
    assert [overview.idle(rows[:n]) for n in range(1, 7)] == [0, 1, 0, 1, 2, 3]
