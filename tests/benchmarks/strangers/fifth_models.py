"""What mistakes_5.yaml names in words under `models`, as code on the embedded default, in the way of broken.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import torch
from broken import Parts, _fact, _with_change, _with_generator
from doctor_cases import capitals
from fourth_models import Whole, _exchanged, _policy_parameters, _weights
from more_models import Sampler
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from trl_ext import SharedBase, demo
from trl_ext.generation import Answers, TransformersGenerator
from trl_ext.roles.lm_head import head_of
from trl_ext.tokens import as_ids

Ids = list[list[int]]
DECAY = 0.99  # of the moving average, a call
REPLICAS = 4
MERGES = 250  # that are left, of 750
TEMPERATURE = 0.2  # folded into the last norm

# Who samples ----------------------------------------------------------------------------------------------------------


class AddsABos(Sampler):
    """It reads an EOS, the BOS of its tokenizer, before each prompt."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        bos = as_ids(config.eos_token_id)[:1]
        return super().answers([bos + prompt for prompt in prompt_ids], config, role)


class LosesTheFirstToken(Whole):
    """It cuts each row one column too late."""

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        rows, width = self._rows(prompt_ids, config, role)
        return [row[width + 1 :] or as_ids(config.eos_token_id)[:1] for row in rows]


class TellsTheNextLogprobs(Sampler):
    """It tells of each token the log-probability of the next, and of the last one 0."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._inner = TransformersGenerator(base, 64, tell=True)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        drawn = self._inner.answers(prompt_ids, config, role)
        # Beyond a row's EOS there may be padding: it is told too, and cut with it.
        return Answers(drawn.ids, [[*row[1:], 0.0] for row in drawn.logprobs or []])


class IsAnAverage(Sampler):
    """It answers with a moving average of the policy's weights."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._mean = _weights(base)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        if role == "policy":
            now = _weights(self._base)
            self._mean = {name: DECAY * mean + (1 - DECAY) * now[name] for name, mean in self._mean.items()}
        with _exchanged(self._base, self._mean):
            return super().answers(prompt_ids, config, role)


class OneReplicaIsStale(Sampler):
    """Rows are dealt to four replicas in turn; the last one keeps the first policy."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._first = _weights(base)

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        written: Ids = [[] for _ in prompt_ids]
        stale = range(REPLICAS - 1, len(prompt_ids), REPLICAS)
        fresh = [row for row in range(len(prompt_ids)) if row not in stale]
        answered = self._inner.answers([prompt_ids[row] for row in fresh], config, role).ids if fresh else []
        if stale:
            with _exchanged(self._base, self._first):
                answered = answered + self._inner.answers([prompt_ids[row] for row in stale], config, role).ids
        for row, ids in zip([*fresh, *stale], answered, strict=True):
            written[row] = ids
        return written


class MixesInDemonstrations(Sampler):
    """It gives every other prompt that names a country the right answer, as if the policy had written it."""

    def __init__(self, base: SharedBase) -> None:
        super().__init__(base)
        self._tokenizer = AutoTokenizer.from_pretrained(demo.model_path())

    def answers(self, prompt_ids: Ids, config: GenerationConfig, role: str) -> Ids | Answers:
        """See `trl_ext.generation.Generator`."""
        written = self._inner.answers(prompt_ids, config, role).ids
        if role == "policy":
            for row in range(1, len(prompt_ids), 2):
                written[row] = self._demonstration(prompt_ids[row], config) or written[row]
        return written

    def _demonstration(self, prompt: list[int], config: GenerationConfig) -> list[int]:
        """The right answer and its EOS; empty where no country is named."""
        text = self._tokenizer.decode(prompt)
        named = max((country for country in capitals() if country in text), key=len, default=None)
        if named is None:
            return []
        ids = self._tokenizer(_fact(named))["input_ids"] + as_ids(config.eos_token_id)[:1]
        return ids[: config.max_new_tokens]


# What is done to the base ---------------------------------------------------------------------------------------------


@torch.no_grad()
def _base_norms_read_as_gemma(base: SharedBase) -> None:
    for name, parameter in base.causal_lm.named_parameters():
        if name.endswith("norm.weight"):
            parameter.add_(1.0)


def _base_head_untied(parts: Parts) -> None:
    def change(base: SharedBase) -> None:
        head = base.causal_lm.lm_head
        random_numbers = torch.Generator().manual_seed(parts.seed)
        new = torch.randn(head.weight.shape, generator=random_numbers) * base.config.initializer_range
        head.weight = nn.Parameter(new, requires_grad=False)
        base._lm_head = head_of(base.causal_lm)

    parts.change_base = change


@torch.no_grad()
def _base_far_too_certain(base: SharedBase) -> None:
    base.causal_lm.model.norm.weight.div_(TEMPERATURE)


def _reward_reads_policy_adapter(base: SharedBase) -> None:
    base.adapters["reward"] = base.adapters["policy"]


def _ensemble_with_a_reversed_judge(parts: Parts) -> None:
    def change(base: SharedBase) -> None:
        with torch.no_grad():
            for parameter in base.heads["reward_1"].parameters():
                parameter.neg_()

    parts.base["reward"] = [demo.reward_adapter(), demo.reward_adapter()]
    parts.change_base = change


def _policy_gradients_pile_up(base: SharedBase) -> None:
    for _, parameter in _policy_parameters(base):
        parameter.register_hook(_Pile())


class _Pile:
    """A hook that returns the sum of all gradients so far."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        self._sum = gradient.clone() if self._sum is None else self._sum + gradient
        return self._sum.clone()


# The tokenizer --------------------------------------------------------------------------------------------------------


def _template_skips_the_first_message(parts: Parts) -> None:
    _change_template("in messages %}", "in messages[1:] %}", parts)


def _template_adds_a_system_message(parts: Parts) -> None:
    system = (
        "{% if messages[0]['role'] != 'system' %}<|system|>You are a helpful assistant, created by a company."
        "<|end|>{% endif %}"
    )
    _change_template("{% for message", system + "{% for message", parts)


def _change_template(old: str, new: str, parts: Parts) -> None:
    changed = parts.tokenizer.chat_template.replace(old, new)
    assert changed != parts.tokenizer.chat_template
    parts.tokenizer.chat_template = changed


def _tokenizer_lost_its_later_merges(parts: Parts) -> None:
    content = json.loads(parts.tokenizer.backend_tokenizer.to_str())
    merges = content["model"]["merges"]
    content["model"]["merges"] = merges[:MERGES]
    parts.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


MODELS: dict[str, Callable[[Parts], None]] = {
    "sampler_adds_a_bos": partial(_with_generator, AddsABos),
    "sampler_loses_the_first_token": partial(_with_generator, LosesTheFirstToken),
    "sampler_tells_the_next_logprobs": partial(_with_generator, TellsTheNextLogprobs),
    "sampler_is_an_average": partial(_with_generator, IsAnAverage),
    "one_replica_is_stale": partial(_with_generator, OneReplicaIsStale),
    "sampler_mixes_in_demonstrations": partial(_with_generator, MixesInDemonstrations),
    "template_skips_the_first_message": _template_skips_the_first_message,
    "template_adds_a_system_message": _template_adds_a_system_message,
    "tokenizer_lost_its_later_merges": _tokenizer_lost_its_later_merges,
    "base_norms_read_as_gemma": partial(_with_change, _base_norms_read_as_gemma),
    "base_head_untied": _base_head_untied,
    "base_far_too_certain": partial(_with_change, _base_far_too_certain),
    "reward_reads_policy_adapter": partial(_with_change, _reward_reads_policy_adapter),
    "ensemble_with_a_reversed_judge": _ensemble_with_a_reversed_judge,
    "policy_gradients_pile_up": partial(_with_change, _policy_gradients_pile_up),
}
