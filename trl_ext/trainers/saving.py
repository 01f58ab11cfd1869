"""What a PPO run writes and reads: the trained roles, and checkpoints to go on from."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from trl_ext.roles.saving import load_trained_roles, save_roles
from trl_ext.trainers.failing import FAILURES
from trl_ext.trainers.state import load_experience, load_numbers, save_experience, save_numbers

UNFINISHED = "unfinished"  # holds a checkpoint while it is written


class RandomState:
    """The random numbers to come, of Python, NumPy and torch, as they were when this was made."""

    def __init__(self) -> None:
        self._python, self._numpy, self._cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Go back to them."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


class Checkpoints:
    """Files of a PPOTrainer; mixed into it, before the base trainer."""

    args: Any
    base: Any
    collector: Any
    updater: Any
    metrics: Any
    state: Any
    accelerator: Any
    _writing: Path | None = None  # where a checkpoint is being written
    _step_end: tuple[RandomState, dict[str, Any]] | None = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The policy as a plain PEFT adapter in `output_dir`; value/, reward/ and reference/ beside it."""
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save_roles(self.base, folder, policy_folder="")
        self.processing_class.save_pretrained(str(folder))  # type: ignore[attr-defined]
        (folder / "ppo_config.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        numbers = self._numbers()  # every process takes part
        if self.args.should_save and self.experience is not None:
            save_experience(self.experience, Path(output_dir))
            save_numbers(numbers, Path(output_dir))

    def _numbers(self) -> dict[str, Any]:
        return {
            "updater": self.updater.state_dict(),
            "reward_moments": self.collector.combination.moments.state_dict(),
            "metrics": self.metrics.state_dict(),
            "rollout_metrics": self.rollout_metrics,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_trained_roles(self.base, folder)
        self.experience = load_experience(folder)
        numbers = load_numbers(folder)
        if numbers:
            self.updater.load_state_dict(numbers["updater"])
            self.collector.combination.moments.load_state_dict(numbers["reward_moments"])
            self.metrics.load_state_dict(numbers["metrics"], keep=self.args.process_index == 0)
            self.rollout_metrics = numbers["rollout_metrics"]

    @property
    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _note_step_end(self) -> None:
        """What moves between here and the next step, and must not have moved for a run that goes on from here: random
        numbers (a new epoch's dataloader draws one before its first rollout), the moments of scores."""
        self._step_end = RandomState(), self.collector.combination.moments.state_dict()

    def _back_to_step_end(self) -> None:
        assert self._step_end is not None
        random_state, moments = self._step_end
        random_state.restore()
        self.collector.combination.moments.load_state_dict(moments)

    @contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        """Write a checkpoint when a generator, a reward function or a callback fails, or memory runs out over a
        rollout: nothing that was trained is lost, and a run that goes on from it draws the same answers again."""
        if self._step_end is None:
            self._note_step_end()
        try:
            yield
        except FAILURES as error:
            said = str(error)
            if isinstance(error, torch.OutOfMemoryError):
                said = (
                    f"Memory ran out over the rollout at step {self.state.global_step}: lower "
                    "local_rollout_forward_batch_size, per_device_train_batch_size or max_completion_length "
                    f"({said.split('.')[0]})."
                )
            if self.state.global_step == 0:
                raise type(error)(said) from error.__cause__
            folder = self._checkpoint_folder
            if not folder.exists():
                self._back_to_step_end()
                self._save_checkpoint(self.model, trial=None)  # type: ignore[attr-defined]
            raise type(error)(
                f"{said} All {self.state.global_step} steps before are saved in {str(folder)!r}: resume from there."
            ) from error.__cause__

    def _load_best_model(self) -> None:
        load_trained_roles(self.base, Path(str(self.state.best_model_checkpoint)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint beside its place and move it there in one step: a run that is killed while it writes
        leaves nothing that could be taken for a checkpoint.

        Raises:
            OSError: it cannot be written; those before it are as they were.
        """
        self.create_model_card()  # type: ignore[attr-defined]
        final = self._checkpoint_folder
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # what is old goes once the new one is there
        self._writing = Path(self.args.output_dir) / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
            shutil.rmtree(self._writing, ignore_errors=True)
            last = get_last_checkpoint(str(final.parent))
            raise OSError(
                f"{final.name} could not be written to {str(final.parent)!r} ({error}): make room there and "
                + (f"resume from {Path(last).name}, which is whole." if last else "start again.")
            ) from error
        finally:
            written, self._writing, self.args.save_total_limit = self._writing / final.name, None, limit
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if final.exists():
                shutil.rmtree(final)
            written.replace(final)
            shutil.rmtree(written.parent)
            if self.args.push_to_hub:
                super()._push_from_checkpoint(str(final))  # type: ignore[misc]
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing while a checkpoint is written: it would be uploaded from a place that it leaves."""

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return folder if self._writing is None else str(self._writing)
