"""A plan on the screen, answers before and after, the outcome: what a recipe shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl import RewardConfig

from trl_ext import hub
from trl_ext.core import masked_sum
from trl_ext.diagnostics import read_run, write_report
from trl_ext.generation import TransformersGenerator, generate
from trl_ext.launch.data import DataArguments
from trl_ext.ppo import PPOConfig
from trl_ext.reward_models.rows import answer_ids
from trl_ext.roles import SharedBase, adapters
from trl_ext.tokens import eos_ids
from trl_ext.types import Rollout, as_text


def show(title: str, rows: dict[str, Any]) -> None:
    """Print names and values as a small table, on the main process."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    _print(table)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below the names of their columns, on the main process; numbers to the right."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    _print(table)


def report(title: str, rows: dict[str, Any], args: Any, data: DataArguments, members: Sequence[Any] = ()) -> None:
    """Write report.html and the model card with its outcome into a run's folder, and result.json; print the outcome.

    Args:
        args: of the trainer.
        data: of the recipe.
        members: the trainers' settings where there were several, each of which gets a report and a card of its own.
    """
    if PartialState().is_main_process:
        reports = ", ".join(_written(run, data, rows) for run in members or [args])
        rows = rows | {"saved in": args.output_dir, "report": f"{reports} (open it in a browser)"}
        text = json.dumps({name: str(value) for name, value in rows.items()}, indent=2, ensure_ascii=False)
        Path(args.output_dir, "result.json").write_text(text + "\n", encoding="utf-8")
    show(title, rows)


def _written(args: Any, data: DataArguments, rows: dict[str, Any]) -> str:
    """The report of one run, written beside its card."""
    folder = Path(args.output_dir)
    kind = "ppo" if isinstance(args, PPOConfig) else "reward" if isinstance(args, RewardConfig) else "dpo"
    base = adapters.read_config(folder)["base_model_name_or_path"]
    hub.write_card(folder, kind, read_run(folder), base, args, datasets=data.on_hub, results=rows)
    if args.push_to_hub:
        hub.push_card(folder, args)
    return str(write_report([folder]))


def megabytes(base: SharedBase) -> str:
    """The base's memory by role, in MiB."""
    return ", ".join(f"{part} {size / 2**20:.2f}" for part, size in base.memory().items()) + " MiB"


def answers(base: SharedBase, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], **how: Any) -> list[str]:
    """The policy's greedy answers; `how` as in `answered`."""
    rollout = answered(base, tokenizer, prompts, do_sample=False, **how)
    return [as_text(item) for item in rollout.completions]


def show_before_after(prompts: Sequence[Any], before: Sequence[str], after: Sequence[str]) -> None:
    """Print the same prompts' answers before and after training."""
    table = Table(title="Before and after (greedy answers)", show_lines=True, title_justify="left")
    for column in ("Prompt", "Before", "After"):
        table.add_column(column)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        table.add_row(Text(as_text(prompt)), Text(old), Text(new))
    _print(table)


@torch.no_grad()
def show_scored_pairs(base: SharedBase, tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> None:
    """Print some preference pairs with the scores that the reward role gives them; nothing where there are none."""
    if "chosen" not in pairs.column_names:
        return
    table = Table(title="What the reward model makes of held-out pairs", show_lines=True, title_justify="left")
    for column in ("Prompt", "Chosen", "Score", "Rejected", "Score"):
        table.add_column(column, justify="right" if column == "Score" else "left")
    for pair in pairs:
        row = [Text(as_text(pair["prompt"]))]
        for side in ("chosen", "rejected"):
            ids = torch.tensor([answer_ids(tokenizer, pair, pair[side])], device=base.device)
            score = float(base.scores(ids, torch.ones_like(ids)))
            row += [Text(as_text(pair[side])), Text(f"{score:.2f}")]
        table.add_row(*row)
    _print(table)


def before_and_after(evaluations: Sequence[dict[str, float]], name: str) -> str:
    """One figure of the evaluations before and after a run."""
    return " before, ".join(f"{measured[name]:.3f}" for measured in evaluations) + " after"


def distinct_prompts(pairs: Dataset) -> list[Any]:
    """The prompts of `pairs`, each once, in their order."""
    return list({as_text(prompt): prompt for prompt in pairs["prompt"]}.values())


@torch.no_grad()
def kl_to_reference(
    base: SharedBase, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], batch_size: int = 8, **how: Any
) -> float:
    """Mean over sampled answers of log p_policy - log p_reference, nats per completion (k1, temperature 1); `how` as in
    `answered`."""
    rollout = answered(base, tokenizer, prompts, batch_size=batch_size, **how)
    total = 0.0
    for rows in torch.arange(len(prompts)).split(batch_size):
        part = rollout.rows(rows).to(base.device)
        width = part.completion_ids.shape[1]
        outputs = base(part.input_ids, part.attention_mask, width, roles=("policy", "reference"))
        total += float(masked_sum(outputs["logprobs"] - outputs["ref_logprobs"], part.completion_mask))
    return total / len(prompts)


def answered(
    base: SharedBase,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    max_new_tokens: int,
    batch_size: int = 8,
    chat_template_kwargs: dict[str, Any] | None = None,
    do_sample: bool = True,
) -> Rollout:
    """The policy's answers, sampled at temperature 1 from all tokens (always with the same random numbers) or greedy;
    `batch_size` of them at a time."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=eos_ids(base.causal_lm, tokenizer),
        top_k=0 if do_sample else None,
        use_cache=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return generate(TransformersGenerator(base, batch_size), prompts, tokenizer, config, chat_template_kwargs)


def _print(table: Table) -> None:
    if PartialState().is_main_process:
        Console().print(table)
