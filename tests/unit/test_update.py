"""Where an optimizer step stands, and the signatures of callbacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import QUIET, rollout
from trl_ext import PPOConfig, PPOTrainer, RolloutCallback
from trl_ext.callbacks import CallbackError, RolloutEvents, check_events
from trl_ext.callbacks.rollout import PPOControl
from trl_ext.ppo.update import Position
from trl_ext.types import ScoredRollout, ScorePass, Scores

# Position ------------------------------------------------------------------------------------------------------------


def test_positions_by_hand(tmp_path: Path) -> None:
    """Two epochs of three minibatches: six steps a rollout."""
    args = PPOConfig(str(tmp_path), num_ppo_epochs=2, num_mini_batches=3, **QUIET)
    by_hand = {
        0: Position(rollout=0, epoch=0, minibatch=0, first=True, last=False),
        2: Position(rollout=0, epoch=0, minibatch=2, first=False, last=False),
        3: Position(rollout=0, epoch=1, minibatch=0, first=False, last=False),
        5: Position(rollout=0, epoch=1, minibatch=2, first=False, last=True),
        6: Position(rollout=1, epoch=0, minibatch=0, first=True, last=False),
        17: Position(rollout=2, epoch=1, minibatch=2, first=False, last=True),
    }
    assert {step: Position.of(step, args) for step in by_hand} == by_hand


def test_a_rollout_of_one_step_begins_and_ends_with_it(tmp_path: Path) -> None:
    args = PPOConfig(str(tmp_path), num_ppo_epochs=1, num_mini_batches=1, **QUIET)
    assert Position.of(4, args) == Position(rollout=4, epoch=0, minibatch=0, first=True, last=True)


def test_a_loss_that_nothing_would_call_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Mine overrides compute_loss, which PPO never calls"):

        class Mine(PPOTrainer):
            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                return 0.0

    class Fine(PPOTrainer):
        def log(self, *args: Any, **kwargs: Any) -> None:
            super().log(*args, **kwargs)


# Signatures of callbacks ----------------------------------------------------------------------------------------------


class Host:
    """A trainer, as far as events go."""

    args, state, control = "args", "state", PPOControl()

    def __init__(self, *callbacks: Any) -> None:
        self.callback_handler = type("Handler", (), {"callbacks": callbacks})()


def scored() -> ScoredRollout:
    zeros = torch.zeros(2, 3)
    pass_ = ScorePass(zeros, zeros, zeros, zeros, zeros[:, 0])
    return ScoredRollout(rollout([3, 2], [True, True]), Scores(zeros[:, 0], zeros[:, :1]), pass_)


async def asynchronous(self: Any, judged: Any) -> None:
    """Nobody would await it."""


SIGNATURES: dict[str, Callable[[list[Any]], Any]] = {
    "all by name": lambda seen: lambda self, args, state, control, judged: seen.append((args, judged)),
    "all under other names": lambda seen: lambda self, a, s, c, everything: seen.append((a, everything)),
    "in another order": lambda seen: lambda self, judged, control, state, args: seen.append((args, judged)),
    "two of them": lambda seen: lambda self, judged, args: seen.append((args, judged)),
    "the rest as keywords": lambda seen: lambda self, args, **rest: seen.append((args, rest["judged"])),
    "by position": lambda seen: lambda self, *everything: seen.append((everything[0], everything[3])),
    "with one of its own": lambda seen: lambda self, args, judged, seed=3: seen.append((args, judged)),
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_a_method_is_called_with_what_its_signature_says(signature: str) -> None:
    seen: list[Any] = []
    callback = type("Mine", (RolloutCallback,), {"on_scores": SIGNATURES[signature](seen)})()
    record = scored()
    check_events(callback)
    RolloutEvents(Host(callback)).on_scores(record)
    assert len(seen) == 1 and seen[0][0] == "args" and seen[0][1] is record


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda self, judged, batch: None, r"^Mine\.on_scores asks for 'batch', which this event does not come with"),
        (lambda self, rollout: None, r"^Mine\.on_scores asks for 'rollout', .*: take args, state, control, judged, or"),
        (lambda self, args, state, control, judged, more: None, r"^Mine\.on_scores asks for 'more'"),
        (lambda self, judged, /: None, r"^Mine\.on_scores fails \(too many positional arguments\)"),
        (5, r"^Mine\.on_scores must be an ordinary method"),
        (asynchronous, r"^Mine\.on_scores must be an ordinary method, neither async nor a generator"),
    ],
)
def test_a_signature_that_cannot_be_called_is_refused_when_it_is_added(method: Any, message: str) -> None:
    callback = type("Mine", (RolloutCallback,), {"on_scores": method})()
    with pytest.raises(TypeError, match=message) as error:
        check_events(callback)
    assert "\n" not in str(error.value)


def test_what_fails_on_one_process_goes_through_the_same_door() -> None:
    calls = []

    def together(work: Callable[[], Any]) -> Any:
        calls.append(work)
        return work()

    class Fails(RolloutCallback):
        def on_update_end(self) -> None:
            raise KeyError("x")

    events, record = RolloutEvents(Host(Fails()), together), scored()
    assert events.on_rollout_end(record.rollout) is record.rollout and len(calls) == 1
    assert events.on_scores(record) is record and len(calls) == 2
    with pytest.raises(CallbackError, match=r"^Fails\.on_update_end raised KeyError: 'x'\.$"):
        events.on_update_end(record, {})  # type: ignore[arg-type]
    assert len(calls) == 3


def test_every_callback_is_told_whatever_another_one_raises() -> None:
    """Some wait for their like on the other processes."""
    told = []

    class Fails(RolloutCallback):
        def on_update_end(self) -> None:
            told.append(self)
            raise KeyError(len(told))

    events = RolloutEvents(Host(Fails(), Fails()))
    with pytest.raises(CallbackError, match=r"^Fails\.on_update_end raised KeyError: 1\.$"):
        events.on_update_end(scored(), {})  # type: ignore[arg-type]
    assert len(told) == 2
