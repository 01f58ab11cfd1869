"""`trl-ext ppo`, `reward`, `dpo` and `loop`, which are the recipes; and `trl-ext demo`."""

from __future__ import annotations

import runpy
import sys
from argparse import Namespace
from collections.abc import Sequence

from trl_ext.launch.settings import recipe_file

# Of so few judgements, pairs of what the policy says most teach most: in each, what is right stands beside what is not.
# A firmer hold on the first policy keeps it from the reward model's mistakes, of which they leave many.
REWARD = (
    '{"num_train_epochs": 20, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "lr_scheduler_type": "cosine"}'
)
DEMO = [
    *("--rater", "page", "--mode", "pairs", "--rounds", "1", "--per_prompt", "8", "--pick", "likelihood"),
    *("--kl_coef", "0.4", "--total_episodes", "1280"),
]


def run(name: str, arguments: Sequence[str]) -> int:
    """As `python recipes/NAME.py`."""
    sys.argv = [str(recipe_file(name)), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0


def demo(chosen: Namespace) -> int:
    """The circle once, with a person as rater."""
    count = ["--ratings", str(chosen.ratings), "--prompts", str(chosen.ratings)]
    page = [
        "--output_dir",
        chosen.out,
        "--port",
        str(chosen.port),
        *(["--browser", "false"] if chosen.no_browser else []),
    ]
    return run("rlhf_loop", [*DEMO, "--reward", REWARD, *count, *page, "--disable_tqdm", "true"])
