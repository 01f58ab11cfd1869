"""How good a reward model is: its scores beside people's feedback, on answers that it was not trained on."""

from __future__ import annotations

import json
import math
import random
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from statistics import StatisticsError, correlation, fmean, pstdev

from trl_ext.feedback.files import FeedbackError

BINS = 10
MAX_COMPARED_PAIRS = 200_000


@dataclass(frozen=True)
class ScoredAnswer:
    """One held-out answer with people's feedback and the reward model's score.

    Attributes:
        prompt: answers with an equal prompt are compared.
        worth: by people's feedback: a mean rating, the negative of a rank, or 1 (good, chosen) or 0 (bad, rejected).
        score: by the reward model.
        length: in characters or tokens.
    """

    prompt: str
    worth: float
    score: float
    length: int


@dataclass(frozen=True)
class Judgement:
    """The figures. A figure that cannot be computed is NaN (null in JSON), and `missing` says why.

    Attributes:
        answers, pairs: how many were compared.
        pair_accuracy: of pairs of answers to one prompt, the share that the scores put in people's order; equal scores
            count half.
        accuracy_by_strength: (least difference in worth, pair accuracy) of each quarter of the pairs, weakest first.
        spearman: rank correlation of score and worth over all answers.
        expected_calibration_error: mean distance between sigmoid(score difference) and the share of pairs in which
            people agree, over ten bins weighted by their pairs (Guo et al. 2017, arXiv:1706.04599).
        reliability: per bin: mean prediction, share that came true, pairs.
        length_correlation: rank correlation of score and length.
        length_correlation_of_people: that of worth and length, for comparison.
        mean, std: of the scores; PPO's value role starts at 0, so a mean near 0 and a std near 1 suit it.
        reference_mean, reference_std: the same of samples of the reference, NaN where none were scored. PPO starts
            there: `score_normalization="reference"` subtracts the one and divides by the other.
        centred_mean: `mean` minus `reference_mean`; above 0, people's answers score higher than those that PPO starts
            from.
        missing: of each figure that is NaN, why.
    """

    answers: int
    pairs: int
    pair_accuracy: float
    accuracy_by_strength: list[tuple[float, float]]
    spearman: float
    expected_calibration_error: float
    reliability: list[tuple[float, float, int]]
    length_correlation: float
    length_correlation_of_people: float
    mean: float
    std: float
    reference_mean: float
    reference_std: float
    centred_mean: float
    missing: dict[str, str] = field(default_factory=dict)

    def shown(self, figure: str, form: str) -> str:
        """A figure as people read it: `form` is a format, as in ".1%"; where it is missing, why."""
        return f"none ({self.missing[figure]})" if figure in self.missing else format(getattr(self, figure), form)


def judge(answers: Sequence[ScoredAnswer], seed: int = 0, reference_scores: Sequence[float] = ()) -> Judgement:
    """Compare scores with people's feedback.

    Args:
        answers: held-out answers.
        seed: of the choice of pairs where there are more than `MAX_COMPARED_PAIRS`.
        reference_scores: of samples of the reference.

    Raises:
        FeedbackError: fewer than two answers.
    """
    if len(answers) < 2:
        raise FeedbackError(f"A reward model is judged on two answers or more, not {len(answers)}.")
    pairs = _pairs(answers, random.Random(seed))
    right = [1.0 if d > 0 else 0.5 if d == 0 else 0.0 for _, d in pairs]
    reliability = _reliability([difference for _, difference in pairs])
    scores = [answer.score for answer in answers]
    reference_mean = fmean(reference_scores) if reference_scores else math.nan
    judgement = Judgement(
        answers=len(answers),
        pairs=len(pairs),
        pair_accuracy=fmean(right) if pairs else math.nan,
        accuracy_by_strength=_by_strength([gap for gap, _ in pairs], right),
        spearman=rank_correlation(scores, [answer.worth for answer in answers]),
        expected_calibration_error=(
            sum(count * abs(predicted - true) for predicted, true, count in reliability) / len(pairs)
            if pairs
            else math.nan
        ),
        reliability=reliability,
        length_correlation=rank_correlation(scores, [float(answer.length) for answer in answers]),
        length_correlation_of_people=rank_correlation(
            [answer.worth for answer in answers], [float(answer.length) for answer in answers]
        ),
        mean=fmean(scores),
        std=pstdev(scores),
        reference_mean=reference_mean,
        reference_std=pstdev(reference_scores) if reference_scores else math.nan,
        centred_mean=fmean(scores) - reference_mean,
    )
    return replace(judgement, missing=_missing(judgement, answers))


def _missing(judgement: Judgement, answers: Sequence[ScoredAnswer]) -> dict[str, str]:
    """Why figures are NaN."""
    columns = {"score": "every score is the same", "worth": "people judged every answer alike"}
    columns["length"] = "every answer has the same length"
    constant = {name: why for name, why in columns.items() if len({getattr(a, name) for a in answers}) == 1}

    def why(*names: str) -> str:
        return next((constant[name] for name in names if name in constant), "the scores are not all numbers")

    no_pair = "no two of the answers belong to one prompt and were judged unlike"
    no_reference = "no answer of the reference was scored; without prompts it has nothing to answer"
    reasons = {
        "pair_accuracy": no_pair,
        "expected_calibration_error": no_pair,
        "spearman": why("score", "worth"),
        "length_correlation": why("score", "length"),
        "length_correlation_of_people": why("worth", "length"),
        **dict.fromkeys(("reference_mean", "reference_std", "centred_mean"), no_reference),
    }
    return {name: reason for name, reason in reasons.items() if math.isnan(getattr(judgement, name))}


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; NaN where one side is constant."""
    try:
        return correlation(_ranks(x), _ranks(y))
    except StatisticsError:
        return math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + 1 + bisect_right(ordered, value)) / 2 for value in values]


def _pairs(answers: Sequence[ScoredAnswer], rng: random.Random) -> list[tuple[float, float]]:
    """(difference in worth, above 0; difference in score) of pairs of answers to one prompt."""
    groups: defaultdict[str, list[ScoredAnswer]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt].append(answer)
    total = sum(len(group) * (len(group) - 1) // 2 for group in groups.values())
    differences = []
    for group in groups.values():
        if total <= MAX_COMPARED_PAIRS:
            chosen = list(combinations(group, 2))
        else:
            count = max(1, round(MAX_COMPARED_PAIRS * len(group) * (len(group) - 1) / 2 / total))
            chosen = [tuple(rng.sample(group, 2)) for _ in range(count)] if len(group) > 1 else []  # type: ignore[misc]
        for a, b in chosen:
            if a.worth != b.worth:
                better, worse = (a, b) if a.worth > b.worth else (b, a)
                differences.append((better.worth - worse.worth, better.score - worse.score))
    return differences


def _by_strength(gaps: list[float], right: list[float]) -> list[tuple[float, float]]:
    order = sorted(range(len(gaps)), key=gaps.__getitem__)
    quarters = [order[len(order) * i // 4 : len(order) * (i + 1) // 4] for i in range(4)]
    return [(gaps[part[0]], fmean(right[i] for i in part)) for part in quarters if part]


def _reliability(differences: list[float]) -> list[tuple[float, float, int]]:
    """How sure the model is of the answer that it prefers (0.5 to 1), and how often people prefer it too."""
    bins: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for difference in differences:
        confidence = 1 / (1 + math.exp(-min(abs(difference), 700.0)))
        came_true = 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        bins[min(BINS - 1, int((confidence - 0.5) * 2 * BINS))].append((confidence, came_true))
    return [(fmean(c for c, _ in bins[i]), fmean(t for _, t in bins[i]), len(bins[i])) for i in sorted(bins)]


def save_judgement(
    judgement: Judgement, folder: Path, answers: Sequence[ScoredAnswer], reference_scores: Sequence[float] = ()
) -> None:
    """Write judgement.json and, where matplotlib is installed, judgement.png: the reliability plot, accuracy by
    strength, score against worth, and the scores beside the reference's."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(judgement).items()
    }
    (folder / "judgement.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    reliable, strong, scattered, centred = figure.subplots(1, 4)
    reliable.plot([0.5, 1], [0.5, 1], color="#999999", linewidth=0.8, linestyle="--")
    reliable.plot(*zip(*[(p, t) for p, t, _ in judgement.reliability], strict=True), color="#0072b2", marker="o", ms=4)
    reliable.set_xlabel("predicted chance")
    reliable.set_ylabel("share that came true")
    named = {"expected_calibration_error": ".3f", "pair_accuracy": ".1%", "spearman": ".2f"}
    figures = {
        name: "none" if name in judgement.missing else format(getattr(judgement, name), form)
        for name, form in named.items()
    }
    reliable.set_title(f"ECE {figures['expected_calibration_error']}", fontsize=10)
    names = [f"{least:.1f} and up" for least, _ in judgement.accuracy_by_strength]
    strong.bar(range(len(names)), [share for _, share in judgement.accuracy_by_strength], color="#0072b2")
    strong.set_xticks(range(len(names)), names, fontsize=8)
    strong.set_ylim(0, 1)
    strong.set_xlabel("difference in worth, by quarters")
    strong.set_ylabel("pair accuracy")
    strong.set_title(f"{figures['pair_accuracy']} of {judgement.pairs:,} pairs", fontsize=10)
    scattered.scatter([a.worth for a in answers], [a.score for a in answers], s=4, alpha=0.4, color="#0072b2")
    scattered.set_xlabel("worth")
    scattered.set_ylabel("score")
    scattered.set_title(f"Spearman {figures['spearman']}", fontsize=10)
    middle = judgement.reference_mean if reference_scores else 0.0
    centred.hist([a.score - middle for a in answers], bins=30, density=True, color="#0072b2", alpha=0.6, label="judged")
    if reference_scores:
        drawn = [score - middle for score in reference_scores]
        centred.hist(drawn, bins=15, density=True, histtype="step", color="#d55e00", label="reference")
    centred.set_xlabel("score, 0: the reference's mean" if reference_scores else "score")
    centred.set_yticks([])
    centred.legend(frameon=False, fontsize=8)
    for axis in (reliable, strong, scattered, centred):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "judgement.png", dpi=120)
