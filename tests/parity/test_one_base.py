"""The base is there once: its bytes, its frozen weights, and never the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.helpers import DEVICE, TOLERANCE
from tests.parity import tiny
from trl_ext import SharedBase
from trl_ext.core import logprobs as logprobs_module

VOCABULARY = 16384  # large against everything else in a tiny model


# One base ------------------------------------------------------------------------------------------------------------


def unique_bytes(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def all_tensors(model: torch.nn.Module) -> list[Tensor]:
    """Parameters, buffers, and what bitsandbytes keeps beside a quantised weight."""
    found = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            held = [*vars(state).values(), *(vars(state.state2).values() if state.nested else ())]
            found += [tensor for tensor in held if isinstance(tensor, Tensor)]
    return found


def test_memory_is_unique_storage(home: tiny.Home) -> None:
    sizes = home.base.memory()
    assert sizes["total"] == unique_bytes(all_tensors(home.base))
    assert sizes["base"] == unique_bytes(all_tensors(AutoModelForCausalLM.from_pretrained(home.base_folder)))
    hidden = home.base.config.hidden_size
    adapters = {
        role: 4 * sum(p.numel() for n, p in home.base.named_parameters() if f".{role}." in n and "lora_" in n)
        for role in ("policy", "reference", "value", "reward")
    }
    heads = {"value_head": 4 * hidden, "reward_head": 4 * hidden}
    assert {**adapters, **heads, "base": sizes["base"], "total": sizes["total"]} == sizes
    assert sizes["total"] == sizes["base"] + sum(adapters.values()) + sum(heads.values())


def test_memory_counts_a_shared_trunk_once(llama: tiny.Home) -> None:
    base = SharedBase.from_pretrained(str(llama.base_folder), policy=tiny.new_lora(), value="head")
    sizes = base.memory()
    assert sizes["total"] == unique_bytes(all_tensors(base))
    assert set(sizes) == {"base", "policy", "value_head", "total"}


def test_memory_of_a_quantised_base(llama: tiny.Home) -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = SharedBase.from_pretrained(str(llama.base_folder), quantization_config=config, policy=tiny.new_lora())
    fresh = AutoModelForCausalLM.from_pretrained(llama.base_folder, quantization_config=config, dtype=torch.bfloat16)
    assert base.memory()["base"] == unique_bytes(all_tensors(fresh))
    assert base.memory()["total"] == unique_bytes(all_tensors(base))


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes; views of `known` storages (addresses) do not count."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        sizes = [leaf.numel() for leaf in made if leaf.untyped_storage().data_ptr() not in self.known]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SharedBase:
    """A base whose vocabulary is far larger than anything else in it."""
    folder = tmp_path_factory.mktemp("wide")
    home = tiny.build(folder, tiny.config_of(request.param, tied=True, vocabulary=VOCABULARY, hidden=16))
    return home.base


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_the_size_of_the_logits_is_saved_for_backward(wide: SharedBase, checkpointing: bool) -> None:
    batch = tiny.padded_batch(vocabulary=VOCABULARY)
    parameters = {p.untyped_storage().data_ptr() for p in wide.parameters()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.append(tensor)
        return tensor

    wide.train()
    if checkpointing:
        wide.gradient_checkpointing_enable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            said = wide(*batch.args, roles=("policy", "value"))
            (said["logprobs"].sum() + said["values"].sum()).backward()
    finally:
        wide.gradient_checkpointing_disable()
        wide.zero_grad()
        wide.eval()
    assert saved
    logits = int(batch.real.sum()) * VOCABULARY
    assert not any(VOCABULARY in tensor.shape for tensor in saved)
    assert sum(tensor.numel() for tensor in saved) < logits / 2, "all together stay below one set of logits"


def test_logits_exist_in_tiles_only(wide: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of two rows no tensor of more than two rows of logits is ever made, let alone kept."""
    batch = tiny.padded_batch(vocabulary=VOCABULARY)
    expected = wide.logprobs(*batch.args)
    kind = "cpu" if DEVICE.type == "cpu" else "accelerator"
    monkeypatch.setitem(logprobs_module.TILE_ELEMENTS, kind, 2 * VOCABULARY)
    with _LargestTensor({p.untyped_storage().data_ptr() for p in wide.parameters()}) as watch:
        got = wide.logprobs(*batch.args)
        got.sum().backward()
        wide.score_pass(*batch.args)
    wide.zero_grad()
    torch.testing.assert_close(got, expected, **TOLERANCE)
    assert watch.largest <= 2 * VOCABULARY, "completion positions only, one tile at a time"


# References ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_training_moves_nothing_else(llama: tiny.Home, value: str) -> None:
    """Steps on policy and value leave base, reference and reward as they were, bit by bit."""
    batch = tiny.padded_batch()
    base = SharedBase.from_pretrained(
        str(llama.base_folder),
        policy=tiny.new_lora(),
        value=value,
        reward=llama.reward_folder,
        reference=llama.reference_folder,
    )
    before, said = tiny.clone_state(base), base.score_pass(*batch.args)
    trained = [*base.trainable_parameters("policy"), *base.trainable_parameters("value")]
    assert {id(p) for p in trained} == {id(p) for p in base.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        base.train()
        for role in ("policy", "value"):
            with base.use(role):  # type: ignore[arg-type]
                out = base(*batch.args, roles=(role,))
                (out["logprobs"].sum() if role == "policy" else ((out["values"] - 1) ** 2).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        base.score_pass(*batch.args)
    after, said_after = tiny.clone_state(base), base.score_pass(*batch.args)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    own = {name for name, p in base.named_parameters() if any(p is t for t in trained)}
    assert moved == own
    assert torch.equal(said.ref_logprobs, said_after.ref_logprobs) and torch.equal(said.scores, said_after.scores)
    assert (said.values - said_after.values).abs().max() > 1e-2


def test_memory_counts_a_view_once(llama: tiny.Home) -> None:
    base = llama.again()
    before = base.memory()
    base.causal_lm.register_buffer("view", base.causal_lm.lm_head.weight.data[:3], persistent=False)
    assert base.memory() == before
