"""Settings of a PPO run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from trl_ext._trl import BaseConfig


def _f(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


_ABOVE_ZERO, _FINITE = sys.float_info.min, sys.float_info.max
_BOUNDS = {
    "learning_rate": (0, _FINITE),
    "temperature": (_ABOVE_ZERO, _FINITE),
    "top_p": (_ABOVE_ZERO, 1.0),
    "top_k": (0, _FINITE),
    "min_p": (0, 1.0),
    "repetition_penalty": (_ABOVE_ZERO, _FINITE),
    "missing_eos_penalty": (_ABOVE_ZERO, _FINITE),
    "kl_coef": (0, _FINITE),
    "cliprange": (_ABOVE_ZERO, _FINITE),
    "cliprange_value": (_ABOVE_ZERO, _FINITE),
    "vf_coef": (0, _FINITE),
    "gamma": (0, 1.0),
    "lam": (0, 1.0),
    "total_episodes": (1, _FINITE),
    "num_completions_to_print": (0, _FINITE),
    "lam_value": (0, 1.0),
    "dual_clip": (1.0, _FINITE),
    "entropy_coef": (0, _FINITE),
    "ptx_coef": (0, _FINITE),
    "value_warmup_rollouts": (0, _FINITE),
    "max_approx_kl": (_ABOVE_ZERO, _FINITE),
    "max_ratio": (1.0, _FINITE),
    "penalty_coef": (_ABOVE_ZERO, _FINITE),
    "penalty_target": (_ABOVE_ZERO, _FINITE),
    "reward_timeout": (_ABOVE_ZERO, _FINITE),
    "vllm_gpu_memory_utilization": (_ABOVE_ZERO, 1.0),
}
_OPTIONAL = (
    "min_p",
    "missing_eos_penalty",
    "total_episodes",
    "lam_value",
    "dual_clip",
    "max_approx_kl",
    "max_ratio",
    "reward_timeout",
)
_COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_ppo_epochs",
    "num_mini_batches",
    "local_rollout_forward_batch_size",
    "max_completion_length",
    "num_generations",
    "normalization_samples",
    "ptx_max_length",
)
_CHOICES = {
    "kl_estimator": ("k1", "k2", "k3"),
    "objective": ("clip", "kl_penalty", "reinforce", "sequence"),
    "baseline": ("value", "mean", "leave_one_out"),
    "score_normalization": ("none", "running", "reference"),
}


@dataclass
class PPOConfig(BaseConfig):
    """`transformers.TrainingArguments` plus what PPO needs, under the names of TRL's own PPOConfig and RLOOConfig.

    One rollout holds `per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches` completions a
    process and is trained on for `num_ppo_epochs * num_mini_batches` optimizer steps. `global_step`, and with it
    `max_steps`, `save_steps` and `eval_steps`, counts optimizer steps, as for every Trainer.

    Defaults that differ from TrainingArguments': `learning_rate` 1e-5; `adam_epsilon` 1e-5; `logging_steps` one row a
    rollout; `gradient_checkpointing` on, as in TRL; `bf16` on where a GPU supports it; `dataloader_pin_memory` off
    (rows are texts); `remove_unused_columns` off (reward functions may want them).
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *BaseConfig._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "transformers_continuous_batching_config",
        "generation_kwargs",
        "chat_template_kwargs",
    ]

    learning_rate: float = _f(1e-5, "Initial learning rate of AdamW; small models learn by 1e-4 and more.")
    adam_epsilon: float = _f(1e-5, "Epsilon of AdamW (the value of the PPO papers).")
    logging_steps: float | None = _f(None, "Log every so many optimizer steps; None: once a rollout.")
    dataloader_pin_memory: bool = _f(False, "Rows are dicts of texts: there is nothing to pin.")
    bf16: bool | None = _f(None, "bfloat16 autocast; None: where a GPU supports it and fp16 is off.")
    remove_unused_columns: bool = _f(
        False, "Drop dataset columns other than 'prompt' before reward functions see them."
    )

    # Model
    model_init_kwargs: dict[str, Any] | str | None = _f(
        None,
        "Arguments of AutoModelForCausalLM.from_pretrained (dtype, device_map, ...) where the model is a name. On a "
        "GPU its dtype is bfloat16 where bf16 is on.",
    )
    trust_remote_code: bool = _f(False, "Run code that ships with a model on loading it.")
    disable_dropout: bool = _f(True, "Set every dropout of the model to 0: with dropout the first ratio is not 1.")

    # Rollout
    total_episodes: int | None = _f(None, "Completions of the whole run; overrides num_train_epochs and max_steps.")
    num_mini_batches: int = _f(1, "Minibatches (optimizer steps) a rollout is split into, each PPO epoch.")
    local_rollout_forward_batch_size: int = _f(
        64, "Rows of one forward without gradient, and of one generate, a process."
    )
    num_generations: int = _f(
        1, "Answers to each prompt of a rollout; above 1, objectives without a critic compare them."
    )
    max_completion_length: int = _f(256, "Most tokens of an answer.")
    temperature: float = _f(1.0, "Sampling temperature; log-probabilities are taken at it too.")
    top_p: float = _f(1.0, "Nucleus sampling. Below 1, sampled tokens no longer follow the scored distribution.")
    top_k: int = _f(0, "Sample among so many tokens only; 0: all. See top_p.")
    min_p: float | None = _f(None, "Least probability of a token, relative to the likeliest. See top_p.")
    repetition_penalty: float = _f(1.0, "Above 1: repeated tokens become less likely. See top_p.")
    use_vllm: bool = _f(False, "Let vLLM answer, with a copy of the base of its own on this GPU.")
    vllm_gpu_memory_utilization: float = _f(0.3, "Share of the GPU's memory for vLLM.")
    vllm_max_model_length: int | None = _f(None, "Most tokens of prompt and answer in vLLM; None: the model's limit.")
    use_transformers_continuous_batching: bool = _f(
        False, "Answer by Transformers' continuous batching: an answer that has ended makes room at once."
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = _f(
        None, "Fields of transformers' ContinuousBatchingConfig."
    )
    generation_kwargs: dict[str, Any] | str | None = _f(None, "Further fields of transformers.GenerationConfig.")
    chat_template_kwargs: dict[str, Any] | str | None = _f(None, "Arguments of the chat template.")
    shuffle_dataset: bool = _f(True, "Shuffle the prompts, anew each epoch.")

    # Reward
    reward_weights: list[float] | None = _f(None, "One weight a reward function; None: all 1.")
    reward_clip_range: list[float] | None = _f(None, "Least and greatest score of a completion, after weighting.")
    score_normalization: str = _f(
        "none",
        "Scale each reward function: 'running' divides by a running std after taking off the running mean; 'reference' "
        "makes mean 0 and std 1 on answers of the reference, once, at the start.",
    )
    normalization_samples: int = _f(256, "Answers of the reference that 'reference' normalisation is made from.")
    reward_timeout: float | None = _f(None, "Most seconds that one call of a reward function may take; None: any.")
    missing_eos_penalty: float | None = _f(None, "Subtracted from the score of an answer that was cut off. Positive.")
    kl_coef: float = _f(0.05, "Weight of the per-token KL to the reference in the reward; read anew each rollout.")
    kl_estimator: str = _f("k1", "Estimator of that KL: k1, k2 or k3.")
    whiten_rewards: bool = _f(False, "Scale the rewards of a rollout to variance 1, keeping their mean.")

    # Objective
    objective: str = _f(
        "clip",
        "What the policy is trained on. 'clip': PPO's clipped surrogate; "
        "'kl_penalty': PPO's penalty on the KL from the sampling policy, adaptive; "
        "'reinforce': the plain policy gradient with a baseline; 'sequence': clipped, one advantage a completion, no "
        "critic.",
    )
    baseline: str = _f("leave_one_out", "Of 'reinforce': 'value' (the value role), 'mean' or 'leave_one_out'.")
    penalty_coef: float = _f(1.0, "Of 'kl_penalty': beta to start with.")
    penalty_target: float = _f(0.01, "Of 'kl_penalty': KL that an update should make, nats a token.")
    entropy_coef: float = _f(0.0, "Weight of an entropy bonus.")
    ptx_coef: float = _f(0.0, "Weight of the log-likelihood of ptx_dataset's texts, mixed into the policy's loss.")
    ptx_max_length: int = _f(256, "Most tokens of such a text.")

    # Update
    num_ppo_epochs: int = _f(4, "Passes over a rollout.")
    cliprange: float = _f(0.2, "Clip range of the policy's probability ratio.")
    cliprange_value: float = _f(0.2, "Clip range of the value's step.")
    dual_clip: float | None = _f(None, "Bound on the ratio where the advantage is negative, above 1; None: none.")
    vf_coef: float = _f(0.1, "Weight of the value loss.")
    gamma: float = _f(1.0, "Discount a token.")
    lam: float = _f(0.95, "Lambda of generalised advantage estimation.")
    lam_value: float | None = _f(None, "Lambda of the returns that the value role learns; None: lam.")
    whiten_advantages: bool = _f(True, "Scale the advantages of a rollout to mean 0 and variance 1.")

    # Guards
    max_approx_kl: float | None = _f(
        None, "End an update's epochs when a minibatch's approxkl (nats a token) is above."
    )
    max_ratio: float | None = _f(None, "Do not step on a minibatch whose mean ratio is above it or below its inverse.")
    value_warmup_rollouts: int = _f(0, "Rollouts at the start on which the value role alone is trained.")

    # Looking
    log_completions: bool = _f(False, "Print sample completions at each log and save all of them under completions/.")
    num_completions_to_print: int = _f(4, "Rows of that table.")

    def __post_init__(self) -> None:
        self._check()
        if self.logging_steps is None:
            self.logging_steps = self.steps_per_rollout
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            )
        super().__post_init__()
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the number of completions a rollout has: set it to False and lower "
                "per_device_train_batch_size (raising gradient_accumulation_steps) instead."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def uses_value(self) -> bool:
        """Whether the objective has a critic."""
        return self.objective in ("clip", "kl_penalty") or (self.objective == "reinforce" and self.baseline == "value")

    @property
    def mini_batch_size(self) -> int:
        """Completions of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def rollout_batch_size(self) -> int:
        """Completions of one rollout, over all processes."""
        return self.mini_batch_size * self.num_mini_batches

    def _check(self) -> None:
        for name in _COUNTS:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be a whole number, at least 1.")
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, (int, float)) or not low <= value <= high:
                least = "positive" if low == _ABOVE_ZERO else f"at least {low:g}"
                most = "" if high == _FINITE else f" and at most {high:g}"
                raise ValueError(f"{name} is {value}: it must be {least}{most}.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        if self.objective == "reinforce" and self.num_ppo_epochs > 1:
            raise ValueError(
                f"objective 'reinforce' knows no old policy, so a second pass over a rollout would be off-policy: set "
                f"num_ppo_epochs to 1, not {self.num_ppo_epochs}."
            )
        if self.value_warmup_rollouts and not self.uses_value:
            raise ValueError(
                f"value_warmup_rollouts is {self.value_warmup_rollouts}, but objective {self.objective!r} has no "
                "critic here: leave it out."
            )
        if self.gamma != 1.0 and not self.uses_value:
            raise ValueError(
                f"gamma is {self.gamma}, but objective {self.objective!r} has no critic here and sums rewards as they "
                "are: leave gamma at 1."
            )
        if self.use_vllm and self.generation_kwargs:
            raise ValueError("generation_kwargs are Transformers' and would not reach vLLM: unset them, or use_vllm.")
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError("use_vllm and use_transformers_continuous_batching are both set: choose one of them.")
        if self.use_transformers_continuous_batching and (self.generation_kwargs or self.repetition_penalty != 1.0):
            raise ValueError(
                "Continuous batching knows neither generation_kwargs nor repetition_penalty: leave them out, or "
                "use_transformers_continuous_batching."
            )
        if self.torch_compile and self.gradient_checkpointing:
            raise ValueError(
                "torch_compile cannot follow recomputation that restores a role's adapter: set gradient_checkpointing "
                "to False, or leave torch_compile out."
            )
        clip = self.reward_clip_range
        if clip is not None and (len(clip) != 2 or not clip[0] < clip[1]):
            raise ValueError(f"reward_clip_range is {clip}: give the least and the greatest score, as in [-1, 1].")
