"""One job in a folder, and its processes know each other."""

import errno
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from datasets import Dataset
from filelock import FileLock

from tests.helpers import FLAGS, QUIET, prompt_dataset
from trl_ext import FeedbackRewardConfig, FeedbackRewardTrainer, PPOConfig, PPOTrainer, runs

ALONE = [variable for pair in runs.LAUNCHED for variable in pair]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ALONE:
        monkeypatch.delenv(variable, raising=False)
    PartialState()  # accelerate looks at the environment once


@pytest.mark.parametrize(
    "variables",
    [
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},  # torchrun, accelerate launch
        {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # srun
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"},
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_one_of_several_does_not_train_alone(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    size, number = next(iter(variables.items()))
    with pytest.raises(ValueError, match=f"^{size} says that {number} processes were started, but accelerate sees"):
        runs.check_processes()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "2"},  # says nothing about this process
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, which runs once
        {"WORLD_SIZE": "two", "RANK": "0"},
    ],
    ids=str,
)
def test_one_process_trains(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    runs.check_processes()


def other_run(folder: Path) -> subprocess.Popen[str]:
    """A process that holds `folder`."""
    code = f"from trl_ext import runs; held = runs.claimed({str(folder)!r}); print('held', flush=True); input()"
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_run_until_that_dies(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    other = other_run(folder)
    try:
        with pytest.raises(ValueError, match="out' is in use by another run: wait for it, stop it first, or name"):
            runs.claimed(folder)
        settings = PPOConfig(str(folder), **QUIET)
        with pytest.raises(ValueError, match="in use by another run"):
            PPOTrainer(str(tmp_path / "no model"), len, settings, prompt_dataset())
        pairs = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
        with pytest.raises(ValueError, match="in use by another run"):
            FeedbackRewardTrainer(str(tmp_path / "no model"), FeedbackRewardConfig(str(folder), **QUIET), pairs)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert runs.claimed(folder) is not None
    assert [path.name for path in folder.iterdir()] == [runs.LOCK], "nothing else was written"


def test_one_process_may_claim_a_folder_twice_and_gives_it_back(tmp_path: Path) -> None:
    first, second = runs.claimed(tmp_path), runs.claimed(tmp_path)
    assert first is not None and first is second

    def is_free() -> bool:
        code = f"from trl_ext import runs; runs.claimed({str(tmp_path)!r})"
        return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

    del first
    assert not is_free()
    del second
    assert is_free()


@pytest.mark.parametrize("seen", [True, False])
def test_every_process_sees_the_folder(seen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here process 1, on a machine of its own, perhaps."""
    state = SimpleNamespace(is_main_process=False, num_processes=2, process_index=1)
    monkeypatch.setattr(runs, "PartialState", lambda: state)
    monkeypatch.setattr(runs, "broadcast_object_list", lambda said: None)
    monkeypatch.setattr(runs, "gather_object", lambda mine: [True, *mine])
    monkeypatch.setattr(runs, "SEEN_WITHIN", 0.2)
    if seen:
        (tmp_path / runs.LOCK).touch()
        assert runs.claimed(tmp_path) is None
        return
    with pytest.raises(ValueError, match=r"of process 0 is not there for process 1: name a folder that all machines"):
        runs.claimed(tmp_path)
    monkeypatch.setattr(runs, "check_processes", lambda: None)
    apart = SimpleNamespace(output_dir=str(tmp_path), save_on_each_node=True)
    assert runs.claimed_by(apart) is None, "for machines that share no disk"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), OSError(errno.EROFS, "Read-only file system")])
def test_a_run_begins_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: OSError
) -> None:
    def acquire(self: FileLock, *args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", acquire)
    assert runs.claimed(tmp_path) is None
    assert "cannot be locked" in caplog.text


@pytest.mark.parametrize("recipe", ["ppo", "reward", "dpo"])
def test_recipes_refuse_both(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read: neither model nor data exist."""
    script = Path(runs.__file__).parents[1] / "recipes" / f"{recipe}_lora.py"
    given = ["--model_name_or_path", "nowhere/no", "--dataset", "none.jsonl", "--output_dir", str(tmp_path), *FLAGS]
    monkeypatch.setattr(sys, "argv", [str(script), *given])
    other = other_run(tmp_path)
    try:
        with pytest.raises(SystemExit, match="is in use by another run"):
            runpy.run_path(str(script), run_name="__main__")
    finally:
        other.kill()
        other.wait()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit, match="SLURM_STEP_NUM_TASKS says that 2 processes were started"):
        runpy.run_path(str(script), run_name="__main__")
