"""Four roles on one base say what each adapter says alone on its own copy, and nothing else changes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.helpers import TOLERANCE
from tests.parity import tiny
from trl_ext import SharedBase
from trl_ext.roles.switching import AdapterModules, belongs_to


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, **TOLERANCE)


def different(got: Tensor, other: Tensor) -> None:
    assert (got - other).abs().max() > 1e-2, "the two should differ: an adapter does nothing"


# Isolation -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_policy_and_reference_alone(home: tiny.Home) -> None:
    batch = tiny.padded_batch()
    got = {role: home.base.logprobs(*batch.args, role=role, temperature=0.7) for role in ("policy", "reference")}
    close(got["policy"], tiny.plain_logprobs(tiny.load_policy(home.saved / "policy"), batch, 0.7))
    close(got["reference"], tiny.plain_logprobs(tiny.load_policy(home.reference_folder), batch, 0.7))
    close(got["reference"], tiny.plain_logprobs(tiny.load_policy(home.saved / "reference"), batch, 0.7))
    different(got["policy"], got["reference"])


@torch.no_grad()
def test_bare_reference_alone(home: tiny.Home) -> None:
    batch = tiny.padded_batch()
    base = SharedBase.from_pretrained(
        str(home.base_folder), policy=home.saved / "policy", value=home.saved / "value"
    ).eval()
    bare = AutoModelForCausalLM.from_pretrained(home.base_folder)
    close(base.logprobs(*batch.args, role="reference"), tiny.plain_logprobs(bare, batch))
    passed = base.score_pass(*batch.args)
    close(passed.ref_logprobs, tiny.plain_logprobs(bare, batch))
    assert passed.scores.isnan().all()
    # The saved policy and value roles came back.
    close(base.logprobs(*batch.args), home.base.logprobs(*batch.args))
    close(passed.values, home.base.values(*batch.args))
    different(passed.ref_logprobs, home.base.logprobs(*batch.args))


@torch.no_grad()
def test_value_alone(home: tiny.Home) -> None:
    batch = tiny.padded_batch()
    alone = tiny.plain_values(tiny.load_classifier(home.saved / "value", home.base_folder), batch)
    close(home.base.values(*batch.args), alone)
    assert alone[batch.real].std() > 1e-2


@torch.no_grad()
def test_reward_alone(home: tiny.Home) -> None:
    batch = tiny.padded_batch()
    got = home.base.scores(batch.ids, batch.mask)
    for folder in (home.reward_folder, home.saved / "reward"):
        close(got, tiny.plain_scores(tiny.load_classifier(folder, home.base_folder), batch))
    assert got.std() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("layout", tiny.LAYOUTS)
@pytest.mark.parametrize("extra", [0, 3])
def test_padding_does_not_matter(home: tiny.Home, layout: str, extra: int) -> None:
    """Whatever the layout, each token gets what its row gets alone, without any padding; padding gets 0."""
    plain = tiny.padded_batch()
    batch = tiny.padded_batch(layout, extra)
    assert not torch.equal(batch.ids, plain.ids) or (layout == "rollout" and extra == 0)
    outputs = home.base(*batch.args, roles=("policy", "reference", "value", "reward"))
    alone: dict[str, list[Tensor]] = {name: [] for name in outputs}
    for row, prompt, answer in zip(range(len(batch.ids)), tiny.PROMPTS, tiny.COMPLETIONS, strict=True):
        ids = batch.ids[row][batch.mask[row].bool()].unsqueeze(0)
        assert ids.shape[1] == prompt + answer
        one = home.base(ids, torch.ones_like(ids), answer, roles=("policy", "reference", "value", "reward"))
        for name, value in one.items():
            alone[name].append(value.flatten())
    for name, value in outputs.items():
        close(value if name == "scores" else tiny.answers(batch, value), torch.cat(alone[name]))
        assert name == "scores" or bool((value[~batch.real] == 0).all())


@torch.no_grad()
def test_one_pass_equals_separate_calls(home: tiny.Home) -> None:
    batch = tiny.padded_batch()
    separate = (
        home.base.logprobs(*batch.args, role="reference", temperature=0.7),
        home.base.values(*batch.args),
        home.base.scores(batch.ids, batch.mask),
    )
    for got, expected in zip(home.base.score_pass(*batch.args, temperature=0.7), separate, strict=True):
        close(got, expected)
    everyone = home.base(*batch.args, roles=("policy", "reference", "value", "reward"), temperature=0.7)
    close(everyone["logprobs"], home.base.logprobs(*batch.args, temperature=0.7))
    for name, expected in zip(("ref_logprobs", "values", "scores"), separate, strict=True):
        close(everyone[name], expected)


@torch.no_grad()
def test_rows_do_not_matter_to_each_other(home: tiny.Home) -> None:
    """Any mixture of rows, in any order, also one row twice, says of each row what the whole batch says of it."""
    batch = tiny.padded_batch()
    together = home.base(*batch.args, roles=("policy", "reference", "value", "reward"))
    for index in ([4, 2, 0, 1, 3], [1], [3, 3, 0], [2, 4]):
        part = home.base(*batch.rows(index).args, roles=("reward", "value", "reference", "policy"))
        for name, value in part.items():
            close(value, together[name][index])


@torch.no_grad()
def test_gradients_do_not_change_what_is_said(home: tiny.Home) -> None:
    """With gradients each role has its own forward, without them all share one: the same numbers."""
    batch = tiny.padded_batch()
    roles = ("policy", "reference", "value", "reward")
    without = home.base(*batch.args, roles=roles)
    with torch.enable_grad():
        outputs = home.base(*batch.args, roles=roles)
    for name, value in outputs.items():
        close(value.detach(), without[name])
    close(home.base.train()(*batch.args, roles=roles)["values"], without["values"])
    home.base.eval()


@torch.no_grad()
def test_a_head_on_the_policys_trunk(home: tiny.Home, tmp_path: Path) -> None:
    """value="head": the policy's trunk and a scalar head, alone and after saving."""
    batch = tiny.padded_batch()
    base = SharedBase.from_pretrained(str(home.base_folder), policy=home.saved / "policy", value="head").eval()
    assert not base.values(*batch.args).any(), "a new head starts at 0"
    assert base.trainable_parameters("value") == list(base.heads["value"].parameters())
    tiny.randomise(base, seed=5, only="heads.value.")
    head = base.heads["value"].weight
    expected = tiny.plain_head_values(tiny.load_policy(home.saved / "policy"), head, batch)
    close(base.values(*batch.args), expected)
    close(base.score_pass(*batch.args).values, expected)
    assert expected[batch.real].std() > 1e-2

    base.save_pretrained(tmp_path)
    again = SharedBase.from_pretrained(
        str(home.base_folder), policy=tmp_path / "policy", value=tmp_path / "value"
    ).eval()
    assert again.adapters["value"] == again.adapters["policy"] == "policy"
    close(again.values(*batch.args), expected)


@torch.no_grad()
def test_value_starts_at_zero_or_where_it_is_told(home: tiny.Home) -> None:
    batch = tiny.padded_batch()
    fresh = SharedBase.from_pretrained(str(home.base_folder), policy=tiny.new_lora()).eval()
    assert not fresh.values(*batch.args).any()
    from_reward = SharedBase.from_pretrained(
        str(home.base_folder), policy=tiny.new_lora(), value=home.reward_folder
    ).eval()
    close(
        from_reward.values(*batch.args),
        tiny.plain_values(tiny.load_classifier(home.reward_folder, home.base_folder), batch),
    )
    trainable = {id(parameter) for parameter in from_reward.trainable_parameters("value")}
    named = dict(from_reward.named_parameters())
    assert trainable == {id(p) for name, p in named.items() if ".value." in name}
    assert all(p.requires_grad for name, p in named.items() if ".value." in name or ".policy." in name)


# use() ---------------------------------------------------------------------------------------------------------------


def everything(base: SharedBase) -> tuple[Any, ...]:
    """Every active adapter, requires_grad and train/eval flag."""
    layers = [
        (name, module.active_adapters, module.disable_adapters)
        for name, module in base.named_modules()
        if hasattr(module, "lora_A")
    ]
    wrappers = (base.model.active_adapter, base.model.active_adapters)
    flags = [(name, parameter.requires_grad) for name, parameter in base.named_parameters()]
    modes = [(name, module.training) for name, module in base.named_modules()]
    return layers, wrappers, flags, modes


def odd_state(base: SharedBase) -> None:
    """A mixture of flags that no call would leave behind by chance."""
    base.train()
    list(base.modules())[7].training = False
    for i, parameter in enumerate(base.parameters()):
        parameter.requires_grad_(i % 3 == 0)


@pytest.mark.parametrize("role", ["policy", "reference", "value", "reward"])
@pytest.mark.parametrize("raises", [False, True])
def test_use_restores_everything(llama: tiny.Home, role: Any, raises: bool) -> None:
    base = llama.again()
    odd_state(base)
    before = everything(base)
    try:
        with base.use(role) as inside:
            assert inside is base
            assert base.model.active_adapter == role
            flags_inside = everything(base)
            base.model.set_adapter("value")
            base.model.base_model.disable_adapter_layers()
            base.eval()
            base.requires_grad_(True)
            if raises:
                raise KeyError("in the body")
    except KeyError:
        assert raises
    assert everything(base) == before
    assert flags_inside[2:] == before[2:], "switching the role alone touches neither requires_grad nor modes"


def test_use_nests(llama: tiny.Home) -> None:
    base, batch = llama.base, tiny.padded_batch()
    before = everything(base)
    with base.use("reward"):
        in_reward = everything(base)
        with base.use("value"), torch.no_grad():
            base.score_pass(*batch.args)
            base.logprobs(*batch.args, role="policy")
        assert everything(base) == in_reward
    assert everything(base) == before


@torch.no_grad()
def test_use_lets_the_role_speak(llama: tiny.Home) -> None:
    """A bare forward inside `use` runs under that role's adapter, also the bare base's."""
    batch = tiny.padded_batch()
    base = SharedBase.from_pretrained(str(llama.base_folder), policy=llama.saved / "policy").eval()
    expected = {
        "policy": tiny.load_policy(llama.saved / "policy"),
        "reference": AutoModelForCausalLM.from_pretrained(llama.base_folder),
    }
    for role, model in expected.items():
        with base.use(role):  # type: ignore[arg-type]
            close(tiny.plain_logits(base.model, batch), tiny.plain_logits(model, batch))


@torch.no_grad()
@pytest.mark.parametrize("role", ["reference", "value"])
def test_one_forward_for_all_whoever_spoke_before(llama: tiny.Home, role: Any) -> None:
    """Few rows in float32 share a forward; PEFT gives none of them its adapter where adapters are off."""
    base, batch = SharedBase.from_pretrained(str(llama.base_folder), policy=llama.saved / "policy"), tiny.padded_batch()
    tiny.randomise(base, 5, only=".value.")
    expected = base.score_pass(*batch.args)
    with base.use(role):
        got = base.score_pass(*batch.args)
    close(got.values, expected.values)
    close(got.ref_logprobs, expected.ref_logprobs)
    assert expected.values.std() > 1e-3


@torch.no_grad()
def test_a_forward_that_fails_leaves_no_hooks_behind(llama: tiny.Home, monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch = llama.again(), tiny.padded_batch()
    before, expected = everything(base), base.score_pass(*batch.args)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(base.causal_lm.base_model.layers[1].mlp, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            base.score_pass(*batch.args)
    assert everything(base) == before
    assert not any(layer._forward_pre_hooks for layer in AdapterModules.of(base).layers)
    for got, was in zip(base.score_pass(*batch.args), expected, strict=True):
        close(got, was)


def test_an_adapter_that_comes_later_is_switched_and_restored_too(llama: tiny.Home) -> None:
    """What a switch looks through is found once; moving a model makes new parameters, adding an adapter new layers."""
    base = llama.again()
    with base.use("value"):
        pass
    base.model.add_adapter("late", tiny.new_lora())
    layer: Any = AdapterModules.of(base.model).layers[0].get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    before = everything(base)
    with base.use("value"):
        base.requires_grad_(True)
        base.train()
    assert everything(base) == before
    assert any(".late." in name for name, _ in base.named_parameters())


def test_nothing_keeps_a_base_alive(llama: tiny.Home) -> None:
    base = llama.again()
    with base.use("value"):
        alive = weakref.ref(base.causal_lm)
    del base
    gc.collect()
    assert alive() is None


def test_calls_leave_no_trace(llama: tiny.Home) -> None:
    base, batch = llama.again(), tiny.padded_batch()
    odd_state(base)
    before = everything(base)
    base.score_pass(*batch.args)
    base.logprobs(*batch.args, role="reference")
    base.values(*batch.args)
    base.scores(batch.ids, batch.mask)
    base.generate(input_ids=batch.ids[:, :8], attention_mask=batch.mask[:, :8], max_new_tokens=2, do_sample=False)
    base.memory()
    assert everything(base) == before


def test_unknown_and_missing_roles(llama: tiny.Home) -> None:
    batch = tiny.padded_batch()
    base = SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora())
    message = "Unknown role 'critic': choose one of policy, reference, value, reward"
    with pytest.raises(ValueError, match=message), base.use("critic"):  # type: ignore[arg-type]
        pass
    with pytest.raises(ValueError, match="no reward role"), base.use("reward"):
        pass
    with pytest.raises(ValueError, match="no reward role"):
        base.scores(batch.ids, batch.mask)


@torch.no_grad()
def test_a_trained_adapter_becomes_policy_and_frozen_reference(llama: tiny.Home) -> None:
    """A PeftModel's adapter goes on training; a copy of it, not the bare base, is what the KL is measured from."""
    batch = tiny.padded_batch()
    alone = tiny.plain_logprobs(tiny.load_policy(llama.reference_folder), batch)
    model = tiny.load_policy(llama.reference_folder, trainable=True)
    base = SharedBase.from_model(model).eval()
    close(base.logprobs(*batch.args), alone)
    close(base.logprobs(*batch.args, role="reference"), alone)
    for parameter in base.trainable_parameters("policy"):
        assert parameter.requires_grad
        parameter.add_(0.1)
    different(base.logprobs(*batch.args), alone)
    close(base.score_pass(*batch.args).ref_logprobs, alone)


@torch.no_grad()
def test_lora_on_embeddings(llama: tiny.Home, tmp_path: Path) -> None:
    """Embeddings may have LoRA too, also where one forward serves several adapters."""
    batch, targets = tiny.padded_batch(), ["embed_tokens", "q_proj"]
    base = SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora(target_modules=targets)).eval()
    tiny.randomise(base, seed=3, only="policy")
    tiny.randomise(base, seed=4, only="lora_embedding_A.value")
    tiny.randomise(base, seed=5, only=".value.")
    base.save_pretrained(tmp_path)
    close(base.logprobs(*batch.args), tiny.plain_logprobs(tiny.load_policy(tmp_path / "policy"), batch))
    alone = tiny.plain_values(tiny.load_classifier(tmp_path / "value", llama.base_folder), batch)
    close(base.values(*batch.args), alone)
    close(base.score_pass(*batch.args).values, alone)
    trained = [*base.trainable_parameters("policy"), *base.trainable_parameters("value")]
    assert {id(p) for p in trained} == {id(p) for p in base.parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * (1 + 2) + 1
    assert base.memory()["policy"] == 4 * 4 * ((tiny.VOCABULARY + 32) + 2 * (32 + 32))


def test_whose_parameter_it_is() -> None:
    """A model's own layer may bear a role's name."""
    assert belongs_to("model.layers.0.value.lora_A.policy.weight", "policy")
    assert not belongs_to("model.layers.0.value.lora_A.policy.weight", "value")
    assert belongs_to("model.embed_tokens.lora_embedding_B.value", "value")
    assert not belongs_to("model.layers.0.value.weight", "value")
    assert not belongs_to("model.layers.0.q_proj.lora_A.policy_2.weight", "policy")
