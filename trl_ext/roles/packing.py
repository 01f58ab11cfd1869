"""Rows of unlike length packed one after the other into fewer, fuller rows, so that padding is not computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig

from trl_ext.roles.lm_head import trunk_of
from trl_ext.roles.switching import evaluating, generating_by

logger = logging.getLogger(__name__)
MIN_GAIN = 0.1  # share of the columns that must be saved, or rows stay as they are


@dataclass(frozen=True)
class Packing:
    """Where the rows of a batch lie in a packed one.

    Attributes:
        ids: (bins, longest) int64.
        position_ids: (bins, longest) int64. They begin at 0 with each row: by that Transformers' attention tells the
            rows of a bin apart.
        source: (rows, longest) int64, position in the flattened `ids` of each token, anywhere for padding; None where
            rows are as they were.
    """

    ids: Tensor
    position_ids: Tensor
    source: Tensor | None

    @property
    def is_packed(self) -> bool:
        """Whether a bin may hold several rows."""
        return self.source is not None

    @classmethod
    def none(cls, ids: Tensor) -> Packing:
        """Every row in a bin of its own."""
        return cls(ids, torch.arange(ids.shape[1], device=ids.device).expand_as(ids), None)

    @classmethod
    def of(cls, ids: Tensor, lengths: Tensor) -> Packing:
        """Pack left-aligned `ids` (rows, longest), rows of `lengths` (rows,) tokens, unless little would be gained.

        Longest first, each row goes into the first bin that has room for it (first-fit decreasing).
        """
        sizes, width = lengths.tolist(), ids.shape[1]
        room: list[int] = []
        bins, starts = [0] * len(sizes), [0] * len(sizes)
        for row in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            chosen = next((b for b, left in enumerate(room) if left >= sizes[row]), len(room))
            if chosen == len(room):
                room.append(width)
            bins[row], starts[row] = chosen, width - room[chosen]
            room[chosen] -= sizes[row]
        if len(room) > (1 - MIN_GAIN) * len(sizes):
            return cls.none(ids)
        column = torch.arange(width, device=ids.device)
        real = column < lengths.to(ids.device).unsqueeze(1)
        first = torch.tensor([b * width + s for b, s in zip(bins, starts, strict=True)], device=ids.device)
        source = torch.where(real, first.unsqueeze(1) + column, 0)
        # What no row fills holds a real token, as in `AlignedBatch`.
        packed, positions = ids[0, :1].repeat(len(room) * width), ids.new_zeros(len(room) * width)
        packed[source[real]] = ids[real]
        positions[source[real]] = column.expand_as(real)[real]
        return cls(packed.view(len(room), width), positions.view(len(room), width), source)

    def unpacked(self, hidden: Tensor) -> Tensor:
        """States (bins, longest or more, size) as states of the rows, (rows, longest, size)."""
        hidden = hidden[:, : self.ids.shape[1]]
        if self.source is None:
            return hidden
        flat = hidden.flatten(0, 1).index_select(0, self.source.flatten().to(hidden.device))
        return flat.view(*self.source.shape, -1)


def stacked(packings: Sequence[Packing]) -> tuple[Tensor, Tensor | None]:
    """Ids and position ids, (bins, widest) each, of all bins, one below the other. Where no bin holds several rows,
    no position ids are needed: None."""
    width = max(packing.ids.shape[1] for packing in packings)
    ids, positions = (
        torch.cat([torch.cat([part, part[:, :1].expand(-1, width - part.shape[1])], dim=1) for part in parts])
        for parts in zip(*((packing.ids, packing.position_ids) for packing in packings), strict=True)
    )
    return ids, positions if any(packing.is_packed for packing in packings) else None


@torch.no_grad()
def check_causal(causal_lm: Any) -> None:
    """Refuse a model whose states depend on later tokens: it writes without them, and would be scored with them.

    A change of the last of four tokens is looked for in the states before it.

    Raises:
        ValueError: it reads ahead.
    """
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.arange(1, 5, device=device).repeat(2, 1) % causal_lm.config.get_text_config().vocab_size
    ids[1, -1] = ids[1, 0]
    with evaluating(causal_lm):
        states = trunk_of(causal_lm)(input_ids=ids, use_cache=False).last_hidden_state.float()
    changed = (states[1] - states[0]).norm(dim=-1)
    if changed[:-1].max() > (1e-3 if causal_lm.dtype == torch.float32 else 0.05) * changed[-1]:
        raise ValueError(
            f"{type(causal_lm).__name__} reads ahead: a later token changes the states of those before it, which no "
            "policy could write by; make it causal in its config (BERT and its kin have is_decoder for that)."
        )


@torch.no_grad()
def can_pack(causal_lm: Any) -> bool:
    """Whether the model keeps the rows of a bin apart, tried on two bins of two rows each. Some do not: recurrent ones,
    and some implementations of attention where a batch has several bins.

    The change by packing is compared with the change by reading each bin as one row.
    """
    if not _reads_tokens(causal_lm):
        return False
    device = causal_lm.get_input_embeddings().weight.device
    lengths = torch.tensor([5, 2, 4, 3])
    ids = torch.arange(20, device=device).view(4, 5) % (causal_lm.config.get_text_config().vocab_size - 1) + 1
    packing = Packing.of(torch.nn.functional.pad(ids, (0, 2)), lengths)
    assert packing.is_packed
    real = torch.arange(5) < lengths.unsqueeze(1)

    def states(ids: Tensor, **positions: Tensor) -> Tensor:
        return trunk_of(causal_lm)(input_ids=ids, use_cache=False, **positions).last_hidden_state

    try:
        with evaluating(causal_lm):
            apart, mixed = states(ids), packing.unpacked(states(packing.ids))
            packed = packing.unpacked(states(packing.ids, position_ids=packing.position_ids))
    except Exception as error:  # whatever a model raises that takes no positions
        logger.warning("%s cannot be packed, so padding is computed too: %s", type(causal_lm).__name__, error)
        return False
    alone = apart.cpu()[real].float()
    changed, spoilt = (float((x[:, :5].cpu()[real].float() - alone).norm()) for x in (packed, mixed))
    return changed <= (1e-3 if apart.dtype == torch.float32 else 0.1) * spoilt


@torch.no_grad()
def can_pad_left(causal_lm: Any) -> bool:
    """Whether `generate` says the same of a prompt with padding on its left as without, for three tokens. Models that
    count positions from the first column, padding or not, do not, some from the second token on.

    The change by padding is compared with the change where padding is read.
    """
    if not _reads_tokens(causal_lm):
        return False
    device = causal_lm.get_input_embeddings().weight.device
    ids = torch.arange(1, 6, device=device).unsqueeze(0) % causal_lm.config.get_text_config().vocab_size

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return _three_more(causal_lm, ids, mask, pad_token_id=0)[1]

    mask = torch.tensor([[0, 0, 1, 1, 1]], device=device)
    try:
        with evaluating(causal_lm):
            alone, padded = logits(ids[:, 2:], mask[:, 2:]), logits(ids, mask)
            spoilt = logits(ids, torch.ones_like(mask))
    except Exception as error:  # whatever a model raises that cannot generate so
        name = type(causal_lm).__name__
        logger.warning("%s is only given prompts of one length at a time, for padding was no use: %s", name, error)
        return False
    tolerance = 1e-3 if causal_lm.dtype == torch.float32 else 0.1
    return bool((padded - alone).norm() <= tolerance * (spoilt - alone).norm())


@torch.no_grad()
def fault_of_generate(causal_lm: Any) -> str | None:
    """What is wrong with `generate`, tried for three tokens after each of two prompts; None where it samples as the
    model's own forward reads. Transformers numbers the positions of some otherwise there (RoBERTa), adds a token to the
    prompt (XLM, XLNet), or mixes the rows of a batch (RWKV).

    The change is compared with the difference between the two rows.
    """
    text, device = causal_lm.config.get_text_config(), causal_lm.get_input_embeddings().weight.device
    # Padding is left out: it may embed to zeros, among which a sparse attention cannot choose.
    pad = getattr(text, "pad_token_id", None) or 0
    ids = torch.tensor([i for i in range(1, 8) if i != pad][:6], device=device).view(2, 3) % text.vocab_size
    try:
        with evaluating(causal_lm):
            whole, said = _three_more(causal_lm, ids, torch.ones_like(ids), pad_token_id=pad, suppress_tokens=[pad])
            read = causal_lm(input_ids=whole, use_cache=False).logits[:, 2:-1]
    except Exception as error:  # whatever a model raises that cannot generate so
        return f"Transformers' generate fails on two prompts of it ({' '.join(str(error).split()):.200})"
    sampled, own = (x.float().log_softmax(-1) for x in (said, read))
    tolerance = 1e-2 if causal_lm.dtype == torch.float32 else 0.5
    if (sampled - own).norm() <= tolerance * (own[0] - own[1]).norm():
        return None
    return "Transformers' generate samples with other probabilities than the model's own forward gives"


def _three_more(causal_lm: Any, ids: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """`ids` (batch, columns) with the three tokens that `generate` goes on with, and the logits of these, (batch, 3,
    vocabulary), float32."""
    # The least is the most: what the model's own settings call an EOS ends nothing here.
    length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    config = GenerationConfig(**length, output_logits=True, return_dict_in_generate=True, **settings)
    with generating_by(causal_lm, config):
        said = causal_lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return said.sequences, torch.stack(said.logits, dim=1).float()


def _reads_tokens(causal_lm: Any) -> bool:
    """Whether all that each layer keeps of a row are its tokens' keys and values, or a recurrent state. An attention
    that chooses among blocks of tokens, or compresses them, reads short rows as any other does: a short trial does not
    tell what it makes of padding and of packed rows."""
    try:
        kinds = {type(layer) for layer in DynamicCache(config=causal_lm.config).layers}
    except Exception:  # a configuration that no cache can be made for
        return False
    return all(kind.__module__ == DynamicCache.__module__ and "Indexed" not in kind.__name__ for kind in kinds)
