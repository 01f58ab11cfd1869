"""One round against four with the same number of judgements: whether the circle closes the gap.

python tests/benchmarks/circle.py --work FOLDER            # the embedded default; writes docs/recipes/loop.md
python tests/benchmarks/circle.py --work FOLDER --real --base MODEL --ratings RATINGS.tsv [--gold FOLDER]

Embedded, three seeds: one round of 1,200 judgements at kl_coef 0.05, four of 300 at 0.05, and one of 1,200 at 0.4. PPO
sees the same number of completions in all.

--real: a reward adapter over MODEL that is trained on all of RATINGS.tsv (or found in FOLDER) plays the person (Gao et
al. 2023, arXiv:2210.10760). The loop's own reward models learn from 200 of its judgements in all: one round of 200, or
four of 50. Drawn is the gold score over the KL for both, a point a rollout: what the policy said in training is kept
(`log_completions`), and scored by the gold model afterwards.

Each run is a folder below FOLDER, which a second call goes on with. `--quick` takes a few steps of everything.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from timing import head, panels, row, save
from transformers import AutoTokenizer

from trl_ext import SharedBase
from trl_ext.launch.judging import scores_of
from trl_ext.loop import Round
from trl_ext.tokens import sequence_ids

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes" / "loop.md"
START, END = "<!-- circle: begin -->", "<!-- circle: end -->"
EMBEDDED: dict[str, list[str]] = {
    "one round, kl_coef 0.05": ["--rounds", "1", "--ratings", "1200", "--kl_coef", "0.05", "--total_episodes", "3200"],
    "four rounds, kl_coef 0.05": ["--rounds", "4", "--ratings", "300", "--kl_coef", "0.05", "--total_episodes", "800"],
    "one round, kl_coef 0.4": ["--rounds", "1", "--ratings", "1200", "--kl_coef", "0.4", "--total_episodes", "3200"],
}
REAL: dict[str, list[str]] = {
    "one round of 200": ["--rounds", "1", "--ratings", "200", "--prompts", "200", "--total_episodes", "768"],
    "four rounds of 50": ["--rounds", "4", "--ratings", "50", "--prompts", "50", "--total_episodes", "192"],
}
COLOURS = {"one round of 200": "#e69f00", "four rounds of 50": "#0072b2"}
ROLLOUTS = 3  # of one of the four rounds
WORDS, PROMPTS, HELD_OUT = 5, 640, 32  # words of a prompt; prompts; those of them that only the comparison sees
QUICK = ["--total_episodes", "64", "--ratings", "16", "--held_out", "8"]

Line = dict[str, Any]
Point = tuple[float, float]


def recipe(name: str, arguments: list[str]) -> None:
    """Run a recipe, and say what it said where it fails."""
    done = subprocess.run([sys.executable, f"recipes/{name}.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")


def loop(work: Path, name: str, seed: int, arguments: list[str]) -> list[Line]:
    """The lines of a loop's rounds; the seconds that it took stand beside them."""
    folder = work / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    file = folder / "seconds.json"
    if not file.is_file():
        started = time.perf_counter()
        recipe("rlhf_loop", ["--output_dir", str(folder), "--seed", str(seed), "--disable_tqdm", "true", *arguments])
        file.write_text(json.dumps(time.perf_counter() - started), encoding="utf-8")
    lines: list[Line] = json.loads((folder / "rounds.json").read_text(encoding="utf-8"))
    lines[-1]["seconds"] = json.loads(file.read_text(encoding="utf-8"))
    print(f"{name}, seed {seed}: {lines[-1]}", flush=True)
    return lines


def table(results: dict[str, list[list[Line]]]) -> str:
    """The last round of each run, seed by seed, and how the reward model did on new answers."""
    text = [head("", "judgements", "exam", "score", "KL, nats", "new answers, before and after", "seconds")]
    for name, runs in results.items():
        last = [lines[-1] for lines in runs]
        spent = ", ".join(f"{one['ratings']:,}" for one in last)
        exam = ", ".join(f"{one['exam']:.1%}" for one in last if one["exam"] is not None)
        cells = [", ".join(f"{one[key]:.2f}" for one in last) for key in ("score", "kl")]
        gaps = [(one["accuracy_before"], one["accuracy_after"]) for lines in runs for one in lines[1:]]
        known = [gap for gap in gaps if None not in gap]
        gap = f"{fmean(b for b, _ in known):.1%}, {fmean(a for _, a in known):.1%}" if known else ""
        text.append(row(name, spent, exam, *cells, gap, ", ".join(f"{one['seconds']:.0f}" for one in last)))
    return "\n".join(text)


# A real model --------------------------------------------------------------------------------------------------------


def gold_of(chosen: argparse.Namespace, length: list[str]) -> Path:
    """The rater who knows better: a reward adapter that is trained on all ratings."""
    folder = chosen.gold or chosen.work / "gold"
    if not (folder / "result.json").is_file():
        again = any(folder.glob("checkpoint-*"))  # hours on a CPU: it goes on where it stopped
        recipe(
            "reward_lora",
            [
                *("--model_name_or_path", str(chosen.base), "--dtype", "float32", "--objective", "regression"),
                *("--dataset", str(chosen.ratings), "--columns", "text=completion"),
                *("--per_device_train_batch_size", "16", "--learning_rate", "2e-4", "--save_steps", "25"),
                *("--save_total_limit", "1", *(["--resume_from_checkpoint", "true"] if again else [])),
                *("--gradient_checkpointing", "false", "--output_dir", str(folder), "--disable_tqdm", "true"),
                *length,
            ],
        )
    return Path(folder)


def prompts_of(chosen: argparse.Namespace) -> list[Path]:
    """The first words of rated texts, for policies to write on from: those to train on, and those held out."""
    lines = chosen.ratings.read_text(encoding="utf-8").splitlines()
    texts = [line.split("\t")[lines[0].split("\t").index("text")].split() for line in lines[1:]]
    begun = list(dict.fromkeys(" ".join(words[:WORDS]) for words in texts if len(words) > 2 * WORDS))[:PROMPTS]
    files = [chosen.work / "prompts.jsonl", chosen.work / "held_out.jsonl"]
    for file, part in zip(files, (begun[:-HELD_OUT], begun[-HELD_OUT:]), strict=True):
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in part), encoding="utf-8")
    return files


def of_a_real_model(chosen: argparse.Namespace, gold: Path) -> list[str]:
    """What both loops have in common: films' reviews that are gone on with."""
    reward = {"num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 2e-4}
    return [
        *("--model_name_or_path", str(chosen.base), "--dtype", "float32"),
        *("--dataset", str(chosen.prompts[0]), "--eval_split", str(chosen.prompts[1])),
        *("--rater", f"reward:{gold}", "--mode", "pairs", "--pick", "random", "--per_prompt", "2"),
        *("--reward", json.dumps(reward), "--max_completion_length", "16", "--learning_rate", "3e-4"),
        *("--per_device_train_batch_size", "16", "--num_mini_batches", "4", "--num_ppo_epochs", "2"),
        *("--score_normalization", "reference", "--value", "head"),
        *("--kl_coef", "0.01", "--save_steps", "16", "--save_total_limit", "1", "--gradient_checkpointing", "false"),
        *("--log_completions", "true", "--num_completions_to_print", "0", "--report_to", "none"),
    ]


def along(work: Path, name: str, seed: int, gold: Callable[[list[tuple[str, str]]], list[float]]) -> list[Point]:
    """(KL, gold score) of every rollout, in order."""
    folder = work / f"{name.replace(' ', '-')}-{seed}"
    points = []
    for number in range(1, len(json.loads((folder / "rounds.json").read_text(encoding="utf-8"))) + 1):
        for file in sorted((Round(folder, number).ppo / "completions").glob("*.parquet")):
            said = pd.read_parquet(file)
            scores = gold(list(zip(said["prompt"], said["completion"], strict=True)))
            points.append((float(said["kl"].mean()), fmean(scores)))
    return points


def gold_score(base: Path, gold: Path) -> Callable[[list[tuple[str, str]]], list[float]]:
    """What the gold model says of (prompt, completion)s."""
    shared = SharedBase.from_pretrained(str(base), value="head", reward=str(gold), dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(base)
    return lambda answers: scores_of(shared, [sequence_ids(tokenizer, *answer) for answer in answers])


def draw(curves: dict[str, list[list[Point]]], picture: Path) -> None:
    """Gold score over KL: a dot a rollout, and a line a seed through means over as many rollouts as a short round."""
    figure, axes = panels(1, 1, figsize=(6, 4))
    [axis] = axes.flat
    for name, runs in curves.items():
        for i, points in enumerate(runs):
            label, style = name if i == 0 else None, ["-", "--", ":"][i % 3]
            axis.plot(*zip(*points, strict=True), color=COLOURS[name], ls="", marker=".", alpha=0.4)
            groups = [points[at : at + ROLLOUTS] for at in range(0, len(points), ROLLOUTS)]
            means = [tuple(fmean(column) for column in zip(*group, strict=True)) for group in groups]
            axis.plot(*zip(*means, strict=True), color=COLOURS[name], label=label, marker="o", ls=style)
    axis.set_xlabel("KL, nats per completion")
    axis.set_ylabel("gold score")
    axis.legend(frameon=False)
    save(figure, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="loops and results")
    parser.add_argument("--seeds", type=int, nargs="+", help="without it 1 2 3, with --real 1 2")
    parser.add_argument("--only", nargs="+", choices=[*EMBEDDED, *REAL])
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--base", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--ratings", type=Path, help="rated texts, .tsv, that the gold reward model learns from")
    parser.add_argument("--gold", type=Path, help="folder of that reward model, where there is one already")
    parser.add_argument("--picture", type=Path, help="without it circle.svg in --work")
    chosen = parser.parse_args()
    chosen.work = chosen.work.resolve()
    chosen.work.mkdir(parents=True, exist_ok=True)
    variants, common = (REAL, []) if chosen.real else (EMBEDDED, [])
    if chosen.real:
        if chosen.base is None or chosen.ratings is None:
            parser.error("--real needs --base and --ratings")
        chosen.prompts = prompts_of(chosen)
        gold = gold_of(chosen, ["--max_steps", "2"] if chosen.quick else ["--num_train_epochs", "1"])
        common = of_a_real_model(chosen, gold)
    seeds = chosen.seeds or ([1, 2] if chosen.real else [1, 2, 3])
    names = [name for name in variants if chosen.only is None or name in chosen.only]
    quick = QUICK if chosen.quick else []
    results = {
        name: [loop(chosen.work, name, seed, [*common, *variants[name], *quick]) for seed in seeds] for name in names
    }
    made = table(results)
    print(made)
    if not chosen.real and not quick and names == list(EMBEDDED):
        before, rest = PAGE.read_text(encoding="utf-8").split(START)
        PAGE.write_text(f"{before}{START}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    if chosen.real:
        score = gold_score(chosen.base, gold)
        curves = {name: [along(chosen.work, name, seed, score) for seed in seeds] for name in names}
        (chosen.work / "curves.json").write_text(json.dumps(curves, indent=1), encoding="utf-8")
        draw(curves, chosen.picture or chosen.work / "circle.svg")


if __name__ == "__main__":
    main()
