"""Two processes equal one: the same answers give the same losses, weights, moments, coefficients and metrics."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import saved_model
from trl_ext import demo
from trl_ext.demo import store

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


Run = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


def launch(processes: int, script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    command += [str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


def start(model: str, out: Path, processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    return launch(processes, Path(__file__).with_name("worker.py"), model, str(out), *more)


def run(model: str, out: Path, processes: int, *more: str) -> Run:
    done = start(model, out, processes, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    used, logs = json.loads((out / "logs.json").read_text())
    assert used == processes
    return load_file(out / "trained.safetensors"), logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return saved_model(folder / "model")


@pytest.fixture(scope="module")
def two(folder: Path, model: str) -> Run:
    return run(model, folder / "two", 2)


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path, model: str, two: Run) -> None:
    assert_equal(run(model, folder / "one", 1), two)
    assert all("yardstick/judged" in row for row in two[1] if "objective/scores" in row)


@pytest.mark.long
def test_two_machines_equal_one(folder: Path, model: str) -> None:
    """Two nodes of torchrun, which find each other by address and port; here both are this machine."""
    out = folder / "two_machines"
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    command += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=1", "--local_addr=127.0.0.1"]
    command += [str(Path(__file__).with_name("worker.py")), model, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(2)]
    for node in nodes:  # what they say fits into a pipe
        said = node.communicate(timeout=600)[0]
        assert node.returncode == 0, said[-3000:]
    used, logs = json.loads((out / "logs.json").read_text())
    assert used == 2
    assert_equal(run(model, folder / "one_machine", 1), (load_file(out / "trained.safetensors"), logs))


@pytest.mark.long
def test_two_processes_share_a_stream(folder: Path, model: str) -> None:
    assert_equal(run(model, folder / "one_stream", 1, "stream"), run(model, folder / "two_stream", 2, "stream"))


@pytest.mark.long
def test_a_bad_row_of_a_stream_ends_both_processes_after_a_checkpoint(folder: Path, model: str) -> None:
    done = start(model, folder / "bad", 2, "bad")
    assert done.returncode != 0
    assert done.stderr.count("The prompt in row 60 of train_dataset is 7") >= 2, "each process says why"
    assert (folder / "bad" / "checkpoint-3" / "trainer_state.json").is_file()


# Measured on a few rows, which are others where several processes have some each; no gradients where FSDP2 shards.
OF_SOME_ROWS = (
    *(f"evidence/{name}" for name in ("gradient/", "cosine/", "noise/", "score/", "prompts/surprise")),
    "eval_evidence/prompts/surprise",
)


def assert_equal(one_process: Run, two_processes: Run, nan_ok: bool = False) -> None:
    one, its_logs = one_process
    both, their_logs = two_processes
    assert len(its_logs) == len(their_logs)
    for ours, theirs in zip(its_logs, their_logs, strict=True):
        names = {name for name in ours if not name.startswith(OF_SOME_ROWS)}
        assert names == {name for name in theirs if not name.startswith(OF_SOME_ROWS)}
        for name in names:
            if not name.startswith(CLOCKS):
                expected = pytest.approx(ours[name], rel=1e-4, abs=1e-5, nan_ok=nan_ok)
                assert theirs[name] == expected, (name, ours["step"])
    assert any(float(ours["objective/kl_coef"]) != 0.1 for ours in its_logs if "objective/kl_coef" in ours)
    for name, weight in one.items():
        torch.testing.assert_close(both[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.long
def test_two_processes_go_on_in_a_later_epoch_as_if_never_interrupted(folder: Path, model: str, two: Run) -> None:
    """The second epoch has an order of its own, which a resumed run must know too: step 10 is in its first rollout."""
    whole, its_logs = two
    resumed, their_logs = run(model, folder / "resumed", 2, str(folder / "two" / "checkpoint-10"))
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name
    last, its_last = ([row for row in logs if "objective/scores" in row][-1] for logs in (their_logs, its_logs))
    assert last["objective/scores"] == its_last["objective/scores"]


@pytest.mark.long
def test_the_demo_s_reward_adapter_is_trained_by_one_process_for_all(folder: Path) -> None:
    """RewardTrainer would wait for the other process, which waits for its lock."""
    whole = demo.build()
    for name in ("model", "data", store.DONE):  # and no adapter
        place = folder / "cache" / whole.name / name
        (shutil.copytree if (whole / name).is_dir() else shutil.copy)(whole / name, place)
    script = folder / "both.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "from trl_ext import demo\n"
        "assert PartialState(cpu=True).num_processes == 2\n"
        "print('adapter:', demo.reward_adapter())\n"
    )
    done = launch(2, script, TRL_EXT_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    folders = {line.removeprefix("adapter: ") for line in done.stdout.splitlines() if line.startswith("adapter: ")}
    assert len(folders) == 1 and (Path(folders.pop()) / "adapter_config.json").is_file()
    assert done.stderr.count("training the demo's reward adapter") == 1


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["ppo", "reward", "dpo"])
def test_processes_that_do_not_know_each_other_train_nothing(folder: Path, recipe: str) -> None:
    """accelerate shards on GPUs alone: on a CPU it starts processes that each believe they are the only one."""
    launcher = folder / "fsdp_on_a_cpu.yaml"
    launcher.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nmachine_rank: 0\n"
        "num_processes: 2\nmixed_precision: 'no'\nuse_cpu: true\nfsdp_config: {fsdp_version: 2}\n"
    )
    script, out = ROOT / "recipes" / f"{recipe}_lora.py", folder / f"{recipe}_of_strangers"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher), str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(out)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "error: WORLD_SIZE says that 2 processes were started, but accelerate sees this one alone" in done.stderr
    assert not out.exists()


@pytest.mark.long
def test_a_judge_that_fails_on_one_process_ends_both_after_a_checkpoint(folder: Path, model: str) -> None:
    done = start(model, folder / "out", 2, "fail")
    assert done.returncode != 0
    assert done.stderr.count("raised ConnectionResetError: the judge went home") >= 2, "each process says why"
    assert (folder / "out" / "checkpoint-8" / "trainer_state.json").is_file()


@pytest.mark.long
@pytest.mark.parametrize(("what", "steps"), [("update", 16), ("training", 0)])
def test_what_one_process_s_callback_stops_both_stop(folder: Path, model: str, what: str, steps: int) -> None:
    """Of a rollout each sees its own part; the other one would wait for its gradients for ever."""
    _, logs = run(model, folder / f"stops_{what}", 2, f"stop_{what}")
    assert max(row["step"] for row in logs) == steps
    if what == "update":
        assert not any("policy/approxkl_avg" in row for row in logs), "no minibatch of it is trained on"


@pytest.mark.long
def test_what_one_process_s_callback_asks_for_both_do(folder: Path) -> None:
    """At every event; by then, or at the next one that stops for it."""
    done = launch(2, Path(__file__).with_name("seams_worker.py"), str(folder / "switches"), "switches")
    assert done.returncode == 0, done.stderr[-3000:]
    here, there = (json.loads((folder / "switches" / f"outcomes_{i}.json").read_text()) for i in range(2))
    assert here == there and len(here) >= 25
    plain = here["should_training_stop at on_train_end"]
    for asked, (times, last, *_) in here.items():
        assert times == 1, asked
        if asked.startswith("should_training_stop"):
            assert last < plain[1] or asked.endswith("on_train_end"), asked
    assert len(here["should_save at on_step_end"][2]) == len(plain[2]) + 1
    assert len(here["should_evaluate at on_step_end"][3]) == len(plain[3]) + 1


@pytest.mark.long
def test_a_yardstick_that_fails_on_the_main_process_ends_both(folder: Path, model: str) -> None:
    done = start(model, folder / "mute", 2, "mute")
    assert done.returncode != 0
    assert done.stderr.count("ConnectionResetError: nobody pays this judge") >= 2, "each process says why"


@pytest.mark.long
def test_what_fails_on_one_process_alone_ends_both_after_a_checkpoint(folder: Path) -> None:
    """One seam after the other, on the main process or on the other one; every third run goes on from there."""
    done = launch(2, Path(__file__).with_name("seams_worker.py"), str(folder / "seams"))
    for process in range(2):
        outcomes = json.loads((folder / "seams" / f"outcomes_{process}.json").read_text())
        assert {seam: outcome for seam, outcome in outcomes.items() if outcome != "right"} == {}
        assert len(outcomes) >= 30
    assert done.returncode == 0, done.stderr[-3000:]
