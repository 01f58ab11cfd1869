"""What can be wrong with the input: each in one sentence that says what to do."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers.processors import TemplateProcessing
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.helpers import (
    CHAT_TEMPLATE,
    QUIET,
    prompt_dataset,
    saved_model,
    tiny_classifier,
    tiny_llama,
    word_tokenizer,
)
from trl_ext import PPOTrainer
from trl_ext.ppo import checks
from trl_ext.ppo.building import args_of_gpu, warn_of_outliers, warn_of_turns
from trl_ext.ppo.checks import (
    as_list,
    check_arguments,
    check_datasets,
    check_devices,
    check_engine,
    check_output_dir,
    check_prompts,
    check_same_rows,
    check_sampling,
    check_sharding,
    check_tokenizer,
)
from trl_ext.ppo.config import PPOConfig
from trl_ext.ppo.measuring import measured_texts
from trl_ext.rewards.classifiers import tokenizer_of
from trl_ext.tokens import after_answers, check_chat_template, tokenize_prompts


def rows(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)


def config(**changes: Any) -> PPOConfig:
    return PPOConfig(**{"output_dir": "run", **QUIET, "per_device_train_batch_size": 2, **changes})


def nothing(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def refused(check: Callable[[], Any], error: type[Exception]) -> str:
    """The sentence; of exactly this class, on one line."""
    with pytest.raises(error) as raised:
        check()
    assert type(raised.value) is error
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# Prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "error", "sentence"),
    [
        ([{"prompt": "a"}], TypeError, "D must be a datasets.Dataset with a 'prompt' column, not list."),
        ("imdb", TypeError, "D must be a datasets.Dataset with a 'prompt' column, not str."),
        (
            DatasetDict({"train": rows(prompt=["a"])}),
            TypeError,
            "D must be a datasets.Dataset with a 'prompt' column, not DatasetDict: choose one of its splits.",
        ),
        (
            rows(prompt=["a"]).to_iterable_dataset(),
            TypeError,
            "D must be a datasets.Dataset with a 'prompt' column, not IterableDataset: a stream cannot be read before "
            "the run, so take its rows, as in datasets.Dataset.from_list(list(stream.take(1000))).",
        ),
        (
            rows(text=["a"], label=[1]),
            ValueError,
            "D has no 'prompt' column, only ['text', 'label']: rename yours to 'prompt'.",
        ),
        (
            rows(input_ids=[[1, 2]]),
            ValueError,
            "D has no 'prompt' column, only ['input_ids']: rename yours to 'prompt' "
            "(give the prompts themselves: they are tokenised here).",
        ),
        (rows(prompt=[]), ValueError, "D is empty: it needs at least one prompt."),
    ],
)
def test_no_dataset_of_prompts(dataset: Any, error: type[Exception], sentence: str) -> None:
    assert refused(lambda: check_prompts(dataset, "D"), error) == sentence


@pytest.mark.parametrize(
    "prompt", [7, None, [1, 2], [], ["a"], [{"content": "no role"}], {"role": "user"}], ids=lambda prompt: repr(prompt)
)
def test_prompts_of_the_wrong_kind(prompt: Any) -> None:
    good = (
        [{"role": "user", "content": "a"}]
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict)
        else None
    )
    sentence = refused(
        lambda: check_prompts(rows(prompt=[prompt] if good is None else [good, prompt]), "D"), ValueError
    )
    assert sentence.startswith(f"The prompt in row {0 if good is None else 1} of D is ")
    assert '{"role": "user", "content": "..."}' in sentence


def test_an_empty_prompt_needs_a_tokenizer_that_begins_texts() -> None:
    prompts = Dataset.from_dict({"prompt": ["the cat", ""]})
    sentence = refused(lambda: check_tokenizer(word_tokenizer(), prompts), ValueError)
    assert sentence.startswith("The prompt in row 1 of train_dataset is empty, and the tokenizer adds no token")
    check_tokenizer(word_tokenizer(), Dataset.from_dict({"prompt": ["the cat"]}))
    held_out = {"easy": prompt_dataset(), "hard": prompts}
    sentence = refused(lambda: check_tokenizer(word_tokenizer(), prompt_dataset(), held_out), ValueError)
    assert "of eval_dataset['hard'] is empty" in sentence
    refused(lambda: check_tokenizer(word_tokenizer(), prompt_dataset(), prompt_dataset(chat=True)), ValueError)


def test_a_long_bad_prompt_is_not_quoted_in_full() -> None:
    assert len(refused(lambda: check_prompts(rows(prompt=[list(range(9999))]), "D"), ValueError)) < 250


@pytest.mark.parametrize("chat", [True, False])
def test_good_prompts(chat: bool) -> None:
    check_prompts(prompt_dataset(3, chat=chat), "D")


# Datasets ------------------------------------------------------------------------------------------------------------


def test_no_train_dataset() -> None:
    sentence = refused(lambda: check_datasets(None, None, config()), ValueError)
    assert sentence == "train_dataset is missing: give a datasets.Dataset with a 'prompt' column."


def test_too_few_prompts_names_the_numbers() -> None:
    args = config(gradient_accumulation_steps=3, num_mini_batches=4)
    check_datasets(prompt_dataset(24), None, args)
    assert refused(lambda: check_datasets(prompt_dataset(23), None, args), ValueError) == (
        "train_dataset has 23 prompts, but one rollout takes 24 (per_device_train_batch_size 2 x "
        "gradient_accumulation_steps 3 x num_mini_batches 4 x 1 processes / num_generations 1): give "
        "more prompts or lower one of them."
    )


def test_the_train_dataset_is_checked_and_named() -> None:
    sentence = refused(lambda: check_datasets(rows(text=["a"] * 9), None, config()), ValueError)
    assert sentence.startswith("train_dataset has no 'prompt' column")


def test_eval_strategy_without_eval_dataset() -> None:
    args = config(eval_strategy="epoch")
    sentence = refused(lambda: check_datasets(prompt_dataset(8), None, args), ValueError)
    assert sentence == "eval_strategy is 'epoch', but there is no eval_dataset: give one."
    check_datasets(prompt_dataset(8), prompt_dataset(1), args)  # an eval dataset need not fill a rollout


def test_eval_datasets_are_checked_and_named() -> None:
    train, bad = prompt_dataset(8), rows(text=["a"])
    assert refused(lambda: check_datasets(train, bad, config()), ValueError).startswith("eval_dataset has no 'prompt'")
    several = {"easy": prompt_dataset(2), "hard": bad}
    sentence = refused(lambda: check_datasets(train, several, config()), ValueError)
    assert sentence.startswith("eval_dataset['hard'] has no 'prompt'")
    assert refused(lambda: check_datasets(train, [train], config()), TypeError).startswith("eval_dataset must be")


# Tokenizer -----------------------------------------------------------------------------------------------------------


def test_no_tokenizer() -> None:
    sentence = refused(lambda: check_tokenizer("gpt2", prompt_dataset()), TypeError)
    assert sentence == "processing_class must be a tokenizer, not str."


def test_a_tokenizer_without_an_end() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    sentence = refused(lambda: check_tokenizer(tokenizer, prompt_dataset()), ValueError)
    assert sentence == "The tokenizer has no EOS token, so no completion could ever end: set tokenizer.eos_token."


def test_padding_is_the_eos_where_there_is_none() -> None:
    assert check_tokenizer(word_tokenizer(pad=False), prompt_dataset()).pad_token_id == 1
    assert check_tokenizer(word_tokenizer(), prompt_dataset()).pad_token_id == 0


def test_conversations_need_a_chat_template() -> None:
    sentence = refused(lambda: check_tokenizer(word_tokenizer(), prompt_dataset(chat=True)), ValueError)
    assert sentence.startswith("The prompts are conversations, but the tokenizer has no chat template: ")
    tokenizer = word_tokenizer(CHAT_TEMPLATE)
    assert check_tokenizer(tokenizer, prompt_dataset(chat=True)) is tokenizer


# Output folder -------------------------------------------------------------------------------------------------------


def test_a_folder_is_fine_and_nothing_is_made(tmp_path: Path) -> None:
    check_output_dir(str(tmp_path))
    check_output_dir(str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_relative_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output_dir("run")
    check_output_dir(".")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    sentence = refused(lambda: check_output_dir(str(path)), NotADirectoryError)
    assert sentence == f"output_dir {str(path)!r} is a file: give a folder."


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    sentence = refused(lambda: check_output_dir(str(path / "a" / "run")), NotADirectoryError)
    assert sentence.startswith(f"output_dir {str(path / 'a' / 'run')!r} lies below")
    assert repr(str(path)) in sentence


@pytest.mark.parametrize("below", [".", "a/b"])
def test_no_permission(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by os.access, so that root, who may write anywhere, can run this test."""
    monkeypatch.setattr(os, "access", lambda path, mode: not (Path(path) == tmp_path and mode & os.W_OK))
    folder = str(tmp_path / below)
    sentence = refused(lambda: check_output_dir(folder), PermissionError)
    assert sentence == (
        f"output_dir {folder!r} cannot be written (no permission on {str(tmp_path)!r}): choose another."
    )


# Small things --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "expected"), [(None, []), ("ab", ["ab"]), (["a", "b"], ["a", "b"]), (("a",), ["a"]), ([], []), (0, [0])]
)
def test_as_list(items: Any, expected: list[Any]) -> None:
    assert as_list(items) == expected


# What is loaded by name ----------------------------------------------------------------------------------------------


def test_a_base_is_loaded_where_and_as_it_computes() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert args_of_gpu(cpu, False) == {}
    assert args_of_gpu(gpu, False) == {"device_map": {"": gpu}}
    assert args_of_gpu(gpu, True) == {"device_map": {"": gpu}, "dtype": torch.bfloat16}


@pytest.mark.parametrize("kind", ["pandas", "arrow", "numpy"])
def test_rows_in_a_format_of_their_own_are_refused(kind: str) -> None:
    chats = prompt_dataset(chat=True).with_format(kind)
    says = f"train_dataset gives its rows in the format {kind!r}: call its reset_format()."
    assert refused(lambda: check_prompts(chats, "train_dataset"), ValueError) == says
    check_prompts(prompt_dataset().with_format("torch"), "train_dataset")  # texts stay texts


# Before a model is loaded --------------------------------------------------------------------------------------------


class Silent:
    """A generator that cannot begin."""

    def answers(self, prompt_ids: Any, config: Any, role: str) -> Any:
        return prompt_ids


@pytest.mark.parametrize(
    ("given", "settings", "error", "says"),
    [
        ({"reward_funcs": 5}, {}, TypeError, "A reward function must be a callable"),
        ({"reward_funcs": "/no/such"}, {}, FileNotFoundError, "The reward model '/no/such' does not exist"),
        ({"reward_funcs": torch.nn.Linear(1, 1)}, {}, TypeError, "The reward model Linear is none of Transformers"),
        ({"reward_processing_classes": [None] * 2}, {}, ValueError, "reward_processing_classes has 2 entries for 1"),
        ({}, {"use_vllm": True}, ImportError, "use_vllm is set, but vLLM is not installed"),
        ({}, {"generation_kwargs": {"eos_token_id": [1, 99]}}, ValueError, "has eos_token_id=99, but the model has 25"),
        ({}, {"generation_kwargs": {"pad_token_id": 99}}, ValueError, "has pad_token_id=99, but the model has 25 ids"),
        ({}, {"model_init_kwargs": {"dtype": "float15"}}, ValueError, "dtype is 'float15', which torch does not know"),
        ({}, {"rollouts_ahead": 1}, ValueError, "rollouts_ahead is 1, but the base cannot answer while the policy is"),
        ({}, {"rollouts_ahead": 1, "use_vllm": True}, ValueError, "but vLLM in this process cannot answer while"),
        ({"generator": Silent()}, {"rollouts_ahead": 1}, ValueError, "1, but Silent cannot answer while the policy is"),
        ({"quantization_config": "4bit"}, {}, TypeError, "quantization_config is '4bit': give a"),
    ],
)
def test_what_settings_tell_is_said_before_a_model_is_loaded(
    given: dict[str, Any],
    settings: dict[str, Any],
    error: type[Exception],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = saved_model(tmp_path / "model")
    monkeypatch.delattr(PreTrainedModel, "from_pretrained")
    args = config(output_dir=str(tmp_path / "run"), max_completion_length=4, **settings)
    given = {"reward_funcs": lambda completions: [1.0] * len(completions), **given}
    assert says in refused(lambda: PPOTrainer(model, args=args, train_dataset=prompt_dataset(), **given), error)


# Columns -------------------------------------------------------------------------------------------------------------


def test_a_column_that_no_reward_function_sees_is_told() -> None:
    """The argument `completions` is what the policy wrote, whatever the dataset calls so."""

    def judge(completions: list[Any], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    args = config()
    with pytest.warns(UserWarning, match=r"^D has a column 'completions', which no reward function sees") as told:
        check_arguments([judge, judge], [("D", rows(prompt=["a"], completions=["b"], city=["c"]))], args)
    assert len(told) == 1


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs", "images"])
def test_a_column_that_others_write_into_the_prompt_is_told(column: str) -> None:
    with pytest.warns(UserWarning, match=f"^D has a column '{column}', which is not read into the prompts"):
        check_arguments([lambda completions, **_: []], [("D", rows(prompt=["a"], **{column: ["c"]}))], config())


def test_texts_beside_conversations_are_told() -> None:
    says = [{"role": "assistant", "content": "sat"}]
    with pytest.warns(UserWarning, match=r"^train_dataset has conversations in 'chosen' and texts as prompts"):
        check_arguments([nothing], [("train_dataset", rows(prompt=["the cat"], chosen=[says]))], config())


def test_columns_of_other_names_are_not_told_of(recwarn: pytest.WarningsRecorder) -> None:
    args = config()
    recwarn.clear()
    check_arguments([lambda completions, city: []], [("D", rows(prompt=["a"], completion=["b"], city=["c"]))], args)
    assert not recwarn.list


# Sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        *({"bad_words_ids": "abc"}, {"bad_words_ids": [3]}, {"bad_words_ids": [[40]]}, {"suppress_tokens": ["a"]}),
        *({"sequence_bias": {"a": 1}}, {"no_repeat_ngram_size": 1.5}, {"top_h": 3.0}, {"max_time": "x"}),
        {"num_beams": 4, "num_beam_groups": 2},
    ],
    ids=str,
)
def test_what_generate_refuses_is_refused_at_once(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^generation_kwargs: .+"):
        check_sampling(config(generation_kwargs=given), 30)


@pytest.mark.parametrize(
    "given", [{"bad_words_ids": [[3]]}, {"num_beams": 2}, {"do_sample": False}, {"min_new_tokens": 3}], ids=str
)
def test_what_generate_takes_is_taken_and_no_random_number_is_used(given: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    check_sampling(config(generation_kwargs=given), 30)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("variables", "changes", "why"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version is 1, but roles share a base through FSDP2 only"),
        ({}, {}, "fsdp_version is 1"),  # accelerate's default
        ({"FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "leaves the base empty"),
        ({"FSDP_VERSION": "2"}, {"use_transformers_continuous_batching": True}, "answers by generate: leave it out"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "under the policy's adapter: set it to"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "accelerate launch has a parallelism_config"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed steps the optimizer"),
    ],
    ids=[
        "version 1",
        "no version",
        "efficient loading",
        "continuous batching",
        "recomputation",
        "parallelism",
        "DeepSpeed",
    ],
)
def test_ways_to_share_out_the_base_that_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], changes: dict[str, Any], why: str
) -> None:
    args = PPOConfig(str(tmp_path), **QUIET, **changes)
    check_sharding(args)
    for name, value in ({"ACCELERATE_USE_FSDP": "true"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=why):
        check_sharding(args)


def test_fsdp2_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = PPOConfig(str(tmp_path), **QUIET)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    check_sharding(args)


def test_engines_of_several_processes_are_not_put_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    args = config(use_vllm=True, vllm_mode="colocate")
    monkeypatch.setattr(PPOConfig, "world_size", property(lambda self: 2))
    assert "set vllm_mode to 'server'" in refused(lambda: check_engine(args), ValueError)


def test_parameters_that_some_backwards_do_not_touch(monkeypatch: pytest.MonkeyPatch) -> None:
    check_sharding(config(ddp_find_unused_parameters=False))
    monkeypatch.setattr(PPOConfig, "world_size", property(lambda self: 2))
    said = refused(lambda: check_sharding(config(ddp_find_unused_parameters=False)), ValueError)
    assert said.startswith("ddp_find_unused_parameters is False")


def test_the_gpu_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PPOConfig, "device", property(lambda self: torch.device("mps")))
    assert "set use_cpu to true" in refused(lambda: check_devices(config()), ValueError)


@pytest.mark.parametrize(("settings", "told"), [({}, True), ({"llm_int8_threshold": 0.0}, False)])
def test_an_8_bit_base_whose_rows_depend_on_each_other_is_told(
    settings: dict[str, Any], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for form in (lambda kept: kept, lambda kept: kept.to_dict()):
        caplog.clear()
        kept = form(BitsAndBytesConfig(load_in_8bit=True, **settings))
        warn_of_outliers(SimpleNamespace(config=SimpleNamespace(quantization_config=kept)))
        assert ("llm_int8_threshold 6, by which a row's" in caplog.text) == told
    warn_of_outliers(SimpleNamespace(config=SimpleNamespace()))


def test_a_tokenizer_that_ends_every_prompt_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    assert tokenizer("the cat")["input_ids"][-1] == tokenizer.eos_token_id == 1
    with pytest.raises(ValueError, match="set its add_eos_token to False"):
        tokenize_prompts(["the cat"], tokenizer)
    texts = Dataset.from_dict({"text": ["the cat", "a dog"]})
    assert measured_texts(texts, tokenizer, 8).longest == (3, 0), "a text for the pretraining term has an end"


def test_an_empty_prompt_may_be_a_bos_that_is_the_eos_too() -> None:
    """As OPT's, which answers nothing at all."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    assert tokenize_prompts(["", "the"], tokenizer) == [[1], [1, 7]]


def test_a_template_that_ends_answers_with_what_is_no_eos_is_told(caplog: pytest.LogCaptureFixture) -> None:
    chat = [{"role": "user", "content": "the cat"}]
    for mark, prompt, told in (("<start>", chat, True), ("<eos>", chat, False), ("<start>", "the cat", False)):
        caplog.clear()
        warn_of_turns(word_tokenizer(CHAT_TEMPLATE.replace("<eos>", mark)), prompt, [1], None)
        assert ("ends an answer with '<start>', and generation ends at '<eos>'" in caplog.text) == told


def test_a_template_for_messages_in_parts() -> None:
    """As LLaVA's, which fails on texts."""
    parts = "{% for m in messages %}{% for p in m.content %}{{ p['text'] + ' <eos>' }}{% endfor %}cat{% endfor %}"
    assert after_answers(word_tokenizer(parts), None)[-2:] == [1, 9]


def test_a_mistral_tokenizer_without_a_template_to_look_into() -> None:
    tokenizer = type("MistralCommonBackend", (), {"chat_template": None})()
    with pytest.raises(ValueError, match=r"is mistral-common's, .*mistral_format=False"):
        check_chat_template(tokenizer)


def test_a_model_in_memory_without_a_name_needs_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^processing_class is missing, and the model has no name"):
        PPOTrainer(tiny_llama(), nothing, config(output_dir=str(tmp_path)), prompt_dataset())
    with pytest.raises(ValueError, match=r"^reward_processing_classes is missing, and the reward model, a Llama"):
        tokenizer_of(tiny_classifier(), None, False)


@pytest.mark.parametrize("change", [None, "other rows", "one row more", "a transform"])
def test_processes_take_their_parts_of_the_same_rows(change: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = prompt_dataset(), prompt_dataset()
    if change == "other rows":
        theirs = theirs.shuffle(seed=1)
    elif change == "one row more":
        theirs = prompt_dataset(9)
    elif change == "a transform":  # which may draw at random
        mine, theirs = (
            rows.with_transform(lambda batch: batch | {"prompt": [str(random())]}) for rows in (mine, theirs)
        )
    said: list[Any] = []
    monkeypatch.setattr(checks, "PartialState", lambda: SimpleNamespace(num_processes=2))
    monkeypatch.setattr(checks, "gather_object", lambda own: said.append(own[0]) or [own[0], own[0]])
    check_same_rows([("train_dataset", theirs)])
    monkeypatch.setattr(checks, "gather_object", lambda own: [own[0], said[0]])
    if change in (None, "a transform"):
        check_same_rows([("train_dataset", mine)])
        return
    counts = r" \(8 and 9\)" if change == "one row more" else ""
    with pytest.raises(ValueError, match=f"^train_dataset has other rows in one process than in another{counts}: shuf"):
        check_same_rows([("train_dataset", mine)])


def test_messages_that_are_one_text_are_refused() -> None:
    asked = [{"role": "user", "content": "the cat"}]
    for text in (json.dumps(asked), str(asked)):
        with pytest.raises(ValueError, match=r"^The prompt in row 1 of t is .*: messages that are written as one text"):
            check_prompts(Dataset.from_dict({"prompt": ["[a] b", text]}), "t")
