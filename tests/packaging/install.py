"""Does it install? `python tests/packaging/install.py`, from a clone. It needs a package index and some minutes.

Builds the sdist, and from it the wheel; asks pip whether it goes beside the newest vLLM, Unsloth and TRL's extras;
installs the wheel into a fresh environment and runs the PPO recipe there, in a folder that is no clone. Status 1 where
something fails, or where the index has none of those packages.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ("vllm", "unsloth", "trl[vllm]", "trl[peft,quantization]", "trl[liger,kernels,math-verify,vlm]")
JOB = "--total_episodes 16 --per_device_train_batch_size 8 --use_cpu true --bf16 false --disable_tqdm true"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)


def must(what: str, *command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    if done.returncode:
        sys.exit(f"{what}: FAILED\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    print(f"{what}: ok", flush=True)
    return done.stdout


def environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if sys.platform == "win32" else "bin")


def newest_of(other: str, pip: Path, cwd: Path) -> str | None:
    """`other` at its newest version, or pip would settle on an old one that asks for less; None where there is none."""
    done = run(pip, "index", "versions", other.split("[")[0], cwd=cwd)
    found = re.search(r"\(([^)]+)\)", done.stdout)
    return f"{other}=={found[1]}" if done.returncode == 0 and found else None


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        temp = Path(name)
        tools, dist, outside = environment(temp / "tools"), temp / "dist", temp / "outside"
        outside.mkdir()
        must("tools", tools / "pip", "install", "-q", "-U", "pip", "build", cwd=outside)
        must("build sdist and wheel", tools / "python", "-m", "build", "--outdir", dist, ROOT, cwd=outside)
        (wheel,) = dist.glob("*.whl")
        checked = skipped = failed = 0
        for other in BESIDE:
            newest = newest_of(other, tools / "pip", outside)
            if newest is None:
                print(f"beside {other}: skipped, the index does not have it", flush=True)
                skipped += 1
                continue
            for extra in ("", "[vllm]") if other == "vllm" else ("",):
                tried = run(tools / "pip", "install", "-q", "--dry-run", f"{wheel}{extra}", newest, cwd=outside)
                checked, failed = checked + 1, failed + bool(tried.returncode)
                why = f"FAILED\n{tried.stderr[-1500:]}" if tried.returncode else "ok"
                print(f"trl-ext{extra} beside {newest}: {why}", flush=True)
        fresh = environment(temp / "fresh")
        pins = ROOT / "constraints.txt"
        must("install the wheel", fresh / "pip", "install", "-q", "-c", pins, wheel, cwd=outside)
        must("trl-ext ppo", fresh / "trl-ext", "ppo", *JOB.split(), "--output_dir", "out", cwd=outside)
        must("trl-ext doctor", fresh / "trl-ext", "doctor", "out", cwd=outside)
        must("trl-ext explain", fresh / "trl-ext", "explain", "kl_runs_away", cwd=outside)
    print(f"beside others: {checked - failed} ok, {failed} failed, {skipped} skipped")
    return 1 if failed or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
