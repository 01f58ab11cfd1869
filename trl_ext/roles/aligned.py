"""A padded batch in the layout that a causal model wants, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trl_ext.core import last_true, left_align


@dataclass(frozen=True)
class AlignedBatch:
    """Rows with all their padding on the right, so that neither attention mask nor position ids are needed. Padding
    holds each row's first token: at the zeros that embed a padding token, some models have no gradient (0 times inf).

    Attributes:
        ids: (batch, longest) int64, real tokens first.
        last: (batch,) column of each row's last real token.
        completion: (batch, num_completion_tokens) bool, the completion tokens that can be predicted: real, and not the
            first of their row.
        before: (predicted tokens,) column in `ids` of the state that predicts each of them; `row` its row.
        targets: (predicted tokens,) the predicted ids, row after row.
    """

    ids: Tensor
    last: Tensor
    completion: Tensor
    row: Tensor
    before: Tensor
    targets: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, num_completion_tokens: int) -> AlignedBatch:
        """Align left- or right-padded `input_ids` (batch, columns), the last `num_completion_tokens` being completion.

        Raises:
            ValueError: no row, a row without a real token, or shapes that do not fit.
        """
        mask = attention_mask.bool()
        if input_ids.dim() != 2 or not len(input_ids):
            raise ValueError(
                f"input_ids is of shape {tuple(input_ids.shape)}: give at least one row, (batch, columns)."
            )
        if input_ids.shape != mask.shape:
            raise ValueError(
                f"input_ids {tuple(input_ids.shape)} and attention_mask {tuple(mask.shape)} differ in shape."
            )
        if not 0 <= num_completion_tokens <= input_ids.shape[1]:
            raise ValueError(
                f"num_completion_tokens is {num_completion_tokens}, but the rows have {input_ids.shape[1]} columns."
            )
        if not bool(mask.any(dim=1).all()):
            empty = int((~mask.any(dim=1)).nonzero()[0])
            raise ValueError(
                f"Row {empty} of attention_mask has no real token: drop the row, there is nothing to score."
            )
        order, aligned = left_align(mask)
        tokens = input_ids.gather(1, order)
        position = mask.long().cumsum(dim=1) - 1
        start = input_ids.shape[1] - num_completion_tokens
        completion = mask[:, start:] & (position[:, start:] > 0)
        row, column = completion.nonzero(as_tuple=True)
        return cls(
            ids=torch.where(aligned, tokens, tokens[:, :1]),
            last=mask.sum(dim=1) - 1,
            completion=completion,
            row=row,
            before=position[row, column + start] - 1,
            targets=input_ids[row, column + start],
        )

    def extended(self, suffix: Sequence[int], where: Tensor) -> AlignedBatch:
        """The same rows with `suffix` ids appended to those where `where` (batch,) is True; for scoring only."""
        if not suffix or not bool(where.any()):
            return self
        batch = self.ids.shape[0]
        ids = torch.cat([self.ids, self.ids.new_zeros(batch, len(suffix))], dim=1)
        columns = self.last.unsqueeze(1) + 1 + torch.arange(len(suffix), device=ids.device)
        suffixes = torch.tensor(suffix, device=ids.device).expand(batch, -1)
        ids = ids.scatter(1, columns, torch.where(where.unsqueeze(1), suffixes, torch.zeros_like(suffixes)))
        last = self.last + where.long() * len(suffix)
        return AlignedBatch(ids[:, : int(last.max()) + 1], last, self.completion, self.row, self.before, self.targets)

    def predicting(self, hidden: Tensor) -> Tensor:
        """States that predict the completion tokens, (predicted tokens, size), from `hidden` (batch, longest, size)."""
        return hidden[self.row.to(hidden.device), self.before.to(hidden.device)]

    def final(self, hidden: Tensor, pad_token_id: int | None = None) -> Tensor:
        """State of each row's last real token, (batch, size).

        With `pad_token_id`, of the last real token that is another one, as Transformers' sequence classifiers read it:
        where EOS serves as padding, that is the token before the EOS. A row of nothing else is read at its last token.
        """
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        readable = columns <= self.last.unsqueeze(1)
        if pad_token_id is not None:
            readable &= self.ids != pad_token_id
        at = torch.where(readable.any(dim=1), last_true(readable), self.last).to(hidden.device)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), at]

    def padded(self, flat: Tensor) -> Tensor:
        """One number a predicted token (predicted tokens,) back to (batch, num_completion_tokens), 0 elsewhere."""
        mask = self.completion.to(flat.device)
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)
