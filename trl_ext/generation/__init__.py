"""Whoever answers: Transformers' `generate`, its continuous batching, vLLM, or anything with `answers`."""

from trl_ext._moved import moved
from trl_ext.generation.continuous import ContinuousGenerator
from trl_ext.generation.rollouts import Answers, BackgroundGenerator, GenerationError, Generator, begin, generate
from trl_ext.generation.transformers_generate import TransformersGenerator
from trl_ext.generation.vllm import VLLMGenerator
from trl_ext.generation.vllm_server import VLLMServerGenerator, VLLMServers

__all__ = [
    "Answers",
    "BackgroundGenerator",
    "ContinuousGenerator",
    "GenerationError",
    "Generator",
    "TransformersGenerator",
    "VLLMGenerator",
    "VLLMServerGenerator",
    "VLLMServers",
    "begin",
    "generate",
]

__getattr__ = moved(
    __name__, {name: f"trl_ext.tokens.{name}" for name in ("check_chat_template", "eos_ids", "tokenize_prompts")}
)
