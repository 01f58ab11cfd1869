"""A remedy tried: the run forked with it and without it, from the same place and with the same seeds, side by side."""

from __future__ import annotations

import gc
import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from trl_ext.diagnostics.catalogue import diagnose
from trl_ext.diagnostics.charts import Line, line_chart, number
from trl_ext.diagnostics.finding import SEVERITIES, Finding
from trl_ext.diagnostics.graph import Explained, roots
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Series

logger = logging.getLogger(__name__)

MakeTrainer = Callable[[dict[str, Any]], Any]
# What a checkpoint has fixed: a fork with another value begins at the start.
FIXED_AT_START = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "num_ppo_epochs"),
    *("num_generations", "num_train_epochs", "score_normalization", "reward_weights", "value_warmup_rollouts"),
    *("objective", "warmup_steps", "lr_scheduler_type", "normalization_samples"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),  # the optimizer's state has them
    *("lora_r", "lora_alpha", "lora_rslora"),  # the adapter has them
    *("beta", "loss_type", "loss_weights"),  # DPO: what was learned from another loss stays learned
}
# Nothing is kept of a fork but its log.
BESIDE = {"save_strategy": "no", "report_to": "none", "push_to_hub": False}
# Kinds of runs whose rules read evaluations. Forks of others have none, which cost time and tell nothing.
EVALUATED = ("reward", "dpo")
# What a run noted of its model, which a fork's settings do not say.
OF_MODEL = ("dtype", "lora_r", "lora_alpha", "lora_rslora", "reference_named", "reward_names")
MOST = 4  # remedies of one finding that are followed by a stronger one
LEAST = 4  # logs of a fork after it parted: fewer, and what is recent is still of before
# The seed of torch's generator in a new process: adapters are drawn before a trainer sets its own.
FRESH = 67280421310721


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one finding with one remedy.

    Attributes:
        finding: its name.
        changes: the settings that were tried.
        verdict: "cured": the finding went with all that followed from it, and no other problem came; "not cured": it
            or some of that stayed; "worse": another problem came, or the fork died; "not seen": without the remedy it
            did not come back or did not stay, so nothing can be said.
        metric: what the remedy was to move.
        without, with_: that metric in the two forks, after where they part.
        logs: how many logs (rollouts in PPO) each fork had.
        start: the optimizer step at which they part.
        new: problems that only the fork with the remedy has.
        died: what ended the fork before its time.
    """

    finding: str
    changes: dict[str, Any]
    verdict: str
    metric: str
    without: Series
    with_: Series
    logs: int
    start: int
    new: list[str] = field(default_factory=list)
    died: str = ""

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.changes.items())
        if self.verdict == "not seen":
            return (
                f"{self.finding}: not seen again. Without any remedy it was not there after {self.logs} logs from step "
                f"{self.start} on, so nothing can be said of one."
            )
        figures = ""
        if self.without and self.with_:
            figures = f" {self.metric} is {number(self.with_.recent())}, without {number(self.without.recent())}."
        new = f" New: {', '.join(self.new)}." if self.new else ""
        died = f" It died: {self.died}" if self.died else ""
        return f"{self.finding}: {self.verdict} by {settings}, after {self.logs} logs.{figures}{new}{died}"


@dataclass(frozen=True)
class Fork:
    """A run from a checkpoint (None: from the start) with some settings changed: its whole log, and what ended it."""

    log: RunLog
    died: str


def try_remedies(
    make_trainer: MakeTrainer,
    findings: Sequence[Finding],
    folder: str | Path = "runs/trial",
    run: RunLog | None = None,
    run_dir: str | Path | None = None,
    logs: int | None = None,
    causes: int = 2,
    limits: Limits | None = None,
) -> list[Trial]:
    """Try the remedies of the first causes in turn, until one cures.

    Both forks have the same seeds and begin at the same place: at the last checkpoint before the first sign of the
    problem, where `run` and `run_dir` are given and the settings can change there; else at the start. The one without
    a remedy runs until the problem is there, both run half as long again, and what `diagnose` says then decides. The
    learning rate's schedule is that of a whole run. Forks of a reward model or of DPO are evaluated when `run` was, and
    at their end; others are not.

    Args:
        make_trainer: makes a new trainer whose settings are changed as a dict says; the dict always has an
            "output_dir", and `BESIDE`, so that the trainer keeps nothing but its log.
        findings: of `diagnose`; consequences of others are not tried by themselves.
        folder: a new one for the forks, for trial.json and for trial.html.
        run: the log of the run in which the problem was found.
        run_dir: its folder, which is only read.
        logs: most logs (rollouts in PPO) of a fork; None: as many as `run` has, or all.
        causes: how many roots to try.
        limits: thresholds; None: the documented ones.

    Raises:
        FileExistsError: `folder` holds something.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{str(folder)!r} is not empty: give a new folder for the trial.")
    folder.mkdir(parents=True, exist_ok=True)
    forks = _Forks(make_trainer, folder, limits if limits is not None else Limits(), run)
    most = logs if logs is not None else len(run.rows) if run is not None else None
    trials: list[Trial] = []
    for root in [one for one in roots(findings) if candidates(one)][:causes]:
        trials += _tried(root, forks, run, Path(run_dir) if run_dir is not None else None, most)
    _write(folder, trials)
    return trials


def candidates(root: Explained) -> list[dict[str, Any]]:
    """Settings to try, in turn: those of the root's remedy, those of its suspects. None where the root is nothing but
    settings that have made no problem yet: what would be cured?"""
    if root.finding.name == "unusual_settings" and not root.finding.explains:
        return []
    offered = [root.finding.remedy.changes, *(suspect.changes for suspect in root.finding.suspects)]
    return [changes for i, changes in enumerate(offered) if changes and changes not in offered[:i]]


def severe(found: Sequence[Finding], severity: str) -> set[str]:
    """Names of the findings that are at least so severe: a problem may begin as a warning, which may pass."""
    return {one.name for one in found if SEVERITIES.index(one.severity) <= SEVERITIES.index(severity)}


def _is_shown(finding: Finding, found: Sequence[Finding]) -> bool:
    """Whether a fork has the problem: of settings that are blamed, one of those problems that they are blamed for."""
    names, known = {one.name for one in found}, severe(found, finding.severity)
    return finding.name in known and (not finding.explains or not names.isdisjoint(finding.explains))


def _tried(root: Explained, forks: _Forks, run: RunLog | None, run_dir: Path | None, most: int | None) -> list[Trial]:
    finding, waiting = root.finding, candidates(root)
    trials: list[Trial] = []
    while waiting:
        changes = waiting.pop(0)
        checkpoint = None
        if run is not None and run_dir is not None and not FIXED_AT_START & set(changes):
            checkpoint = checkpoint_before(run_dir, first_sign(run, finding.name, forks.limits, finding.severity))
        without = forks.without(finding, checkpoint, most)
        start = _step_of(checkpoint)
        before = len([row for row in without.log.rows if row["step"] <= start])
        count = len(without.log.rows) - before
        metric = _metric(finding, without.log)
        if not _is_shown(finding, diagnose(without.log, forks.limits)):
            seen = _after(without.log, metric, start)
            said = Trial(
                finding=finding.name,
                changes={},
                verdict="not seen",
                metric=metric,
                without=seen,
                with_=Series([], []),
                logs=count,
                start=start,
            )
            return [*trials, said]
        with_ = forks.with_(changes, checkpoint, len(without.log.rows))
        verdict, new = judged(finding.name, without.log, with_.log, with_.died, forks.limits)
        trial = Trial(
            finding=finding.name,
            changes=changes,
            verdict=verdict,
            metric=metric,
            without=_after(without.log, metric, start),
            with_=_after(with_.log, metric, start),
            logs=count,
            start=start,
            new=new,
            died=with_.died,
        )
        logger.info("%s", trial)
        trials.append(trial)
        if verdict == "cured":
            break
        # A remedy that did not go far enough: what the doctor says of the fork goes further.
        further = [one.remedy.changes for one in diagnose(with_.log, forks.limits) if one.name == finding.name]
        tried = [one.changes for one in trials]
        waiting = [one for one in further if one and one not in tried and len(trials) < MOST] + waiting
    return trials


def judged(name: str, without: RunLog, with_: RunLog, died: str, limits: Limits) -> tuple[str, list[str]]:
    """The verdict on a remedy for the finding `name`, and the problems that came with it.

    What followed from the finding must go with it: a setting that is usual again is no cure of what it was blamed for.
    """
    before = diagnose(without, limits)
    known = {finding.name for finding in before}
    to_go = {name, *(one.finding.name for top in roots(before) if top.finding.name == name for one in top)}
    found = diagnose(with_, limits)
    new = [finding.name for finding in found if finding.severity == "problem" and finding.name not in known]
    if died or new:
        return "worse", new
    return ("not cured" if to_go & {finding.name for finding in found} else "cured"), []


def first_sign(log: RunLog, name: str, limits: Limits | None = None, severity: str = "warning") -> int | None:
    """The optimizer step at which a finding, at least so severe, could first be told from the log; None where it
    cannot."""
    for step in sorted({int(row["step"]) for row in (*log.rows, *log.evals)}):
        rows, evals = ([row for row in every if row["step"] <= step] for every in (log.rows, log.evals))
        if name in severe(diagnose(replace(log, rows=rows, evals=evals), limits), severity):
            return step
    return None


def checkpoint_before(run_dir: Path, step: int | None) -> Path | None:
    """The last checkpoint before `step` (None: of all); None where there is none."""
    found = [path for path in run_dir.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    earlier = [path for path in found if step is None or _step_of(path) < step]
    return max(earlier, key=_step_of, default=None)


def _step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.partition("-")[2]) if checkpoint is not None else 0


def _metric(finding: Finding, log: RunLog) -> str:
    """The logged metric that the remedy moves; of several with its prefix the first."""
    name = finding.remedy.moves
    return name + log.names(name)[0] if name.endswith("/") and log.names(name) else name


def _after(log: RunLog, name: str, step: int) -> Series:
    series = log.series(name)
    kept = [(at, value) for at, value in zip(series.steps, series.values, strict=True) if at > step]
    return Series([at for at, _ in kept], [value for _, value in kept])


class _Forks:
    """Makes forks, those without a remedy once for each place."""

    def __init__(self, make_trainer: MakeTrainer, folder: Path, limits: Limits, run: RunLog | None) -> None:
        self.make_trainer, self.folder, self.limits = make_trainer, folder, limits
        self._evaluated = run is not None and run.kind in EVALUATED and bool(run.evals)
        self._beside = BESIDE if self._evaluated else BESIDE | {"eval_strategy": "no"}
        config = run.config if run is not None else {}
        self._of_model = {known: config[known] for known in OF_MODEL if known in config}
        self._without: dict[tuple[str, Path | None], Fork] = {}
        self._made = 0

    def without(self, finding: Finding, checkpoint: Path | None, most: int | None) -> Fork:
        """As the run was, until the problem is there and half as long again, at most `most` logs."""
        place = finding.name, checkpoint
        if place not in self._without:
            self._without[place] = self._run({}, checkpoint, finding, most)
        return self._without[place]

    def with_(self, changes: Mapping[str, Any], checkpoint: Path | None, logs: int) -> Fork:
        """With `changes`, for as many `logs` in all."""
        return self._run(dict(changes), checkpoint, None, logs)

    def _run(self, changes: dict[str, Any], checkpoint: Path | None, finding: Finding | None, most: int | None) -> Fork:
        self._made += 1
        watch = _Watch(self.limits, finding, most, {**self._of_model, **changes})
        output_dir = str(self.folder / f"{self._made}-{'with' if changes else 'without'}")
        died = ""
        with _apart():
            try:
                trainer = self.make_trainer({**self._beside, **changes, "output_dir": output_dir})
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
        if self.finding is not None and self.seen_at is None and _is_shown(self.finding, diagnose(log, self.limits)):
            self.seen_at = count
        ends = [] if self.most is None else [self.most]
        if self.seen_at is not None:
            ends.append(self._begin + max(LEAST, math.ceil(1.5 * (self.seen_at - self._begin))))
        return bool(ends) and count >= min(ends)

    def callback(self) -> Any:
        """It as a TrainerCallback, which also carries a changed learning rate into a schedule that was resumed."""
        from transformers import TrainerCallback  # imports torch, for which nobody waits who only asks the doctor

        watch = self

        class Watching(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.began = True
                size = {"rollout_batch_size": getattr(args, "rollout_batch_size", None)}
                self.config = {**args.to_dict(), **size, "steps_of_run": state.max_steps, **watch.config}
                watch._begin = len(RunLog.of(state.log_history).rows)
                schedule = getattr(kwargs.get("lr_scheduler"), "scheduler", kwargs.get("lr_scheduler"))
                if state.global_step and "learning_rate" in watch.config and schedule is not None:
                    was = schedule.base_lrs[0]
                    scale_learning_rate(kwargs["optimizer"], schedule, watch.config["learning_rate"] / was)

            def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if watch.read(RunLog.of(state.log_history, self.config)):
                    control.should_training_stop = True

        return Watching()


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate, now and in the rest of its schedule."""
    schedule = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
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


def _write(folder: Path, trials: Sequence[Trial]) -> None:
    """trial.json and trial.html."""
    content = [{**asdict(trial), "with": asdict(trial.with_), "said": str(trial)} for trial in trials]
    for one in content:
        one.pop("with_")
    (folder / "trial.json").write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    environment = Environment(loader=PackageLoader("trl_ext.diagnostics"), autoescape=True)
    pictures = [(trial, Markup(picture(trial))) for trial in trials]  # numbers and escaped captions
    html = environment.get_template("trial.html").render(name=folder.name, pictures=pictures)
    (folder / "trial.html").write_text(html, encoding="utf-8")


def picture(trial: Trial) -> str:
    """The metric in both forks as SVG."""
    lines = [
        Line("without", trial.without.steps, trial.without.values, 1, dashed=True),
        Line("with", trial.with_.steps, trial.with_.values, 0),
    ]
    return line_chart([line for line in lines if line.x], f"{trial.metric} without and with the remedy")
