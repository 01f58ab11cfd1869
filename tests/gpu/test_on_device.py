"""The roles on a device, in every precision, against plain Transformers and PEFT models there.

In half precision nobody is exact. So both are measured against float32 models that hold the same numbers (rounded to
bfloat16, or dequantised), and the roles may be no further from those than plain models are.

    TRL_EXT_TEST_DEVICE=cuda python -m pytest tests/gpu      # or =cpu, to try the tests
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
)

from tests.helpers import DEVICE, TOLERANCE, models_on_device
from tests.parity import ppo, tiny
from trl_ext import SharedBase
from trl_ext.generation import ContinuousGenerator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("TRL_EXT_TEST_DEVICE" not in os.environ, reason="TRL_EXT_TEST_DEVICE says where to run these"),
]

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "nf4": {"dtype": torch.bfloat16, "quantization_config": NF4},
}
# Rounding is a matter of luck, of five scores more than of 21 tokens: this much further than plain models is as near.
# A wrong role, row or position is 10 times further and more.
LUCK = 2.0


@dataclass(frozen=True)
class Case:
    """The roles in one precision, and the same adapters on models of their own."""

    name: str
    home: tiny.Home
    base: SharedBase
    loaded: dict[str, Any]

    def plain(self, kind: Any, **more: Any) -> Any:
        """The bare base as Transformers loads it in this precision."""
        return _evaluating(kind.from_pretrained(self.home.base_folder, **self.loaded, **more))

    def exact(self, kind: Any, **more: Any) -> Any:
        """The same numbers in float32."""
        held = self.plain(kind, **more)
        model = kind.from_pretrained(self.home.base_folder, dtype=torch.float32, **more).eval()
        for name, parameter in model.named_parameters():
            module = held.get_submodule(name.rpartition(".")[0])
            weight = module.weight
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            parameter.data.copy_(weight)
        return model

    def policy(self, model: Any, trainable: bool = False) -> PeftModel:
        """With the policy's adapter."""
        adapted = PeftModel.from_pretrained(model, self.home.saved / "policy", is_trainable=trainable)
        return _evaluating(adapted)

    def classifier(self, make: Callable[..., Any], folder: Path, trainable: bool = False) -> PeftModel:
        """With the adapter and the score head in `folder`."""
        model = make(AutoModelForSequenceClassification, num_labels=1)
        return _evaluating(PeftModel.from_pretrained(model, folder, is_trainable=trainable))


def _evaluating(model: Any) -> Any:
    model.eval()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.train()  # or some CPUs repack it for inference
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tiny.Home]:
    """Wide enough for 4-bit kernels."""
    with models_on_device():
        yield tiny.build(tmp_path_factory.mktemp("llama"), tiny.config_of("llama", hidden=128))


@pytest.fixture(params=PRECISIONS)
def case(request: pytest.FixtureRequest, home: tiny.Home) -> Case:
    loaded = PRECISIONS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_ext.roles.adapters.warnings.warn", lambda *_, **__: None)  # adapters trained over float32
        return Case(request.param, home, home.again(**loaded).eval(), loaded)


def rms(difference: Tensor) -> float:
    return float(difference.detach().double().pow(2).mean().sqrt())


def as_near(case: Case, got: Tensor, plain: Tensor, exact: Tensor) -> None:
    """`got` is as near to `exact` as `plain` is; in float32 they are one."""
    if case.name == "float32":
        torch.testing.assert_close(got, plain.to(got), **TOLERANCE)
    theirs, ours = rms(plain.float() - exact), rms(got.float() - exact)
    print(f"{case.name}: root mean square from float32: here {ours:.2e}, plain {theirs:.2e}")
    assert ours <= (LUCK if got.numel() > 10 else 2 * LUCK) * theirs + TOLERANCE["atol"]
    assert ours < 0.05 * float(exact.std()), "far from what it should be"


# What the roles say ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_where_everything_lies(case: Case) -> None:
    places = {tensor.device.type for tensor in [*case.base.parameters(), *case.base.buffers()]}
    assert places == {DEVICE.type} and case.base.device.type == DEVICE.type
    quantised = sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in case.base.modules())
    assert quantised == (14 if case.name == "nf4" else 0)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["rollout", "left"])
def test_log_probs_values_and_scores(case: Case, layout: str) -> None:
    batch, home = tiny.padded_batch(layout), case.home
    roles = ("policy", "reference", "value", "reward")
    said = case.base(*batch.args, roles=roles)
    alone = {name: value for role in roles for name, value in case.base(*batch.args, roles=(role,)).items()}
    ways: dict[str, Callable[[Callable[..., Any]], Tensor]] = {
        "logprobs": lambda make: tiny.plain_logprobs(case.policy(make(AutoModelForCausalLM)), batch),
        "ref_logprobs": lambda make: tiny.plain_logprobs(
            PeftModel.from_pretrained(make(AutoModelForCausalLM), home.reference_folder), batch
        ),
        "values": lambda make: tiny.plain_values(case.classifier(make, home.saved / "value"), batch),
        "scores": lambda make: tiny.plain_scores(case.classifier(make, home.reward_folder), batch),
    }
    for name, say in ways.items():
        plain, exact = say(case.plain), say(case.exact)
        if name != "scores":
            plain, exact = tiny.answers(batch, plain), tiny.answers(batch, exact)
        for got in (said[name], alone[name]):
            as_near(case, got if name == "scores" else tiny.answers(batch, got), plain, exact)


# Gradients ------------------------------------------------------------------------------------------------------------


def loss_of(logprobs: Tensor, values: Tensor) -> Tensor:
    """Some loss in which every token counts, and each otherwise."""
    weights = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    return (logprobs.float() * weights).sum() + ((values.float() - weights) ** 2).sum()


def shared_gradients(base: SharedBase, batch: tiny.Padded) -> ppo.Gradients:
    base.train().zero_grad()
    with base.use("policy"):
        logprobs = base(*batch.args, roles=("policy",))["logprobs"]
    with base.use("value"):
        values = base(*batch.args, roles=("value",))["values"]
    loss_of(logprobs, values).backward()
    return ppo.gradients(base)


def plain_gradients(case: Case, make: Callable[..., Any], batch: tiny.Padded) -> ppo.Gradients:
    policy = case.policy(make(AutoModelForCausalLM), trainable=True)
    value = case.classifier(make, case.home.saved / "value", trainable=True)
    loss_of(tiny.plain_logprobs(policy, batch), tiny.plain_values(value, batch)).backward()
    return {**ppo.shared_names(policy, "policy"), **ppo.shared_names(value, "value")}


def off(got: ppo.Gradients, exact: ppo.Gradients) -> float:
    """Norm of all differences, relative to that of `exact`."""
    assert set(got) == set(exact)
    pairs = [(got[name].double() - exact[name].double(), exact[name].double()) for name in exact]
    norms = [sum(float(part.norm()) ** 2 for part in parts) ** 0.5 for parts in zip(*pairs, strict=True)]
    return norms[0] / norms[1]


def generated(base: SharedBase, batch: tiny.Padded) -> Tensor:
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tiny.PAD}
    return base.generate(input_ids=batch.ids[:, :7], attention_mask=batch.mask[:, :7], **how)


def test_gradients_with_and_without_recomputation_and_after_a_generation(case: Case) -> None:
    batch, base = tiny.padded_batch(), case.base
    exact = plain_gradients(case, case.exact, batch)
    plain = off(plain_gradients(case, case.plain, batch), exact)
    got = {"kept": shared_gradients(base, batch)}
    base.gradient_checkpointing_enable()
    got["recomputed"] = shared_gradients(base, batch)
    base.eval()
    generated(base, batch)
    got["after a generation"] = shared_gradients(base, batch)
    base.score_pass(*batch.args)
    got["after scoring"] = shared_gradients(base, batch)
    base.gradient_checkpointing_disable()
    got["kept again"] = shared_gradients(base, batch)
    assert len(exact) == 2 * 2 * 14 + 1 and all(float(g.norm()) > 0 for g in exact.values())
    errors = {how: off(gradients, exact) for how, gradients in got.items()}
    print(f"{case.name}: relative error of the gradients: plain {plain:.2e}, {errors}")
    most = ppo.RELATIVE if case.name == "float32" else LUCK * plain
    assert max(errors.values()) <= most, errors
    # The same operations on the same numbers; what a GPU adds up in no fixed order is far below half precision.
    again = {how: off(gradients, got["kept"]) for how, gradients in got.items()}
    assert max(again.values()) <= 10 * TOLERANCE["rtol"], again


# Generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "CUDA graphs"])
def test_continuous_batching_says_what_generate_says(case: Case, graphs: bool) -> None:
    """Greedily, and twice, for a graph outlives its first step. In half precision another kernel may choose otherwise
    where two tokens are nearly as likely, and goes on from there."""
    batch, base = tiny.padded_batch(), case.base
    prompts = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids[:, :7], batch.mask[:, :7], strict=True)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=tiny.PAD, eos_token_id=[tiny.EOS])
    settings: dict[str, Any] = {"use_cuda_graph": True, "kv_padding_interval_size": 256} if graphs else {}
    how = {"input_ids": batch.ids[:, :7], "attention_mask": batch.mask[:, :7], "generation_config": config}
    wanted = [row[7:].tolist() for row in base.generate(**how)]
    bare = [row[7:].tolist() for row in base.generate(role="reference", **how)]
    generator = ContinuousGenerator(base, len(prompts), settings)
    for role, expected in (("policy", wanted), ("reference", bare), ("policy", wanted)):
        got = generator.answers(prompts, config, role).ids
        same = sum(answer == row[: len(answer)] for answer, row in zip(got, expected, strict=True))
        print(f"{case.name}, {role}: {same} of {len(prompts)} answers are the same")
        assert same == len(prompts) if case.name == "float32" else same >= len(prompts) - 2
    assert wanted != bare


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_two_updates(case: Case, value: str, tmp_path: Path) -> None:
    """Nothing has been learned when the first step is taken: what is trained is what answered."""
    how = {"policy": tiny.new_lora(), "value": value, **case.loaded}
    base = SharedBase.from_pretrained(str(case.home.base_folder), **how)
    tiny.randomise(base, seed=3, only=".policy.")
    changes: dict[str, Any] = {"bf16": case.name != "float32", "gradient_checkpointing": True, "learning_rate": 1e-3}
    trainer = ppo.make_trainer(base, tmp_path, max_steps=4, **changes)
    before = tiny.clone_state(nn.ModuleList([base.model, base.heads]))
    trainer.train()
    logs = [row for row in trainer.state.log_history if "policy/first_approxkl" in row]
    assert len(logs) == 2, "one a rollout"
    # Half precision rounds a log-probability to 0.01 nats, otherwise for a row in other company.
    most = 1e-3 if case.name != "float32" else 1e-8
    print(f"{case.name}: first approxkl {[row['policy/first_approxkl'] for row in logs]}")
    assert all(abs(row["policy/first_approxkl"]) < most for row in logs)
    assert all(row["grad_norm/policy"] > 0 and row["grad_norm/value"] > 0 for row in logs)
    assert all(torch.tensor(value).isfinite() for row in logs for value in row.values())
    after = tiny.clone_state(nn.ModuleList([base.model, base.heads]))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trains = {"lora_A.policy", "lora_B.policy", "value"}
    assert moved and all(any(part in name for part in trains) for name in moved)
    assert any("lora_B.policy" in name for name in moved)
    assert {p.device.type for p in base.parameters()} == {DEVICE.type}
