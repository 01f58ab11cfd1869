"""A run forked: the same trainer with some settings changed, from the start or a checkpoint, and its log read."""

from __future__ import annotations

import gc
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_ext.diagnostics.catalogue import diagnose
from trl_ext.diagnostics.finding import SEVERITIES, Finding
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog
from trl_ext.diagnostics.planned import BY_EVALUATION, planned
from trl_ext.diagnostics.remedies import STAND_INS

logger = logging.getLogger(__name__)

MakeTrainer = Callable[[dict[str, Any]], Any]
# Nothing is kept of a fork but its log, so there is no best checkpoint either.
BESIDE = {"save_strategy": "no", "load_best_model_at_end": False, "report_to": "none", "push_to_hub": False}
# Kinds of runs whose rules read evaluations, and in the others what is read in them. Forks of which nothing is read
# there have none, which cost time and tell nothing.
EVALUATED, HELD_OUT = ("reward", "dpo"), "eval_evidence/held_out"
# What a run noted of its model, which a fork's settings do not say.
OF_MODEL = ("dtype", "lora_r", "lora_alpha", "lora_rslora", "reference_named", "reward_names")
LEARNS = 12  # logs in which a run must learn something with a stand-in, or more with a stronger remedy
LEAST = 4  # logs of a fork after it parted: fewer, and what is recent is still of before
# The seed of torch's generator in a new process: adapters are drawn before a trainer sets its own.
FRESH = 67280421310721


@dataclass(frozen=True)
class Fork:
    """A run from a checkpoint (None: from the start) with some settings changed: its whole log, and what ended it."""

    log: RunLog
    died: str


def checkpoint_before(run_dir: Path, step: int) -> Path | None:
    """The last checkpoint before `step`; None where there is none."""
    numbered = [path for path in run_dir.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    found = [path for path in numbered if (path / "trainer_state.json").is_file() and step_of(path) < step]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path | None) -> int:
    """The optimizer step of a checkpoint's folder; 0 for the start."""
    return int(checkpoint.name.partition("-")[2]) if checkpoint is not None else 0


def severe(found: Sequence[Finding], severity: str) -> set[str]:
    """Names of the findings that are at least so severe: a problem may begin as a warning, which may pass."""
    return {one.name for one in found if SEVERITIES.index(one.severity) <= SEVERITIES.index(severity)}


def is_shown(finding: Finding, found: Sequence[Finding]) -> bool:
    """Whether a fork has the problem: of settings that are blamed, one of those problems that they are blamed for."""
    names, known = {one.name for one in found}, severe(found, finding.severity)
    return finding.name in known and (not finding.explains or not names.isdisjoint(finding.explains))


def made_nothing(finding: Finding) -> bool:
    """Whether these are unusual settings that have made no problem, so that none can be waited for."""
    return finding.name == "unusual_settings" and not finding.explains


class Forks:
    """Makes forks, those without a remedy once for each place."""

    def __init__(
        self,
        make_trainer: MakeTrainer,
        folder: Path,
        limits: Limits,
        run: RunLog | None,
        findings: Sequence[Finding],
    ) -> None:
        self.make_trainer, self.folder, self.limits = make_trainer, folder, limits
        reads = any(finding.remedy.moves.startswith(HELD_OUT) for finding in findings)
        reads |= run is not None and run.setting("lr_scheduler_type") in BY_EVALUATION
        self._evaluated = run is not None and (run.kind in EVALUATED or reads) and bool(run.evals)
        self._beside = BESIDE if self._evaluated else BESIDE | {"eval_strategy": "no"}
        config = run.config if run is not None else {}
        self._of_model = {known: config[known] for known in OF_MODEL if known in config}
        self._without: dict[tuple[str, Path | None, str], Fork] = {}
        self._latest: dict[tuple[Path | None, str], Fork] = {}  # with the changes that stand there
        self._made = 0

    def without(self, finding: Finding, checkpoint: Path | None, most: int | None, kept: Mapping[str, Any]) -> Fork:
        """As the run was but for what is `kept`, until the problem is there and half as long again, at most `most`
        logs; where settings have made no problem that could be waited for, for `LEARNS` logs."""
        place = finding.name, checkpoint, repr(kept)
        earlier = self._latest.get((checkpoint, repr(kept)))
        if earlier is not None and is_shown(finding, diagnose(earlier.log, self.limits)):
            return earlier
        if place not in self._without:
            waits: Finding | None = finding
            if made_nothing(finding):
                waits, most = None, LEARNS if most is None else min(most, LEARNS)
            self._without[place] = self._run("without", dict(kept), checkpoint, waits, most)
        return self._without[place]

    def with_(self, changes: Mapping[str, Any], checkpoint: Path | None, logs: int) -> Fork:
        """With `changes`, for as many `logs` in all.

        Raises:
            CannotBe: no such fork can be made; its settings may contradict the others, or the data.
        """
        try:
            fork = self._run("with", dict(changes), checkpoint, None, logs)
        except (ValueError, RuntimeError, CannotBe) as error:
            logger.warning("Nothing is tried with %s: %s", changes, error)
            raise CannotBe(str(error)) from error
        self._latest[checkpoint, repr(changes)] = fork
        return fork

    def _run(
        self, name: str, changes: dict[str, Any], checkpoint: Path | None, finding: Finding | None, most: int | None
    ) -> Fork:
        self._made += 1
        settings = settings_of(changes)
        watch = _Watch(self.limits, finding, most, {**self._of_model, **settings})
        output_dir = str(self.folder / f"{self._made}-{name}")
        died = ""
        with _apart():
            try:
                trainer = self.make_trainer({**self._beside, **settings, "output_dir": output_dir})
                exchange(trainer, changes)
                _quieten(trainer)
                trainer.add_callback(watch.callback())
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
                if self._evaluated and trainer.state.global_step not in {row["step"] for row in watch.log.evals}:
                    trainer.evaluate()
            except (ValueError, RuntimeError) as error:
                if not watch.began:
                    raise  # it is not the training that failed
                died = f"{type(error).__name__}: {error!s:.200}"
        trainer = None
        gc.collect()
        return Fork(watch.log, died)


class _Watch:
    """Reads a fork's log as it grows, and ends the fork.

    Args:
        finding: what to wait for; None: only `most` counts.
        most: logs after which it ends; None: any.
        config: settings that the trainer's own do not have, or that were changed.
    """

    def __init__(self, limits: Limits, finding: Finding | None, most: int | None, config: Mapping[str, Any]) -> None:
        self.limits, self.finding, self.most, self.config = limits, finding, most, config
        self.log, self.began, self._begin = RunLog("other", []), False, 0
        self.seen_at: int | None = None

    def read(self, log: RunLog) -> bool:
        """Take in the log so far; whether to end."""
        self.log = log
        count = len(log.rows)
        if self.most is not None and count >= self.most:
            return True
        if self.finding is None:
            return False
        is_there = is_shown(self.finding, diagnose(log, self.limits))
        if self.seen_at is None and is_there:
            self.seen_at = count
        if self.seen_at is None:
            return False
        enough = count >= self._begin + max(LEAST, math.ceil(1.5 * (self.seen_at - self._begin)))
        if enough and not is_there:
            self.seen_at = None  # it was there for a moment, and may come to stay
        return enough and is_there

    def callback(self) -> Any:
        """It as a TrainerCallback, which also carries a changed learning rate into a schedule that was resumed."""
        from transformers import TrainerCallback  # imports torch, for which nobody waits who only asks the doctor

        watch = self

        class Watching(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.began = True
                size = {"rollout_batch_size": getattr(args, "rollout_batch_size", None)}
                known = {**size, **planned(args, state, **kwargs), "steps_of_run": state.max_steps}
                self.config = {**args.to_dict(), **known, **watch.config}
                watch._begin = len(RunLog.of(state.log_history).rows)
                schedule = getattr(kwargs.get("lr_scheduler"), "scheduler", kwargs.get("lr_scheduler"))
                if state.global_step and "learning_rate" in watch.config and schedule is not None:
                    optimizer = kwargs["optimizer"]
                    was = getattr(schedule, "base_lrs", [group["lr"] for group in optimizer.param_groups])[0]
                    scale_learning_rate(optimizer, schedule, watch.config["learning_rate"] / was)
                    self.config["rate_changed"] = True  # nobody is to blame the schedule

            def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if watch.read(RunLog.of(state.log_history, self.config)):
                    control.should_training_stop = True

        return Watching()


class CannotBe(Exception):
    """The run cannot be had with these changes: the trainer refuses them, or has nothing that could stand in."""


def settings_of(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Without stand-ins."""
    return {name: value for name, value in changes.items() if name not in STAND_INS}


def exchange(trainer: Any, changes: Mapping[str, Any]) -> None:
    """Put stand-ins where `changes` name them.

    Raises:
        CannotBe: the trainer has none.
    """
    for part in STAND_INS.keys() & changes:
        if not (hasattr(trainer, "exchange") and trainer.exchange(part)):
            raise CannotBe(f"there is nothing that could stand in for {part}")


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate, now and in the rest of its schedule."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    if hasattr(schedule, "base_lrs"):  # a plateau's goes on from the optimizer's
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] *= factor


def _quieten(trainer: Any) -> None:
    """A fork's own progress and warnings are not those of the run."""
    from transformers import PrinterCallback, ProgressCallback

    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)


@contextmanager
def _apart() -> Iterator[None]:
    """Random numbers as in a new process, the same for every fork; those of before are back afterwards."""
    import torch

    from trl_ext.random_state import RandomState

    state, warnings = RandomState(), logging.getLogger("trl_ext.callbacks.diagnostics")
    level = warnings.level
    warnings.setLevel(logging.ERROR)  # what a fork's own doctor would say
    torch.manual_seed(FRESH)
    random.seed(0)
    try:
        yield
    finally:
        state.restore()
        warnings.setLevel(level)
