"""Which runs have their remedies tried to the end, and what is made of that."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from trl_ext.diagnostics import Finding, Remedy, RunLog, roots
from trl_ext.diagnostics.forks import BESIDE

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "strangers"))
import cure
import pages
import verdict


def run_(exam: float, seed: int = 1, said: str = "kl_drowns_score", **more: Any) -> verdict.Result:
    """Of a mistake whose truth is kl_drowns_score."""
    root = {"name": said, "title": "", "evidence": "", "changes": {}, "suspects": []}
    own = {"id": "kl_coef:high#0", "seed": seed, "exam": exam, "died": "", "refused": False}
    return {**own, "roots": [root], "mistakes": [["kl_coef:high", {"settings": {"kl_coef": 4.0}}]], **more}


HEALTHY = [
    run_(0.9, seed=1, id=verdict.HEALTHY_RUN),
    run_(0.5, seed=2, id=verdict.HEALTHY_RUN),
    run_(0.1, seed=1, id="healthy:ppo:other"),
]


def test_runs_that_were_harmed_and_are_named_are_tried() -> None:
    harmed, harmless = run_(0.80), run_(0.81)
    of_its_seed = run_(0.45, seed=2)
    wrong = run_(0.2, said="truncation")
    third = {**wrong, "roots": [*wrong["roots"] * 2, *harmed["roots"]]}
    refused = run_(0.0, roots=[], refused=True, died="ValueError: kl_coef is 4.")
    assert cure.named([harmed, harmless, of_its_seed, wrong, third, refused], HEALTHY) == [harmed, refused]
    with pytest.raises(ValueError, match="not been run at seed 3"):
        cure.named([run_(0.2, seed=3)], HEALTHY)


@pytest.mark.parametrize(
    ("remedies", "why"),
    [
        ([Remedy(text="Set it.", changes={"kl_coef": 0.4})], ""),
        ([Remedy(text="Mend it."), Remedy(text="Set it.", changes={"kl_coef": 0.4})], ""),
        ([Remedy(text="Mend it."), Remedy(text="Set it.", code="lora_alpha: the default")], cure.LORA),
        ([Remedy(text="Use another LoraConfig.")], cure.LORA),
        ([Remedy(text="Mend it.", code="reward = right")], cure.CODE),
        ([Remedy(text="Mend it."), Remedy(text="Look."), Remedy(text="Use another LoraConfig.")], cure.CODE),
        ([], cure.CODE),
    ],
)
def test_why_nothing_is_tried(remedies: list[Remedy], why: str) -> None:
    findings = [
        Finding(
            name=f"finding_{i}",
            severity="problem",
            title="",
            steps=(0, 8),
            evidence="",
            figures={},
            cause="",
            remedy=remedy,
        )
        for i, remedy in enumerate(remedies)
    ]
    assert cure.why_untried(roots(findings), RunLog("ppo", [])) == why


def trial(
    verdict_: str = "cured", whole: dict[str, Any] | None = None, finding: str = "kl_drowns_score"
) -> cure.Result:
    return {"finding": finding, "changes": {"kl_coef": 0.5}, "verdict": verdict_, "whole": whole}


def whole(exam: float, found: tuple[str, ...] = (), died: str = "") -> dict[str, Any]:
    return {"exam": exam, "found": list(found), "died": died}


def case(*trials: cure.Result, number: int = 0, **more: Any) -> cure.Result:
    own = {"id": f"mistake#{number}", "seed": 1, "kind": "settings", "named": True, "healthy": 0.9, "finds": ""}
    return {**own, "untried": "", "failed": "", "trials": list(trials), **more}


@pytest.mark.parametrize(
    ("ended", "of_a_half", "of_the_catalogue"),
    [
        (None, False, False),
        (whole(0.81), True, True),
        (whole(0.80), False, True),  # 10 points below
        (whole(0.9, ("kl_drowns_score",)), True, False),
        (whole(0.9, ("truncation",)), True, False),  # what the case is to find
        (whole(0.9, ("score_scale",)), True, True),
        (whole(0.9, died="ValueError"), False, False),
    ],
)
def test_what_is_truly_cured(ended: dict[str, Any] | None, of_a_half: bool, of_the_catalogue: bool) -> None:
    assert cure.is_truly_cured(case(), trial(whole=ended)) is of_a_half
    assert cure.is_truly_cured(case(healthy=None, finds="truncation"), trial(whole=ended)) is of_the_catalogue


def test_the_table_adds_up() -> None:
    cases = [
        case(trial("not cured"), trial(whole=whole(0.9)), number=1),
        # Both roots are called cured, and one is.
        case(trial(whole=whole(0.9)), trial(whole=whole(0.2, ("truncation",)), finding="truncation"), number=2),
        case(trial(whole=whole(0.3)), number=3, kind="pairs"),
        case(trial("worse"), number=4),
        case(number=5, failed="ValueError: kl_coef is refused."),
        case(number=6, untried=cure.LORA),
        case(number=7, untried=cure.CODE, kind="reward"),
        case(number=8, untried=cure.REFUSED),
        case(number=9, untried="not named", named=False),
    ]
    told = cure.table(cases, 2)
    assert "| settings | 7 | 6 | 4 | 2 | 2 |" in told
    assert "| pairs | 1 | 1 | 1 | 1 | 0 |" in told
    assert "| reward | 1 | 1 | 0 | 0 | 0 |" in told
    assert "Of 9 runs the true cause is named in 8; 2 more wait. In 5 the remedy can be tried." in told
    assert "nothing was: a setting of LoRA 1, code or data 1, refused before it began 1." in told
    assert "Verdicts of 7 trials: cured 4, not cured 1, worse 1, failed 1." in told
    assert "Of 4 remedies called cured 2 are truly cured (50%; the goal is 90%)." in told
    assert "Of 8 runs with a named cause 2 are truly cured (25%; the goal is 80%)" in told
    assert "of the 7 that were not refused before they began 29%, of those whose remedy can be tried 40%." in told
    assert "### Called cured, and not: 2" in told
    assert "- mistake#2, seed 1: truncation by kl_coef=0.5: exam 20%, healthy 90%; at the end: truncation" in told
    assert "### Named, and not truly cured: 6" in told
    assert "- mistake#4, seed 1: kl_drowns_score by kl_coef=0.5: worse" in told
    assert "- mistake#5, seed 1: failed: ValueError: kl_coef is refused." in told
    assert "- mistake#6, seed 1: a setting of LoRA" in told
    assert "mistake#9" not in told


def test_the_table_of_nothing_can_be_written() -> None:
    told = cure.table([], 3)
    assert "Of 0 runs the true cause is named in 0; 3 more wait." in told
    assert "### Called cured, and not: none" in told


def test_what_was_tried_of_a_problem_is_a_table_by_remedy(tmp_path: Path) -> None:
    cured, no_cure = trial(whole=whole(0.9)), trial(whole=whole(0.2)) | {"changes": {"kl_coef": 0.2}}
    swapped = trial("worse") | {"changes": {"kl_coef": 0.4, "reward_funcs": "the yardstick"}}
    made = pages.text([(case(), one) for one in (cured, no_cure, swapped, trial("not seen"))])
    assert made.splitlines()[2:] == [
        "| `kl_coef` | 2 | 2 | 0 | 0 | 0 | 1 of 2 |",
        "| `kl_coef`, the yardstick in the place of `reward_funcs` | 1 | 0 | 0 | 0 | 1 |  |",
        "",
        "In 1 more trial the problem did not come back without a remedy.",
    ]
    assert pages.text([]) == pages.NOTHING
    made = pages.text([], [(case(), cured)], untried=2).split("\n\n")
    assert made[1].splitlines()[2:] == [f"| one of `{cured['finding']}` | 1 | 1 | 0 | 0 | 0 | 1 of 1 |"]
    assert made[2].startswith("In 2 more runs the remedy was no setting")
    assert pages.text([], untried=1).startswith("In 1 run the remedy")
    page = tmp_path / "page.md"
    page.write_text("# A problem\n")
    for text in ("first", "second"):
        pages.write(page, text)
    assert page.read_text().count("second") == 1 and "first" not in page.read_text()
    assert page.read_text().startswith("# A problem\n\n## What `--try` made of it\n")


def test_a_first_root_that_was_passed_over_counts_as_untried() -> None:
    roots = [["one", "follows"], ["two"], ["three"]]

    def passed_over(*findings: str, failed: str = "") -> list[str]:
        return pages.without_trial({"roots": roots, "trials": [{"finding": one} for one in findings], "failed": failed})

    assert passed_over() == passed_over("three") == ["one", "two"]
    assert passed_over("two") == ["one"]
    assert passed_over("one") == passed_over(failed="refused") == []


def test_every_case_of_the_catalogue_that_has_a_trainer_of_ours_or_dpo_is_a_job() -> None:
    jobs = cure.catalogue_jobs([1, 2], 64)
    cases = [one for one in cure.doctor.CASES if one.kind != "online"]
    assert len({job.name for job in jobs}) == len(jobs) == 2 * len(cases)
    assert {job.case.settings.get("total_episodes") for job in jobs if job.kind == "ppo" and job.case} == {64}
    assert not any("total_episodes" in job.case.settings for job in jobs if job.kind != "ppo" and job.case)


def job_of(kind: str) -> cure.Job:
    """The first mistake of a half, or of a kind in the catalogue."""
    if kind == "half":
        mistake = ("kl_coef:high", {"settings": {"kl_coef": 4.0}})
        return cure.Job("kl_coef:high#0", "work", "settings", 1, (mistake,))
    return next(job for job in cure.catalogue_jobs([1], None) if job.kind == kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["half", "ppo", "reward", "dpo"])
def test_a_fork_is_the_mistaken_trainer_with_the_changes(kind: str, tmp_path: Path) -> None:
    job, folder = job_of(kind), tmp_path / "1-with"
    changes = {**BESIDE, "eval_strategy": "no", "learning_rate": 0.125, "output_dir": str(folder)}
    args = cure._fork(job, tmp_path, None, changes).args
    mistake = {"kl_coef": 4.0} if job.case is None else job.case.settings
    expected = {**mistake, **changes, "seed": 1, "report_to": []}
    assert {name: getattr(args, name) for name in expected} == expected
    assert changes["output_dir"] == str(folder)  # it is the caller's


def test_nothing_is_told_of_the_half_that_only_measures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    jobs = [cure.Job(f"secret#{i}", "measure", "settings", 1) for i in range(2)]
    (tmp_path / "measure").mkdir()

    def make(job: cure.Job) -> cure.Result:
        with cure.in_silence(job.half):
            print(f"{job.id} is cured")
            if job.id == "secret#0":
                raise ValueError(f"{job.id} is broken")
            return case(trial(whole=whole(0.9)), seconds=1.0)

    assert cure.run.work_through(jobs, tmp_path, 60, make, cure.said) == (1, 1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "secret" not in shown.err and "nothing is told" in shown.err
    with cure.in_silence("work"):
        print("aloud")
    assert capsys.readouterr().out == "aloud\n"
