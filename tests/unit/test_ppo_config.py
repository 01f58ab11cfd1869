"""The settings: defaults, refusals, the arithmetic of a rollout, the command line, and that every field is read."""

import ast
import copy
import json
import pickle
import re
import sys
import threading
import warnings
from dataclasses import MISSING, fields
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments
from trl import TrlParser

import trl_ext
from trl_ext.ppo import Objective
from trl_ext.ppo.config import PPOConfig

PACKAGE = Path(trl_ext.__file__).parent

# PPO: TRL 1.12's PPOConfig, but for the learning rate, which is of adapters. Generation: TRL's RLOOConfig. Epsilon:
# "The N+ Implementation Details of RLHF with PPO" (arXiv:2403.17031). The rest is ours.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-5,
    "adam_epsilon": 1e-5,
    "num_ppo_epochs": 4,
    "num_mini_batches": 1,
    "local_rollout_forward_batch_size": 64,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "whiten_advantages": True,
    "missing_eos_penalty": None,
    "total_episodes": None,
    "max_completion_length": 256,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "reward_weights": None,
    "shuffle_dataset": True,
    "remove_unused_columns": False,
    "disable_dropout": True,
    "log_completions": False,
}


def make(**changes: Any) -> PPOConfig:
    return PPOConfig("run", **{"use_cpu": True, "report_to": "none", **changes})


def own_fields() -> list[str]:
    """Those that TrainingArguments does not have."""
    inherited = {f.name for f in fields(TrainingArguments)}
    return [f.name for f in fields(PPOConfig) if f.name not in inherited]


# Defaults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFAULTS)
def test_default(name: str) -> None:
    value = getattr(make(), name)
    assert value == DEFAULTS[name]
    assert type(value) is type(DEFAULTS[name])


def test_the_docstring_names_every_default_that_training_arguments_has_otherwise() -> None:
    theirs = {f.name: f.default for f in fields(TrainingArguments)}
    changed = {
        f.name
        for f in fields(PPOConfig)
        if f.name in theirs and f.default is not MISSING and f.default != theirs[f.name]
    }
    assert {"learning_rate", "logging_steps"} <= changed
    doc = PPOConfig.__doc__ or ""
    assert [name for name in sorted(changed) if f"`{name}`" not in doc] == []


@pytest.mark.parametrize("name", own_fields())
def test_help_is_a_sentence(name: str) -> None:
    text = next(f for f in fields(PPOConfig) if f.name == name).metadata["help"]
    assert text[0].isupper()
    assert text.endswith(".")


# Arithmetic ----------------------------------------------------------------------------------------------------------


def test_sizes_of_a_rollout() -> None:
    args = make(per_device_train_batch_size=3, gradient_accumulation_steps=5, num_mini_batches=7, num_ppo_epochs=2)
    assert args.mini_batch_size == 15
    assert args.rollout_batch_size == 105
    assert args.steps_per_rollout == 14


def test_sizes_count_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOConfig, "world_size", property(lambda self: 4))
    args = make(per_device_train_batch_size=3, gradient_accumulation_steps=5, num_mini_batches=7, num_ppo_epochs=2)
    assert args.mini_batch_size == 60
    assert args.rollout_batch_size == 420
    assert args.steps_per_rollout == 14


@pytest.mark.parametrize(("given", "logged"), [(None, 6), (1, 1), (10, 10), (0.25, 0.25)])
def test_one_log_a_rollout_unless_told(given: float | None, logged: float) -> None:
    assert make(num_ppo_epochs=3, num_mini_batches=2, logging_steps=given).logging_steps == logged


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize(("bf16", "fp16"), [(None, False), (None, True), (True, False), (False, False)])
def test_bf16_where_the_gpu_has_it(
    available: bool, bf16: bool | None, fp16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: available)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: available)
    seen: dict[str, Any] = {}
    # What TrainingArguments makes of it on this machine is another matter.
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: seen.update(bf16=self.bf16))
    make(bf16=bf16, fp16=fp16)
    assert seen["bf16"] is (bf16 if bf16 is not None else available and not fp16)


# Refusals ------------------------------------------------------------------------------------------------------------

# The field, a bad value, and what the refusal must begin with.
BAD: list[tuple[str, Any, str]] = [
    *((name, value, f"{name} is {value}: it must be a whole number, at least 1.")
      for name in ("num_ppo_epochs", "num_mini_batches", "local_rollout_forward_batch_size", "max_completion_length",
                   "per_device_train_batch_size", "gradient_accumulation_steps", "num_generations",
                   "normalization_samples", "ptx_max_length")
      for value in (0, -1, 1.5, True)),
    *((name, value, f"{name} is {value}: it must be positive.")
      for name in ("temperature", "cliprange", "cliprange_value", "repetition_penalty", "missing_eos_penalty")
      for value in (0.0, -0.5, float("nan"), float("inf"))),
    *((name, value, f"{name} is {value}: it must be at least 0.")
      for name in ("kl_coef", "vf_coef", "entropy_coef", "ptx_coef", "learning_rate")
      for value in (-1, float("nan"), True)),
    *((name, value, f"{name} is {value}: it must be a whole number, at least 0.")
      for name in ("top_k", "num_completions_to_print", "value_warmup_rollouts")
      for value in (-1, 1.5, True)),
    *((name, value, f"{name} is {value}: it must be at least 0 and at most 1.")
      for name in ("gamma", "lam", "min_p")
      for value in (-0.01, 1.01)),
    *(("top_p", value, f"top_p is {value}: it must be positive and at most 1.") for value in (0.0, -1.0, 1.1)),
    *(("total_episodes", value, f"total_episodes is {value}: it must be a whole number, at least 1.")
      for value in (0, -1, 100.5)),
    ("temperature", None, "temperature is None: it must be positive."),
    *(("kl_estimator", value, f"kl_estimator is {value!r}: choose one of k1, k2, k3.") for value in ("k4", None)),
    *(("objective", value, f"objective is {value!r}: choose one of clip, kl_penalty, reinforce, sequence, or give a ")
      for value in ("ppo", None, Objective)),
    *((name, "other", f"{name} is 'other': choose one of ") for name in ("baseline", "score_normalization")),
    ("auto_find_batch_size", True, "auto_find_batch_size would change"),
    ("neftune_noise_alpha", 5.0, "neftune_noise_alpha is 5.0, and noise in training alone"),
    ("label_smoothing_factor", 0.1, "label_smoothing_factor is 0.1, and PPO has no labels"),
    *(("train_sampling_strategy", value, f"train_sampling_strategy is '{value}', and prompts come in the order that ")
      for value in ("sequential", "group_by_length")),
    ("debug", "underflow_overflow", "debug is [<DebugOption.UNDERFLOW_OVERFLOW"),
    ("parallelism_config", {"tp_size": 2}, "parallelism_config is set, and the four roles"),
    ("accelerator_config", {"dispatch_batches": True}, "accelerator_config has dispatch_batches"),
    ("accelerator_config", {"split_batches": True}, "accelerator_config has split_batches"),
    ("accelerator_config", {"even_batches": False}, "accelerator_config has even_batches False"),
    ("accelerator_config", {"gradient_accumulation_kwargs": {"num_steps": 4}}, "accelerator_config has num_steps"),
    *((name, True, f"{name} is True, and ")
      for name in ("dataloader_drop_last", "enable_jit_checkpoint", "bf16_full_eval", "fp16_full_eval",
                   "use_liger_kernel", "ddp_static_graph")
      if hasattr(PPOConfig, name)),
    ("optim", "schedule_free_adamw", "optim is 'schedule_free_adamw', which has other weights"),
    ("save_strategy", "best", "save_strategy is 'best', and nothing is evaluated"),
    ("torch_compile_backend", "inductor", "torch_compile cannot follow recomputation"),
]  # fmt: skip


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_loss_that_there_is_not(schedule: str) -> None:
    evaluated = {"lr_scheduler_type": schedule, "eval_strategy": "steps", "eval_steps": 8}
    with pytest.raises(ValueError, match=f"^lr_scheduler_type {schedule} looks for the lowest eval_loss.*mode': 'max'"):
        make(**evaluated)
    good = make(**evaluated, metric_for_best_model="objective/scores")
    assert (good.lr_scheduler_type, good.lr_scheduler_kwargs) == (schedule, {"mode": "max"}), "a score rises"
    low = make(**evaluated, metric_for_best_model="objective/kl", greater_is_better=False)
    assert "mode" not in (low.lr_scheduler_kwargs or {})


def test_the_best_by_a_loss_that_there_is_not() -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 8, "metric_for_best_model": "loss"}
    with pytest.raises(ValueError, match=r"^save_strategy 'best' looks for the lowest eval_loss"):
        make(save_strategy="best", **evaluated)


def test_a_compiler_that_accelerate_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match=r"^torch_compile cannot follow"):
        make()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    make()


def test_what_is_saved_of_the_settings_has_no_secrets_and_always_a_form() -> None:
    settings = {"hub_token": "hf_mine", "model_init_kwargs": {"token": "hf_other", "revision": "main"}}
    args = make(**settings, chat_template_kwargs={"date": date(2026, 7, 30)}, run_name="a run")
    assert args.hub_token == "hf_mine" and args.model_init_kwargs["token"] == "hf_other"
    for text in (args.to_json_string(), str(args.to_dict()), str(pickle.dumps(args))):
        assert "hf_mine" not in text
        assert "hf_other" not in text
    assert "2026-07-30" in args.to_json_string()
    again = pickle.loads(pickle.dumps(args))
    assert (again.hub_token, again.model_init_kwargs, again.kl_coef) == (None, {"revision": "main"}, args.kl_coef)
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert (copied.hub_token, copied.model_init_kwargs["token"]) == ("hf_mine", "hf_other")


def test_the_order_of_the_prompts_has_a_seed_of_its_own() -> None:
    assert (make(seed=3).order_seed, make(seed=3, data_seed=0).order_seed) == (3, 0)


@pytest.mark.parametrize(("name", "value", "start"), BAD, ids=[f"{name}={value}" for name, value, _ in BAD])
def test_refused_with_one_sentence(name: str, value: Any, start: str) -> None:
    with pytest.raises(ValueError) as error:
        make(**{name: value})
    sentence = str(error.value)
    assert sentence.startswith(start)
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_coef", 0.0),
        ("gamma", 0.0),
        ("lam", 0.0),
        ("lam", 1.0),
        ("missing_eos_penalty", 1e-3),
        ("total_episodes", 1),
    ],
)
def test_the_edge_of_what_is_allowed(name: str, value: Any) -> None:
    assert getattr(make(**{name: value}), name) == value


# Command line and YAML -----------------------------------------------------------------------------------------------

# What is given, as text, and what it must become.
GIVEN: dict[str, tuple[list[str], Any]] = {
    "kl_coef": (["0.2"], 0.2),
    "kl_estimator": (["k3"], "k3"),
    "num_ppo_epochs": (["2"], 2),
    "total_episodes": (["1000"], 1000),
    "missing_eos_penalty": (["1.0"], 1.0),
    "reward_weights": (["1.0", "0.5"], [1.0, 0.5]),
    "whiten_advantages": (["false"], False),
    "logging_steps": (["5"], 5.0),
    "min_p": (["0.1"], 0.1),
    "model_init_kwargs": (['{"dtype": "float32"}'], {"dtype": "float32"}),
    "generation_kwargs": (['{"no_repeat_ngram_size": 3}'], {"no_repeat_ngram_size": 3}),
    "transformers_continuous_batching_config": (['{"page_size": 64}'], {"page_size": 64}),
    "chat_template_kwargs": (['{"enable_thinking": false}'], {"enable_thinking": False}),
}


def values_of(args: PPOConfig) -> dict[str, Any]:
    return {name: getattr(args, name) for name in GIVEN}


def test_from_the_command_line() -> None:
    argv = ["--output_dir", "run", "--use_cpu", "--report_to", "none"]
    argv += [word for name, (text, _) in GIVEN.items() for word in (f"--{name}", *text)]
    (args,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(argv)
    assert values_of(args) == {name: value for name, (_, value) in GIVEN.items()}


def test_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text(
        """
        output_dir: run
        use_cpu: true
        report_to: none
        kl_coef: 0.2
        kl_estimator: k3
        num_ppo_epochs: 2
        total_episodes: 1000
        missing_eos_penalty: 1.0
        reward_weights: [1.0, 0.5]
        whiten_advantages: false
        logging_steps: 5
        min_p: 0.1
        model_init_kwargs: {dtype: float32}
        generation_kwargs: {no_repeat_ngram_size: 3}
        transformers_continuous_batching_config: {page_size: 64}
        chat_template_kwargs: {enable_thinking: false}
        """
    )
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--config", str(path)])
    (args,) = TrlParser(PPOConfig).parse_args_and_config()
    assert values_of(args) == {name: value for name, (_, value) in GIVEN.items()}


def test_the_command_line_wins_over_yaml(tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text("output_dir: run\nuse_cpu: true\nreport_to: none\nkl_coef: 0.2\nlam: 0.5\n")
    (args,) = TrlParser(PPOConfig).parse_args_and_config(["--config", str(path), "--kl_coef", "0.3"])
    assert (args.kl_coef, args.lam) == (0.3, 0.5)


def test_help_can_be_printed() -> None:
    """A stray percent sign in a help text would break it."""
    printed = HfArgumentParser(PPOConfig).format_help()
    assert all(f"--{name}" in printed for name in own_fields())


def test_as_json_and_back() -> None:
    """As a run's folder keeps it."""
    args = make(kl_coef=0.2, reward_weights=[1.0, 2.0], generation_kwargs={"num_beams": 1})
    kept = json.loads(args.to_json_string())
    again = make(**{name: kept[name] for name in own_fields()})
    assert all(getattr(again, name) == getattr(args, name) for name in own_fields())
    assert (again.kl_coef, again.reward_weights, again.generation_kwargs) == (0.2, [1.0, 2.0], {"num_beams": 1})


class Mine(Objective):
    """An objective from user code."""

    single_epoch = True

    def needs_critic(self, args: Any) -> bool:
        return False

    def terms(self, logprobs: Any, batch: Any, args: Any, coef: float) -> Any:
        return -batch.advantages * logprobs


def test_an_objective_of_your_own() -> None:
    args = make(objective=Mine(), num_ppo_epochs=1)
    assert type(args.policy_objective) is Mine and not args.uses_value
    assert json.loads(args.to_json_string())["objective"] == "Mine", "a run's folder names it"
    args.objective.lock = threading.Lock()  # type: ignore[union-attr]
    assert "objective=Mine" in str(args), "also where it cannot be copied"
    with pytest.raises(ValueError, match=r"^objective 'Mine' knows no old policy, so a second epoch"):
        make(objective=Mine(), num_ppo_epochs=2)
    with pytest.raises(ValueError, match=r"^gamma is 0\.9, but objective 'Mine' has no critic here"):
        make(objective=Mine(), num_ppo_epochs=1, gamma=0.9)


@pytest.mark.parametrize(
    ("settings", "critic"),
    [
        ({}, True),
        ({"objective": "kl_penalty"}, True),
        ({"objective": "sequence"}, False),
        ({"objective": "reinforce", "num_ppo_epochs": 1}, False),
        ({"objective": "reinforce", "num_ppo_epochs": 1, "baseline": "value"}, True),
    ],
)
def test_who_has_a_critic(settings: dict[str, Any], critic: bool) -> None:
    assert make(**settings).uses_value is critic


@pytest.mark.parametrize(
    ("settings", "unread"),
    [
        ({"objective": "sequence"}, {"vf_coef": 0.5, "cliprange_value": 0.1, "lam": 0.9, "lam_value": 1.0}),
        ({"objective": "reinforce", "num_ppo_epochs": 1}, {"vf_coef": 0.5, "lam": 1.0, "cliprange": 0.1}),
        ({"objective": "reinforce", "num_ppo_epochs": 1, "baseline": "value"}, {"lam": 1.0, "dual_clip": 3.0}),
        ({"objective": "kl_penalty"}, {"cliprange": 0.1, "dual_clip": 3.0, "baseline": "value"}),
        ({}, {"penalty_coef": 2.0, "penalty_target": 0.1, "baseline": "mean", "normalization_samples": 8}),
        ({"score_normalization": "running"}, {"normalization_samples": 8}),
        ({}, {"vllm_mode": "server", "vllm_max_model_length": 64, "vllm_server_port": 9000}),
        ({"use_vllm": True}, {"vllm_server_base_url": ["http://host:8000"], "vllm_server_timeout": 9.0}),
        ({"use_vllm": True, "vllm_mode": "server"}, {"vllm_enable_sleep_mode": True}),
        (
            {"vllm_importance_sampling_correction": False},
            {
                "vllm_importance_sampling_mode": "token_mask",
                "vllm_importance_sampling_clip_max": 2.0,
                "vllm_importance_sampling_clip_min": 0.5,
            },
        ),
    ],
)
def test_settings_that_nothing_reads_are_refused(settings: dict[str, Any], unread: dict[str, Any]) -> None:
    for name, value in unread.items():
        with pytest.raises(
            ValueError, match=rf"^{name} is {re.escape(repr(value))}, but .* does not read it: leave it out\.$"
        ):
            make(**settings, **{name: value})
    usual = {name: PPOConfig.__dataclass_fields__[name].default for name in unread}
    make(**{**usual, **settings})
    make(**{"objective": Mine(), "num_ppo_epochs": 1, "lam": 0.9, "baseline": "value", "penalty_coef": 2.0})


def test_where_vllm_servers_are() -> None:
    served: Any = {"use_vllm": True, "vllm_mode": "server"}
    assert make(**served).vllm_server_urls == ["http://127.0.0.1:8000"]
    assert make(**served, vllm_server_host="box", vllm_server_port=9).vllm_server_urls == ["http://box:9"]
    for url in ("http://box:9", ["http://box:9", "https://other"]):
        assert make(**served, vllm_server_base_url=url).vllm_server_urls == ([url] if isinstance(url, str) else url)
    with pytest.raises(
        ValueError, match=r"^vllm_server_base_url is 'box:9': it must begin with http:// or https://\.$"
    ):
        make(**served, vllm_server_base_url="box:9")


def test_bounds_of_the_importance_weights_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"clip_min is 3 and vllm_importance_sampling_clip_max is 3: the first"):
        make(vllm_importance_sampling_clip_min=3.0)
    with pytest.raises(ValueError, match=r"clip_max are both None, so that one token could outweigh all others"):
        make(vllm_importance_sampling_clip_max=None)
    make(vllm_importance_sampling_clip_max=None, vllm_importance_sampling_clip_min=0.2)


def test_rollouts_ahead_are_none_or_one_and_corrected_for() -> None:
    for wrong in (2, -1):
        with pytest.raises(ValueError, match=rf"^rollouts_ahead is {wrong}: choose one of 0, 1\.$"):
            make(rollouts_ahead=wrong)
    with pytest.raises(ValueError, match=r"^rollouts_ahead is 1, so that an older policy .* is False, so that nothing"):
        make(rollouts_ahead=1, vllm_importance_sampling_correction=False)
    for correction in (None, True):
        make(rollouts_ahead=1, vllm_importance_sampling_correction=correction)


def test_settings_that_something_reads_are_taken() -> None:
    make(objective="reinforce", num_ppo_epochs=1, baseline="value", vf_coef=0.5, gamma=0.9, cliprange_value=0.1)
    make(objective="kl_penalty", penalty_coef=2.0, penalty_target=0.1, vf_coef=0.5, lam=0.9, lam_value=1.0)
    make(objective="sequence", cliprange=0.1, dual_clip=3.0)
    make(score_normalization="reference", normalization_samples=8)


# Every field is read -------------------------------------------------------------------------------------------------


def reads(source: str, own_file: bool = False) -> set[str]:
    """Names read as `args.name` or `....args.name`; in the settings' own file `self.name`, outside of the checks."""
    tree = ast.parse(source)
    checked = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name.startswith(("_check", "__post_init__"))
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load) or id(node) in checked:
            continue
        of = node.value
        owner = of.id if isinstance(of, ast.Name) else of.attr if isinstance(of, ast.Attribute) else ""
        if owner == "args" or (own_file and owner == "self"):
            found.add(node.attr)
    return found


def test_the_reader_tells_reads_from_other_mentions() -> None:
    source = """
class C:
    a: int = 1
    def _check(self):
        if self.args.b < 1: raise ValueError("args.c")
    def f(self, args):
        args.d = 1
        self.e
        self.args.g
        return args.h
"""
    assert reads(source) == {"g", "h"}
    assert reads(source, own_file=True) == {"args", "e", "g", "h"}


def test_every_field_is_read() -> None:
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        read |= reads(path.read_text(encoding="utf-8"), own_file=path.name == "config.py")
    assert [name for name in own_fields() if name not in read] == []


@pytest.mark.parametrize("eos", [5, np.int64(5), np.array([5]), torch.tensor(5), torch.tensor([5]), (5,), {5}])
def test_ids_of_any_kind_end_a_completion(eos: Any) -> None:
    assert make(generation_kwargs={"eos_token_id": eos}).generation_kwargs == {"eos_token_id": [5]}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"eos_token_id": 5.0}, "has eos_token_id=5.0: give an id"),
        ({"pad_token_id": None}, "has pad_token_id=None: give an id, or leave it out"),
        ({"pad_token_id": -1}, "has pad_token_id=-1"),
        ({"pad_token_id": "<pad>"}, "has pad_token_id='<pad>'"),
        ({"max_new_tokens": None}, "has max_new_tokens=None, .* set max_completion_length"),
        ({"max_new_tokens": None, "max_length": 12}, "has max_new_tokens=None"),
        ({"max_new_tokens": 3.5}, "has max_new_tokens=3.5: give a whole number"),
        ({"max_length": 12}, "has max_length=12, and the length .* set max_completion_length"),
        ({"min_new_tokens": 300}, "has min_new_tokens=300, but a completion has at most 256 tokens"),
    ],
)
def test_generation_kwargs_that_contradict_a_run_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^generation_kwargs {says}"):
        make(generation_kwargs=given)


@pytest.mark.parametrize("given", ["[1]", {"policy": "folder"}])
def test_model_init_kwargs_are_arguments_of_the_base(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^model_init_kwargs is .*the policy's LoRA as peft_config"):
        make(model_init_kwargs=given)


# How long ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"max_steps": 2}, {"num_train_epochs": 1}])
def test_two_lengths_are_refused(other: dict[str, Any]) -> None:
    name = next(iter(other))
    sentence = f"^{name} is {other[name]} and total_episodes is 20, which is 12 steps here: each says how long"
    with pytest.raises(ValueError, match=sentence):
        make(total_episodes=20, per_device_train_batch_size=8, **other)
    assert make(**other).total_episodes is None


def test_lengths_that_agree_are_fine() -> None:
    """A trainer writes the steps of `total_episodes` into `max_steps`, and its settings may be copied from there."""
    args = make(total_episodes=20, per_device_train_batch_size=8, max_steps=12)
    assert (args.total_episodes, args.max_steps, args.steps_of_run) == (20, 12, 12)  # 3 rollouts of 8, 4 epochs each


def test_one_way_of_sampling_is_not_given_twice() -> None:
    with pytest.raises(ValueError, match=r"^top_p is 0\.8, and generation_kwargs has top_p 0\.9: leave one"):
        make(top_p=0.8, generation_kwargs={"top_p": 0.9})
    make(top_p=0.8, generation_kwargs={"top_p": 0.8, "top_k": 5})


@pytest.mark.parametrize("asked", [{}, {"gradient_checkpointing": False}, {"gradient_checkpointing": True}])
def test_the_older_name_of_activation_checkpointing_works_without_a_warning(asked: dict[str, bool]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = make(**asked)
    assert args.gradient_checkpointing is asked.get("gradient_checkpointing", True)
