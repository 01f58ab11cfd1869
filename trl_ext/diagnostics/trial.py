"""A remedy tried: the run forked with it and without it, from the same place and with the same seeds, side by side."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from trl_ext.diagnostics.catalogue import diagnose
from trl_ext.diagnostics.charts import Line, line_chart, number
from trl_ext.diagnostics.finding import Finding
from trl_ext.diagnostics.forks import (
    LEARNS,
    CannotBe,
    Forks,
    MakeTrainer,
    checkpoint_before,
    is_shown,
    made_nothing,
    severe,
    step_of,
)
from trl_ext.diagnostics.graph import Explained, roots
from trl_ext.diagnostics.limits import Limits
from trl_ext.diagnostics.log import RunLog, Series
from trl_ext.diagnostics.remedies import STAND_INS, stand_ins
from trl_ext.diagnostics.settings import FLIES, LENGTH, STANDS, to_defaults
from trl_ext.diagnostics.updates import STRONGER

logger = logging.getLogger(__name__)

# What a checkpoint has fixed: a fork with another value begins at the start.
FIXED_AT_START = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches", "num_ppo_epochs"),
    *("num_generations", "num_train_epochs", "score_normalization", "reward_weights", "value_warmup_rollouts"),
    *("objective", "penalty_coef", "warmup_steps", "lr_scheduler_type", "normalization_samples"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),  # the optimizer's state has them
    *("lora_r", "lora_alpha", "lora_rslora"),  # the adapter has them
    *("beta", "loss_type", "loss_weights"),  # DPO: what was learned from another loss stays learned
    *("reward_funcs", "train_dataset", "shuffle_dataset"),  # a score's mean and spread, and the order of the prompts
    "processing_class",  # what the policy has learned from misread prompts
}
OF_SETTINGS = {"unusual_settings", *STANDS, *FLIES}  # what settings make that do not go together
MOST = 4  # remedies of one finding after which the doctor is asked again, and stronger ones than one that helped
HELPED = ("cured", "in part")
NOTHING_LEARNED = "nothing is learned"
HOLDS_BACK = ("steps_too_small", "kl_drowns_score")  # gone as soon as the policy moves, which is not yet to learn


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one finding with one remedy.

    Attributes:
        finding: its name.
        changes: the settings that were tried, and `STAND_INS`; with those that helped against earlier findings.
        verdict: "cured": the finding went with all that followed from it, and no problem is there; "in part": it went
            so, but problems stay that the fork without the remedy has, too, or the run learns more by the next remedy,
            or it stayed, and the run learns more; "not cured": it or some of what followed stayed; "worse": another
            problem came, or the fork died; "not seen": without the remedy it did not come back or did not stay, so
            nothing can be said. With a stand-in, "cured" is a run that also learns; where it does not, it is "in part",
            as at the end of a run whose steps were too small or whose KL penalty was too strong. With other settings in
            the place of unusual ones that have made no problem it is a run that learns more.
        metric: what the remedy was to move.
        without, with_: that metric in the two forks, after where they part.
        logs: how many logs (rollouts in PPO) the fork without the remedy had.
        start: the optimizer step at which they part.
        new: problems that only the fork with the remedy has.
        left: problems that both have.
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
    left: list[str] = field(default_factory=list)
    died: str = ""

    @property
    def by(self) -> str:
        """The changes in words."""
        settings = [f"{name}={value!r}" for name, value in self.changes.items() if name not in STAND_INS]
        parts = [f"{value} in the place of {name}" for name, value in self.changes.items() if name in STAND_INS]
        return ", ".join([*settings, *parts])

    @property
    def told(self) -> str:
        """The verdict in words."""
        return "cured in part" if self.verdict == "in part" else self.verdict

    def __str__(self) -> str:
        if self.verdict == "not seen":
            return (
                f"{self.finding}: not seen again. Without any remedy it was not there after {self.logs} logs from step "
                f"{self.start} on, so nothing can be said of one."
            )
        figures = ""
        if self.without and self.with_:
            figures = f" {self.metric} is {number(self.with_.recent())}, without {number(self.without.recent())}."
        new = f" New: {', '.join(self.new)}." if self.new else ""
        left = f" Still there: {', '.join(self.left)}." if self.left else ""
        died = f" It died: {self.died}" if self.died else ""
        parts = [name for name in self.changes if name in STAND_INS] if self.verdict == "cured" else []
        fault = f" At fault: {', '.join(parts)}." if parts else ""
        return f"{self.finding}: {self.told} by {self.by}, after {self.logs} logs.{figures}{new}{left}{died}{fault}"


def try_remedies(
    make_trainer: MakeTrainer,
    findings: Sequence[Finding],
    folder: str | Path = "runs/trial",
    run: RunLog | None = None,
    run_dir: str | Path | None = None,
    logs: int | None = None,
    causes: int = 3,
    limits: Limits | None = None,
) -> list[Trial]:
    """Try the remedies of the first causes in turn, until one cures. What helped is kept while those of the next cause
    are tried, for a run may have several mistakes.

    Where no setting is the remedy, but a part of the run is to blame - the reward functions, the training prompts, who
    samples - our own PPOTrainer can put something known to be good in its place: the doctor's yardstick, the held-out
    prompts, Transformers' `generate`. A run that learns with that had nothing else wrong.

    Both forks have the same seeds and begin at the same place: at the last checkpoint before the first sign of the
    problem, where `run` and `run_dir` are given and the settings can change there; else at the start. The one without
    a remedy runs until the problem is there, both run half as long again, and what `diagnose` says then decides. What
    cures is then shown over as many logs as a fork may have: another problem may take longer to come. The learning
    rate's schedule is that of a whole run. Forks of a reward model or of DPO are evaluated when `run` was, and
    at their end; others only where a finding is one of the held-out prompts, or a schedule waits for evaluations.

    Args:
        make_trainer: makes a new trainer whose settings are changed as a dict says; the dict always has an
            "output_dir", and `forks.BESIDE`, so that the trainer keeps nothing but its log.
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
    limits = limits if limits is not None else Limits()
    most = logs if logs is not None else len(run.rows) if run is not None else None
    forks = Forks(make_trainer, folder, limits, run, findings)
    patient = _Patient(forks, run, Path(run_dir) if run_dir is not None else None, most, limits)
    trials: list[Trial] = []
    for trials in _in_turn(patient, roots(findings), causes):
        _write(folder, trials)  # kept, whatever becomes of the next one
    if not trials:
        _write(folder, trials)
    return trials


def _in_turn(patient: _Patient, waiting: list[Explained], causes: int) -> Iterator[list[Trial]]:
    """All trials so far, of one root after the other, with what helped before; a cure also before it is confirmed."""
    trials: list[Trial] = []
    while waiting and len(patient.seen) < causes:
        root = waiting.pop(0)
        name = root.finding.name
        if name in patient.seen or not candidates(root, patient.run):
            continue
        patient.seen.append(name)
        tried = patient.tries(root)
        if tried and tried[-1][0].verdict == "cured":
            yield trials + [trial for trial, _ in tried]
            tried[-1] = patient.confirmed(*tried[-1])
        trials += [trial for trial, _ in tried]
        yield trials
        if not tried:
            continue
        trial, log = tried[-1]
        found = diagnose(log, patient.limits)
        names, whole = {one.name for one in found}, patient.is_whole(log)
        # What hung below a finding that had its turn is tried by itself.
        others = roots([one for one in found if one.name not in patient.seen])
        # Where the last remedy took the finding away and brought another, that one may have a remedy of its own.
        traded = trial.verdict == "worse" and name not in names
        if trial.verdict == "not seen":
            waiting += others  # what is seen in its place
        elif not trial.died and (traded or trial.verdict in HELPED):
            patient.kept = trial.changes
            waiting = [one for one in waiting if one.finding.name in names or (one.severity == "problem" and not whole)]
            waiting += others if trial.verdict != "cured" else []


def candidates(root: Explained, run: RunLog | None = None) -> list[dict[str, Any]]:
    """What to try, in turn: the settings of the root's remedy, those of its suspects, of unusual settings also the
    remedies of what they are blamed for, stand-ins for what it blames, and the defaults for all that makes a step,
    alone and with the remedies of what follows from the root."""
    own, made = _settings(root.finding), [_settings(one.finding) for one in list(root)[1:]]
    offered = [own, *(suspect.changes for suspect in root.finding.suspects)]
    if root.finding.name == "unusual_settings":
        offered += [own | changes for changes in made]
    if run is not None:
        offered += stand_ins(root.finding.name, run)
        if root.finding.name in OF_SETTINGS and (defaults := to_defaults(run)):
            offered += [defaults, *(defaults | changes for changes in made)]
    return [changes for i, changes in enumerate(offered) if changes and changes not in offered[:i]]


def _settings(finding: Finding) -> dict[str, Any]:
    """Those of its remedy. Of unusual settings without those that make a run longer, for that shows nothing until it is
    longer than the run was."""
    without = LENGTH if finding.name == "unusual_settings" else ()
    return {name: value for name, value in finding.remedy.changes.items() if name not in without}


Tried = tuple[Trial, RunLog]  # with the log of its fork: that with the remedy, where it was not seen the other one


@dataclass
class _Patient:
    """The run whose remedies are tried: `kept` is what has helped so far, `seen` the findings that had their turn."""

    forks: Forks
    run: RunLog | None
    run_dir: Path | None
    most: int | None
    limits: Limits
    kept: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)

    def tries(self, root: Explained) -> list[Tried]:
        """Remedies of one root, until one helps."""
        finding, waiting = root.finding, candidates(root, self.run)
        done: list[Tried] = []
        while waiting:
            changes = waiting.pop(0)
            if self.kept | changes in [one.changes for one, _ in done]:
                continue
            if (tried := self._if_it_can_be(finding, self.kept | changes)) is None:
                continue
            trial, log = tried
            if trial.verdict == "not seen":
                # With what helped before, it went along.
                return done if self.kept else [*done, (trial, log)]
            done.append(tried)
            if trial.verdict in HELPED:
                return self._further(finding, done)
            if len(done) < MOST:
                # A remedy that did not go far enough, or brought another problem: what the doctor says of the fork
                # goes further.
                names = (finding.name, *trial.new)
                waiting = [changes | one for one in self._remedies(log, names)][:2] + waiting
        return self._best_last(finding, done)

    def _best_last(self, finding: Finding, done: list[Tried]) -> list[Tried]:
        """Of remedies none of which took the finding away the one with which the run learns most, if it learns more so
        than without: it has helped in part."""
        useful = [one for one in done if one[0].verdict == "not cured"]
        if not useful:
            return done
        trial, log = best = max(useful, key=lambda one: _learned(one[1]).recent())
        without = self.forks.without(finding, self._checkpoint(finding, trial.changes), self.most, self.kept).log
        if not _learns_more(log, without, times=2.0):
            return done
        helped = replace(trial, verdict="in part", left=[finding.name])
        return [one for one in done if one is not best] + [(helped, log)]

    def is_whole(self, log: RunLog) -> bool:
        """Whether a fork is as long as forks may be, so that what is not there will not come."""
        return self.most is not None and len(log.rows) >= self.most

    def confirmed(self, trial: Trial, log: RunLog) -> Tried:
        """The cure over as many logs as a fork may have: a problem may take longer to come than the one that went."""
        if self.most is None:
            return trial, log
        if self.is_whole(log):
            return self._if_it_learns(trial, log), log
        checkpoint = self.run_dir / f"checkpoint-{trial.start}" if self.run_dir is not None and trial.start else None
        with_ = self.forks.with_(trial.changes, checkpoint, self.most)
        left = [one.name for one in diagnose(with_.log, self.limits) if one.severity == "problem"]
        verdict = "worse" if with_.died else "in part" if left else "cured"
        after = _after(with_.log, trial.metric, trial.start)
        trial = replace(trial, verdict=verdict, left=left, died=with_.died, with_=after)
        trial = self._if_it_learns(trial, with_.log)
        logger.info("%s", trial)
        return trial, with_.log

    def _if_it_learns(self, trial: Trial, log: RunLog) -> Trial:
        """The trial; cured only in part where what held learning back has gone, and still nothing is learned."""
        learns = trial.finding not in HOLDS_BACK or _learned(log).ever_rose(self.limits.noticeable)
        if trial.verdict != "cured" or learns:
            return trial
        return replace(trial, verdict="in part", left=[NOTHING_LEARNED])

    def _further(self, finding: Finding, done: list[Tried]) -> list[Tried]:
        """Go on for as long as the run learns more by it: a finding is gone at once where a setting is half right."""
        for _ in range(MOST):
            weaker, log = done[-1]
            better = self._better(finding, weaker, log)
            if better is None:
                break
            done[-1:] = [(replace(weaker, verdict="in part"), log), better]
        return done

    def _better(self, finding: Finding, weaker: Trial, log: RunLog) -> Tried | None:
        """A remedy that goes further than one that helped, and by which the run learns more: a stronger one, or, where
        settings were to blame, the defaults for all that makes a step; None where there is none."""
        stronger = STRONGER.get(finding.name, lambda log: {})(log)
        usual: dict[str, Any] = {}
        if self.run is not None and finding.name in OF_SETTINGS and not STAND_INS.keys() & weaker.changes:
            usual = {name: value for name, value in to_defaults(self.run).items() if name not in weaker.changes}
        for more, times in ((stronger, 1.0), (usual, 2.0)):
            if weaker.changes | more == weaker.changes:
                continue
            tried = self._if_it_can_be(finding, weaker.changes | more)
            if tried is not None and tried[0].verdict not in HELPED:
                # What it makes may have a remedy of its own.
                names = (*tried[0].new, *finding.explains)
                told = [one for one in self._remedies(tried[1], names) if not one.keys() & more]
                tried = self._if_it_can_be(finding, weaker.changes | more | told[0]) if told else None
            if tried is None or tried[0].verdict not in ("cured", weaker.verdict):
                continue
            if _learns_more(tried[1], log, times):
                return tried
        return None

    def _if_it_can_be(self, finding: Finding, changes: dict[str, Any]) -> Tried | None:
        """One remedy; None where the run cannot be had with it, which the forks have said."""
        try:
            return self._tried(finding, changes)
        except CannotBe:
            return None

    def _remedies(self, log: RunLog, names: Sequence[str]) -> list[dict[str, Any]]:
        """The settings that the doctor offers in a fork against these findings."""
        found = [_settings(one) for one in diagnose(log, self.limits) if one.name in names]
        return [changes for changes in found if changes]

    def _tried(self, finding: Finding, changes: dict[str, Any]) -> Tried:
        """One remedy."""
        checkpoint = self._checkpoint(finding, changes)
        without = self.forks.without(finding, checkpoint, self.most, self.kept)
        start, rows = step_of(checkpoint), len(without.log.rows)
        shown = is_shown(finding, diagnose(without.log, self.limits))
        # Settings that have made no problem, or none in this fork: whoever learns more with others was held back.
        bare = finding.name == "unusual_settings" and (made_nothing(finding) or not shown)
        metric = _metric(finding, without.log)
        trial = Trial(
            finding=finding.name,
            changes={},
            verdict="not seen",
            metric=metric,
            without=_after(without.log, metric, start),
            with_=Series([], []),
            logs=rows - len([row for row in without.log.rows if row["step"] <= start]),
            start=start,
        )
        if not shown and not bare:
            return trial, without.log
        exchanged = bool(STAND_INS.keys() & changes)
        long = exchanged or finding.name in OF_SETTINGS
        with_ = self.forks.with_(changes, checkpoint, max(rows, LEARNS) if long else rows)
        if exchanged and not with_.died:
            verdict, new, left = self._with_stand_in(finding, with_.log)
        else:
            as_long = replace(with_.log, rows=with_.log.rows[:rows])  # what comes later may come without it, too
            verdict, new, left = judged(finding, without.log, as_long, with_.died, self.limits)
        if bare and verdict in HELPED and not _learns_more(with_.log, without.log, times=2.0):
            verdict, left = "not cured", []
        after = _after(with_.log, metric, start)
        trial = replace(trial, changes=changes, verdict=verdict, with_=after, new=new, left=left, died=with_.died)
        logger.info("%s", trial)
        return trial, with_.log

    def _with_stand_in(self, finding: Finding, log: RunLog) -> tuple[str, list[str], list[str]]:
        """The verdict where something stands in for what was blamed. What was blamed takes its finding along, whatever
        else is wrong: the run must learn, too. A problem that comes to light was hidden; what is known to be good made
        none."""
        found = diagnose(log, self.limits)
        if finding.name in {one.name for one in found}:
            return "not cured", [], []
        problems = [one.name for one in found if one.severity == "problem"]
        if not problems and _learned(log).ever_rose(self.limits.noticeable):
            return "cured", [], []
        return "in part", [], problems or [one.name for one in found] or [NOTHING_LEARNED]

    def _checkpoint(self, finding: Finding, changes: Mapping[str, Any]) -> Path | None:
        """Where the forks begin; None: at the start, also where the run itself never had the finding."""
        if self.run is None or self.run_dir is None or FIXED_AT_START & set(changes):
            return None
        if "kl_coef" in changes and self.run.series("objective/kl_target"):  # a controller goes on from its own
            return None
        if "learning_rate" in changes and not self.run.setting("learning_rate", 1.0):  # of 0 no schedule is scaled
            return None
        sign = first_sign(self.run, finding.name, self.limits, finding.severity)
        return None if sign is None else checkpoint_before(self.run_dir, sign)


def _learned(log: RunLog) -> Series:
    """What shows whether a run learns: the yardstick, without one the score."""
    names = log.names("yardstick/")
    return log.series(f"yardstick/{names[0]}" if names else "score")


def _learns_more(log: RunLog, other: RunLog, times: float = 1.0) -> bool:
    """Whether a fork ends higher than another one, by more than so many times what one rollout differs from the
    next."""
    rows = min(len(log.rows), len(other.rows))
    mine, others = (_learned(replace(one, rows=one.rows[:rows])) for one in (log, other))
    return mine.recent() - others.recent() > times * max(mine.noise(), others.noise())


def judged(
    finding: Finding, without: RunLog, with_: RunLog, died: str, limits: Limits
) -> tuple[str, list[str], list[str]]:
    """The verdict on a remedy for a finding, the problems that came with it, and what stays beside it.

    What followed from the finding is to go with it. A setting that is usual again is no cure where what it was blamed
    for stays.
    """
    before, after = diagnose(without, limits), diagnose(with_, limits)
    known, found = {one.name for one in before}, [one.name for one in after]
    tops = [top for top in roots(before) if top.finding.name == finding.name]
    followed = {one.finding.name for top in tops for one in top} - {finding.name}
    problems = [one.name for one in after if one.severity == "problem"]
    new = [name for name in problems if name not in known]
    if died or new:
        return "worse", new, []
    if finding.name in found or finding.explains.keys() & set(found):
        return "not cured", [], []
    left = [name for name in found if name in followed or name in problems]
    return ("in part" if left else "cured"), [], left


def first_sign(log: RunLog, name: str, limits: Limits | None = None, severity: str = "warning") -> int | None:
    """The optimizer step at which a finding, at least so severe, could first be told from the log; None where it
    cannot."""
    for step in sorted({int(row["step"]) for row in (*log.rows, *log.evals)}):
        rows, evals = ([row for row in every if row["step"] <= step] for every in (log.rows, log.evals))
        if name in severe(diagnose(replace(log, rows=rows, evals=evals), limits), severity):
            return step
    return None


def _metric(finding: Finding, log: RunLog) -> str:
    """The logged metric that the remedy moves; of several with its prefix the first."""
    name = finding.remedy.moves
    return name + log.names(name)[0] if name.endswith("/") and log.names(name) else name


def _after(log: RunLog, name: str, step: int) -> Series:
    series = log.series(name)
    kept = [(at, value) for at, value in zip(series.steps, series.values, strict=True) if at > step]
    return Series([at for at, _ in kept], [value for _, value in kept])


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
