"""What mistakes_2.yaml names in words under `models`, as code on the embedded default, in the way of broken.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from broken import Parts, _template_goes_on, _with_base, _with_change, _with_generator
from doctor_cases import its_own_reference
from transformers import GenerationConfig

from trl_ext import SharedBase, demo
from trl_ext.generation import Answers, TransformersGenerator
from trl_ext.tokens import as_ids, padded

Ids = list[list[int]]

# Who samples ----------------------------------------------------------------------------------------------------------


class Sampler:
    """A generator through which the base answers; those below get one thing wrong."""

    def __init__(self, base: SharedBase) -> None:
        self._base, self._inner = base, TransformersGenerator(base, 64)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        return self._inner.answers(prompt_ids, config, role).ids


class MergesTwice(Sampler):
    """It answers with the policy's adapter added to weights that hold it already."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids:
        """See `trl_ext.generation.Generator`."""
        with _scaled(self._base, "policy", 2.0):
            return super().answers(prompt_ids, config, role)


class PadsRight(Sampler):
    """It pads prompts on the right, and what it writes comes after the padding."""

    @torch.no_grad()
    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids:
        """See `trl_ext.generation.Generator`."""
        ids, mask = padded(prompt_ids, int(config.pad_token_id))
        output = self._base.generate(role=role, input_ids=ids, attention_mask=mask.long(), generation_config=config)
        return output[:, ids.shape[1] :].tolist()


class DropsTheEnd(Sampler):
    """Its answers went through text without special tokens: none has an EOS."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids:
        """See `trl_ext.generation.Generator`."""
        special = {*as_ids(config.eos_token_id), int(config.pad_token_id)}
        return [[i for i in row if i not in special] for row in super().answers(prompt_ids, config, role)]


class ReturnsByLength(Sampler):
    """It sorts prompts by length, and returns the answers in that order."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids:
        """See `trl_ext.generation.Generator`."""
        return super().answers(sorted(prompt_ids, key=len), config, role)


class CachesAnswers(Sampler):
    """It answers a prompt that it has seen as it did the first time."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._kept: dict[tuple[str, tuple[int, ...]], list[int]] = {}

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids:
        """See `trl_ext.generation.Generator`."""
        keys = [(role, tuple(prompt)) for prompt in prompt_ids]
        for key, written in zip(keys, super().answers(prompt_ids, config, role), strict=True):
            self._kept.setdefault(key, written)
        return [self._kept[key] for key in keys]


# What is done to the base ---------------------------------------------------------------------------------------------


def _lora_layers(base: SharedBase, adapter: str) -> Iterator[Any]:
    """The layers that hold this adapter."""
    for module in base.model.modules():
        if adapter in getattr(module, "lora_A", {}):
            yield module


@contextmanager
def _scaled(base: SharedBase, adapter: str, by: float) -> Iterator[None]:
    """Inside, the adapter counts so many times."""
    layers = list(_lora_layers(base, adapter))
    kept = [layer.scaling[adapter] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[adapter] *= by
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling[adapter] = scaling


@torch.no_grad()
def _policy_starts_as_reward_adapter(base: SharedBase) -> None:
    for layer in _lora_layers(base, "reward"):
        a, b = layer.lora_A["reward"].weight, layer.lora_B["reward"].weight
        rank = min(a.shape[0], layer.lora_A["policy"].weight.shape[0])
        layer.lora_A["policy"].weight[:rank] = a[:rank]
        layer.lora_B["policy"].weight[:, :rank] = b[:, :rank]


@torch.no_grad()
def _reward_adapter_left_out(base: SharedBase) -> None:
    """As new adapters are: their second matrix is 0."""
    for layer in _lora_layers(base, "reward"):
        layer.lora_B["reward"].weight.zero_()


def _value_head_frozen(base: SharedBase) -> None:
    base.heads["value"].requires_grad_(False)


@torch.no_grad()
def _base_in_four_bits(base: SharedBase) -> None:
    for layer in _lora_layers(base, "policy"):
        weight = layer.base_layer.weight
        step = weight.abs().max() / 7
        weight.copy_((weight / step).round() * step)


@torch.no_grad()
def _reward_merged_into_base(base: SharedBase) -> None:
    for layer in _lora_layers(base, "reward"):
        layer.base_layer.weight += layer.get_delta_weight("reward")


# The tokenizer --------------------------------------------------------------------------------------------------------


def _reward_pads_with_eos(parts: Parts) -> None:
    def change(base: SharedBase) -> None:
        base.reward_pad_token_ids = {"reward": parts.tokenizer.eos_token_id}

    parts.change_base = change


def _stops_at_the_full_stop(parts: Parts) -> None:
    stop = parts.tokenizer("The capital of France is Paris.")["input_ids"][-1]
    parts.settings["generation_kwargs"] = {"eos_token_id": [stop]}


MODELS: dict[str, Callable[[Parts], None]] = {
    "sampler_merges_twice": partial(_with_generator, MergesTwice),
    "sampler_pads_right": partial(_with_generator, PadsRight),
    "sampler_drops_the_end": partial(_with_generator, DropsTheEnd),
    "sampler_returns_by_length": partial(_with_generator, ReturnsByLength),
    "sampler_caches_answers": partial(_with_generator, CachesAnswers),
    "reference_is_the_policy": partial(_with_change, its_own_reference),
    "policy_starts_as_reward_adapter": partial(_with_change, _policy_starts_as_reward_adapter),
    "value_starts_as_reward": lambda parts: _with_base(parts, value=demo.reward_adapter()),
    "reward_adapter_left_out": partial(_with_change, _reward_adapter_left_out),
    "reward_pads_with_eos": _reward_pads_with_eos,
    "value_head_frozen": partial(_with_change, _value_head_frozen),
    "template_opens_a_thought": partial(_template_goes_on, "<think>\n"),
    "base_in_four_bits": partial(_with_change, _base_in_four_bits),
    "reward_merged_into_base": partial(_with_change, _reward_merged_into_base),
    "stops_at_the_full_stop": _stops_at_the_full_stop,
}
