"""The five stages of a round, in their order. Each reads the files of those before, and makes its own where it is not
there yet: what a stage is killed over is either gone on with or made anew from the same random numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from datasets import Dataset
from transformers.trainer import TRAINER_STATE_NAME

from trl_ext import demo, feedback, launch
from trl_ext.callbacks import DiagnosticsCallback
from trl_ext.evaluation import Row, Sampling, Spec, evaluate, sample, write_rows
from trl_ext.evaluation.picking import BY_SCORES
from trl_ext.evaluation.sampling import add_scores, rollout_of
from trl_ext.launch.data import CONVERTERS
from trl_ext.launch.resuming import last_checkpoint
from trl_ext.loop import overview
from trl_ext.loop.picking import chosen, known_of
from trl_ext.loop.raters import compare_on_page, rate_by_numbers, rate_on_page, wait_for_file
from trl_ext.loop.rounds import UNFINISHED, Round, unfinished
from trl_ext.loop.settings import ppo_config, reward_config
from trl_ext.ppo import PPOConfig, PPOTrainer
from trl_ext.reward_models import FeedbackRewardConfig, FeedbackRewardTrainer
from trl_ext.rewards import Scorer, name_of
from trl_ext.runs import write_whole

if TYPE_CHECKING:
    from trl_ext.loop.circle import Circle

Stage = Callable[["Circle", Round], None]
ACCURACY = "accuracy.json"
# Of each form of feedback, the objective whose rows say as much as it does.
AS_GIVEN = {"ratings": "regression", "labels": "binary", "rankings": "ranking", "pairs": "pairwise"}


def sample_answers(circle: Circle, round_: Round) -> None:
    """answers.jsonl: what the last policy says, as much of it as is to be judged."""
    if round_.answers.is_file():
        return
    script, before = circle.script, round_.before
    asks = script.pick in BY_SCORES
    way = (
        script.pick if before.number or not asks else "random"
    )  # before the first round there is no reward model to ask
    rewards = circle.rewards(before) if before.number and asks else []
    rows = sample(
        circle.cast({before.name: circle.policy(before)}, rewards),
        circle.prompts_of(round_.number),
        round_.sampled,
        _sampling(circle, round_.number, script.per_prompt),
        loading=circle.loading,
    )
    known = known_of(_records(circle, before))
    seed = circle.seed(round_.number)
    write_rows(round_.answers, chosen(rows, script.mode, way, script.ratings, known, seed))


def rate_answers(circle: Circle, round_: Round) -> None:
    """feedback.jsonl: what the rater says about them."""
    script = circle.script
    if round_.feedback.is_file():
        return
    if script.rater == "file":
        wait_for_file(round_)
    elif circle.rater is None:
        rate_on_page(round_, script.mode, script.ratings, script.port, script.browser)
    else:
        scorer = Scorer([_rater(circle, circle.rater)])

        def ask(rows: Sequence[Row]) -> list[float | None]:
            asked = [{**row} for row in rows]
            add_scores(asked, rollout_of(asked, circle.tokenizer), scorer)
            return [row["score"] for row in asked]

        rate_by_numbers(round_, script.mode, script.ratings, ask, script.rater)


def train_reward(circle: Circle, round_: Round) -> None:
    """reward/: the reward models, of all feedback so far; how well they and those before order this round's answers."""
    if round_.reward.is_dir():
        return
    draft, script = unfinished(round_.reward), circle.script
    objective = reward_config(script, circle.args, draft, 0).objective
    judged = _read(circle, round_)
    rows = CONVERTERS[objective](judged)
    if circle.rater is None:  # people, who may contradict each other and themselves
        for advice in feedback.check(judged).advice:
            print(f"Feedback so far: {advice}", flush=True)
    folders = [draft / folder.relative_to(round_.reward) for folder in circle.rewards(round_)]
    for i, folder in enumerate(folders):
        args = reward_config(script, circle.args, folder, circle.seed(round_.number) + 100 * i)
        _train(partial(_reward_trainer, circle, round_, args, rows, i), folder)
    new = feedback.read(str(round_.feedback), on_error=script.on_error)
    accuracy = {
        "before": _accuracy(circle, new, circle.rewards(round_.before)),
        "after": _accuracy(circle, new, folders),
    }
    write_whole(draft / ACCURACY, json.dumps({"judgements": len(new.records), **accuracy}, indent=2) + "\n")
    _move(draft, round_.reward)


def train_policy(circle: Circle, round_: Round) -> None:
    """ppo/: policy and value role, trained further from the round before."""
    if round_.ppo.is_dir():
        return
    draft = unfinished(round_.ppo)
    seed = circle.seed(round_.number)
    _train(lambda: _policy_trainer(circle, round_, ppo_config(circle.args, draft, seed)), draft)
    _move(draft, round_.ppo)


def evaluate_policy(circle: Circle, round_: Round) -> None:
    """evaluation.json: the policy beside the one before it and the first, on held-out prompts."""
    if round_.evaluation.is_file():
        return
    first, before, script = Round(circle.out, 0), round_.before, circle.script
    policies = {one.name: circle.policy(one) for one in (round_, before, first)}
    own = circle.rewards(round_)
    judge = circle.judge or Spec("reward", str(own[0]))
    cast = circle.cast(policies, own)
    compare = partial(compare_on_page, round_, budget=script.comparisons, port=script.port, browser=script.browser)
    result = evaluate(
        cast,
        circle.test[: script.held_out],
        round_.compared,
        judge,
        _sampling(circle, 0, 1),
        loading=circle.loading,
        people=compare if judge.kind == "people" else None,
    )
    judging = f"score/{name_of(judge.function)}" if judge.kind == "function" else None
    if judge.kind == "reward":
        cast, number = cast.with_reward(judge.value)
        judging = f"score/{cast.reward_names[number]}"
    of_round = [f"score/{name}" for name in cast.reward_names[: len(own)]]
    exams = _exams(circle, round_) if script.dataset == "demo" else {}
    accuracy = json.loads((round_.reward / ACCURACY).read_text(encoding="utf-8"))
    line = overview.line(round_, result, accuracy, exams, judging, of_round, _spent(circle, round_))
    write_whole(round_.evaluation, json.dumps({**result, "round": line}, indent=2, ensure_ascii=False) + "\n")
    launch.free_memory()


ALL: tuple[Stage, ...] = (sample_answers, rate_answers, train_reward, train_policy, evaluate_policy)


# Sampling and rating -------------------------------------------------------------------------------------------------


def _sampling(circle: Circle, number: int, per_prompt: int) -> Sampling:
    args = circle.args
    return Sampling(
        *(per_prompt, args.max_completion_length, args.temperature, circle.seed(number)),
        batch_size=args.local_rollout_forward_batch_size,
    )


def _rater(circle: Circle, spec: Spec) -> Any:
    """A reward function."""
    if spec.kind == "function":
        return spec.function
    cast, _ = circle.cast({"base": None}).with_reward(spec.value)
    [function] = cast.loaded(circle.tokenizer, **circle.loading).rewards.values()
    return function


def _read(circle: Circle, round_: Round) -> feedback.Feedback:
    """All feedback up to this round."""
    files = [str(Round(circle.out, number).feedback) for number in range(1, round_.number + 1)]
    return feedback.read(files if len(files) > 1 else files[0], on_error=circle.script.on_error)


def _records(circle: Circle, round_: Round) -> list[Any]:
    return _read(circle, round_).records if round_.number else []


def _spent(circle: Circle, round_: Round) -> int:
    """Judgements so far."""
    accuracies = (Round(circle.out, number).reward / ACCURACY for number in range(1, round_.number + 1))
    return sum(json.loads(file.read_text(encoding="utf-8"))["judgements"] for file in accuracies)


# Training ------------------------------------------------------------------------------------------------------------


def _train(make_trainer: Callable[[], Any], folder: Path) -> None:
    """What lies in the folder, unless that is done: it is gone on with, or made anew."""
    if (folder / TRAINER_STATE_NAME).is_file():
        return
    trainer = make_trainer()
    launch.show_progress(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model()
    trainer.save_state()  # last: by it the model counts as whole
    del trainer
    launch.free_memory()


def trainer_of(circle: Circle, run: Path) -> FeedbackRewardTrainer | PPOTrainer:
    """The trainer of a stage made anew, from the files of the stages before it, which are only read.

    Args:
        circle: its args are the trainer's: output_dir, seed and whatever was changed are those of the new training.
        run: the stage's folder: round_N/ppo, round_N/reward, or round_N/reward/I of an ensemble; finished or not.
    """
    stage, member = (run.parent, int(run.name)) if run.name.isdecimal() else (run, 0)
    round_ = Round(stage.parents[1], int(stage.parent.name.rpartition("_")[2]))
    args, there = circle.args, replace(circle, args=ppo_config(circle.args, round_.out, circle.args.seed))
    if stage.name.removesuffix(UNFINISHED) == round_.ppo.name:
        return _policy_trainer(there, round_, args)
    own = reward_config(circle.script, args, circle.out, args.seed)
    return _reward_trainer(there, round_, own, CONVERTERS[own.objective](_read(there, round_)), member)


def _reward_trainer(
    circle: Circle, round_: Round, args: FeedbackRewardConfig, rows: Dataset, member: int
) -> FeedbackRewardTrainer:
    given = launch.model_for_trl(replace(circle.model_args, lora_task_type="SEQ_CLS"), args)
    if circle.script.reward_from == "last" and round_.before.number:
        given |= {"model": str(circle.rewards(round_.before)[member]), "peft_config": None}
    set_seed(args.seed)  # LoRA and head are drawn before the trainer sets it
    trainer = FeedbackRewardTrainer(args=args, train_dataset=rows, callbacks=[DiagnosticsCallback()], **given)
    launch.match_precision(trainer, circle.model_args)
    return trainer


def _policy_trainer(circle: Circle, round_: Round, args: PPOConfig) -> PPOTrainer:
    before = round_.before
    roles: dict[str, Any] = {"value": circle.script.value, "reward": circle.rewards(round_)}
    if before.number:
        roles |= {"policy": before.ppo, "value": before.ppo / "value", "reference": _reference(circle, before)}
    set_seed(args.seed)  # new adapters and heads are drawn
    base = circle.shared_base(**roles)
    rows, held_out = (Dataset.from_list([dict(row) for row in part]) for part in (circle.train, circle.test))
    return PPOTrainer(
        base, None, args, rows, held_out, processing_class=circle.tokenizer, callbacks=[DiagnosticsCallback()]
    )


def _accuracy(circle: Circle, new: feedback.Feedback, folders: Sequence[Path]) -> float | None:
    """Of pairs of this round's answers to one prompt that were judged unlike, the share that the reward models put in
    that order; None where there is no model or no pair."""
    if not folders:
        return None
    rows = CONVERTERS[AS_GIVEN[new.form]](new)
    base = circle.shared_base(value="head", reward=[str(folder) for folder in folders])
    answers = launch.scored_answers(base, circle.tokenizer, rows, circle.args.local_rollout_forward_batch_size)
    judgement = feedback.judge(answers) if len(answers) > 1 else None
    del base
    launch.free_memory()
    return judgement.pair_accuracy if judgement is not None and judgement.pairs else None


def _reference(circle: Circle, before: Round) -> str | Path:
    if circle.script.reference == "last":
        return before.ppo
    return circle.model.adapter or "base"


def _move(draft: Path, final: Path) -> None:
    """The folder appears whole; what it was to be gone on from is not needed any more."""
    for checkpoint in draft.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    draft.replace(final)


def _exams(circle: Circle, round_: Round) -> dict[str, float]:
    """Share of right answers of the embedded exam, by this round's policy and by the one before it."""
    before = round_.before
    known = json.loads(before.evaluation.read_text(encoding="utf-8"))["round"]["exam"] if before.number else None
    return {
        round_.name: _exam(circle, round_),
        before.name: _exam(circle, before) if known is None else known,
    }


def _exam(circle: Circle, round_: Round) -> float:
    """Share of right answers of the embedded exam."""
    base = circle.shared_base(value="head", **({"policy": circle.policy(round_)} if circle.policy(round_) else {}))
    return demo.run_exam(base, circle.tokenizer).covered
