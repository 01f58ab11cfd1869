"""The exact exam: greedy answers to every question, each right or wrong, nothing between."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trl_ext.demo.grading import grade
from trl_ext.demo.model import MAX_NEW_TOKENS
from trl_ext.demo.store import load


@dataclass(frozen=True)
class ExamResult:
    """Questions right and asked, counted for countries that the feedback covers and, apart, for those it does not."""

    covered_right: int
    covered_asked: int
    uncovered_right: int
    uncovered_asked: int

    @property
    def covered(self) -> float:
        """Share of right answers, 0 to 1, on covered countries (in phrasings that the feedback never used)."""
        return self.covered_right / self.covered_asked

    @property
    def uncovered(self) -> float:
        """Share of right answers, 0 to 1, on countries without feedback."""
        return self.uncovered_right / self.uncovered_asked

    def __str__(self) -> str:
        return (
            f"exam: {self.covered:.1%} right ({self.covered_right}/{self.covered_asked}); "
            f"countries without feedback, apart: {self.uncovered:.1%} ({self.uncovered_right}/{self.uncovered_asked})"
        )


def run_exam(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64, cache_dir: str | Path | None = None
) -> ExamResult:
    """Let ``model`` (anything with Transformers' ``generate``) sit the exam with greedy answers.

    ``batch_size`` is in questions. The model's train or eval modes and the tokenizer are left as they were.
    """
    rows = load("exam", cache_dir=cache_dir).to_list()
    answers = answer_greedily(model, tokenizer, [row["prompt"] for row in rows], batch_size)
    right = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for row, answer in zip(rows, answers, strict=True):
        total[row["covered"]] += 1
        right[row["covered"]] += grade(answer, row["capital"])
    return ExamResult(right[True], total[True], right[False], total[False])


def answer_greedily(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[dict[str, str]]], batch_size: int = 64
) -> list[str]:
    """The greedy completion of each conversation, as text without special tokens."""
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    answers: list[str] = []
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                texts[start : start + batch_size],
                padding=True,
                padding_side="left",  # for this call only: the tokenizer keeps its own side
                add_special_tokens=False,
                return_tensors="pt",
            ).to(getattr(model, "device", "cpu"))
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            completions = output[:, batch["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(completions, skip_special_tokens=True)
    return answers


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Eval mode inside; on exit each module is back in its own mode, for a model need not be all train or all eval."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, torch.nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
