"""What mistakes_6.yaml names in words under `models`, as code on the embedded default, in the way of broken.py."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from broken import Parts, _with_change, _with_generator
from fifth_models import _change_template
from fourth_models import _policy_parameters
from more_models import Sampler, _lora_layers
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import GenerationConfig

from trl_ext import SharedBase
from trl_ext.demo.model import ASSISTANT, EOS, USER
from trl_ext.generation import Answers
from trl_ext.tokens import as_ids

Ids = list[list[int]]
Read = Callable[[str, Tensor], Tensor]
KEPT = 8  # tokens of a prompt
LIMIT = 6  # tokens of an answer
TIMES_OUT = 8  # one request of so many
DROPOUT = 0.1
DEFAULT_ALPHA = 8  # PEFT's lora_alpha, where a config does not say one
TOKENS = 32 * 16  # of a minibatch, by which its gradient has been divided before

# Who samples ----------------------------------------------------------------------------------------------------------


class TruncatesPrompts(Sampler):
    """It reads the last eight tokens of each prompt only."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        return super().answers([prompt[-KEPT:] for prompt in prompt_ids], config, role)


class ByOtherSettings(Sampler):
    """It answers by settings of its own in the place of those that it is given."""

    settings: ClassVar[dict[str, int | None]]

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        other = copy.deepcopy(config)
        for name, value in self.settings.items():
            setattr(other, name, value)
        return super().answers(prompt_ids, other, role)


class HasOwnLimit(ByOtherSettings):
    """It writes six tokens at most, whatever is asked for."""

    settings: ClassVar[dict[str, int | None]] = {"max_new_tokens": LIMIT}


class KeepsDropout(Sampler):
    """What each block of the base adds goes through dropout while it answers."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        base.check_generates()  # once, and not with dropout

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        blocks = [block for layer in self._base.causal_lm.model.layers for block in (layer.self_attn.o_proj, layer.mlp)]
        hooks = [block.register_forward_hook(_dropped) for block in blocks]
        try:
            return super().answers(prompt_ids, config, role)
        finally:
            for hook in hooks:
                hook.remove()


def _dropped(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """A forward hook: dropout on the output."""
    return nn.functional.dropout(output, DROPOUT)


class IgnoresEos(ByOtherSettings):
    """It writes on behind an EOS, up to the limit."""

    settings: ClassVar[dict[str, int | None]] = {"eos_token_id": None}


class AnswersNothingOnTimeout(Sampler):
    """One request of eight times out, and an EOS alone is put in its place."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        written = self._inner.answers(prompt_ids, config, role).ids
        eos = as_ids(config.eos_token_id)[:1]
        return [eos if row % TIMES_OUT == TIMES_OUT - 1 else ids for row, ids in enumerate(written)]


# What is done to the base ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _base_rope_in_the_other_layout(base: SharedBase) -> None:
    """The rows of queries and keys lie as pairs of neighbours, and are read as pairs of halves."""
    heads = base.config.num_attention_heads
    for layer in base.causal_lm.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.base_layer.weight
            halves = weight.view(heads, 2, -1, weight.shape[1])
            weight.copy_(halves.transpose(1, 2).reshape(weight.shape))


def _base_activation_of_another_config(base: SharedBase) -> None:
    for layer in base.causal_lm.model.layers:
        layer.mlp.act_fn = nn.GELU()


def _base_norms_left_trainable(base: SharedBase) -> None:
    for name, parameter in base.causal_lm.named_parameters():
        if name.endswith("norm.weight"):
            parameter.requires_grad_(True)


@torch.no_grad()
def _reward_adapter_at_default_alpha(base: SharedBase) -> None:
    for layer in _lora_layers(base, "reward"):
        layer.scaling["reward"] = DEFAULT_ALPHA / layer.r["reward"]


def _read_otherwise(change: Callable[[Read, str, Tensor], Tensor], base: SharedBase) -> None:
    """Heads are read as `change` says, from how they were read, the head's name and the hidden states."""
    base._read_head = partial(change, base._read_head)  # type: ignore[method-assign]


def _reward_with_dropout(read: Read, name: str, hidden: Tensor) -> Tensor:
    return read(name, nn.functional.dropout(hidden, DROPOUT) if name == "reward" else hidden)


def _value_through_a_sigmoid(read: Read, name: str, hidden: Tensor) -> Tensor:
    return read(name, hidden).sigmoid() if name == "value" else read(name, hidden)


def _policy_gradients_averaged_twice(base: SharedBase) -> None:
    for _, parameter in _policy_parameters(base):
        parameter.register_hook(lambda gradient: gradient / TOKENS)


# The tokenizer --------------------------------------------------------------------------------------------------------


def _template_exchanges_roles(parts: Parts) -> None:
    _change_template("<|{{ message['role'] }}|>{{ message", f"{ASSISTANT}{{{{ message", parts)
    _change_template(f"add_generation_prompt %}}{ASSISTANT}", f"add_generation_prompt %}}{USER}", parts)


def _tokenizer_splits_its_marks(parts: Parts) -> None:
    """As a tokenizer.json without added_tokens: marks are text, of which the pieces are tokens."""
    content = json.loads(parts.tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in (USER, ASSISTANT)]
    parts.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def _tokenizer_adds_an_eos(parts: Parts) -> None:
    eos = (EOS, parts.tokenizer.eos_token_id)
    parts.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {EOS}", None, [eos])


MODELS: dict[str, Callable[[Parts], None]] = {
    "sampler_truncates_prompts": partial(_with_generator, TruncatesPrompts),
    "sampler_has_own_limit": partial(_with_generator, HasOwnLimit),
    "sampler_keeps_dropout": partial(_with_generator, KeepsDropout),
    "sampler_ignores_eos": partial(_with_generator, IgnoresEos),
    "sampler_answers_nothing_on_timeout": partial(_with_generator, AnswersNothingOnTimeout),
    "template_exchanges_roles": _template_exchanges_roles,
    "tokenizer_splits_its_marks": _tokenizer_splits_its_marks,
    "tokenizer_adds_an_eos": _tokenizer_adds_an_eos,
    "base_rope_in_the_other_layout": partial(_with_change, _base_rope_in_the_other_layout),
    "base_activation_of_another_config": partial(_with_change, _base_activation_of_another_config),
    "base_norms_left_trainable": partial(_with_change, _base_norms_left_trainable),
    "reward_keeps_its_dropout": partial(_with_change, partial(_read_otherwise, _reward_with_dropout)),
    "reward_adapter_at_default_alpha": partial(_with_change, _reward_adapter_at_default_alpha),
    "value_head_ends_in_sigmoid": partial(_with_change, partial(_read_otherwise, _value_through_a_sigmoid)),
    "policy_gradients_averaged_twice": partial(_with_change, _policy_gradients_averaged_twice),
}
