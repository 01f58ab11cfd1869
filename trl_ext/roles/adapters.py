"""Adapters and scalar heads on disk: what TRL's RewardTrainer saves, and what this package saves in the same form."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from trl_ext.roles.switching import belongs_to

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD = "value_head.safetensors"
NOTE = "trl_ext_role.json"  # what the other files have no place for
SCORE_KEY = "base_model.model.score.weight"
# PEFT's other initialisations take something off the base's weights, or need data.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")


def check_folder(path: str | Path, role: str) -> Path:
    """Check that the folder `path` holds a LoRA adapter or a head, and return it as a Path.

    Raises:
        FileNotFoundError: it is missing, or holds neither.
        ValueError: its adapter is not LoRA, would rewrite the base, or its weights are damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The {role} role's folder {str(path)!r} does not exist: give the folder of a saved adapter."
        )
    if not (folder / CONFIG).is_file() and not (folder / HEAD).is_file():
        raise FileNotFoundError(
            f"The {role} role's folder {str(path)!r} holds no {CONFIG}: give the folder that save_model() or "
            "save_pretrained() wrote for a LoRA adapter."
        )
    if (folder / CONFIG).is_file() and not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"The {role} role's folder {str(path)!r} holds no {WEIGHTS}: save the adapter as safetensors."
        )
    if (folder / CONFIG).is_file():
        config = read_config(folder)
        if (kind := config.get("peft_type")) != "LORA":
            raise ValueError(f"The adapter in {str(path)!r} is of type {kind!r}: roles share a base through LoRA only.")
        if (init := config.get("init_lora_weights", True)) != "eva":  # which needed its data once, before training
            check_initialisation(init, f"The adapter in {str(path)!r}")
    try:
        with safe_open(_weights_file(folder), framework="pt"):
            return folder
    except SafetensorError as error:
        raise ValueError(
            f"The weights {str(_weights_file(folder))!r} are not whole ({error}): save or copy the adapter again."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, as saved."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def check_initialisation(init: Any, whose: str) -> None:
    """Refuse a LoRA whose initialisation changes the base: that would change every role, the reference most of all.

    Raises:
        ValueError: PiSSA, OLoRA, LoftQ, CorDA and the like.
    """
    if init not in INITIALISATIONS:
        raise ValueError(
            f"{whose} has init_lora_weights={init!r}, which rewrites the weights that all roles share, or needs data: "
            "take True, 'gaussian' or 'orthogonal', or convert a saved adapter to plain LoRA."
        )


def check_same_base(folder: Path, base_name: str, role: str) -> None:
    """Refuse an adapter that was trained over another base than `base_name`.

    Raises:
        ValueError: the adapter names another base, or its tokenizer has another vocabulary.
    """
    trained_over = read_config(folder).get("base_model_name_or_path") or ""
    if trained_over and base_name and not _same_model(trained_over, base_name):
        raise ValueError(
            f"The {role} adapter in {str(folder)!r} was trained over {trained_over!r}, but the base is {base_name!r}: "
            "train it over this base (or, if both are copies of one model, correct base_model_name_or_path in its "
            f"{CONFIG})."
        )
    tokenizer = folder / "tokenizer.json"
    own = Path(base_name) / "tokenizer.json"
    if tokenizer.is_file() and own.is_file() and _vocabulary(tokenizer) != _vocabulary(own):
        raise ValueError(
            f"The {role} adapter in {str(folder)!r} was saved with another tokenizer than {base_name!r} has: its ids "
            "mean other tokens here, so train it with the base's tokenizer."
        )


def warn_if_quantized_otherwise(folder: Path, model: Any, role: str) -> None:
    """Warn where an adapter was trained over the same base in another precision.

    A folder written here has it in its note. TRL's trainers store LoRA weights as bfloat16 over a quantised base and
    as float32 over any other.
    """
    trained_quantized = _read_note(folder).get("quantized")
    if trained_quantized is None:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            key = next((k for k in weights.keys() if "lora_A" in k), None)  # noqa: SIM118 (not a dict)
            trained_quantized = key is not None and weights.get_slice(key).get_dtype() == "BF16"
    if trained_quantized != is_quantized(model):
        was, now = ("a quantised", "not quantised") if trained_quantized else ("an unquantised", "quantised")
        warnings.warn(
            f"The {role} adapter in {str(folder)!r} was trained over {was} base, and this base is {now}: its outputs "
            f"shift. Train the {role} model over the base exactly as PPO loads it (same quantization_config).",
            UserWarning,
            stacklevel=3,
        )


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes holds the model's weights."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


@contextmanager
def fits(folder: Path, base_name: str) -> Iterator[None]:
    """Turn PEFT's error about an adapter that does not fit into one sentence.

    Raises:
        ValueError: the adapter's shapes or targets are not those of the base.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(":")
        raise ValueError(
            f"The adapter in {str(folder)!r} does not fit the base {base_name!r} ({reason}): train it over this base."
        ) from error


def load_adapter(model: PeftModel, folder: Path, name: str) -> None:
    """Put the adapter saved in `folder` onto `model` under `name`, or its weights into the one that has that name.

    Raises:
        ValueError: its shapes do not fit the base, or weights are missing.
    """
    with fits(folder, model.get_base_model().config.name_or_path):
        device = str(next(model.parameters()).device)
        result = model.load_adapter(str(folder), name, is_trainable=True, torch_device=device)
    missing = [key for key in result.missing_keys if belongs_to(key, name)]
    if missing:
        raise ValueError(
            f"The adapter in {str(folder)!r} lacks weights that its config promises, first {missing[0]!r}."
        )


def read_score_head(folder: Path) -> Tensor:
    """Weight (1, hidden size) of the scalar head saved in `folder`, float32.

    Raises:
        ValueError: there is none, or it has more than one output.
    """
    with safe_open(_weights_file(folder), framework="pt") as weights:
        key = next((k for k in weights.keys() if k.endswith("score.weight")), None)  # noqa: SIM118 (not a dict)
        weight = weights.get_tensor(key) if key is not None else None
    if weight is None or weight.shape[0] != 1:
        reason = "no score head" if weight is None else f"a score head with {weight.shape[0]} outputs"
        raise ValueError(
            f"{str(folder)!r} holds {reason}: a reward or value role needs one number a sequence, as TRL's "
            "RewardTrainer with a LoraConfig(task_type='SEQ_CLS') saves it."
        )
    return weight.float()


def read_pad_token_id(folder: Path) -> int | None:
    """Pad token of the tokenizer that the reward adapter in `folder` was trained with; None where it is unknown.

    Transformers' sequence classifiers read the score at the last token that is not padding, by id.
    """
    note = _read_note(folder)
    if "pad_token_id" in note:
        return note["pad_token_id"]
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(str(folder)).pad_token_id


def write_note(folder: Path, model: Any, **more: Any) -> None:
    """Write a saved role's note: whether its base was quantised, and `more`."""
    (folder / NOTE).write_text(json.dumps({"quantized": is_quantized(model), **more}), encoding="utf-8")


def scalar_head(size: int, device: torch.device, weight: Tensor | None = None) -> nn.Linear:
    """A linear layer (size -> 1) in float32 without bias, as TRL's reward models have; starts at 0 without `weight`."""
    head = nn.Linear(size, 1, bias=False, device=device, dtype=torch.float32)
    with torch.no_grad():
        head.weight.zero_() if weight is None else head.weight.copy_(weight)
    return head


def save_plain_adapter(model: PeftModel, name: str, folder: Path) -> None:
    """Save an adapter as PEFT would: `folder` loads with AutoPeftModelForCausalLM."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS, {"format": "pt"})
    config, base = model.peft_config[name], model.get_base_model()
    before = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, base.config.name_or_path
    config.save_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = before
    write_note(folder, base)


def save_scored_adapter(model: PeftModel, name: str, head: nn.Linear, folder: Path, **more: Any) -> None:
    """Save an adapter and its scalar head as TRL's RewardTrainer would: a PEFT SEQ_CLS adapter with its `score`. `more`
    goes into its note."""
    folder.mkdir(exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name)
    state[SCORE_KEY] = head.weight.detach()
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / WEIGHTS)
    config = as_sequence_classifier(model.peft_config[name])
    config.inference_mode = True
    config.modules_to_save = ["score"]
    config.base_model_name_or_path = model.get_base_model().config.name_or_path
    config.save_pretrained(str(folder))
    write_note(folder, model.get_base_model(), **more)


def as_sequence_classifier(config: Any) -> LoraConfig:
    """A copy of a policy's LoraConfig for a role with a scalar head."""
    changed = {"task_type": "SEQ_CLS", "modules_to_save": None, "inference_mode": False, "auto_mapping": None}
    return replace(deepcopy(config), **changed)


def _weights_file(folder: Path) -> Path:
    return folder / (WEIGHTS if (folder / WEIGHTS).is_file() else HEAD)


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = Path(one), Path(other)
    return first.exists() and second.exists() and first.resolve() == second.resolve()


def _read_note(folder: Path) -> dict[str, Any]:
    file = folder / NOTE
    note: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return note


def _vocabulary(file: Path) -> Any:
    content = json.loads(file.read_text(encoding="utf-8"))
    return content["model"]["vocab"], [(token["id"], token["content"]) for token in content["added_tokens"]]
