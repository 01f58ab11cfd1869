"""Completions by vLLM in this process, which loads the policy's adapter anew for each rollout.

vLLM keeps a copy of the base's weights of its own on the GPU.
Not run on a GPU by this project's tests, which check the calls against a stand-in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from trl_ext.generation.rollouts import Answers, check_whole
from trl_ext.generation.vllm_probe import check_same
from trl_ext.generation.vllm_server import AdapterFolders, check_lora, drawn_seeds, sampling_settings
from trl_ext.tokens import as_ids

NO_VLLM = "use_vllm is set, but vLLM is not installed: pip install 'trl-ext[vllm]', or unset it."


class VLLMGenerator:
    """vLLM answers, in this process, over a base of its own.

    A base that bitsandbytes quantised to 4 bits as it was loaded is quantised in vLLM too.

    Args:
        base: the `SharedBase`; its policy adapter is written to a temporary folder before each rollout.
        model: name or folder of the base model.
        memory: share of the GPU's memory that vLLM may use, 0 to 1.
        max_length: most tokens of prompt and completion; None: the model's own limit.
        seed: of vLLM's own random numbers; each completion's are drawn from torch's.
        sleep: move vLLM's weights to the CPU and drop its cache between rollouts (its sleep level 1).
        tolerance: most nats that its log-probs of a token may differ from the base's own, in the median, at the start;
            None: any.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the policy's LoRA is of a kind that vLLM cannot load, or vLLM speaks for another model.
    """

    def __init__(
        self,
        base: Any,
        model: str,
        memory: float,
        max_length: int | None,
        seed: int,
        sleep: bool = False,
        tolerance: float | None = None,
        **more: Any,
    ) -> None:
        try:
            import vllm
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise ImportError(NO_VLLM) from error
        check_lora(base)
        config = base.model.peft_config[base.adapters["policy"]]
        self.base, self._vllm, self._request, self._sleep = base, vllm, LoRARequest, sleep
        self._loads = 0
        self._llm = vllm.LLM(
            model=model,
            enable_lora=True,
            max_lora_rank=max(8, 1 << (config.r - 1).bit_length()),  # vLLM knows powers of two
            gpu_memory_utilization=memory,
            max_model_len=max_length,
            seed=seed,
            logprobs_mode="processed_logprobs",  # those that really sample
            enable_sleep_mode=sleep,
            **quantization_of(base),
            **more,
        )
        if tolerance is not None:
            check_same(base, self._probed, tolerance, "vLLM")

    def answers(self, prompt_ids: list[list[int]], config: GenerationConfig, role: str) -> Answers:
        """See `Generator.answers`."""
        answers = self._complete(prompt_ids, config, self.base.adapters[role], drawn_seeds(len(prompt_ids)))
        check_whole(answers.ids, config)
        return answers

    def _probed(self, prompt_ids: list[list[int]], config: GenerationConfig, adapted: bool) -> Answers:
        adapter = self.base.adapters["policy"] if adapted else None
        return self._complete(prompt_ids, config, adapter, list(range(len(prompt_ids))))

    def _complete(
        self, prompt_ids: list[list[int]], config: GenerationConfig, adapter: str | None, seeds: list[int]
    ) -> Answers:
        stop: dict[str, Any] = {"stop_token_ids": as_ids(config.eos_token_id), "ignore_eos": True}
        how = {"max_tokens": config.max_new_tokens, "logprobs": 0, **stop, **sampling_settings(config)}
        sampling = [self._vllm.SamplingParams(**how, seed=seed) for seed in seeds]
        asked = [{"prompt_token_ids": ids} for ids in prompt_ids]
        if self._sleep:
            self._llm.wake_up()
        with tempfile.TemporaryDirectory() as folder:
            request = None
            if adapter is not None:
                self._loads += 1  # a new number: what vLLM has cached of the adapter before is not used
                written = AdapterFolders(self.base, Path(folder)).write(adapter)
                request = self._request(written.name, self._loads, str(written.folder))
            outputs = self._llm.generate(asked, sampling, lora_request=request, use_tqdm=False)
        if self._sleep:
            self._llm.sleep(level=1)
        completions = [output.outputs[0] for output in outputs]
        ids = [list(completion.token_ids) for completion in completions]
        return Answers(ids, [_told(completion.token_ids, completion.logprobs) for completion in completions])


def _told(ids: Any, logprobs: Any) -> list[float]:
    return [float(of_token[token].logprob) for token, of_token in zip(ids, logprobs, strict=True)]


def quantization_of(base: Any) -> dict[str, Any]:
    """What vLLM is told so that it quantises its copy of the base to 4 bits as it loads, as bitsandbytes has done here.
    Another quantization is the checkpoint's own, which vLLM reads itself."""
    given: Any = getattr(base.config, "quantization_config", None)
    settings = given.to_dict() if hasattr(given, "to_dict") else given or {}
    return {"quantization": "bitsandbytes"} if settings.get("load_in_4bit") else {}
