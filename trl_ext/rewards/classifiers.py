"""Sequence classifiers of Transformers that score: loaded whole, padded by what they know, with their own tokenizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from trl_ext.tokens import check_loaded

OF_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # what Transformers calls embeddings of positions


def load_classifier(name: str, kind: str, **how: Any) -> Any:
    """The classifier of a checkpoint.

    Args:
        kind: of checkpoint that would do, for the message.
        **how: as in `from_pretrained`.

    Raises:
        ValueError: the checkpoint does not hold all of its weights, and a random head would score.
    """
    told = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = AutoModelForSequenceClassification.from_pretrained(name, **how, **told)
    check_loaded(info, name, kind)
    return model


def tokenizer_of(
    function: Any, given: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a reward model: the one that is given, or its own; None of what is no model."""
    if given is not None or not isinstance(function, (str, nn.Module)):
        return given
    name = function if isinstance(function, str) else function.config.name_or_path  # type: ignore[union-attr]
    if not name:
        raise ValueError(
            f"reward_processing_classes is missing, and the reward model, a {type(function).__name__}, has no name to "
            "load one from: give its tokenizer."
        )
    own: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    return own


def settle(model: Any, tokenizer: Any, device: Any) -> None:
    """Have both pad alike, and put the model where it runs, frozen."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.to(device).eval().requires_grad_(False)


def longest_read(model: nn.Module) -> int | None:
    """Most tokens of a row, where positions are learned and there is an embedding for so many; None: any. OPT's and
    RoBERTa's families begin to count after some of them."""
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rsplit(".", 1)[-1] in OF_POSITIONS:
            unused = getattr(table, "offset", 0) or (0 if table.padding_idx is None else table.padding_idx + 1)
            return table.num_embeddings - int(unused)
    return None
