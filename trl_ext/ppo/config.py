"""Settings of a PPO run."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from dataclasses import dataclass, field
from difflib import get_close_matches
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
from transformers import GenerationConfig

from trl_ext._trl import BaseConfig
from trl_ext.core import CorrectionMode, EnsembleName, KLEstimator
from trl_ext.diagnostics.planned import BY_EVALUATION
from trl_ext.hub import PickledWithoutSecrets
from trl_ext.ppo.objectives import OBJECTIVES, Baseline, Objective, ObjectiveName
from trl_ext.ppo.yesterday import SETTINGS, explained
from trl_ext.runs import without_secrets
from trl_ext.tokens import as_ids

if TYPE_CHECKING:
    ObjectiveChoice = ObjectiveName | Objective
else:
    ObjectiveChoice = ObjectiveName  # what a command line can say


class Bounds(NamedTuple):
    """What a number may be: finite, at least `low` (above it, where `open_`), at most `high`."""

    low: float = 0.0
    high: float = math.inf
    open_: bool = False
    whole: bool = False

    def refusal(self, value: Any) -> str | None:
        """What `value` must be instead, in words; None where it is fine."""
        low, is_kind = self.low, isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        finite = is_kind and abs(value) <= sys.float_info.max
        if finite and (value > low if self.open_ else value >= low) and value <= self.high:
            return None
        if self.whole:
            return f"a whole number, at least {low:g}"
        most = "" if self.high == math.inf else f" and at most {self.high:g}"
        return f"{'positive' if self.open_ else f'at least {low:g}'}{most}"


# Bounds are part of a field's type. Argument parsers read the type without them.
Count = Annotated[int, Bounds(1, whole=True)]
CountFromZero = Annotated[int, Bounds(0, whole=True)]
Positive = Annotated[float, Bounds(0, open_=True)]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
PositiveShare = Annotated[float, Bounds(0, 1, open_=True)]
AtLeastOne = Annotated[float, Bounds(1)]


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(Bounds(-math.inf).refusal(value) is None for value in values)


# Arguments of apply_chat_template that no template sees, and that change what the trainer gets from it.
NOT_THE_TEMPLATES = {
    *("padding", "truncation", "max_length", "tokenize", "tokenizer_kwargs", "conversation"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}

# Fields of TrainingArguments that PPO cannot do anything good with, each with why and what to do.
NOT_FOR_PPO = {
    "neftune_noise_alpha": "noise in training alone makes another policy than the one that sampled: leave it out",
    "label_smoothing_factor": "PPO has no labels that could be smoothed: leave it out",
    "train_sampling_strategy": "prompts come in the order that shuffle_dataset sets: leave it out",
    "dataloader_drop_last": "a rollout is whole anyway, and an evaluation would leave prompts out: leave it out",
    "enable_jit_checkpoint": "SIGTERM is answered by a checkpoint already: leave it out",
    "bf16_full_eval": "an evaluation has the precision of the training: leave it out",
    "fp16_full_eval": "an evaluation has the precision of the training: leave it out",
    "use_liger_kernel": "Liger's kernels replace a loss that PPO does not have: leave it out",
    "ddp_static_graph": "each role's backward touches its own adapter alone: leave it out",
    "debug": "what watches every module's output cannot read PPO's: leave it out",
}


def _word(setting: Any) -> str:
    """What stands for a setting on a command line, whether Transformers has made an Enum of it or not."""
    return str(getattr(setting, "value", setting))


def _f(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PPOConfig(PickledWithoutSecrets, BaseConfig):
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

    learning_rate: NotNegative = _f(1e-5, "Initial learning rate of AdamW; small models learn by 1e-4 and more.")
    adam_epsilon: NotNegative = _f(1e-5, "Epsilon of AdamW (the value of the PPO papers).")
    logging_steps: Positive | None = _f(None, "Log every so many optimizer steps; None: once a rollout.")
    dataloader_pin_memory: bool = _f(False, "Rows are dicts of texts: there is nothing to pin.")
    bf16: bool | None = _f(None, "bfloat16 autocast; None: where a GPU supports it and fp16 is off.")
    remove_unused_columns: bool = _f(
        False, "Drop dataset columns other than 'prompt' before reward functions see them."
    )

    per_device_train_batch_size: Count = _f(8, "Completions per micro-batch and process.")
    gradient_accumulation_steps: Count = _f(1, "Micro-batches of one optimizer step.")

    # Model
    model_init_kwargs: dict[str, Any] | str | None = _f(
        None,
        "Arguments of AutoModelForCausalLM.from_pretrained (dtype, device_map, ...) where the model is a name. On a "
        "GPU its dtype is bfloat16 where bf16 is on.",
    )
    trust_remote_code: bool = _f(False, "Run code that ships with a model on loading it.")
    disable_dropout: bool = _f(True, "Set dropout to 0, and routers' noise: with either the first ratio is not 1.")

    # Rollout
    total_episodes: Count | None = _f(None, "Completions of the whole run, in place of num_train_epochs and max_steps.")
    num_mini_batches: Count = _f(1, "Minibatches (optimizer steps) a rollout is split into, each PPO epoch.")
    local_rollout_forward_batch_size: Count = _f(
        64, "Rows per forward without gradient, and per generate, on a process."
    )
    num_generations: Count = _f(
        1, "Completions of each prompt of a rollout; above 1, objectives without a critic compare them."
    )
    max_completion_length: Count = _f(256, "Most tokens of a completion.")
    temperature: Positive = _f(1.0, "Sampling temperature; log-probabilities are taken at it too.")
    top_p: PositiveShare = _f(
        1.0, "Nucleus sampling. Below 1, sampled tokens no longer follow the scored distribution."
    )
    top_k: CountFromZero = _f(0, "Sample among so many tokens only; 0: all. See top_p.")
    min_p: Share | None = _f(None, "Least probability of a token, relative to the likeliest. See top_p.")
    repetition_penalty: Positive = _f(1.0, "Above 1: repeated tokens become less likely. See top_p.")
    use_vllm: bool = _f(False, "Let vLLM generate, with a copy of the base of its own.")
    vllm_mode: Literal["colocate", "server"] = _f(
        "colocate", "Where vLLM runs: 'colocate', in this process and on its GPU; 'server', as `vllm serve` elsewhere."
    )
    vllm_gpu_memory_utilization: PositiveShare = _f(0.3, "Of 'colocate': share of the GPU's memory for vLLM.")
    vllm_max_model_length: Count | None = _f(None, "Most tokens of prompt and completion in vLLM; None: the model's.")
    vllm_enable_sleep_mode: bool = _f(
        False, "Of 'colocate': move vLLM's weights to the CPU and drop its cache between rollouts."
    )
    vllm_server_base_url: list[str] | None = _f(
        None, "Of 'server': http://HOST:PORT of one or several, which share out a rollout; None: from host and port."
    )
    vllm_server_host: str = _f("0.0.0.0", "Of 'server': its host, where there is no URL.")
    vllm_server_port: Count = _f(8000, "Of 'server': its port, where there is no URL.")
    vllm_server_timeout: Positive = _f(240.0, "Of 'server': most seconds to wait for one that is starting.")
    vllm_server_request_timeout: Positive = _f(600.0, "Of 'server': most seconds that one completion may take.")
    vllm_server_adapter_dir: str | None = _f(
        None, "Of 'server': folder for the adapters, the same on both sides; None: vllm/ in output_dir."
    )
    vllm_probe_tolerance: Positive = _f(
        0.1, "Most nats that vLLM's log-prob of a token may differ from the base's own, in the median, at the start."
    )
    rollouts_ahead: Literal[0, 1] = _f(
        0,
        "Rollouts sampled ahead, 0 or 1: with 1 the next is sampled while one is trained on, by the policy as it is "
        "when that begins. Needs vllm_mode 'server', or a generator with a method `begin`.",
    )
    use_transformers_continuous_batching: bool = _f(
        False, "Generate by Transformers' continuous batching: a completion that has ended makes room at once."
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
    score_normalization: Literal["none", "running", "reference"] = _f(
        "none",
        "Scale each reward function: 'running' divides by a running std after taking off the running mean; 'reference' "
        "makes mean 0 and std 1 on completions of the reference, once, at the start.",
    )
    normalization_samples: Count = _f(256, "Completions of the reference that 'reference' normalisation is made from.")
    reward_ensemble: EnsembleName = _f(
        "mean",
        "How several reward roles' scores become one, after score_normalization: their 'mean'; 'min', the worst case; "
        "'uncertainty', the mean less reward_uncertainty_coef times their variance.",
    )
    reward_uncertainty_coef: NotNegative = _f(0.5, "Of reward_ensemble 'uncertainty': weight of the variance.")
    reward_timeout: Positive | None = _f(None, "Most seconds that one call of a reward function may take; None: any.")
    missing_eos_penalty: Positive | None = _f(
        None, "Subtracted from the score of a completion that was cut off. Positive."
    )
    kl_coef: NotNegative = _f(
        0.05, "Weight of the per-token KL to the reference in the reward; read anew each rollout."
    )
    kl_estimator: KLEstimator = _f("k1", "Estimator of that KL: k1, k2 or k3.")
    whiten_rewards: bool = _f(False, "Scale the rewards of a rollout to variance 1, keeping their mean.")

    # Objective
    objective: ObjectiveChoice = _f(
        "clip",
        "What the policy is trained on. 'clip': PPO's clipped surrogate; "
        "'kl_penalty': PPO's penalty on the KL from the sampling policy, adaptive; "
        "'reinforce': the plain policy gradient with a baseline; 'sequence': clipped, one advantage per completion, no "
        "critic. In Python also an object of your own, a trl_ext.ppo.Objective.",
    )
    baseline: Baseline = _f("leave_one_out", "Of 'reinforce': 'value' (the value role), 'mean' or 'leave_one_out'.")
    penalty_coef: Positive = _f(1.0, "Of 'kl_penalty': beta to start with.")
    penalty_target: Positive = _f(0.01, "Of 'kl_penalty': KL that an update should make, nats per token.")
    entropy_coef: NotNegative = _f(0.0, "Weight of an entropy bonus.")
    ptx_coef: NotNegative = _f(
        0.0, "Weight of the log-likelihood of ptx_dataset's texts, mixed into the policy's loss."
    )
    ptx_max_length: Count = _f(256, "Most tokens of such a text.")

    # Update
    num_ppo_epochs: Count = _f(4, "Epochs on each rollout.")
    cliprange: Positive = _f(0.2, "Clip range of the policy's probability ratio.")
    cliprange_value: Positive = _f(0.2, "Clip range of the value's step.")
    dual_clip: AtLeastOne | None = _f(None, "Bound on the ratio where the advantage is negative, above 1; None: none.")
    vf_coef: NotNegative = _f(0.1, "Weight of the value loss.")
    gamma: Share = _f(1.0, "Discount per token.")
    lam: Share = _f(0.95, "Lambda of generalised advantage estimation.")
    lam_value: Share | None = _f(None, "Lambda of the returns that the value role learns; None: lam.")
    whiten_advantages: bool = _f(True, "Scale the advantages of a rollout to mean 0 and variance 1.")

    # Where another sampled than is trained. TRL's names and values; they hold for every generator, not vLLM alone.
    vllm_importance_sampling_correction: bool | None = _f(
        None,
        "Multiply each token's policy loss by its importance weight: its probability under the policy over the one it "
        "was sampled with. None: where the generator is not the base itself and tells its log-probabilities.",
    )
    vllm_importance_sampling_mode: CorrectionMode = _f(
        "sequence_mask",
        "Of that weight: each token's own ('token_...') or its completion's ('sequence_...'); outside the two bounds "
        "clamped ('..._truncate') or 0 ('..._mask').",
    )
    vllm_importance_sampling_clip_max: Positive | None = _f(3.0, "Upper bound of that weight; None: none.")
    vllm_importance_sampling_clip_min: NotNegative | None = _f(None, "Lower bound of that weight; None: none.")

    # Guards
    max_approx_kl: Positive | None = _f(
        None, "End an update's epochs when a minibatch's approxkl (nats per token) is above."
    )
    max_ratio: AtLeastOne | None = _f(
        None, "Do not step on a minibatch whose mean ratio is above it or below its inverse."
    )
    value_warmup_rollouts: CountFromZero = _f(0, "Rollouts at the start on which the value role alone is trained.")

    # Looking
    evidence: bool = _f(
        True,
        "Measure on few rows, within about a fiftieth of an update's time, what tells causes of problems apart. It "
        "changes nothing of the training.",
    )
    log_completions: bool = _f(False, "Print sample completions at each log and save all of them under completions/.")
    num_completions_to_print: CountFromZero = _f(4, "Rows of that table.")

    def __post_init__(self) -> None:
        urls: Any = self.vllm_server_base_url
        self.vllm_server_base_url = [urls] if isinstance(urls, str) else urls  # TRL knows one
        self._check()
        if self.logging_steps is None:
            self.logging_steps = self.steps_per_rollout
        if self.bf16 is None:
            self.bf16 = (
                not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
            )
        self._check_json()
        if getattr(self, "activation_checkpointing", False) is None:  # TRL's default has the older name, which warns
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        self._check_length()
        self._check_generation_kwargs()
        for name in ("chat_template_kwargs", "transformers_continuous_batching_config"):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}: give a dict.")
        foreign = sorted(set(self.chat_template_kwargs or {}) & NOT_THE_TEMPLATES)
        if foreign:
            raise ValueError(
                f"chat_template_kwargs has {foreign[0]}, which is the tokenizer's and not the template's: leave it "
                "out, for the trainer asks for ids, pads them itself, masked, and cuts none."
            )
        for name, why in NOT_FOR_PPO.items():
            if getattr(self, name, None) and getattr(self, name) != self._usual(name):
                raise ValueError(f"{name} is {getattr(self, name)!r:.80}, and {why}.")
        optimizer = _word(self.optim)
        if optimizer.startswith("schedule_free"):
            raise ValueError(
                f"optim is {optimizer!r}, which has other weights for sampling than for training, and PPO's are the "
                "same: choose another one."
            )
        if self.parallelism_config is not None and getattr(self.parallelism_config, "total_size", 2) > 1:
            raise ValueError(
                "parallelism_config is set, and the four roles are trained on whole models: leave it out, or use fsdp."
            )
        if getattr(self.accelerator_config, "dispatch_batches", None):
            raise ValueError(
                "accelerator_config has dispatch_batches, which sends tensors alone: leave it out, for PPO's rows are "
                "texts."
            )
        if "num_steps" in (getattr(self.accelerator_config, "gradient_accumulation_kwargs", None) or {}):
            raise ValueError(
                "accelerator_config has num_steps, which would change the size of a rollout that is counted already: "
                "set gradient_accumulation_steps instead."
            )
        if getattr(self.accelerator_config, "split_batches", None):
            raise ValueError(
                "accelerator_config has split_batches, which would divide a rollout a second time: leave it out, for "
                "per_device_train_batch_size is of each process already."
            )
        if getattr(self.accelerator_config, "even_batches", None) is False:
            raise ValueError(
                "accelerator_config has even_batches False, and processes with unequal shares of an evaluation would "
                "wait for each other for ever: leave it out."
            )
        compiles = self.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "").lower() not in ("", "no")
        if compiles and (self.gradient_checkpointing or getattr(self, "activation_checkpointing", False)):
            raise ValueError(
                "torch_compile cannot follow recomputation that restores a role's adapter: set gradient_checkpointing "
                "to False, or leave torch_compile out."
            )
        saves, schedule = _word(self.save_strategy), _word(self.lr_scheduler_type)
        if saves == "best" and _word(self.eval_strategy) == "no":
            raise ValueError(
                "save_strategy is 'best', and nothing is evaluated, so that nothing would be saved: set eval_strategy."
            )
        by_loss = str(self.metric_for_best_model).removeprefix("eval_") == "loss"
        if by_loss and (self.load_best_model_at_end or schedule in BY_EVALUATION or saves == "best"):
            of_schedule = f"lr_scheduler_type {schedule}" if schedule in BY_EVALUATION else "save_strategy 'best'"
            name = "load_best_model_at_end" if self.load_best_model_at_end else of_schedule
            more = ", with lr_scheduler_kwargs={'mode': 'max'}" if name.startswith("lr_scheduler") else ""
            raise ValueError(
                f"{name} looks for the lowest eval_loss, and PPO's evaluation has no loss: set "
                f"metric_for_best_model='objective/scores', or 'yardstick/<name>'{more}."
            )
        if schedule in BY_EVALUATION and self.greater_is_better:
            # Transformers' schedules take the lowest for the best, whatever greater_is_better says.
            given: Any = getattr(self, "lr_scheduler_kwargs", None)
            self.lr_scheduler_kwargs = {"mode": "max"} | dict(given or {})
        if not isinstance(self.model_init_kwargs, dict | None) or "policy" in (self.model_init_kwargs or {}):
            raise ValueError(
                f"model_init_kwargs is {self.model_init_kwargs!r:.80}: give a dict of arguments of from_pretrained, "
                "and the policy's LoRA as peft_config."
            )
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
    def order_seed(self) -> int:
        """What the order of the prompts follows from."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def policy_objective(self) -> Objective:
        """The object that `objective` names, or is."""
        return self.objective if isinstance(self.objective, Objective) else OBJECTIVES[self.objective]

    @property
    def objective_name(self) -> str:
        """What to call the objective."""
        return type(self.objective).__name__ if isinstance(self.objective, Objective) else self.objective

    @property
    def uses_value(self) -> bool:
        """Whether the objective has a critic."""
        return self.policy_objective.needs_critic(self)

    @property
    def vllm_server_urls(self) -> list[str]:
        """Where the servers are."""
        host = {"0.0.0.0": "127.0.0.1"}.get(self.vllm_server_host, self.vllm_server_host)
        return self.vllm_server_base_url or [f"http://{host}:{self.vllm_server_port}"]

    @property
    def mini_batch_size(self) -> int:
        """Completions of one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def rollout_batch_size(self) -> int:
        """Completions of one rollout, over all processes."""
        return self.mini_batch_size * self.num_mini_batches

    def __str__(self) -> str:
        """As TrainingArguments', which copies every value; an objective of your own by its name."""
        shown = copy.copy(self)
        shown.objective = self.objective_name  # type: ignore[assignment]
        return super(PPOConfig, shown).__str__()

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments', an objective of your own by its name, without the tokens of `model_init_kwargs`."""
        settings = super().to_dict() | {"objective": self.objective_name}
        return {name: without_secrets(value) if isinstance(value, dict) else value for name, value in settings.items()}

    def to_json_string(self) -> str:
        """As TrainingArguments', which fails at what JSON has no form for: no checkpoint is lost for that."""
        return json.dumps(self.to_dict(), indent=2, default=str)

    def _check(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            self._check_field(name, hint, getattr(self, name, None))
        if type(self.policy_objective).terms is Objective.terms:
            raise ValueError(f"objective {self.objective_name!r} has no `terms`: write the method, which is its loss.")
        if self.policy_objective.single_epoch and self.num_ppo_epochs > 1:
            raise ValueError(
                f"objective {self.objective_name!r} knows no old policy, so a second epoch on a rollout would be "
                f"off-policy: set num_ppo_epochs to 1, not {self.num_ppo_epochs}."
            )
        self._check_unread()
        self._check_correction()
        if self.use_vllm and self.generation_kwargs:
            raise ValueError("generation_kwargs are Transformers' and would not reach vLLM: unset them, or use_vllm.")
        if self.use_vllm and self.use_transformers_continuous_batching:
            raise ValueError("use_vllm and use_transformers_continuous_batching are both set: choose one of them.")
        if self.use_transformers_continuous_batching and (self.generation_kwargs or self.repetition_penalty != 1.0):
            raise ValueError(
                "Continuous batching knows neither generation_kwargs nor repetition_penalty: leave them out, or "
                "use_transformers_continuous_batching."
            )
        for url in self.vllm_server_base_url or []:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"vllm_server_base_url is {url!r}: it must begin with http:// or https://.")
        clip, weights = self.reward_clip_range, self.reward_weights
        if weights is not None and not _are_numbers(weights):
            raise ValueError(f"reward_weights is {weights!r}: give a list of numbers, one per reward function.")
        if clip is not None and not (_are_numbers(clip) and len(clip) == 2 and clip[0] < clip[1]):
            raise ValueError(f"reward_clip_range is {clip!r}: give the least and the greatest score, as in [-1, 1].")

    def _check_unread(self) -> None:
        """Refuse settings that would change nothing."""
        named = self.objective if isinstance(self.objective, str) else None  # your own may read what it likes
        objective, critic = f"objective {self.objective_name!r}", ("vf_coef", "cliprange_value")
        for who, names, is_read in (
            (f"{objective} has no critic here and", ("gamma", "value_warmup_rollouts", *critic), self.uses_value),
            (objective, ("lam", "lam_value"), named in (None, "clip", "kl_penalty")),
            (objective, ("cliprange", "dual_clip"), named in (None, "clip", "sequence")),
            (objective, ("penalty_coef", "penalty_target"), named in (None, "kl_penalty")),
            (objective, ("baseline",), named in (None, "reinforce")),
            (
                f"score_normalization {self.score_normalization!r}",
                ("normalization_samples",),
                self.score_normalization == "reference",
            ),
            (
                f"reward_ensemble {self.reward_ensemble!r}",
                ("reward_uncertainty_coef",),
                self.reward_ensemble == "uncertainty",
            ),
            (
                f"vllm_mode {self.vllm_mode!r}" if self.use_vllm else "use_vllm False",
                [f"vllm_server_{n}" for n in ("base_url", "host", "port", "timeout", "request_timeout", "adapter_dir")],
                self.use_vllm and self.vllm_mode == "server",
            ),
            (
                f"vllm_mode {self.vllm_mode!r}" if self.use_vllm else "use_vllm False",
                ("vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
                self.use_vllm and self.vllm_mode == "colocate",
            ),
            ("use_vllm False", ("vllm_mode", "vllm_max_model_length", "vllm_probe_tolerance"), self.use_vllm),
            (
                "vllm_importance_sampling_correction False",
                [f"vllm_importance_sampling_{name}" for name in ("mode", "clip_max", "clip_min")],
                self.vllm_importance_sampling_correction is not False,
            ),
        ):
            for name in names:
                if not is_read and getattr(self, name) != self._usual(name):
                    raise ValueError(f"{name} is {getattr(self, name)!r}, but {who} does not read it: leave it out.")

    def _check_correction(self) -> None:
        """Refuse bounds of the importance weights that leave nothing, or bound nothing, and no weights where they are
        needed."""
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min is {low:g} and vllm_importance_sampling_clip_max is {high:g}: the "
                "first must be less."
            )
        if low is None and high is None and self.vllm_importance_sampling_correction is not False:
            raise ValueError(
                "vllm_importance_sampling_clip_min and vllm_importance_sampling_clip_max are both None, so that one "
                "token could outweigh all others: set one of them."
            )
        if self.rollouts_ahead and self.vllm_importance_sampling_correction is False:
            raise ValueError(
                "rollouts_ahead is 1, so that an older policy samples than is trained, and "
                "vllm_importance_sampling_correction is False, so that nothing corrects for it: leave one of them out."
            )

    @property
    def steps_of_run(self) -> int | None:
        """Optimizer steps that `total_episodes` come to, whole rollouts; None where it is not set."""
        if self.total_episodes is None:
            return None
        return -(-self.total_episodes // self.rollout_batch_size) * self.steps_per_rollout

    def _usual(self, name: str) -> Any:
        return type(self).__dataclass_fields__[name].default

    def _check_json(self) -> None:
        """Refuse dicts of a command line that are cut short or misspelt, by name."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name, None)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name} is {value!r:.80}, which is no JSON: {error}.") from error

    def _check_length(self) -> None:
        """Refuse two lengths of a run. (A trainer writes the steps of `total_episodes` into `max_steps`.)"""
        if self.total_episodes is None:
            return
        for name, given in (
            ("max_steps", self.max_steps > 0 and self.max_steps != self.steps_of_run),
            ("num_train_epochs", self.num_train_epochs != self._usual("num_train_epochs")),
        ):
            if given:
                raise ValueError(
                    f"{name} is {getattr(self, name):g} and total_episodes is {self.total_episodes}, which is "
                    f"{self.steps_of_run} steps here: each says how long the run is, so leave one of them out."
                )

    def _check_generation_kwargs(self) -> None:
        """Refuse what Transformers' generate would not know, or what would not be one completion a prompt of the
        distribution that is scored."""
        given: Any = self.generation_kwargs or {}
        if not isinstance(given, dict):
            raise ValueError(f"generation_kwargs is {given!r}: give a dict of fields of transformers.GenerationConfig.")
        unknown = next((name for name in given if name not in vars(GenerationConfig())), None)
        if unknown is not None:
            close = get_close_matches(str(unknown), vars(GenerationConfig()), 1)
            hint = f"do you mean {close[0]!r}?" if close else "take it out."
            raise ValueError(f"generation_kwargs names {unknown!r}, which GenerationConfig does not have: {hint}")
        if given.get("temperature", self.temperature) != self.temperature:
            raise ValueError(
                f"generation_kwargs has temperature {given['temperature']!r}, but log-probabilities are taken at "
                f"temperature {self.temperature:g}: set PPOConfig's temperature instead."
            )
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            own, bounds = getattr(self, name), get_type_hints(type(self), include_extras=True)[name]
            if given.get(name) is not None:
                self._check_field(f"generation_kwargs[{name!r}]", bounds, given[name])
            if own not in (self._usual(name), given.get(name, own)):
                raise ValueError(
                    f"{name} is {own!r}, and generation_kwargs has {name} {given[name]!r}: leave one of them out."
                )
        for name, usual in {"num_return_sequences": 1, "return_dict_in_generate": False, "stop_strings": None}.items():
            if name in given and given[name] is not None and given[name] is not usual:
                raise ValueError(
                    f"generation_kwargs has {name}={given[name]!r}: one completion a prompt is taken, as plain ids; "
                    "leave it out."
                )
        eos, pad = as_ids(given.get("eos_token_id", 0)), given.get("pad_token_id", 0)
        if not eos or any(Bounds(0, whole=True).refusal(i) for i in eos):
            raise ValueError(
                f"generation_kwargs has eos_token_id={given['eos_token_id']!r}: give an id, or a list of ids."
            )
        if "eos_token_id" in given:
            given = self.generation_kwargs = {**given, "eos_token_id": eos}
        if Bounds(0, whole=True).refusal(pad):
            raise ValueError(f"generation_kwargs has pad_token_id={pad!r}: give an id, or leave it out.")
        longest = given.get("max_new_tokens", self.max_completion_length)
        if longest is None or given.get("max_length") is not None:
            name = "max_new_tokens" if longest is None else "max_length"
            raise ValueError(
                f"generation_kwargs has {name}={given[name]!r}, and the length of a completion must be known: leave it "
                "out, and set max_completion_length."
            )
        if Bounds(1, whole=True).refusal(longest):
            raise ValueError(f"generation_kwargs has max_new_tokens={longest!r}: give a whole number, at least 1.")
        least = given.get("min_new_tokens") or 0
        if Bounds(0, longest, whole=True).refusal(least):
            raise ValueError(
                f"generation_kwargs has min_new_tokens={least!r}, but a completion has at most {longest} tokens: lower "
                "it, or raise max_completion_length."
            )
        try:
            GenerationConfig(**{"do_sample": True, "max_new_tokens": self.max_completion_length, **given})
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"generation_kwargs: {' '.join(str(error).split())}") from error

    def _check_field(self, name: str, hint: Any, value: Any) -> None:
        """Hold a field against its type: `Bounds`, or the choices of a Literal; both may be optional."""
        kinds = [hint]
        if type(None) in get_args(hint):
            if value is None:
                return
            kinds = list(get_args(hint))
        for kind in kinds:
            if get_origin(kind) is Annotated and isinstance(kind.__metadata__[0], Bounds):
                refusal = kind.__metadata__[0].refusal(value)
                if refusal is not None:
                    raise ValueError(f"{name} is {value!r}: it must be {refusal}.")
            elif get_origin(kind) is Literal and value not in get_args(kind) and not isinstance(value, Objective):
                yours = ", or give a trl_ext.ppo.Objective" if name == "objective" else ""
                raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(str, get_args(kind)))}{yours}.")


PPOConfig.__init__ = explained(PPOConfig.__init__, "PPOConfig", SETTINGS)  # type: ignore[method-assign]
