"""Settings in, models in: what a recipe begins with."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
import trl
import yaml
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments
from transformers.utils import CONFIG_NAME, cached_file
from trl import ModelConfig, RewardConfig, TrlParser, get_peft_config, get_quantization_config

from trl_ext import demo, runs
from trl_ext._trl import train_in_float32
from trl_ext.generation import GenerationError
from trl_ext.hub import PickledWithoutSecrets, check_push
from trl_ext.launch.precedence import LORA, given_on, read_config, settled, split_config
from trl_ext.launch.resuming import checkpoint_of
from trl_ext.ppo.building import args_of_gpu
from trl_ext.ppo.checks import check_output_dir, check_trackers
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.failures import RunError
from trl_ext.ppo.yesterday import SETTINGS, today
from trl_ext.roles import SharedBase
from trl_ext.roles.adapters import Named, check_folder, named
from trl_ext.roles.assembly import load_causal_lm

USER_ERRORS = (
    *(ValueError, TypeError, OSError, ImportError, GenerationError),
    *(yaml.YAMLError, torch.OutOfMemoryError, SafetensorError, RunError, runs.MainFailed),
)


PACKAGE = Path(__file__).parents[1]
# What every recipe does unless it is told otherwise, whatever the model.
DEFAULTS = {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"], "report_to": "none"}
_claims: list[Any] = []  # on output_dir, until the process ends
DEMO = {"model_name_or_path": "demo", "dataset": "demo"}


class DPOConfig(PickledWithoutSecrets, trl.DPOConfig):
    """TRL's; the Hub's token is not pickled with it into training_args.bin, which is pushed."""


def parse(script: str, *types: Any) -> tuple[Any, ...]:
    """Settings of a recipe: the command line, then the file after --config, then the recipe's defaults, as
    `precedence` says. The YAML file beside `script` has the settings of the demo: it is read where model and data are
    the demo's. `--resume_from_checkpoint true` becomes the last checkpoint's folder.

    Raises:
        FileExistsError: output_dir holds a run already, which is not gone on with.
        FileNotFoundError: there is no checkpoint to go on from.
        ValueError: settings contradict each other, report_to names a tracker that is not installed, push_to_hub is set
            and nothing could be pushed, another run writes into output_dir, or processes do not know each other.
    """
    path, arguments = split_config(sys.argv[1:])
    given = given_on(arguments, types)
    levels = [("The command line", given)]
    defaults = DEFAULTS | {"output_dir": f"runs/{Path(script).stem}"}
    if path is not None:
        levels.append((f"Config file {path}", read_config(path)))
    elif all(given.get(name, value) == value for name, value in DEMO.items()):
        defaults |= read_config(Path(script).with_suffix(".yaml"))
    else:
        defaults |= {"model_name_or_path": "demo"}
    for level in (defaults, *(level for _, level in levels)):  # before anybody asks for GPUs: they may be named there
        os.environ.update({name: str(value) for name, value in (level.get("env") or {}).items()})
    in_half = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if not in_half:
        defaults = {"bf16": False} | defaults
    check_names(arguments, levels, types)
    settings = settled([*levels, ("The recipe", defaults)])
    if in_half and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        settings.setdefault("dtype", "bfloat16")  # of ModelConfig it is float32, in which the bits would be computed
    new_policy = not check_adapter(settings, levels)
    check_precision(settings, levels)
    # An adapter that goes on has its own shape, which would contradict the model's name in a file.
    left_out = ("env", *(() if new_policy else LORA))
    recorded = {name: value for name, value in runs.without_secrets(settings).items() if name not in left_out}
    settings.pop("env", None)
    parser = TrlParser(types, allow_abbrev=False)
    for name in lists_among(types):  # one value in the file stands for a list of it, as it does on the command line
        if isinstance(value := settings.get(name), str):
            settings[name] = [value]
    if unknown := parser.set_defaults_with_config(**settings):
        raise ValueError(f"Unknown arguments from config file: {unknown[::2]}. Remove them, or mend their names.")
    parsed: tuple[Any, ...] = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    ensemble = max(getattr(part, "ensemble", 1) for part in parsed)
    for part in parsed:
        if isinstance(part, ModelConfig) and not part.use_peft:
            raise ValueError("use_peft is false, but the recipes train LoRA adapters over a frozen base: leave it out.")
        if getattr(part, "model_init_kwargs", None):
            raise ValueError(
                "model_init_kwargs is given, but a recipe loads its base for several roles, as dtype, model_revision, "
                "attn_implementation and load_in_4bit say: set these instead."
            )
        if isinstance(part, TrainingArguments):
            runs.on_main(partial(check_output_dir, str(part.output_dir)))
            _claims.append(runs.claimed_by(part))
            part.resume_from_checkpoint = checkpoint_of(part, ensemble)
            # For run.json: from it `trl-ext doctor --try` makes the trainer anew.
            name = Path(script).stem
            if Path(script).resolve() == recipe_file(name):  # not a script of one's own, perhaps of the same name
                part.recipe = {"name": name, "folder": os.getcwd(), "settings": recorded}
            check_trackers(part.report_to)
            check_push(part)
    return parsed


def recipe_file(name: str) -> Path:
    """Where the recipe of this name is, or would be. A wheel has them inside the package, a clone beside it."""
    folder = next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if path.is_dir())
    return folder / f"{name}.py"


def check_names(arguments: Sequence[str], levels: Sequence[tuple[str, dict[str, Any]]], types: Sequence[Any]) -> None:
    """Refuse the names that TRL's trainers had or have for settings of PPO.

    Raises:
        ValueError: says today's name.
    """
    if PPOConfig not in types:
        return
    known = {part.name for kind in types for part in fields(kind)}
    words = [word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    for name in [*words, *(name for _, level in levels for name in level)]:
        if name in SETTINGS and name not in known:
            raise ValueError(today("PPOConfig", name, SETTINGS))


def lists_among(types: Sequence[Any]) -> set[str]:
    """Names of the settings that are lists, and never texts."""
    found = set()
    for kind in types:
        for name, hint in get_type_hints(kind).items():
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if str not in parts and any(get_origin(part) is list for part in parts):
                found.add(name)
    return found


def check_adapter(settings: dict[str, Any], levels: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    """Refuse a new policy where the model that is named is an adapter, which is the policy.

    Returns:
        Whether it is one.

    Raises:
        ValueError: another adapter, or a LoRA's shape, is asked for.
    """
    name = settings.get("model_name_or_path")
    if name in (None, "demo") or (model := named(name, settings.get("model_revision"))).adapter is None:
        return False
    depth = next(i for i, (_, level) in enumerate(levels) if "model_name_or_path" in level)
    asked = [field for _, level in levels[: depth + 1] for field in (*LORA, "policy_adapter") if level.get(field)]
    if asked or settings.get("policy_adapter"):
        raise ValueError(
            f"model_name_or_path {name!r} is an adapter over {model.base!r}, which is trained further as it is: leave "
            f"{(asked or ['policy_adapter'])[0]} out, or give {model.base!r} as model_name_or_path."
        )
    return True


def check_precision(settings: dict[str, Any], levels: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Refuse a precision other than that of `accelerate launch`, which Transformers would take in silence.

    Raises:
        ValueError: the user says both.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("bf16", "fp16") or not any("bf16" in level or "fp16" in level for _, level in levels):
        return
    wanted = next((kind for kind in ("bf16", "fp16") if settings.get(kind)), "no")
    if wanted != launched:
        raise ValueError(
            f"accelerate launch says mixed_precision {launched}, and the settings say {wanted!r} (bf16 "
            f"{settings.get('bf16')}, fp16 {settings.get('fp16')}): change one of them."
        )


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


def named_model(model_args: ModelConfig) -> Named:
    """The model that is named, with the adapter where that is one's name or folder; "demo" stands for the embedded
    model, which is built where needed.

    Raises:
        ValueError: none is given.
        OSError: there is none of that name.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("model_name_or_path is missing: give a model's name or folder, or 'demo'.")
    if name == "demo":
        return Named(demo.model_path())
    model = named(name, model_args.model_revision)
    try:
        cached_file(model.base, CONFIG_NAME, revision=model.revision or "main")
    except OSError as error:
        which = f"The model {name!r}" if model.adapter is None else f"The base {model.base!r} of the adapter {name!r}"
        raise OSError(f"{which} cannot be loaded: {error}") from error
    return model


def described(model_args: ModelConfig, policy: str | None = None) -> str:
    """What is trained on what, for the header of a run.

    Args:
        policy: the adapter that training starts from, where it is not the named model's own.
    """
    model = named_model(model_args)
    start = policy or (model_args.model_name_or_path if model.adapter is not None else None)
    base = "demo" if model_args.model_name_or_path == "demo" else model.base
    bits = " in 4 bits" if model_args.load_in_4bit else " in 8 bits" if model_args.load_in_8bit else ""
    lora = f"a new LoRA of rank {model_args.lora_r} on {model_args.lora_target_modules}"
    return f"{base}{bits}, and on it {lora if start is None else f'the adapter {start}, trained further'}"


def model_for_trl(model_args: ModelConfig, args: Any) -> dict[str, Any]:
    """Arguments for TRL's own trainers, so that they train on the base as `load_shared_base` loads it: a new LoRA, or
    the adapter that is named as the model."""
    model, quantization = named_model(model_args), get_quantization_config(model_args)
    kwargs: dict[str, Any] = {
        "dtype": model_args.dtype,
        "revision": model.revision or "main",
        "attn_implementation": model_args.attn_implementation,
    }
    if model.adapter is not None and not isinstance(args, RewardConfig):  # TRL would lay a new LoRA over it
        if quantization is not None:
            kwargs |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
        check_folder(model.adapter, "policy")
        base = load_causal_lm(str(model.base), trust_remote_code=args.trust_remote_code, **kwargs)
        return {"model": PeftModel.from_pretrained(base, model.adapter, is_trainable=True)}
    args.model_init_kwargs, start = kwargs, {"model": str(model.adapter or model.base)}
    peft_config = get_peft_config(model_args) if model.adapter is None else None
    return {**start, "peft_config": peft_config, "quantization_config": quantization}


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
        **roles: further arguments of `SharedBase.from_pretrained`; `policy` defaults to the adapter that is named as
            the model, with a frozen copy of it as reference, or else to the LoraConfig of `model_args`.
    """
    quantization = get_quantization_config(model_args)
    model = named_model(model_args)
    if "policy" not in roles:
        roles["policy"] = model.adapter or get_peft_config(model_args)
        if model.adapter is not None and roles.get("reference") is None:
            roles["reference"] = "copy"  # as `SharedBase.from_pretrained` has it, which is given the base's name here
    # No trainer moves what is loaded to be looked at.
    roles = args_of_gpu(PartialState().device, quantized=quantization is not None) | roles
    return SharedBase.from_pretrained(
        model.base,
        quantization_config=quantization,
        dtype=model_args.dtype if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype),
        revision=model.revision or "main",
        attn_implementation=model_args.attn_implementation,
        **roles,
    )


def reward_folder(adapters: str | Sequence[str] | None, functions: Any, model_args: ModelConfig) -> list[str] | None:
    """The folder of each reward role's adapter; None where reward functions score. "demo" is made where needed.

    Raises:
        ValueError: nothing scores.
    """
    if functions:
        return None
    if not adapters:
        raise ValueError(
            "Nothing gives a score: give --reward_adapter, a folder that recipes/reward_lora.py wrote over the same "
            "model, or --reward_funcs."
        )
    return [
        demo.reward_adapter(load_in_4bit=model_args.load_in_4bit) if adapter == "demo" else adapter
        for adapter in ([adapters] if isinstance(adapters, str) else adapters)
    ]


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
