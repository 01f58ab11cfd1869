"""Adapters and scalar heads on disk: what TRL's RewardTrainer saves, and what this package saves in the same form."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, find_adapter_config_file

from trl_ext.roles import sharing
from trl_ext.roles.sharding import gathered, shared_as
from trl_ext.roles.switching import belongs_to

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
HEAD = "value_head.safetensors"
NOTE = "trl_ext_role.json"  # what the other files have no place for
# Arguments of `from_pretrained` that say where files are looked for.
HUB = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only", "proxies")
SCORE = "base_model.model.score."  # where a PEFT sequence classifier keeps its head


class Named(NamedTuple):
    """What the name of a model stands for.

    Attributes:
        base: name or folder of the model itself.
        adapter: folder of the adapter over it, where the name is that adapter's.
        revision: of the base; None: the newest.
        tokenizer: what the tokenizer is loaded from: the adapter's folder, where one lies there, else the base.
    """

    base: str
    adapter: Path | None = None
    revision: str | None = None

    @property
    def tokenizer(self) -> str:
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return str(self.adapter) if own else self.base

    def load_tokenizer(self, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
        """That tokenizer; the base's is of the revision of its weights."""
        revision = self.revision or "main" if self.tokenizer == self.base else "main"
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.tokenizer, revision=revision, trust_remote_code=trust_remote_code
        )
        return tokenizer

    def check_no_other(self, name: str, peft_config: Any | None) -> None:
        """Refuse a new LoRA over the adapter that `name` stands for.

        Raises:
            ValueError: there are both.
        """
        if self.adapter is not None and peft_config is not None:
            raise ValueError(
                f"{name!r} is an adapter over {self.base!r}, which is trained further: leave peft_config out, or give "
                f"{self.base!r} as the model."
            )

    @property
    def start(self) -> Path | None:
        """The adapter, where it is one that writes text: a policy's."""
        return None if self.adapter is None or read_config(self.adapter).get("task_type") == "SEQ_CLS" else self.adapter


def named(name: str, revision: str | None = None, subfolder: str = "", **where: Any) -> Named:
    """The model that `name` stands for, a folder or a name on the Hub: a model, or an adapter over one.

    Args:
        revision, subfolder, **where: as in `AutoModelForCausalLM.from_pretrained`; of an adapter, where `name` is one.

    Raises:
        FileNotFoundError: there is no such folder, or the Hub's adapter cannot be had.
        ValueError: the adapter does not say what its base is, or a whole model lies beside it, or its base is an
            adapter too.
    """
    if (name.startswith((".", "~", "/")) or name.count("/") > 1) and not Path(name).exists():  # no name for the Hub
        raise FileNotFoundError(f"The model {name!r} does not exist: give a folder, or a name on the Hub.")
    try:
        found = find_adapter_config_file(name, revision=revision, subfolder=subfolder, **where)
    except OSError:  # no name for the Hub: loading says so
        found = None
    if found is None:
        return Named(name, revision=revision)
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(name, "model", revision=revision, subfolder=subfolder, **where)
    folder /= subfolder
    config = read_config(folder)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{name!r} is an adapter that does not say over which model it was trained: give that model, and the "
            "adapter as policy."
        )
    if (folder / CONFIG_NAME).is_file() and any(file.name != WEIGHTS for file in folder.glob("*.safetensors")):
        raise ValueError(f"{name!r} holds a model and an adapter beside it: move one of them into a folder of its own.")
    if (Path(base) / CONFIG).is_file():
        raise ValueError(
            f"{name!r} is an adapter over {base!r}, which is an adapter too: merge that one into its base and save the "
            "model, and train over it."
        )
    return Named(base, folder, config.get("revision"))


def _downloaded(name: str, role: str, subfolder: str = "", **where: Any) -> Path:
    """The folder of the Hub's cache with the adapter of this name, which is downloaded where needed."""
    below = f"{subfolder}/" if subfolder else ""
    files = (CONFIG, WEIGHTS, HEAD, NOTE, "tokenizer*", "special_tokens_map.json", "chat_template*", "*vocab*")
    try:
        return Path(snapshot_download(name, allow_patterns=[below + file for file in files], **where))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"The {role} role's folder {name!r} does not exist, and there is no adapter of that name in the Hub's "
            f"cache or on the Hub ({reason:.200}): give the folder of a saved adapter."
        ) from error


def check_folder(path: str | Path, role: str) -> Path:
    """Check all that the files of a saved role tell without a model, and return its folder as a Path.

    Args:
        path: the folder, or the adapter's name on the Hub.

    Raises:
        FileNotFoundError: the folder is missing, or holds neither an adapter nor a head.
        ValueError: its adapter is not one that roles can share a base with, or its weights are damaged.
    """
    folder = Path(path)
    if not folder.is_dir() and isinstance(path, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
        folder = _downloaded(path, role)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The {role} role's folder {str(path)!r} does not exist: give the folder of a saved adapter."
        )
    has_config = (folder / CONFIG).is_file()
    if not has_config and (folder / "policy" / CONFIG).is_file():
        several = role == "reward" and (folder / "reward_0").is_dir()
        own = [str(part) for part in sorted(folder.glob("reward_*"))] if several else str(folder / role)
        raise FileNotFoundError(f"The {role} role's folder {str(path)!r} holds one folder a role: give {own!r}.")
    if not has_config and not (role == "value" and (folder / HEAD).is_file()):
        raise FileNotFoundError(
            f"The {role} role's folder {str(path)!r} holds no {CONFIG}: give the folder that save_model() or "
            "save_pretrained() wrote for a LoRA adapter."
        )
    if has_config and not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(
            f"The {role} role's folder {str(path)!r} holds no {WEIGHTS}: save the adapter as safetensors."
        )
    whose, scored = f"The adapter in {str(path)!r}", role in ("value", "reward")
    if has_config:
        sharing.check_config(read_config(folder), whose, scored, trained=True)
        sharing.check_config(read_lora_config(folder), whose, scored, trained=True)
    for file in _weights_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                keys = list(weights.keys())
        except SafetensorError as error:
            raise ValueError(
                f"The weights {str(file)!r} are not whole ({error}): save or copy the adapter again."
            ) from error
        if has_config and file.name == WEIGHTS:
            sharing.check_keys(keys, whose, scored)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, as saved.

    Raises:
        ValueError: it is no JSON object.
    """
    try:
        config: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(folder / CONFIG)!r} is no JSON object ({error}): save the adapter again.") from error
    return config


def read_lora_config(folder: Path) -> LoraConfig:
    """The adapter's configuration as PEFT understands it.

    Raises:
        ValueError: PEFT refuses it.
    """
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"PEFT does not take {str(folder / CONFIG)!r} ({reason}): save the adapter again.") from error
    return config


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
    if tokenizer.is_file() and own.is_file() and _mean_other_tokens(_tokens_by_id(tokenizer), _tokens_by_id(own)):
        raise ValueError(
            f"The {role} adapter in {str(folder)!r} was saved with another tokenizer than {base_name!r} has: its ids "
            "mean other tokens here, so train it with the base's tokenizer."
        )


def warn_if_quantized_otherwise(folder: Path, model: Any, role: str) -> None:
    """Warn where an adapter was trained over the same base in another precision."""
    trained = trained_over_quantized(folder)
    if trained is not None and trained != is_quantized(model):
        was, now = ("a quantised", "not quantised") if trained else ("an unquantised", "quantised")
        warnings.warn(
            f"The {role} adapter in {str(folder)!r} was trained over {was} base, and this base is {now}: its outputs "
            f"shift. Train the {role} model over the base exactly as PPO loads it (same quantization_config).",
            UserWarning,
            stacklevel=3,
        )


def trained_over_quantized(folder: Path) -> bool | None:
    """Whether the saved adapter was trained over a quantised base; None where its folder does not tell.

    One written here has it in its note. TRL's trainers store LoRA weights as bfloat16 over a quantised base and as
    float32 over any other.
    """
    noted: bool | None = _read_note(folder).get("quantized")
    if noted is not None or (folder / HEAD).is_file():  # LLaMA-Factory's precision does not tell
        return noted
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        key = next((k for k in weights.keys() if "lora_A" in k), None)  # noqa: SIM118 (not a dict)
        return key is not None and weights.get_slice(key).get_dtype() == "BF16"


def is_quantized(model: Any) -> bool:
    """Whether bitsandbytes holds the model's weights."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


@contextmanager
def fits(whose: str, base_name: str, remedy: str = "train it over this base") -> Iterator[None]:
    """Turn PEFT's error about LoRA that does not fit a base into one sentence.

    Raises:
        ValueError: its shapes or targets are not those of the base.
    """
    try:
        yield
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else reason[:197] + "..."
        raise ValueError(f"{whose} does not fit the base {base_name!r} ({reason.rstrip(':.')}): {remedy}.") from error


def load_weights(model: PeftModel, folder: Path, name: str) -> None:
    """Put the LoRA weights saved in `folder` into the adapter called `name`.

    Raises:
        ValueError: weights are missing, there are some for layers that the base has not, or the embeddings beside them
            are not the base's.
    """
    whose, state = f"The adapter in {str(folder)!r}", load_file(folder / WEIGHTS)
    lora = {key: tensor for key, tensor in state.items() if sharing.is_lora(key)}
    causal_lm = model.get_base_model()
    with fits(whose, causal_lm.config.name_or_path):
        missing, unexpected = put_lora(model, lora, name)
    if missing:
        raise ValueError(f"{whose} lacks weights that its config promises, first {missing[0]!r}.")
    if unexpected:
        raise ValueError(
            f"{whose} does not fit the base {causal_lm.config.name_or_path!r} (it has no layer for "
            f"{unexpected[0]!r}): train it over this base."
        )
    own = [causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings().weight]
    for key, tensor in state.items():
        if not (sharing.is_lora(key) or sharing.is_score(key)) and not any(_same(tensor, weight) for weight in own):
            raise ValueError(
                f"{whose} holds {key!r}, which is not as in the base {causal_lm.config.name_or_path!r}: save the model "
                "with its new embeddings, and train the adapter over that."
            )


@torch.no_grad()
def put_lora(model: PeftModel, state: dict[str, Tensor], name: str) -> tuple[list[str], list[str]]:
    """Put LoRA weights, named as PEFT saves them, into the adapter called `name`. Returns the names that `state` lacks,
    and those that the adapter has no place for.

    PEFT renames them on the way, as Transformers renames the layers of old checkpoints. It does so with the names of
    today's layers too, where an old name is a part of them, and loses their weights. So that is only tried with names
    that the adapter does not have.
    """
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if own.keys() != state.keys():
        result = set_peft_model_state_dict(model, state, adapter_name=name)
        return [key for key in result.missing_keys if belongs_to(key, name)], list(result.unexpected_keys)
    for key, tensor in state.items():
        if own[key].shape != tensor.shape:
            raise ValueError(f"size mismatch for {key}: {tuple(tensor.shape)} and {tuple(own[key].shape)}")
        own[key].copy_(shared_as(tensor, own[key]))
    return [], []


def _same(tensor: Tensor, weight: Tensor) -> bool:
    return tensor.shape == weight.shape and torch.equal(tensor.to(weight.device, weight.dtype), weight)


def read_score_head(folder: Path) -> dict[str, Tensor]:
    """The scalar head saved in `folder`: its weight (1, hidden size) and, where it has one, its bias (1,), float32.

    Raises:
        ValueError: there is none, or it has more than one output.
    """
    head: dict[str, Tensor] = {}
    for file in _weights_files(folder):
        with safe_open(file, framework="pt") as weights:
            keys = [key for key in weights.keys() if sharing.is_score(key)]  # noqa: SIM118 (not a dict)
            head |= {key.rpartition(".")[2]: weights.get_tensor(key).float() for key in keys}
    if "weight" not in head or head["weight"].shape[0] != 1:
        reason = f"a score head with {head['weight'].shape[0]} outputs" if "weight" in head else "no score head"
        raise ValueError(
            f"{str(folder)!r} holds {reason}: a reward or value role needs one number a sequence, as TRL's "
            "RewardTrainer with a LoraConfig(task_type='SEQ_CLS') saves it."
        )
    return head


def check_head_inside(folder: Path) -> None:
    """Refuse an adapter whose head lies in a file of its own, where Transformers and TRL do not look: they would go on
    with a random one.

    Raises:
        ValueError: it does.
    """
    if (folder / HEAD).is_file():
        raise ValueError(
            f"The adapter in {str(folder)!r} keeps its head in {HEAD}, which Transformers does not read: give it as "
            "the reward role, SharedBase.from_pretrained(..., reward=...) or --reward_adapter."
        )


def load_scalar_head(folder: Path, size: int, device: torch.device) -> nn.Linear:
    """The scalar head saved in `folder`, for hidden states of `size`.

    Raises:
        ValueError: it is for another size.
    """
    state = read_score_head(folder)
    if state["weight"].shape[1] != size:
        raise ValueError(
            f"The score head in {str(folder)!r} reads hidden states of size {state['weight'].shape[1]}, and the base's "
            f"have {size}: train it over this base."
        )
    head = scalar_head(size, device, bias="bias" in state)
    head.load_state_dict(state)
    return head


def read_pad_token_id(folder: Path, of_base: int | None) -> int | None:
    """Pad token of the tokenizer that the reward adapter in `folder` was trained with; where no tokenizer lies there,
    that of the base's config, `of_base`, which a classifier made of the base goes by.

    Transformers' sequence classifiers read the score at the last token that is not padding, by id.
    """
    note = _read_note(folder)
    if "pad_token_id" in note:
        return note["pad_token_id"]
    if (folder / HEAD).is_file():
        return None  # LLaMA-Factory's, whose score is read at the last token that the mask marks
    if not (folder / "tokenizer_config.json").is_file():
        return of_base
    return AutoTokenizer.from_pretrained(str(folder)).pad_token_id


def write_note(folder: Path, model: Any, **more: Any) -> None:
    """Write a saved role's note: whether its base was quantised, and `more`."""
    (folder / NOTE).write_text(json.dumps({"quantized": is_quantized(model), **more}), encoding="utf-8")


def scalar_head(size: int, device: torch.device, bias: bool = False) -> nn.Linear:
    """A linear layer (size -> 1) in float32 that starts at 0; without bias, as TRL's reward models have it."""
    head = nn.Linear(size, 1, bias=bias, device=device, dtype=torch.float32)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return head


def weights_of(model: PeftModel, name: str | None, head: nn.Module | None = None) -> dict[str, Tensor] | None:
    """The weights of an adapter (None: of none) and of the scalar head on it, as they are saved. All processes among
    which they are shared out must call it; it is None on those that write nothing."""
    state = {} if name is None else get_peft_model_state_dict(model, adapter_name=name)
    if head is not None:
        prefix = "score." if name is None else SCORE
        state = state | {prefix + key: tensor for key, tensor in head.state_dict().items()}
    return gathered(state)


def save_head(state: dict[str, Tensor], folder: Path) -> None:
    """Save a scalar head that lies on another role's adapter."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / HEAD)


def save_plain_adapter(model: PeftModel, name: str, state: dict[str, Tensor], folder: Path) -> None:
    """Save an adapter, whose weights are `state`, as PEFT would: `folder` loads with AutoPeftModelForCausalLM."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    config, base = model.peft_config[name], model.get_base_model()
    before = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, base.config.name_or_path
    config.save_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = before
    write_note(folder, base)


def save_scored_adapter(model: PeftModel, name: str, state: dict[str, Tensor], folder: Path, **more: Any) -> None:
    """Save an adapter and its scalar head, whose weights are `state`, as TRL's RewardTrainer would: a PEFT SEQ_CLS
    adapter with its `score`. `more` goes into its note."""
    folder.mkdir(exist_ok=True)
    save_file(state, folder / WEIGHTS)
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


def _weights_files(folder: Path) -> list[Path]:
    """Those of its adapter, and those of a head saved beside it, or alone."""
    return [file for file in (folder / WEIGHTS, folder / HEAD) if file.is_file()]


def _same_model(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = Path(one), Path(other)
    return first.exists() and second.exists() and first.resolve() == second.resolve()


def _read_note(folder: Path) -> dict[str, Any]:
    file = folder / NOTE
    note: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return note


def _tokens_by_id(file: Path) -> dict[int, str]:
    content = json.loads(file.read_text(encoding="utf-8"))
    known = content["model"]["vocab"]
    if isinstance(known, dict):
        tokens = {i: token for token, i in known.items()}
    else:  # with their scores, in the order of their ids
        tokens = dict(enumerate(token for token, *_ in known))
    return tokens | {token["id"]: token["content"] for token in content["added_tokens"]}


def _mean_other_tokens(one: dict[int, str], other: dict[int, str]) -> bool:
    """Whether an id that both have is another token in each; one may have more, for padding, say."""
    return any(token != other.get(i, token) for i, token in one.items())
