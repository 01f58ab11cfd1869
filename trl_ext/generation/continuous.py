"""Answers by Transformers' continuous batching: an answer that has ended makes room at once."""

from __future__ import annotations

import math
from typing import Any

from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from trl_ext.generation.rollouts import BatchingGenerator, GenerationError


class ContinuousGenerator(BatchingGenerator):
    """`SharedBase.generate` through continuous batching, for `trl_ext.generation.generate`.

    The roles' own base answers: unlike vLLM this needs no second copy of its weights, and no adapter is written. Keys
    and values take the memory that `rows` answers need, and give it back afterwards.

    Args:
        base: the `SharedBase`.
        rows: most answers that are being written at a time.
        settings: further fields of `transformers.generation.ContinuousBatchingConfig`.

    Raises:
        ValueError: a setting that it does not know, or pages of no token.
    """

    def __init__(self, base: Any, rows: int, settings: dict[str, Any] | None = None) -> None:
        self.base, self._settings = base, {"max_requests_per_batch": rows, **(settings or {})}
        try:
            config = ContinuousBatchingConfig(**self._settings)
        except TypeError as error:
            raise ValueError(f"transformers_continuous_batching_config: {error}") from error
        if config.page_size < 1:
            raise ValueError(f"transformers_continuous_batching_config: page_size is {config.page_size}: raise it.")

    def answers(self, prompts: list[list[int]], config: GenerationConfig, role: str) -> list[list[int]]:
        """Ids of one answer to each prompt's ids, in their order.

        Raises:
            GenerationError: Transformers gave fewer answers than there are prompts.
        """
        with self.base.use(role):
            self.base.model.eval()
            try:
                given = self.base.causal_lm.generate_batch(
                    prompts,
                    generation_config=config,
                    continuous_batching_config=self._config(prompts, config.max_new_tokens),
                )
            except MemoryError as error:
                raise GenerationError(
                    f"Continuous batching has no room for its cache ({error}): lower local_rollout_forward_batch_size "
                    "or max_completion_length."
                ) from error
        # Transformers logs what goes wrong, and goes on.
        ended = [one for one in given.values() if one.error is None]
        if len(ended) < len(prompts):
            why = next((f" ({one.error})" for one in given.values() if one.error), "")
            raise GenerationError(
                f"Continuous batching gave {len(ended)} answers to {len(prompts)} prompts{why}: see the log above, or "
                "unset use_transformers_continuous_batching."
            )
        return [one.generated_tokens for one in ended]

    def _config(self, prompts: list[list[int]], new_tokens: int) -> ContinuousBatchingConfig:
        config = ContinuousBatchingConfig(**self._settings)
        if config.num_blocks is None:  # or it would take nearly all memory there is
            longest = max(len(prompt) for prompt in prompts) + new_tokens
            config.num_blocks = min(len(prompts), config.max_requests_per_batch) * math.ceil(longest / config.page_size)
        return config
