"""Gradients of a PPO minibatch equal those of separate models with full logits and the loss written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from tests.helpers import TOLERANCE, recomputes
from tests.parity import ppo, tiny
from trl_ext import SharedBase
from trl_ext.roles.adapted import AdaptedModel


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("llama") / "base", ppo.small("llama"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("value", ["adapter", "head"])
@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "nf4"])
def test_minibatch_gradients(
    base_folder: Path, tmp_path: Path, value: str, checkpointing: bool, quantised: bool
) -> None:
    """Before a generation, after one, and after the score pass that shares a forward between roles."""
    kwargs = {"quantization_config": ppo.NF4, "dtype": torch.float32} if quantised else {}
    base = ppo.random_base(base_folder, value, **kwargs)
    trainer = ppo.make_trainer(base, tmp_path, gradient_checkpointing=checkpointing)
    assert trainer.base is base
    if checkpointing:
        base.gradient_checkpointing_enable()
    assert recomputes(base.causal_lm) == checkpointing
    experience = ppo.make_experience(trainer)
    reference = (ppo.separately_dequantised if quantised else ppo.separately)(base_folder, tmp_path / "saved")
    expected = reference(base, experience, trainer.args)
    assert len(expected) == (2 * 14 * (2 if value == "adapter" else 1)) + 1
    ppo.check(ppo.accumulate(trainer, experience), expected)
    base.eval()
    ppo.generate(base)
    ppo.check(ppo.accumulate(trainer, experience), expected)
    base.score_pass(*ppo.whole(experience).args)
    ppo.check(ppo.accumulate(trainer, experience), expected)


@pytest.mark.parametrize("value", ["adapter", "head"])
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "llama"])
def test_minibatch_gradients_of_every_family(tmp_path: Path, family: str, value: str) -> None:
    folder = tiny.save_base(tmp_path / "base", ppo.small(family))
    base = ppo.random_base(folder, value)
    trainer = ppo.make_trainer(base, tmp_path, gradient_checkpointing=True)
    base.gradient_checkpointing_enable()
    experience = ppo.make_experience(trainer)
    ppo.check(
        ppo.accumulate(trainer, experience), ppo.separately(folder, tmp_path / "saved")(base, experience, trainer.args)
    )


def test_both_clips_bite(base_folder: Path, tmp_path: Path) -> None:
    """The experience that the tests above compare on has clipped and unclipped tokens of both losses."""
    base = ppo.random_base(base_folder, "adapter")
    trainer = ppo.make_trainer(base, tmp_path)
    experience = ppo.make_experience(trainer)
    ppo.accumulate(trainer, experience)
    watched = trainer.metrics.drain()
    assert 0.05 < watched["policy/clipfrac_avg"] < 0.95
    assert 0.05 < watched["val/clipfrac_avg"] < 0.95


class _Recorder(TrainerCallback):
    """At each optimizer step: the gradients, what they came from, and the reference's."""

    def __init__(self, reference: ppo.Reference) -> None:
        self.reference, self.trainer = reference, None
        self.steps: list[tuple[ppo.Gradients, ppo.Gradients]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        base, experience = self.trainer.base, self.trainer.experience
        got = ppo.gradients(base)
        self.steps.append((got, self.reference(base, experience, args)))


@pytest.mark.parametrize("value", ["adapter", "head"])
def test_gradients_of_a_real_run(base_folder: Path, tmp_path: Path, value: str) -> None:
    """Two rollouts, two epochs each, a learning rate that moves the ratios: every optimizer step's gradients."""
    base = ppo.random_base(base_folder, value)
    trainer = ppo.make_trainer(base, tmp_path, learning_rate=1e-2, max_steps=4, gradient_checkpointing=True)
    recorder = _Recorder(ppo.separately(base_folder, tmp_path / "saved"))
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    trainer.train()
    assert len(recorder.steps) == 4 and recomputes(base.causal_lm)
    for got, expected in recorder.steps:
        ppo.check(got, expected)
    logged = [row for row in trainer.state.log_history if "policy/approxkl_avg" in row]
    assert [row["policy/approxkl_avg"] > 1e-4 for row in logged] == [False, True, False, True]


# Checkpointing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("together", [False, True], ids=["two forwards", "one forward"])
def test_one_backward_after_both_roles_have_spoken(base_folder: Path, tmp_path: Path, together: bool) -> None:
    """What checkpointing recomputes runs under the adapter of its forward, whichever is active by then."""
    base = ppo.random_base(base_folder, "adapter")
    trainer = ppo.make_trainer(base, tmp_path)
    experience = ppo.make_experience(trainer)
    expected = ppo.separately(base_folder, tmp_path / "saved")(base, experience, trainer.args)
    batch = ppo.whole(experience)

    def backward() -> ppo.Gradients:
        base.train().zero_grad()
        if together:
            said = base(*batch.args, roles=("policy", "value"), temperature=trainer.args.temperature)
            logprobs, values = said["logprobs"], said["values"]
        else:
            with base.use("policy"):
                logprobs = base(*batch.args, roles=("policy",), temperature=trainer.args.temperature)["logprobs"]
            with base.use("value"):
                values = base(*batch.args, roles=("value",))["values"]
        policy_loss = ppo.plain_policy_loss(logprobs, experience, trainer.args)
        (policy_loss + ppo.plain_value_loss(values, experience, trainer.args)).backward()
        return ppo.gradients(base)

    ppo.check(backward(), expected)
    base.gradient_checkpointing_enable()
    ppo.check(backward(), expected)
    with base.use("reference"):  # a stranger is active while the backward runs
        ppo.check(backward(), expected)
    base.gradient_checkpointing_disable()
    ppo.check(backward(), expected)


def test_a_model_that_recomputes_already_does_so_under_each_role_s_adapter(base_folder: Path, tmp_path: Path) -> None:
    """As one that `prepare_model_for_kbit_training` has had in its hands."""
    base = ppo.random_base(base_folder, "adapter")
    base.causal_lm.gradient_checkpointing_enable()
    again = AdaptedModel(base.model)
    assert recomputes(again.causal_lm)
    functions = {
        module._gradient_checkpointing_func
        for module in again.causal_lm.modules()
        if hasattr(module, "_gradient_checkpointing_func")
    }
    assert {function.keywords["context_fn"] for function in functions} == {again._checkpoint_contexts}


def test_reentrant_checkpointing_is_refused(base_folder: Path) -> None:
    base = ppo.random_base(base_folder, "adapter")
    with pytest.raises(ValueError, match="recomputes under the wrong adapter"):
        base.gradient_checkpointing_enable({"use_reentrant": True})


# 4-bit layers --------------------------------------------------------------------------------------------------------


def linear4bits(base: SharedBase) -> list[bitsandbytes.nn.Linear4bit]:
    return [module for module in base.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_4bit_layers_never_leave_training_mode(base_folder: Path) -> None:
    """In eval mode a CPU with AVX512-BF16 would repack them into something that has no backward."""
    base = ppo.random_base(base_folder, "adapter", quantization_config=ppo.NF4, dtype=torch.float32)
    batch = tiny.padded_batch(vocabulary=12)
    steps: list[Callable[[], Any]] = [
        lambda: ppo.generate(base),
        lambda: base.eval(),
        lambda: base.model.eval(),
        lambda: base.score_pass(*batch.args),
        lambda: base.train(False),
        lambda: base.causal_lm.eval(),
    ]
    assert len(linear4bits(base)) == 14
    for step in steps:
        step()
        assert all(layer.training for layer in linear4bits(base))
    assert not base.model.training
    during: list[bool] = []
    hooks = [layer.register_forward_hook(lambda *_: during.append(_[0].training)) for layer in linear4bits(base)]
    ppo.generate(base)
    base.score_pass(*batch.args)
    for hook in hooks:
        hook.remove()
    assert during and all(during)


def repacks_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bitsandbytes does on a CPU with AVX512-BF16: after a forward in eval mode a layer has no backward."""
    original = bitsandbytes.nn.Linear4bit.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        self.support_avx512bf16_for_cpu = False  # these layers are too small for the real thing
        self.repacked = getattr(self, "repacked", False) or not self.training
        return original(self, x).detach() if self.repacked else original(self, x)

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", forward)


def test_generation_costs_no_gradient_where_eval_mode_repacks(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repacks_in_eval_mode(monkeypatch)
    base = ppo.random_base(base_folder, "adapter", quantization_config=ppo.NF4, dtype=torch.float32)
    trainer = ppo.make_trainer(base, tmp_path)
    experience = ppo.make_experience(trainer)  # generates
    expected = ppo.separately_dequantised(base_folder, tmp_path / "saved")(base, experience, trainer.args)
    base.eval()
    ppo.generate(base)
    ppo.check(ppo.accumulate(trainer, experience), expected)
    # The simulation does bite where nothing guards the layers.
    for layer in linear4bits(base):
        del layer.train
    base.eval()
    ppo.generate(base)
    lost = ppo.accumulate(trainer, experience)
    assert any(
        name not in lost or (lost[name] - expected[name]).norm() > 0.1 * expected[name].norm() for name in expected
    )


# Learning rate 0 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["adapter", "head"])
@pytest.mark.parametrize("family,quantised", [("llama", False), ("gpt2", False), ("llama", True)])
def test_without_learning_every_ratio_is_one(tmp_path: Path, family: str, value: str, quantised: bool) -> None:
    """Two rollouts, three epochs of two minibatches, dropout configured: nothing but learning may move a ratio."""
    config = ppo.small(family)
    config.attention_dropout = config.resid_pdrop = config.attn_pdrop = config.embd_pdrop = 0.3
    folder = tiny.save_base(tmp_path / "base", config)
    kwargs = {"quantization_config": ppo.NF4, "dtype": torch.float32} if quantised else {}
    base = SharedBase.from_pretrained(str(folder), policy=tiny.new_lora(lora_dropout=0.3), value=value, **kwargs)
    tiny.randomise(base, seed=3, only=".policy.")
    tiny.randomise(base, seed=4, only=".value.")
    trainer = ppo.make_trainer(
        base, tmp_path, num_ppo_epochs=3, num_mini_batches=2, max_steps=12, gradient_checkpointing=True, seed=1
    )
    ratios: list[Tensor] = []
    lengths: set[tuple[int, int]] = set()
    add_tokens = trainer.metrics.add_tokens

    def watch(values: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        if "val/ratio" in values:
            ratios.append(values["val/ratio"][mask])
        rollout = trainer.experience.rollout
        lengths.update(zip(rollout.prompt_mask.sum(1).tolist(), rollout.completion_mask.sum(1).tolist(), strict=True))
        return add_tokens(values, mask)

    trainer.metrics.add_tokens = watch  # type: ignore[method-assign]
    trainer.train()
    logged = [row for row in trainer.state.log_history if "val/ratio" in row]
    assert len(logged) == 12 and len(ratios) == 12 * 3
    for row in logged:
        assert row["val/ratio"] == pytest.approx(1.0, abs=TOLERANCE["atol"] / 10)
        assert row["policy/approxkl_avg"] == pytest.approx(0.0, abs=TOLERANCE["atol"] / 10)
        assert row["policy/clipfrac_avg"] == 0.0 and row["val/clipfrac_avg"] == 0.0
    assert (torch.cat(ratios) - 1).abs().max() <= TOLERANCE["atol"]
    prompt_lengths, completion_lengths = (set(part) for part in zip(*lengths, strict=True))
    assert len(prompt_lengths) > 1 and len(completion_lengths) > 1, "padding on both sides"
    kls = [row["objective/kl"] for row in logged if "objective/kl" in row]
    assert len(kls) == 2 and all(abs(kl) > 1e-2 for kl in kls), "the policy is not the reference"


def test_trls_view_of_the_policy_recomputes_under_the_right_role(tmp_path: Path) -> None:
    """TRL 1.12 turns recomputation off and on again around each rollout, through the policy that it was given."""
    base_folder = tiny.save_base(tmp_path / "base", tiny.config_of("llama"))
    reward = tiny.save_reward_adapter(tmp_path / "reward", base_folder, 3)
    base = SharedBase.from_pretrained(str(base_folder), policy=tiny.new_lora(), reward=reward)
    tiny.randomise(base, 5)
    policy, value_model, _ = base.as_trl_models()
    batch = tiny.padded_batch()
    gradients = []
    for recompute in (False, True):
        if recompute:
            policy.gradient_checkpointing_enable()
            policy.gradient_checkpointing_disable()
            policy.gradient_checkpointing_enable()
        base.train()
        base.zero_grad()
        hidden = value_model.trunk(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
        value_model.score(hidden.hidden_states[-1]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None})
    assert recomputes(base.causal_lm)
    assert any(".value." in name for name in gradients[0]) and gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"] / 10, msg=name
        )
