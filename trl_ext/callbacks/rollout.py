"""Events of a PPO update, in the order in which they happen: rollout, scores, rewards, advantages, update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from trl_ext.types import Experience, Rollout, ScoredRollout, ShapedRollout

_Record = TypeVar("_Record")
_Result = TypeVar("_Result")


@dataclass
class PPOControl(TrainerControl):
    """Transformers' switches, and one more.

    Attributes:
        should_update_stop: train no more on the rollout in use: its remaining optimizer steps are skipped. Set back at
            the next rollout.
    """

    should_update_stop: bool = False


def share_switches(control: TrainerControl) -> None:
    """What a callback switched on on one process is on on each: one that stopped, saved or evaluated alone would leave
    the others waiting for ever. Every process must call it, after each event."""
    mine = [name for name, on in vars(control).items() if name.startswith("should_") and on]
    for theirs in gather_object([mine]):
        for name in theirs:
            setattr(control, name, True)


@dataclass(frozen=True)
class EpochStats:
    """What one epoch over the rollout did, averaged over its real tokens and all processes.

    Attributes:
        epoch: which one it was, from 0.
        approxkl: KL between the policy that sampled and the one in training, nats per token (k2).
        clipfrac: share of tokens whose policy gradient was clipped away.
        ratio: probability ratio.
        entropy: nats per token.
        policy_loss, value_loss: the losses; value_loss is NaN where no value role is trained.
        skipped: minibatches of this epoch that a guard refused; those after an early stop do not count.
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

    Every event comes with `args` (PPOConfig), `state` (TrainerState), `control` (PPOControl) and frozen records (see
    `trl_ext.types`, which gives every shape). A method may take some of these alone, by their names, as in `def
    on_scores(self, judged)`; the signature is checked when the callback is added. An event that comes with a record may
    return another in its place, made with `dataclasses.replace`; the next callback in the list and everything after it
    see the new one. None changes nothing. Set `control.should_update_stop` to end the epochs of this update,
    `control.should_training_stop` to end the training after the optimizer step under way.

    With several processes, `on_rollout_end` sees this process's completions; all later events see those of all
    processes, the same on each, and must come to the same result on each. A switch that one process sets holds on all.
    """

    def on_rollout_end(self, args: Any, state: TrainerState, control: PPOControl, rollout: Rollout) -> Rollout | None:
        """The policy has written its completions; nothing is scored yet."""

    def on_scores(
        self, args: Any, state: TrainerState, control: PPOControl, judged: ScoredRollout
    ) -> ScoredRollout | None:
        """The completions have their scores by function, log-probabilities and values."""

    def on_rewards(
        self, args: Any, state: TrainerState, control: PPOControl, shaped: ShapedRollout
    ) -> ShapedRollout | None:
        """Each token has its reward, KL included."""

    def on_advantages(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience
    ) -> Experience | None:
        """Each token has its advantage and its return: what is about to be trained on."""

    def on_update_begin(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """The rollout is about to be trained on. `metrics` describe it, under the names that are logged: all that can
        be known of it before a weight changes."""

    def on_ppo_epoch_end(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience, stats: EpochStats
    ) -> None:
        """One epoch over the rollout has ended."""

    def on_update_end(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """The last epoch has ended. `metrics` are those of `on_update_begin`."""

    def on_evaluation_end(
        self, args: Any, state: TrainerState, control: PPOControl, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """The evaluation's prompts have their completions and scores, always with the same random numbers."""


class CallbackError(ValueError):
    """A callback raised, or returned something unusable; the message names it, and what to do."""


class Host(Protocol):
    """What has callbacks: a trainer of Transformers."""

    args: Any
    state: TrainerState
    control: Any
    callback_handler: Any


EVENTS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(method).parameters)[1:]
    for name, method in vars(RolloutCallback).items()
    if name.startswith("on_")
}
"""Each event of `RolloutCallback` and the names of what it comes with, in their order."""


def check_events(callback: TrainerCallback) -> None:
    """Refuse a callback whose methods cannot take what their events come with.

    A method names the arguments that it wants, in any order, or takes all of them under names of its own.

    Raises:
        TypeError: names the method and the argument.
    """
    if isinstance(callback, RolloutCallback):
        for event in EVENTS:
            _arguments(callback, event)


def _arguments(callback: RolloutCallback, event: str) -> tuple[str, ...] | None:
    """Names of the arguments that `callback` takes of `event`; None: all, by position."""
    offered, method, name = EVENTS[event], getattr(callback, event), f"{type(callback).__name__}.{event}"
    if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method) or not callable(method):
        raise TypeError(f"{name} must be an ordinary method, neither async nor a generator, for nobody awaits it.")
    signature = inspect.signature(method)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    named = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    foreign = [p.name for p in named if p.default is p.empty and p.name not in offered]
    by_name = offered if inspect.Parameter.VAR_KEYWORD in kinds else [p.name for p in named if p.name in offered]
    if not foreign and kinds.isdisjoint({inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}):
        return tuple(by_name)
    try:
        signature.bind(*offered)
    except TypeError as error:
        what = f"asks for {foreign[0]!r}, which this event does not come with" if foreign else f"fails ({error})"
        raise TypeError(f"{name} {what}: take {', '.join(offered)}, or some of these by their names.") from error
    return None  # all of them, under names of its own


class RolloutEvents:
    """Hands PPO's events to a trainer's `RolloutCallback`s: one method per event, under the same name.

    An event with a record gives back what the last callback made of it.

    Args:
        host: the trainer.
        together: makes an error on one process an error on all.
        vocabulary: ids that the model has; None: any.

    Raises:
        CallbackError: each event, where a callback raised, or returned something that is no such record, or of another
            shape, or with ids that the model does not have.
    """

    def __init__(
        self,
        host: Host,
        together: Callable[[Callable[[], Any]], Any] = lambda work: work(),
        vocabulary: int | None = None,
    ) -> None:
        self._host, self._together, self._vocabulary = host, together, vocabulary

    def on_rollout_end(self, rollout: Rollout) -> Rollout:
        """See `RolloutCallback`."""
        return self._on_all(lambda: self._replaced("on_rollout_end", rollout))

    def on_scores(self, scored: ScoredRollout) -> ScoredRollout:
        """See `RolloutCallback`."""
        return self._on_all(lambda: self._replaced("on_scores", scored))

    def on_rewards(self, shaped: ShapedRollout) -> ShapedRollout:
        """See `RolloutCallback`."""
        return self._on_all(lambda: self._replaced("on_rewards", shaped))

    def on_advantages(self, experience: Experience) -> Experience:
        """See `RolloutCallback`."""
        return self._on_all(lambda: self._replaced("on_advantages", experience))

    def on_update_begin(self, experience: Experience, metrics: dict[str, float]) -> None:
        """See `RolloutCallback`."""
        self._on_all(lambda: self._tell("on_update_begin", experience, metrics))

    def on_ppo_epoch_end(self, experience: Experience, stats: EpochStats) -> None:
        """See `RolloutCallback`."""
        self._on_all(lambda: self._tell("on_ppo_epoch_end", experience, stats))

    def on_update_end(self, experience: Experience, metrics: dict[str, float]) -> None:
        """See `RolloutCallback`."""
        self._on_all(lambda: self._tell("on_update_end", experience, metrics))

    def on_evaluation_end(self, experience: Experience, metrics: dict[str, float]) -> None:
        """See `RolloutCallback`."""
        self._on_all(lambda: self._tell("on_evaluation_end", experience, metrics))

    def _on_all(self, work: Callable[[], _Result]) -> _Result:
        result = self._together(work)
        share_switches(self._host.control)
        return result

    def _replaced(self, event: str, record: _Record) -> _Record:
        for callback in self._listening():
            returned = self._call(callback, event, record)
            if returned is not None:
                where = f"{type(callback).__name__}.{event}"
                _check_same(record, returned, where)
                _check_ids(getattr(returned, "rollout", returned), self._vocabulary, where)
                record = returned
        return record

    def _tell(self, event: str, *arguments: Any) -> None:
        """Every callback is told, whatever another one raises: some wait for their like on the other processes."""
        failure: CallbackError | None = None
        for callback in self._listening():
            try:
                self._call(callback, event, *arguments)
            except CallbackError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _listening(self) -> Sequence[RolloutCallback]:
        return [cb for cb in self._host.callback_handler.callbacks if isinstance(cb, RolloutCallback)]

    def _call(self, callback: RolloutCallback, event: str, *arguments: Any) -> Any:
        everything = (self._host.args, self._host.state, self._host.control, *arguments)
        method = getattr(callback, event)
        try:
            names = _arguments(callback, event)
            if names is None:
                return method(*everything)
            by_name = dict(zip(EVENTS[event], everything, strict=True))
            return method(**{name: by_name[name] for name in names})
        except Exception as error:
            raise CallbackError(f"{type(callback).__name__}.{event} raised {type(error).__name__}: {error}.") from error


def _check_ids(rollout: Rollout, vocabulary: int | None, where: str) -> None:
    for ids in (rollout.prompt_ids, rollout.completion_ids):
        foreign = ((ids < 0) | (ids >= (vocabulary or 2**31))).nonzero().tolist()
        if foreign:
            row, column = foreign[0]
            raise CallbackError(
                f"{where} returned an id that the model does not have in row {row}: {int(ids[row, column])}."
            )


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
    elif before is None:
        return
    elif isinstance(before, list):
        if len(after) != len(before):
            raise CallbackError(f"{where} returned {len(after)} {path}, not {len(before)}: keep one entry a row.")
    else:
        for f in fields(before):
            _check_same(getattr(before, f.name), getattr(after, f.name), where, f"{path}.{f.name}" if path else f.name)
