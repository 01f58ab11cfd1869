"""What an environment gets that lacks something, each in a process of its own.

The rows are part of docs/errors.md, which `python -m tests.recipes.test_bad_input` writes.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers import FLAGS

ROOT = Path(__file__).parents[2]
RATED_TWICE = (
    '{"prompt": "p", "completion": "a", "ratings": [1, 2]}\n{"prompt": "p", "completion": "b", "ratings": [4, 5]}\n'
)


@dataclass(frozen=True)
class Environment:
    """Something that is missing or wrong around the program.

    Attributes:
        what: in words.
        entry: a recipe ("ppo", "reward", "dpo"), or "trl-ext".
        arguments: of the command line.
        says: part of the sentence.
        without: a package that is not installed.
        variables: of the environment.
    """

    what: str
    entry: str
    arguments: str
    says: str
    without: str = ""
    variables: dict[str, str] = field(default_factory=dict)


# fmt: off
# ruff: noqa: E501
ENVIRONMENTS = [
    Environment("no vLLM", "ppo", "--use_vllm true", "use_vllm is set, but vLLM is not installed: pip install 'trl-ext[vllm]', or unset it.", without="vllm"),
    Environment("no bitsandbytes", "ppo", "--load_in_4bit true", "bitsandbytes", without="bitsandbytes"),
    Environment("no VADER", "ppo", "--reward_funcs trl_ext.rewards.sentiment.vader_sentiment", "The sentiment reward needs vaderSentiment: pip install 'trl-ext[sentiment]'.", without="vaderSentiment"),
    Environment("no matplotlib", "trl-ext", "feedback check rated_twice.jsonl --picture ratings.png", "Pictures need matplotlib: pip install 'trl-ext[feedback]'.", without="matplotlib"),
    Environment("no Hub", "ppo", "--model_name_or_path nobody/nothing", "nobody/nothing", variables={"HF_HUB_OFFLINE": "1"}),
    Environment("a push without the Hub", "reward", "--push_to_hub true", "push_to_hub is set, but HF_HUB_OFFLINE switches the Hub off: unset that, or leave it out, and upload", variables={"HF_HUB_OFFLINE": "1"}),
    Environment("a push without a token", "dpo", "--push_to_hub true", "push_to_hub is set, but there is no token for the Hub: log in with `hf auth login`, or give hub_token, or leave it out, and upload", variables={"HF_HUB_OFFLINE": "0", "HF_TOKEN": "", "HF_TOKEN_PATH": "nowhere"}),
    Environment("one of two processes alone", "ppo", "", "MASTER_ADDR", variables={"WORLD_SIZE": "2", "RANK": "1"}),
    Environment("two processes that do not know each other", "reward", "", "SLURM_STEP_NUM_TASKS says that 2 processes were started, but accelerate sees this one alone, so each would train a run of its own", variables={"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}),
    Environment("a precision that accelerate does not know", "ppo", "", "Unknown mixed_precision mode: fp17.", variables={"ACCELERATE_MIXED_PRECISION": "fp17"}),
]
# fmt: on


@pytest.mark.sampled(every=8)
@pytest.mark.parametrize("row", ENVIRONMENTS, ids=lambda row: row.what)
def test_a_wrong_environment_gets_its_sentence(row: Environment, tmp_path: Path) -> None:
    (tmp_path / "rated_twice.jsonl").write_text(RATED_TWICE)
    hidden = f"import runpy, sys; sys.modules.update({{{row.without!r}: None}}); "
    if row.entry == "trl-ext":
        start, given = "from trl_ext.cli import main; sys.exit(main())", []
    else:
        script = str(ROOT / "recipes" / f"{row.entry}_lora.py")
        start, given = (
            f"sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')",
            FLAGS,
        )
    launched = ("MASTER_", "RANK", "WORLD_", "LOCAL_", "ACCELERATE_")  # by whoever runs the tests
    alone = {name: value for name, value in os.environ.items() if not name.startswith(launched)}
    run = subprocess.run(
        [sys.executable, "-c", hidden + start, *row.arguments.split(), *given],
        cwd=tmp_path,
        env={**alone, "PYTHONPATH": str(ROOT), **row.variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 1, run.stderr
    assert row.says in run.stderr.splitlines()[-1], run.stderr
    assert "Traceback" not in run.stderr
