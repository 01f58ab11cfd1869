"""Where a run begins: in a folder that holds none, or at a checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

RUN_FILES = ("trainer_state.json", "adapter_model.safetensors")  # what a run that came to something leaves


def checkpoint_of(args: TrainingArguments) -> str | None:
    """The folder to go on from; None where a run begins.

    Raises:
        FileExistsError: output_dir holds a run already, which is not gone on with.
        FileNotFoundError: there is no checkpoint to go on from.
    """
    folder, wanted = Path(str(args.output_dir)), args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        held = folder.is_dir() and any((folder / name).exists() for name in RUN_FILES)
        if args.process_index == 0 and (held or _last_checkpoint(folder)):
            raise FileExistsError(
                f"output_dir {str(folder)!r} holds a run already: give another --output_dir, or go on with that run by "
                "--resume_from_checkpoint true."
            )
        return None
    found = _last_checkpoint(folder) if str(wanted).lower() == "true" else str(wanted)
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
    return found


def _last_checkpoint(folder: Path) -> str | None:
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
