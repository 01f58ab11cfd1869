"""A run as the doctor sees it: what was logged, under one set of names whatever the trainer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

# The doctor's name of a metric, and the names that trainers log it under: the first one that is there counts.
LOGGED_NAMES: dict[str, tuple[str, ...]] = {
    "score": ("objective/scores", "reward"),
    "score_std": ("objective/scores_std", "reward_std"),
    "kl": ("objective/kl", "kl"),
    "kl_coef": ("objective/kl_coef",),
    "entropy": ("policy/entropy_avg", "entropy"),
    "approxkl": ("policy/approxkl_avg",),
    "clipfrac": ("policy/clipfrac_avg", "clip_ratio/region_mean"),
    "length": ("completions/mean_length",),
    "truncated": ("completions/clipped_ratio",),
    "value_loss": ("loss/value_avg",),
    "margin": ("rewards/margins", "margin"),
    "accuracy": ("rewards/accuracies", "accuracy"),
}


AGREEMENT = "agreement/"  # of the score with a yardstick, by its name
SHIFTED = "agreement_shifted/"  # of the score with its verdicts on rows some places away, the highest
ONE_VERDICT = "one_verdict/"  # of the completions the share with a yardstick's most common verdict, by its name
MISSED = "missed/"  # of the completions that a yardstick likes best the share that scores low, by its name


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion. `kl` in nats, `tokens` counted with the EOS; NaN and -1 where unknown. `watched`: every
    evaluation completes its prompt."""

    step: int
    prompt: str
    completion: str
    score: float
    kl: float = math.nan
    tokens: int = -1
    watched: bool = False


@dataclass(frozen=True)
class Series:
    """One metric over a run, its finite and its other values.

    Attributes:
        steps: optimizer steps.
        values: as many.
    """

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.values)

    def start(self, count: int = 3) -> float:
        """Mean of the first `count` values; NaN where there are none."""
        return fmean(self.values[:count]) if self.values else math.nan

    def recent(self, count: int = 4) -> float:
        """Mean of the last `count` values; NaN where there are none."""
        return fmean(self.values[-count:]) if self.values else math.nan

    def lasting(self) -> float:
        """The lower of the last two values: what one bad rollout made alone does not last. NaN where there are none."""
        return min(self.values[-2:], default=math.nan)

    def best(self, count: int = 4) -> float:
        """The highest mean of `count` values in a row."""
        if not self.values:
            return math.nan
        return max(fmean(self.values[i : i + count]) for i in range(max(1, len(self) - count + 1)))

    def noise(self) -> float:
        """Standard deviation of one value about its neighbours: root mean square of successive differences, over the
        root of 2 (von Neumann 1941), which a trend hardly touches."""
        gaps = [b - a for a, b in zip(self.values, self.values[1:], strict=False)]
        return math.sqrt(fmean(gap * gap for gap in gaps) / 2) if gaps else math.nan

    def rise(self, count: int = 4) -> tuple[float, float]:
        """The recent mean less that of the start, and the same in standard errors of such a difference; NaN where there
        are no values."""
        gained, spread = self.recent(count) - self.start(count), self.noise()
        error = spread * math.sqrt(2 / count)
        if error > 0 or math.isnan(gained):
            return gained, gained / error
        return gained, math.copysign(math.inf, gained) if gained else 0.0

    def ever_rose(self, errors: float) -> bool:
        """Whether the best lies so many standard errors above the start, or the second half above the first. Of n means
        the best lies sqrt(2 ln n) standard deviations above their middle by chance alone."""
        needed = math.sqrt(errors**2 + math.log(max(len(self) / 4, 1.0)))
        rose = self.best() - self.start(4) > needed * self.noise() * math.sqrt(2 / 4)
        return rose or self.rise(max(len(self) // 2, 1))[1] > errors


@dataclass(frozen=True)
class RunLog:
    """What a run logged.

    Attributes:
        kind: "ppo" (trl_ext's or TRL 1.12's), "online" (GRPOTrainer, RLOOTrainer), "reward", "dpo" or "other".
        rows: training logs in order, each with its `step`.
        evals: evaluation logs in order, each with its `step` and `epoch`; names without the prefix "eval_".
        config: the trainer's settings, as far as they are known.
        samples: completions, as far as they are known.
    """

    kind: str
    rows: list[dict[str, Any]]
    evals: list[dict[str, Any]] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        history: Iterable[Mapping[str, Any]],
        config: Mapping[str, Any] | None = None,
        samples: Sequence[Sample] = (),
    ) -> RunLog:
        """From a Trainer's `state.log_history`."""
        rows, evals = [], []
        for entry in history:
            step = int(entry.get("step", 0))
            numbers = {name: _as_float(value) for name, value in entry.items() if name != "step"}
            metrics = {name: value for name, value in numbers.items() if value is not None}
            of_eval = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
            of_training = {name: value for name, value in metrics.items() if not name.startswith("eval_")}
            if of_eval:
                epoch = {"epoch": metrics["epoch"]} if "epoch" in metrics else {}
                evals.append({"step": step, **epoch, **of_eval})
            elif "train_runtime" not in of_training:
                rows.append({"step": step, **of_training})
        return cls(kind_of(rows, evals), rows, evals, dict(config or {}), list(samples))

    def series(self, name: str, evals: bool = False, finite: bool = True) -> Series:
        """A metric by the doctor's name or by the logged one; empty where it was not logged. "eval_" before a name
        does what `evals` does. What is NaN or infinite is no measurement and is left out, but where not `finite`."""
        name, evals = name.removeprefix("eval_"), evals or name.startswith("eval_")
        rows = self.evals if evals else self.rows
        for key in LOGGED_NAMES.get(name, (name,)):
            points = [(row["step"], row[key]) for row in rows if key in row]
            if points:
                if key == "kl" and self.kind == "online":
                    points = _kl_of_completions(rows)
                kept = [(step, value) for step, value in points if not finite or math.isfinite(value)]
                return Series([step for step, _ in kept], [value for _, value in kept])
        return Series([], [])

    def surprise(self) -> Series:
        """What a token of a completion surprises the policy by, nats: where all tokens are sampled an estimate of its
        entropy, which is there before a rollout is trained on."""
        names = ("objective/entropy", "completions/mean_length")
        known = [
            row
            for row in self.rows
            if all(math.isfinite(row.get(name, math.nan)) for name in names) and row[names[1]] > 0
        ]
        return Series([row["step"] for row in known], [row[names[0]] / row[names[1]] for row in known])

    def names(self, prefix: str, suffix: str = "") -> list[str]:
        """What stands between `prefix` and `suffix` in the names of what was measured, each once, in order."""
        around = len(prefix) + len(suffix)
        fit = [name for name in self._measured if name.startswith(prefix) and name.endswith(suffix)]
        return [name[len(prefix) : len(name) - len(suffix)] for name in fit if len(name) > around]

    @cached_property
    def _measured(self) -> list[str]:
        """The names of what was a number in any row, each once, in order: dozens of rules ask for them."""
        return list({name: None for row in self.rows for name, value in row.items() if math.isfinite(value)})

    def setting(self, name: str, default: Any = None) -> Any:
        """A field of the config; `default` where it is unknown or None."""
        value = self.config.get(name)
        return default if value is None else value

    @property
    def gradients(self) -> float:
        """How many gradients the signal and the noise of a rollout are of: its micro-batches, or, of several processes,
        its minibatches; NaN where that is not known."""
        if self.setting("world_size", 1) > 1:
            return float(self.setting("num_mini_batches", 1))
        size, rows = self.setting("rollout_batch_size"), self.setting("per_device_train_batch_size")
        return float(size) / float(rows) if size and rows else math.nan

    @property
    def has_the_first(self) -> bool:
        """Whether the first row is of the first rollout; of a log that counts no episodes, it is taken to be."""
        size = float(self.setting("rollout_batch_size", 0))
        return bool(self.rows) and self.rows[0].get("episode", size) <= size

    def suffices(self, series: Series, completions: float) -> bool:
        """Whether a metric of rollouts is of three logs, or of fewer with so many completions; of fewer where a
        rollout's size is not known it does not suffice."""
        return len(series) >= 3 or len(series) * float(self.setting("rollout_batch_size", 0)) >= completions

    @property
    def in_half_precision(self) -> bool:
        """Whether log-probabilities were computed in bfloat16 or float16."""
        return bool(self.setting("bf16") or self.setting("fp16") or self.setting("dtype", "float32") != "float32")

    def last_samples(self, count: int = 3) -> list[Sample]:
        """Of the last step with any, the completions with the highest scores."""
        if not self.samples:
            return []
        last = max(sample.step for sample in self.samples)
        latest = [sample for sample in self.samples if sample.step == last]
        return sorted(latest, key=lambda sample: math.inf if math.isnan(sample.score) else -sample.score)[:count]

    @property
    def steps(self) -> tuple[int, int]:
        """The first and the last step that was logged."""
        return (self.rows[0]["step"], self.rows[-1]["step"]) if self.rows else (0, 0)


def _kl_of_completions(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """The KL of a completion by step. GRPOTrainer and RLOOTrainer log that of a token, and the mean length only where
    they sample; it holds until they sample again."""
    points, length = [], math.nan
    for row in rows:
        length = row.get("completions/mean_length", length)
        if "kl" in row and not math.isnan(length):
            points.append((row["step"], row["kl"] * length))
    return points


def kind_of(rows: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]] = ()) -> str:
    """The kind of a run, by the names that it logged."""
    names = {name for row in [*rows, *evals] for name in row}
    if "logps/chosen" in names:
        # OnlineDPOTrainer logs objective/kl, KTOTrainer no accuracies; ORPO, CPO and TPO have no reference.
        of_pairs = "rewards/accuracies" in names and "objective/kl" not in names
        return "dpo" if of_pairs and not _without_reference([*rows, *evals]) else "other"
    if "objective/kl" in names:
        return "ppo"
    if "reward_std" in names and "completions/mean_length" in names:
        return "online"
    return "reward" if {"accuracy", "mean_reward"} & names else "other"


def _without_reference(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the rewards of pairs are their log-probabilities times one number, so that no reference is in them."""
    ratios = [
        row[f"rewards/{side}"] / row[f"logps/{side}"]
        for row in rows
        for side in ("chosen", "rejected")
        if row.get(f"rewards/{side}") and row.get(f"logps/{side}")
    ]
    return len(ratios) > 1 and min(ratios) > 0 and max(ratios) < 1.001 * min(ratios)


def _as_float(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
