"""Prompts in, rollout out; answers by Transformers' `generate`, its continuous batching, or vLLM."""

from trl_ext.generation.continuous import ContinuousGenerator
from trl_ext.generation.rollouts import (
    BatchingGenerator,
    Generator,
    answer_suffix,
    check_chat_template,
    cut_at_eos,
    generate,
    tokenize_prompts,
)
from trl_ext.generation.vllm import VLLMGenerator

__all__ = [
    "BatchingGenerator",
    "ContinuousGenerator",
    "Generator",
    "VLLMGenerator",
    "answer_suffix",
    "check_chat_template",
    "cut_at_eos",
    "generate",
    "tokenize_prompts",
]
