"""Whatever is missing or broken in a log, the doctor reads the rest: it never fails, and says nothing of what it does
not know."""

import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.test_diagnostics import (
    CONFIG,
    DPO,
    HEALTHY,
    REWARD,
    SETTINGS,
    SICK,
    SICK_DPO,
    SICK_REWARD,
    rows,
)
from trl_ext.diagnostics import RunLog, diagnose
from trl_ext.diagnostics.graph import roots
from trl_ext.diagnostics.log import LOGGED_NAMES
from trl_ext.diagnostics.report import Run, render

SETS: tuple[tuple[dict[str, Any], dict[str, dict[str, Any]]], ...] = (
    (HEALTHY, SICK),
    (REWARD, SICK_REWARD),
    (DPO, SICK_DPO),
)
# Settings that rules read, some of them far from the usual.
MORE = {
    **{"gamma": 0.5, "lam": 0.95, "num_ppo_epochs": 4, "num_mini_batches": 4, "gradient_accumulation_steps": 2},
    **{
        "lr_scheduler_type": "linear",
        "max_steps": 200,
        "num_train_epochs": 3,
        "planned_rates": [(0, 1e-3), (200, 0.0)],
    },
    **{"missing_eos_penalty": 1.0, "temperature": 0.4, "beta": 0.1, "scale_rewards": "none", "entropy_coef": 0.01},
    **{"reward_weights": [7.0], "reward_clip_range": [0, 1], "generation_kwargs": {"min_new_tokens": 3}, "top_p": 0.5},
    **{"bf16": True, "cliprange": 0.05, "load_best_model_at_end": True, "metric_for_best_model": "objective/scores"},
    **{"per_device_train_batch_size": 8, "prompts_order": ("prompt", 0.9, 1000), "num_generations": 4},
}
OF_TRL = {ours: theirs for ours, theirs, *_ in (names for names in LOGGED_NAMES.values() if len(names) > 1)}
BROKEN = (math.nan, math.inf, -math.inf, 0.0, 1e30, None, "none")


def broken_logs(metrics: dict[str, Any], config: dict[str, Any], chance: random.Random) -> Iterator[RunLog]:
    """Logs of which metrics, settings, values and rows are missing or broken; some are written by TRL's names, some
    go back in their middle as a resumed run does."""
    while True:
        kept = {name: value for name, value in metrics.items() if chance.random() < chance.choice((0.5, 0.9, 1))}
        if chance.random() < 0.3:
            kept = {OF_TRL.get(name, name): value for name, value in kept.items()}
        share, history = chance.choice((0, 0, 0.2, 0.5)), []
        for row in rows(**kept)[: chance.randint(1, 16)]:
            read = {key: chance.choice(BROKEN) if chance.random() < share else value for key, value in row.items()}
            read["step"] = row["step"]
            evaluated = {key: value for key, value in read.items() if key.startswith("eval_")}
            history.append({key: value for key, value in read.items() if key not in evaluated})
            history += [{"step": row["step"], **evaluated}] if evaluated else []
        if chance.random() < 0.3:
            history += history[len(history) // 2 :]
        yield RunLog.of(history, {key: value for key, value in config.items() if chance.random() < 0.7})


@pytest.mark.parametrize("seed", range(4))
def test_any_part_of_a_log_can_be_read(seed: int) -> None:
    chance, latest, told = random.Random(seed), [], set()
    for healthy, sick in SETS:
        for name, changes in sick.items():
            made = broken_logs({**healthy, **changes}, {**CONFIG, **MORE, **SETTINGS.get(name, {})}, chance)
            for log, _ in zip(made, range(5), strict=False):
                found = diagnose(log)
                for one in (*found, *(root.finding for root in roots(found))):
                    assert not re.search(r"\b(nan|inf)\b", f"{one} {one.remedy}"), str(one)
                    assert all(map(math.isfinite, one.figures.values())), one.figures
                told |= {one.name for one in found}
            latest.append(log)
    assert len(told) > 50, "the logs still show most problems"
    for log in latest[::8]:
        assert "<svg" in render([Run("a", log, {}), Run("b", chance.choice(latest), {})]) or not log.rows
