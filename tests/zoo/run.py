"""The zoo: every causal language model of Transformers, tiny and random, through every role.

    python tests/zoo/run.py --out zoo.jsonl [--only mixtral,opt] [--again] [--table docs/models.md]

Each model runs in a process of its own with a limit on time and memory; results are written one by one, and a second
call goes on where the first stopped: what --out holds of the same code and versions is not measured again, and what it
holds of others does not count. Ends with 1 where a model is wrong or raises, 0 else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.zoo import checks, configs, table

SECONDS, GIGABYTES = 180, 8
ROOT = Path(__file__).parents[2]


def fingerprint() -> dict[str, str]:
    """What results depend on: the versions, and a hash of the package's and the zoo's sources."""
    digest = hashlib.sha256()
    for file in sorted(f for part in ("trl_ext", "tests/zoo", "tests/parity") for f in (ROOT / part).rglob("*.py")):
        if file.name not in ("run.py", "table.py") and not file.name.startswith("test_"):
            digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    versions = {name: version(name) for name in ("transformers", "peft", "torch", "trl")}
    return {"code": digest.hexdigest()[:12], **versions}


def known(out: Path, state: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """The newest result of each model in a file; with `state`, only of that state."""
    results = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {r["name"]: r for r in results if state is None or r.get("state") == state}


def child(name: str, folder: Path, out: Path) -> None:
    """All checks of one model, in this process."""
    resource.setrlimit(resource.RLIMIT_DATA, (GIGABYTES << 30, GIGABYTES << 30))
    with out.open("w") as file:

        def report(finding: checks.Finding) -> None:
            file.write(json.dumps(checks.as_json(finding)) + "\n")
            file.flush()

        try:
            config = configs.config_of(name)
        except Exception as error:
            report(checks.Finding("config", "absent", note=f"no tiny configuration: {checks.sentence(error)}"))
            return
        try:
            checks.run(config, folder, report)
        except Exception as error:  # of the zoo itself, or of plain models where they are not expected to fail
            report(checks.Finding("zoo", "raw", note=checks.sentence(error)))


def run_one(name: str) -> dict[str, Any]:
    """The result of one model."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zoo") as scratch:
        out = Path(scratch) / "findings.jsonl"
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            try:
                devnull = os.open(os.environ.get("ZOO_STDERR", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(devnull, 1)
                os.dup2(devnull, 2)
                child(name, Path(scratch), out)
            finally:
                os._exit(0)
        status = None
        while status is None and time.monotonic() - started < SECONDS:
            done, code = os.waitpid(pid, os.WNOHANG)
            status = code if done else None
            time.sleep(0.05)
        findings = []
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if out.exists():
            findings = [json.loads(line) for line in out.read_text().splitlines()]
        if status is None:
            findings.append(
                {"check": "process", "verdict": "raw", "difference": None, "note": f"longer than {SECONDS} s"}
            )
        elif status:
            findings.append({"check": "process", "verdict": "raw", "difference": None, "note": f"ended with {status}"})
    return {
        "name": name,
        "verdict": checks.verdict(findings),
        "seconds": round(time.monotonic() - started, 1),
        "findings": findings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--again", action="store_true", help="run also what --out holds already")
    parser.add_argument("--table", type=Path, help="write this page from the results at the end")
    parser.add_argument("--floor", type=Path, help="results of this code with the lowest Transformers, for the page")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = args.only.split(",") if args.only else configs.names()
    state = fingerprint()
    results = known(args.out, state)
    if others := known(args.out).keys() - results.keys():
        print(f"{args.out} holds {len(others)} results of another code or other versions: they do not count.")
    floor = known(args.floor) if args.floor else {}
    if args.floor and {r.get("state", {}).get("code") for r in floor.values()} != {state["code"]}:
        sys.exit(f"{args.floor} is missing or holds results of another code: measure it again.")
    names = [name for name in names if args.again or name not in results]
    if len(names) > 1:  # what each child would import first is imported once
        with (
            tempfile.TemporaryDirectory(prefix="zoo") as scratch,
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere),
        ):
            checks.run(configs.config_of("llama"), Path(scratch), lambda finding: None)
    for name in names:
        result = {**run_one(name), "state": state}
        results[name] = result
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        bad = [
            f"{f['check']}: {f['verdict']} {f['note']}" for f in result["findings"] if f["verdict"] not in ("right",)
        ]
        print(f"{name}: {result['verdict']} ({result['seconds']} s)", *bad[:6], sep="\n    ", flush=True)
    if args.table:
        if missing := [name for name in configs.names() if name not in results]:
            sys.exit(f"{len(missing)} models are not measured, first {missing[0]}: a page needs all of them.")
        table.write(args.table, results, configs.names(), checks.LIMITS, floor)
    bad = sorted(name for name, result in results.items() if result["verdict"] in ("wrong", "raw"))
    if bad:
        sys.exit(f"Wrong, or without a sentence: {', '.join(bad)}")


if __name__ == "__main__":
    main()
