"""Settings in, models in: what a recipe begins with."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_ext import demo
from trl_ext._trl import train_in_float32
from trl_ext.generation import GenerationError
from trl_ext.launch.resuming import checkpoint_of
from trl_ext.ppo.building import args_of_gpu
from trl_ext.ppo.checks import check_output_dir, check_trackers
from trl_ext.ppo.failures import RunError
from trl_ext.roles import SharedBase

USER_ERRORS = (
    *(ValueError, TypeError, OSError, ImportError, GenerationError),
    *(yaml.YAMLError, torch.OutOfMemoryError, SafetensorError, RunError),
)


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
    except Exception as error:
        notes = getattr(error, "__notes__", [])  # where a run that failed is saved; lines of code
        if code := [note for note in notes if "\n" in note]:
            print(*code, sep="\n", file=sys.stderr)
            notes = [note for note in notes if note not in code]
        if os.environ.get("TRL_EXT_TRACEBACK") or not (notes or isinstance(error, USER_ERRORS)):
            raise
        name = "" if isinstance(error, USER_ERRORS) else f"{type(error).__name__}: "
        sentence = " ".join(" ".join([f"{name}{error}", *notes]).split())
        sys.exit(f"{Path(sys.argv[0]).name}: error: {sentence}")


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


def free_memory() -> None:
    """Give back what deleted trainers and models held, which refer to themselves and wait for the collector."""
    clear_device_cache(garbage_collection=True)


def match_precision(trainer: Trainer, model_args: ModelConfig) -> None:
    """Over a 4-bit base, train adapters in float32, as PPO does: in bfloat16, as TRL holds them there, small steps are
    rounded away."""
    if model_args.load_in_4bit:
        train_in_float32(trainer.model)


def load_shared_base(model_args: ModelConfig, **roles: Any) -> SharedBase:
    """The base with its roles, as TRL's `ModelConfig` says: precision, quantisation, LoRA; where this process trains.

    Args:
        **roles: further arguments of `SharedBase.from_pretrained`; `policy` defaults to the LoraConfig of `model_args`.
    """
    quantization = get_quantization_config(model_args)
    roles.setdefault("policy", get_peft_config(model_args))
    # No trainer moves what is loaded to be looked at.
    roles = args_of_gpu(PartialState().device) | roles
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
