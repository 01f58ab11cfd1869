"""Which LoRA adapters can share a base: one rule for every role, whether a folder, a config or a PeftModel brings it.

A role must say exactly what its adapter says alone in PEFT, and leave every other role as it is. The rule lists what is
known to be so; whatever else a configuration or a file of weights holds is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import peft
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists

# Fields of LoraConfig that may hold anything: tests/parity/test_adapter_zoo.py measures each in every role. All others,
# also those that a later PEFT adds, must be at their default.
RIGHT = frozenset(
    {
        # whose it is
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        "inference_mode",
        # where it lies
        *(
            "target_modules",
            "target_parameters",
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "fan_in_fan_out",
        ),
        # what it computes
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
        # how it starts; the values of the first are INITIALISATIONS
        *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
        # nothing, without another field that is refused
        *("megatron_core", "qalora_group_size"),
    }
)
# Fields whose weights are the base's own, or lie beside it for one adapter at a time.
FULL_WEIGHTS = ("bias", "modules_to_save", "trainable_token_indices")
# PEFT's other initialisations take something off the base's weights, or need data.
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
NEEDED_DATA_ONCE = ("eva",)  # before training, and leaves the base alone
LM_HEADS = ("lm_head", "embed_out")

_LORA = re.compile(r"\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB]|lora_magnitude_vector(\.weight)?)$")
# `v_head.summary`: in TRL 0.11's AutoModelForCausalLMWithValueHead, and so in LLaMA-Factory's reward models.
_SCORE = re.compile(r"(^|\.)(score|v_head\.summary)\.(weight|bias)$")
# PEFT saves the embeddings too where they are targeted or were resized.
_EMBEDDING = re.compile(r"\.(\w*embed\w*|wte|lm_head)(\.base_layer)?\.weight$")


def check_config(
    config: LoraConfig | Mapping[str, Any], whose: str, scored: bool = False, trained: bool = False
) -> None:
    """Refuse a LoRA that could not share its base.

    Args:
        config: as an object, or as read from a file.
        whose: the subject of the sentence that refuses it.
        scored: the adapter comes with a score head, as that of a reward or value role.
        trained: it has weights already.

    Raises:
        ValueError: names the field and says what to do.
    """
    held = config if isinstance(config, Mapping) else vars(config)
    if (kind := held.get("peft_type")) != "LORA":
        kind = getattr(kind, "value", kind)
        raise ValueError(f"{whose} is of type {kind!r}: roles share a base through LoRA only.")
    defaults = vars(LoraConfig())
    for name, value in held.items():
        if name in RIGHT or name.startswith("_") or value == defaults.get(name) or not (value or defaults.get(name)):
            continue
        if name == "modules_to_save" and scored and set(value) <= {"score", "classifier"}:
            continue  # PEFT writes both names for a sequence classifier
        shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
        remedy = f"train it again without {name}" if trained else f"remove {name}"
        if name in FULL_WEIGHTS:
            why = f"roles share every full weight, so only LoRA matrices can be trained; {remedy}"
        elif name in defaults:
            why = f"roles share a base through plain LoRA on its layers only; {remedy}"
        else:
            why = f"PEFT {peft.__version__} does not know it; {remedy}, or install the PEFT that it was trained with"
        raise ValueError(f"{whose} has {name}={shown}: {why}.")
    initialisation = held.get("init_lora_weights", True)
    if initialisation not in INITIALISATIONS + (NEEDED_DATA_ONCE if trained else ()):
        raise ValueError(
            f"{whose} has init_lora_weights={initialisation!r}, which rewrites the weights that all roles share, or "
            "needs data: take True, 'gaussian' or 'orthogonal', or convert a saved adapter to plain LoRA."
        )
    if getattr(config, "_custom_modules", None):
        raise ValueError(f"{whose} has layers of its own for LoRA: roles share a base through PEFT's layers only.")
    if isinstance(config, LoraConfig) and _targets_lm_head(config, whose):
        raise ValueError(on_the_lm_head(whose))


def check_trainable(config: LoraConfig, whose: str) -> None:
    """Refuse the configuration of a new adapter that could not learn.

    Raises:
        ValueError: names the field.
    """
    ranks = {"r": config.r, **{f"rank_pattern[{key!r}]": r for key, r in (config.rank_pattern or {}).items()}}
    alphas = {"lora_alpha": config.lora_alpha}
    alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in (config.alpha_pattern or {}).items()}
    for name, r in ranks.items():
        if not isinstance(r, Integral) or r < 1:
            raise ValueError(f"{whose} has {name}={r!r}: a rank is a positive whole number.")
    for name, alpha in alphas.items():
        if not isinstance(alpha, Real) or not 0 < float(alpha) < math.inf:
            raise ValueError(f"{whose} has {name}={alpha!r}, which scales what is learnt: give a positive number.")
    if not isinstance(config.lora_dropout, Real) or not 0 <= float(config.lora_dropout) < 1:
        raise ValueError(f"{whose} has lora_dropout={config.lora_dropout!r}: give a number from 0 to below 1.")


def check_keys(keys: Iterable[str], whose: str, scored: bool) -> None:
    """Refuse weights other than LoRA's, a score head's and embeddings, which `adapters.load_adapter` compares.

    Raises:
        ValueError: names the first.
    """
    for key in keys:
        if is_lora(key) and key.split(".lora_")[0].rpartition(".")[2] in LM_HEADS:
            raise ValueError(on_the_lm_head(whose))
        if not (is_lora(key) or _EMBEDDING.search(key) or (scored and is_score(key))):
            raise ValueError(
                f"{whose} holds {key!r} among its weights, which is not LoRA"
                f"{' or a score head' if scored else ''}: train it again with LoRA on linear layers alone."
            )


def is_lora(key: str) -> bool:
    """Whether a key of a saved adapter is part of LoRA."""
    return bool(_LORA.search(key))


def is_score(key: str) -> bool:
    """Whether a key of a saved adapter is part of its score head."""
    return bool(_SCORE.search(key))


def on_the_lm_head(whose: str) -> str:
    """What is said of LoRA on the LM head."""
    return (
        f"{whose} targets the LM head, whose weight log-probabilities are computed from directly: the adapter would "
        "never train; remove it from target_modules."
    )


def check_peft_model(model: PeftModel | Any) -> str:
    """Refuse a PeftModel, or a model that Transformers put adapters into, where these could not share its base with
    the roles'.

    Returns:
        The name of its active adapter.

    Raises:
        ValueError: says what is in the way, and what to do.
    """
    for name, config in model.peft_config.items():
        check_config(config, f"The PeftModel's adapter {name!r}", trained=True)
        if name in names_of_modules(model) or "lora_" in name or name == "__base__":
            raise ValueError(
                f"The PeftModel's adapter is called {name!r}, as a part of the model is, and PEFT would mix up their "
                "weights: load it under another adapter_name."
            )
    status = peft.get_model_status(model)
    if status.enabled is not True:
        raise ValueError("The PeftModel's adapters are disabled: enable the one to train before building the roles.")
    if status.merged_adapters:
        raise ValueError(
            f"The PeftModel has {status.merged_adapters} merged into its weights: call unmerge_adapter() before "
            "building the roles."
        )
    if len(status.active_adapters) != 1:
        raise ValueError(
            f"The PeftModel has {status.active_adapters} active at once: choose the one to train with "
            "set_adapter(name)."
        )
    name = status.active_adapters[0]
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer) and name in module.scaling):
        rank = layer.r[name]
        if layer.scaling[name] != layer.lora_alpha[name] / (rank**0.5 if layer.use_rslora[name] else rank):
            raise ValueError(
                f"The PeftModel's adapter {name!r} is scaled otherwise than its config says, which no saved adapter "
                "can tell: set its lora_alpha instead."
            )
    return name


def names_of_modules(model: Any) -> set[str]:
    """Every name on the way to a module of `model` itself. PEFT tells adapters' weights by such names alone."""
    paths = {name.split(".lora_")[0] for name, _ in model.named_modules()}
    return {part for path in paths for part in path.split(".")}


def _targets_lm_head(config: LoraConfig, whose: str) -> bool:
    targets = config.target_modules
    if not targets or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return False
    named = [] if isinstance(targets, str) else [name for name in targets if name.split(".")[-1] in LM_HEADS]
    try:
        return any(bool(check_target_module_exists(config, name)) for name in (*LM_HEADS, *named))
    except re.error as error:
        raise ValueError(f"{whose} has a target_modules that is no regular expression ({error}): mend it.") from error
