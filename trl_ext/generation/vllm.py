"""Completions by vLLM, which loads the policy's adapter anew for each rollout.

vLLM keeps a copy of the base's weights of its own on the GPU.
Not run on a GPU by this project's tests, which check the calls against a stand-in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from trl_ext.generation.rollouts import Answers, check_whole
from trl_ext.tokens import as_ids


class VLLMGenerator:
    """vLLM answers, in this process, over a base of its own.

    Args:
        base: the `SharedBase`; its policy adapter is written to a temporary folder before each rollout.
        model: name or folder of the base model.
        memory: share of the GPU's memory that vLLM may use, 0 to 1.
        max_length: most tokens of prompt and completion; None: the model's own limit.
        seed: of vLLM's sampling.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the policy's LoRA is of a kind that vLLM cannot load.
    """

    def __init__(self, base: Any, model: str, memory: float, max_length: int | None, seed: int) -> None:
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ImportError("use_vllm is set, but vLLM is not installed: pip install vllm, or unset it.") from error
        config = base.model.peft_config[base.adapters["policy"]]
        if config.use_dora or config.lora_bias:
            raise ValueError("vLLM loads plain LoRA only: leave out use_dora and lora_bias, or use_vllm.")
        self.base, self._vllm, self._request = base, vllm, LoRARequest
        self._rollouts = 0
        self._llm = vllm.LLM(
            model=model,
            enable_lora=True,
            max_lora_rank=max(8, 1 << (config.r - 1).bit_length()),  # vLLM knows powers of two
            gpu_memory_utilization=memory,
            max_model_len=max_length,
            seed=seed,
        )

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `Generator.answers`."""
        sampling = self._vllm.SamplingParams(
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k or -1,  # 0 here, -1 there: all tokens
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            max_tokens=config.max_new_tokens,
            stop_token_ids=as_ids(config.eos_token_id),
        )
        asked = [{"prompt_token_ids": ids} for ids in prompt_ids]
        adapter = self.base.adapters[role]
        with tempfile.TemporaryDirectory() as folder:
            request = None
            if adapter is not None:
                self.base.model.save_pretrained(folder, selected_adapters=[adapter])
                nested = Path(folder) / adapter  # where PEFT puts an adapter that is not called "default"
                self._rollouts += 1
                path = str(nested if nested.is_dir() else folder)
                request = self._request(f"{adapter}-{self._rollouts}", self._rollouts, path)
            outputs = self._llm.generate(asked, sampling, lora_request=request, use_tqdm=False)
        completions = [list(output.outputs[0].token_ids) for output in outputs]
        check_whole(completions, config)
        return Answers(completions)
