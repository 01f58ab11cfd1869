"""The rollout after the one in use, which is sampled while that one is scored and trained on."""

from __future__ import annotations

from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object

from trl_ext.generation import Answers


@dataclass(frozen=True)
class Ahead:
    """A rollout that is under way, or waits to be used.

    Attributes:
        prompts: of this process, as the dataset gives them.
        answers: of the policy as it was when they were begun.
    """

    prompts: list[Any]
    answers: Future[Answers]

    def wait(self) -> None:
        """Return once the answers are there, or have failed, which is raised where they are taken."""
        wait([self.answers])

    def state(self) -> dict[str, list[Any]] | None:
        """All of it, as plain numbers and texts, once it is there; None where the answers have failed."""
        try:
            answers: Any = self.answers.result()
            ids, logprobs = answers
            numbers = [[float(x) for x in row] for row in logprobs]
            return {"prompts": self.prompts, "ids": [[int(i) for i in row] for row in ids], "logprobs": numbers}
        except Exception:  # also where they are not what they should be
            return None


def gathered(ahead: Ahead | None) -> dict[str, list[Any]] | None:
    """The state of all processes' parts in one, in the order of the rollout's rows; None where one has none, or has
    failed. Every process must call it."""
    parts = gather_object([None if ahead is None else ahead.state()])
    if any(part is None for part in parts):
        return None
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


def share_of(state: dict[str, list[Any]] | None, processes: int, process: int) -> Ahead | None:
    """A process's part of what `gathered` gave, whatever the number of processes was then."""
    if state is None:
        return None
    count = len(state["prompts"]) // processes
    prompts, ids, logprobs = (rows[process * count : (process + 1) * count] for rows in state.values())
    answers: Future[Answers] = Future()
    answers.set_result(Answers(ids, logprobs))
    return Ahead(prompts, answers)
