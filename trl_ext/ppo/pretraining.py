"""Texts for the pretraining term of the policy's loss."""

from __future__ import annotations

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl_ext.ppo.batches import permutation


class PretrainMix:
    """Batches of texts that depend on their number alone, so that a resumed run needs no position to go on.

    Args:
        dataset: with a `text` column, as `checks.check_texts` accepts it.
        tokenizer: of the base.
        max_length: most tokens of a text.
        seed: of the order.
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> None:
        self.dataset, self.tokenizer, self.max_length, self.seed = dataset, tokenizer, max_length, seed

    def __call__(self, rows: int, number: int) -> tuple[Tensor, Tensor]:
        """The `number`-th batch of `rows` texts: ids (rows, longest), right-padded, and their mask."""
        size, wanted = len(self.dataset), range(number * rows, (number + 1) * rows)
        orders = {epoch: permutation(size, self.seed, epoch) for epoch in {i // size for i in wanted}}
        texts = [self.dataset[int(orders[i // size][i % size])]["text"] for i in wanted]
        encoded = self.tokenizer(
            texts,
            max_length=self.max_length,
            truncation=True,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return encoded["input_ids"], encoded["attention_mask"].bool()
