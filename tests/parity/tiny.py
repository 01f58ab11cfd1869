"""Tiny random models on disk, and the plain way to compute what a role should say: one model, one adapter, one head.

Expected values never come from `trl_ext`: all logits, a softmax, a gather; attention masks and position ids.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.helpers import DEVICE
from trl_ext import SharedBase

VOCABULARY = 64
PAD, EOS, BOS = 0, 1, 2
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "mistral", "gemma", "gemma2")
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def new_lora(**changes: Any) -> LoraConfig:
    """LoRA for a new policy adapter."""
    return LoraConfig(task_type="CAUSAL_LM", **{**LORA, **changes})


def config_of(family: str, tied: bool = False, vocabulary: int = VOCABULARY, hidden: int = 32) -> Any:
    """A two-layer configuration; the sliding windows are shorter than the sequences of `padded_batch`."""
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS, "vocab_size": vocabulary}
    if family == "gpt2":
        return GPT2Config(n_embd=hidden, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tied, **ids)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        **ids,
    }
    if family == "gpt_neox":
        return GPTNeoXConfig(**shape)
    shape["num_key_value_heads"] = 2
    if family == "gemma":
        return GemmaConfig(head_dim=8, **shape)
    if family == "gemma2":
        capped = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
        return Gemma2Config(head_dim=8, sliding_window=4, attn_implementation="eager", **capped, **shape)
    if family == "qwen3":
        return Qwen3Config(head_dim=8, **shape)
    if family == "mistral":
        return MistralConfig(sliding_window=4, **shape)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[family](**shape)


def make_tokenizer(vocabulary: int = VOCABULARY, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """One word, one id: "w3" ... ; `pad` may be "<eos>"."""
    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token="<eos>", bos_token="<bos>")


def save_base(folder: Path, config: Any, seed: int = 0, pad: str = "<pad>") -> Path:
    """A random model and its tokenizer."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(config.vocab_size, pad).save_pretrained(folder)
    return folder


@torch.no_grad()
def randomise(model: nn.Module, seed: int, only: str = "", scale: float = 0.1) -> None:
    """Random numbers into every LoRA matrix and score head of `model` whose name holds `only`, so that each matters.

    Give ".value." and the like, with the dots: a layer may be called "query_key_value".
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ("lora_" in name or "score" in name or "heads." in name) and only in name:
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def save_policy_adapter(folder: Path, base: Path, seed: int) -> Path:
    """A random LoRA adapter as PEFT saves one of a causal language model."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), new_lora())
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


def save_reward_adapter(folder: Path, base: Path, seed: int, num_labels: int = 1) -> Path:
    """A random LoRA adapter with a score head as PEFT saves one of a sequence classifier."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels)
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", **LORA))
    randomise(model, seed)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Padded:
    """A batch as the roles get it; the last `completion` columns are the completion.

    Attributes:
        ids, mask: (rows, columns).
        completion: number of completion columns.
    """

    ids: Tensor
    mask: Tensor
    completion: int

    def rows(self, index: list[int]) -> Padded:
        """These rows, in this order."""
        return Padded(self.ids[index], self.mask[index], self.completion)

    @property
    def args(self) -> tuple[Tensor, Tensor, int]:
        """Positional arguments of `SharedBase.logprobs` and `values`."""
        return self.ids, self.mask, self.completion

    @property
    def real(self) -> Tensor:
        """True, (rows, completion), on completion tokens."""
        return self.mask[:, self.ids.shape[1] - self.completion :].bool()


PROMPTS, COMPLETIONS = (5, 2, 7, 1, 4), (6, 7, 1, 4, 3)
LAYOUTS = ("rollout", "gap", "left", "right")


def padded_batch(layout: str = "rollout", extra: int = 0, vocabulary: int = VOCABULARY, seed: int = 0) -> Padded:
    """The same five rows, PROMPTS and COMPLETIONS tokens long, in one of LAYOUTS.

    "rollout": prompts padded on the left, completions on the right. "gap": both on the right, so that padding lies
    between them. "left", "right": each row as a whole; the columns called completion then begin inside the prompts.

    Args:
        extra: so many columns of padding more, wherever there is any.
    """
    generator = torch.Generator().manual_seed(seed)
    width, completion = max(PROMPTS) + extra, max(COMPLETIONS) + extra
    columns = max(map(sum, zip(PROMPTS, COMPLETIONS, strict=True))) + extra
    rows = []
    for prompt, answer in zip(PROMPTS, COMPLETIONS, strict=True):
        tokens = torch.randint(3, vocabulary, (prompt + answer,), generator=generator).tolist()
        gap, after, rest = [-1] * (width - prompt), [-1] * (completion - answer), [-1] * (columns - len(tokens))
        rows.append(
            {
                "rollout": gap + tokens + after,
                "gap": tokens[:prompt] + gap + tokens[prompt:] + after,
                "left": rest + tokens,
                "right": tokens + rest,
            }[layout]
        )
    ids = torch.tensor(rows, device=DEVICE)
    mask = (ids >= 0).long()
    return Padded(ids.clamp(min=PAD), mask, completion if layout in ("rollout", "gap") else columns - 1)


def answers(batch: Padded, per_token: Tensor) -> Tensor:
    """What `per_token` (rows, completion) says about the five rows' COMPLETIONS, one after the other, (tokens,)."""
    return torch.cat([row[real][-n:] for row, real, n in zip(per_token, batch.real, COMPLETIONS, strict=True)])


@dataclass(frozen=True)
class Home:
    """A base on disk, adapters trained elsewhere, the roles in memory and what they saved."""

    base_folder: Path
    reward_folder: Path
    reference_folder: Path
    saved: Path
    base: SharedBase

    def again(self, **changes: Any) -> SharedBase:
        """The same roles in memory once more, from the same files, free to be changed."""
        roles: dict[str, Any] = {
            "policy": self.saved / "policy",
            "value": self.saved / "value",
            "reward": self.reward_folder,
            "reference": self.reference_folder,
        }
        return SharedBase.from_pretrained(str(self.base_folder), **{**roles, **changes})


def build(folder: Path, config: Any) -> Home:
    """Every role over a random model, every adapter and head random; saved, so that each can be loaded alone."""
    base_folder = save_base(folder / "base", config)
    reward = save_reward_adapter(folder / "reward", base_folder, seed=1)
    reference = save_policy_adapter(folder / "reference", base_folder, seed=2)
    base = SharedBase.from_pretrained(str(base_folder), policy=new_lora(), reward=reward, reference=reference)
    randomise(base, seed=3, only=".policy.")
    randomise(base, seed=4, only=".value.")
    base.save_pretrained(folder / "saved")
    return Home(base_folder, reward, reference, folder / "saved", base.eval())


# The plain way -------------------------------------------------------------------------------------------------------


def load_policy(folder: Path, trainable: bool = False) -> PeftModel:
    """A saved policy (or reference) adapter alone on its own copy of the base."""
    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=trainable)


def load_classifier(folder: Path, base: Path, trainable: bool = False) -> PeftModel:
    """A saved reward or value adapter alone on its own copy of the base."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return PeftModel.from_pretrained(classifier, folder, is_trainable=trainable)


def positions(mask: Tensor) -> Tensor:
    """Position ids (rows, columns): real tokens count from 0 wherever they lie."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def plain_logits(model: nn.Module, batch: Padded) -> Tensor:
    """All logits, (rows, columns, vocabulary)."""
    return model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=positions(batch.mask)).logits


def plain_logprobs(model: nn.Module, batch: Padded, temperature: float = 1.0) -> Tensor:
    """Log-probability of each completion token, (rows, completion), 0 on padding. For prompts padded on the left."""
    logits = plain_logits(model, batch)[:, :-1] / temperature
    all_logprobs = logits.log_softmax(dim=-1).gather(2, batch.ids[:, 1:].unsqueeze(2)).squeeze(2)
    return all_logprobs[:, -batch.completion :] * batch.real


def plain_values(model: nn.Module, batch: Padded) -> Tensor:
    """What a sequence classifier's score head reads before each completion token, (rows, completion), 0 on padding."""
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    trunk = classifier.base_model
    hidden = trunk(batch.ids, attention_mask=batch.mask, position_ids=positions(batch.mask)).last_hidden_state
    values = classifier.score(hidden).squeeze(-1)[:, :-1]
    return values[:, -batch.completion :] * batch.real


def plain_scores(model: nn.Module, batch: Padded) -> Tensor:
    """What a sequence classifier itself says of each row, (rows,)."""
    return plain_logits(model, batch).squeeze(-1)


def plain_head_values(model: PeftModel, head: Tensor, batch: Padded) -> Tensor:
    """What a score `head` (1, hidden) on a policy's trunk reads before each completion token, 0 on padding."""
    trunk = model.get_base_model().base_model
    hidden = trunk(batch.ids, attention_mask=batch.mask, position_ids=positions(batch.mask)).last_hidden_state
    return (hidden @ head.T).squeeze(-1)[:, :-1][:, -batch.completion :] * batch.real


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: copy.deepcopy(tensor.detach()) for name, tensor in named}
