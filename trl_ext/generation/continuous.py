"""Answers by Transformers' continuous batching: an answer that has ended makes room at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from trl_ext.generation.rollouts import unpadded, with_answers


class ContinuousGenerator:
    """`SharedBase.generate` through continuous batching, for `trl_ext.generation.generate`.

    The roles' own base answers: unlike vLLM this needs no second copy of its weights, and no adapter is written. Keys
    and values take the memory that `rows` answers need, and give it back afterwards.

    Args:
        base: the `SharedBase`.
        rows: most answers that are being written at a time.
        settings: further fields of `transformers.generation.ContinuousBatchingConfig`.

    Raises:
        ValueError: a setting that it does not know, or of an impossible value.
    """

    def __init__(self, base: Any, rows: int, settings: dict[str, Any] | None = None) -> None:
        self.base, self._settings = base, {"max_requests_per_batch": rows, **(settings or {})}
        try:
            ContinuousBatchingConfig(**self._settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"transformers_continuous_batching_config: {error}") from error

    @property
    def device(self) -> torch.device:
        """Where ids come from and go to."""
        return torch.device("cpu")

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig, role: str = "policy"
    ) -> Tensor:
        """As `SharedBase.generate`: ids (batch, prompt + new tokens), padded on the right.

        Raises:
            RuntimeError: Transformers gave fewer answers than there are prompts.
        """
        prompts = unpadded(input_ids, attention_mask)
        with self.base.use(role):
            self.base.model.eval()
            given = self.base.causal_lm.generate_batch(
                prompts,
                generation_config=generation_config,
                continuous_batching_config=self._config(prompts, generation_config.max_new_tokens),
            )
        # Transformers logs what goes wrong, and goes on.
        ended = [one for one in given.values() if one.error is None]
        if len(ended) < len(prompts):
            why = next((f" ({one.error})" for one in given.values() if one.error), "")
            raise RuntimeError(
                f"Continuous batching gave {len(ended)} answers to {len(prompts)} prompts{why}: see the log above, or "
                "unset use_transformers_continuous_batching."
            )
        return with_answers(input_ids, [one.generated_tokens for one in ended], generation_config.pad_token_id)

    def _config(self, prompts: list[list[int]], new_tokens: int) -> ContinuousBatchingConfig:
        config = ContinuousBatchingConfig(**self._settings)
        if config.num_blocks is None:  # or it would take nearly all memory there is
            longest = max(len(prompt) for prompt in prompts) + new_tokens
            config.num_blocks = min(len(prompts), config.max_requests_per_batch) * math.ceil(longest / config.page_size)
        return config
