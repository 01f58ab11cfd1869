"""Writing roles to disk and reading the trained ones back in place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from trl_ext.roles import adapters as files

if TYPE_CHECKING:
    from trl_ext.roles.base import SharedBase


def save_roles(base: SharedBase, folder: Path, policy_folder: str) -> None:
    """Write every role of `base` below `folder`: the policy into `policy_folder` ("" for `folder` itself), value,
    reward and reference into folders of their names."""
    _save_plain(base, base.adapters["policy"], folder / policy_folder)
    value, value_head = folder / "value", cast(nn.Linear, base.heads["value"])
    if base.adapters["value"] == base.adapters["policy"]:
        value.mkdir(exist_ok=True)
        save_file({"score.weight": value_head.weight.detach().cpu().contiguous()}, value / files.HEAD)
    else:
        files.save_scored_adapter(base.model, str(base.adapters["value"]), value_head, value)
    if base.has_role("reward"):
        head, pad_token_id = cast(nn.Linear, base.heads["reward"]), base.reward_pad_token_id
        files.save_scored_adapter(base.model, "reward", head, folder / "reward", pad_token_id=pad_token_id)
    if base.adapters["reference"] is not None:
        _save_plain(base, base.adapters["reference"], folder / "reference")


@torch.no_grad()
def load_trained_roles(base: SharedBase, folder: Path) -> None:
    """Put the policy and value weights that `save_roles(base, folder, "")` wrote back into `base`, in place.

    Raises:
        FileNotFoundError: a file is missing.
    """
    for role, part in (("policy", folder), ("value", folder / "value")):
        own_adapter = role == "policy" or base.adapters["value"] != base.adapters["policy"]
        file = part / (files.WEIGHTS if own_adapter else files.HEAD)
        if not file.is_file():
            raise FileNotFoundError(f"{str(file)!r} is missing: this checkpoint does not hold the {role} role.")
        if own_adapter:
            state = {key: tensor for key, tensor in load_file(file).items() if "lora_" in key}
            set_peft_model_state_dict(base.model, state, adapter_name=str(base.adapters[role]))  # type: ignore[index]
        if role == "value":
            base.heads["value"].weight.copy_(files.read_score_head(part))  # type: ignore[operator]


def _save_plain(base: SharedBase, adapter: str | None, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(base.model, adapter_name=str(adapter))
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / files.WEIGHTS, {"format": "pt"})
    config = base.model.peft_config[str(adapter)]
    before = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, base.config.name_or_path
    config.save_pretrained(str(folder))
    config.inference_mode, config.base_model_name_or_path = before
    files.write_note(folder, base.causal_lm)
