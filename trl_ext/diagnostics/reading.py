"""A run's folder, ours or TRL's, as a log. Nothing is unpickled: settings come from run.json, where there is one."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from trl_ext.diagnostics.log import RunLog, Sample
from trl_ext.types import as_text

STATE, SETTINGS, JUDGEMENT, FOUND = "trainer_state.json", "run.json", "judgement.json", "diagnostics.json"


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
    candidates = [path for path in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")) if path.is_file()]
    if not candidates:
        raise FileNotFoundError(
            f"{str(folder)!r} has no {STATE}, nor has a checkpoint in it: give the output_dir of a run, and call "
            "trainer.save_state() at its end."
        )
    states = [_json(path) for path in candidates]
    state = max(states, key=lambda one: int(one.get("global_step", 0)))
    config: dict[str, Any] = {}
    if (folder / SETTINGS).is_file():
        config |= _json(folder / SETTINGS).get("settings", {})
    if (folder / JUDGEMENT).is_file():
        config |= _json(folder / JUDGEMENT)
    samples = _samples(folder / "completions")
    if (folder / FOUND).is_file():
        samples = [Sample(**one) for one in _json(folder / FOUND).get("samples", [])] + samples
    return RunLog.of(state.get("log_history", []), config, samples)


def read_versions(folder: str | Path) -> dict[str, str]:
    """The packages that a run used, by name; empty where nobody wrote them down."""
    path = Path(folder) / SETTINGS
    return {str(k): str(v) for k, v in _json(path).get("versions", {}).items()} if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error!s:.80}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found


def _samples(folder: Path) -> list[Sample]:
    samples = []
    for path in sorted(folder.glob("completions_*.parquet"), key=_step_of):
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no Parquet file ({error!s:.80}).") from error
        known = {"step", "prompt", "completion", "advantage", "score", "kl", "tokens", "ended"}
        functions = [name for name in frame.select_dtypes("number").columns if name not in known]
        for row in frame.to_dict("records"):
            # TRL's own tables have a column a reward function, and no sum.
            score = row.get("score", sum(float(row[name]) for name in functions) if functions else math.nan)
            samples.append(
                Sample(
                    int(row.get("step", _step_of(path))),
                    _text(row["prompt"]),
                    _text(row["completion"]),
                    math.nan if score is None else float(score),
                    float(row.get("kl", math.nan)),
                    int(row.get("tokens", -1)),
                )
            )
    return samples


def _text(value: Any) -> str:
    return as_text(value if isinstance(value, str) else list(value))


def _step_of(path: Path) -> int:
    return int(re.sub(r"\D", "", path.stem) or 0)
