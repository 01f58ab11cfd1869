"""How roles share a forward: who travels together, what each reads, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from tests.helpers import DEVICE
from tests.parity import tiny
from tests.parity.test_roles import close, different
from trl_ext import SharedBase
from trl_ext.roles.adapters import as_sequence_classifier
from trl_ext.roles.aligned import AlignedBatch
from trl_ext.roles.switching import active_adapter


@contextmanager
def forwards(base: SharedBase) -> Iterator[list[int]]:
    """Rows of each forward over the base."""
    rows: list[int] = []
    embeddings = base.causal_lm.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        hook.remove()


# Together or one after the other -------------------------------------------------------------------------------------


def test_without_gradients_adapters_share_a_forward(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, base = tiny.padded_batch(), llama.base
    with forwards(base) as rows:
        with torch.no_grad():
            base(*batch.args, roles=("policy",))
            base(*batch.args, roles=("policy", "value"))
            base(*batch.args, roles=("reference", "value", "reward"))
        base(*batch.args, roles=("policy", "value"))
        monkeypatch.setattr(base.path, "mixes", False)
        with torch.no_grad():
            base(*batch.args, roles=("policy", "value"))
    assert rows == [5, 10, 15, 5, 5, 5, 5]


@pytest.mark.parametrize(
    ("loaded", "together"),
    [
        ({}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, True),
    ],
    ids=["float32", "bfloat16", "4 bits"],
)
@pytest.mark.filterwarnings("ignore:.*quantised.*:UserWarning")
@torch.no_grad()
def test_many_rows_share_a_forward_over_a_quantised_base_only(
    loaded: dict[str, Any], together: bool, llama: tiny.Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in half precision what a role says does not depend on who speaks beside it, to the bit.

    On a GPU fifteen rows have another kernel than five, which rounds otherwise."""
    monkeypatch.setattr("trl_ext.roles.adapted.MIXED_TOKENS", 0 if "dtype" not in loaded else 10**9)
    batch, base = tiny.padded_batch(), llama.again(**loaded).eval()
    with forwards(base) as rows:
        beside = base(*batch.args, roles=("policy", "value", "reward"))
    assert rows == ([15] if together else [5, 5, 5])
    for role, name in (("policy", "logprobs"), ("value", "values"), ("reward", "scores")):
        alone = base(*batch.args, roles=(role,))[name]
        if together and DEVICE.type != "cpu":
            torch.testing.assert_close(beside[name], alone, rtol=0.05, atol=0.05)
        else:
            assert torch.equal(beside[name], alone)


@torch.no_grad()
def test_what_is_not_asked_for_is_plain(llama: tiny.Home) -> None:
    batch, base = tiny.padded_batch(), llama.base
    outputs = base(*batch.args)
    assert outputs.keys() == {"logprobs", "entropy"}
    close(outputs["logprobs"], base.logprobs(*batch.args, temperature=1.0))
    different(outputs["logprobs"], base.logprobs(*batch.args, temperature=2.0))
    both = base(*batch.args, roles=("policy", "reference"))
    assert both.keys() == {"logprobs", "entropy", "ref_logprobs"}
    close(both["entropy"], outputs["entropy"])
    assert base(*batch.args, roles=("reference",)).keys() == {"ref_logprobs"}


def test_the_entropy_carries_a_gradient_when_asked(llama: tiny.Home) -> None:
    batch, base = tiny.padded_batch(), llama.base
    with base.use("policy"):
        assert base(*batch.args)["logprobs"].requires_grad
        assert not base(*batch.args)["entropy"].requires_grad
        assert base(*batch.args, entropy_grad=True)["entropy"].requires_grad


# What the reward role reads ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("roles", [("reward",), ("policy", "reward")])
def test_the_reward_role_alone_reads_what_the_template_writes(llama: tiny.Home, roles: Any) -> None:
    batch, base, suffix = tiny.padded_batch("right"), llama.base, [7, 8]
    where = torch.tensor([True, False, True, True, False], device=DEVICE)
    outputs = base(*batch.args, roles=roles, reward_suffix_ids=suffix, reward_suffix_rows=where)
    for row in range(5):
        ids = batch.ids[row][batch.mask[row].bool()].tolist() + (suffix if where[row] else [])
        alone = torch.tensor([ids], device=DEVICE)
        close(outputs["scores"][row : row + 1], base.scores(alone, torch.ones_like(alone)))
    if "policy" in roles:
        close(outputs["logprobs"], base.logprobs(*batch.args))


@torch.no_grad()
def test_a_head_reads_float32_whatever_the_trunk_says(llama: tiny.Home) -> None:
    hidden = torch.randn(2, 32, dtype=torch.bfloat16, device=DEVICE)
    read = llama.base._read_head("value", hidden)
    assert read.shape == (2,) and read.dtype == torch.float32
    close(read, hidden.float() @ llama.base.heads["value"].weight.flatten())  # type: ignore[operator]


def test_one_row_without_a_token_is_named() -> None:
    mask = torch.tensor([[1, 1], [0, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"^Row 1 of attention_mask has no real token"):
        AlignedBatch.of(torch.ones(3, 2, dtype=torch.long), mask, 1)


def test_a_rows_first_token_is_predicted_by_nothing() -> None:
    ids, mask = torch.tensor([[5, 6, 7], [9, 9, 8]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    batch = AlignedBatch.of(ids, mask, 3)  # all columns are completion
    assert batch.completion.tolist() == [[False, True, True], [False, False, False]]
    assert batch.targets.tolist() == [6, 7] and batch.before.tolist() == [0, 1]


# Switching -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_roles_inside_the_bare_base(llama: tiny.Home) -> None:
    batch = tiny.padded_batch()
    base = llama.again(reference=None).eval()
    policy, bare = base.logprobs(*batch.args), base.logprobs(*batch.args, role="reference")
    different(policy, bare)
    with base.use("reference"):
        assert active_adapter(base.model) is None
        close(base.logprobs(*batch.args), bare)
        close(base.logprobs(*batch.args, role="policy"), policy)
        with base.use("policy"):
            assert active_adapter(base.model) == "policy"
            close(
                base.causal_lm(input_ids=batch.ids[3:4, -5:]).logits,
                tiny.load_policy(llama.saved / "policy")(input_ids=batch.ids[3:4, -5:]).logits,
            )
        close(base.logprobs(*batch.args, role="reference"), bare)
    assert active_adapter(base.model) == "policy"


# Configurations ------------------------------------------------------------------------------------------------------


def test_a_value_role_has_the_policys_lora(llama: tiny.Home) -> None:
    policy = tiny.new_lora(r=3, lora_alpha=5, target_modules=["q_proj"], use_rslora=True)
    policy.modules_to_save, policy.inference_mode, policy.auto_mapping = ["lm_head"], True, {"base": "other"}
    value = as_sequence_classifier(policy)
    assert (value.r, value.lora_alpha, value.use_rslora) == (3, 5, True)
    assert value.target_modules == {"q_proj"} and value.target_modules is not policy.target_modules
    assert (value.task_type, value.modules_to_save, value.inference_mode) == ("SEQ_CLS", None, False)
    assert value.auto_mapping is None and str(value.peft_type) == str(policy.peft_type)
    assert (policy.task_type, policy.inference_mode) == ("CAUSAL_LM", True)


def test_the_note_says_that_the_base_was_quantised(llama: tiny.Home, tmp_path: Path) -> None:
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora(), quantization_config=nf4)
    base.save_pretrained(tmp_path)
    for role in ("policy", "value"):
        assert json.loads((tmp_path / role / "trl_ext_role.json").read_text())["quantized"] is True


def test_padding_holds_a_real_token() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert AlignedBatch.of(ids, mask, 2).ids.tolist() == [[5, 6, 7], [8, 9, 8]]


def test_padding_leaves_gradients_finite(llama: tiny.Home) -> None:
    """A padding token is embedded as zeros; a norm by the square root of a sum of squares (Gemma 3n's) has no gradient
    there."""
    base, batch = llama.again(), tiny.padded_batch()
    base.causal_lm.get_input_embeddings().weight.data[tiny.PAD] = 0.0
    first: Any = base.causal_lm.base_model.layers[0]
    first.register_forward_pre_hook(
        lambda module, inputs: (inputs[0] / inputs[0].pow(2).sum(-1, keepdim=True).sqrt(), *inputs[1:])
    )
    base.packs = False
    first.self_attn.q_proj.base_layer.weight.requires_grad_(True)
    base.causal_lm.get_input_embeddings().weight.requires_grad_(True)
    base.logprobs(*batch.args).sum().backward()
    for parameter in base.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
