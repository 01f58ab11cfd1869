"""Where a run begins: in a folder that holds none, or at a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from trl_ext.runs import on_main

RUN_FILES = ("trainer_state.json", "adapter_model.safetensors")  # what a run that came to something leaves


def member_folders(args: TrainingArguments, count: int) -> list[str]:
    """Where the reward models of an ensemble go: output_dir itself of one, 0, 1, ... below it of several."""
    return [str(args.output_dir)] if count == 1 else [str(Path(str(args.output_dir)) / str(i)) for i in range(count)]


def checkpoint_of(args: TrainingArguments, ensemble: int = 1) -> str | None:
    """The folder to go on from; None where a run begins. Of an ensemble "true": each member has its own, if it has one.

    Raises:
        FileExistsError: output_dir holds a run already, which is not gone on with.
        FileNotFoundError: there is no checkpoint to go on from.
        ValueError: an ensemble is to go on from one checkpoint.
    """
    folder, wanted = Path(str(args.output_dir)), args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        for place in dict.fromkeys([folder, *map(Path, member_folders(args, ensemble))]):
            if on_main(partial(_holds_a_run, place)):
                raise FileExistsError(
                    f"output_dir {str(folder)!r} holds a run already: give another --output_dir, or go on with that "
                    "run by --resume_from_checkpoint true."
                )
        return None
    if ensemble > 1:
        if str(wanted).lower() != "true":
            raise ValueError(
                f"resume_from_checkpoint is {str(wanted)!r}, but an ensemble has checkpoints for each member: say true."
            )
        return "true"
    found = on_main(partial(last_checkpoint, folder)) if str(wanted).lower() == "true" else str(wanted)
    if found is None:
        raise FileNotFoundError(
            f"output_dir {str(folder)!r} holds no checkpoint to go on from: leave out --resume_from_checkpoint, or "
            "give a checkpoint's folder."
        )
    if not (Path(found) / TRAINER_STATE_NAME).is_file():
        raise FileNotFoundError(
            f"{found!r} is no checkpoint (it has no {TRAINER_STATE_NAME}): give a folder like "
            f"{str(folder / 'checkpoint-100')!r}."
        )
    elsewhere = Path(found).resolve().parent != folder.resolve()
    if elsewhere and on_main(partial(_holds_a_run, folder)):
        raise FileExistsError(
            f"resume_from_checkpoint {found!r} is of another run than the one that output_dir {str(folder)!r} holds, "
            "which would be written over: give another --output_dir."
        )
    return found


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in RUN_FILES) or last_checkpoint(folder) is not None


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in `folder`; None where there is none."""
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
