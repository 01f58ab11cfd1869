"""Small things that several tests stand on: a word-level tokenizer, tiny Llamas, a few prompts. No downloads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trl_ext import SharedBase
from trl_ext.types import Rollout

# fmt: off
WORDS = [
    "user", "assistant", "the", "a", "cat", "dog", "bird", "sat", "ran", "flew",
    "on", "under", "over", "mat", "tree", "house", "red", "blue", "small", "big",
]
# fmt: on
# Where tests compute. TRL_EXT_TEST_DEVICE=cuda lets the same tests run on a GPU (tests/gpu/run.sh).
DEVICE = torch.device(os.environ.get("TRL_EXT_TEST_DEVICE", "cpu"))
# For trainers in tests: there, and in float32, where PPOConfig would choose bfloat16 on a GPU.
PLACE: dict[str, Any] = {"use_cpu": DEVICE.type == "cpu", "bf16": False}
FLAGS = ["--use_cpu", str(PLACE["use_cpu"]).lower()]  # the same for a recipe's command line
# Writing and reporting nothing by themselves.
QUIET: dict[str, Any] = {**PLACE, "report_to": "none", "save_strategy": "no"}
# How nearly two ways to one float32 number agree. A GPU has another kernel, and so another order of sums, for every
# shape of a product, and its attention builds float32 products from TF32 ones.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5} if DEVICE.type == "cpu" else {"rtol": 1e-4, "atol": 1e-4}


@contextmanager
def models_on_device() -> Iterator[None]:
    """Whatever `from_pretrained` loads inside lies on `DEVICE`, unless the caller says where."""
    plain = PreTrainedModel.from_pretrained.__func__

    def placed(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device_map") is None:
            kwargs["device_map"] = {"": DEVICE}
        return plain(cls, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type != "cpu":
            patch.setattr(PreTrainedModel, "from_pretrained", classmethod(placed))
        yield


PAD, EOS, UNK, START, NEWLINE = "<pad>", "<eos>", "<unk>", "<start>", "\n"

# As ChatML: a turn is "<start>role\ncontent<eos>\n", so a newline follows the answer's EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}<start>{{ message['role'] }}\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def word_tokenizer(chat_template: str | None = None, pad: bool = True) -> PreTrainedTokenizerBase:
    """One token a word of `WORDS`. Ids: pad 0, EOS 1, unknown 2, turn start 3, newline 4, the words from 5 on.

    Args:
        chat_template: e.g. `CHAT_TEMPLATE`.
        pad: with False the tokenizer has no pad token, though the vocabulary has one.
    """
    special = [PAD, EOS, UNK, START, NEWLINE]
    vocabulary = {token: i for i, token in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, EOS, UNK, START)])
    words.add_tokens([AddedToken(NEWLINE, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=EOS, unk_token=UNK, pad_token=PAD if pad else None, padding_side="left"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama over `word_tokenizer`'s vocabulary: 2 layers, hidden size 16, float32, CPU, eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(_config(**changes)).eval()


def tiny_classifier(seed: int = 0, **changes: Any) -> LlamaForSequenceClassification:
    """The same trunk with a score head of one label."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForSequenceClassification(_config(**{"num_labels": 1, **changes})).eval()


def saved_model(folder: Path) -> str:
    """`tiny_llama` and its tokenizer in `folder`, and that folder's name."""
    tiny_llama().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def prompt_dataset(rows: int = 8, chat: bool = False) -> Dataset:
    """Prompts of one to three words, texts or conversations, with a column "animal" for reward functions."""
    animals = ["cat", "dog", "bird"]
    texts = [" ".join(["the", animals[i % 3], "sat"][-1 - i % 3 :]) for i in range(rows)]
    prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
    return Dataset.from_dict({"prompt": prompts, "animal": [animals[i % 3] for i in range(rows)]})


def rollout(lengths: list[int], ended: list[bool], prompt_lengths: list[int] | None = None) -> Rollout:
    """A rollout of text prompts with these token counts; ids differ, padding is 0, ended rows have EOS (1) last."""
    prompt_lengths = prompt_lengths if prompt_lengths is not None else [2] * len(lengths)
    width, columns = max(prompt_lengths), torch.arange(max(1, *lengths))
    prompt_mask = torch.arange(width) >= width - torch.tensor(prompt_lengths).unsqueeze(1)
    completion_mask = columns < torch.tensor(lengths).unsqueeze(1)
    prompt_ids = 100 + torch.arange(prompt_mask.numel()).view_as(prompt_mask)
    completion_ids = 500 + torch.arange(completion_mask.numel()).view_as(completion_mask)
    for row, (length, end) in enumerate(zip(lengths, ended, strict=True)):
        if end:
            completion_ids[row, length - 1] = 1
    return Rollout(
        prompts=[f"prompt {row}" for row in range(len(lengths))],
        completions=[f"completion {row}" for row in range(len(lengths))],
        prompt_ids=prompt_ids.masked_fill(~prompt_mask, 0),
        prompt_mask=prompt_mask,
        completion_ids=completion_ids.masked_fill(~completion_mask, 0),
        completion_mask=completion_mask,
        has_eos=torch.tensor(ended),
    )


def move_policy(base: SharedBase) -> SharedBase:
    """The same roles, whose policy is now unlike the bare base."""
    torch.manual_seed(1)
    for parameter in base.trainable_parameters("policy"):
        torch.nn.init.normal_(parameter, std=0.2)
    return base


def recomputes(model: torch.nn.Module) -> bool:
    """Whether any layer recomputes its activations in backward. The model's own word for it has changed name."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        # Larger than usual: random logits that differ make a wrong token or position show.
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**settings, **changes})
