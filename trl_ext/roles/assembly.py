"""Laying the roles on a base: which adapter and which head each has, and where they are loaded from."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.quantization_config import QuantizationConfigMixin

from trl_ext.roles import adapters as files
from trl_ext.roles import sharing
from trl_ext.roles.packing import check_causal
from trl_ext.roles.switching import belongs_to, keep_differentiable
from trl_ext.tokens import check_loaded

NEW = "The policy's LoraConfig"


# What PEFT refuses LoRA on `out_proj` and `conv1d` of.
MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}


class AssembledRoles(NamedTuple):
    """A base with its roles: the arguments of `SharedBase`."""

    model: PeftModel
    adapters: dict[Any, str | None]
    heads: dict[str, nn.Module]
    reward_pad_token_ids: dict[str, int | None]
    reference_named: bool


@dataclass(frozen=True)
class Plan:
    """The arguments of `SharedBase.from_pretrained`, checked as far as that goes without a model."""

    policy: LoraConfig | Path | None
    value: str | Path
    reward: tuple[Path, ...]
    reference: str | Path | None

    @property
    def rewards(self) -> dict[str, Path]:
        """The folder of each reward role: of "reward" where there is one, of "reward_0", "reward_1", ... of several."""
        names = ["reward"] if len(self.reward) == 1 else [f"reward_{i}" for i in range(len(self.reward))]
        return dict(zip(names, self.reward, strict=True))


def default_lora(model: Any) -> LoraConfig:
    """LoRA of rank 16 on every linear layer of `model` that PEFT can adapt, but not on the LM head."""
    left_out = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).__module__.startswith("transformers.models")
        if not _only_multiplies(module)
    ]
    left_out += _of_pictures(model)
    if model.config.model_type in MAMBA:
        left_out += ["out_proj", "conv1d"]  # its kernels read these weights past the layers
    return LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules="all-linear",
        exclude_modules=left_out or None,
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def _only_multiplies(layer: nn.Linear) -> bool:
    """Whether a linear layer of a model's own kind says W x and no more. (Llama 4's router says two things, DeepSeek
    V4's output projection takes groups of heads.)"""
    if type(layer).forward is nn.Linear.forward:
        return True
    x = torch.ones(2, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)
    try:
        said, product = layer(x), nn.Linear.forward(layer, x)
    except RuntimeError:  # it reads x in another shape
        return False
    alike = isinstance(said, torch.Tensor) and said.shape == product.shape
    return alike and torch.allclose(said, product, rtol=0.01, atol=0.01)


def plan(base_name: str, policy: Any, value: Any, reward: Any, reference: Any) -> Plan:
    """Check the arguments of `SharedBase.from_pretrained` before anything is loaded.

    Raises:
        FileNotFoundError: a folder is missing or holds no adapter.
        TypeError, ValueError: an argument is of the wrong kind, or an adapter is not one that roles can share the base
            with.
    """
    if isinstance(policy, LoraConfig):
        sharing.check_config(policy, NEW)
        sharing.check_trainable(policy, NEW)
    elif policy is not None and not isinstance(policy, (str, Path)):
        raise TypeError(
            f"policy must be a peft.LoraConfig or the folder of a saved adapter, not {type(policy).__name__}."
        )

    def folder(path: str | Path, role: str) -> Path:
        checked = files.check_folder(path, role)
        if (checked / files.CONFIG).is_file():
            files.check_same_base(checked, base_name, role)
        if role in ("value", "reward"):
            files.read_score_head(checked)
        return checked

    rewards = list(reward) if isinstance(reward, (list, tuple)) else [] if reward is None else [reward]
    if reward is not None and not rewards:
        raise ValueError("reward is an empty list: give at least one folder of a reward adapter, or leave it out.")
    return Plan(
        policy=folder(policy, "policy") if isinstance(policy, (str, Path)) else policy,
        value=value if value in ("adapter", "head") else folder(value, "value"),
        reward=tuple(folder(path, "reward") for path in rewards),
        reference=reference if reference in (None, "base", "copy") else folder(reference, "reference"),
    )


def _of_pictures(model: Any) -> list[str]:
    """Linear layers of a model that reads pictures, too, which no text reaches."""
    if model.config.get_text_config() is model.config:
        return []
    text = next((name for name, module in model.named_modules() if module is model.get_decoder()), "")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linear if text and not name.startswith(f"{text}.")]


def load_causal_lm(name: str, **kwargs: Any) -> Any:
    """As `AutoModelForCausalLM.from_pretrained`; of a model that reads pictures, too, the whole, where Transformers has
    no text model for it.

    Raises:
        ValueError: it is no causal language model.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except ValueError as error:
        if not str(error).startswith("Unrecognized configuration class"):
            raise
    config, _ = PreTrainedConfig.get_config_dict(name, **{key: kwargs[key] for key in files.HUB if key in kwargs})
    kind = config.get("model_type")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{name!r} is of the type {kind!r}, which is no causal language model: give one that is.")
    return AutoModelForImageTextToText.from_pretrained(name, **kwargs)


def load_base(
    name: str, quantization_config: Any | None, dtype: torch.dtype | str | None, device_map: Any | None, **kwargs: Any
) -> Any:
    """The causal language model itself. What is not asked for is as the checkpoint has it, but for the precision (see
    `SharedBase.from_pretrained`).

    Raises:
        ValueError: two arguments, or an argument and the checkpoint, contradict each other.
    """
    older = kwargs.pop("torch_dtype", None)
    if dtype is not None and older is not None and _precision(dtype) != _precision(older):
        raise ValueError(f"dtype is {dtype!r} and torch_dtype, its older name, is {older!r}: leave torch_dtype out.")
    dtype = older if dtype is None else dtype
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _precision(dtype)
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}, which torch does not know: give one such as 'bfloat16', or 'auto'.")
    if quantization_config is not None and not isinstance(quantization_config, (dict, QuantizationConfigMixin)):
        raise TypeError(
            f"quantization_config is {quantization_config!r}: give a transformers.BitsAndBytesConfig, or a dict of its "
            "fields."
        )
    if isinstance(quantization_config, dict) and _is_bitsandbytes(quantization_config):
        quantization_config = BitsAndBytesConfig.from_dict(quantization_config)
    own = _own_quantization(name, kwargs)
    if own is not None and _is_bitsandbytes(own) and isinstance(quantization_config, BitsAndBytesConfig):
        if BitsAndBytesConfig.from_dict(dict(own)).to_dict() != quantization_config.to_dict():
            raise ValueError(
                f"{name!r} was saved with a quantization_config of its own, and another one was given: leave "
                "quantization_config out, or load the model that it was made from."
            )
        quantization_config = None  # Transformers takes the checkpoint's, and warns
    if dtype is None:
        dtype = "auto" if own is not None else torch.float32 if quantization_config is None else torch.bfloat16
    given = {"quantization_config": quantization_config, "device_map": device_map}
    kwargs.update({key: value for key, value in given.items() if value is not None})
    # Said of wrong shapes and of missing weights alike; Transformers would raise about the ones and warn of the others.
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_causal_lm(name, dtype=dtype, **{**kwargs, **told})
    check_loaded(info, name, "a causal language model")
    if own is not None and dtype != "auto" and _precision(model.dtype) != _precision(dtype):
        warnings.warn(
            f"dtype is {dtype!r}, but {name!r} was saved quantised, with its other weights in {model.dtype}, and "
            "Transformers keeps them so.",
            UserWarning,
            stacklevel=3,
        )
    return model


def _precision(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")


def _own_quantization(name: str, kwargs: dict[str, Any]) -> Any | None:
    """The quantization_config that the checkpoint was saved with, as a dict."""
    if "gguf_file" in kwargs:
        return None
    if (config := kwargs.get("config")) is not None:
        own = getattr(config, "quantization_config", None)
        return own if own is None or isinstance(own, dict) else own.to_dict()
    content, _ = PreTrainedConfig.get_config_dict(name, **{key: kwargs[key] for key in files.HUB if key in kwargs})
    return content.get("quantization_config") or content.get("text_config", {}).get("quantization_config")


def _is_bitsandbytes(own: dict[str, Any]) -> bool:
    return bool(own.get("load_in_4bit") or own.get("load_in_8bit"))


def assemble(model: Any, plan: Plan) -> AssembledRoles:
    """Put every role of `plan` on `model` (a PreTrainedModel or a PeftModel).

    Raises:
        TypeError: the model writes no text, or is wrapped.
        ValueError: its LM head is quantised, weights are not in memory, or an adapter does not fit it.
    """
    _check_kind(model)
    lm_head = model.get_output_embeddings()
    if not lm_head.weight.is_floating_point():
        raise ValueError(
            "The model's LM head is quantised, and log-probabilities are computed from its weight directly: name it in "
            "llm_int8_skip_modules of the quantization_config."
        )
    keep_differentiable(model)
    model.requires_grad_(False)
    peft_model, policy, reference = _policy_and_reference(model, plan)
    causal_lm = peft_model.get_base_model()
    check_causal(causal_lm)
    adapters: dict[Any, str | None] = {"policy": policy, "reference": reference}
    heads: dict[str, nn.Module] = {}
    device = causal_lm.get_output_embeddings().weight.device
    size = causal_lm.get_output_embeddings().weight.shape[1]

    own_pad = getattr(causal_lm.config.get_text_config(), "pad_token_id", None)  # some configs have none
    pads: dict[str, int | None] = {}
    for role, folder in plan.rewards.items():
        adapters[role] = add_saved(peft_model, folder, role)
        heads[role] = files.load_scalar_head(folder, size, device).requires_grad_(False)
        pads[role] = files.read_pad_token_id(folder, own_pad)

    adapters["value"] = policy
    if isinstance(plan.value, Path):
        if not _is_head(plan.value):
            adapters["value"] = add_saved(peft_model, plan.value, "value")
        heads["value"] = files.load_scalar_head(plan.value, size, device)
    else:
        if plan.value == "adapter":
            adapters["value"] = _free_name(peft_model, "value")
            peft_model.add_adapter(adapters["value"], files.as_sequence_classifier(peft_model.peft_config[policy]))
        heads["value"] = files.scalar_head(size, device)

    if isinstance(causal_lm.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(sharing.on_the_lm_head("An adapter"))
    peft_model.base_model.set_adapter(policy)
    for name, parameter in peft_model.named_parameters():
        trained = belongs_to(name, policy) or belongs_to(name, adapters["value"])
        parameter.requires_grad_(trained)
        if trained:  # a PeftModel may hold its adapter in half precision, where small steps are rounded away
            parameter.data = parameter.data.to(torch.float32)
    return AssembledRoles(peft_model, adapters, heads, pads, plan.reference is not None)


def _check_kind(model: Any) -> None:
    """Refuse what is no causal language model in memory, whole and as it is.

    Raises:
        TypeError, ValueError: says what it is.
    """
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    compiled = type(causal_lm).__module__.startswith("torch.")
    wrapped = compiled or isinstance(causal_lm, PeftModel)
    if wrapped or not isinstance(causal_lm, (PreTrainedModel, PeftMixedModel)):
        raise TypeError(
            f"The model is of type {type(causal_lm).__name__}{', around another one' if wrapped else ''}: give a model "
            "of AutoModelForCausalLM, or one PeftModel of it."
        )
    if model.get_output_embeddings() is None or causal_lm.config.is_encoder_decoder:
        raise TypeError(
            f"{type(model).__name__} {'has an encoder' if causal_lm.config.is_encoder_decoder else 'has no LM head'}: "
            "give a model of AutoModelForCausalLM."
        )
    if causal_lm.config.return_dict is False:
        raise ValueError("The model's config has return_dict=False, and its outputs are read by name: set it to True.")
    away = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if away is not None:
        raise ValueError(
            f"The weight {away!r} is not in memory, or not where it computes, and all roles need all weights there: "
            "give a device_map that puts none elsewhere, a smaller model, or a quantization_config."
        )


def _policy_and_reference(model: Any, plan: Plan) -> tuple[PeftModel, str, str | None]:
    """The policy is the adapter that `model` has, or that of the plan. Of one that `model` has, a frozen copy is the
    reference: training starts there, so the KL is measured from there."""
    reference, copied = None, plan.reference == "copy"
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        if plan.policy is not None:
            kind = "a PeftModel" if isinstance(model, PeftModel) else "loaded with an adapter"
            raise ValueError(
                f"The model is {kind} already, and a policy adapter was given too: pass the model without its "
                "adapter, or leave the policy out to train the adapter it has."
            )
        peft_model, policy = _with_its_adapter(model)
        copied = copied or plan.reference is None
    elif copied and not isinstance(plan.policy, Path):
        raise ValueError(
            "reference is 'copy', a frozen copy of the adapter that the policy starts from, but the policy starts from "
            "none: leave reference out."
        )
    else:
        policy = _free_name(model, "policy")
        peft_model = _with_policy(model, plan.policy, policy)
    if isinstance(plan.reference, Path):
        reference = add_saved(peft_model, plan.reference, "reference")
    elif copied:
        reference = _frozen_copy(peft_model, policy)
    return peft_model, policy, reference


def _with_its_adapter(model: Any) -> tuple[PeftModel, str]:
    """A model that has adapters, as a PeftModel, and the name of the active one. Where Transformers put an adapter into
    a model that it loaded by the adapter's name, it is taken out and put back by PEFT."""
    if isinstance(model, PeftModel):
        return model, sharing.check_peft_model(model)
    try:
        model.active_adapters()  # those that Transformers knows of
    except ValueError as error:
        raise ValueError(
            f"The {type(model).__name__} has adapters of its own: give the model without them (load it anew, where "
            "a trainer was made of it before), and a saved adapter as policy."
        ) from error
    name = sharing.check_peft_model(model)
    config = copy.deepcopy(model.peft_config[name])
    state = {f"base_model.model.{key}": tensor for key, tensor in model.get_adapter_state_dict(name).items()}
    model.delete_adapter(list(model.peft_config))
    for path, layer in [(path, layer) for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]:
        model.set_submodule(path, layer.get_base_layer())
    peft_model = get_peft_model(model, _for_text(config), adapter_name=name)
    files.put_lora(peft_model, state, name)
    return peft_model, name


def _with_policy(model: Any, policy: LoraConfig | Path | None, name: str) -> PeftModel:
    base_name = model.config.name_or_path
    if not isinstance(policy, Path):
        config = copy.deepcopy(policy or default_lora(model))  # PEFT writes the base's name and layers into it
        if config.target_modules == "all-linear" and config.exclude_modules is None:
            config.exclude_modules = _of_pictures(model) or None
        with files.fits(NEW, base_name, "change it"):
            peft_model = get_peft_model(model, _for_text(config), adapter_name=name)
        sharing.check_config(config, NEW)  # PEFT targets parameters in place of the experts of old
        return peft_model
    with files.fits(f"The adapter in {str(policy)!r}", base_name):
        peft_model = get_peft_model(model, _for_text(files.read_lora_config(policy)), adapter_name=name)
    files.load_weights(peft_model, policy, name)
    return peft_model


def _for_text(config: LoraConfig) -> LoraConfig:
    """The configuration of a trainable adapter of a language model. PEFT freezes an adapter whose configuration says
    inference mode."""
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    return config


def _frozen_copy(model: PeftModel, policy: str) -> str:
    name = _free_name(model, "reference")
    model.add_adapter(name, copy.deepcopy(model.peft_config[policy]))
    source = get_peft_model_state_dict(model, adapter_name=policy, save_embedding_layers=False)
    files.put_lora(model, source, name)
    return name


def add_saved(model: PeftModel, folder: Path, role: str) -> str:
    """Put a saved adapter beside those that `model` has, frozen or not as PEFT has it; returns its name, which is that
    of the role where it is free."""
    causal_lm = model.get_base_model()
    files.warn_if_quantized_otherwise(folder, causal_lm, role)
    config, name = files.read_lora_config(folder), _free_name(model, role)
    with files.fits(f"The adapter in {str(folder)!r}", causal_lm.config.name_or_path):
        writes = role in ("policy", "reference")
        model.add_adapter(name, _for_text(config) if writes else files.as_sequence_classifier(config))
    files.load_weights(model, folder, name)
    return name


def _free_name(model: Any, role: str) -> str:
    """The name of a role's adapter: the role's, unless an adapter or a part of the model is called so."""
    name, taken = role, sharing.names_of_modules(model) | set(getattr(model, "peft_config", ()))
    while name in taken:
        name += "_role"
    return name


def _is_head(value: str | Path) -> bool:
    return isinstance(value, Path) and (value / files.HEAD).is_file() and not (value / files.CONFIG).is_file()
