"""Sequence classifiers of Transformers that score: loaded whole, padded by what they know, with their own tokenizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from trl_ext.tokens import check_loaded, context_limit

OF_POSITIONS = ("position_embeddings", "embed_positions", "wpe")  # what Transformers calls embeddings of positions
OF_DISTANCES = ("relative_attention", "relative_attention_num_buckets", "alibi")  # what reads any distance


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


def longest_read(model: Any) -> int | None:
    """Most tokens of a row, where each place has an embedding or an angle of its own; None: any. OPT's and RoBERTa's
    families begin to count after some of them."""
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rsplit(".", 1)[-1] in OF_POSITIONS:
            unused = getattr(table, "offset", 0) or (0 if table.padding_idx is None else table.padding_idx + 1)
            return table.num_embeddings - int(unused)
    config = model.config.get_text_config()
    turned = getattr(config, "rope_parameters", None) or any(getattr(config, name, None) for name in OF_DISTANCES)
    return None if turned or getattr(config, "position_biased_input", True) is False else context_limit(config)


def padding_side(model: Any) -> str:
    """Where a classifier's rows are padded: XLNet's head reads the last place; that of a causal model finds the last
    token, but its places count from the left."""
    return "left" if model.config.model_type == "xlnet" else "right"
