"""Several reward models of the same feedback: their settings, their folders, and how often two agree."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import QUIET
from trl_ext import FeedbackRewardConfig, launch
from trl_ext.feedback import ScoredAnswer
from trl_ext.launch.ensembles import agreement


def scored(*scores: float, prompts: str) -> list[ScoredAnswer]:
    return [ScoredAnswer(prompt, 0.0, score, 1) for prompt, score in zip(prompts, scores, strict=True)]


def test_agreement() -> None:
    """Of the pairs of prompt a (three) and b (one), two are ordered alike, and one is a tie of one model alone."""
    one = scored(1.0, 2.0, 3.0, 5.0, 4.0, 9.0, prompts="aaabbc")
    other = scored(10.0, 30.0, 30.0, 0.0, 1.0, 9.0, prompts="aaabbc")
    assert agreement(one, other) == 2 / 4
    assert agreement(one, one) == 1.0
    assert math.isnan(agreement(one[-1:], other[-1:])), "no two answers to a prompt"


def settings(folder: Path, **changes: Any) -> FeedbackRewardConfig:
    return FeedbackRewardConfig(output_dir=str(folder), **{**QUIET, "bf16": False, **changes})


def test_each_member_has_a_seed_and_a_folder_of_its_own(tmp_path: Path) -> None:
    args = settings(tmp_path, seed=5, data_seed=7)
    drawn = []
    for i, own in enumerate(launch.unfinished(launch.members(args, 3))):
        assert (own.seed, own.data_seed, own.output_dir) == (5 + i, 7 + i, str(tmp_path / str(i)))
        drawn.append(torch.rand(3))
    assert [not torch.equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2))] == [True] * 3
    assert (args.seed, args.data_seed, args.output_dir) == (5, 7, str(tmp_path))
    two = launch.members(settings(tmp_path / "judges", hub_model_id="me/judge"), 2)
    assert [(own.data_seed, own.hub_model_id) for own in two] == [(None, "me/judge-0"), (None, "me/judge-1")]
    two = launch.members(settings(tmp_path / "judges"), 2)
    assert [own.hub_model_id for own in two] == ["judges-0", "judges-1"]


def test_one_is_the_run_itself(tmp_path: Path) -> None:
    args = settings(tmp_path)
    assert [own is args for own in launch.members(args, 1)] == [True]
    assert [own is args for own in launch.unfinished([args])] == [True]


def test_another_runs_checkpoint_overwrites_no_run(tmp_path: Path) -> None:
    for run in "ab":
        (tmp_path / run / "checkpoint-4").mkdir(parents=True)
        (tmp_path / run / "checkpoint-4" / "trainer_state.json").write_text("{}", encoding="utf-8")
    other = str(tmp_path / "b" / "checkpoint-4")
    with pytest.raises(FileExistsError, match=r"is of another run than the one that output_dir .* holds"):
        launch.resuming.checkpoint_of(settings(tmp_path / "a", resume_from_checkpoint=other))
    for folder in ("b", "new"):
        assert launch.resuming.checkpoint_of(settings(tmp_path / folder, resume_from_checkpoint=other)) == other


def test_going_on_leaves_out_what_was_finished(tmp_path: Path) -> None:
    args = settings(tmp_path, resume_from_checkpoint="true")
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "trainer_state.json").write_text("{}", encoding="utf-8")
    (tmp_path / "1" / "checkpoint-4").mkdir(parents=True)
    rest = list(launch.unfinished(launch.members(args, 3)))
    assert [(own.output_dir, own.resume_from_checkpoint) for own in rest] == [
        (str(tmp_path / "1"), str(tmp_path / "1" / "checkpoint-4")),
        (str(tmp_path / "2"), None),
    ]


def test_refusals_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ensemble is 0: it must be at least 1"):
        launch.RewardArguments("demo", ensemble=0)
    with pytest.raises(ValueError, match="an ensemble has checkpoints for each member: say true"):
        launch.resuming.checkpoint_of(settings(tmp_path, resume_from_checkpoint="x/checkpoint-2"), ensemble=2)
