"""Completions by Transformers' `generate`; one that has ended leaves its batch."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, GenerationMixin, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.integrations import is_deepspeed_zero3_enabled

from trl_ext.generation.rollouts import Answers, GenerationError
from trl_ext.tokens import as_ids, padded

# What may be set where `generate` is called again for the rest of a completion. Others count from the beginning of a
# call (min_new_tokens), keep a state of their own (guidance_scale), or give rows another meaning (num_beams).
CONTINUABLE = {
    *("max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "transformers_version"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "sequence_bias"),
    *("remove_invalid_values", "renormalize_logits"),
}
# The cache's layers that hold keys and values of each row, or nothing. By name: the last is not in Transformers before
# 5.23.
PLAIN_LAYERS = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}

_Completion = tuple[list[int], list[float]]  # its ids, and the log-probability that each was sampled with


class TransformersGenerator:
    """The roles' own base answers, as `generate` samples, in less time: prompts of like length share a batch, a prompt
    that a batch holds several times is read once, and completions that have ended leave the batch.

    Where the model or the settings do not allow this (`can_continue`), each batch is one call of `generate`.

    Args:
        base: the `SharedBase`.
        batch_size: most prompts of one `generate`.
        tell: note the log-probability that each token was sampled with.
    """

    def __init__(self, base: Any, batch_size: int, tell: bool = False) -> None:
        self.base, self.batch_size, self.tell = base, batch_size, tell

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `Generator.answers`.

        Raises:
            GenerationError: `config` asks for several completions of each prompt, or is no sampling whose probabilities
                could be told.
        """
        if config.num_return_sequences not in (None, 1):
            raise GenerationError(
                f"num_return_sequences is {config.num_return_sequences}, but each prompt gets one completion: leave it "
                "out, and set num_generations for several."
            )
        if self.tell and (mode := config.get_generation_mode()) != GenerationMode.SAMPLE:
            raise GenerationError(
                f"generation_kwargs ask for {mode.value.replace('_', ' ')}, which tells no probability that a token "
                "was sampled with: leave them out, or vllm_importance_sampling_correction."
            )
        # Where the base is shared out, each process would wait for the others' calls.
        goes_on = not self.base.sharded and can_continue(self.base.causal_lm, config)
        complete = self._in_parts if goes_on else self._at_once
        # The longest first: what does not fit into memory shows at once. Equal prompts come to lie side by side.
        order = sorted(range(len(prompt_ids)), key=lambda row: (-len(prompt_ids[row]), prompt_ids[row]))
        # Some models shift by padding what they read: there only prompts of one length share a batch.
        shared = itertools.groupby(order, lambda row: self.base.pads_left or len(prompt_ids[row]))
        parts = [list(group) for _, group in shared]
        batches = [part[at : at + self.batch_size] for part in parts for at in range(0, len(part), self.batch_size)]
        if self.base.sharded:  # as many calls in each process: the last batch is answered again
            batches += batches[-1:] * (max(gather_object([len(batches)])) - len(batches))
        completions: dict[int, _Completion] = {}
        for rows in batches:
            completions |= zip(rows, complete([prompt_ids[row] for row in rows], config, role), strict=True)
        written = [completions[row] for row in range(len(prompt_ids))]
        return Answers([ids for ids, _ in written], [logprobs for _, logprobs in written] if self.tell else None)

    def _at_once(self, prompts: list[list[int]], config: GenerationConfig, role: str) -> list[_Completion]:
        """By one call of `generate`."""
        ids, mask = self._padded(prompts, config)
        output, logprobs = self._generate(role, ids, mask, copy.deepcopy(config))
        written = output.sequences if self.tell else output
        return list(zip(written[:, ids.shape[1] :].tolist(), logprobs, strict=True))

    def _in_parts(self, prompts: list[list[int]], config: GenerationConfig, role: str) -> list[_Completion]:
        """By one call of `generate` after the other: each ends once a quarter of its rows have ended, and the next goes
        on with the others from their keys and values."""
        ids, mask = self._padded(prompts, config)
        width, longest = ids.shape[1], ids.shape[1] + config.max_new_tokens
        eos = torch.tensor(as_ids(config.eos_token_id), device=ids.device)

        def ended(ids: Tensor) -> Tensor:
            return torch.isin(ids[:, width:], eos).any(dim=1)

        def enough(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            return (4 * ended(ids).sum() >= len(ids)).expand(len(ids))

        config = copy.deepcopy(config)
        config.return_dict_in_generate = True  # for the cache
        cache = self._read_once(prompts, config, role)
        completions: list[_Completion] = [([], []) for _ in prompts]
        rows = list(range(len(prompts)))
        while rows:
            config.max_new_tokens = longest - ids.shape[1]
            output, logprobs = self._generate(role, ids, mask, config, enough, past_key_values=cache)
            ids, cache = output.sequences, output.past_key_values
            done = ended(ids) | (ids.shape[1] == longest)
            for row, is_done, written, more in zip(rows, done.tolist(), ids[:, width:].tolist(), logprobs, strict=True):
                completions[row] = (written if is_done else [], completions[row][1] + more)
            left = (~done).nonzero().squeeze(1).cpu()  # on the CPU it fits layers on any device
            rows = [rows[i] for i in left]
            ids, mask = ids[left], pad(mask[left], (0, ids.shape[1] - mask.shape[1]), value=1)
            cache.batch_select_indices(left)
        return completions

    def _read_once(self, prompts: list[list[int]], config: GenerationConfig, role: str) -> DynamicCache | None:
        """Keys and values of `prompts` but for the last column, which the next call of `generate` reads: each prompt is
        read once, then its row repeated. None where all prompts differ, one has only that last token, or one is longer
        than a sliding window: not every model slides it alike while it reads."""
        unique = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
        windows = (getattr(layer, "sliding_window", None) for layer in DynamicCache(config=self.base.config).layers)
        longest = min((window for window in windows if window is not None), default=math.inf)
        if len(unique) == len(prompts) or min(map(len, prompts)) == 1 or max(map(len, prompts)) > longest:
            return None
        ids, mask = self._padded(unique, config)
        reading = GenerationConfig(max_new_tokens=1, pad_token_id=config.pad_token_id, return_dict_in_generate=True)
        cache = self.base.generate(
            role=role, input_ids=ids[:, :-1], attention_mask=mask[:, :-1], generation_config=reading
        ).past_key_values
        cache.batch_select_indices(torch.tensor([unique.index(prompt) for prompt in prompts]))
        return cache

    def _generate(
        self, role: str, ids: Tensor, mask: Tensor, config: GenerationConfig, stop: Any = None, **more: Any
    ) -> tuple[Any, list[list[float]]]:
        """What `generate` returns, and the log-probability of each new token of each row; none of these where nobody
        asks."""
        noting, criteria = _Noting(), [stop] if stop is not None else []
        if self.tell:
            config.return_dict_in_generate = config.output_scores = True
            criteria.append(noting)
        output = self.base.generate(
            role=role,
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(criteria),
            **more,
        )
        return output, torch.cat(noting.columns, dim=1).tolist() if self.tell else [[] for _ in ids]

    def _padded(self, prompts: list[list[int]], config: GenerationConfig) -> tuple[Tensor, Tensor]:
        ids, mask = padded(prompts, config.pad_token_id, left=True)
        return ids.to(self.base.device), mask.long().to(self.base.device)


class _Noting:
    """A stopping criterion that never stops, but notes what `generate` has just sampled with: its scores after all of
    its processors."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """See `transformers.StoppingCriteria`."""
        self.columns.append(scores[-1].float().log_softmax(dim=-1).gather(1, input_ids[:, -1:]))
        scores[-1].set_()  # or `generate` would hold rows x vocabulary numbers a token
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def can_continue(model: Any, config: GenerationConfig) -> bool:
    """Whether `generate`, called again with its own cache for some of the rows, goes on as though it had never stopped:
    no setting stands against it, and all that the model remembers of a row are that row's keys and values."""
    if not set(config.to_diff_dict()) <= CONTINUABLE or config.max_new_tokens is None or config.use_cache is False:
        return False
    if is_deepspeed_zero3_enabled():
        return False  # each process would wait for the others' calls
    if model.config.is_encoder_decoder or model._is_stateful or _own_methods(type(model)):
        return False
    layers = DynamicCache(config=model.config).layers
    return {type(layer).__name__ for layer in layers} <= PLAIN_LAYERS


def _own_methods(model: type) -> set[str]:
    """The methods of `generate` that a model's class overrides."""
    before = itertools.takewhile(lambda kind: kind is not GenerationMixin, model.__mro__)
    own = {name for kind in before for name in vars(kind) if not name.startswith("__")}
    return own & set(vars(GenerationMixin))
