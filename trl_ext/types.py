"""The records that flow through one PPO update, with every shape documented once.

Axes: `batch` completions; `prompt` columns of left-padded prompt ids; `tokens` columns of right-padded completion ids.
Masks are bool, True marks a real token. Log-probabilities, entropies and KL are in nats. Tensors live on the CPU unless
said otherwise: a rollout is ids and a few numbers per token, small beside any model.

One word has one meaning: a *score* is what a reward function or reward model gives a whole completion; a *reward* is
per token, KL included; *advantage*, *return* and *value* are as in PPO; a *role* is policy, reference, value or reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from trl_ext._moved import moved

_Record = TypeVar("_Record", bound="_TensorRecord")


@dataclass(frozen=True)
class _TensorRecord:
    """A frozen dataclass whose tensors all have the batch as first axis, and whose lists have one entry per row."""

    def rows(self: _Record, index: Tensor) -> _Record:
        """The rows with the numbers `index` (rows,), int64, in that order."""
        if index.dtype != torch.int64:
            raise TypeError(f"index must hold row numbers (int64), not {index.dtype}.")
        picked: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                picked[f.name] = value[index]
            elif isinstance(value, _TensorRecord):
                picked[f.name] = value.rows(index)
            elif isinstance(value, list):
                picked[f.name] = [value[i] for i in index.tolist()]
        return replace(self, **picked)

    def to(self: _Record, device: torch.device | str) -> _Record:
        """The same record with its tensors on `device`."""
        placed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, (Tensor, _TensorRecord)):
                placed[f.name] = value.to(device)
        return replace(self, **placed)


@dataclass(frozen=True)
class Rollout(_TensorRecord):
    """What the policy wrote.

    Attributes:
        prompts: the prompts as the dataset gave them (text or messages), one per row.
        completions: in the same format, special tokens removed, one per row.
        prompt_ids: (batch, prompt) int64, left-padded.
        prompt_mask: (batch, prompt).
        completion_ids: (batch, tokens) int64, right-padded; the EOS, where there is one, is the last real token.
        completion_mask: (batch, tokens).
        has_eos: (batch,) True where the completion ended by itself instead of being cut at the length limit.
        sampling_logprobs: (batch, tokens) under which the generator sampled, by its own word; None where it says none.
    """

    prompts: list[Any]
    completions: list[Any]
    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    has_eos: Tensor
    sampling_logprobs: Tensor | None = None

    @property
    def input_ids(self) -> Tensor:
        """Prompt and completion side by side, (batch, prompt + tokens)."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """Mask of `input_ids`, (batch, prompt + tokens)."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @property
    def prompt_tokens(self) -> list[list[int]]:
        """Real prompt ids, one list per row."""
        return [ids[mask].tolist() for ids, mask in zip(self.prompt_ids, self.prompt_mask, strict=True)]

    @property
    def completion_tokens(self) -> list[list[int]]:
        """Real completion ids, one list per row: what reward functions get as `completion_ids`."""
        return [ids[mask].tolist() for ids, mask in zip(self.completion_ids, self.completion_mask, strict=True)]

    @property
    def lengths(self) -> Tensor:
        """Real completion tokens a row, (batch,) int64."""
        return self.completion_mask.sum(dim=1)


@dataclass(frozen=True)
class Scores(_TensorRecord):
    """What the reward functions made of a rollout.

    Attributes:
        total: (batch,) the functions' scores, normalised, weighted, summed and clipped as PPOConfig says; NaN where no
            function gave one.
        by_function: (batch, functions), NaN where a function returned None; where reward roles score, (batch, reward
            roles).
        spread: (batch,) standard deviation of several reward roles' normalised scores of each completion; None where
            one scores, or reward functions.
    """

    total: Tensor
    by_function: Tensor
    spread: Tensor | None = None


@dataclass(frozen=True)
class ScorePass(_TensorRecord):
    """What the roles say about a rollout, all of it without gradient.

    Attributes:
        logprobs: (batch, tokens) of the completion under the policy before its first step on the rollout.
        entropy: (batch, tokens) of the policy at each token.
        ref_logprobs: (batch, tokens) under the reference.
        values: (batch, tokens); values[:, t] is predicted before token t is chosen. 0 where no value role is trained.
        reward_scores: (batch, reward roles); one column of NaN where reward functions score instead.
    """

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    values: Tensor
    reward_scores: Tensor


@dataclass(frozen=True)
class ScoredRollout(_TensorRecord):
    """A rollout of all processes with its scores, and what the roles say about it."""

    rollout: Rollout
    scores: Scores
    score_pass: ScorePass


@dataclass(frozen=True)
class ShapedRollout(ScoredRollout):
    """A scored rollout with one reward per token.

    Attributes:
        kl: (batch, tokens) per-token KL to the reference, by the configured estimator.
        rewards: (batch, tokens), KL and score together.
        loss_mask: (batch, tokens), the tokens that are trained on: the real ones of rows that got a score.
    """

    kl: Tensor
    rewards: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class Experience(ShapedRollout):
    """A rollout ready to train on: the unit that an interrupted run must restore.

    Attributes:
        advantages: (batch, tokens).
        returns: (batch, tokens), the value loss's targets.
    """

    advantages: Tensor
    returns: Tensor


def as_text(item: Any) -> str:
    """A prompt or completion as text: itself, or the content of its last message; of several parts their texts, and of
    none, as where a tool is called, an empty one."""
    if isinstance(item, str):
        return item
    content = item[-1].get("content") if item else None
    parts = [str(part.get("text", "")) for part in content] if isinstance(content, list) else [content or ""]
    return "".join(map(str, parts))


def fault_of_messages(value: Any) -> str | None:
    """Why `value` is no list of messages that a model which reads texts can read; None where it is one.

    A message has a role and a content: a text, a list of parts with a text each, or nothing beside `tool_calls`.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return "no list of messages"
    for number, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            return f"message {number} has no role"
        if content is None and message.get("tool_calls"):
            continue
        parts = content if isinstance(content, list) else [{"text": content}]
        parts = [part.get("text") if isinstance(part, dict) else None for part in parts]
        if not parts or not all(isinstance(part, str) for part in parts):
            return f"the content of message {number} is {content!r:.60}, which is no text"
    return None


def concatenate(records: Sequence[_Record], pad_token_id: int) -> _Record:
    """One record out of several, row after row; narrower ones are padded on the side where their padding lies.

    Args:
        records: at least one, all of one class.
        pad_token_id: fills the new columns of id tensors; every other tensor is filled with 0 (False).
    """
    first = records[0]
    joined: dict[str, Any] = {}
    for f in fields(first):
        parts = [getattr(record, f.name) for record in records]
        if any(part is None for part in parts):  # what is not known of all is not known of the whole
            joined[f.name] = None
            continue
        if isinstance(parts[0], _TensorRecord):
            joined[f.name] = concatenate(parts, pad_token_id)
        elif isinstance(parts[0], list):
            joined[f.name] = [item for part in parts for item in part]
        else:
            fill = pad_token_id if f.name.endswith("_ids") else 0
            joined[f.name] = _pad_and_cat(parts, fill, left=f.name.startswith("prompt_"))
    return replace(first, **joined)


def _pad_and_cat(parts: list[Tensor], fill: int, left: bool) -> Tensor:
    if parts[0].dim() == 1:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    grown = []
    for part in parts:
        missing = part.new_full((part.shape[0], width - part.shape[1]), fill)
        grown.append(torch.cat([missing, part] if left else [part, missing], dim=1))
    return torch.cat(grown)


__getattr__ = moved(__name__, {"Judged": "trl_ext.types.ScoredRollout", "Shaped": "trl_ext.types.ShapedRollout"})
