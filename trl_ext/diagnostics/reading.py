"""A run's folder, ours or TRL's, as a log. Nothing is unpickled: settings come from run.json, where there is one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from trl_ext.diagnostics.log import RunLog, Sample
from trl_ext.diagnostics.scores import weights_of

STATE_FILE, SETTINGS_FILE = "trainer_state.json", "run.json"
JUDGEMENT_FILE, DIAGNOSTICS_FILE = "judgement.json", "diagnostics.json"


def read_run(folder: str | Path) -> RunLog:
    """The log of a run that has ended, or has been saved on its way.

    Args:
        folder: with trainer_state.json, or with checkpoints that have one: the one with the most steps counts. Where
            there are run.json and diagnostics.json (written by `DiagnosticsCallback`), completions/ and judgement.json
            they are read too.

    Raises:
        FileNotFoundError: there is no such folder, or no trainer_state.json in it.
        ValueError: a file in it is broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"The run folder {str(folder)!r} does not exist.")
    candidates = [path for path in (folder / STATE_FILE, *folder.glob(f"checkpoint-*/{STATE_FILE}")) if path.is_file()]
    if not candidates:
        if inside := _runs_in(folder):
            several = ", ".join(inside[:4]) + (f" and {len(inside) - 4} more" if len(inside) > 4 else "")
            raise FileNotFoundError(
                f"{str(folder)!r} has no {STATE_FILE}, but these folders in it have: {several}. Give one of them."
            )
        raise FileNotFoundError(
            f"{str(folder)!r} has no {STATE_FILE}, nor has a checkpoint in it: give the output_dir of a run, and call "
            "trainer.save_state() at its end."
        )
    states = [_read_object(path) for path in candidates]
    state = max(states, key=lambda one: int(one.get("global_step", 0)))
    config: dict[str, Any] = {}
    if (folder / SETTINGS_FILE).is_file():
        config |= _read_object(folder / SETTINGS_FILE).get("settings", {})
    if (folder / JUDGEMENT_FILE).is_file():
        config |= _read_object(folder / JUDGEMENT_FILE)
    history = state.get("log_history", [])
    samples = _samples(folder / "completions", _weights(history, config))
    if (folder / DIAGNOSTICS_FILE).is_file():
        samples = [Sample(**one) for one in _read_object(folder / DIAGNOSTICS_FILE).get("samples", [])] + samples
    return RunLog.of(history, config, samples)


def _runs_in(folder: Path) -> list[str]:
    """Runs inside a folder that is none itself: members of an ensemble, rounds of a loop."""
    states = [path.parent for depth in (1, 2, 3) for path in folder.glob("*/" * depth + STATE_FILE)]
    runs = {path.parent if path.name.startswith("checkpoint-") else path for path in states}
    return sorted(str(run.relative_to(folder)) for run in runs)


def read_versions(folder: str | Path) -> dict[str, str]:
    """The packages that a run used, by name; empty without a run.json."""
    path = Path(folder) / SETTINGS_FILE
    return {str(k): str(v) for k, v in _read_object(path).get("versions", {}).items()} if path.is_file() else {}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error!s:.80}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def _weights(history: list[dict[str, Any]], config: dict[str, Any]) -> dict[str, float]:
    """Of each reward function that was logged its weight."""
    log = RunLog.of(history, config)
    weights = weights_of(log)
    return {name: weights.get(name, 1.0) for name in log.names("rewards/", "/mean")}


def _samples(folder: Path, weights: dict[str, float]) -> list[Sample]:
    """
    Args:
        weights: of the reward functions, by name.
    """
    samples = []
    for path in sorted(folder.glob("completions_*.parquet"), key=_step_of):
        try:
            table = pq.read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no Parquet file ({error!s:.80}).") from error
        for row in table.to_pylist():
            # TRL's own tables have a column a reward function, which may abstain, and no sum.
            given = [weight * row[name] for name, weight in weights.items() if not math.isnan(_number(row.get(name)))]
            score = row.get("score", sum(given) if given else math.nan)
            samples.append(
                Sample(
                    step=int(row.get("step", _step_of(path))),
                    prompt=_text(row["prompt"]),
                    completion=_text(row["completion"]),
                    score=_number(score),
                    kl=_number(row.get("kl")),
                    tokens=int(row.get("tokens", -1)),
                )
            )
    return samples


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    from trl_ext.types import as_text  # imports torch, for which nobody waits who asks the doctor about texts

    return as_text(list(value))


def _step_of(path: Path) -> int:
    return int(re.sub(r"\D", "", path.stem) or 0)
