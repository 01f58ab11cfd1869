"""Completions by Transformers' `generate`."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from trl_ext.generation.rollouts import Answers
from trl_ext.tokens import padded


class TransformersGenerator:
    """The roles' own base answers.

    Args:
        base: the `SharedBase`.
        batch_size: most prompts of one `generate`.
    """

    def __init__(self, base: Any, batch_size: int) -> None:
        self.base, self.batch_size = base, batch_size

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `Generator.answers`."""
        completions: list[list[int]] = []
        for start in range(0, len(prompt_ids), self.batch_size):
            part, mask = padded(prompt_ids[start : start + self.batch_size], config.pad_token_id, left=True)
            written = self.base.generate(
                role=role,
                input_ids=part.to(self.base.device),
                attention_mask=mask.long().to(self.base.device),
                generation_config=config,
            )
            completions += written[:, part.shape[1] :].tolist()
        return Answers(completions)
