"""What can be wrong with the input, said in one sentence before anything expensive happens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations

from trl_ext.ppo.config import PPOConfig
from trl_ext.roles import SharedBase
from trl_ext.tokens import check_chat_template


def check_prompts(dataset: Any, name: str) -> None:
    """Refuse what is no dataset of prompts.

    Raises:
        TypeError: not a `datasets.Dataset`.
        ValueError: empty, without a prompt column, or with a prompt that is neither text nor conversation.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"{name} must be a datasets.Dataset with a 'prompt' column, not {type(dataset).__name__}.")
    if "prompt" not in dataset.column_names:
        hint = " (give the prompts themselves: they are tokenised here)" if "input_ids" in dataset.column_names else ""
        raise ValueError(f"{name} has no 'prompt' column, only {dataset.column_names}: rename yours to 'prompt'{hint}.")
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: it needs at least one prompt.")
    for row, prompt in enumerate(dataset["prompt"]):
        if not isinstance(prompt, str) and not _is_chat(prompt):
            raise ValueError(
                f"The prompt in row {row} of {name} is {prompt!r:.80}: a prompt is a text, or a list of messages like "
                '{"role": "user", "content": "..."}.'
            )


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and m.get("role") for m in prompt)


def check_datasets(train_dataset: Any, eval_dataset: Any, args: PPOConfig) -> None:
    """Check both datasets, and that the training one fills a rollout.

    Raises:
        TypeError, ValueError: see `check_prompts`; or too few prompts.
    """
    if train_dataset is None:
        raise ValueError("train_dataset is missing: give a datasets.Dataset with a 'prompt' column.")
    check_prompts(train_dataset, "train_dataset")
    if args.rollout_batch_size % args.num_generations:
        raise ValueError(
            f"num_generations is {args.num_generations}, which does not divide the {args.rollout_batch_size} "
            "completions of a rollout: choose a divisor."
        )
    prompts = args.rollout_batch_size // args.num_generations
    if len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, but one rollout takes {prompts} "
            f"(per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x num_mini_batches {args.num_mini_batches} x {args.world_size} "
            f"processes / num_generations {args.num_generations}): give more prompts or lower one of them."
        )
    if eval_dataset is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy is {args.eval_strategy.value!r}, but there is no eval_dataset: give one.")
    for name, dataset in _eval_datasets(eval_dataset):
        check_prompts(dataset, name)


def check_tokenizer(tokenizer: Any, train_dataset: Dataset, eval_dataset: Any = None) -> PreTrainedTokenizerBase:
    """The tokenizer of these prompts, with a pad token (its EOS where it has none: masks, not ids, mark padding here).

    Raises:
        TypeError: not a tokenizer.
        ValueError: no EOS token; no chat template where the prompts are conversations; or an empty prompt and a
            tokenizer that adds no token of its own.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer, not {type(tokenizer).__name__}.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, so no completion could ever end: set tokenizer.eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for name, dataset in [("train_dataset", train_dataset), *_eval_datasets(eval_dataset)]:
        if not isinstance(dataset[0]["prompt"], str):
            check_chat_template(tokenizer)
        elif not tokenizer("")["input_ids"] and "" in (prompts := list(dataset["prompt"])):
            raise ValueError(
                f"The prompt in row {prompts.index('')} of {name} is empty, and the tokenizer adds no token of its "
                "own: give it some text, or drop the row."
            )
    return tokenizer


def check_scores(functions: list[Any], model: Any, args: PPOConfig) -> None:
    """Refuse to begin where nothing scores, or where weights are not one per reward function (the reward role counts as
    one).

    Raises:
        ValueError: says what is missing, or how many there are.
    """
    if not functions and not (isinstance(model, SharedBase) and model.has_role("reward")):
        raise ValueError(
            "Nothing gives a score: pass reward_funcs, or a SharedBase built with reward=<adapter folder>."
        )
    expected = max(1, len(functions))
    if args.reward_weights is not None and len(args.reward_weights) != expected:
        raise ValueError(
            f"reward_weights has {len(args.reward_weights)} entries for {expected} reward functions: give one each."
        )


def check_texts(ptx_dataset: Any, args: PPOConfig) -> None:
    """Refuse a pretraining term without texts, and texts without one.

    Raises:
        ValueError: says which of the two is missing.
    """
    if bool(args.ptx_coef) != (ptx_dataset is not None):
        raise ValueError(
            f"ptx_coef is {args.ptx_coef} and ptx_dataset is {'missing' if ptx_dataset is None else 'given'}: the "
            "pretraining term needs both."
        )


def check_output_dir(path: str) -> None:
    """Refuse a folder that cannot be written to.

    Raises:
        PermissionError: it, or the nearest folder above it that exists, is not writable.
        NotADirectoryError: it is a file, or lies below one.
    """
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {path!r} is a file: give a folder.")
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"output_dir {path!r} lies below {str(nearest)!r}, which is a file: choose another.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(
            f"output_dir {path!r} cannot be written (no permission on {str(nearest)!r}): choose another."
        )


def check_devices(args: PPOConfig) -> None:
    """Refuse several GPUs in one process.

    Raises:
        ValueError: there are.
    """
    if args.n_gpu > 1:
        raise ValueError(
            "Several GPUs are visible to one process, which would replicate the base: use `accelerate launch`, or "
            "set CUDA_VISIBLE_DEVICES to one of them."
        )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker of `report_to` that is not installed.

    Raises:
        ValueError: one is not.
    """
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise ValueError(
                f"report_to names {name!r}, which is not among the trackers installed here "
                f"({', '.join(installed) or 'none'}): install it, or leave it out."
            )


def as_list(items: Any) -> list[Any]:
    """None as an empty list, one item as a list of one."""
    return list(items) if isinstance(items, (list, tuple)) else [] if items is None else [items]


def _eval_datasets(eval_dataset: Any) -> list[tuple[str, Any]]:
    if isinstance(eval_dataset, dict):
        return [(f"eval_dataset[{key!r}]", dataset) for key, dataset in eval_dataset.items()]
    return [] if eval_dataset is None else [("eval_dataset", eval_dataset)]
