"""Settings in, data in, models in: what a recipe begins with."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file
from trl import ModelConfig, TrlParser, extract_prompt, get_peft_config, get_quantization_config

from trl_ext import demo, feedback
from trl_ext._trl import train_in_float32
from trl_ext.launch.resuming import checkpoint_of
from trl_ext.roles import SharedBase
from trl_ext.trainers.checks import check_output_dir, check_trackers

USER_ERRORS = (ValueError, TypeError, OSError, ImportError, yaml.YAMLError, torch.OutOfMemoryError, SafetensorError)
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
    """Settings of a recipe: the YAML file beside `script`, or the one after --config, then the command line.
    `--resume_from_checkpoint true` becomes the last checkpoint's folder.

    Raises:
        FileExistsError: output_dir holds a run already, which is not gone on with.
        FileNotFoundError: there is no checkpoint to go on from.
        ValueError: report_to names a tracker that is not installed.
    """
    arguments = sys.argv[1:]
    if "--config" not in arguments:
        arguments = ["--config", str(Path(script).with_suffix(".yaml")), *arguments]
    parsed: tuple[Any, ...] = TrlParser(types, allow_abbrev=False).parse_args_and_config(arguments)
    for part in parsed:
        if isinstance(part, TrainingArguments):
            if part.process_index == 0:
                check_output_dir(str(part.output_dir))
            part.resume_from_checkpoint = checkpoint_of(part)
            check_trackers(part.report_to)
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
    except USER_ERRORS as error:
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


CONVERTERS: dict[str, Callable[[feedback.Feedback], Dataset]] = {
    "pairwise": feedback.to_preference,
    "probe": feedback.to_preference,
    "regression": feedback.to_ratings,
    "binary": feedback.to_unpaired,
    "ranking": feedback.to_rankings,
    "all_pairs": feedback.to_rankings,
}


@dataclass(frozen=True)
class RewardData:
    """Rows for a reward model.

    Attributes:
        train, test: in the columns of the objective.
        judged: the held-out feedback as people gave it: ratings where there are some, else as `test`.
        pairs: held-out preference pairs, whatever the form; `judged` where no pair can be made of it.
    """

    train: Dataset
    test: Dataset
    judged: Dataset
    pairs: Dataset


def load_feedback(data: DataArguments, objective: str) -> RewardData:
    """Feedback of any form, in the columns of `objective`, split by prompt. The demo's pairs are its own for
    "pairwise"; its other rows come from its ratings.

    Raises:
        FeedbackError: a record that cannot be used, with its line and column; and what `load_rows` raises.
    """
    if objective == "pairwise" and _holds_pairs(data):
        train, test = load_pairs(data)
        return RewardData(train, test, test, test)
    if data.dataset == "demo":
        kept, held_out = (feedback.read(demo.load("ratings", split), "ratings") for split in ("train", "test"))
        pairs = load_pairs(data)[1]
    else:
        kept, held_out = _split_feedback(data)
        pairs = None
    convert = CONVERTERS[objective]
    test = convert(held_out)
    judged = feedback.to_ratings(held_out) if held_out.form == "ratings" else test
    if pairs is None:
        try:
            pairs = feedback.to_preference(held_out, pairs_per_answer=10)
        except feedback.FeedbackError:  # no two answers to one prompt: answers are judged as they are
            pairs = judged
    return RewardData(convert(kept), test, judged, pairs)


def _holds_pairs(data: DataArguments) -> bool:
    if data.dataset == "demo":
        return True
    return Path(data.dataset).suffix != ".tsv" and "chosen" in _read(data.dataset, data.train_split).column_names


def _split_feedback(data: DataArguments) -> tuple[feedback.Feedback, feedback.Feedback]:
    is_file = Path(data.dataset).suffix in (*READERS, ".tsv")
    given = feedback.read(data.dataset if is_file else load_dataset(data.dataset, split=data.train_split))
    if len(given.records) <= data.eval_rows:
        raise ValueError(
            f"The dataset {data.dataset!r} has {len(given.records)} records, and eval_rows={data.eval_rows} of them "
            "are held out: give more records or lower eval_rows."
        )
    return feedback.split_by_prompt(given, data.eval_rows / len(given.records))


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
    except (StopIteration, DatasetsError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split()) or "it holds no rows"
        raise ValueError(f"The dataset file {dataset!r} cannot be read: {reason:.200}") from error


def model_name(model_args: ModelConfig) -> str:
    """The model's name or folder; "demo" stands for the embedded model, which is built where needed.

    Raises:
        ValueError: none is given.
        OSError: there is none of that name.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing: give a model's name or folder, or 'demo'.")
    if name == "demo":
        return demo.model_path()
    try:
        cached_file(name, CONFIG_NAME, revision=model_args.model_revision)
    except OSError as error:
        raise OSError(f"The model {name!r} cannot be loaded: {error}") from error
    return str(name)


def model_kwargs(model_args: ModelConfig) -> dict[str, Any]:
    """`model_init_kwargs` for TRL's own trainers, so that they load the base as `load_shared_base` does."""
    return {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
    }


def match_precision(trainer: Any, model_args: ModelConfig) -> None:
    """Over a 4-bit base that computes in float32, train in float32 too: see `train_in_float32`."""
    if model_args.load_in_4bit and model_args.dtype == "float32":
        train_in_float32(trainer.model)


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
