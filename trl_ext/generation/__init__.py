"""Prompts in, rollout out; answers by Transformers' `generate`, its continuous batching, or vLLM."""

from trl_ext.generation.continuous import ContinuousGenerator
from trl_ext.generation.rollouts import (
    BatchingGenerator,
    GenerationError,
    Generator,
    check_chat_template,
    cut_at_eos,
    eos_ids,
    generate,
    tokenize_prompts,
)
from trl_ext.generation.vllm import VLLMGenerator

__all__ = [
    "BatchingGenerator",
    "ContinuousGenerator",
    "GenerationError",
    "Generator",
    "VLLMGenerator",
    "check_chat_template",
    "cut_at_eos",
    "eos_ids",
    "generate",
    "tokenize_prompts",
]
