"""Names of yesterday: what TRL 0.11, TRL 1.12 and TRL's RLOO and GRPO call what has another name here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

T = TypeVar("T")

_LENGTH = "use total_episodes (completions), or max_steps (optimizer steps)"
_SIZES = "use per_device_train_batch_size, gradient_accumulation_steps and num_mini_batches, which it comes from"
_KL = "give AdaptiveKLCallback(AdaptiveKLController(init, target, horizon)) as a callback"
_REWARD = "use the trainer's reward_funcs, or SharedBase.from_pretrained(reward=...)"
_REFERENCE = "use SharedBase.from_pretrained(reference=...), or leave it out: the model as you give it is the reference"
_OUT = "leave it out"

_NONE = "there is nothing of the kind; leave it out"

# What each setting is here: a field, or what to do instead.
SETTINGS: dict[str, str] = {
    # RLOOConfig, GRPOConfig
    "beta": "kl_coef",
    "epsilon": "cliprange",
    "epsilon_high": "use cliprange, which bounds both sides",
    "loss_type": "use objective, whose loss is the mean over a minibatch's tokens",
    "num_iterations": "num_ppo_epochs",
    "normalize_advantages": "whiten_advantages",
    "scale_rewards": "use score_normalization or whiten_advantages",
    "generation_batch_size": _SIZES,
    "steps_per_generation": _SIZES,
    "mask_truncated_completions": "use missing_eos_penalty for completions that were cut off",
    "max_prompt_length": "leave it out: prompts are not cut",
    "importance_sampling_level": "leave it out: ratios are of tokens here",
    "delta": "dual_clip",
    "sync_ref_model": _NONE,
    "top_entropy_quantile": _NONE,
    **dict.fromkeys(
        (
            *("cache_implementation", "num_generations_eval", "pad_to_multiple_of", "multi_objective_aggregation"),
            *("off_policy_mask_threshold", "use_adaptive_entropy", "vllm_tensor_parallel_size", "tools"),
        ),
        _NONE,
    ),
    "rloo_k": "num_generations",
    # TRL 1.12
    "response_length": "max_completion_length",
    "stop_token": "leave it out: a completion ends at the model's EOS",
    "stop_token_id": "leave it out: a completion ends at the model's EOS",
    "sft_model_path": "use the trainer's model",
    "reward_model_path": _REWARD,
    "num_sample_generations": "log_completions",
    "model_adapter_name": _OUT,
    "ref_adapter_name": _REFERENCE,
    "batch_size": _SIZES,
    "mini_batch_size": _SIZES,
    "micro_batch_size": _SIZES,
    "local_batch_size": _SIZES,
    "local_mini_batch_size": _SIZES,
    "num_total_batches": _LENGTH,
    "world_size": _OUT,
    "dataset_num_proc": _OUT,
    "ds3_gather_for_generation": _OUT,
    # TRL 0.11
    "steps": _LENGTH,
    "ppo_epochs": "num_ppo_epochs",
    "init_kl_coef": "kl_coef",
    "adap_kl_ctrl": _KL,
    "target": _KL,
    "horizon": _KL,
    "kl_penalty": "kl_estimator",
    "use_score_scaling": "score_normalization",
    "use_score_norm": "score_normalization",
    "score_clip": "reward_clip_range",
    "early_stopping": "max_approx_kl",
    "target_kl": "max_approx_kl",
    "ratio_threshold": "max_ratio",
    "backward_batch_size": _SIZES,
    "forward_batch_size": "local_rollout_forward_batch_size",
    "reward_model": _REWARD,
    "query_dataset": "use the trainer's train_dataset",
    "exp_name": "run_name",
    "task_name": "run_name",
    "optimize_cuda_cache": _OUT,
    "optimize_device_cache": _OUT,
    "is_encoder_decoder": "leave it out: models are causal language models here",
    "project_kwargs": "output_dir",
    "tracker_kwargs": "use report_to, and the environment variables of the tracker",
    "accelerator_kwargs": "accelerator_config",
    "model_name": "use the trainer's model",
    "log_with": "report_to",
    "tracker_project_name": "run_name",
}
ARGUMENTS: dict[str, str] = {
    "ref_model": _REFERENCE,
    "ref_policy": _REFERENCE,
    "policy": "model",
    "reward_model": "reward_funcs",
    "reward_function": "reward_funcs",
    "value_model": "use SharedBase.from_pretrained(value=...), or leave it out",
    "config": "args",
    "tokenizer": "processing_class",
    "dataset": "train_dataset",
    "data_collator": "leave it out: prompts are padded here",
    "optimizer": "optimizers",
    "lr_scheduler": "optimizers",
}


def today(whose: str, name: str, names: dict[str, str]) -> str:
    """One sentence about an old name."""
    instead = names[name]
    return f"{whose} has no {name!r}: {instead if ' ' in instead else f'it is {instead} here'}."


def explained(function: Callable[..., T], whose: str, names: dict[str, str]) -> Callable[..., T]:
    """`function`, which says today's name where it is called with one of `names`.

    Raises:
        TypeError: it is.
    """
    known = inspect.signature(function).parameters

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> T:
        old = next((name for name in kwargs if name in names and name not in known), None)
        if old is not None:
            raise TypeError(today(whose, old, names))
        return function(*args, **kwargs)

    return checked
