"""What mistakes_4.yaml names in words under `models`, as code on the embedded default, in the way of broken.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from broken import Parts, _with_base, _with_change, _with_generator
from more_models import Sampler
from tokenizers import normalizers
from transformers import AutoTokenizer, GenerationConfig

from trl_ext import SharedBase, demo
from trl_ext.generation import Answers, TransformersGenerator
from trl_ext.tokens import as_ids, padded

Ids = list[list[int]]
Weights = dict[str, torch.Tensor]
EVERY = 5  # calls from one copy of the weights to the next
INSERTED = 512  # id of the token that the older tokenizer did not have
NOISE = 1.0 / 32  # standard deviation: a multiplier of 1 at a clip norm of 1, over a minibatch's rows

# Who samples ----------------------------------------------------------------------------------------------------------


class Whole(Sampler):
    """A generator by one call of `generate`, whose rows still hold padding and prompts."""

    masked = True

    @torch.no_grad()
    def _rows(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> tuple[Ids, int]:
        """What `generate` returns, and how many columns the prompts have there."""
        ids, mask = padded(prompt_ids, int(config.pad_token_id), left=True)
        mask = mask.long() if self.masked else torch.ones_like(ids)
        output = self._base.generate(role=role, input_ids=ids, attention_mask=mask, generation_config=config)
        return output.tolist(), ids.shape[1]


class KeepsThePrompt(Whole):
    """It returns prompts and answers in one, as long as an answer may be."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        rows, width = self._rows(prompt_ids, config, role)
        pairs = zip(rows, prompt_ids, strict=True)
        return [row[width - len(prompt) :][: config.max_new_tokens] for row, prompt in pairs]


class SlicesByOwnLength(Whole):
    """It cuts each row at its own prompt's length, as if no padding stood before."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        rows, _ = self._rows(prompt_ids, config, role)
        return [row[len(prompt) :][: config.max_new_tokens] for row, prompt in zip(rows, prompt_ids, strict=True)]


class MasksNothing(Whole):
    """It reads the padding before a prompt as a part of it."""

    masked = False

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        rows, width = self._rows(prompt_ids, config, role)
        return [row[width:] for row in rows]


class SyncsEveryFifthTime(Sampler):
    """It answers with a copy of the policy's adapter that is made anew at every fifth call."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._calls, self._copy = 0, _weights(base)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        if role == "policy":
            self._calls += 1
            if self._calls % EVERY == 0:
                self._copy = _weights(self._base)
        with _exchanged(self._base, self._copy):
            return super().answers(prompt_ids, config, role)


class SyncsBackwards(Sampler):
    """Before it answers, it copies its own weights, the first policy's, into the base's."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._first = _weights(base)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        _load(self._base, self._first)
        return super().answers(prompt_ids, config, role)


class ForgetsToUnmerge(Sampler):
    """It adds the policy's adapter to the base's weights after each answer, and never takes it off."""

    @torch.no_grad()
    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        written = super().answers(prompt_ids, config, role)
        if role == "policy":
            for module in self._base.model.modules():
                if "policy" in getattr(module, "lora_A", {}):
                    module.base_layer.weight += module.get_delta_weight("policy")
        return written


class GetsTextWithoutMarks(Sampler):
    """Its prompts went through text, special tokens skipped."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        tokenizer = AutoTokenizer.from_pretrained(demo.model_path())
        texts = tokenizer.batch_decode(prompt_ids, skip_special_tokens=True)
        return super().answers(tokenizer(texts)["input_ids"], config, role)


class Retokenises(Sampler):
    """Its answers went through text, and back with a space before it; those that had ended get their EOS again."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        tokenizer, eos = AutoTokenizer.from_pretrained(demo.model_path()), as_ids(config.eos_token_id)
        answered = self._inner.answers(prompt_ids, config, role).ids
        texts = [f" {text}" for text in tokenizer.batch_decode(answered, skip_special_tokens=True)]
        again = zip(tokenizer(texts)["input_ids"], answered, strict=True)
        rows = [ids + ([eos[0]] if set(eos) & set(before) else []) for ids, before in again]
        return [ids[: config.max_new_tokens] for ids in rows]


class TellsBits(Sampler):
    """It tells log-probabilities to base two."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._inner = TransformersGenerator(base, 64, tell=True)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        drawn = self._inner.answers(prompt_ids, config, role)
        return Answers(drawn.ids, [[one / math.log(2) for one in row] for row in drawn.logprobs or []])


class KeepsTheConversation(Sampler):
    """Each row is a chat session: the turn before, prompt and answer, stands before a prompt."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._turns: dict[int, list[int]] = {}

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        asked = [self._turns.get(row, []) + prompt for row, prompt in enumerate(prompt_ids)]
        written = self._inner.answers(asked, config, role).ids
        pad = int(config.pad_token_id)
        for row, (prompt, answer) in enumerate(zip(prompt_ids, written, strict=True)):
            self._turns[row] = prompt + [token for token in answer if token != pad]
        return written


def _policy_parameters(base: SharedBase) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The policy's adapter, by name."""
    for name, parameter in base.model.named_parameters():
        if "lora_" in name and ".policy." in name:
            yield name, parameter


def _weights(base: SharedBase) -> Weights:
    """A copy of the policy's adapter."""
    return {name: parameter.detach().clone() for name, parameter in _policy_parameters(base)}


@torch.no_grad()
def _load(base: SharedBase, weights: Weights) -> None:
    for name, parameter in _policy_parameters(base):
        parameter.copy_(weights[name])


@contextmanager
def _exchanged(base: SharedBase, weights: Weights) -> Iterator[None]:
    """Inside, the policy's adapter has these weights."""
    kept = _weights(base)
    try:
        _load(base, weights)
        yield
    finally:
        _load(base, kept)


# What is done to the base ---------------------------------------------------------------------------------------------


def _value_shares_the_reward_adapter(parts: Parts) -> None:
    """Weights in two places go by the name of the first: the reward's matrices move behind the value's."""

    def change(base: SharedBase) -> None:
        for module in base.model.modules():
            if "reward" in getattr(module, "lora_A", {}):
                for matrices in (module.lora_A, module.lora_B):
                    matrices["reward"].weight = matrices["value"].weight
                    matrices["reward"] = matrices.pop("reward")

    _with_base(parts, value=demo.reward_adapter())
    parts.change_base = change


@torch.no_grad()
def _tokenizer_of_a_newer_version(base: SharedBase) -> None:
    """The base's rows stay behind by one from the new token on; its output weights are the same ones."""
    weight = base.causal_lm.get_input_embeddings().weight
    weight[INSERTED:-1] = weight[INSERTED + 1 :].clone()


def _policy_gradient_flipped(base: SharedBase) -> None:
    for _, parameter in _policy_parameters(base):
        parameter.register_hook(torch.neg)


def _policy_gradients_noised(parts: Parts) -> None:
    random_numbers = torch.Generator().manual_seed(parts.seed)

    def noised(gradient: torch.Tensor) -> torch.Tensor:
        return gradient + NOISE * torch.randn(gradient.shape, generator=random_numbers)

    def change(base: SharedBase) -> None:
        for _, parameter in _policy_parameters(base):
            parameter.register_hook(noised)

    parts.change_base = change


# The tokenizer --------------------------------------------------------------------------------------------------------


def _uncased_normalizer(parts: Parts) -> None:
    parts.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


MODELS: dict[str, Callable[[Parts], None]] = {
    "sampler_keeps_the_prompt": partial(_with_generator, KeepsThePrompt),
    "sampler_slices_by_own_length": partial(_with_generator, SlicesByOwnLength),
    "sampler_syncs_every_fifth_time": partial(_with_generator, SyncsEveryFifthTime),
    "sampler_gets_text_without_marks": partial(_with_generator, GetsTextWithoutMarks),
    "sampler_masks_nothing": partial(_with_generator, MasksNothing),
    "sampler_retokenises": partial(_with_generator, Retokenises),
    "sampler_tells_bits": partial(_with_generator, TellsBits),
    "sampler_syncs_backwards": partial(_with_generator, SyncsBackwards),
    "sampler_forgets_to_unmerge": partial(_with_generator, ForgetsToUnmerge),
    "sampler_keeps_the_conversation": partial(_with_generator, KeepsTheConversation),
    "value_shares_the_reward_adapter": _value_shares_the_reward_adapter,
    "tokenizer_of_a_newer_version": partial(_with_change, _tokenizer_of_a_newer_version),
    "policy_gradient_flipped": partial(_with_change, _policy_gradient_flipped),
    "policy_gradients_noised": _policy_gradients_noised,
    "uncased_normalizer": _uncased_normalizer,
}
