"""One cause, its consequences under it; and remedies that bear on their evidence."""

import json
import math
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_diagnostics import CONFIG, HEALTHY, SICK, log_of, rows, sick_log, write_run
from trl_ext.cli import main
from trl_ext.diagnostics import EDGES, RULES, Edge, Explained, Finding, Remedy, RunLog, diagnose, roots
from trl_ext.diagnostics.catalogue import SECOND_LOOK
from trl_ext.diagnostics.pages import page
from trl_ext.diagnostics.remedies import MOVES


def finding(name: str, severity: str = "problem") -> Finding:
    return Finding(
        name=name,
        severity=severity,
        title=name,
        steps=(0, 1),
        evidence="Seen.",
        figures={},
        cause="Something.",
        remedy=Remedy(text="Mend it."),
    )


def names(tops: list[Explained]) -> list[list[str]]:
    return [[one.finding.name for one in top] for top in tops]


A_B, B_C, A_C = (Edge(*pair, "Because.", "A book.") for pair in (("a", "b"), ("b", "c"), ("a", "c")))


def test_consequences_are_folded_below_their_cause() -> None:
    found = [finding(name) for name in "dcba"]
    assert names(roots(found, [A_B, B_C])) == [["d"], ["a", "b", "c"]]
    assert names(roots(found[:2] + found[3:], [A_B, B_C])) == [["d"], ["c"], ["a"]], "without b nothing links a and c"
    assert names(roots(found, [A_B, A_C, B_C])) == [["d"], ["a", "c", "b"]], "of two causes the first edge counts"


def test_an_edge_may_depend_on_what_was_found() -> None:
    never = Edge("a", "b", "Because.", "A book.", holds=lambda cause, consequence: False)
    assert names(roots([finding("a"), finding("b")], [never])) == [["a"], ["b"]]


def test_a_warning_that_explains_a_problem_stands_among_the_problems() -> None:
    found = [finding("x", "warning"), finding("b"), finding("a", "warning")]
    tops = roots(found, [A_B])
    assert names(tops) == [["a", "b"], ["x"]]
    assert [top.severity for top in tops] == ["problem", "warning"]


def test_the_graph_is_one_and_each_edge_says_why() -> None:
    before: dict[str, set[str]] = {}
    for edge in EDGES:
        assert edge.mechanism.endswith(".") and edge.source
        assert page(edge.cause) and page(edge.consequence), "of the catalogue"
        before.setdefault(edge.consequence, set()).add(edge.cause)
    list(TopologicalSorter(before).static_order())  # raises where there is a circle
    assert len({(edge.cause, edge.consequence) for edge in EDGES}) == len(EDGES)


def test_every_remedy_names_what_it_moves() -> None:
    made = {rule.__name__ for rules in (*RULES.values(), SECOND_LOOK) for rule in rules}
    assert made == set(MOVES) and {direction for _, direction in MOVES.values()} == {
        "up",
        "down",
    }
    for name in SICK:
        (found,) = [one for one in diagnose(sick_log(name)) if one.name == name]
        metric, direction = MOVES[name]
        assert (found.remedy.moves, found.remedy.direction) == (metric, direction)
        log = sick_log(name)
        assert log.series(metric) or log.series(metric, evals=True) or log.names(metric), f"{metric} is logged"


def test_a_penalty_s_spread_is_not_normalised_away() -> None:
    """The log says who makes the spread: the penalty."""
    found = diagnose(sick_log("penalty_dominates"))
    assert names(roots(found)) == [["penalty_dominates", "score_scale"]]
    top, below = (one.finding for one in roots(found)[0])
    # Functions make 4% of the variance of rewards with a standard deviation of 5: sqrt(0.04) * 5 = 1.
    assert top.remedy.changes == {"missing_eos_penalty": 1.0}
    assert below.remedy.changes == {} and "penalties are not normalised" in below.remedy.text
    functions = log_of(**SICK["score_scale"])
    assert diagnose(functions)[0].remedy.changes == {"score_normalization": "running"}


def test_scores_that_are_normalised_are_not_normalised_again() -> None:
    log = RunLog.of(rows(**{**HEALTHY, **SICK["score_scale"]}), {**CONFIG, "score_normalization": "reference"})
    (found,) = diagnose(log)
    assert found.remedy.changes == {} and "normalised already" in found.remedy.text


@pytest.mark.parametrize(
    ("setting", "log", "why"),
    [
        ({"missing_eos_penalty": 1.0}, {"completions/clipped_ratio": 0.0}, "no completion is cut off"),
        ({"missing_eos_penalty": 1.0}, {"completions/clipped_ratio": 0.1}, None),
        ({"max_grad_norm": 1.0}, {"grad_norm": 0.5}, "no gradient is larger than 1"),
        ({"max_grad_norm": 1.0}, {"grad_norm": 2.0}, None),
    ],
)
def test_a_setting_that_would_move_nothing_is_not_offered(
    setting: dict[str, float], log: dict[str, float], why: str | None
) -> None:
    """By a rule of one's own, too."""
    remedy = Remedy(text="Set it.", changes=setting)
    (found,) = diagnose(log_of(**log), rules=[lambda *_: replace(finding("own"), remedy=remedy)])
    assert found.remedy.changes == ({} if why else setting)
    assert why is None or f"would not help: {why}" in found.remedy.text


@pytest.mark.parametrize(
    ("own", "std", "changes", "suspects"),
    [
        (1e-7, 1.0, {"vf_coef": 0.1, "score_normalization": "running"}, 0),  # its gradient is nothing beside the other
        (0.2, 1.0, {}, 2),
        (0.2, 9.0, {"cliprange_value": 9.0, "score_normalization": "running"}, 0),  # 16 updates of 0.2 reach 3.2
    ],
)
def test_vf_coef_is_offered_where_it_is_the_cause(
    own: float, std: float, changes: dict[str, Any], suspects: int
) -> None:
    sick = {"grad_norm/value": [own] * 16, "objective/scores_std": [std] * 16, "val/explained_variance": 0.0}
    log = RunLog.of(rows(**{**HEALTHY, **sick}), {**CONFIG, "vf_coef": 1e-4})
    (found,) = diagnose(log)
    assert found.name == "value_not_learning" and found.remedy.changes == changes
    assert len(found.suspects) == suspects
    assert found.severity == ("warning" if suspects else "problem"), "of an unknown cause it is worth a look"
    if suspects:
        assert "cannot tell" in found.cause
        assert {"learning_rate": 3e-3} in [suspect.changes for suspect in found.suspects]
        assert not any("noise" in suspect.cause for suspect in found.suspects), "the score was seen to repeat"


def test_who_was_not_measured_may_be_noise() -> None:
    sick = {**HEALTHY, "grad_norm/value": 0.2, "val/explained_variance": 0.0}
    unknown = {name: value for name, value in sick.items() if not name.startswith("evidence/")}
    (found,) = diagnose(RunLog.of(rows(**unknown), CONFIG))
    assert any("noise" in suspect.cause for suspect in found.suspects) and "Perhaps" in str(found)


def test_a_certain_policy_is_not_taken_for_a_blind_score() -> None:
    """Two completions are the same, and so are their scores."""
    blind = {"evidence/score/within_prompt": 0.0}
    assert "score_ignores_completion" in [one.name for one in diagnose(log_of(**blind))]
    certain = log_of(**blind, **{"policy/entropy_avg": 0.05})
    assert "score_ignores_completion" not in [one.name for one in diagnose(certain)]
    late = [0.5, 0.5, 0.4] + [0.0] * 13
    assert diagnose(log_of(**{"evidence/score/within_prompt": late})) == []


def test_credit_is_judged_where_the_score_does_not_rise() -> None:
    made = rows(**{**HEALTHY, "evidence/credit/mean": 0.2})
    assert diagnose(RunLog.of(made, {**CONFIG, "gamma": 0.5})) == [], "it learns all the same"
    still = rows(**{**HEALTHY, "evidence/credit/mean": 0.1, "objective/scores": 0.1})
    assert [one.name for one in diagnose(RunLog.of(still, {**CONFIG, "lam": 0.95}))] == ["no_progress"], "as everybody"
    (found, _) = diagnose(RunLog.of(still, {**CONFIG, "gamma": 0.5, "lam": 0.5}))
    assert found.remedy.changes == {"gamma": 1.0, "lam": 0.95}
    assert found.figures["half_life"] == pytest.approx(math.log(2) / math.log(4))


def test_json_and_console_show_roots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {**SICK["steps_too_small"], "val/explained_variance": 0.0}
    folder = write_run(tmp_path / "run", **changes)
    assert main(["doctor", str(folder), "--json"]) == 0
    (top,) = json.loads(capsys.readouterr().out)
    assert top["name"] == "steps_too_small" and [one["name"] for one in top["follows"]] == [
        "value_not_learning",
        "no_progress",
    ]
    assert top["follows"][0]["because"] == "The value role takes steps as small." and top["follows"][0]["source"]
    assert main(["doctor", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "problem: Steps are too small" in out and "problem: The value role" not in out and "follows" in out
    assert main(["report", str(folder)]) == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "<summary>The value role does not learn</summary>" in html and "Problem: The value role" not in html
