"""A PPO minibatch the plain way, with separate models and the losses written out by hand, and the real trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.helpers import DEVICE, QUIET, TOLERANCE
from tests.parity import tiny
from trl_ext import PPOConfig, PPOTrainer, SharedBase
from trl_ext.types import Experience

RELATIVE = TOLERANCE["rtol"]
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
Gradients = dict[str, Tensor]
Reference = Callable[[SharedBase, Experience, PPOConfig], Gradients]


# What is compared ----------------------------------------------------------------------------------------------------


def gradients(base: SharedBase) -> Gradients:
    """Every gradient, by a name that says whose it is."""
    return {name: p.grad.clone() for name, p in base.named_parameters() if p.grad is not None}


def check(got: Gradients, expected: Gradients) -> None:
    """The same parameters have gradients, and each differs by at most RELATIVE of its norm."""
    assert set(got) == set(expected)
    errors = {name: float((got[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    assert all(gradient.norm() > 0 for gradient in expected.values()), "a gradient of 0 shows nothing"
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= RELATIVE, f"{worst}: relative error {errors[worst]:.2e}"


def shared_names(model: nn.Module, role: str) -> Gradients:
    """Gradients of a separate `model` under the names they have in the shared base."""
    renamed = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "lora_" in name:
            renamed["model." + name.replace(".default.", f".{role}.")] = parameter.grad.clone()
        elif parameter.grad is not None:
            assert "score" in name
            renamed[f"heads.{role}.weight"] = parameter.grad.clone()
    return renamed


# The plain way -------------------------------------------------------------------------------------------------------


def whole(experience: Experience) -> tiny.Padded:
    rollout = experience.rollout
    ids, mask = rollout.input_ids.to(DEVICE), rollout.attention_mask.long().to(DEVICE)
    return tiny.Padded(ids, mask, rollout.completion_ids.shape[1])


def plain_policy_loss(logprobs: Tensor, experience: Experience, args: PPOConfig) -> Tensor:
    """PPO's clipped objective, a token at a time in float64."""
    logprobs = logprobs.cpu()  # where the experience is
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, column in experience.loss_mask.nonzero().tolist():
        ratio = torch.exp(logprobs[row, column].double() - experience.score_pass.logprobs[row, column])
        advantage = experience.advantages[row, column].double()
        bounded = torch.clamp(ratio, 1 - args.cliprange, 1 + args.cliprange)
        total = total - torch.minimum(ratio * advantage, bounded * advantage)
        count += 1
    return total / count


def plain_value_loss(values: Tensor, experience: Experience, args: PPOConfig) -> Tensor:
    """Half the larger squared error of the value and its clipped twin, a token at a time in float64."""
    values = values.cpu()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, column in experience.loss_mask.nonzero().tolist():
        value, old = values[row, column].double(), experience.score_pass.values[row, column].double()
        target = experience.returns[row, column].double()
        step = torch.clamp(value - old, -args.cliprange_value, args.cliprange_value)
        total = total + 0.5 * torch.maximum((value - target) ** 2, (old + step - target) ** 2)
        count += 1
    return args.vf_coef * total / count


def plain_gradients(policy: nn.Module, value: nn.Module | Tensor, experience: Experience, args: PPOConfig) -> Gradients:
    """Of one whole minibatch. `value`: a classifier of its own, or the weight of a head on the policy's trunk."""
    batch = whole(experience)
    loss = plain_policy_loss(tiny.plain_logprobs(policy, batch, args.temperature), experience, args)
    if isinstance(value, Tensor):
        head = value.detach().clone().requires_grad_(True)
        loss = loss + plain_value_loss(tiny.plain_head_values(policy, head, batch), experience, args)
        loss.backward()
        assert head.grad is not None
        return {**shared_names(policy, "policy"), "heads.value.weight": head.grad}
    loss = loss + plain_value_loss(tiny.plain_values(value, batch), experience, args)
    loss.backward()
    return {**shared_names(policy, "policy"), **shared_names(value, "value")}


def separately(base_folder: Path, scratch: Path) -> Reference:
    """The reference over a float32 base on disk: what the shared base saves, loaded as separate models."""

    def reference(base: SharedBase, experience: Experience, args: PPOConfig) -> Gradients:
        base.save_pretrained(scratch)
        policy = tiny.load_policy(scratch / "policy", trainable=True)
        value: nn.Module | Tensor = base.heads["value"].weight
        if base.adapters["value"] == "value":
            value = tiny.load_classifier(scratch / "value", base_folder, trainable=True)
        return plain_gradients(policy, value, experience, args)

    return reference


def dequantised(base_folder: Path) -> Any:
    """The NF4 base with every quantised layer replaced by a plain float32 one that holds the same numbers."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, quantization_config=NF4, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    replaced = 0
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            target = plain.get_submodule(name)
            assert weight.shape == target.weight.shape and not torch.equal(weight, target.weight)
            target.weight.data.copy_(weight)
            replaced += 1
    assert replaced == 14, "seven layers in each of two blocks"
    return plain


def separately_dequantised(base_folder: Path, scratch: Path) -> Reference:
    """The same, over the dequantised base."""

    def reference(base: SharedBase, experience: Experience, args: PPOConfig) -> Gradients:
        base.save_pretrained(scratch)
        plain = dequantised(base_folder)
        policy = PeftModel.from_pretrained(copy.deepcopy(plain), scratch / "policy", is_trainable=True)
        value: nn.Module | Tensor = base.heads["value"].weight
        if base.adapters["value"] == "value":
            classifier = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
            classifier.base_model.load_state_dict(plain.base_model.state_dict())
            value = PeftModel.from_pretrained(classifier, scratch / "value", is_trainable=True)
        return plain_gradients(policy, value, experience, args)

    return reference


# The real trainer ----------------------------------------------------------------------------------------------------


def prompts(rows: int) -> Dataset:
    """Prompts of one to five words."""
    return Dataset.from_list(
        [{"prompt": " ".join(f"w{3 + (7 * i + j) % 9}" for j in range(1 + i % 5))} for i in range(rows)]
    )


def length_score(completions: list[str], **_: Any) -> list[float]:
    """Some score that differs between completions."""
    return [len(set(text.split())) - 3.0 for text in completions]


def make_trainer(base: SharedBase, folder: Path, **changes: Any) -> PPOTrainer:
    """The trainer, its minibatch of six rows cut into three micro-batches."""
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "gradient_checkpointing": False,
        "max_completion_length": 10,
        "temperature": 0.9,
        "max_grad_norm": 0.0,
        "vf_coef": 0.5,
        "logging_steps": 1,
        "num_ppo_epochs": 2,
        "disable_tqdm": True,
        **QUIET,
    }
    return PPOTrainer(
        model=base,
        reward_funcs=length_score,
        args=PPOConfig(**{**settings, **changes}),
        train_dataset=prompts(24),
        processing_class=tiny.make_tokenizer(base.config.vocab_size),
    )


def make_experience(trainer: PPOTrainer) -> Experience:
    """A real rollout, its old log-probs and values moved so that ratios leave 1 and both clips bite."""
    rows = [trainer.train_dataset[i] for i in range(6)]
    experience = trainer.updater.collect(rows, trainer.state, trainer.control)
    generator = torch.Generator().manual_seed(0)
    mask = experience.loss_mask
    for old in (experience.score_pass.logprobs, experience.score_pass.values):
        old += 0.3 * torch.randn(old.shape, generator=generator) * mask
    assert len(set(mask.sum(dim=1).tolist())) > 1 and len(set(experience.rollout.prompt_mask.sum(dim=1).tolist())) > 1
    return experience


def accumulate(trainer: PPOTrainer, experience: Experience) -> Gradients:
    """Gradients of the first minibatch of `experience` as the trainer accumulates them over its micro-batches."""
    trainer.model.zero_grad()
    updater = trainer.updater
    assert updater.idle
    updater.experience = experience
    for part in range(3):
        updater.train_on_next(trainer.model, 0)
        assert updater.idle == (part == 2)
    assert updater.finish_minibatch()
    return gradients(trainer.base)


def generate(base: SharedBase) -> None:
    batch = tiny.padded_batch(vocabulary=12)
    base.generate(input_ids=batch.ids[:, :7], attention_mask=batch.mask[:, :7], max_new_tokens=4, do_sample=False)


def random_base(folder: Path, value: str, **kwargs: Any) -> SharedBase:
    base = SharedBase.from_pretrained(str(folder), policy=tiny.new_lora(), value=value, **kwargs)
    tiny.randomise(base, seed=3, only=".policy.")
    tiny.randomise(base, seed=4, only=".value.")
    return base


def small(family: str) -> Any:
    """A vocabulary of 12, so that answers end at different places."""
    return tiny.config_of(family, vocabulary=12)
