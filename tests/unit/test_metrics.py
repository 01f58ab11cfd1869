"""Metrics between two logs, and the table of completions."""

import sys
import types
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from tests.helpers import rollout
from trl_ext.ppo import metrics as module
from trl_ext.ppo.completions import completions_table, print_completions, save_completions, track_completions
from trl_ext.ppo.metrics import Metrics
from trl_ext.types import Experience, ScorePass, Scores, as_text

NAN = float("nan")


def test_a_mean_is_over_tokens_and_not_over_batches() -> None:
    metrics = Metrics()
    metrics.add_tokens({"x": torch.tensor([[1.0, NAN], [2.0, 3.0]])}, torch.tensor([[True, False], [True, True]]))
    metrics.add_tokens({"x": torch.tensor([[10.0]])}, torch.tensor([[True]]))
    assert metrics.drain() == {"x": 4.0}  # (1 + 2 + 3 + 10) / 4


def test_bool_and_half_precision_values() -> None:
    metrics = Metrics()
    mask = torch.tensor([[True, True, True]])
    clipped, ratio = (
        torch.tensor([[True, False, False]]),
        torch.full((1, 3), 0.5, dtype=torch.bfloat16, requires_grad=True),
    )
    metrics.add_tokens({"clipped": clipped, "ratio": ratio}, mask)
    assert metrics.drain() == pytest.approx({"clipped": 1 / 3, "ratio": 0.5})


def test_sums_of_many_tokens_keep_their_digits() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.add_tokens(
            {"x": torch.full((1, 1000), 0.1, dtype=torch.float64)}, torch.ones(1, 1000, dtype=torch.bool)
        )
    assert metrics.drain()["x"] == pytest.approx(0.1, rel=1e-12)


def test_values_and_rollouts_are_averaged_and_draining_empties() -> None:
    metrics = Metrics()
    metrics.add_value("v", 1.0)
    metrics.add_value("v", 4.0)
    metrics.add_rollout({"r": 1.0, "s": 5.0})
    metrics.add_rollout({"r": 2.0})
    assert metrics.drain() == {"v": 2.5, "r": 1.5, "s": 5.0}
    assert metrics.drain() == {}


def test_no_tokens_at_all() -> None:
    metrics = Metrics()
    metrics.add_tokens({"x": torch.tensor([[NAN]])}, torch.tensor([[False]]))
    assert metrics.drain() == {"x": 0.0}


def test_processes_add_up_token_by_token_and_share_the_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process saw three tokens of sum 30, and a metric that this one never had."""
    other = {"x": [30.0, 3.0], "theirs": [8.0, 2.0]}
    monkeypatch.setattr(module, "gather_object", lambda mine: [*mine, other])
    metrics = Metrics()
    metrics.add_tokens({"x": torch.tensor([[2.0]])}, torch.tensor([[True]]))
    metrics.add_rollout({"r": 7.0})
    assert metrics.drain() == {"x": 8.0, "theirs": 4.0, "r": 7.0}


# Completions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def experience() -> Experience:
    answers = rollout([2, 1], [False, True])
    zeros = torch.zeros(2, 2)
    pass_ = ScorePass(
        torch.tensor([[-1.0, -2.0], [-0.5, NAN]]), zeros, torch.tensor([[-1.5, -1.0], [-1.0, NAN]]), zeros, zeros[:, 0]
    )
    scores = Scores(torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 0.5], [-3.0, 1.0]]))
    return Experience(answers, scores, pass_, zeros, zeros, answers.completion_mask, zeros, zeros)


def test_one_row_a_completion(experience: Experience) -> None:
    assert completions_table(experience, ["a", "b"], step=3).to_pydict() == {
        "step": [3, 3],
        "prompt": ["prompt 0", "prompt 1"],
        "completion": ["completion 0", "completion 1"],
        "score": [1.0, -2.0],
        "reward/a": [0.5, -3.0],
        "reward/b": [0.5, 1.0],
        "kl": [-0.5, 0.5],
        "tokens": [2, 1],
        "ended": [False, True],
    }


@pytest.mark.parametrize(
    ("extra", "kept"),
    [
        ([{"note": ["x", "y"]}], {"note": ["x", "y"]}),
        ([{"note": ["x"]}, {"note": ["y"]}], {"note": ["x", "y"]}),  # two processes, one row each
        ([{"note": ["x", "y", "z"]}, {}], {}),  # not one a completion
        ([{"note": [1, "a"]}], {"note": ["1", "a"]}),
        ([{"note": [None, {"a": 1}]}, {}], {"note": [None, {"a": 1}]}),
        ([{"note": [2**70, 1]}, {}], {"note": [str(2**70), "1"]}),
    ],
)
def test_columns_from_reward_functions(
    experience: Experience, extra: list[dict[str, list[Any]]], kept: dict[str, list[Any]]
) -> None:
    table = completions_table(experience, ["a", "b"], 0, extra)
    assert table.drop(completions_table(experience, ["a", "b"], 0).column_names).to_pydict() == kept


def test_saved_where_trl_saves_them(experience: Experience, tmp_path: Path) -> None:
    table = completions_table(experience, ["a", "b"], 7)
    path = save_completions(table, str(tmp_path / "run"), 7)
    assert path == tmp_path / "run" / "completions" / "completions_00007.parquet"
    assert pd.read_parquet(path).to_dict("list") == table.to_pydict()


def test_print_shows_so_many_rows_and_takes_text_literally(
    experience: Experience, capsys: pytest.CaptureFixture[str]
) -> None:
    table = completions_table(experience, ["a", "b"], 0)
    place = table.column_names.index("completion")
    table = table.set_column(place, "completion", [["[/b] [bold]x", "unseen"]])
    print_completions(table, rows=1, title="Step 0")
    printed = capsys.readouterr().out
    assert "[/b] [bold]x" in printed
    assert "1.00" in printed
    assert "-0.50" in printed
    assert "unseen" not in printed


def test_print_has_a_column_a_function_where_there_are_several(
    experience: Experience, capsys: pytest.CaptureFixture[str]
) -> None:
    table = completions_table(experience, ["likes", "hates"], 0)
    print_completions(table, rows=2, title="Step 0")
    printed = capsys.readouterr().out
    assert "likes" in printed and "hates" in printed
    assert all(f"{value:.2f}" in printed for value in table["reward/hates"].to_pylist())
    print_completions(table.drop_columns("reward/hates"), rows=2, title="Step 0")
    assert "likes" not in capsys.readouterr().out


def test_trackers_that_are_reported_to_get_the_table(experience: Experience, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, Any]] = []

    def tracker(name: str, run: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            run=run, Table=lambda dataframe: dataframe, log=lambda row: told.append((name, row))
        )

    table = completions_table(experience, ["a", "b"], 0)
    monkeypatch.setitem(sys.modules, "trackio", tracker("trackio", None))
    monkeypatch.setitem(sys.modules, "wandb", tracker("wandb", object()))
    track_completions(table, [])
    track_completions(table, ["tensorboard", "wandb", "trackio"])
    assert [(name, list(row)) for name, row in told] == [("wandb", ["completions"]), ("trackio", ["completions"])]
    assert all(row["completions"].to_dict("list") == table.to_pydict() for _, row in told)
    monkeypatch.setitem(sys.modules, "wandb", tracker("wandb", None))  # was never started: WANDB_MODE=disabled
    track_completions(table, ["wandb"])
    assert len(told) == 2


def test_text_of_a_conversation_is_its_last_message() -> None:
    assert as_text("a") == "a"
    assert as_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"


def test_sums_from_a_checkpoint_go_on_where_training_computes() -> None:
    """They come back on the CPU. ("meta" stands for a GPU: it mixes with no other device either.)"""
    before, after = Metrics(), Metrics()
    before.add_value("loss", 1.0)
    after.load_state_dict(before.state_dict())
    after.add_value("loss", torch.tensor(2.0, device="meta"))
    after.add_tokens({"loss": torch.ones(2, 3, device="meta")}, torch.ones(2, 3, dtype=torch.bool, device="meta"))
    assert after._local["loss"].device.type == "meta"
