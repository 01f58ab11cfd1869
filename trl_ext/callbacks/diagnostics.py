"""The doctor at work while a run goes on, in our PPOTrainer and in TRL's own trainers."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from trl_ext.callbacks.adaptive_kl import ADAPTIVE_KL_STATE
from trl_ext.callbacks.rollout import RolloutCallback
from trl_ext.core import masked_sum
from trl_ext.core.evidence import alike, correlation, missed_share
from trl_ext.diagnostics import Edge, Finding, Limits, Rule, RunLog, Sample, diagnose
from trl_ext.diagnostics.forks import scale_learning_rate
from trl_ext.diagnostics.graph import cause_of
from trl_ext.diagnostics.log import AGREEMENT, MISSED, ONE_VERDICT, SHIFTED
from trl_ext.diagnostics.planned import planned
from trl_ext.runs import on_main, without_secrets, write_whole
from trl_ext.types import Experience, Rollout, as_text

logger = logging.getLogger(__name__)

# Not the class's name: Transformers would rebuild a callback of that name from its saved state.
DIAGNOSTICS_STATE = "trl_ext.diagnostics"
ACTIONS = ("warn", "stop", "act")
# Settings that PPO reads anew at every rollout or step, so that changing them changes the run.
LIVE = ("kl_coef", "entropy_coef", "vf_coef", "missing_eos_penalty")
PACKAGES = ("trl-ext", "trl", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "torch")
MAX_DATA_ROWS = 5_000  # of a reward model's data
MAX_SAMPLES = 400  # of rollouts; those of evaluations are not limited

PLACES = 64  # by which scores are looked for on other rows
JUDGED = ("prompts", "completions", "completion_ids")  # what a yardstick is called with
Yardstick = Callable[..., Sequence[float | None]]


class DiagnosticsCallback(RolloutCallback):
    """Diagnoses the run at every log, and in our PPOTrainer the settings before the run and the first rollout before a
    step is taken on it; reports each finding once, and writes `run.json` (settings and versions) into the output folder
    for `trl-ext doctor` and `trl-ext report`.

    Args:
        on_problem: what a finding of severity "problem" leads to. "warn": a warning. "stop": a warning, then the run is
            saved and ends, with no further step on the rollout in use. "act": a warning, and the remedy's settings are
            applied as far as a run in progress can take them (in PPO kl_coef, entropy_coef, vf_coef,
            missing_eos_penalty; everywhere the learning rate). Of a finding and its cause, those of the cause.
        yardstick: a reward function that is not trained on. It measures what the score stands for: a better judge than
            the one that is trained on, exact grading, or people's verdicts. Our PPOTrainer calls it, of several
            processes in the main one alone, with `prompts`, `completions` and `completion_ids` of every rollout and of
            every evaluation, and logs its mean as `yardstick/<name>`, its correlation with the score as
            `agreement/<name>`, and of the completions that it likes best the share that scores low as `missed/<name>`,
            and that with its most common verdict as `one_verdict/<name>`.
        limits: thresholds; None: the documented ones.
        rules: None: the catalogue's.
        samples: completions of each rollout to keep for findings and reports.
    """

    def __init__(
        self,
        on_problem: str = "warn",
        yardstick: Yardstick | None = None,
        limits: Limits | None = None,
        rules: Sequence[Rule] | None = None,
        samples: int = 8,
    ) -> None:
        if on_problem not in ACTIONS:
            raise ValueError(f"on_problem is {on_problem!r}: choose one of {', '.join(ACTIONS)}.")
        if yardstick is not None and not callable(yardstick):
            raise ValueError(
                f"yardstick is {yardstick!r}: pass a function, or in a recipe its dotted path (module.function)."
            )
        if yardstick is not None:
            _check_yardstick(yardstick)
        self.on_problem, self.yardstick, self.limits, self.rules = on_problem, yardstick, limits, rules
        self.findings: list[Finding] = []
        """Each finding once, as it was when first made."""
        self._keep = samples
        self._latest: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._watched: list[Sample] = []
        self._config: dict[str, Any] = {}
        self._stepped_by: dict[str, Any] = {}  # optimizer and schedule
        self._judged_now: dict[str, float] | None = None  # what the yardstick says of the rollout in use
        self._noted = False  # whether that is in the state
        # Part of the trainer's state: a resumed run neither repeats a warning nor acts on a finding a second time.
        self._state: dict[str, Any] = _initial_state()

    def log_of(self, state: TrainerState) -> RunLog:
        """The run so far, as the rules see it."""
        return RunLog.of(state.log_history, self._config, [*self._watched, *self._latest])

    # Events -----------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the settings; take up the state and the samples of an interrupted run.

        Raises:
            ValueError: this trainer cannot be stopped.
        """
        if self.on_problem == "stop" and hasattr(args, "response_length"):
            raise ValueError(
                "TRL's PPOTrainer ignores a callback's request to stop: let on_problem be 'warn' or 'act'."
            )
        if self.yardstick is not None and not hasattr(args, "steps_per_rollout"):
            logger.warning("Only trl_ext's PPOTrainer calls the yardstick: it has no effect here.")
        self.findings = []
        self._state = copy.deepcopy(state.stateful_callbacks.get(DIAGNOSTICS_STATE)) or _initial_state()
        state.stateful_callbacks[DIAGNOSTICS_STATE] = self._state
        for name, value in self._state["settings"].items():
            setattr(args, name, value)
        earlier = _read_samples(Path(args.output_dir), state.global_step)
        self._watched = [sample for sample in earlier if sample.watched]
        self._latest = deque((sample for sample in earlier if not sample.watched), MAX_SAMPLES)
        self._config = {**args.to_dict(), "rollout_batch_size": getattr(args, "rollout_batch_size", None)}
        self._config["world_size"] = args.world_size
        model = kwargs.get("model")
        precision = getattr(getattr(model, "causal_lm", model), "dtype", torch.float32)
        self._config["dtype"] = str(precision).removeprefix("torch.")
        self._config |= _lora_settings(model)
        self._config["reference_named"] = getattr(model, "reference_named", None)
        self._config["steps_of_run"] = state.max_steps
        self._config["rate_changed"] = self._state.get("rate_changed", False)
        for name, value in _data_figures(kwargs.get("train_dataloader"), self._config.get("objective")).items():
            self._state["measured"][f"data/{name}"] = [value]
        self._config |= planned(args, state, **kwargs)
        self._config["reward_names"] = self._state.get("reward_names")
        self._stepped_by = {name: kwargs.get(name) for name in ("optimizer", "lr_scheduler")}
        self._judged_now, self._noted = None, False
        self._write_settings(args, state)
        if self.rules is None and hasattr(args, "steps_per_rollout") and not state.log_history:
            self._tell(diagnose(RunLog("ppo", [], config=self._config), self.limits), state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Have the first step logged: in DPO it shows whether the reference is right."""
        if state.global_step == 1 and not hasattr(args, "steps_per_rollout"):
            control.should_log = True

    def on_update_begin(
        self, args: Any, state: TrainerState, control: Any, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """Apply the yardstick to the rollout; diagnose the first one before the policy learns from it."""
        self._judged_now, self._noted = self._judged(experience, among_others=True), False
        if state.global_step > 0:
            return
        of_rollout = {"step": 0, "episode": args.rollout_batch_size, **metrics, **self._judged_now}
        self._note_functions(args, state, of_rollout)
        seen = samples_of(experience, 0, self._keep)
        log = RunLog.of([*state.log_history, of_rollout], self._config, [*self._watched, *seen])
        self._act_on(diagnose(log, self.limits, self.rules), args, state, control)
        if control.should_training_stop:  # what was seen is logged and kept, though nothing was trained on it
            control.should_log = True
            self._note(experience, state)

    def on_update_end(
        self, args: Any, state: TrainerState, control: Any, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """Keep some completions, and what the yardstick said of all."""
        if not self._noted:
            self._note(experience, state)

    def _note(self, experience: Experience, state: TrainerState) -> None:
        self._latest += samples_of(experience, state.global_step, self._keep)
        if self._judged_now is None:  # the run was taken up amid this rollout
            self._judged_now = self._judged(experience, among_others=True)
        for metric, value in self._judged_now.items():
            self._state["measured"].setdefault(metric, []).append(value)
        self._judged_now, self._noted = None, True

    def on_evaluation_end(
        self, args: Any, state: TrainerState, control: Any, experience: Experience, metrics: dict[str, float]
    ) -> None:
        """Keep the completions of the first prompts, always the same; apply the yardstick to all."""
        metrics.update(self._judged(experience))
        self._watched += samples_of(experience, state.global_step, self._keep, watched=True)
        self._write(args, state)

    def _judged(self, experience: Experience, among_others: bool = False) -> dict[str, float]:
        """The yardstick's mean over a rollout, its correlation with the score, the share of what it likes best that
        scores low, and the share of its most common verdict, where they are finite; nothing without a yardstick.

        Args:
            among_others: also the highest correlation that scores have with the verdicts on rows some places above.
        """
        if self.yardstick is None:
            return {}
        scores = experience.scores.total.cpu()
        name = getattr(self.yardstick, "__name__", type(self.yardstick).__name__)
        verdicts = on_main(partial(_verdicts, self.yardstick, name, experience.rollout))
        judged = torch.tensor(verdicts)
        figures = {
            f"yardstick/{name}": float(judged.nanmean()),
            f"{AGREEMENT}{name}": correlation(judged, scores),
            f"{MISSED}{name}": missed_share(judged, scores),
            f"{ONE_VERDICT}{name}": alike(judged) if 2 * judged.isnan().sum() < len(judged) else math.nan,
        }
        if among_others:
            shifted = [correlation(judged.roll(places), scores) for places in range(1, min(len(scores), PLACES + 1))]
            figures[f"{SHIFTED}{name}"] = max((one for one in shifted if math.isfinite(one)), default=math.nan)
        return {metric: value for metric, value in figures.items() if math.isfinite(value)}

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write diagnostics.json."""
        self._write(args, state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write diagnostics.json."""
        self._write(args, state)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Diagnose."""
        if not logs or not state.log_history:
            return
        self._note_functions(args, state, logs)
        if not any(name.startswith("eval_") for name in logs):
            measured = {name: sum(values) / len(values) for name, values in self._state["measured"].items()}
            for row in (logs, state.log_history[-1]):
                row.update(measured)
            self._state["measured"].clear()
        self._act_on(diagnose(self.log_of(state), self.limits, self.rules), args, state, control)

    def _act_on(self, present: Sequence[Finding], args: Any, state: TrainerState, control: Any) -> None:
        for finding in self._tell(present, state):
            if finding.severity == "problem" and finding.name not in self._state.setdefault("acted", []):
                self._state["acted"].append(finding.name)  # of settings there may be several
                self._respond(finding, present, args, state, control)

    def _tell(self, present: Sequence[Finding], state: TrainerState) -> list[Finding]:
        """Report the findings that are new, and warnings that have become a problem; return those that no earlier part
        of the run reported."""
        known, named, new = {finding.topic for finding in self.findings}, self._state["named"], []
        for finding in present:
            if finding.topic not in known:
                self.findings.append(finding)
            mark = finding.topic if finding.severity == "problem" else f"{finding.topic} (warning)"
            if not {finding.topic, mark} & set(named):
                named.append(mark)
                new.append(finding)
                edge = cause_of(finding, present)
                if state.is_world_process_zero:
                    logger.warning("%s", finding if edge is None else _as_consequence(finding, edge))
        return new

    def _note_functions(self, args: Any, state: TrainerState, logs: dict[str, Any]) -> None:
        """Note the reward functions in the order of their weights: a saved log is sorted by name."""
        names = [name.split("/")[1] for name in logs if name.startswith("rewards/") and name.endswith("/std")]
        if names and not self._config.get("reward_names"):
            self._config["reward_names"] = self._state["reward_names"] = names
            self._write_settings(args, state)

    def _write_settings(self, args: Any, state: TrainerState) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            settings, recipe = without_secrets(self._config), getattr(args, "recipe", None)
            content = {"settings": settings, "versions": versions(), "recipe": recipe}
            write_whole(folder / "run.json", json.dumps(content, indent=2, default=str) + "\n")

    def _write(self, args: Any, state: TrainerState) -> None:
        if state.is_world_process_zero and self._config:
            findings = [{**asdict(finding), "samples": []} for finding in self.findings]
            samples = [asdict(sample) for sample in (*self._watched, *self._latest)]
            content = {"findings": findings, "samples": samples}
            write_whole(Path(args.output_dir) / "diagnostics.json", json.dumps(content, default=str) + "\n")

    # What a problem leads to ------------------------------------------------------------------------------------------

    def _respond(self, finding: Finding, present: Sequence[Finding], args: Any, state: Any, control: Any) -> None:
        if self.on_problem == "stop":
            control.should_save = control.should_training_stop = control.should_update_stop = True
        elif self.on_problem == "act":
            edge, schedule = cause_of(finding, present), self._stepped_by.get("lr_scheduler")
            if any(self._changes(one, args, state) for one in present if edge is not None and one.name == edge.cause):
                return  # its cause is what is changed
            for name, value in self._changes(finding, args, state).items():
                if name in LIVE:
                    logger.warning("%s: %s changes from %s to %s.", finding.name, name, getattr(args, name), value)
                    setattr(args, name, value)
                    self._state["settings"][name] = value
                else:
                    factor = value / args.learning_rate / self._state.get("rate_times", 1.0)
                    if math.isclose(factor, 1.0):  # another finding has asked for the same
                        continue
                    scale_learning_rate(self._stepped_by["optimizer"], schedule, factor)
                    self._state["rate_times"] = value / args.learning_rate
                    self._config["rate_changed"] = self._state["rate_changed"] = True
                    self._write_settings(args, state)
                    logger.warning("%s: learning_rate is multiplied by %.3g.", finding.name, factor)

    def _changes(self, finding: Finding, args: Any, state: TrainerState) -> dict[str, Any]:
        """What of a remedy a run in progress can take. A coefficient that a controller chooses is the controller's."""
        can = [name for name in LIVE if hasattr(args, name)]
        if ADAPTIVE_KL_STATE in state.stateful_callbacks and "kl_coef" in can:
            can.remove("kl_coef")
        can += ["learning_rate"] if self._stepped_by.get("lr_scheduler") is not None else []
        return {name: value for name, value in finding.remedy.changes.items() if name in can}


def _verdicts(yardstick: Yardstick, name: str, rollout: Rollout) -> list[float]:
    """Of a rollout's completions, (rows,); NaN where there is none."""
    verdicts = yardstick(
        prompts=rollout.prompts, completions=rollout.completions, completion_ids=rollout.completion_tokens
    )
    if len(verdicts) != len(rollout.completions):
        raise ValueError(
            f"the yardstick {name} returned {len(verdicts)} verdicts on {len(rollout.completions)} completions: return "
            "one of each"
        )
    return [math.nan if verdict is None else float(verdict) for verdict in verdicts]


def _check_yardstick(yardstick: Yardstick) -> None:
    """Refuse one that could not be called.

    Raises:
        ValueError: it is asynchronous, or asks for more than it is called with.
    """
    name = getattr(yardstick, "__name__", type(yardstick).__name__)
    if inspect.iscoroutinefunction(yardstick) or inspect.iscoroutinefunction(type(yardstick).__call__):
        raise ValueError(f"yardstick {name} is asynchronous: give a function that returns its verdicts.")
    try:
        signature = inspect.signature(yardstick)
    except (TypeError, ValueError):  # a callable that Python cannot look into
        return
    try:
        signature.bind(**dict.fromkeys(JUDGED))
    except TypeError as error:
        starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        named = [p for p in signature.parameters.values() if p.kind not in starred]
        asked = [p.name for p in named if p.default is p.empty and p.name not in JUDGED]
        taken = ", ".join(p.name for p in named) or "nothing"
        what = f"asks for {asked[0]!r}" if asked else f"takes {taken}"
        raise ValueError(
            f"yardstick {name} {what}, and is called with {', '.join(JUDGED)}: give it these and **kwargs, and let it "
            "find a row's further columns by its prompt."
        ) from error


def _as_consequence(finding: Finding, edge: Edge) -> str:
    """A finding that another one explains: there is no remedy of its own to follow."""
    return f"{finding.title}. {finding.evidence} It follows from {edge.cause}: {edge.mechanism}"


def _initial_state() -> dict[str, Any]:
    """Topics of reported findings (of a warning with that word), names of those that were acted on, changed settings,
    measurements since the last log, and the reward functions in the order of their weights."""
    return {"named": [], "acted": [], "settings": {}, "measured": {}, "reward_names": []}


def _read_samples(folder: Path, step: int) -> list[Sample]:
    """The samples up to `step` that the interrupted run wrote; none at step 0, and where the file is damaged: no run
    is lost for what is only shown."""
    path = folder / "diagnostics.json"
    if step == 0 or not path.is_file():
        return []
    try:
        samples = [Sample(**sample) for sample in json.loads(path.read_text(encoding="utf-8"))["samples"]]
    except (ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s): the completions that it kept are not shown again.", path, error)
        return []
    return [sample for sample in samples if sample.step <= step]


def samples_of(experience: Experience, step: int, count: int, watched: bool = False) -> list[Sample]:
    """The first completions with score and KL (k1, nats)."""
    few = experience.rows(torch.arange(min(count, len(experience.kl))))
    rollout, pass_ = few.rollout, few.score_pass
    kl = masked_sum(pass_.logprobs - pass_.ref_logprobs, rollout.completion_mask, dim=1)
    rows = zip(rollout.prompts, rollout.completions, few.scores.total, kl, rollout.lengths, strict=True)
    return [
        Sample(
            step=step,
            prompt=as_text(prompt),
            completion=as_text(completion),
            score=float(score),
            kl=float(nats),
            tokens=int(length),
            watched=watched,
        )
        for prompt, completion, score, nats, length in rows
    ]


def versions() -> dict[str, str]:
    """Versions of the installed packages that the results depend on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def _lora_settings(model: Any) -> dict[str, Any]:
    """Rank and alpha of the policy's LoRA adapter, and whether it is rsLoRA's; empty where there is none."""
    named = getattr(model, "adapters", None)  # a SharedBase's
    peft_model, name = (model.model, named["policy"]) if isinstance(named, dict) else (model, "default")
    config = (getattr(peft_model, "peft_config", None) or {}).get(name)
    if config is None:
        return {}
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_rslora": "use_rslora"}
    return {name: getattr(config, of_peft, None) for name, of_peft in names.items()}


def _data_figures(dataloader: Any, objective: str | None) -> dict[str, float]:
    """Figures of a reward model's tokenised training data; empty for other data.

    "longer_chosen": of the pairs of unequal length, the share whose longer side was chosen. "margin": the mean absolute
    margin. "good": the share of good labels.
    """
    dataset: Any = getattr(dataloader, "dataset", None)
    names = set(getattr(dataset, "column_names", None) or [])
    if not {"chosen_ids", "rejected_ids"} <= names:
        return {}
    rows = list(islice(dataset, MAX_DATA_ROWS))
    figures: dict[str, float] = {}
    gaps = [gap for row in rows if (gap := len(row["chosen_ids"]) - len(row["rejected_ids"]))]
    if gaps:
        figures["longer_chosen"] = sum(gap > 0 for gap in gaps) / len(gaps)
    if "margin" in names:
        figures["margin"] = sum(abs(float(row["margin"])) for row in rows) / len(rows)
    if objective == "binary":
        figures["good"] = sum(row["targets"][0] for row in rows) / len(rows)
    return figures
