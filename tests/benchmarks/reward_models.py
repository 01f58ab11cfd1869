"""Reward models from real ratings: every objective beside two baselines, at several amounts of data.

python tests/benchmarks/reward_models.py --model smollm2/ --ratings movie_ratings.tsv     # hours; then --table

Needs `pip install -e ".[sentiment,feedback,benchmarks]"`. The file has a text a line with its raters' numbers (columns
text and ratings). Sentences are split, never their raters. Each cell trains on the first so many sentences of one fixed
order and is judged on the same held-out ones; its figures are written to the folder at once, and a cell that is there
already is not trained again, so that several processes, each with its --objectives, can share the work.
"""

import argparse
import json
import random
import re
import statistics
import time
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from trl_ext import FeedbackRewardConfig, FeedbackRewardTrainer, SharedBase, feedback
from trl_ext.feedback import Feedback, ScoredAnswer, judge
from trl_ext.launch import reference_scores, scored_answers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes" / "reward.md"
START, END = "<!-- real ratings: begin -->", "<!-- real ratings: end -->"
HELD_OUT = 1_000
SENTENCES = 16  # a step
# Times that every sentence is read: with few of them, more often.
PASSES = {200: 4, 1_000: 2, 6_000: 1}
LORA = ("pairwise", "regression", "binary", "ranking", "all_pairs")
OBJECTIVES = (*LORA, "probe")
BASELINES = ("VADER lexicon", "bag of words, ridge")


def training_rows(train: Feedback, objective: str) -> tuple[Dataset, int, float]:
    """(rows, rows a step, passes over them for one over the sentences)."""
    if objective == "pairwise":
        return feedback.to_preference(train, pairs_per_answer=2), SENTENCES // 2, 0.5
    if objective == "probe":
        return feedback.to_preference(train, pairs_per_answer=10), 16, 1.0
    if objective in ("ranking", "all_pairs"):
        return feedback.to_rankings(train, size=4), SENTENCES // 4, 1.0
    convert = feedback.to_unpaired if objective == "binary" else feedback.to_ratings
    return convert(train), SENTENCES, 1.0


def trained(
    args: argparse.Namespace, train: Feedback, test: Feedback, objective: str, folder: Path
) -> list[ScoredAnswer]:
    """Train one reward model; its scores of the held-out sentences."""
    rows, batch, share = training_rows(train, objective)
    config = FeedbackRewardConfig(
        str(folder),
        objective=objective,
        num_train_epochs=PASSES.get(len(train.records), 1) * share,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        train_sampling_strategy="group_by_length",
        learning_rate=args.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=10,
        max_length=128,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=args.cpu,
        seed=args.seed,
        model_init_kwargs={"dtype": "float32"},
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = FeedbackRewardTrainer(args.model, config, rows, peft_config=lora)
    trainer.train()
    trainer.save_model()
    base = SharedBase.from_pretrained(args.model, policy=None, value="head", reward=str(folder), dtype="float32")
    return scored_answers(base, trainer.processing_class, feedback.to_ratings(test))


def baseline(name: str, train: Feedback, test: Feedback) -> list[ScoredAnswer]:
    """A lexicon, which learns nothing; or ridge regression on counts of words and word pairs."""
    texts = [record.completion for record in test.records]
    if name == "VADER lexicon":
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyzer = SentimentIntensityAnalyzer()
        scores = [analyzer.polarity_scores(text)["compound"] for text in texts]
    else:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline

        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), RidgeCV((0.1, 0.3, 1, 3, 10)))
        model.fit([record.completion for record in train.records], [record.mean for record in train.records])
        scores = model.predict(texts)
    worth = [record.mean for record in test.records]
    return [ScoredAnswer("", w, float(s), len(t)) for w, s, t in zip(worth, scores, texts, strict=True)]


def one_point_apart(answers: list[ScoredAnswer]) -> float:
    """Share of the pairs at least one rating point apart that the scores order as people do."""
    right = total = 0.0
    for i, a in enumerate(answers):
        for b in answers[i + 1 :]:
            if abs(a.worth - b.worth) >= 1:
                gap = (a.worth - b.worth) * (a.score - b.score)
                right += 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
                total += 1
    return right / total


def split(ratings: Path) -> tuple[list, list]:
    """Sentences to train on, in one fixed order, and the held-out ones."""
    given = feedback.read(ratings, columns={"text": "completion"})
    rest, test = feedback.split_by_prompt(given, HELD_OUT / len(given.records))
    random.Random(0).shuffle(rest.records)
    return rest.records, test.records


def run(args: argparse.Namespace) -> None:
    """Every cell that is not there yet."""
    sentences, held_out = split(args.ratings)
    test = Feedback("ratings", held_out, "held out")
    for size in args.sizes:
        train = Feedback("ratings", sentences[:size], f"first {size}")
        for name in args.objectives:
            folder = args.out / f"{re.sub(r'[^a-z]+', '_', name.lower())}-{size}-{args.seed}"
            if (folder / "cell.json").is_file():
                continue
            started = time.perf_counter()
            answers = baseline(name, train, test) if name in BASELINES else trained(args, train, test, name, folder)
            figures = judge(answers)
            feedback.save_judgement(figures, folder, answers)
            cell = {"objective": name, "size": size, "seconds": time.perf_counter() - started}
            cell["apart"] = one_point_apart(answers)
            (folder / "cell.json").write_text(json.dumps(cell), encoding="utf-8")
            print(cell, f"Spearman {figures.spearman:.3f}", flush=True)


def centre(args: argparse.Namespace, held_out: list) -> None:
    """Beside each reward model's scores those of what the base says when it goes on from the held-out sentences' first
    words."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [" ".join(record.completion.split()[:6]) for record in held_out[:64]]
    for path in sorted(args.out.glob("*/judgement.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if figures.get("reference_mean") is not None or not (path.parent / "adapter_config.json").is_file():
            continue
        base = SharedBase.from_pretrained(
            args.model, policy=None, value="head", reward=str(path.parent), dtype="float32"
        )
        scores = reference_scores(base, tokenizer, prompts, 24, len(prompts))
        figures |= {"reference_mean": statistics.fmean(scores), "reference_std": statistics.pstdev(scores)}
        figures["centred_mean"] = figures["mean"] - figures["reference_mean"]
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def table(out: Path) -> str:
    """All cells as Markdown, in the order of the objectives, more data to the right."""
    cells: dict[tuple[str, int], dict] = {}
    for path in out.glob("*/cell.json"):
        cell = json.loads(path.read_text(encoding="utf-8"))
        figures = json.loads((path.parent / "judgement.json").read_text(encoding="utf-8"))
        cells[cell["objective"], cell["size"]] = cell | figures
    sizes = sorted({size for _, size in cells})
    lines = [
        "| | " + " | ".join(f"{size:,} sentences" for size in sizes) + " | of the most: ECE | length | centred mean |",
        "|---" * (len(sizes) + 4) + "|",
    ]
    for name in (*BASELINES, *OBJECTIVES):
        found = [cells.get((name, size)) for size in sizes]
        if not any(found):
            continue
        most = [cell for cell in found if cell][-1]
        columns = [f"{cell['spearman']:.3f}, {cell['apart']:.1%}" if cell else "not measured" for cell in found]
        centred = most.get("centred_mean")
        shown = f"{centred / most['reference_std']:+.2f}" if centred is not None else ""
        rest = [f"{most['expected_calibration_error']:.3f}", f"{most['length_correlation']:+.2f}", shown]
        lines.append(f"| {name if name in BASELINES else f'`{name}`'} | " + " | ".join([*columns, *rest]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name or folder")
    parser.add_argument("--ratings", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 1_000, 6_000])
    parser.add_argument("--objectives", nargs="+", default=[*BASELINES, *OBJECTIVES])
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/reward_models"))
    parser.add_argument("--table", action="store_true", help="write what there is into the docs, and train nothing")
    args = parser.parse_args()
    if not args.table:
        run(args)
        return
    centre(args, split(args.ratings)[1])
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    page = f"{before}{START}\n{table(args.out)}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
