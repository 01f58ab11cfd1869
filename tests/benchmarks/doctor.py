"""The doctor, proven: plausible mistakes on the embedded default, found and cured; healthy runs, left alone.

python tests/benchmarks/doctor.py --out runs/doctor              # every case at three seeds, healthy runs; hours
python tests/benchmarks/doctor.py --out runs/doctor --table      # the confusion matrix of what has been run

Each case (tests/benchmarks/doctor_cases.py) runs with its mistake and again with its remedy, the mistake's data and
functions otherwise the same. Results are kept one a file, so that the work can be shared by processes and gone on with.
"""

import argparse
import json
import logging
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from doctor_cases import CASES, DPO, ONLINE, PPO, REWARD, Case
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_ext import (
    DiagnosticsCallback,
    FeedbackRewardConfig,
    FeedbackRewardTrainer,
    PPOConfig,
    PPOTrainer,
    SharedBase,
    demo,
    feedback,
    launch,
)
from trl_ext.diagnostics import Finding, diagnose

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "diagnostics" / "index.md"
START, END = "<!-- confusion: begin -->", "<!-- confusion: end -->"
USUAL = {"ppo": PPO, "reward": REWARD, "dpo": DPO, "online": ONLINE}
ALWAYS = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
# Every variation here is a run in which nothing is wrong.
HEALTHY: tuple[Case, ...] = (
    Case("", "ppo", "the recipe"),
    Case("", "ppo", "kl_penalty", {"objective": "kl_penalty"}),
    Case(
        "",
        "ppo",
        "reinforce",
        {
            "objective": "reinforce",
            "num_ppo_epochs": 1,
            "num_mini_batches": 8,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
        },
    ),
    Case("", "ppo", "sequence", {"objective": "sequence"}),
    Case("", "ppo", "exact ratings", functions=(demo.rate,)),
    Case("", "ppo", "kl_coef 0.8", {"kl_coef": 0.8}),
    Case("", "ppo", "learning rate 5e-4", {"learning_rate": 5e-4}),
    Case("", "ppo", "two epochs", {"num_ppo_epochs": 2}),
    Case("", "ppo", "running normalisation", {"score_normalization": "running"}),
    Case("", "ppo", "whitened rewards", {"whiten_rewards": True}),
    Case("", "reward", "the recipe"),
    Case("", "reward", "regression", {"objective": "regression"}),
    Case("", "dpo", "the recipe"),
    Case("", "dpo", "learning rate 2e-4", {"learning_rate": 2e-4}),
    # TRL's own defaults, at the learning rate that LoRA wants and with logs as often as the others'.
    Case("", "online", "GRPO's defaults"),
    Case("", "online", "RLOO's defaults", arguments={"trainer": "RLOO"}),
)


def run(case: Case, cured: bool, prescribed: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """One run.

    Args:
        cured: with the case's cure, or where it has none of its own with the settings `prescribed` by the doctor.

    Returns:
        "found": in the order in which it was first seen; "well": how well the run did, its exam or its held-out pair
        accuracy; "died": what ended it before its time.
    """
    settings = USUAL[case.kind] | case.settings
    if cured:
        settings = settings | (case.cure if case.cure is not None else prescribed)
    callback = DiagnosticsCallback(yardstick=demo.exact if case.kind == "ppo" else None)
    build = {"ppo": _ppo, "reward": _reward, "dpo": _dpo, "online": _online}[case.kind]
    trainer, well = build(case, cured, settings, seed, folder, callback)
    died = ""
    try:
        trainer.train()
        figure = float(well(trainer))
    except (ValueError, RuntimeError) as error:  # what was found before still counts
        died, figure = f"{type(error).__name__}: {error}", 0.0
    trainer.save_state()
    last = [finding.name for finding in diagnose(callback.log_of(trainer.state))]
    findings = [_plain(finding, last) for finding in callback.findings]
    return {"found": findings, "well": figure, "died": died}


def _plain(finding: Finding, last: list[str]) -> dict[str, Any]:
    return {
        "name": finding.name,
        "severity": finding.severity,
        "step": finding.steps[1],
        "rank_at_end": last.index(finding.name) + 1 if finding.name in last else None,
        "evidence": finding.evidence,
        "changes": finding.remedy.changes,
    }


def _lora(**changes: Any) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", **changes)


def _ppo(case: Case, cured: bool, settings: dict, seed: int, folder: Path, callback: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    functions = case.cured_functions if cured and case.cured_functions is not None else case.functions
    base = SharedBase.from_pretrained(
        demo.model_path(),
        policy=_lora(**case.lora),
        value="adapter",
        reward=None if functions else demo.reward_adapter(),
        dtype="float32",
    )
    if case.roles is not None and not cured:
        case.roles(base)
    generator = case.generator(base) if case.generator is not None and not cured else None
    prompts = demo.load("prompts", "train")
    if case.prompts is not None and not cured:
        prompts = case.prompts(prompts)
    args = PPOConfig(str(folder), seed=seed, **ALWAYS | settings)
    held_out = demo.load("prompts", "test").select(range(64)) if "eval_strategy" in settings else None
    trainer = PPOTrainer(
        *(base, list(functions) or None, args, prompts, held_out),
        processing_class=tokenizer,
        generator=generator,
        callbacks=[callback],
    )
    return trainer, lambda _: demo.run_exam(base, tokenizer).covered


def _reward(case: Case, cured: bool, settings: dict, seed: int, folder: Path, callback: Any) -> tuple[Any, Any]:
    splits = ("train", "test")
    if settings.get("objective", "pairwise") == "pairwise":
        columns = ["prompt", "chosen", "rejected"]
        rows, held_out = (demo.load("pairs", split).select_columns(columns) for split in splits)
    else:
        rated = [feedback.read(demo.load("ratings", split), "ratings") for split in splits]
        convert = feedback.to_unpaired if settings["objective"] == "binary" else feedback.to_ratings
        rows, held_out = (convert(part) for part in rated)
    change = case.cured_pairs if cured and case.cured_pairs is not None else case.pairs
    if change is not None:
        rows = change(rows, seed)
    float32 = {"model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False}
    args = FeedbackRewardConfig(str(folder), seed=seed, **float32 | ALWAYS | settings)
    lora = _lora(task_type="SEQ_CLS")
    trainer = FeedbackRewardTrainer(demo.model_path(), args, rows, held_out, peft_config=lora, callbacks=[callback])
    return trainer, lambda t: _pairs_in_order(t, folder)


def _pairs_in_order(trainer: FeedbackRewardTrainer, folder: Path) -> float:
    """Share of the demo's held-out pairs that the trained model has in order."""
    trainer.save_model(str(folder / "adapter"))
    base = SharedBase.from_pretrained(demo.model_path(), reward=str(folder / "adapter"), dtype="float32")
    pairs = demo.load("pairs", "test").select_columns(["prompt", "chosen", "rejected"])
    answers = launch.scored_answers(base, trainer.processing_class, pairs)
    return feedback.judge(answers).pair_accuracy


def _dpo(case: Case, cured: bool, settings: dict, seed: int, folder: Path, callback: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    model = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    settings = {name: value for name, value in settings.items() if value is not None}
    reference = None
    if case.arguments.get("ref") == "other" and not cured:
        reference = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for weight in reference.parameters():  # another run's checkpoint, say
            weight.data.add_(0.5 * torch.randn(weight.shape, generator=generator) * weight.data.std())
    args = DPOConfig(str(folder), seed=seed, gradient_checkpointing=False, **ALWAYS | settings)
    pairs = demo.load("pairs", "train").select_columns(["prompt", "chosen", "rejected"])
    trainer = DPOTrainer(
        model,
        ref_model=reference,
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=None if reference is not None else _lora(task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    return trainer, lambda t: demo.run_exam(t.model, tokenizer).covered


def _online(case: Case, cured: bool, settings: dict, seed: int, folder: Path, callback: Any) -> tuple[Any, Any]:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
    model = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    kinds: tuple[Any, Any] = (RLOOTrainer, RLOOConfig) if case.arguments else (GRPOTrainer, GRPOConfig)
    args = kinds[1](str(folder), seed=seed, gradient_checkpointing=False, **ALWAYS | settings)
    trainer = kinds[0](
        model,
        [demo.rate],
        args,
        demo.load("prompts", "train"),
        processing_class=tokenizer,
        peft_config=_lora(task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    return trainer, lambda t: demo.run_exam(t.model, tokenizer).covered


def file_of(out: Path, case: Case, state: str, seed: int) -> Path:
    """Where a run's result is kept."""
    note = "".join(c if c.isalnum() else "_" for c in case.note)
    return out / f"{case.kind}-{case.finds or 'healthy'}-{note}-{state}-{seed}.json"


def do(case: Case, state: str, seed: int, out: Path) -> None:
    """Run and keep."""
    path = file_of(out, case, state, seed)
    if path.is_file():
        return
    prescribed: dict[str, Any] = {}
    if state == "cured" and case.cure is None:
        mistaken = json.loads(file_of(out, case, "mistaken", seed).read_text(encoding="utf-8"))
        named = [finding for finding in mistaken["found"] if finding["name"] == case.finds]
        if not named:
            return  # nothing was found, so nothing was prescribed
        prescribed = named[0]["changes"]
    started = time.perf_counter()
    folder = out / path.stem
    result = run(case, state == "cured", prescribed, seed, folder) | {
        "case": case.finds,
        "kind": case.kind,
        "note": case.note,
        "state": state,
        "seed": seed,
        "seconds": time.perf_counter() - started,
    }
    path.write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")
    shutil.rmtree(folder / "completions", ignore_errors=True)
    names = [f"{f['name']}@{f['step']}" for f in result["found"]]
    print(f"{path.stem}: {names} well {result['well']:.2f} {result['seconds']:.0f} s {result['died']}", flush=True)


# What has been run ---------------------------------------------------------------------------------------------------


def results(out: Path) -> list[dict[str, Any]]:
    """Every kept result, with the findings of its last diagnosis in the doctor's order."""
    results_so_far = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))]
    for result in results_so_far:
        standing = [finding for finding in result["found"] if finding["rank_at_end"]]
        result["order"] = [f["name"] for f in sorted(standing, key=lambda finding: finding["rank_at_end"])]
    return results_so_far


def table(out: Path) -> str:
    """Per mistake: how often it was among the doctor's first two findings at the end of the run and among the first two
    that were said while it ran, when, and what the remedy did; and the healthy runs."""
    runs = results(out)
    lines = [
        "| mistake | of the first two at the end | while it ran | at step | other findings | well before | "
        "after the remedy | gone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    named = live = either = total = 0
    for case in CASES:
        mine = [r for r in runs if (r["case"], r["kind"], r["note"]) == (case.finds, case.kind, case.note)]
        sick = [r for r in mine if r["state"] == "mistaken"]
        cured = [r for r in mine if r["state"] == "cured"]
        if not sick:
            continue
        ended = [case.finds in r["order"][:2] for r in sick]
        ran = [case.finds in [finding["name"] for finding in r["found"][:2]] for r in sick]
        named, live, total = named + sum(ended), live + sum(ran), total + len(sick)
        either += sum(a or b for a, b in zip(ended, ran, strict=True))
        steps = [f["step"] for r in sick for f in r["found"] if f["name"] == case.finds]
        others = Counter(name for r in sick for name in r["order"] if name != case.finds)
        gone = sum(case.finds not in [f["name"] for f in r["found"]] for r in cured)
        wells = [f"{statistics.median(r['well'] for r in part):.0%}" if part else "" for part in (sick, cured)]
        lines.append(
            f"| [`{case.finds}`]({case.finds}.md), {case.kind}: {case.note} | {sum(ended)} of {len(sick)} | "
            f"{sum(ran)} of {len(sick)} | "
            f"{int(statistics.median(steps)) if steps else ''} | {', '.join(f'{n} {c}' for n, c in others.items())} | "
            f"{wells[0]} | {wells[1]} | {f'{gone} of {len(cured)}' if cured else ''} |"
        )
    healthy = [r for r in runs if r["state"] == "healthy"]
    false = [f["name"] for r in healthy for f in r["found"] if f["severity"] == "problem"]
    lines += [
        "",
        f"Of {total} runs with a mistake it was named among the first two findings in {either}: in {named} at the end, "
        f"in {live} while they ran.",
    ]
    shown = f": {', '.join(false)}" if false else ""
    lines.append(f"{len(false)} findings of severity problem in {len(healthy)} healthy runs{shown}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/doctor"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", help="findings, or 'healthy'")
    parser.add_argument("--states", nargs="+", default=["mistaken", "cured"])
    parser.add_argument("--kind", choices=tuple(USUAL))
    parser.add_argument("--table", action="store_true", help="write what has been run into the docs, and run nothing")
    args = parser.parse_args()
    if args.table:
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        PAGE.write_text(f"{before}{START}\n{table(args.out)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("trl_ext").setLevel(logging.ERROR)
    for seed in args.seeds:
        for case in CASES:
            if (not args.only or case.finds in args.only) and args.kind in (None, case.kind):
                for state in args.states:
                    do(case, state, seed, args.out)
        if not args.only or "healthy" in args.only:
            for case in HEALTHY:
                if args.kind in (None, case.kind):
                    do(case, "healthy", seed, args.out)


if __name__ == "__main__":
    main()
