"""The embedded default over a real `vllm serve`, beside `generate`: whether both learn alike.

PYTHONPATH=. python tests/engines/demo.py --vllm ENVIRONMENT/bin/vllm [--serve "--dtype float32"]

`run.sh` beside it makes the environment. Each run is `recipes/ppo_lora.py`; what it says of itself is printed, and the
means over the seeds at the end.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tests.engines.served import WAIT, Served
from trl_ext import demo

ROOT = Path(__file__).parents[2]
KEPT = ("objective/scores", "objective/kl")
LAST = 4  # rollouts whose mean is told


def run(folder: Path, seed: int, further: list[str]) -> dict[str, float]:
    """A run's exam (%), score and KL (nats a completion) at its end."""
    given = ["--output_dir", str(folder), "--seed", str(seed), "--disable_tqdm", "true", "--save_strategy", "no"]
    command = [sys.executable, "recipes/ppo_lora.py", *given, *further]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    rows = [row for row in history if "objective/kl" in row][-LAST:]
    said = json.loads((folder / "result.json").read_text(encoding="utf-8"))["exam after"]
    return {"exam": float(re.findall(r"([\d.]+)%", said)[0]), **{key: fmean(row[key] for row in rows) for key in KEPT}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="its command, in its own environment")
    parser.add_argument("--serve", default="", help="further arguments of vllm serve")
    parser.add_argument("--port", type=int, default=8179)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--episodes", type=int, default=1280)
    chosen = parser.parse_args()
    chosen.model, chosen.serve = demo.model_path(), f"--max-model-len 128 {chosen.serve}"
    found: dict[str, list[dict[str, Any]]] = {"generate": [], "vLLM": []}
    with tempfile.TemporaryDirectory() as name:
        server = Served(chosen, Path(name) / "vllm.log")
        served = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_base_url", server.url]
        served += ["--vllm_server_timeout", str(WAIT)]
        try:
            for seed in chosen.seeds:
                for how, further in (("vLLM", served), ("generate", [])):
                    more = [*further, "--total_episodes", str(chosen.episodes)]
                    found[how].append(run(Path(name) / f"{how}-{seed}", seed, more))
                    print(f"{how}, seed {seed}: {found[how][-1]}", flush=True)
        except SystemExit:
            print((Path(name) / "vllm.log").read_text(errors="replace")[-3000:])
            raise
        finally:
            server.kill()
    for key in found["generate"][0]:
        ours, theirs = ([one[key] for one in found[how]] for how in found)
        spread = stdev(ours) if len(ours) > 1 else float("nan")
        print(f"{key}: generate {fmean(ours):.3f}, vLLM {fmean(theirs):.3f}; the seeds of generate {spread:.3f} apart")


if __name__ == "__main__":
    main()
