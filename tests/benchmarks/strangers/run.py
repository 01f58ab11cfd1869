"""The doctor on mistakes that it was not taught: runs them, keeps each run's log, and judges the logs.

python tests/benchmarks/strangers/run.py --half work             # each mistake at three seeds; about 40 s a run
python tests/benchmarks/strangers/run.py --healthy               # 60 runs in which nothing is wrong
python tests/benchmarks/strangers/run.py --half work --rejudge   # the present rules on the logs that are there
python tests/benchmarks/strangers/run.py --half work --table     # what has been run, as Markdown

A run is one JSON file with its log in a folder beside it. What is there is not run again, and processes that are
started side by side share the work.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).parents[1]))
import broken
import doctor
import fifth_models
import fifth_rewards
import fourth_models
import fourth_rewards
import more_models
import more_rewards
import sixth_models
import sixth_rewards
import split
import third_models
import third_rewards
import verdict
from doctor_cases import Case
from peft import LoraConfig
from transformers import PrinterCallback
from transformers.utils.logging import disable_progress_bar

from trl_ext import DiagnosticsCallback, PPOConfig, PPOTrainer, SharedBase, demo
from trl_ext.callbacks import RolloutCallback
from trl_ext.demo.exam import answer_greedily
from trl_ext.diagnostics import diagnose, read_run, roots
from trl_ext.diagnostics.forks import exchange, settings_of

HERE = Path(__file__).parent
for rewards, models in (  # of the lists after the first
    (more_rewards, more_models),
    (third_rewards, third_models),
    (fourth_rewards, fourth_models),
    (fifth_rewards, fifth_models),
    (sixth_rewards, sixth_models),
):
    broken.REWARDS.update(rewards.REWARDS)
    broken.NOT_NORMALISED.update(rewards.NOT_NORMALISED)
    broken.PROMPTS.update(rewards.PROMPTS)
    broken.MODELS.update(models.MODELS)
HALVES = tuple(f"{half}{of.suffix}" for of in split.LISTS for half in ("work", "measure"))
QUESTIONS, EVERY = 80, 128  # of an exam on the way, and episodes between two
KEPT = ("trainer_state.json", "run.json", "diagnostics.json")  # what read_run reads


@dataclass(frozen=True)
class Job:
    """A run to make.

    Attributes:
        id: "group#number", "pair:a+b" or "healthy:kind:note".
        half: one of `HALVES`, or "healthy"; also the folder.
        kind: of the mistake, for the table.
        seed: of the run.
        mistakes: groups of mistakes.yaml, each with the mistake in it.
        case: a healthy run of doctor.py, in place of mistakes.
    """

    id: str
    half: str
    kind: str
    seed: int
    mistakes: tuple[tuple[str, dict[str, Any]], ...] = ()
    case: Case | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """Of its files."""
        return re.sub(r"[^\w.+#-]+", "-", f"{self.id}-{self.seed}")


# Which runs ----------------------------------------------------------------------------------------------------------


def jobs_of(half: str, seeds: list[int]) -> list[Job]:
    """Every mistake of a half, alone and in pairs, seed by seed."""
    content = json.loads((HERE / "halves.json").read_text(encoding="utf-8"))[half]
    listed = {f"{group}#{i}": (group, one) for group, many in content["groups"].items() for i, one in enumerate(many)}
    runs = [(name, _kind(one), (mistake,)) for name, mistake in listed.items() for one in [mistake[1]]]
    runs += [(f"pair:{a}+{b}", "pairs", (listed[a], listed[b])) for a, b in content["pairs"]]
    return [Job(name, half, kind, seed, mistakes) for seed in seeds for name, kind, mistakes in runs]


def _kind(mistake: dict[str, Any]) -> str:
    return next((kind for kind in ("reward", "prompts", "model") if kind in mistake), "settings")


# Further runs in which nothing is wrong, in the form of a mistake.
MORE_HEALTHY: dict[str, dict[str, Any]] = {
    "value head": {"base": {"value": "head"}},
    "rank 8": {"lora": {"r": 8, "lora_alpha": 16}},
    "rank 32": {"lora": {"r": 32, "lora_alpha": 64}},
    "rollouts of 32": {"settings": {"per_device_train_batch_size": 16}},
    "rollouts of 128": {"settings": {"per_device_train_batch_size": 64, "total_episodes": 2560}},
    "four minibatches": {"settings": {"num_mini_batches": 4, "per_device_train_batch_size": 16}},
    "accumulated": {"settings": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 8}},
    "four completions a prompt": {"settings": {"num_generations": 4}},
    "up to 24 tokens": {"settings": {"max_completion_length": 24}},
    "kl_coef 0.25": {"settings": {"kl_coef": 0.25}},
    "whitened, at temperature 0.9": {"settings": {"whiten_rewards": True, "temperature": 0.9}},
    "exact ratings, twice as long": {"settings": {"total_episodes": 2560}, "functions": [demo.rate]},
}


def healthy_jobs(seeds: list[int]) -> list[Job]:
    """Those of doctor.py at every seed, and at the first one those above: 60 of three seeds."""
    runs = [
        Job(f"healthy:{case.kind}:{case.note}", "healthy", case.kind, seed, case=case)
        for seed in seeds
        for case in doctor.HEALTHY
    ]
    more = [(f"healthy:ppo:{note}", change) for note, change in MORE_HEALTHY.items()]
    return runs + [Job(name, "healthy", "ppo", seeds[0], (("", change),)) for name, change in more]


class Exams(RolloutCallback):
    """A part of the exam on the way, at every second rollout of the healthy run: what the mistake has cost so far."""

    def __init__(self, base: SharedBase, tokenizer: Any) -> None:
        self.base, self.tokenizer = base, tokenizer
        self.rows = [row for row in demo.load("exam").to_list() if row["covered"]][:QUESTIONS]
        self.taken: list[tuple[float, float]] = []
        """(episode, share of right answers) of each."""

    def on_update_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take one where it is time."""
        episode = state.global_step / args.steps_per_rollout * args.rollout_batch_size
        if episode - (self.taken[-1][0] if self.taken else 0.0) < EVERY:
            return
        answers = answer_greedily(self.base, self.tokenizer, [row["prompt"] for row in self.rows])
        right = [demo.grade(answer, row["capital"]) for answer, row in zip(answers, self.rows, strict=True)]
        self.taken.append((episode, sum(right) / len(right)))


# One run -------------------------------------------------------------------------------------------------------------


def build(
    job: Job, out: Path, folder: Path, episodes: int | None, changes: dict[str, Any]
) -> tuple[Any, Callable[[Any], float], DiagnosticsCallback]:
    """The trainer, what measures its exam, and the doctor at work in it.

    Args:
        folder: of the run's log.
        changes: settings in place of the run's own.
    """
    short = {} if episodes is None else {"total_episodes": episodes}
    if job.case is not None:
        case, callback = job.case, DiagnosticsCallback(yardstick=demo.exact if job.case.kind == "ppo" else None)
        make = {"ppo": doctor._ppo, "reward": doctor._reward, "dpo": doctor._dpo, "online": doctor._online}[case.kind]
        of_ppo = broken.EVALUATED | short if case.kind == "ppo" else {}
        settings = doctor.USUAL[case.kind] | of_ppo | case.settings | changes
        return *make(case, False, settings, job.seed, folder, callback), callback
    parts = broken.Parts(job.seed, out / "made")
    for _, mistake in job.mistakes:
        broken.apply(mistake, parts)
    parts.settings |= short | changes
    callback = DiagnosticsCallback(yardstick=broken.Exact(parts.prompts))
    args = PPOConfig(str(folder), seed=parts.seed, **doctor.ALWAYS | parts.settings)
    roles = parts.base | ({"reward": None} if parts.functions else {})
    base = SharedBase.from_pretrained(demo.model_path(), policy=LoraConfig(**parts.lora), dtype="float32", **roles)
    if parts.change_base is not None:
        parts.change_base(base)
    trainer = PPOTrainer(
        base,
        parts.functions or None,
        args,
        parts.prompts,
        parts.held_out,
        processing_class=parts.tokenizer,
        callbacks=[callback],
        generator=parts.make_generator(base) if parts.make_generator is not None else None,
    )
    return trainer, lambda trained: demo.run_exam(base, trained.processing_class).covered, callback


def run(
    job: Job,
    out: Path,
    episodes: int | None = None,
    changes: dict[str, Any] | None = None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Make a run, and judge its log.

    Args:
        changes: settings in place of the run's own, and stand-ins.
        folder: of its log; None: beside its result.

    Returns:
        What is kept: see `verdict.judge`; "exam", 0 to 1 (of a reward model its pairs in order); "exams", see `Exams`;
        "died", what ended it before its time; "refused", whether that was before anything was logged; "same", whether
        the doctor says of the log in the folder what it said in the process.
    """
    folder, started = folder or out / job.half / job.name, time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was ended
    died, exam, trainer, exams = "", 0.0, None, None
    try:
        trainer, well, callback = build(job, out, folder, episodes, settings_of(changes or {}))
        exchange(trainer, changes or {})
        trainer.remove_callback(PrinterCallback)
        if isinstance(trainer, PPOTrainer):
            trainer.add_callback(exams := Exams(trainer.base, trainer.processing_class))
        trainer.train()
        exam = float(well(trainer))
    except (ValueError, RuntimeError) as error:  # what was logged before still counts
        died = f"{type(error).__name__}: {error}"
    same = True
    if trainer is not None:
        trainer.save_state()
        callback.on_save(trainer.args, trainer.state, trainer.control)  # which a run that died has not heard
        in_process = [verdict.as_plain(top) for top in roots(diagnose(callback.log_of(trainer.state)))]
    _tidy(folder)
    found = judged(folder)
    if trainer is not None:
        told = {finding.topic for finding in callback.findings}
        same = _as_json(in_process) == _as_json(found["roots"]) and told >= set(found["first_seen"])
    return {
        "id": job.id,
        "half": job.half,
        "kind": job.kind,
        "seed": job.seed,
        "mistakes": job.mistakes,
        "exam": exam,
        "exams": exams.taken if exams is not None else [],
        "died": died,
        "refused": bool(died) and not found["rollouts"],
        "same": same,
        "seconds": time.perf_counter() - started,
        **found,
    }


def judged(folder: Path) -> dict[str, Any]:
    """The doctor's verdict on the log in a folder; on a run that was refused, none."""
    if not (folder / KEPT[0]).is_file():
        return {"roots": [], "first_seen": {}, "rollouts": 0}
    return verdict.judge(read_run(folder))


def _tidy(folder: Path) -> None:
    """Keep the log alone."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in KEPT:
            path.unlink()
    state = folder / KEPT[0]
    if state.is_file():
        state.write_text(json.dumps(json.loads(state.read_text(encoding="utf-8"))), encoding="utf-8")


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may make a run, for as long as it is inside. The system takes the claim of a process that
    died, of SIGKILL too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def work_through(
    jobs: list[Job],
    out: Path,
    limit_seconds: float,
    make: Callable[[Job], dict[str, Any]],
    said: Callable[[Job, dict[str, Any]], str] | None = None,
) -> tuple[int, int]:
    """Make every run that is not there and that no other process is making; start none after `limit_seconds`.

    Args:
        said: what to print of a result, nothing where it is empty; None: the doctor's roots and the exam, and of the
            half that only measures neither.

    Returns:
        How many were made, and how many failed by what is no refusal: an error of the benchmark, to be mended.
    """
    started, made, failed = time.monotonic(), 0, 0
    for job in jobs:
        if time.monotonic() - started > limit_seconds:
            break
        path = out / job.half / f"{job.name}.json"
        with claimed(out / "claims" / f"{job.half}-{job.name}.lock") as mine:
            if not mine or path.is_file():
                continue
            try:
                result = make(job)
            except Exception:
                traceback.print_exc()
                failed += 1
                continue
            _write(path, result)
            made += 1
            gc.collect()
        if line := (said or _said)(job, result):
            print(line, flush=True)
    return made, failed


def only_measures(half: str) -> bool:
    """Whether nothing is printed of a run while rules are written."""
    return half.startswith("measure")


def _said(job: Job, result: dict[str, Any]) -> str:
    first: dict[str, float] = {}
    for told in result["first_seen"].values():
        first.setdefault(told["name"], told["step"])
    names = [f"{root['name']}@{first[root['name']]:.0f}" for root in result["roots"]]
    told = "" if only_measures(job.half) else f": {names} exam {result['exam']:.2f} {result['died']}"
    differs = "" if result["same"] else " THE FOLDER SAYS OTHERWISE"
    return f"{job.name}{told} {result['seconds']:.0f} s{differs}"


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    draft = path.with_suffix(".draft")
    path.parent.mkdir(parents=True, exist_ok=True)  # a refused run has made none
    draft.write_text(_as_json(result), encoding="utf-8")
    draft.rename(path)


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=1, default=str)


def kept(out: Path, half: str) -> list[dict[str, Any]]:
    """Every kept result of a half, or of healthy runs."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / half).glob("*.json"))]


def rejudge(out: Path, half: str) -> tuple[int, int]:
    """Judge every kept log by the present rules.

    Returns:
        How many there are, and of how many the verdict changed.
    """
    paths, changed = sorted((out / half).glob("*.json")), 0
    for path in paths:
        before = json.loads(path.read_text(encoding="utf-8"))
        after = json.loads(_as_json({**before, **judged(path.parent / path.stem)}))
        if after != before:
            _write(path, after)
            changed += 1
    return len(paths), changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/strangers"))
    parser.add_argument("--half", choices=HALVES)
    parser.add_argument("--healthy", action="store_true", help="the healthy runs; --half needs the recipe's alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="a pattern that is found in the id")
    parser.add_argument("--episodes", type=int, help="of PPO, to try something out: into another --out")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="start no run after so many")
    parser.add_argument("--rejudge", action="store_true", help="judge the kept logs again, and run nothing")
    parser.add_argument("--table", action="store_true", help="print what has been run, and run nothing")
    args = parser.parse_args()
    halves = [half for half in (args.half, "healthy" if args.healthy else None) if half is not None]
    if not halves:
        parser.error("nothing to do: give --half work, --half measure or --healthy")
    if args.rejudge:
        for half in {*halves, "healthy"}:
            count, changed = rejudge(args.out, half)
            print(f"{half}: {count} logs judged again, {changed} verdicts changed")
    if args.table:
        mistaken = kept(args.out, args.half) if args.half else []
        print(verdict.table(mistaken, kept(args.out, "healthy"), *verdict.read_truth()))
    if args.rejudge or args.table:
        return
    logging.getLogger("trl_ext").setLevel(logging.ERROR)
    disable_progress_bar()
    healthy = healthy_jobs(args.seeds)
    jobs = healthy if args.healthy else [job for job in healthy if job.id == verdict.HEALTHY_RUN]
    jobs += jobs_of(args.half, args.seeds) if args.half else []
    chosen = [job for job in jobs if re.search(args.only, job.id)]
    made, failed = work_through(chosen, args.out, args.limit_seconds, lambda job: run(job, args.out, args.episodes))
    print(f"{made} runs made, {failed} failed", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
