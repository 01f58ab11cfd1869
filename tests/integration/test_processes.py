"""Two processes equal one: the same answers give the same losses, weights, moments, coefficients and metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import saved_model

ROOT = Path(__file__).parents[2]
CLOCKS = (
    "time/",
    "memory/",
    "train_runtime",
    "train_samples",
    "train_steps",
    "eval_runtime",
    "eval_samples",
    "eval_steps",
    "eps",
)


def run(model: str, out: Path, processes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    worker = str(Path(__file__).with_name("worker.py"))
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    out.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, worker, model, str(out)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used, logs = json.loads((out / "logs.json").read_text())
    assert used == processes
    return load_file(out / "trained.safetensors"), logs


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    model = saved_model(tmp_path / "model")
    one, its_logs = run(model, tmp_path / "one", 1)
    two, their_logs = run(model, tmp_path / "two", 2)
    assert len(its_logs) == len(their_logs)
    for ours, theirs in zip(its_logs, their_logs, strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            if not name.startswith(CLOCKS):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), (name, ours["step"])
    assert any(float(ours["objective/kl_coef"]) != 0.1 for ours in its_logs if "objective/kl_coef" in ours)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5, msg=name)
