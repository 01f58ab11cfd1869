"""Completions by Transformers' continuous batching: one that has ended makes room at once."""

from __future__ import annotations

import math
from typing import Any

from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from trl_ext.generation.rollouts import Answers, GenerationError, check_whole

# Transformers before 5.18 calls a page a block.
PAGE = "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
MOST_TOKENS = 8192  # that one pass reads, as Transformers has it


class ContinuousGenerator:
    """The roles' own base answers: unlike vLLM this needs no second copy of its weights, and no adapter is written.
    Keys and values take the memory that `rows` completions need, and give it back afterwards.

    Args:
        base: the `SharedBase`.
        rows: most completions that are being written at a time.
        settings: further fields of `transformers.generation.ContinuousBatchingConfig`.
        tell: note the log-probability that each token was sampled with.

    Raises:
        ValueError: a setting that it does not know, or a size below 1.
    """

    def __init__(self, base: Any, rows: int, settings: dict[str, Any] | None = None, tell: bool = False) -> None:
        settings = {PAGE if name == "page_size" else name: value for name, value in (settings or {}).items()}
        if "seed" in settings:
            raise ValueError(
                "transformers_continuous_batching_config has a seed, by which every rollout would draw the same: leave "
                "it out, for PPOConfig's seed counts."
            )
        settings |= {"return_logprobs": True} if tell else {}
        self.base, self.tell, self._settings = base, tell, {"max_requests_per_batch": rows, **settings}
        try:
            config = ContinuousBatchingConfig(**self._settings)
        except TypeError as error:
            raise ValueError(f"transformers_continuous_batching_config: {error}") from error
        for name in ("page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch"):
            size = getattr(config, PAGE if name == "page_size" else name)
            if size is not None and size < 1:
                raise ValueError(f"transformers_continuous_batching_config: {name} is {size}: raise it.")

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `Generator.answers`.

        Raises:
            GenerationError: Transformers gave fewer completions than there are prompts.
        """
        with self.base.use(role), self.base.path.constant():
            self.base.model.eval()
            try:
                outputs = self.base.causal_lm.generate_batch(
                    prompt_ids,
                    generation_config=config,
                    continuous_batching_config=self._config(prompt_ids, config.max_new_tokens),
                )
            except MemoryError as error:
                raise GenerationError(
                    f"Continuous batching has no room for its cache ({error}): lower local_rollout_forward_batch_size "
                    "or max_completion_length."
                ) from error
        # Transformers logs what goes wrong, and goes on.
        ended = [output for output in outputs.values() if output.error is None]
        if len(ended) < len(prompt_ids):
            why = next((f" ({output.error})" for output in outputs.values() if output.error), "")
            raise GenerationError(
                f"Continuous batching gave {len(ended)} completions for {len(prompt_ids)} prompts{why}: see the log "
                "above, or unset use_transformers_continuous_batching."
            )
        completions = [output.generated_tokens for output in ended]
        check_whole(completions, config)
        return Answers(completions, [output.logprobs for output in ended] if self.tell else None)

    def _config(self, prompt_ids: list[list[int]], new_tokens: int) -> ContinuousBatchingConfig:
        config = ContinuousBatchingConfig(**self._settings)
        # What is left open here takes nearly all memory there is: the blocks, or, in older Transformers, a mask for as
        # many tokens a pass as fit beside them.
        lengths = sorted(map(len, prompt_ids), reverse=True)[: config.max_requests_per_batch]
        if config.num_blocks is None:
            config.num_blocks = len(lengths) * math.ceil((lengths[0] + new_tokens) / getattr(config, PAGE))
        if config.max_batch_tokens is None:
            config.max_batch_tokens = min(sum(lengths), max(len(lengths), MOST_TOKENS))
        return config
