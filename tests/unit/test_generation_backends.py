"""Answers by something else than Transformers' `generate`: its continuous batching, and the calls to vLLM against a
stand-in that answers from a list, for vLLM itself needs a GPU."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GenerationConfig

from tests.helpers import QUIET, move_policy, saved_model, tiny_llama, word_tokenizer
from trl_ext import PPOConfig, SharedBase
from trl_ext.generation import ContinuousGenerator, GenerationError, TransformersGenerator, VLLMGenerator, generate
from trl_ext.ppo.building import build_generator

CONFIG = GenerationConfig(
    max_new_tokens=5, do_sample=True, temperature=0.7, top_p=1.0, top_k=0, pad_token_id=0, eos_token_id=[1]
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []

    class LLM:
        def __init__(self, **settings: Any) -> None:
            made.append(settings)

        def generate(self, prompts: Any, sampling: Any, lora_request: Any, use_tqdm: bool) -> Any:
            files = sorted(path.name for path in Path(lora_request.path).iterdir()) if lora_request else []
            made.append((prompts, sampling, lora_request, files))
            written = [[[7, 1], [8, 9, 10, 11, 12]][i % 2] for i in range(len(prompts))]
            told = [[{token: SimpleNamespace(logprob=-token / 10)} for token in ids] for ids in written]
            pairs = zip(written, told, strict=True)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=i, logprobs=x)]) for i, x in pairs]

        def wake_up(self) -> None:
            made.append("awake")

        def sleep(self, level: int) -> None:
            made.append(f"asleep {level}")

    def request(name: str, number: int, path: str) -> Any:
        return SimpleNamespace(name=name, number=number, path=path)

    vllm, lora, requests = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    vllm.LLM, vllm.SamplingParams, requests.LoRARequest = LLM, dict, request  # type: ignore[attr-defined]
    for module in (vllm, lora, requests):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return made


def test_answers_come_back_as_a_rollout(calls: list[Any], tmp_path: Path) -> None:
    base = SharedBase.from_model(tiny_llama())
    generator = VLLMGenerator(base, "some/model", memory=0.4, max_length=64, seed=3)
    assert calls[0] == {
        "model": "some/model",
        "enable_lora": True,
        "max_lora_rank": 16,
        "gpu_memory_utilization": 0.4,
        "max_model_len": 64,
        "seed": 3,
        "logprobs_mode": "processed_logprobs",
        "enable_sleep_mode": False,
    }
    for number in (1, 2):
        how = GenerationConfig(**{**CONFIG.to_diff_dict(), "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2})
        rollout = generate(generator, ["the cat", "a"], word_tokenizer(), how)
        prompts, sampling, request, files = calls[number]
        assert prompts == [{"prompt_token_ids": [7, 9]}, {"prompt_token_ids": [8]}]
        seeds = [one.pop("seed") for one in sampling]
        assert len(set(seeds)) == 2, "each completion has random numbers of its own"
        expected = {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.1,
            "repetition_penalty": 1.2,
            "max_tokens": 5,
            "stop_token_ids": [1],
            "ignore_eos": True,
            "logprobs": 0,
        }
        assert sampling == [expected, expected]
        assert request.number == number and request.name.startswith("policy-"), "a new adapter each rollout"
        assert "adapter_model.safetensors" in files and "adapter_config.json" in files
    assert rollout.completion_ids.tolist() == [[7, 1, 0, 0, 0], [8, 9, 10, 11, 12]]
    assert rollout.has_eos.tolist() == [True, False]
    assert rollout.sampling_logprobs is not None
    torch.testing.assert_close(rollout.sampling_logprobs, -rollout.completion_ids / 10)
    assert rollout.prompt_mask.tolist() == [[True, True], [False, True]]


def test_an_answer_that_was_cut_off_early_is_refused(calls: list[Any]) -> None:
    """Its rest would be padding, and padding may be EOS: an end that nobody sampled."""
    generator = VLLMGenerator(SharedBase.from_model(tiny_llama()), "m", 0.3, 16, 0)
    longer = GenerationConfig(**{**CONFIG.to_diff_dict(), "max_new_tokens": 6})
    with pytest.raises(GenerationError, match=r"^A completion was cut off after 5 of 6 tokens: give the generator"):
        generate(generator, ["the cat", "a"], word_tokenizer(), longer)


def test_the_bare_base_needs_no_adapter(calls: list[Any]) -> None:
    generator = VLLMGenerator(SharedBase.from_model(tiny_llama()), "m", 0.3, None, 0)
    generator.answers([[5, 6], [7, 8]], CONFIG, "reference")
    assert calls[1][2] is None


def test_vllm_sleeps_between_rollouts(calls: list[Any]) -> None:
    generator = VLLMGenerator(SharedBase.from_model(tiny_llama()), "m", 0.3, None, 0, sleep=True)
    assert calls[0]["enable_sleep_mode"] is True
    for _ in range(2):
        generator.answers([[5, 6], [7, 8]], CONFIG, "policy")
    assert [call if isinstance(call, str) else "" for call in calls[1:]] == ["awake", "", "asleep 1"] * 2


def test_vllm_that_speaks_for_another_model_is_refused(calls: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^vLLM does not speak for this base: its log-probabilities of"):
        VLLMGenerator(SharedBase.from_model(tiny_llama()), "m", 0.3, None, 0, tolerance=0.2)


@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), {"quantization": "bitsandbytes"}),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, {"quantization": "bitsandbytes"}),
        ({"quant_method": "fp8"}, {}),
        (None, {}),
    ],
)
def test_the_quantization_of_the_base_goes_along(quantization: Any, said: dict[str, str], calls: list[Any]) -> None:
    base = SharedBase.from_model(tiny_llama())
    if quantization is not None:
        base.config.quantization_config = quantization
    VLLMGenerator(base, "m", 0.3, None, 0)
    assert {name: value for name, value in calls[0].items() if name == "quantization"} == said


@pytest.mark.parametrize(("r", "most"), [(4, 8), (8, 8), (12, 16), (33, 64)])
def test_vllm_knows_ranks_of_powers_of_two(r: int, most: int, calls: list[Any]) -> None:
    VLLMGenerator(
        SharedBase.from_model(tiny_llama(), policy=LoraConfig(r=r, target_modules=["q_proj"])), "m", 0.3, None, 0
    )
    assert calls[0]["max_lora_rank"] == most


def test_lora_that_vllm_cannot_load_is_refused(calls: list[Any]) -> None:
    base = SharedBase.from_model(tiny_llama(), policy=LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"^vLLM loads plain LoRA only"):
        VLLMGenerator(base, "m", 0.3, None, 0)


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"q_proj": 4}}, {"alpha_pattern": {"q_proj": 64}}])
def test_layers_that_vllm_would_scale_otherwise_are_refused(pattern: dict[str, Any], calls: list[Any]) -> None:
    base = SharedBase.from_model(tiny_llama(), policy=LoraConfig(target_modules=["q_proj"], **pattern))
    with pytest.raises(ValueError, match=r"^vLLM scales every layer by lora_alpha / r"):
        VLLMGenerator(base, "m", 0.3, None, 0)


def test_what_the_base_was_loaded_with_goes_along(calls: list[Any], tmp_path: Path) -> None:
    args = PPOConfig("run", **QUIET, use_vllm=True, trust_remote_code=True)
    args.vllm_probe_tolerance = None
    base = SharedBase.from_pretrained(saved_model(tmp_path / "model"), revision="v1")
    build_generator(base, args, Accelerator(cpu=True))
    named = {name: calls[0].get(name) for name in ("trust_remote_code", "revision", "tokenizer_revision")}
    assert named == {"trust_remote_code": True, "revision": "v1", "tokenizer_revision": "v1"}


def test_without_vllm_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"^use_vllm is set, but vLLM is not installed"):
        VLLMGenerator(SharedBase.from_model(tiny_llama()), "m", 0.3, None, 0)


# Continuous batching -------------------------------------------------------------------------------------------------

PROMPTS = ["the cat sat", "a", "the dog", "bird ran under the tree", "big"]


@pytest.fixture
def base() -> SharedBase:
    """Roles whose policy is not the base."""
    return move_policy(SharedBase.from_model(tiny_llama(), value="head"))


@pytest.mark.parametrize("role", ["policy", "reference"])
@pytest.mark.parametrize("rows", [2, 64])
def test_continuous_batching_gives_the_answers_of_generate(rows: int, role: str, base: SharedBase) -> None:
    greedy = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=[15, 16])
    plain = generate(TransformersGenerator(base, 5), PROMPTS, word_tokenizer(), greedy, role=role)
    other = generate(ContinuousGenerator(base, rows), PROMPTS, word_tokenizer(), greedy, role=role)
    assert len({int(n) for n in plain.completion_mask.sum(1)}) > 1, "answers end apart"
    assert other.completion_ids.tolist() == plain.completion_ids.tolist()
    assert other.has_eos.tolist() == plain.has_eos.tolist()
    assert other.completions == plain.completions


def test_continuous_batching_leaves_the_model_as_it_was(base: SharedBase) -> None:
    attention, ids = base.config._attn_implementation, torch.tensor([[7, 9, 12]])
    before = base(ids, torch.ones_like(ids), 2, roles=("policy",))["logprobs"]
    generate(ContinuousGenerator(base, 2), PROMPTS, word_tokenizer(), CONFIG)
    after = base(ids, torch.ones_like(ids), 2, roles=("policy",))["logprobs"]
    assert base.config._attn_implementation == attention
    assert after.requires_grad and torch.equal(before, after)


def test_continuous_batching_follows_torchs_seed(base: SharedBase) -> None:
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(generate(ContinuousGenerator(base, 2), PROMPTS, word_tokenizer(), CONFIG).completions)
    assert drawn[0] == drawn[1] != drawn[2]


def test_missing_answers_are_an_error(base: SharedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"one": SimpleNamespace(error=None), "two": SimpleNamespace(error="out of blocks")}
    monkeypatch.setattr(base.causal_lm, "generate_batch", lambda *_, **__: given)
    with pytest.raises(
        RuntimeError, match=r"^Continuous batching gave 1 completions for 5 prompts \(out of blocks\): see "
    ):
        generate(ContinuousGenerator(base, 2), PROMPTS, word_tokenizer(), CONFIG)


def test_continuous_batching_takes_no_more_memory_than_its_completions_need(base: SharedBase) -> None:
    """What is left open, Transformers takes from all the memory that the machine has."""
    prompts = [[5] * length for length in (3, 40, 2, 7)]
    config = ContinuousGenerator(base, 2, {"page_size": 16})._config(prompts, 10)
    assert (config.num_blocks, config.max_batch_tokens) == (2 * 4, 40 + 7)
    assert ContinuousGenerator(base, 2)._config([[5] * 6000] * 2, 10).max_batch_tokens == 8192
    chosen = ContinuousGenerator(base, 2, {"num_blocks": 9, "max_batch_tokens": 99})._config(prompts, 10)
    assert (chosen.num_blocks, chosen.max_batch_tokens) == (9, 99)


def test_an_unknown_setting_is_named(base: SharedBase) -> None:
    with pytest.raises(ValueError, match=r"^transformers_continuous_batching_config: .*page_sizes"):
        ContinuousGenerator(base, 2, {"page_sizes": 16})
    for name in ("page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch"):
        with pytest.raises(ValueError, match=rf"^transformers_continuous_batching_config: {name} is 0"):
            ContinuousGenerator(base, 2, {name: 0})
    with pytest.raises(ValueError, match=r"has a seed, by which every rollout would draw the same"):
        ContinuousGenerator(base, 2, {"seed": 0})
