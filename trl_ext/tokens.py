"""Text to ids and back, once: prompts, chat templates, what a reward role reads after a completion, EOS ids, batches.

Lists of ids have one entry per token; masks are bool, True marks a real token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Prompts and completions -------------------------------------------------------------------------------------------


class PromptError(ValueError):
    """A prompt that makes no ids.

    Attributes:
        row: which of the prompts that were given.
        reason: why, with the remedy.
    """

    def __init__(self, prompt: Any, row: int, reason: str) -> None:
        super().__init__(f"Prompt {prompt!r:.80} {reason}")
        self.row, self.reason = row, reason


def tokenize_prompts(
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict[str, Any] | None = None,
    whole: bool = False,
) -> list[list[int]]:
    """Ids of each prompt; a conversation goes through the chat template with the generation prompt added.

    Args:
        whole: these are texts that nothing follows, so that they may end with an EOS.

    Raises:
        ValueError: a conversation and a tokenizer without a chat template, or one that ends texts with its EOS.
        PromptError: a prompt that template or tokenizer refuse, or without a single token.
    """
    if not isinstance(prompts[0], str):
        check_chat_template(tokenizer)
    try:
        ids = _ids_of(prompts, tokenizer, chat_template_kwargs)
    except Exception:
        for row, prompt in enumerate(prompts):
            try:
                _ids_of([prompt], tokenizer, chat_template_kwargs)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise PromptError(prompt, row, f"cannot be written in ids ({reason:.200}): mend or drop it.") from error
        raise
    first, eos = prompts[0], tokenizer.eos_token_id  # which may be the BOS, too
    goes_on = whole or not isinstance(first, str) or first.endswith(str(tokenizer.eos_token))
    if not goes_on and len(ids[0]) > 1 and ids[0][-1] == eos:
        raise ValueError(
            "The tokenizer ends every text with its EOS, so that nothing is left to go on with: set its add_eos_token "
            "to False."
        )
    empty = next((i for i, row in enumerate(ids) if len(row) == 0), None)
    if empty is not None:
        raise PromptError(prompts[empty], empty, "has no tokens: give it some text, or a tokenizer that adds a BOS.")
    return [list(row) for row in ids]


def _ids_of(prompts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, template: dict[str, Any] | None) -> Any:
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    kwargs: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **(template or {})}
    return tokenizer.apply_chat_template(list(prompts), **kwargs)["input_ids"]


def check_chat_template(tokenizer: PreTrainedTokenizerBase, whose: str = "the tokenizer") -> None:
    """Refuse conversations for a tokenizer that cannot write them.

    Raises:
        ValueError: no chat template.
    """
    if type(tokenizer).__name__ == "MistralCommonBackend":
        raise ValueError(
            f"The prompts are conversations, but {whose} is mistral-common's, which has no chat template to look into: "
            "load Transformers' own, AutoTokenizer.from_pretrained(..., mistral_format=False)."
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts are conversations, but {whose} has no chat template: set tokenizer.chat_template, use an "
            "instruct model, or give prompts as plain text."
        )


ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # that chat templates know


def fault_of_template(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, **template: Any) -> str | None:
    """What the chat template would lose of a conversation; None where it writes all of it. Looked at are messages of a
    role of your own, which it may leave out, and those in parts, which it may write as Python does."""
    odd = [m for m in messages if m["role"] not in ROLES or isinstance(m.get("content"), list)]
    written = tokenizer.apply_chat_template(list(messages), tokenize=False, **template) if odd else ""
    for message in odd:
        content = message.get("content")
        if isinstance(content, list) and str(content) in written:
            return "a message in parts, which the chat template writes as Python does: give it as a text"
        texts = [part.get("text", "") for part in content] if isinstance(content, list) else [content or ""]
        if not all(text.strip() in written for text in texts):
            if isinstance(content, list):
                return "a message in parts, which the chat template does not write: give it as a text"
            return f"a message of the role {message['role']!r} that the chat template leaves out: give it another"
    return None


def fault_of_prompt(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, **template: Any) -> str | None:
    """As `fault_of_template`, of what is to be answered; also that it has been, or that the template leaves out what it
    asks."""
    if messages[-1]["role"] == "assistant" and not template.get("continue_final_message"):
        return (
            "an answer at its end already: end it with what is to be answered (PPOTrainer goes on with it where "
            "chat_template_kwargs has add_generation_prompt False and continue_final_message True)"
        )
    if (fault := fault_of_template(messages, tokenizer, **template)) is not None:
        return fault
    asked = messages[-1].get("content")
    if (
        isinstance(asked, str)
        and asked.strip()
        and _is_left_out(messages, tokenizer, {"add_generation_prompt": True, **template})
    ):
        return (
            f"a last message that the chat template leaves out, so that nobody asks {asked!r:.60}: mend the template, "
            "or give messages in parts, where it is written for these"
        )
    return None


def _is_left_out(messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase, template: dict[str, Any]) -> bool:
    """Whether the template writes the same whatever the last message says."""
    asked = str(messages[-1]["content"]).strip()
    written = tokenizer.apply_chat_template(list(messages), tokenize=False, **template)
    if len(asked) > 20 and asked in written:
        return False
    other = [*messages[:-1], {**messages[-1], "content": "0" if asked != "0" else "1"}]
    try:
        return bool(tokenizer.apply_chat_template(other, tokenize=False, **template) == written)
    except Exception:  # it reads the message, and would have another kind
        return False


def sequence_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, completion: Any, **template: Any) -> list[int]:
    """Prompt and completion as TRL's RewardTrainer tokenises them: through the chat template (with the arguments
    `template`), or as one text with an EOS at its end."""
    if isinstance(completion, str):
        text = (prompt or "") + completion
        text = text if text.endswith(tokenizer.eos_token) else text + tokenizer.eos_token
        return list(tokenizer(text)["input_ids"])
    chat = [*(prompt or []), *completion]
    return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **template)["input_ids"])


# What a model can read ---------------------------------------------------------------------------------------------


def context_limit(config: Any) -> int | None:
    """Most tokens that a model can read in a row, by its config; None where it sets no limit.

    Positions go up to `max_position_embeddings`. Rotary positions reach further where they are scaled, and without end
    where no layer looks further back than a window. Where a longer row would rescale them, see `longest_row`.

    Args:
        config: of a Transformers model.
    """
    config = config.get_text_config()
    if (longest := longest_row(config)) is not None:
        return longest
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0 or getattr(config, "alibi", False):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None)
    if rope and window and window <= limit and kinds <= {"sliding_attention", "linear_attention"}:
        return None
    scalings = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    reach = [
        scaling["factor"] * scaling.get("original_max_position_embeddings", limit)
        for scaling in scalings
        if scaling.get("factor")
    ]
    return max([limit, *map(int, reach)])


def longest_row(config: Any) -> int | None:
    """Most tokens of a row, where a longer one would rescale the positions of all rows in its batch; else None.

    Dynamic NTK and LongRoPE choose their frequencies by the longest row of a batch. A row's log-probabilities would
    depend on its neighbours, and a completion that grows past the limit is sampled otherwise than it is scored.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    limits = []
    for kind in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        if kind.get("rope_type") == "longrope":
            limits.append(kind["original_max_position_embeddings"])
        elif "dynamic" in (kind.get("rope_type") or ""):
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def config_of(model: Any, trust_remote_code: bool = False, revision: str | None = None) -> Any | None:
    """The config of a model, loaded or given by its name or folder; None where it cannot be read, which its loading
    will say."""
    if not isinstance(model, str):
        return model.config
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, revision=revision or "main")
    except (OSError, ValueError):
        return None


def tokenizer_beside(config: Any, mine: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a model's weights, with its chat template; None where none does, or where prompts
    are written by that of an adapter, which may have been taught to read them otherwise.

    Args:
        config: of the model.
        mine: who writes prompts.
    """
    if not config.name_or_path or (Path(mine.name_or_path) / "adapter_config.json").is_file():
        return None
    revision = getattr(config, "_commit_hash", None)
    try:
        return AutoTokenizer.from_pretrained(
            config.name_or_path, revision=revision, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of whatever kind: only what is beside training asks for it
        logger.debug("No tokenizer lies beside %s: %s", config.name_or_path, error)
        return None


def vocabulary_size(config: Any) -> int | None:
    """Ids that a model has an embedding for, by its config; None where it does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def check_loaded(info: dict[str, Any], name: Any, kind: str) -> None:
    """Refuse a model with weights that its checkpoint does not hold, which Transformers makes up at random.

    Args:
        info: what `from_pretrained(..., output_loading_info=True, ignore_mismatched_sizes=True)` tells.
        name: of the checkpoint.
        kind: of checkpoint that would do.

    Raises:
        ValueError: names the first.
    """
    for key, saved, wanted in sorted(info["mismatched_keys"], key=str):
        raise ValueError(
            f"{str(name)!r} holds {key!r} of shape {tuple(saved)}, and {tuple(wanted)} is needed: give the checkpoint "
            f"of {kind}, with a config.json that fits."
        )
    for key in sorted(info["missing_keys"]):
        raise ValueError(f"{str(name)!r} holds no {key!r}, which would be random: give the checkpoint of {kind}.")


# Where a completion ends -------------------------------------------------------------------------------------------


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: what the model's generation config or the tokenizer names.

    Args:
        model: a causal language model of Transformers.
        tokenizer: its own.
    """
    ids = as_ids(model.generation_config.eos_token_id)
    return ids if tokenizer.eos_token_id in (None, *ids) else [tokenizer.eos_token_id, *ids]


def as_ids(ids: Any) -> list[Any]:
    """One id, several or none, as GenerationConfig takes them (or as an array or tensor), as a list."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [] if ids is None else list(ids) if isinstance(ids, Iterable) else [ids]


def cut_at_eos(ids: Sequence[int], eos: Sequence[int]) -> list[int]:
    """`ids` up to and with the first of `eos`; all of them where there is none."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return list(ids[: end + 1])


def reward_suffix(
    prompts: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
    eos: Sequence[int],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Ids that a reward role reads after a completion that ended: what the chat template writes after its EOS, often a
    newline. TRL's RewardTrainer trains on conversations as the template writes them, and on texts up to their EOS.

    Args:
        prompts: conversations, or texts, after which nothing is read.
        eos: every id that ends a completion.

    Returns:
        An empty list where nothing follows.
    """
    if isinstance(prompts[0], str) or tokenizer.chat_template is None:
        return []
    after = after_answers(tokenizer, chat_template_kwargs)
    return next((after[i + 1 :] for i, token in enumerate(after) if token in set(eos)), [])


def after_answers(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None) -> list[int]:
    """Ids that the chat template writes after the last answer of a conversation."""
    kwargs: dict[str, Any] = {"tokenize": True, "return_dict": True, **of_whole_conversations(chat_template_kwargs)}

    def written(*answers: str) -> list[int]:
        turns = [("user", "a"), *(("assistant", text) for text in answers)]
        texts = [{"role": role, "content": text} for role, text in turns]
        try:
            return list(tokenizer.apply_chat_template(texts, **kwargs)["input_ids"])
        except Exception:  # a template's own: it is written for messages in parts
            parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
            return list(tokenizer.apply_chat_template(parts, **kwargs)["input_ids"])

    one = written("b")
    for text in ("7", "b 7"):  # what is the same after each; a small vocabulary may know neither
        pairs = zip(reversed(one), reversed(written(text)), strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if same is not None:
            return one[len(one) - same :]
    return one[len(written()) :]


def of_whole_conversations(chat_template_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Without what says how a prompt ends, which an answer follows: a conversation with its answer just ends."""
    of_prompts = ("add_generation_prompt", "continue_final_message")
    return {name: value for name, value in (chat_template_kwargs or {}).items() if name not in of_prompts}


# Batches -----------------------------------------------------------------------------------------------------------


def padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor (rows, longest) int64, `fill` on padding, and its mask."""
    width = max(1, *map(len, rows))
    ids = torch.full((len(rows), width), fill, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = True
    return ids, mask


def side_by_side(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, int]:
    """Prompts, padded on the left, beside their completions, padded on the right: ids and mask (rows, prompt +
    completion), and how many columns are completion."""
    (asked, asked_mask), (written, written_mask) = padded(prompt_ids, 0, left=True), padded(completion_ids, 0)
    return torch.cat([asked, written], dim=1), torch.cat([asked_mask, written_mask], dim=1), written.shape[1]


def padded_by_length(sequences: Sequence[Sequence[int]], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Sequences of ids in right-padded batches, those of like length together.

    Args:
        sequences: of one id and more.
        size: most sequences of a batch.

    Yields:
        Which sequences they are; their ids (rows, columns), 0 on padding; and the mask (rows, columns).
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, *padded([sequences[i] for i in rows], 0)
