"""Laying the roles on a base: which adapter and which head each has, and where they are loaded from."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM

from trl_ext.roles import adapters as files
from trl_ext.roles.switching import active_adapter, belongs_to, keep_differentiable


class AssembledRoles(NamedTuple):
    """A base with its roles: the arguments of `SharedBase`."""

    model: PeftModel
    adapters: dict[Any, str | None]
    heads: dict[str, nn.Module]
    reward_pad_token_id: int | None


@dataclass(frozen=True)
class Plan:
    """The arguments of `SharedBase.from_pretrained`, checked as far as that goes without a model."""

    policy: LoraConfig | Path | None
    value: str | Path
    reward: Path | None
    reference: Path | None


def default_lora() -> LoraConfig:
    """LoRA of rank 16 on every linear layer but the LM head."""
    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def plan(policy: Any, value: Any, reward: Any, reference: Any) -> Plan:
    """Check the arguments of `SharedBase.from_pretrained` before anything is loaded.

    Raises:
        FileNotFoundError: a folder is missing or holds no adapter.
        TypeError, ValueError: an argument is of the wrong kind.
    """
    if isinstance(policy, LoraConfig):
        check_policy_config(policy)
    elif policy is not None and not isinstance(policy, (str, Path)):
        raise TypeError(
            f"policy must be a peft.LoraConfig or the folder of a saved adapter, not {type(policy).__name__}."
        )
    return Plan(
        policy=files.check_folder(policy, "policy") if isinstance(policy, (str, Path)) else policy,
        value=value if value in ("adapter", "head") else files.check_folder(value, "value"),
        reward=None if reward is None else files.check_folder(reward, "reward"),
        reference=None if reference is None else files.check_folder(reference, "reference"),
    )


def check_policy_config(config: LoraConfig) -> None:
    """Refuse a LoraConfig whose policy would not share the base's weights.

    Raises:
        ValueError: weights of the base's own that would train, an initialisation that rewrites them, or an adapted LM
            head.
    """
    files.check_initialisation(config.init_lora_weights, "The policy's LoraConfig")
    bias = config.bias if config.bias != "none" else None
    for name, value in {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": bias,
    }.items():
        if value:
            raise ValueError(
                f"The policy's LoraConfig has {name}={value!r}: roles share every full weight, so only LoRA matrices "
                f"can be trained; remove {name}."
            )
    targets = config.target_modules
    if isinstance(targets, (list, set, tuple)) and any(t.split(".")[-1] in ("lm_head", "embed_out") for t in targets):
        raise ValueError(
            "The policy's LoraConfig targets the LM head, whose weight log-probabilities are computed from directly: "
            "the adapter would never train; remove it from target_modules."
        )


def load_base(
    name: str, quantization_config: Any | None, dtype: torch.dtype | str | None, device_map: Any | None, **kwargs: Any
) -> Any:
    """The causal language model itself, frozen."""
    if dtype is None:
        dtype = torch.float32 if quantization_config is None else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, quantization_config=quantization_config, device_map=device_map, **kwargs
    )


def assemble(model: Any, plan: Plan) -> AssembledRoles:
    """Put every role of `plan` on `model` (a PreTrainedModel or a PeftModel)."""
    keep_differentiable(model)
    model.requires_grad_(False)
    peft_model, policy, adapters = _policy_and_reference(model, plan)
    causal_lm = peft_model.get_base_model()
    heads: dict[str, nn.Module] = {}
    device = causal_lm.get_output_embeddings().weight.device
    size = causal_lm.config.get_text_config().hidden_size

    if plan.reward is not None:
        _add_saved(peft_model, plan.reward, "reward")
        adapters["reward"] = "reward"
        heads["reward"] = files.scalar_head(size, device, files.read_score_head(plan.reward)).requires_grad_(False)

    adapters["value"] = policy if plan.value == "head" or _is_head(plan.value) else "value"
    if isinstance(plan.value, Path):
        if adapters["value"] == "value":
            _add_saved(peft_model, plan.value, "value")
        heads["value"] = files.scalar_head(size, device, files.read_score_head(plan.value))
    else:
        if plan.value == "adapter":
            peft_model.add_adapter("value", files.as_sequence_classifier(peft_model.peft_config[policy]))
        heads["value"] = files.scalar_head(size, device)

    peft_model.base_model.set_adapter(policy)
    for name, parameter in peft_model.named_parameters():
        parameter.requires_grad_(belongs_to(name, policy) or belongs_to(name, "value"))
    pad_token_id = None if plan.reward is None else files.read_pad_token_id(plan.reward)
    return AssembledRoles(peft_model, adapters, heads, pad_token_id)


def _policy_and_reference(model: Any, plan: Plan) -> tuple[PeftModel, str, dict[Any, str | None]]:
    reference = None
    if isinstance(model, PeftModel):
        if plan.policy is not None:
            raise ValueError(
                "The model is a PeftModel already, and a policy adapter was given too: pass the model without its "
                "adapter, or leave the policy out to train the adapter it has."
            )
        peft_model, policy = model, active_adapter(model)
        if policy is None:
            raise ValueError(
                "The PeftModel's adapters are disabled: enable the one to train before building the roles."
            )
        check_policy_config(peft_model.peft_config[policy])
        if plan.reference is None:
            reference = _frozen_copy(peft_model, policy)
    else:
        peft_model, policy = _with_policy(model, plan.policy), "policy"
    if plan.reference is not None:
        _add_saved(peft_model, plan.reference, "reference")
        reference = "reference"
    return peft_model, policy, {"policy": policy, "reference": reference}


def _with_policy(model: Any, policy: LoraConfig | Path | None) -> PeftModel:
    if not isinstance(policy, Path):
        config = copy.deepcopy(policy or default_lora())  # PEFT writes the base's name and layers into it
        return get_peft_model(model, _for_text(config), adapter_name="policy")
    base_name = model.config.name_or_path
    files.check_same_base(policy, base_name, "policy")
    config = LoraConfig.from_pretrained(str(policy))
    check_policy_config(config)
    with files.fits(policy, base_name):
        peft_model = get_peft_model(model, _for_text(config), adapter_name="policy")
    files.load_adapter(peft_model, policy, "policy")
    return peft_model


def _for_text(config: LoraConfig) -> LoraConfig:
    """The configuration of a trainable adapter of a language model. PEFT freezes an adapter whose configuration says
    inference mode."""
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    return config


def _frozen_copy(model: PeftModel, policy: str) -> str:
    model.add_adapter("reference", copy.deepcopy(model.peft_config[policy]))
    source = get_peft_model_state_dict(model, adapter_name=policy)
    set_peft_model_state_dict(model, source, adapter_name="reference")
    return "reference"


def _add_saved(model: PeftModel, folder: Path, name: str) -> None:
    causal_lm = model.get_base_model()
    files.check_same_base(folder, causal_lm.config.name_or_path, name)
    files.warn_if_quantized_otherwise(folder, causal_lm, name)
    files.load_adapter(model, folder, name)


def _is_head(value: str | Path) -> bool:
    return isinstance(value, Path) and (value / files.HEAD).is_file()
