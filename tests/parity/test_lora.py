"""The adapters' path against PEFT's own forward of the same layers, computed in float64."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, OPTConfig, PhiConfig

from tests.helpers import DEVICE
from tests.parity import tiny
from trl_ext import SharedBase
from trl_ext.roles import lora
from trl_ext.roles.lora import CannotMixError

Outputs = dict[str, Tensor]


@contextmanager
def pefts_own(base: nn.Module) -> Iterator[int]:
    """PEFT's forwards inside; how many layers had another."""
    lean = {module: vars(module).pop("forward") for module in base.modules() if "forward" in vars(module)}
    try:
        yield len(lean)
    finally:
        for module, forward in lean.items():
            module.forward = forward  # type: ignore[method-assign]


def built(config: Any, dtype: torch.dtype = torch.float64, **changes: Any) -> SharedBase:
    """Roles over a random model, every adapter and head random. (Heads and log-softmax stay in float32.)"""
    torch.manual_seed(0)
    base = SharedBase.from_model(AutoModelForCausalLM.from_config(config).to(DEVICE), tiny.new_lora(**changes))
    tiny.randomise(base, seed=1)
    base.model.to(dtype)
    return base


def passed(base: SharedBase) -> Outputs:
    """What policy and value say and the gradients of all that trains, by name."""
    base.zero_grad()
    torch.manual_seed(2)  # of dropout
    batch = tiny.padded_batch()
    outputs = {}
    for role in ("policy", "value"):
        with base.use(role):
            said = base(*batch.args, roles=(role,))
            sum(part.square().sum() for part in said.values() if part.requires_grad).backward()  # type: ignore[union-attr]
        outputs |= {name: part.detach() for name, part in said.items()}
    return outputs | {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}


def close(got: Outputs, expected: Outputs, tolerance: float = 1e-6) -> None:
    """The same names, each within `tolerance` of its norm."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((got[name] - tensor).norm()) <= tolerance * float(tensor.norm()), name


FAMILIES: dict[str, Callable[[], Any]] = {
    **{family: lambda family=family: tiny.config_of(family) for family in tiny.FAMILIES},
    "opt": lambda: OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0,
    ),
    "phi": lambda: PhiConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, resid_pdrop=0.0
    ),
    "mixtral": lambda: MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    ),
}  # fmt: skip
PRECISE = {"mixtral": torch.float32}  # its experts know no float64
LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "ranks of their own": {"rank_pattern": {"k_proj": 2, "up_proj": 8}, "alpha_pattern": {"q_proj": 3}},
    "dropout": {"lora_dropout": 0.4},
    "some layers": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_peft_computes(family: str) -> None:
    base = built(FAMILIES[family](), dtype=PRECISE.get(family, torch.float64))
    got = passed(base)
    with pefts_own(base) as layers:
        assert layers >= 8
        close(got, passed(base), tolerance=1e-5 if family in PRECISE else 1e-6)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("changes", LORAS.values(), ids=LORAS)
def test_every_plain_lora_computes_what_peft_computes(changes: dict[str, Any], recomputed: bool) -> None:
    base = built(tiny.config_of("llama"), **changes)
    if recomputed:
        base.gradient_checkpointing_enable()
    base.train()
    got = passed(base)
    with pefts_own(base):
        close(got, passed(base))
    if "lora_dropout" in changes:
        base.eval()
        assert not torch.equal(got["logprobs"], passed(base)["logprobs"])


def test_layers_that_read_one_input_share_a_product(llama: tiny.Home) -> None:
    sizes = Counter(len(module.forward.shared.layers) for module in llama.base.modules() if "forward" in vars(module))
    assert sizes == {3: 6, 2: 4, 1: 4}  # q, k, v; gate, up; o and down; two blocks


def test_adapters_may_lie_on_other_layers_than_each_other(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base", tiny.config_of("llama"))
    reference = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["k_proj", "gate_proj"])
    )
    tiny.randomise(reference, seed=5)
    reference.save_pretrained(tmp_path / "reference")
    base = SharedBase.from_pretrained(
        str(folder), policy=tiny.new_lora(target_modules=["q_proj", "v_proj"]), reference=tmp_path / "reference"
    )
    batch = tiny.padded_batch()
    for together in (("reference",), ("reference", "policy", "value")):
        with torch.no_grad():
            got = base(*batch.args, roles=together)["ref_logprobs"]
            torch.testing.assert_close(got, tiny.plain_logprobs(reference.to(DEVICE).eval(), batch))


def operations(call: Callable[[], Any]) -> Counter[str]:
    """How often each of PyTorch's operations runs in `call`."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[func.__name__.split(".")[0]] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        call()
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_costs_one_product_and_its_share_of_another(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing trains, beyond what the bare base does; PEFT takes at least five operations a layer."""
    monkeypatch.setattr(lora, "multiplies", lambda *_: True)
    base = built(tiny.config_of("llama"), dtype=torch.float32).eval()
    base.causal_lm.to(dtype)
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    batch = tiny.padded_batch()
    computing = {"mm", "addmm", "addmm_", "mul", "add", "_to_copy", "cat", "copy_", "clone"}

    def count(role: Any) -> int:
        base.logprobs(*batch.args, role=role)  # casts and stacks are kept from here on
        counts = operations(lambda: base.logprobs(*batch.args, role=role))
        return sum(number for name, number in counts.items() if name in computing)

    with torch.no_grad(), base.path.constant():
        lean = count("policy") - count("reference")
        with pefts_own(base) as layers:
            own = count("policy") - count("reference")
    assert layers == 14
    assert lean == 14 + 8  # B of each layer; A of q k v, o, gate up, down in two blocks
    assert own >= 4 * layers


def test_roles_may_change_while_weights_are_kept(llama: tiny.Home) -> None:
    base, batch = llama.base, tiny.padded_batch()
    roles: Any = ("policy", "reference", "value", "reference", "policy")
    with torch.no_grad():
        expected = [base.logprobs(*batch.args, role=role) for role in roles]
        with base.path.constant():
            for _ in range(2):
                for role, logprobs in zip(roles, expected, strict=True):
                    torch.testing.assert_close(base.logprobs(*batch.args, role=role), logprobs)
    assert not torch.allclose(expected[0], expected[1]) and not torch.allclose(expected[0], expected[2])


def test_kept_weights_are_forgotten_when_training_may_go_on(llama: tiny.Home) -> None:
    base, batch = llama.again(), tiny.padded_batch()
    with base.path.constant():
        before = base.logprobs(*batch.args)
    tiny.randomise(base, seed=9, only=".policy.")
    with base.path.constant():
        after = base.logprobs(*batch.args)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, base.logprobs(*batch.args).detach())


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "nf4", "nf4 autocast"])
def test_half_precision_is_no_farther_from_float64_than_peft(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root mean square of the errors over eight models' adapters: of log-probs, and of gradients of A and of B.

    Without autocast PEFT's thin products are float32. Rounding them adds 0.003 to errors of 0.015, in quadrature."""
    monkeypatch.setattr(lora, "multiplies", lambda *_: True)
    errors: dict[bool, list[Tensor]] = {True: [], False: []}
    for seed in range(8):
        folder = tiny.save_base(tmp_path / str(seed), tiny.config_of("llama", hidden=64), seed=seed)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        loaded: dict[str, Any] = {"quantization_config": nf4} if "nf4" in how else {"dtype": torch.bfloat16}
        base = SharedBase.from_pretrained(str(folder), policy=tiny.new_lora(), device_map=DEVICE, **loaded)
        tiny.randomise(base, seed=seed, scale=0.05)  # B A x is a tenth of W x
        exact = copy.deepcopy(base)
        for name, module in list(exact.model.named_modules()):
            if type(module).__name__ == "Linear4bit" and name.endswith("base_layer"):
                exact.model.set_submodule(name, dequantised(module))
        exact.model.double()

        def said(model: SharedBase, autocast: bool) -> Outputs:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                return {name: tensor.double() for name, tensor in passed(model).items()}

        with pefts_own(exact):
            truth = said(exact, autocast=False)
        for lean in (True, False):
            if lean:
                got = said(base, "autocast" in how)
            else:
                with pefts_own(base):
                    got = said(base, "autocast" in how)
            kinds = {"logprobs": [], "lora_A": [], "lora_B": []}  # type: dict[str, list[Tensor]]
            for name, tensor in truth.items():
                for kind in kinds:
                    if kind in name:
                        kinds[kind].append((got[name] - tensor).norm() / tensor.norm())
            errors[lean].append(torch.stack([torch.stack(parts).square().mean() for parts in kinds.values()]))
    lean_error, own_error = (torch.stack(errors[which]).mean(dim=0).sqrt() for which in (True, False))
    assert (own_error > 1e-4).all()
    assert (lean_error <= 1.1 * own_error).all(), (lean_error, own_error)


def dequantised(layer: Any) -> nn.Linear:
    """An ordinary layer with the weights of a 4-bit one."""
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device=weight.device)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain


# What is not plain ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["DoRA", "bias", "two adapters", "merged", "disabled"])
def test_what_is_not_plain_is_still_what_peft_computes(case: str) -> None:
    base = built(tiny.config_of("llama"), **{"DoRA": {"use_dora": True}, "bias": {"lora_bias": True}}.get(case, {}))
    if case == "bias":
        for name, parameter in base.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.normal_(parameter)
    batch = tiny.padded_batch()

    def states() -> Tensor:
        with torch.no_grad():
            return base.causal_lm.base_model(input_ids=batch.ids).last_hidden_state

    with pefts_own(base):
        plain = states()
    if case == "two adapters":
        base.model.base_model.set_adapter(["policy", "value"])
    elif case == "merged":
        base.model.merge_adapter(["policy"])
    elif case == "disabled":
        base.model.base_model.disable_adapter_layers()
    got = states()
    with pefts_own(base):
        torch.testing.assert_close(got, states())
    assert torch.allclose(got, plain) is (case not in ("two adapters", "disabled"))


# Rows under several adapters ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_mixed_or_apart_say_the_same(family: str) -> None:
    """OPT flattens its rows; Mixtral sends its tokens to experts."""
    base, batch = built(FAMILIES[family](), dtype=PRECISE.get(family, torch.float64)), tiny.padded_batch()
    roles: Any = ("policy", "value", "reference")
    together = base(*batch.args, roles=roles)
    assert base.path.mixes is (family != "mixtral")
    for role, name in (("policy", "logprobs"), ("value", "values"), ("reference", "ref_logprobs")):
        torch.testing.assert_close(together[name], base(*batch.args, roles=(role,))[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_layer_that_gets_other_rows_than_it_got_when_tried_ends_the_mixing(llama: tiny.Home) -> None:
    base, batch = llama.again(), tiny.padded_batch()
    expected = base(*batch.args, roles=("policy",))["logprobs"]
    layer = base.causal_lm.model.layers[1].mlp.down_proj
    assert base.path.mixes
    hook = layer.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, :-1],))
    with pytest.raises(CannotMixError), base.path.rows_under([lora.Block("policy", 7)]):
        base.causal_lm.base_model(input_ids=batch.ids)
    hook.remove()
    layer.forward.row_by_row = False
    torch.testing.assert_close(base(*batch.args, roles=("policy", "value"))["logprobs"], expected)
    assert not base.path.mixes


@torch.no_grad()
def test_what_was_made_for_one_adapter_is_not_another_ones(llama: tiny.Home) -> None:
    """Of one input q reads under the policy and k under the value role."""
    base, x = llama.base, torch.randn(2, 3, 32, device=DEVICE)
    attention = base.causal_lm.model.layers[0].self_attn

    def read() -> list[Tensor]:
        with base.use("policy"):
            query = attention.q_proj(x)
        with base.use("value"):
            return [query, attention.k_proj(x)]

    got = read()
    with pefts_own(base):
        torch.testing.assert_close(got, read())
