"""What the recipes share: settings in, data in, a plan on the screen, answers before and after."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, TrlParser, extract_prompt, get_peft_config, get_quantization_config

from trl_ext import demo
from trl_ext.core import masked_sum
from trl_ext.generation import generate
from trl_ext.roles import SharedBase

READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where a recipe's rows come from."""

    dataset: str = field(
        default="demo", metadata={"help": "'demo', a .jsonl, .json, .csv or .parquet file, or a dataset on the Hub."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; None: eval_rows of the other."}
    )
    eval_rows: int = field(default=32, metadata={"help": "Rows held out for evaluation where there is no eval_split."})


def parse(script: str, *types: Any) -> tuple[Any, ...]:
    """Settings of a recipe: the YAML file beside `script`, or the one after --config, then the command line."""
    arguments = sys.argv[1:]
    if "--config" not in arguments:
        arguments = ["--config", str(Path(script).with_suffix(".yaml")), *arguments]
    parsed: tuple[Any, ...] = TrlParser(types, allow_abbrev=False).parse_args_and_config(arguments)
    return parsed


@contextmanager
def user_errors() -> Iterator[None]:
    """Say what is wrong with the input in one sentence and exit with status 1, or with 130 after Ctrl-C.
    TRL_EXT_TRACEBACK=1 shows where."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("TRL_EXT_TRACEBACK"):
            raise
        sentence = " ".join(str(error).split())
        sys.exit(f"{Path(sys.argv[0]).name}: error: {sentence}")


def load_pairs(data: DataArguments) -> tuple[Dataset, Dataset]:
    """Preference pairs to train and to evaluate on, in TRL's columns prompt, chosen and rejected (and margin).

    Raises:
        ValueError: a column is missing; and what `load_rows` raises.
    """
    both = load_rows(data, "pairs")
    for rows in both:
        missing = [column for column in ("chosen", "rejected") if column not in rows.column_names]
        if missing:
            raise ValueError(
                f"The dataset {data.dataset!r} has no {' and no '.join(map(repr, missing))} column, only "
                f"{rows.column_names}: give preference pairs."
            )
    train, test = (rows if "prompt" in rows.column_names else rows.map(extract_prompt) for rows in both)
    columns = [column for column in ("prompt", "chosen", "rejected", "margin") if column in train.column_names]
    return train.select_columns(columns), test.select_columns(columns)


def load_rows(data: DataArguments, name: str) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows to evaluate on.

    Args:
        data: where they are.
        name: which of the demo's data sets is meant: "prompts" or "pairs".

    Raises:
        FileNotFoundError, ValueError: there is no such file or split, or too few rows.
    """
    if data.dataset == "demo":
        return demo.load(name, "train"), demo.load(name, "test")
    rows = _read(data.dataset, data.train_split)
    if data.eval_split is not None and Path(data.dataset).suffix not in READERS:
        return rows, _read(data.dataset, data.eval_split)
    if len(rows) <= data.eval_rows:
        raise ValueError(
            f"The dataset {data.dataset!r} has {len(rows)} rows, and eval_rows={data.eval_rows} of them are held out: "
            "give more rows or lower eval_rows."
        )
    split = rows.train_test_split(test_size=data.eval_rows, seed=0)
    return split["train"], split["test"]


def load_texts(dataset: str) -> Dataset:
    """Rows of a file or a dataset on the Hub, split "train".

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it cannot be read.
    """
    return _read(dataset, "train")


def _read(dataset: str, split: str) -> Dataset:
    suffix = Path(dataset).suffix
    if suffix not in READERS:
        return load_dataset(dataset, split=split)
    if not Path(dataset).is_file():
        raise FileNotFoundError(f"The dataset file {dataset!r} does not exist.")
    try:
        return load_dataset(READERS[suffix], data_files=dataset, split="train")
    except (StopIteration, DatasetsError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or "it holds no rows"
        raise ValueError(f"The dataset file {dataset!r} cannot be read: {reason:.200}") from error


def model_name(model_args: ModelConfig) -> str:
    """The model's name or folder; "demo" stands for the embedded model, which is built where needed."""
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing: give a model's name or folder, or 'demo'.")
    return demo.model_path() if name == "demo" else str(name)


def model_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """`model_init_kwargs` for TRL's own trainers, so that they load the base as `load_shared_base` does."""
    return {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }


def in_bfloat16(args: TrainingArguments) -> TrainingArguments:
    """The same settings with bfloat16 autocast, also on a CPU."""
    return replace(args, bf16=True, use_cpu=args.use_cpu or not torch.accelerator.is_available())


def load_shared_base(model_args: ModelConfig, **roles: Any) -> SharedBase:
    """The base with its roles, as TRL's `ModelConfig` says: precision, quantisation, LoRA.

    Args:
        **roles: further arguments of `SharedBase.from_pretrained`; `policy` defaults to the LoraConfig of `model_args`.
    """
    quantization = get_quantization_config(model_args)
    roles.setdefault("policy", get_peft_config(model_args))
    return SharedBase.from_pretrained(
        model_name(model_args),
        quantization_config=quantization,
        dtype=model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype),
        revision=model_args.model_revision,
        attn_implementation=model_args.attn_implementation,
        **roles,
    )


def import_functions(paths: Sequence[str]) -> list[Any]:
    """Reward functions by dotted path, like `trl_ext.rewards.sentiment.vader_sentiment`; other names stay as they are
    (model names and folders).

    Raises:
        ImportError: the module or the function does not exist.
    """
    sys.path.insert(0, os.getcwd())
    try:
        return [_import(path) if "." in path and "/" not in path else path for path in paths]
    finally:
        sys.path.pop(0)


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"The reward function {path!r} cannot be imported ({error}): check the dotted path."
        ) from error


def show(title: str, rows: dict[str, Any]) -> None:
    """Print names and values as a small table, on the main process."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    _print(table)


def report(title: str, rows: dict[str, Any], output_dir: str) -> None:
    """Print a run's outcome, and keep it as result.json in its folder."""
    show(title, rows)
    if PartialState().is_main_process:
        text = json.dumps({name: str(value) for name, value in rows.items()}, indent=2, ensure_ascii=False)
        Path(output_dir, "result.json").write_text(text + "\n", encoding="utf-8")


def megabytes(base: SharedBase) -> str:
    """The base's memory by role, in MiB."""
    return ", ".join(f"{part} {size / 2**20:.2f}" for part, size in base.memory().items()) + " MiB"


def answers(
    base: SharedBase, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], max_new_tokens: int
) -> list[str]:
    """The policy's greedy answers."""
    rollout = generate(base, prompts, tokenizer, _config(tokenizer, max_new_tokens, do_sample=False), len(prompts))
    return [_text(item) for item in rollout.completions]


def show_before_after(prompts: Sequence[Any], before: Sequence[str], after: Sequence[str]) -> None:
    """Print the same prompts' answers before and after training."""
    table = Table(title="Before and after (greedy answers)", show_lines=True, title_justify="left")
    for column in ("Prompt", "Before", "After"):
        table.add_column(column)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        table.add_row(Text(_text(prompt)), Text(old), Text(new))
    _print(table)


@torch.no_grad()
def show_scored_pairs(base: SharedBase, tokenizer: PreTrainedTokenizerBase, pairs: Dataset) -> None:
    """Print some preference pairs with the scores that the reward role gives them."""
    table = Table(title="What the reward model makes of held-out pairs", show_lines=True, title_justify="left")
    for column in ("Prompt", "Chosen", "Score", "Rejected", "Score"):
        table.add_column(column, justify="right" if column == "Score" else "left")
    for pair in pairs:
        row = [Text(_text(pair["prompt"]))]
        for side in ("chosen", "rejected"):
            ids = _ids(tokenizer, pair["prompt"], pair[side]).to(base.device)
            row += [Text(_text(pair[side])), Text(f"{float(base.scores(ids, torch.ones_like(ids))):.2f}")]
        table.add_row(*row)
    _print(table)


def distinct_prompts(pairs: Dataset) -> list[Any]:
    """The prompts of `pairs`, each once, in their order."""
    return list({_text(prompt): prompt for prompt in pairs["prompt"]}.values())


@torch.no_grad()
def kl_to_reference(
    base: SharedBase, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], max_new_tokens: int, seed: int = 0
) -> float:
    """Mean over sampled answers of log p_policy - log p_reference, nats an answer (k1, temperature 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rollout = generate(base, prompts, tokenizer, _config(tokenizer, max_new_tokens, do_sample=True), len(prompts))
    rollout = rollout.to(base.device)
    said = base(
        rollout.input_ids, rollout.attention_mask, rollout.completion_ids.shape[1], roles=("policy", "reference")
    )
    return float(masked_sum(said["logprobs"] - said["ref_logprobs"], rollout.completion_mask, dim=1).mean())


def _config(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, do_sample: bool) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        top_k=0 if do_sample else None,
        use_cache=True,
    )


def _text(item: Any) -> str:
    return item if isinstance(item, str) else str(item[-1]["content"])


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any) -> torch.Tensor:
    if isinstance(prompt, str):
        return tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    return tokenizer.apply_chat_template(prompt + answer, tokenize=True, return_dict=True, return_tensors="pt")[
        "input_ids"
    ]


def _print(table: Table) -> None:
    if PartialState().is_main_process:
        Console().print(table)
