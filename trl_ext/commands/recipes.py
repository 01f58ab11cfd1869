"""`trl-ext ppo`, `reward`, `dpo` and `loop`, which are the recipes; and `trl-ext demo`."""

from __future__ import annotations

import runpy
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# One round is enough where few answers are judged; a firmer hold on the first policy keeps it from the reward model's
# mistakes, of which 60 judgements leave many. One answer to each of so many prompts, so that most countries are judged.
DEMO = ["--rater", "page", "--rounds", "1", "--per_prompt", "1", "--kl_coef", "0.4", "--total_episodes", "1600"]


def run(name: str, arguments: Sequence[str]) -> int:
    """As `python recipes/NAME.py`. A wheel has the recipes inside the package, a clone beside it."""
    folder = next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if path.is_dir())
    sys.argv = [str(folder / f"{name}.py"), *arguments]
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
    return run("rlhf_loop", [*DEMO, *count, *page, "--disable_tqdm", "true"])
