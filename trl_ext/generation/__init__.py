"""Whoever answers: Transformers' `generate`, its continuous batching, vLLM, or anything with `answers`."""

from trl_ext.generation.continuous import ContinuousGenerator
from trl_ext.generation.rollouts import Answers, GenerationError, Generator, generate
from trl_ext.generation.transformers_generate import TransformersGenerator
from trl_ext.generation.vllm import VLLMGenerator

__all__ = [
    "Answers",
    "ContinuousGenerator",
    "GenerationError",
    "Generator",
    "TransformersGenerator",
    "VLLMGenerator",
    "generate",
]
