"""What a trainer is built from: settings, base, generator, scorer."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from trl_ext.generation import (
    ContinuousGenerator,
    Generator,
    TransformersGenerator,
    VLLMGenerator,
    VLLMServerGenerator,
    VLLMServers,
)
from trl_ext.ppo.checks import as_list
from trl_ext.ppo.config import PPOConfig
from trl_ext.rewards import Scorer
from trl_ext.rewards.classifiers import tokenizer_of
from trl_ext.roles import SharedBase
from trl_ext.roles.adapters import HUB, Named, named
from trl_ext.tokens import after_answers

logger = logging.getLogger(__name__)


def default_config(model: Any) -> PPOConfig:
    """Settings for a trainer that was given none: TRL's defaults, and an output folder named after the model."""
    name = model if isinstance(model, str) else model.config.name_or_path
    return PPOConfig(f"{str(name).rstrip('/').split('/')[-1] or 'model'}-PPO")


def check_model(model: Any, peft_config: Any | None, quantization_config: Any | None) -> None:
    """Refuse combinations that make no sense, before anything is loaded.

    Raises:
        TypeError, ValueError: says what does not fit.
    """
    if isinstance(model, TrainingArguments):
        raise TypeError(
            "PPOTrainer got its settings first, as TRL 0.11's and 1.12's did: the order is PPOTrainer(model, "
            "reward_funcs, args, train_dataset, eval_dataset, processing_class), where model is the policy."
        )
    if not isinstance(model, (str, PreTrainedModel, PeftModel, SharedBase)):
        raise TypeError(
            f"model must be a name, a PreTrainedModel, a PeftModel or a SharedBase, not {type(model).__name__}."
        )
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        raise TypeError(
            f"peft_config must be a peft.LoraConfig, not {type(peft_config).__name__}: roles share a base by LoRA."
        )
    if peft_config is not None and isinstance(model, (PeftModel, SharedBase)):
        raise ValueError(f"The {type(model).__name__} has its adapters already: leave peft_config out.")
    if quantization_config is not None and not isinstance(model, str):
        raise ValueError(
            "The model is loaded already: give its quantization_config where you load it, not to the trainer."
        )


def check_args(args: Any) -> None:
    """Refuse another trainer's settings.

    Raises:
        TypeError: they are no PPOConfig.
    """
    if args is not None and not isinstance(args, PPOConfig):
        raise TypeError(
            f"args must be a trl_ext.PPOConfig, not {type(args).__name__}: give its settings to PPOConfig, which names "
            "those that are called otherwise."
        )


def build_base(model: Any, args: PPOConfig, quantization_config: Any | None, peft_config: Any | None) -> SharedBase:
    """The roles on a model given by name, as a model, with an adapter, or as a `SharedBase` already.

    Raises:
        ValueError: `args` say how to load a model that is loaded, or say it twice.
    """
    given: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if given and not isinstance(model, str):
        raise ValueError("The model is loaded already: give model_init_kwargs where you load it, not to PPOConfig.")
    if isinstance(model, SharedBase):
        return model
    if peft_config is None and not has_adapter(model, args):
        logger.warning("No peft_config: the policy is a LoRA adapter of rank 16 on every linear layer.")
    if not isinstance(model, str):
        return SharedBase.from_model(model, policy=peft_config)
    if quantization_config is not None:
        if given.get("quantization_config") is not None:
            raise ValueError("quantization_config is given twice, also in model_init_kwargs: leave it out there.")
        given["quantization_config"] = quantization_config
    quantized = given.get("quantization_config") is not None
    defaults = {"trust_remote_code": args.trust_remote_code, **args_of_gpu(args.device, args.bf16, quantized)}
    if quantized or "torch_dtype" in given:
        defaults.pop("dtype", None)
    return SharedBase.from_pretrained(model, policy=peft_config, **{**defaults, **given})


def check_peft_config(model: Any, peft_config: Any | None, args: PPOConfig) -> None:
    """Refuse new LoRA over an adapter's name.

    Raises:
        ValueError: says what to leave out.
    """
    if peft_config is not None and isinstance(model, str):
        _named(model, args).check_no_other(model, peft_config)


def has_adapter(model: Any, args: PPOConfig) -> bool:
    """Whether a model comes with an adapter, the policy then: a PeftModel, an adapter's name or folder, or what
    Transformers loaded from one."""
    if isinstance(model, str):
        return _named(model, args).adapter is not None
    return isinstance(model, PeftModel) or hasattr(model, "peft_config")


def _named(model: str, args: PPOConfig) -> Named:
    given: Any = args.model_init_kwargs or {}
    return named(model, **{name: given[name] for name in HUB if name in given})


def _of_vllm(base: SharedBase, args: PPOConfig) -> dict[str, Any]:
    """What vLLM in this process is to load as the base was loaded."""
    revision = base.model.peft_config[base.adapters["policy"]].revision  # which an adapter names of its base
    which = {} if revision is None else {"revision": revision, "tokenizer_revision": revision}
    return {"trust_remote_code": args.trust_remote_code, **which}


def args_of_gpu(device: torch.device, bf16: bool | None = None, quantized: bool = False) -> dict[str, Any]:
    """What a base that is loaded by name is loaded with on a GPU: there at once, unless FSDP shares it out there (a
    quantised one is made on the GPU), and, where it computes in bfloat16, in bfloat16: autocast would cast frozen
    float32 weights anew in every forward. Nothing on a CPU."""
    if device.type != "cuda":
        return {}
    place = {} if parse_flag_from_env("ACCELERATE_USE_FSDP") and not quantized else {"device_map": {"": device}}
    return {**place, **({"dtype": torch.bfloat16} if bf16 else {})}


def warn_of_outliers(base: SharedBase) -> None:
    """Tell of an 8-bit base that reads a row otherwise beside other rows: bitsandbytes takes the columns with outliers
    of the whole batch out of the 8 bits."""
    quantization = getattr(base.config, "quantization_config", None)
    of = quantization if isinstance(quantization, dict) else vars(quantization) if quantization is not None else {}
    if of.get("_load_in_8bit", of.get("load_in_8bit")) and of.get("llm_int8_threshold"):
        logger.warning(
            "The 8-bit base has llm_int8_threshold %g, by which a row's log-probabilities depend on the rows beside "
            "it, and the first ratio is not 1: set it to 0.",
            of["llm_int8_threshold"],
        )


def warn_of_turns(tokenizer: PreTrainedTokenizerBase, prompt: Any, ends: Sequence[int], template: Any) -> None:
    """Tell of a chat template that ends an answer with what is no EOS, as that of a base model may which has not been
    trained on it: answers would go on to their limit.

    Args:
        prompt: any one; texts have no template.
        ends: ids that end a completion.
        template: arguments of the chat template.
    """
    if isinstance(prompt, str):
        return
    after = [token for token in after_answers(tokenizer, template) if token != tokenizer.unk_token_id]
    first = next((token for token in after if tokenizer.decode([token]).strip()), None)
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if first in marks and not {*ends} & {*after}:
        logger.warning(
            "The chat template ends an answer with %r, and generation ends at %s: answers will go on to their limit. "
            "Set tokenizer.eos_token to what ends an answer, and give the tokenizer as processing_class.",
            tokenizer.decode([first]),
            ", ".join(repr(tokenizer.decode([token])) for token in sorted(ends)) or "nothing",
        )


def keep_outputs_precise(base: SharedBase, accelerator: Accelerator) -> None:
    """Have FSDP2 compute in half precision, as accelerate tells it to, but neither round what the base returns
    (log-probabilities, values) nor the gradients that it adds up.

    Raises:
        ValueError: it would cast a 4-bit base's weights, which are no numbers of that precision.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = None if plugin is None else plugin.mixed_precision_policy
    if plugin is None or policy is None:
        return
    storage = getattr(getattr(base.config, "quantization_config", None), "bnb_4bit_quant_storage", None)
    if storage is not None and storage.is_floating_point and storage != policy.param_dtype:
        raise ValueError(
            f"The base's 4-bit weights are stored as {storage}, and FSDP2 would cast them to {policy.param_dtype}: set "
            f"bnb_4bit_quant_storage to {str(policy.param_dtype).removeprefix('torch.')}."
        )
    plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None, reduce_dtype=torch.float32)


def check_generator(generator: Any, args: PPOConfig) -> None:
    """Refuse what cannot answer, and two who would.

    Raises:
        TypeError: it has no method `answers`.
        ValueError: `args` name another one.
    """
    if generator is None:
        return
    try:
        inspect.signature(generator.answers).bind([], None, "policy")
    except (AttributeError, TypeError, ValueError) as error:
        name = generator.__name__ if isinstance(generator, type) else type(generator).__name__
        raise TypeError(
            f"generator must have a method answers(prompt_ids, config, role), which {name} has not ({error}): give an "
            "object of such a class."
        ) from error
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name):
            raise ValueError(f"A generator is given and {name} is set: choose one of them.")


def build_generator(base: SharedBase, args: PPOConfig, accelerator: Accelerator) -> Generator:
    """Who answers, as `args` say.

    Raises:
        ConnectionError: a vLLM server is not up.
        ValueError: the base's own samples would be another policy's, or vLLM's would.
    """
    rows, tell = args.local_rollout_forward_batch_size, bool(args.vllm_importance_sampling_correction)
    if args.use_vllm and args.vllm_mode == "server":
        return _served(base, args)
    if args.use_vllm:
        return VLLMGenerator(
            base,
            base.config.name_or_path,
            args.vllm_gpu_memory_utilization,
            args.vllm_max_model_length,
            args.seed + accelerator.process_index,
            args.vllm_enable_sleep_mode,
            args.vllm_probe_tolerance,
            **_of_vllm(base, args),
        )
    if args.use_transformers_continuous_batching:
        settings: Any = args.transformers_continuous_batching_config
        return ContinuousGenerator(base, rows, settings, tell)
    base.check_generates()
    return TransformersGenerator(base, rows, tell)


def _served(base: SharedBase, args: PPOConfig) -> VLLMServerGenerator:
    servers = VLLMServers(args.vllm_server_urls, args.vllm_server_timeout, args.vllm_server_request_timeout)
    folder = Path(args.vllm_server_adapter_dir or Path(str(args.output_dir)) / "vllm")
    generator = VLLMServerGenerator(base, servers, folder, args.vllm_probe_tolerance)
    plain = (args.temperature, args.top_p, args.top_k, args.min_p or 0.0, args.repetition_penalty) == (1, 1, 0, 0, 1)
    if not (generator.processed or plain or args.vllm_importance_sampling_correction is False):
        raise ValueError(
            "The vLLM server tells raw log-probabilities, not those that it samples with at these sampling settings: "
            "start it with --logprobs-mode processed_logprobs, or set vllm_importance_sampling_correction to False."
        )
    return generator


def tokenizers_of(functions: list[Any], given: Any, args: PPOConfig) -> list[Any]:
    """The tokenizer of each reward model; None of a function."""
    pairs = zip(functions, as_list(given) or [None] * len(functions), strict=True)
    return [tokenizer_of(function, own, args.trust_remote_code) for function, own in pairs]


def build_scorer(functions: list[Any], tokenizers: list[Any], args: PPOConfig, device: torch.device) -> Scorer | None:
    """The reward functions as one; None where there are none, and the reward role scores."""
    if not functions:
        return None
    return Scorer(
        functions,
        tokenizers=tokenizers,
        device=device,
        chat_template_kwargs=args.chat_template_kwargs,  # type: ignore[arg-type]
        trust_remote_code=args.trust_remote_code,
        timeout=args.reward_timeout,
        batch_size=args.local_rollout_forward_batch_size,
    )


def without_dropout(base: SharedBase) -> None:
    """Make the training forward the same function as the scoring forward: every dropout 0, also those that layers, or
    the configs they look into, keep as a plain number (`attention_dropout`, `resid_pdrop`, `layerdrop`), and everything
    else as in eval mode."""
    base.deterministic = True
    base.train(base.training)
    for module in base.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for holder in (module, getattr(module, "config", module)):
            for name, value in list(vars(holder).items()):
                if isinstance(value, float) and "drop" in name:
                    setattr(holder, name, 0.0)
