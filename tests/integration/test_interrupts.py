"""Ctrl-C and SIGTERM in the middle of a run: saved, stopped, resumed as if nothing had happened."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.integration.test_ppo_trainer import trained_state, trainer_for


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Python's usual handlers, also where the tests were started in the background, which ignores Ctrl-C."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Signal(TrainerCallback):
    """Sends this process a signal during the given optimizer step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["INT", "TERM"]
)
def test_a_signal_saves_and_stops(tmp_path: Path, number: int, expected: type[BaseException]) -> None:
    before = signal.getsignal(number)
    trainer = trainer_for(tmp_path, total_episodes=32)
    trainer.add_callback(Signal(number, step=3))
    with pytest.raises(expected) as raised:
        trainer.train()
    assert trainer.state.global_step == 3
    if number == signal.SIGTERM:
        assert raised.value.code == 143  # type: ignore[attr-defined]
    assert signal.getsignal(number) is before
    resumed = trainer_for(tmp_path, total_episodes=32)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_for(tmp_path / "whole", total_episodes=32)
    whole.train()
    expected_state = trained_state(whole)
    assert all(torch.equal(tensor, expected_state[name]) for name, tensor in trained_state(resumed).items())


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    class Twice(Signal):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            while trainer.interrupts.received is None:  # two signals at once may arrive as one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    trainer = trainer_for(tmp_path)
    trainer.add_callback(Twice(signal.SIGINT, 1))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 0


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = trainer_for(tmp_path)
    trainer.add_callback(Signal(signal.SIGINT, 1))
    trainer.train()
    assert trainer.state.global_step == 4
