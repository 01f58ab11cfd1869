"""A job's folder: one writes into it at a time, files whole and without secrets, and its processes know each other."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

SECRETS = ("hub_token", "push_to_hub_token", "token", "use_auth_token", "api_key")
SEEN_WITHIN = 30.0  # seconds until a file that one process wrote is there for another
LOCK = "_run.lock"  # what begins with "_" Transformers leaves out where it uploads output_dir
# What tells a process that it is one of several, and which: of torchrun and accelerate, of SLURM's srun (a batch script
# has no STEP_NUM_TASKS), of MPI.
LAUNCHED = (
    ("WORLD_SIZE", "RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)


def launched_as_one_of() -> tuple[str, int]:
    """How many processes the environment says that there are of this job, and the variable that says so; 1 where it
    says nothing."""
    for size, rank in LAUNCHED:
        number = os.environ.get(size, "")
        if number.isdecimal() and int(number) > 1 and rank in os.environ:
            return size, int(number)
    return "", 1


def check_processes() -> None:
    """Refuse to train alone in a process that is one of several: each would be a run of its own.

    Raises:
        ValueError: the environment speaks of several processes, and accelerate of one.
    """
    variable, count = launched_as_one_of()
    if count > 1 and PartialState().num_processes == 1:
        raise ValueError(
            f"{variable} says that {count} processes were started, but accelerate sees this one alone, so each would "
            "train a run of its own: on a CPU set use_cpu to true and leave out FSDP and DeepSpeed, which need GPUs; "
            f"else start one process, or unset {variable} where they are meant to be different runs."
        )


def claimed(folder: str | Path, shared: bool = True) -> FileLock | None:
    """Claim a folder for this job, for as long as what is returned lives, and no longer than the process. Whatever else
    this process claims it for shares the claim. Every process of a job must call it; the main one holds the lock.

    Returns:
        The lock; None on other processes, and where the folder's file system has no locks.

    Raises:
        ValueError: another job holds it, or not every process sees it.
    """
    lock: FileLock | None = None
    is_free = [True]
    if PartialState().is_main_process:
        try:
            lock = _lock(Path(folder))
        except Timeout:
            is_free = [False]
    if PartialState().num_processes > 1:
        broadcast_object_list(is_free)
    if not is_free[0]:
        raise ValueError(
            f"{str(folder)!r} is in use by another run: wait for it, stop it first, or name another output_dir."
        )
    if shared:
        _check_shared(Path(folder), there=lock is not None)
    return lock


def _check_shared(folder: Path, there: bool) -> None:
    """Refuse a folder that the main process writes into and another process does not see: what it saves could not be
    loaded there.

    Args:
        there: of the main process, whether the lock is.

    Raises:
        ValueError: another process does not see it.
    """
    if PartialState().num_processes == 1 or not any(gather_object([there])):
        return
    waited = 0.0
    while not os.path.exists(folder / LOCK) and waited < SEEN_WITHIN:  # a network's file system may lag behind
        time.sleep(0.1)
        waited += 0.1
    blind = [number for number, seen in enumerate(gather_object([os.path.exists(folder / LOCK)])) if not seen]
    if blind:
        raise ValueError(
            f"output_dir {str(folder.absolute())!r} of process 0 is not there for process "
            f"{', '.join(map(str, blind))}: name a folder that all machines share."
        )


class MainFailed(RuntimeError):
    """What the other processes raise where the main one failed."""


def on_main(work: Callable[[], Result]) -> Result:
    """What the main process made, on all processes: for what costs money or time, or may come out otherwise the second
    time. Every process must call it; where the work fails, it fails on all of them.

    Raises:
        MainFailed: it failed on the main process, which raises its own error.
    """
    if PartialState().num_processes == 1:
        return work()
    shared: list[Any] = [None, ""]  # what was made, and what went wrong
    try:
        if PartialState().is_main_process:
            shared[0] = work()
    except BaseException as error:
        shared[1] = f"{type(error).__name__}: {error}"
        raise
    finally:
        broadcast_object_list(shared)
    if shared[1]:
        raise MainFailed(f"the main process failed: {shared[1]}")
    return cast("Result", shared[0])


def write_whole(file: Path, text: str) -> None:
    """Write a file that is never there by half."""
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


def without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as others may read them, since run.json is pushed along with the model; also of those that lie together
    under one name, as a loop's do, or what a model is loaded with."""
    return {
        name: without_secrets(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in SECRETS
    }


def claimed_by(args: Any) -> FileLock | None:
    """The claim of a training with these `TrainingArguments`: see `check_processes` and `claimed`."""
    check_processes()
    return claimed(str(args.output_dir), shared=not args.save_on_each_node)


def _lock(folder: Path) -> FileLock | None:
    """The folder's lock, held; None where there is none to have.

    Raises:
        Timeout: somebody else holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One object a folder in a process. It gives the lock back when nobody refers to it any more, and the system
        # does when the process dies, of SIGKILL too.
        lock = FileLock(folder / LOCK, timeout=0, thread_local=False, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): see that no other run writes into it.", folder, error)
        return None
    return lock
