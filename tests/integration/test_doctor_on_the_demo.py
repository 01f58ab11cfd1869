"""A few of the doctor's proofs in a few rollouts; tests/benchmarks/doctor.py has all of them, at three seeds."""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
ROLLOUTS = {"sampling_differs": 12}  # the others take 7; on another machine the demo shows it sooner or later
FAST = ("truncation", "sampling_differs", "steps_too_small", "gradients_absent", "clipping_saturated")


@pytest.fixture(scope="module")
def doctor() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("doctor")


def short(case: Any) -> Any:
    return replace(case, settings={**case.settings, "total_episodes": 64 * ROLLOUTS.get(case.finds, 7)})


@pytest.mark.sampled(every=20)
@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_a_mistake_is_named(name: str, doctor: Any, tmp_path: Path) -> None:
    case = next(case for case in doctor.CASES if case.finds == name)
    result = doctor.run(short(case), cured=False, prescribed={}, seed=7, folder=tmp_path)
    assert name in [finding["name"] for finding in result["found"][:2]], result


@pytest.mark.slow
def test_a_healthy_run_is_left_alone(doctor: Any, tmp_path: Path) -> None:
    result = doctor.run(short(doctor.HEALTHY[0]), cured=False, prescribed={}, seed=7, folder=tmp_path)
    assert result["found"] == [], result
