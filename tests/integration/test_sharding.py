"""Two processes that share out the base by FSDP2 equal one: losses, gradient norms, weights, metrics, checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from tests.helpers import saved_model
from tests.integration.sharding import VARIABLES
from tests.integration.test_processes import Run, assert_equal, launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    return saved_model(folder / "model")


def run(model: str, out: Path, sharded: bool, *words: str, processes: int | None = None, **more: str) -> Run:
    out.mkdir()
    script, variables = Path(__file__).with_name("sharded_worker.py"), (VARIABLES if sharded else {}) | more
    processes = processes or (2 if sharded else 1)
    done = launch(processes, script, model, str(out), *words, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    used, logs = json.loads((out / "logs.json").read_text())
    assert used == processes
    return load_file(out / "trained.safetensors"), logs


def watched(out: Path, process: int) -> dict:
    return json.loads((out / f"watched_{process}.json").read_text())


@pytest.fixture(scope="module")
def one(folder: Path, model: str) -> Run:
    return run(model, folder / "one", False)


@pytest.fixture(scope="module")
def two(folder: Path, model: str) -> Run:
    return run(model, folder / "two", True)


@pytest.mark.slow
def test_two_processes_that_share_out_the_base_equal_one(folder: Path, one: Run, two: Run) -> None:
    assert_equal(one, two)
    norms = [row[f"grad_norm/{role}"] for row in two[1] if "loss" in row for role in ("policy", "value")]
    assert all(norms) and len(norms) == 24
    lengths = [watched(folder / "two", process)["lengths"] for process in range(2)]
    assert lengths[0] != lengths[1] and len({length for rows in lengths[0] for length in rows}) > 1
    for process in range(2):
        assert watched(folder / "two", process)["whole"] == 1, "generation and scoring gather a layer at a time"
        logprobs = torch.tensor(watched(folder / "two", process)["logprobs"])
        torch.testing.assert_close(logprobs, torch.tensor(watched(folder / "one", 0)["logprobs"]), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_is_saved_are_plain_adapters(folder: Path, model: str, one: Run, two: Run) -> None:
    """Read by Transformers and PEFT alone, the policy says what the run's own says."""
    ids = torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        logits = AutoPeftModelForCausalLM.from_pretrained(folder / "two").eval()(ids).logits[:, :-1]
    logprobs = logits.log_softmax(-1).gather(2, ids[:, 1:].unsqueeze(2)).squeeze(2)[:, -3:]
    expected = torch.tensor(watched(folder / "one", 0)["logprobs"])
    torch.testing.assert_close(logprobs, expected, rtol=1e-4, atol=1e-4)
    for place in ("", "value", "checkpoint-6", "checkpoint-6/value"):
        saved, whole = (load_file(folder / run / place / "adapter_model.safetensors") for run in ("two", "one"))
        assert saved.keys() == whole.keys()
        for name, weight in whole.items():
            torch.testing.assert_close(saved[name], weight, rtol=1e-4, atol=1e-5, msg=name)
    names = [path.name for path in (folder / "two" / "checkpoint-6").iterdir()]
    assert "optimizer.pt" in names and not any("fsdp" in name for name in names), "the base is not saved"


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [("two", True), ("two", False), ("one", True)], ids=str)
def test_a_run_goes_on_with_any_number_of_processes(
    folder: Path, model: str, one: Run, two: Run, before: str, after: bool
) -> None:
    checkpoint = str(folder / before / "checkpoint-6")
    weights, logs = run(model, folder / f"from_{before}_{after}", after, checkpoint)
    assert_equal((one[0], one[1][:-1]), (weights, logs[:-1]))  # the last is about the whole training


@pytest.mark.long
@pytest.mark.parametrize("words", [("head", "checkpointing", "nan"), ("nf4",)], ids=" ".join)
def test_other_runs_that_share_out_the_base_equal_one(folder: Path, model: str, words: tuple[str, ...]) -> None:
    """A scalar head on the policy's trunk, which is frozen at first; activations that are recomputed; a guard; a base
    in 4 bits."""
    name = "_".join(words)
    alone, shared = run(model, folder / name, False, *words), run(model, folder / f"{name}_shared", True, *words)
    # Transformers leaves what is not a number out of its last row, the mean loss, on the process where it comes up.
    assert_equal((alone[0], alone[1][:-1]), (shared[0], shared[1][:-1]), nan_ok="nan" in words)
    trained = [row for row in shared[1] if "loss" in row]
    assert sum(row.get("policy/skipped_minibatches", 0) for row in trained) == (1 if "nan" in words else 0)
    assert watched(folder / f"{name}_shared", 0)["whole"] == 1


@pytest.mark.long
def test_two_processes_with_a_base_of_4_bits_each_equal_one(folder: Path, model: str) -> None:
    """DistributedDataParallel: nothing is shared out."""
    alone = run(model, folder / "nf4_one", False, "nf4")
    assert_equal(alone, run(model, folder / "nf4_each", False, "nf4", processes=2))


@pytest.mark.long
def test_half_precision_does_not_round_log_probabilities(folder: Path, model: str) -> None:
    """accelerate has FSDP2 return what it computes in, where ratios of 1 would be 0.99. The forwards that score and
    that train differ by what bfloat16 rounds inside."""
    _, logs = run(model, folder / "half", True, "nf4", ACCELERATE_MIXED_PRECISION="bf16")
    assert watched(folder / "half", 0)["dtype"] == "torch.float32"
    first = [row for row in logs if "policy/first_approxkl" in row]
    assert len(first) == 3 and all(row["policy/first_approxkl"] < 1e-4 for row in first)
    assert all(row["grad_norm/policy"] > 0 for row in first)
