"""What is written of the roles, to the letter, and the roles as TRL 1.12 asks for them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.parity import tiny
from tests.parity.test_roles import close
from tests.zoo import configs as zoo
from trl_ext import SharedBase
from trl_ext.roles.aligned import AlignedBatch


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


# Files ---------------------------------------------------------------------------------------------------------------


def test_every_role_is_a_folder_that_peft_reads(llama: tiny.Home, tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    for _ in range(2):  # the second time over the first
        llama.base.save_pretrained(folder)
    for role, task in (
        ("policy", "CAUSAL_LM"),
        ("reference", "CAUSAL_LM"),
        ("value", "SEQ_CLS"),
        ("reward", "SEQ_CLS"),
    ):
        config = config_in(folder / role)
        assert config["inference_mode"] is True
        assert config["task_type"] == task
        assert config["base_model_name_or_path"] == str(llama.base_folder)
        assert config["modules_to_save"] == (["score"] if task == "SEQ_CLS" else None)
        note = json.loads((folder / role / "trl_ext_role.json").read_text(encoding="utf-8"))
        assert note["quantized"] is False
        with safe_open(folder / role / "adapter_model.safetensors", framework="pt") as weights:
            assert any("lora_A" in key for key in weights.keys())  # noqa: SIM118 (not a dict)
            if task == "CAUSAL_LM":
                assert weights.metadata() == {"format": "pt"}


def test_saving_leaves_the_configurations_as_they_were(llama: tiny.Home, tmp_path: Path) -> None:
    before = {name: config.to_dict() for name, config in llama.base.model.peft_config.items()}
    llama.base.save_pretrained(tmp_path)
    assert {name: config.to_dict() for name, config in llama.base.model.peft_config.items()} == before


def test_a_head_alone_is_saved_over_the_one_before(llama: tiny.Home, tmp_path: Path) -> None:
    base = SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora(), value="head")
    folder = tmp_path / "not" / "there"
    for number in (1.0, 2.0):
        torch.nn.init.constant_(base.heads["value"].weight, number)  # type: ignore[arg-type]
        base.save_pretrained(folder)
    assert [path.name for path in (folder / "value").iterdir()] == ["value_head.safetensors"]
    again = SharedBase.from_pretrained(str(llama.base_folder), policy=folder / "policy", value=folder / "value")
    assert again.heads["value"].weight.eq(2.0).all()  # type: ignore[operator]


def test_an_adapter_whose_tokenizer_has_one_token_more_is_taken(llama: tiny.Home, tmp_path: Path) -> None:
    """A pad token of its own, say, where the model's embeddings are wider than the vocabulary."""
    folder = shutil.copytree(llama.reward_folder, tmp_path / "reward")
    content = json.loads((llama.base_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"].append({"id": 99, "content": "<pad of its own>"})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert SharedBase.from_pretrained(str(llama.base_folder), reward=folder).reward_roles


@pytest.mark.parametrize("change", ["vocabulary", "added token"])
def test_an_adapter_with_another_tokenizer_is_refused(change: str, llama: tiny.Home, tmp_path: Path) -> None:
    folder = tmp_path / "reward"
    shutil.copytree(llama.reward_folder, folder)
    content = json.loads((llama.base_folder / "tokenizer.json").read_text(encoding="utf-8"))
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    SharedBase.from_pretrained(str(llama.base_folder), reward=folder)  # the same one
    if change == "vocabulary":
        content["model"]["vocab"] |= {"Änderung": 5, "w5": 500}
    else:
        content.setdefault("added_tokens", []).append({"id": 6, "content": "<new>"})
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"/reward' was saved with another tokenizer than .* has: its ids mean other tokens here, so train it",
    ):
        SharedBase.from_pretrained(str(llama.base_folder), reward=folder)


# Building ------------------------------------------------------------------------------------------------------------


def test_the_default_policy_is_lora_of_rank_16_on_every_linear_layer(llama: tiny.Home) -> None:
    config = SharedBase.from_pretrained(str(llama.base_folder)).model.peft_config["policy"]
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (16, 32, 0.0, "CAUSAL_LM")
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in config.target_modules} == linear  # type: ignore[union-attr]


@torch.no_grad()
def test_roles_over_a_model_in_memory(llama: tiny.Home) -> None:
    batch = tiny.padded_batch()
    model = tiny.AutoModelForCausalLM.from_pretrained(llama.base_folder)
    base = SharedBase.from_model(
        model, policy=tiny.new_lora(r=3), value=llama.saved / "value", reference=llama.reference_folder
    ).eval()
    assert base.model.peft_config["policy"].r == 3
    close(base.values(*batch.args), llama.base.values(*batch.args))
    close(base.logprobs(*batch.args, role="reference"), llama.base.logprobs(*batch.args, role="reference"))


def test_the_frozen_copy_is_of_the_adapter_in_use(llama: tiny.Home) -> None:
    """Though another adapter is there, and though PEFT writes into the configurations it is given."""
    model = tiny.load_policy(llama.reference_folder, trainable=True)
    model.add_adapter("other", tiny.new_lora())
    tiny.randomise(model, seed=9, only=".other.")
    model.set_adapter("other")
    base = SharedBase.from_model(model)
    assert base.adapters["policy"] == "other"
    copied, source = (get_peft_model_state_dict(base.model, adapter_name=name) for name in ("reference", "other"))
    assert copied.keys() == source.keys() and all(torch.equal(copied[key], source[key]) for key in source)
    base.model.peft_config["other"].target_modules.clear()  # type: ignore[union-attr]
    assert base.model.peft_config["reference"].target_modules


def test_recomputation_takes_transformers_arguments(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    base, calls = llama.again(), []
    monkeypatch.setattr(
        base.causal_lm, "activation_checkpointing_enable", lambda *a, **k: calls.append((a, k)), raising=False
    )
    base.activation_checkpointing_enable({"preserve_rng_state": False}, every_n_layers=3, offload=True)
    base.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    base.gradient_checkpointing_enable()
    for ((kwargs,), how), arguments, layers, offload in zip(
        calls, ({"preserve_rng_state": False}, {}, {}), (3, 2, 1), (True, False, False), strict=True
    ):
        assert kwargs.pop("context_fn") is not None
        assert kwargs == {**arguments, "use_reentrant": False}
        assert how == {"every_n_layers": layers, "offload": offload}
    message = (
        "gradient_checkpointing_kwargs={'use_reentrant': True} recomputes under the wrong adapter when roles share a "
        "base: leave use_reentrant out or set it to False."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        base.activation_checkpointing_enable({"use_reentrant": True})


# Suffixes ------------------------------------------------------------------------------------------------------------


def test_what_a_template_writes_after_an_answer_is_appended_where_it_belongs() -> None:
    ids, mask = torch.tensor([[9, 5, 6, 7], [5, 6, 7, 8], [5, 9, 9, 9]]), torch.ones(3, 4, dtype=torch.long)
    mask[0, 0] = mask[2, 1] = mask[2, 2] = mask[2, 3] = 0
    batch = AlignedBatch.of(ids, mask, 2)
    longer = batch.extended([3, 4], torch.tensor([True, False, True]))
    # What is left of padding holds the row's first token.
    assert longer.ids.tolist() == [[5, 6, 7, 3, 4], [5, 6, 7, 8, 0], [5, 3, 4, 5, 0]]
    assert longer.last.tolist() == [4, 3, 2]
    shorter = batch.extended([3], torch.tensor([True, False, True]))
    assert shorter.ids.tolist() == [[5, 6, 7, 3], [5, 6, 7, 8], [5, 3, 5, 5]]
    assert shorter.last.tolist() == [3, 3, 1]
    for other in (longer, shorter):  # what is predicted stays
        for name in ("completion", "row", "before", "targets"):
            assert getattr(other, name) is getattr(batch, name)
    assert batch.extended([], torch.tensor([True] * 3)) is batch
    assert batch.extended([3], torch.tensor([False] * 3)) is batch


# TRL 1.12's PPOTrainer ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_views_say_what_the_roles_say(llama: tiny.Home) -> None:
    """A backbone under `base_model_prefix`, and `score` on its hidden states: so TRL's `get_reward` reads models."""
    batch = tiny.padded_batch("right")
    policy, value, reward = llama.base.as_trl_models()
    assert policy is llama.base.model
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    for view, role in ((value, "value"), (reward, "reward")):
        assert view.config is llama.base.config
        hidden = getattr(view, view.base_model_prefix)(**inputs).last_hidden_state
        read = view.score(hidden.double()).squeeze(-1)
        assert read.dtype == torch.float32
        if role == "value":
            close(read[:, :-1] * batch.real, llama.base.values(*batch.args))
        else:
            last = batch.mask.sum(dim=1) - 1
            close(read[torch.arange(len(last)), last], llama.base.scores(batch.ids, batch.mask))
    assert not list(value.trunk.parameters())  # the base's are the policy's


def test_the_value_view_can_be_trained_after_peft_froze_it(llama: tiny.Home) -> None:
    base = llama.again()
    _, value, reward = base.as_trl_models()
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    batch = tiny.padded_batch("right")
    reward.trunk(input_ids=batch.ids, attention_mask=batch.mask)
    assert not any(p.requires_grad for p in base.parameters())
    with torch.no_grad():
        value.trunk(input_ids=batch.ids, attention_mask=batch.mask)
    assert not any(p.requires_grad for p in base.parameters())
    value.trunk(input_ids=batch.ids, attention_mask=batch.mask)
    assert all(p.requires_grad for p in base.trainable_parameters("value"))


def test_without_a_reward_role_there_are_no_views(llama: tiny.Home) -> None:
    base = SharedBase.from_pretrained(str(llama.base_folder))
    message = "This base has no reward role: build it with reward=<folder of a reward adapter>."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        base.as_trl_models()


def test_layers_whose_names_hold_an_older_name_keep_their_weights(tmp_path: Path) -> None:
    """In Laguna's old checkpoints Transformers reads `shared_expert` as `shared_experts`. PEFT renames today's layers
    of a saved adapter once more, and loses them."""
    tiny.save_base(tmp_path / "base", zoo.config_of("laguna"))
    policy = tiny.save_policy_adapter(tmp_path / "policy", tmp_path / "base", seed=1)
    alone = load_file(policy / "adapter_model.safetensors")
    assert any("shared_experts" in name for name in alone)
    base = SharedBase.from_pretrained(str(tmp_path / "base"), policy=policy)
    base.save_roles(tmp_path / "checkpoint", "")
    tiny.randomise(base, seed=2)
    base.load_trained_roles(tmp_path / "checkpoint")
    base.save_pretrained(tmp_path / "again")
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny.new_lora())
    tiny.randomise(trained, seed=1)  # as `save_policy_adapter` does
    SharedBase.from_model(trained).save_pretrained(tmp_path / "copied")
    for folder in ("again/policy", "copied/policy", "copied/reference"):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert saved.keys() == alone.keys() and all(torch.equal(saved[name], alone[name]) for name in alone)
