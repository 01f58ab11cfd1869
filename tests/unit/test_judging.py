"""Figures of a reward model, against counts by hand."""

import json
import math
import random
from pathlib import Path

import pytest

from trl_ext.feedback import FeedbackError
from trl_ext.feedback.judging import ScoredAnswer, judge, rank_correlation, save_judgement


def test_by_hand() -> None:
    answers = [
        ScoredAnswer("p", 1.0, 0.0, 10),
        ScoredAnswer("p", 2.0, 1.0, 20),
        ScoredAnswer("p", 4.0, 0.5, 30),
        ScoredAnswer("q", 3.0, 2.0, 5),
        ScoredAnswer("q", 3.0, 9.0, 5),  # tied in worth: no pair
        ScoredAnswer("r", 0.0, -1.0, 1),  # alone: no pair
    ]
    judgement = judge(answers)
    # Pairs of p: (2, 1): right, (4, 1): right, (4, 2): wrong.
    assert (judgement.answers, judgement.pairs) == (6, 3)
    assert judgement.pair_accuracy == pytest.approx(2 / 3)
    assert judgement.mean == pytest.approx(11.5 / 6)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    # Confidences: of 1.0 0.73 (bin 4) right, of 0.5 0.62 (bin 2) right and of 0.5 wrong.
    bins = {4: [(sigmoid(1.0), 1.0)], 2: [(sigmoid(0.5), 1.0), (sigmoid(0.5), 0.0)]}
    expected = (abs(sigmoid(1.0) - 1.0) + 2 * abs(sigmoid(0.5) - 0.5)) / 3
    assert len(judgement.reliability) == len(bins)
    assert judgement.expected_calibration_error == pytest.approx(expected)


def test_scores_beside_those_of_the_reference() -> None:
    judgement = judge([ScoredAnswer("p", 1.0, 2.0, 1), ScoredAnswer("p", 2.0, 6.0, 3)], reference_scores=[1.0, 3.0])
    assert (judgement.mean, judgement.std) == (4.0, 2.0)
    assert (judgement.reference_mean, judgement.reference_std, judgement.centred_mean) == (2.0, 1.0, 2.0)
    assert judgement.length_correlation == judgement.length_correlation_of_people == pytest.approx(1.0)
    against = judge([ScoredAnswer("p", 1.0, 2.0, 3), ScoredAnswer("p", 2.0, 6.0, 1)])
    assert against.length_correlation_of_people == pytest.approx(-1.0)
    assert math.isnan(against.reference_mean) and math.isnan(against.centred_mean)


def test_spearman_with_ties() -> None:
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    x, y = [1.0, 2.5, 2.5, 4.0], [1.0, 2.0, 3.0, 4.0]
    mean = 2.5
    top = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    bottom = math.sqrt(sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y))
    assert rank_correlation([1.0, 7.0, 7.0, 100.0], [0.0, 0.1, 5.0, 6.0]) == pytest.approx(top / bottom)
    assert math.isnan(rank_correlation([1.0, 1.0], [1.0, 2.0]))


def test_a_calibrated_model_has_no_calibration_error_and_is_surer_where_people_are() -> None:
    rng = random.Random(0)
    answers = []
    for i in range(40_000):
        difference = rng.uniform(0, 4)
        first = rng.random() < 1 / (1 + math.exp(-difference))
        answers += [ScoredAnswer(str(i), float(first), difference, 3), ScoredAnswer(str(i), float(not first), 0.0, 3)]
    judgement = judge(answers)
    assert judgement.pairs == 40_000
    assert judgement.expected_calibration_error < 0.01
    overconfident = [ScoredAnswer(a.prompt, a.worth, 3 * a.score, a.length) for a in answers]
    assert judge(overconfident).expected_calibration_error > 0.05


def test_strong_preferences_are_easier() -> None:
    rng = random.Random(1)
    worths = [rng.gauss(0, 1) for _ in range(300)]
    answers = [ScoredAnswer("", worth, worth + rng.gauss(0, 1), i % 7) for i, worth in enumerate(worths)]
    shares = [share for _, share in judge(answers).accuracy_by_strength]
    assert shares == sorted(shares) and shares[0] < 0.7 and shares[3] > 0.9


def test_many_answers_without_prompts_are_sampled() -> None:
    answers = [ScoredAnswer("", float(i), float(i), i) for i in range(2000)]
    judgement = judge(answers)
    assert 150_000 < judgement.pairs <= 200_000
    assert judgement.pair_accuracy == 1.0 and judgement.spearman == pytest.approx(1.0)
    assert judgement.length_correlation == pytest.approx(1.0)


def test_files(tmp_path: Path) -> None:
    answers = [ScoredAnswer("p", float(i), float(i % 3), i) for i in range(12)]
    save_judgement(judge(answers), tmp_path, answers)
    saved = json.loads((tmp_path / "judgement.json").read_text(encoding="utf-8"))
    assert saved["answers"] == 12 and 0 <= saved["pair_accuracy"] <= 1
    assert (tmp_path / "judgement.png").read_bytes().startswith(b"\x89PNG")


def test_one_answer_is_not_enough() -> None:
    with pytest.raises(FeedbackError, match="two answers or more, not 1"):
        judge([ScoredAnswer("p", 1.0, 1.0, 1)])


def test_a_figure_that_says_nothing_says_why(tmp_path: Path) -> None:
    """One answer a prompt, alike in length and worth, no reference: nothing but the scores' mean and std is left."""
    answers = [ScoredAnswer(f"p{i}", 1.0, float(i), 3) for i in range(4)]
    judgement = judge(answers)
    assert judgement.missing == {
        "pair_accuracy": "no two of the answers belong to one prompt and were judged unlike",
        "expected_calibration_error": "no two of the answers belong to one prompt and were judged unlike",
        "spearman": "people judged every answer alike",
        "length_correlation": "every answer has the same length",
        "length_correlation_of_people": "people judged every answer alike",
        **dict.fromkeys(
            ("reference_mean", "reference_std", "centred_mean"),
            "no answer of the reference was scored; without prompts it has nothing to answer",
        ),
    }
    assert judgement.shown("spearman", ".2f") == "none (people judged every answer alike)"
    assert judgement.shown("mean", ".2f") == "1.50"
    save_judgement(judgement, tmp_path, answers)
    saved = json.loads((tmp_path / "judgement.json").read_text(encoding="utf-8"))
    assert saved["reference_mean"] is None and "nothing to answer" in saved["missing"]["reference_mean"]


def test_what_can_be_computed_is_not_missing() -> None:
    answers = [ScoredAnswer("p", 1.0, 2.0, 1), ScoredAnswer("p", 2.0, 6.0, 3)]
    assert judge(answers, reference_scores=[1.0, 3.0]).missing == {}
