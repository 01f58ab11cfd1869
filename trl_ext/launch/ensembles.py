"""Several reward models of the same feedback: one after the other trained, side by side judged."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from trl_ext.feedback import ScoredAnswer, judge
from trl_ext.launch.data import DataArguments
from trl_ext.launch.judging import scored_answers
from trl_ext.launch.resuming import last_checkpoint, member_folders
from trl_ext.launch.screen import show_table
from trl_ext.roles import SharedBase
from trl_ext.runs import on_main

_Args = TypeVar("_Args", bound=TrainingArguments)


@dataclass
class RewardArguments(DataArguments):
    """What recipes/reward_lora.py needs beside the trainer's settings."""

    ensemble: int = field(
        default=1, metadata={"help": "How many reward models to train, which differ in their seed: OUT/0, OUT/1, ..."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ensemble < 1:
            raise ValueError(f"ensemble is {self.ensemble}: it must be at least 1.")


def members(args: _Args, count: int) -> list[_Args]:
    """The settings of each reward model of an ensemble: `args` themselves of one; of several a copy each, with a seed,
    a folder and a name on the Hub of its own.

    All read the same feedback, each in an order of its own, from a LoRA and a head of its own, as in Coste et al. 2023
    (arXiv:2310.02743) and Lakshminarayanan et al. 2017 (arXiv:1612.01474). No member reads a bootstrap sample, which
    would leave out a third of the feedback.
    """
    if count == 1:
        return [args]
    made = []
    for i, folder in enumerate(member_folders(args, count)):
        own = copy.copy(args)
        own.output_dir, own.seed = folder, args.seed + i
        own.data_seed = None if args.data_seed is None else args.data_seed + i
        own.hub_model_id = f"{args.hub_model_id or Path(str(args.output_dir)).name}-{i}"
        made.append(own)
    return made


def unfinished(members: Sequence[_Args]) -> Iterator[_Args]:
    """Those of several that an interrupted run had not finished, one after the other as they are trained, each to go on
    from its last checkpoint; one alone as it is."""
    for i, own in enumerate(members):
        if len(members) > 1:
            folder = Path(str(own.output_dir))
            if own.resume_from_checkpoint is not None:
                if on_main((folder / TRAINER_STATE_NAME).is_file):
                    continue
                own.resume_from_checkpoint = on_main(partial(last_checkpoint, folder))
            if own.process_index == 0:
                print(f"Reward model {i + 1} of {len(members)}, seed {own.seed}, into {folder}", flush=True)
        yield own


def held_out_loss(folders: Sequence[str]) -> float:
    """The mean of the losses that the finished runs in `folders` were last evaluated to have."""
    PartialState().wait_for_everyone()  # the main process has just written them
    histories = [TrainerState.load_from_json(str(Path(folder) / TRAINER_STATE_NAME)).log_history for folder in folders]
    return fmean(next(row["eval_loss"] for row in reversed(rows) if "eval_loss" in row) for rows in histories)


def show_members(
    base: SharedBase, tokenizer: PreTrainedTokenizerBase, pairs: Dataset, batch_size: int = 32
) -> dict[str, str]:
    """Print how well each of several reward roles orders held-out pairs, and how often it agrees with each other one.

    Returns:
        Both for the outcome of a run; nothing where there is one reward role.
    """
    if len(base.reward_roles) < 2:
        return {}
    answers = [scored_answers(base, tokenizer, pairs, batch_size, role) for role in base.reward_roles]
    accuracies = [judge(own).shown("pair_accuracy", ".1%") for own in answers]
    shares = {(i, j): agreement(answers[i], answers[j]) for i, j in combinations(range(len(answers)), 2)}
    rows = [
        [role, accuracy, *(f"{shares[min(i, j), max(i, j)]:.1%}" if i != j else "" for j in range(len(answers)))]
        for i, (role, accuracy) in enumerate(zip(base.reward_roles, accuracies, strict=True))
    ]
    title = "The reward models on held-out pairs: accuracy, and share on which two agree"
    show_table(title, ["", "Accuracy", *base.reward_roles], rows)
    return {
        "accuracy of each": ", ".join(accuracies),
        "two agree on": f"{fmean(shares.values()):.1%} of held-out pairs",
    }


def agreement(one: Sequence[ScoredAnswer], other: Sequence[ScoredAnswer]) -> float:
    """Of the pairs of answers to one prompt, the share that two reward models put in the same order; NaN where there
    are no pairs. The two have scored the same answers."""
    groups: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    for a, b in zip(one, other, strict=True):
        groups[a.prompt].append((a.score, b.score))
    alike = [
        (first[0] - second[0]) * (first[1] - second[1]) > 0 or first == second
        for scores in groups.values()
        for first, second in combinations(scores, 2)
    ]
    return fmean(alike) if alike else float("nan")
