"""Events of a PPO update, in the order of the sentence: rollout, scores, rewards, advantages, epochs, end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_ext.types import Experience, Judged, Rollout, Shaped

_Record = TypeVar("_Record")


@dataclass
class PPOControl(TrainerControl):
    """TRL's and Transformers' switches, and one more.

    Attributes:
        should_update_stop: train no more on the rollout in use; the next optimizer steps that would have are passed
            over. Set back at the next rollout.
    """

    should_update_stop: bool = False


@dataclass(frozen=True)
class EpochStats:
    """What one pass over the rollout did, averaged over its real tokens and all processes.

    Attributes:
        epoch: which pass it was, from 0.
        approxkl: KL between the policy that sampled and the one in training, nats a token (k2).
        clipfrac: share of tokens whose policy gradient was clipped away.
        ratio: probability ratio.
        entropy: nats a token.
        policy_loss, value_loss: the losses; value_loss is NaN where no value role is trained.
        skipped: minibatches of this pass that were not stepped on.
    """

    epoch: int
    approxkl: float
    clipfrac: float
    ratio: float
    entropy: float
    policy_loss: float
    value_loss: float
    skipped: int


class RolloutCallback(TrainerCallback):
    """A TrainerCallback that also hears PPO's own events; override the ones you need.

    Every event gets `args` (PPOConfig), `state` (TrainerState), `control` (PPOControl) and frozen records (see
    `trl_ext.types`, which gives every shape). An event that comes with a record may return another in its place, made
    with `dataclasses.replace`; the next callback in the list and everything after it see the new one. None changes
    nothing. Set `control.should_update_stop` to end the epochs of this update, `control.should_training_stop` to end
    the training after the optimizer step under way.

    With several processes, `on_rollout_end` sees this process's answers; all later events see those of all
    processes, alike on each, and must come to the same result on each.
    """

    def on_rollout_end(self, args: Any, state: TrainerState, control: PPOControl, rollout: Rollout) -> Rollout | None:
        """The policy has answered; nobody has judged yet."""

    def on_scores(self, args: Any, state: TrainerState, control: PPOControl, judged: Judged) -> Judged | None:
        """Reward functions and roles have spoken: scores by function, log-probabilities, values."""

    def on_rewards(self, args: Any, state: TrainerState, control: PPOControl, shaped: Shaped) -> Shaped | None:
        """Each token has its reward, KL included."""

    def on_advantages(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience
    ) -> Experience | None:
        """Each token has its advantage and its return: what is about to be trained on."""

    def on_ppo_epoch_end(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience, stats: EpochStats
    ) -> None:
        """One pass over the rollout is through."""

    def on_update_end(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """The last pass is through. `metrics` describe the rollout, under the names that are logged."""

    def on_evaluation_end(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """The evaluation's prompts have been answered and judged, always with the same random numbers."""


class CallbackError(ValueError):
    """A callback raised, or returned something unusable; the message names it, and what to do."""


class RolloutEvents:
    """Hands PPO's events to those callbacks of a trainer that listen.

    Args:
        trainer: anything with `callback_handler`, `args`, `state` and `control`.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def replace(self, event: str, record: _Record) -> _Record:
        """Let each callback see `record`, the one after it what it returned, and give back the last.

        Raises:
            CallbackError: a callback raised, or returned something that is no such record, or of another shape.
        """
        for callback in self._listening():
            returned = self._call(callback, event, record)
            if returned is not None:
                _check_same(record, returned, f"{type(callback).__name__}.{event}")
                record = returned
        return record

    def tell(self, event: str, *what: Any) -> None:
        """Let each callback see `what`.

        Raises:
            CallbackError: a callback raised.
        """
        for callback in self._listening():
            self._call(callback, event, *what)

    def _listening(self) -> Sequence[RolloutCallback]:
        return [cb for cb in self._trainer.callback_handler.callbacks if isinstance(cb, RolloutCallback)]

    def _call(self, callback: RolloutCallback, event: str, *what: Any) -> Any:
        args: TrainingArguments = self._trainer.args
        try:
            return getattr(callback, event)(args, self._trainer.state, self._trainer.control, *what)
        except Exception as error:
            raise CallbackError(f"{type(callback).__name__}.{event} raised {type(error).__name__}: {error}.") from error


def _check_same(before: Any, after: Any, where: str, path: str = "") -> None:
    """Refuse a returned record that is of another class, or holds tensors of other shapes or lists of other lengths."""
    if type(after) is not type(before):
        raise CallbackError(
            f"{where} returned {path or 'a record'} of type {type(after).__name__}, not {type(before).__name__}: "
            "return dataclasses.replace(...) of what it was given, or None."
        )
    if isinstance(before, Tensor):
        if after.shape != before.shape or after.dtype != before.dtype:
            raise CallbackError(
                f"{where} returned {path} as {tuple(after.shape)} {after.dtype}, not {tuple(before.shape)} "
                f"{before.dtype}: keep shape and type."
            )
        if after.dtype.is_floating_point and bool((~after.isfinite() & before.isfinite()).any()):
            row = int((~after.isfinite() & before.isfinite()).nonzero()[0, 0])
            raise CallbackError(f"{where} returned {path} with a number that is not finite in row {row}.")
    elif isinstance(before, list):
        if len(after) != len(before):
            raise CallbackError(f"{where} returned {len(after)} {path}, not {len(before)}: keep one entry a row.")
    else:
        for f in fields(before):
            _check_same(getattr(before, f.name), getattr(after, f.name), where, f"{path}.{f.name}" if path else f.name)
