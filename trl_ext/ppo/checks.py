"""What can be wrong with the input, said in one sentence before anything expensive happens."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from datasets import Dataset, DatasetDict, IterableDataset
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations

from trl_ext.feedback.files import ANSWERS, decoded
from trl_ext.generation import VLLMServers
from trl_ext.generation.vllm import NO_VLLM
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.measuring import Limits, measured_prompt, measured_prompts, measured_texts
from trl_ext.ppo.stream import PromptStream
from trl_ext.rewards.protocol import ARGUMENTS, arguments_of, check_functions, name_of
from trl_ext.roles import SharedBase
from trl_ext.roles.adapters import HUB, Named, check_head_inside, named, read_score_head
from trl_ext.tokens import as_ids, check_chat_template, config_of, context_limit, vocabulary_size
from trl_ext.types import fault_of_messages

# Columns that other trainers, or the writers of data, have in mind as a part of the prompt.
UNREAD = {"tools", "chat_template_kwargs", "system", "system_prompt", "documents"}
UNREAD |= {"image", "images", "video", "videos", "audio", "audios"}
LOOKED_AT = 16  # prompts of a data set, by which processes know that they have the same


def check_prompts(dataset: Any, name: str) -> None:
    """Refuse what is no dataset of prompts.

    Raises:
        TypeError: not a `datasets.Dataset`.
        ValueError: empty, without a prompt column, or with a prompt that is neither text nor conversation.
    """
    _check_dataset(dataset, name, "prompt")
    check_column(dataset, name)
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: it needs at least one prompt.")
    kind = dataset.format["type"]
    plain = isinstance(dataset[0], dict) and isinstance(dataset[0]["prompt"], (str, list))
    if kind not in (None, "custom") and not plain and isinstance(dataset.with_format(None)[0]["prompt"], (str, list)):
        raise ValueError(f"{name} gives its rows in the format {kind!r}: call its reset_format().")
    first: Any = None
    for row, prompt in enumerate(dataset["prompt"]):
        first = prompt if first is None else first
        _check_prompt(prompt, row, name, first)


def check_column(dataset: Dataset, name: str) -> None:
    """Refuse rows without prompts.

    Raises:
        ValueError: there is no prompt column.
    """
    if "prompt" not in dataset.column_names:
        hint = " (give the prompts themselves: they are tokenised here)" if "input_ids" in dataset.column_names else ""
        raise ValueError(f"{name} has no 'prompt' column, only {dataset.column_names}: rename yours to 'prompt'{hint}.")


def _check_dataset(dataset: Any, name: str, column: str) -> None:
    if not isinstance(dataset, Dataset):
        remedy = {
            IterableDataset: ": a stream cannot be read before the run, so take its rows, as in "
            "datasets.Dataset.from_list(list(stream.take(1000)))",
            DatasetDict: ": choose one of its splits",
        }
        kind = type(dataset)
        raise TypeError(
            f"{name} must be a datasets.Dataset with a {column!r} column, not {kind.__name__}{remedy.get(kind, '')}."
        )


def _check_prompt(prompt: Any, row: int, name: str, first: Any) -> None:
    reason = None if isinstance(prompt, str) else fault_of_messages(prompt)
    if isinstance(prompt, str) and decoded(prompt) is not prompt:
        reason = "messages that are written as one text: make a list of them again (trl_ext.feedback.files.decoded)."
    elif reason is not None:
        reason += '; a prompt is a text, or a list of messages like {"role": "user", "content": "..."}.'
    elif isinstance(prompt, str) != isinstance(first, str):
        reason = "of another kind than that in row 0: give all prompts as texts, or all as messages."
    if reason is not None:
        raise ValueError(f"The prompt in row {row} of {name} is {prompt!r:.80}: {reason}")


def check_datasets(train_dataset: Any, eval_dataset: Any, args: PPOConfig) -> None:
    """Check both datasets, and that the training one fills a rollout.

    Raises:
        TypeError, ValueError: see `check_prompts`; or too few prompts.
    """
    if train_dataset is None:
        raise ValueError("train_dataset is missing: give a datasets.Dataset with a 'prompt' column.")
    check_prompts(train_dataset, "train_dataset")
    if args.rollout_batch_size % args.num_generations:
        raise ValueError(
            f"num_generations is {args.num_generations}, which does not divide the {args.rollout_batch_size} "
            "completions of a rollout: choose a divisor."
        )
    prompts = args.rollout_batch_size // args.num_generations
    if len(train_dataset) < prompts:
        raise ValueError(
            f"train_dataset has {len(train_dataset)} prompts, but one rollout takes {prompts} "
            f"(per_device_train_batch_size {args.per_device_train_batch_size} x gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps} x num_mini_batches {args.num_mini_batches} x {args.world_size} "
            f"processes / num_generations {args.num_generations}): give more prompts or lower one of them."
        )
    if eval_dataset is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy is {args.eval_strategy.value!r}, but there is no eval_dataset: give one.")
    for name, dataset in _eval_datasets(eval_dataset):
        check_prompts(dataset, name)


def check_tokenizer(
    tokenizer: Any, train_dataset: Dataset, eval_dataset: Any = None, vocabulary: int | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of these prompts, with a pad token that the model has (its EOS where it has none: masks, not ids,
    mark padding here).

    Args:
        vocabulary: ids that the model has; None: any.

    Raises:
        TypeError: not a tokenizer.
        ValueError: no EOS token; no chat template where the prompts are conversations; or an empty prompt and a
            tokenizer that adds no token of its own.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class must be a tokenizer, not {type(tokenizer).__name__}.")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, so no completion could ever end: set tokenizer.eos_token.")
    if vocabulary is not None and tokenizer.eos_token_id >= vocabulary:
        raise ValueError(
            f"The tokenizer's EOS token {tokenizer.eos_token!r} has the id {tokenizer.eos_token_id}, but the model has "
            f"{vocabulary} ids only: resize its embeddings, or set tokenizer.eos_token."
        )
    if tokenizer.pad_token_id is None or (vocabulary is not None and tokenizer.pad_token_id >= vocabulary):
        tokenizer.pad_token = tokenizer.eos_token
    for name, dataset in [("train_dataset", train_dataset), *_eval_datasets(eval_dataset)]:
        if not isinstance(dataset[0]["prompt"], str):
            check_chat_template(tokenizer)
        elif not tokenizer("")["input_ids"] and "" in (prompts := list(dataset["prompt"])):
            raise ValueError(
                f"The prompt in row {prompts.index('')} of {name} is empty, and the tokenizer adds no token of its "
                "own: give it some text, or drop the row."
            )
    return tokenizer


# Rows as the model reads them ----------------------------------------------------------------------------------------


def check_run(
    args: PPOConfig,
    train_dataset: Any,
    eval_dataset: Any,
    tokenizer: Any,
    functions: Sequence[Any],
    model: Any,
    ptx_dataset: Any = None,
    generator: Any = None,
    reward_tokenizers: Sequence[Any] = (),
) -> PreTrainedTokenizerBase:
    """All that settings and rows say against a run, before a model is loaded. Of a stream that is its first rollout;
    the rest is checked as it comes.

    Args:
        tokenizer: of the model; None: the model's own.
        model: a model, or the name or folder of one, whose config says how much it can read.
        generator: who answers; None: whom `args` name.
        reward_tokenizers: of the models among `functions`, one for each; None of a function.

    Returns:
        The tokenizer, with a pad token.

    Raises:
        TypeError, ValueError: one sentence, with the row where one is at fault.
        ImportError, ConnectionError: vLLM is to answer, and is not there.
    """
    check_sharding(args)
    check_ahead(args, generator)
    stream = train_dataset if isinstance(train_dataset, PromptStream) else None
    if stream is not None:
        train_dataset = stream.first()
    check_datasets(train_dataset, eval_dataset, args)
    check_texts(ptx_dataset, args)
    datasets = [("train_dataset", train_dataset), *_eval_datasets(eval_dataset)]
    check_same_rows(datasets)
    check_arguments(functions, datasets, args)
    given: Any = args.model_init_kwargs or {}
    name = model if isinstance(model, str) else model.config.name_or_path
    where = {key: given[key] for key in HUB if key in given}
    start = named(name, **where) if isinstance(model, str) else Named(name)
    if tokenizer is None and not name:
        raise ValueError("processing_class is missing, and the model has no name to load one from: give its tokenizer.")
    if tokenizer is None:
        tokenizer = start.load_tokenizer(args.trust_remote_code)
    config = config_of(start.base if isinstance(model, str) else model, args.trust_remote_code, start.revision)
    vocabulary = None if config is None else vocabulary_size(config)
    tokenizer = check_tokenizer(tokenizer, train_dataset, eval_dataset, vocabulary)
    if not isinstance(train_dataset[0]["prompt"], str):
        for function, own in zip(functions, reward_tokenizers, strict=False):
            if own is not None and isinstance(function, (str, nn.Module)):
                check_chat_template(own, f"the tokenizer of the reward model {name_of(function)!r}")
    check_ids(args, vocabulary)
    check_sampling(args, vocabulary or len(tokenizer))
    context = None if config is None else context_limit(config)
    limits = Limits.of_prompts(vocabulary, context, tokenizer, train_dataset[0]["prompt"], args, bool(functions))
    for name, dataset in datasets:
        measured = measured_prompts(dataset, name, tokenizer, args.chat_template_kwargs)
        limits.check(measured, f"The prompt in row {{}} of {name}", tokenizer)
    if stream is not None:
        first = train_dataset[0]
        stream.check = partial(
            _check_row, first=first, limits=limits, tokenizer=tokenizer, template=args.chat_template_kwargs
        )
    if ptx_dataset is not None:
        of_texts = Limits(vocabulary, context, 0, "ptx_max_length")
        measured = measured_texts(ptx_dataset, tokenizer, args.ptx_max_length)
        of_texts.check(measured, "The text in row {} of ptx_dataset", tokenizer)
    check_engine(args)
    return tokenizer


def check_same_rows(datasets: Sequence[tuple[str, Dataset]]) -> None:
    """Every process takes its part of the same rows: looked at by their number and a few prompts. Every process must
    call it.

    Args:
        datasets: (name, rows with a prompt) of each.

    Raises:
        ValueError: another process has other rows.
    """

    def some(rows: Dataset) -> tuple[int, list[str]]:
        if rows.format["type"] == "custom":  # a transform may draw at random
            return len(rows), []
        last = len(rows) - 1
        return len(rows), [repr(rows[last * i // (LOOKED_AT - 1)]["prompt"]) for i in range(LOOKED_AT)]

    everyones = gather_object([[some(rows) for _, rows in datasets]]) if PartialState().num_processes > 1 else []
    for theirs in everyones[1:]:
        for (name, _), one, other in zip(datasets, everyones[0], theirs, strict=False):
            if one != other:
                counts = "" if one[0] == other[0] else f" ({one[0]} and {other[0]})"
                raise ValueError(
                    f"{name} has other rows in one process than in another{counts}: shuffle, split and filter it with "
                    "a seed, or save it once and load it in each."
                )


def _check_row(
    row: Mapping[str, Any],
    number: int,
    first: Mapping[str, Any],
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
    template: Any,
) -> None:
    """Refuse a row of a stream that a data set of such rows would be refused for.

    Raises:
        ValueError: names the row.
    """
    for column in first:
        if column not in row:
            raise ValueError(f"Row {number} of train_dataset has no {column!r}, which row 0 has.")
    if further := sorted(row.keys() - first.keys()):
        raise ValueError(f"Row {number} of train_dataset has {further[0]!r}, which row 0 lacks: give it None there.")
    _check_prompt(row["prompt"], number, "train_dataset", first["prompt"])
    name = "The prompt in row {} of train_dataset"
    limits.check(measured_prompt(row["prompt"], number, name, tokenizer, template), name, tokenizer)


def check_ids(args: PPOConfig, vocabulary: int | None) -> None:
    """Refuse ids in `generation_kwargs` that the model does not have.

    Raises:
        ValueError: names the first.
    """
    given: Any = args.generation_kwargs or {}
    for name in ("eos_token_id", "pad_token_id"):
        for i in as_ids(given.get(name)):
            if vocabulary is not None and i >= vocabulary:
                raise ValueError(f"generation_kwargs has {name}={i}, but the model has {vocabulary} ids only.")


def check_sampling(args: PPOConfig, vocabulary: int) -> None:
    """Refuse `generation_kwargs` that Transformers' `generate` refuses: it tells by sampling only, so a tiny model of
    as many ids is sampled from.

    Raises:
        ValueError: what `generate` says against them.
    """
    given: Any = args.generation_kwargs
    if not given:
        return
    own = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    own |= {"do_sample": True, "pad_token_id": 0, "eos_token_id": [1]}
    short = {"max_new_tokens": 2, "min_new_tokens": None, "min_length": None}
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **tiny)).eval()
        try:
            config = GenerationConfig(**{**own, **given, **short})
            model.generate(torch.tensor([[2 % vocabulary]] * 2), generation_config=config)  # some take a single row
        except Exception as error:  # whatever `generate` raises, it would raise in the first rollout
            raise ValueError(f"generation_kwargs: {' '.join(str(error).split())}") from error


def check_arguments(functions: Sequence[Any], datasets: Iterable[tuple[str, Dataset]], args: PPOConfig) -> None:
    """Refuse a reward function that asks for what no dataset has, and warn of columns that none is given.

    Raises:
        ValueError: names it, and what it asks for.
    """
    for name, dataset in datasets:
        columns = [] if args.remove_unused_columns else dataset.column_names
        hidden = [column for column in columns if column in ARGUMENTS]
        if hidden and any(callable(function) for function in functions):
            warnings.warn(
                f"{name} has a column {hidden[0]!r}, which no reward function sees: the argument of that name is the "
                "trainer's own; rename the column.",
                UserWarning,
                stacklevel=2,
            )
        example = dataset[0]
        first = example["prompt"]
        talks = [name for name in ANSWERS if fault_of_messages(decoded(example.get(name))) is None]
        if isinstance(first, str) and talks:
            warnings.warn(
                f"{name} has conversations in {talks[0]!r} and texts as prompts, which the policy is asked without the "
                "chat template: give the prompts as messages, too.",
                UserWarning,
                stacklevel=2,
            )
        told = {"system", "system_prompt"} if isinstance(first, list) and first[0]["role"] == "system" else set()
        for column in UNREAD & {*dataset.column_names} - told:
            warnings.warn(
                f"{name} has a column {column!r}, which is not read into the prompts, so that the policy answers "
                "without it: write what it says into the prompt, or rename the column.",
                UserWarning,
                stacklevel=2,
            )
        offered = [*(column for column in columns if column != "prompt"), *ARGUMENTS, "prompt_ids"]
        for function in functions:
            if callable(function) and not hasattr(function, "forward"):
                try:
                    arguments_of(function, offered)
                except TypeError as error:
                    raise ValueError(f"{name}: {error}") from error


# What scores, and where ----------------------------------------------------------------------------------------------


def check_scores(functions: list[Any], tokenizers: Any, model: Any, args: PPOConfig) -> None:
    """Refuse to begin where nothing scores, where something cannot, or where weights are not one per reward function
    (the reward role counts as one, and so do several).

    Raises:
        FileNotFoundError, TypeError, ValueError: says what is missing, or how many there are.
    """
    check_functions(functions, as_list(tokenizers) or [None] * len(functions))
    if not functions and not (isinstance(model, SharedBase) and model.has_role("reward")):
        raise ValueError(
            "Nothing gives a score: pass reward_funcs, or a SharedBase built with reward=<adapter folder>."
        )
    for function in functions:
        if isinstance(function, str) and (adapter := named(function).adapter) is not None:
            read_score_head(adapter)  # Transformers would score by a random one
            check_head_inside(adapter)
    if args.reward_ensemble != "mean":
        if functions or not isinstance(model, SharedBase) or len(model.reward_roles) < 2:
            what = "reward functions score" if functions else "there is one reward role"
            raise ValueError(
                f"reward_ensemble is {args.reward_ensemble!r}, but {what}: give SharedBase several reward adapters, "
                "reward=[folder, folder], or leave reward_ensemble out."
            )
        if args.score_normalization == "none":
            raise ValueError(
                f"reward_ensemble {args.reward_ensemble!r} compares the reward roles' scores, and each has a zero and "
                "a unit of its own: set score_normalization to 'reference' or 'running'."
            )
    expected = max(1, len(functions))
    if args.reward_weights is not None and len(args.reward_weights) != expected:
        raise ValueError(
            f"reward_weights has {len(args.reward_weights)} entries for {expected} reward functions: give one each."
        )


def check_texts(ptx_dataset: Any, args: PPOConfig) -> None:
    """Refuse a pretraining term without texts, and texts without one.

    Raises:
        TypeError: no dataset.
        ValueError: says which of the two is missing, or what is no text.
    """
    if bool(args.ptx_coef) != (ptx_dataset is not None):
        raise ValueError(
            f"ptx_coef is {args.ptx_coef} and ptx_dataset is {'missing' if ptx_dataset is None else 'given'}: the "
            "pretraining term needs both."
        )
    if ptx_dataset is None:
        return
    _check_dataset(ptx_dataset, "ptx_dataset", "text")
    if "text" not in ptx_dataset.column_names:
        raise ValueError(f"ptx_dataset has no 'text' column, only {ptx_dataset.column_names}: rename yours to 'text'.")
    if len(ptx_dataset) == 0:
        raise ValueError("ptx_dataset is empty: it needs at least one text.")
    for row, text in enumerate(ptx_dataset["text"]):
        if not text:
            raise ValueError(f"ptx_dataset has no text in row {row}: filter such rows out.")
        if not isinstance(text, str):
            raise ValueError(f"ptx_dataset has {text!r:.80} in row {row}, which is no text.")


def check_output_dir(path: str) -> None:
    """Refuse a folder that cannot be written to.

    Raises:
        PermissionError: it, or the nearest folder above it that exists, is not writable.
        NotADirectoryError: it is a file, or lies below one.
    """
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output_dir {path!r} is a file: give a folder.")
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"output_dir {path!r} lies below {str(nearest)!r}, which is a file: choose another.")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(
            f"output_dir {path!r} cannot be written (no permission on {str(nearest)!r}): choose another."
        )


def check_devices(args: PPOConfig) -> None:
    """Refuse several GPUs in one process, and those of a Mac.

    Raises:
        ValueError: there are.
    """
    if args.device.type == "mps":
        raise ValueError("The GPU of a Mac has no float64, in which figures are added up here: set use_cpu to true.")
    if args.n_gpu > 1:
        raise ValueError(
            "Several GPUs are visible to one process, which would replicate the base: use `accelerate launch`, or "
            "set CUDA_VISIBLE_DEVICES to one of them."
        )


def check_engine(args: PPOConfig) -> None:
    """Refuse an engine that is not there.

    Raises:
        ValueError: vLLM is to run in several processes, each of which puts its engine onto the first GPU.
        ImportError: vLLM is not installed in this process.
        ConnectionError: a vLLM server is not up in time.
    """
    if args.use_vllm and args.vllm_mode == "server":
        VLLMServers(args.vllm_server_urls, args.vllm_server_timeout).wait_until_up()
    elif args.use_vllm and args.world_size > 1:
        raise ValueError(
            f"vllm_mode is 'colocate', which is for one process, and there are {args.world_size}, whose engines would "
            "share the first GPU that they see: set vllm_mode to 'server'."
        )
    elif args.use_vllm and find_spec("vllm") is None and "vllm" not in sys.modules:
        raise ImportError(NO_VLLM)


def check_ahead(args: PPOConfig, generator: Any) -> None:
    """Refuse to sample ahead where nobody answers while the policy is trained.

    Raises:
        ValueError: says who would have to.
    """
    who = type(generator).__name__ if generator is not None else "vLLM in this process" if args.use_vllm else "the base"
    served = generator is None and args.use_vllm and args.vllm_mode == "server"
    if args.rollouts_ahead and not served and not callable(getattr(generator, "begin", None)):
        raise ValueError(
            f"rollouts_ahead is {args.rollouts_ahead}, but {who} cannot answer while the policy is trained: set "
            "use_vllm and vllm_mode 'server', give a generator that has the method begin, or leave rollouts_ahead out."
        )


def check_sharding(args: PPOConfig) -> None:
    """Refuse a way to share out the base in which its roles cannot be trained.

    Raises:
        ValueError: says what to set instead.
    """
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed steps the optimizer after each backward, and each role has one of its own: take "
            "recipes/accelerate/multi_gpu.yaml, or fsdp.yaml beside it to share out the base."
        )
    if args.ddp_find_unused_parameters is False and args.world_size > 1:
        raise ValueError(
            "ddp_find_unused_parameters is False, and each role's backward touches its own adapter alone: leave it out."
        )
    if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        raise ValueError(
            "accelerate launch has a parallelism_config, and the four roles are trained on whole models: leave it out, "
            "or use fsdp."
        )
    settings: Any = args.fsdp_plugin_args
    if settings is None and not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    version = settings["fsdp_version"] if settings is not None else int(os.environ.get("FSDP_VERSION", "1"))
    if version != 2:
        raise ValueError(
            f"fsdp_version is {version}, but roles share a base through FSDP2 only: set fsdp_version to 2, as "
            "recipes/accelerate/fsdp.yaml does."
        )
    if parse_flag_from_env("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading leaves the base empty on all processes but the first, and roles are laid "
            "on it before it is shared out: set it to false."
        )
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING") or (settings or {}).get("activation_checkpointing"):
        raise ValueError(
            "fsdp_activation_checkpointing would compute the value role anew under the policy's adapter: set it to "
            "false, and gradient_checkpointing to true, which restores each role's own."
        )
    for name in ("use_vllm", "use_transformers_continuous_batching"):
        if getattr(args, name):
            raise ValueError(f"{name} is set, but a base that FSDP2 shares out answers by generate: leave it out.")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker of `report_to` that is not installed.

    Raises:
        ValueError: one is not.
    """
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in installed:
            raise ValueError(
                f"report_to names {name!r}, which is not among the trackers installed here "
                f"({', '.join(installed) or 'none'}): install it, or leave it out."
            )


def as_list(items: Any) -> list[Any]:
    """None as an empty list, one item as a list of one."""
    return list(items) if isinstance(items, (list, tuple)) else [] if items is None else [items]


def _eval_datasets(eval_dataset: Any) -> list[tuple[str, Any]]:
    if isinstance(eval_dataset, dict):
        return [(f"eval_dataset[{key!r}]", dataset) for key, dataset in eval_dataset.items()]
    return [] if eval_dataset is None else [("eval_dataset", eval_dataset)]
