"""What mistakes_3.yaml names in words under `models`, as code on the embedded default, in the way of broken.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from broken import Parts, _template_goes_on, _with_change, _with_generator
from more_models import Sampler
from tokenizers import pre_tokenizers
from transformers import GenerationConfig

from trl_ext import SharedBase
from trl_ext.generation import Answers, TransformersGenerator
from trl_ext.roles.lm_head import head_of
from trl_ext.tokens import padded

Ids = list[list[int]]
RESERVED = [f"<|reserved_{i}|>" for i in range(256)]

# Who samples ----------------------------------------------------------------------------------------------------------


class SyncsAttentionOnly(Sampler):
    """It has the policy's adapter in attention alone: those of the MLPs never arrived."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        with _without_mlp(self._base, "policy"):
            return super().answers(prompt_ids, config, role)


class HasOwnTemperature(Sampler):
    """It samples at its own temperature, whatever is asked for."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        config.temperature = 0.5
        return super().answers(prompt_ids, config, role)


class ReseedsEveryCall(Sampler):
    """It draws the same random numbers in each call."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(42)
            return super().answers(prompt_ids, config, role)


class UsesValueAdapter(Sampler):
    """It answers under the value's adapter in place of the policy's."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        return super().answers(prompt_ids, config, "value" if role == "policy" else role)


class DropsLastPromptToken(Sampler):
    """It reads prompts up to, but without, their last token."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        return super().answers([ids[:-1] for ids in prompt_ids], config, role)


class BestOfFour(Sampler):
    """It returns the likeliest of four answers."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._inner = TransformersGenerator(base, 64, tell=True)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        best: list[tuple[float, list[int]]] = [(float("-inf"), [])] * len(prompt_ids)
        for _ in range(4):
            drawn = self._inner.answers(prompt_ids, config, role)
            told = zip(drawn.logprobs or [], drawn.ids, strict=True)
            tries = [(sum(logprobs), ids) for logprobs, ids in told]
            best = [max(pair, key=lambda one: one[0]) for pair in zip(best, tries, strict=True)]
        return [ids for _, ids in best]


class PrefillsWithoutAdapter(Sampler):
    """The bare base reads the prompts, and the policy goes on from its keys and values."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        ids, mask = padded(prompt_ids, int(config.pad_token_id), left=True)
        mask = mask.long()
        reading = GenerationConfig(max_new_tokens=1, pad_token_id=config.pad_token_id, return_dict_in_generate=True)
        cache = self._base.generate(
            role="reference", input_ids=ids[:, :-1], attention_mask=mask[:, :-1], generation_config=reading
        ).past_key_values
        output = self._base.generate(
            role=role, input_ids=ids, attention_mask=mask, generation_config=config, past_key_values=cache
        )
        return output[:, ids.shape[1] :].tolist()


class TellsCumulativeLogprobs(Sampler):
    """It tells of each token the log-probability of the answer up to it."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._inner = TransformersGenerator(base, 64, tell=True)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        drawn = self._inner.answers(prompt_ids, config, role)
        return Answers(drawn.ids, [list(accumulate(row)) for row in drawn.logprobs or []])


# What is done to the base ---------------------------------------------------------------------------------------------


@contextmanager
def _without_mlp(base: SharedBase, adapter: str) -> Iterator[None]:
    """Inside, the adapter counts nothing in the MLPs."""
    layers = [
        module
        for name, module in base.model.named_modules()
        if ".mlp." in name and adapter in getattr(module, "lora_A", {})
    ]
    kept = [layer.scaling[adapter] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[adapter] = 0.0
        yield
    finally:
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling[adapter] = scaling


def _reference_reads_value_adapter(base: SharedBase) -> None:
    base.adapters["reference"] = base.adapters["value"]


def _policy_lora_b_frozen(base: SharedBase) -> None:
    for name, parameter in base.model.named_parameters():
        if ".lora_B.policy." in name:
            parameter.requires_grad_(False)


@torch.no_grad()
def _rope_of_another_config(base: SharedBase) -> None:
    base.causal_lm.model.rotary_emb.inv_freq.div_(4)


@torch.no_grad()
def _reward_layers_off_by_one(base: SharedBase) -> None:
    """The last layer's goes to the first, as where an index of -1 counts from the end."""
    for matrix in ("lora_A", "lora_B"):
        by_place: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in base.model.named_parameters():
            if f".{matrix}.reward." in name:
                place = name.partition(".layers.")[2].partition(".")[2]
                by_place.setdefault(place, []).append(parameter)
        for parameters in by_place.values():
            before = [parameter.clone() for parameter in parameters]
            for i, parameter in enumerate(parameters):
                parameter.copy_(before[i - 1])


# The tokenizer --------------------------------------------------------------------------------------------------------


def _legacy_prefix_space(parts: Parts) -> None:
    parts.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _reserved_tokens_added(parts: Parts) -> None:
    parts.tokenizer.add_tokens(RESERVED, special_tokens=True)

    def change(base: SharedBase) -> None:
        base.causal_lm.resize_token_embeddings(len(parts.tokenizer))
        for parameter in (*base.causal_lm.get_input_embeddings().parameters(), base.causal_lm.lm_head.weight):
            parameter.requires_grad_(False)
        base._lm_head = head_of(base.causal_lm)

    parts.change_base = change


MODELS: dict[str, Callable[[Parts], None]] = {
    "sampler_syncs_attention_only": partial(_with_generator, SyncsAttentionOnly),
    "sampler_has_own_temperature": partial(_with_generator, HasOwnTemperature),
    "sampler_reseeds_every_call": partial(_with_generator, ReseedsEveryCall),
    "sampler_uses_value_adapter": partial(_with_generator, UsesValueAdapter),
    "sampler_drops_last_prompt_token": partial(_with_generator, DropsLastPromptToken),
    "sampler_best_of_four": partial(_with_generator, BestOfFour),
    "sampler_prefills_without_adapter": partial(_with_generator, PrefillsWithoutAdapter),
    "sampler_tells_cumulative_logprobs": partial(_with_generator, TellsCumulativeLogprobs),
    "template_ends_in_a_space": partial(_template_goes_on, "{{ ' ' }}"),
    "legacy_prefix_space": _legacy_prefix_space,
    "reserved_tokens_added": _reserved_tokens_added,
    "reference_reads_value_adapter": partial(_with_change, _reference_reads_value_adapter),
    "policy_lora_b_frozen": partial(_with_change, _policy_lora_b_frozen),
    "rope_of_another_config": partial(_with_change, _rope_of_another_config),
    "reward_layers_off_by_one": partial(_with_change, _reward_layers_off_by_one),
}
