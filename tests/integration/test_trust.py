"""Safe by default: what docs/trust.md promises of files, of code that ships with models, and of the network."""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.helpers import FLAGS, QUIET, prompt_dataset, saved_model, word_tokenizer
from trl_ext import PPOConfig, PPOTrainer, SharedBase
from trl_ext.diagnostics import read_run
from trl_ext.rewards import Scorer

ROOT = Path(__file__).parents[2]
UNPICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


class Trap:
    """Leaves a file where it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> Any:
        return Path.touch, (self.sprung,)


def judge(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trainer_for(folder: Path) -> PPOTrainer:
    args = PPOConfig(
        str(folder / "out"),
        per_device_train_batch_size=4,
        total_episodes=8,
        num_ppo_epochs=2,
        max_completion_length=4,
        **{**QUIET, "save_strategy": "steps"},
        save_steps=2,
    )
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    return PPOTrainer(
        saved_model(folder / "model"), judge, args, prompt_dataset(), None, word_tokenizer(), peft_config=lora
    )


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


def test_our_code_unpickles_nothing_and_runs_no_text() -> None:
    for file in [*(ROOT / "trl_ext").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                imported = {(module or alias.name).split(".")[0] for alias in node.names}
                assert not imported & UNPICKLES, f"{file}:{node.lineno}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in RUNS_TEXT | {"torch.load", "yaml.load", "np.load"}, f"{file}:{node.lineno}"


def test_trained_weights_are_safetensors(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    kinds = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert ".safetensors" in kinds and not kinds & {".bin", ".pt", ".pth", ".pkl"}
    # A checkpoint has Transformers' own files of optimizer, schedule and random numbers beside them.
    others = {
        path.name for path in (tmp_path / "out" / "checkpoint-2").rglob("*") if path.suffix in (".bin", ".pt", ".pth")
    }
    assert others <= {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_trap_is_refused(name: str, tmp_path: Path) -> None:
    trainer_for(tmp_path).train()
    torch.save({"state": Trap(tmp_path / "sprung")}, tmp_path / "out" / "checkpoint-2" / name)
    with pytest.raises(Exception, match="Weights only load failed"):
        trainer_for(tmp_path).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert not (tmp_path / "sprung").exists()


def test_a_run_with_a_trap_is_read_without_it(tmp_path: Path) -> None:
    trainer_for(tmp_path).train()
    folder = tmp_path / "out" / "checkpoint-4"
    torch.save(Trap(tmp_path / "sprung"), folder / "training_args.bin")
    assert read_run(folder).rows
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def model_with_code(tmp_path: Path) -> Path:
    """A folder whose model and tokenizer come with code that leaves a file where it is run."""
    folder = Path(saved_model(tmp_path / "model_with_code"))
    code = (
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnJudge(LlamaForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {
        "AutoConfig": "own.OwnConfig",
        "AutoModelForCausalLM": "own.OwnModel",
        "AutoModelForSequenceClassification": "own.OwnJudge",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_that_ships_with_a_model_runs_only_when_asked(model_with_code: Path, tmp_path: Path) -> None:
    args = PPOConfig(str(tmp_path / "out"), per_device_train_batch_size=4, **QUIET)
    with pytest.raises(ValueError, match="trust_remote_code"):
        SharedBase.from_pretrained(str(model_with_code))
    with pytest.raises(ValueError, match="trust_remote_code"):
        PPOTrainer(str(model_with_code), judge, args, prompt_dataset(), None, word_tokenizer())
    with pytest.raises(ValueError, match="trust_remote_code"):
        Scorer([str(model_with_code)])
    assert not (tmp_path / "ran").exists()
    SharedBase.from_pretrained(str(model_with_code), trust_remote_code=True)
    assert (tmp_path / "ran").exists()


WATCHED = """
import os, runpy, socket, sys

def gone(why):  # an exception would end no more than the thread that telemetry runs in
    os.write(2, why.encode())
    os._exit(97)

def refuse(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6):
        gone(f"a connection to {address}")

def look_up(host, *rest, **more):
    gone(f"an address was looked for: {host}")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = look_up
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def watched(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script in a process that ends at the first word to anybody. Nothing forbids it to speak: HF_HUB_OFFLINE and
    HF_HUB_DISABLE_TELEMETRY are not set, nor is CI, under which TRL is silent."""
    forbids = ("HF_HUB_", "DO_NOT_TRACK", "CI")
    quiet = {key: value for key, value in os.environ.items() if not key.startswith(forbids)}
    return subprocess.run(
        [sys.executable, "-c", WATCHED, script, *arguments],
        env={**quiet, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.sampled(every=3)
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ppo", "reward", "dpo"])
def test_a_recipe_speaks_to_nobody(recipe: str, tmp_path: Path) -> None:
    short = ["--max_steps", "8"] if recipe != "ppo" else ["--total_episodes", "64"]
    script, out = str(ROOT / "recipes" / f"{recipe}_lora.py"), str(tmp_path / "out")
    run = watched(script, "--output_dir", out, *FLAGS, *short)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.long
def test_a_trainer_in_a_script_of_ones_own_speaks_to_nobody(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom tests.helpers import *\n"
        "from trl_ext import *\n"
        "from peft import LoraConfig\n"
        "model = saved_model(Path(sys.argv[1]) / 'model')\n"
        "sizes = {'per_device_train_batch_size': 4, 'total_episodes': 4, 'max_completion_length': 8}\n"
        "args = PPOConfig(sys.argv[1] + '/ppo', **sizes, **QUIET)\n"
        "PPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args, prompt_dataset(8)).train()\n"
        "rows = Dataset.from_dict({'prompt': ['the'] * 4, 'completion': ['cat', 'a'] * 2, 'rating': [1.0, 2.0] * 2})\n"
        "args = FeedbackRewardConfig(sys.argv[1] + '/reward', objective='regression', max_steps=1, **QUIET)\n"
        "lora = LoraConfig(task_type='SEQ_CLS', target_modules=['q_proj'])\n"
        "FeedbackRewardTrainer(model, args, rows, peft_config=lora).train()\n"
        "from huggingface_hub.utils import _telemetry\n"
        "_telemetry._TELEMETRY_QUEUE.join()\n"  # telemetry is sent in a thread that ends with the process
        "print('through')\n"
    )
    run = watched(str(script), str(tmp_path))
    assert run.returncode == 0 and "through" in run.stdout, run.stderr[-2000:]


@pytest.mark.parametrize("who", ["socket.create_connection(('127.0.0.1', 9))", "socket.getaddrinfo('localhost', 9)"])
def test_a_word_in_a_thread_of_its_own_would_be_heard(who: str, tmp_path: Path) -> None:
    """As telemetry is sent, where nobody waits for it."""
    script = tmp_path / "speaks.py"
    script.write_text(
        f"import socket, threading\nthread = threading.Thread(target=lambda: {who})\nthread.start()\nthread.join()\n"
    )
    assert watched(str(script)).returncode == 97
