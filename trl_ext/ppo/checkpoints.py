"""What a PPO run writes and reads: the trained roles, and checkpoints to go on from.

Beside what Transformers saves itself (weights, optimizer, schedule, random numbers, step), a checkpoint holds all that
a run interrupted between two optimizer steps needs to go on exactly: the rollout in use and `Updater.state_dict`, which
has the rollout that was sampled ahead. The order of prompts and minibatches follows from seed and step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.failures import FAILURES, RunError, on_all
from trl_ext.ppo.update import Updater
from trl_ext.random_state import RandomState
from trl_ext.roles.sharding import shared_as, whole
from trl_ext.runs import on_main
from trl_ext.types import Experience, Rollout, ScorePass, Scores

UNFINISHED = "unfinished"  # holds a checkpoint while it is written
TENSORS, TEXTS, NUMBERS = "rollout.safetensors", "rollout.json", "ppo_state.json"
# What steps are counted by, and the settings that it comes from.
SIZES = {
    "rollout_batch_size": "the number of processes, per_device_train_batch_size, gradient_accumulation_steps and "
    "num_mini_batches",
    "steps_per_rollout": "num_ppo_epochs and num_mini_batches",
}
RECORDS = {"rollout": Rollout, "scores": Scores, "score_pass": ScorePass}


class WholeOptimizer:
    """An optimizer over parameters that FSDP2 has shared out, with the state that it would have in a process alone.
    That is gathered here: every process must make one."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer, parts = optimizer, optimizer.state_dict()
        of_parameters = {
            number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in state.items()}
            for number, state in parts["state"].items()
        }
        self._state = {**parts, "state": of_parameters}

    def state_dict(self) -> dict[str, Any]:
        """As the optimizer's, of whole tensors."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, here or elsewhere."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        of_parameters = {
            number: {
                name: shared_as(value, parameters[number]) if isinstance(value, Tensor) else value
                for name, value in own.items()
            }
            for number, own in state["state"].items()
        }
        self._optimizer.load_state_dict({**state, "state": of_parameters})


class Checkpoints:
    """Reads and writes the files of one run.

    Args:
        args: settings.
        updater: whose roles and state are saved.
        accelerator: for the processes to wait for each other.

    Attributes:
        unfinished: where a checkpoint is being written; None while none is.
    """

    def __init__(self, args: PPOConfig, updater: Updater, accelerator: Accelerator) -> None:
        self.args, self.updater, self.accelerator = args, updater, accelerator
        self.unfinished: Path | None = None
        self._numbers: dict[str, Any] = {}
        self._step_end: tuple[RandomState, dict[str, Any]] | None = None
        self._stepping = False
        self._told: Exception | None = None
        self._latest: Path | None = None  # the checkpoint that this training wrote last, or goes on from

    # Files ------------------------------------------------------------------------------------------------------------

    def save_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """The policy as a plain PEFT adapter in `folder`; value/, reward/ and reference/ beside it."""
        self.updater.base.save_roles(folder, policy_folder="")
        if not self.args.should_save:
            return
        tokenizer.save_pretrained(str(folder))
        (folder / "ppo_config.json").write_text(self.args.to_json_string(), encoding="utf-8")

    def save_state(self, folder: Path) -> None:
        """The rollout in use, and the updater's numbers as they were when `written` was entered."""
        if self.args.should_save and self.updater.experience is not None:
            save_experience(self.updater.experience, folder)
            (folder / NUMBERS).write_text(json.dumps(self._numbers), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`.

        Raises:
            ValueError: it holds weights alone, or its rollouts are of another size.
        """
        path = folder / NUMBERS
        numbers = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if folder.is_dir() and not (folder / OPTIMIZER_NAME).is_file():
            raise ValueError(
                f"The checkpoint {str(folder)!r} holds weights alone, as save_only_model has it, and no optimizer to "
                "go on with: give it as the model of a new run, or resume from one that is whole."
            )
        for name, of_checkpoint in numbers.pop("sizes", {}).items():
            if of_checkpoint != (now := self._sizes[name]):
                raise ValueError(
                    f"The checkpoint {str(folder)!r} is of a run with {name} {of_checkpoint}, and this one's is {now}, "
                    f"so that steps would count otherwise: choose {SIZES[name]} so that it stays {of_checkpoint}."
                )
        self.updater.base.load_trained_roles(folder)
        self.updater.load_state_dict(numbers, load_experience(folder))
        self._latest = folder.resolve()

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self.args, name) for name in SIZES}

    def load_best(self, folder: Path) -> None:
        """Put the roles of the checkpoint in `folder` back, and nothing else."""
        self.updater.base.load_trained_roles(folder)

    def folder_of(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    # A checkpoint appears whole, or not at all ------------------------------------------------------------------------

    @contextmanager
    def written(self, state: TrainerState) -> Iterator[None]:
        """Within, Transformers writes the checkpoint into `unfinished`; on exit it moves to its place in one step, so
        that a run that is killed while it writes leaves nothing that could be taken for a checkpoint. Every process
        must enter it.

        Raises:
            OSError: it cannot be written; those before it are as they were.
        """
        final = self.folder_of(state.global_step)
        limit = self.args.save_total_limit
        # Before anything is written: the processes wait for each other here.
        self._numbers = {**self.updater.state_dict(), "sizes": self._sizes}
        self.args.save_total_limit = None  # what is old goes once the new one is there
        self.unfinished = final.parent / UNFINISHED
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        finally:
            unfinished, self.unfinished, self.args.save_total_limit = self.unfinished, None, limit
        self.met(lambda: self._check_written(failure, final, unfinished))
        self.accelerator.wait_for_everyone()
        is_best = state.best_model_checkpoint == str(unfinished / final.name)
        if is_best:
            state.best_model_checkpoint = str(final)

        def move() -> None:
            checkpoint = unfinished / final.name
            if is_best:
                state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
            if final.exists():  # written by an earlier run: out of the way first, gone once the new one is there
                final.replace(unfinished / "old")
            checkpoint.replace(final)
            shutil.rmtree(unfinished)
            rotate_checkpoints(
                output_dir=str(final.parent),
                save_total_limit=limit,
                best_model_checkpoint=state.best_model_checkpoint,
            )

        on_all(lambda: move() if self.args.should_save else None)
        self._latest = final.resolve()

    def met(self, write: Callable[[], None]) -> None:
        """Call `write`. Where it fails on one process it raises on all."""
        on_all(write)

    def _check_written(self, failure: Exception | None, final: Path, unfinished: Path) -> None:
        if failure is None:
            return
        shutil.rmtree(unfinished, ignore_errors=True)
        error = failure.__cause__ if isinstance(failure, RunError) else failure  # None: another process's
        # A full disk is a RuntimeError to torch.save.
        if not isinstance(error, (OSError, SafetensorError, RuntimeError)):
            raise failure
        last = get_last_checkpoint(str(final.parent))
        raise OSError(
            f"{final.name} could not be written to {str(final.parent)!r} ({error}): make room there and "
            + (f"resume from {Path(last).name}, which is whole." if last else "start again.")
        ) from error

    # Nothing is lost where something fails ----------------------------------------------------------------------------

    def note_stepping(self) -> None:
        """The optimizer is about to step: until the step counts, nothing could be saved that belongs together."""
        self._stepping = True

    def note_step_end(self) -> None:
        """Remember what changes before the next step begins, and what a run that resumes from here must start with:
        random numbers (a new epoch's dataloader draws one before its first rollout) and the moments of the scores."""
        self._stepping = False
        self._step_end = RandomState(), self.updater.collector.combination.moments.state_dict()

    def forget_step_end(self) -> None:
        """A training begins, or the best roles are put back: what was noted belongs to others."""
        self._step_end, self._stepping, self._latest = None, False, None

    @contextmanager
    def saved_first(
        self, steps: Callable[[], int], save: Callable[[], None], whole_run: bool = False
    ) -> Iterator[None]:
        """Call `save` when anything fails within: nothing that was trained is lost, and a run that goes on from there
        draws the same completions again.

        Args:
            steps: how many were taken, when it fails.
            save: writes the checkpoint.
            whole_run: within is the whole training, of which nothing is known when it begins.

        Raises:
            Exception: what was raised within, with a sentence on where the run is saved: at the end of its own where it
                is one of `FAILURES`, as a note else. Nothing is saved where one of several processes failed alone.
        """
        if self._step_end is None and not whole_run:
            self.note_step_end()
        try:
            yield
        except Exception as error:
            known_to_all = isinstance(error, FAILURES) or self.accelerator.num_processes == 1
            if error is self._told or not known_to_all:
                raise  # one that failed alone could not save: the others wait elsewhere
            step, sentence = steps(), str(error)
            where = self._saved(step, save)
            if isinstance(error, torch.OutOfMemoryError):
                sentence = (
                    f"Memory ran out over the rollout at step {step}: lower "
                    "local_rollout_forward_batch_size, per_device_train_batch_size or max_completion_length "
                    f"({sentence.split('.')[0]})."
                )
            if isinstance(error, (*FAILURES, torch.OutOfMemoryError)):
                self._told = type(error)(f"{sentence} {where}".strip())
                raise self._told from error.__cause__
            self._told = error
            if where:
                error.add_note(where)
            raise

    def _saved(self, step: int, save: Callable[[], None]) -> str:
        """Save what was trained, unless it is saved already: where, in a sentence; empty where there is nothing."""
        folder = self.folder_of(step)
        if step == 0:
            return ""
        # One of that number may be an earlier run's, or hold weights alone.
        if self._latest != folder.resolve() or not on_main((folder / OPTIMIZER_NAME).is_file):
            if self._step_end is None or self._stepping:
                return ""
            self._back_to_step_end()
            try:
                save()
            except Exception as error:
                return f"The {step} steps before could not be saved ({error})."
        return f"All {step} steps before are saved in {str(folder)!r}: resume from there."

    def _back_to_step_end(self) -> None:
        assert self._step_end is not None
        random_state, moments = self._step_end
        random_state.restore()
        self.updater.collector.combination.moments.load_state_dict(moments)


def save_experience(experience: Experience, folder: Path) -> None:
    """Write `experience` into `folder`: tensors as safetensors, texts as JSON."""
    tensors: dict[str, Tensor] = {}
    texts: dict[str, Any] = {}
    for name, value in _flat(experience):
        if isinstance(value, Tensor):
            tensors[name] = value.contiguous().clone()  # safetensors refuses tensors that share memory
        else:
            texts[name] = value
    save_file(tensors, folder / TENSORS)
    (folder / TEXTS).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def load_experience(folder: Path) -> Experience | None:
    """What `save_experience` wrote into `folder`; None where there is nothing."""
    if not (folder / TENSORS).is_file():
        return None
    values: dict[str, Any] = {
        **load_file(folder / TENSORS),
        **json.loads((folder / TEXTS).read_text(encoding="utf-8")),
    }
    top = {name: value for name, value in values.items() if "." not in name}
    for record, cls in RECORDS.items():
        inside = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{record}.")}
        top[record] = cls(**inside)
    return Experience(**top)


def _flat(record: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every field, nested records taken apart."""
    flat: list[tuple[str, Any]] = []
    for f in fields(record):
        value = getattr(record, f.name)
        flat += _flat(value, f"{prefix}{f.name}.") if is_dataclass(value) else [(prefix + f.name, value)]
    return flat
