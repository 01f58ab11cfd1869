"""What a linear probe is fitted to: the frozen base's last hidden state at the end of every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from trl_ext.tokens import padded_by_length


@dataclass(frozen=True)
class ProbeData:
    """Attributes:
    features: (answers, hidden) float64, of every different answer once.
    pairs: (pairs, 2) int64, the better answer and the worse one.
    margins: (pairs,) float64; 0 where there are none.
    """

    features: Tensor
    pairs: Tensor
    margins: Tensor

    @property
    def differences(self) -> Tensor:
        """(pairs, hidden): the better answer's features minus the worse one's."""
        return self.features[self.pairs[:, 0]] - self.features[self.pairs[:, 1]]


def score_head(model: nn.Module) -> nn.Module:
    """The module `score` of a sequence classifier, wrapped by PEFT or not.

    Raises:
        ValueError: it has none; encoders call theirs otherwise, and read the first token.
    """
    heads = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "score"]
    if len(heads) != 1:
        raise ValueError(
            f"objective 'probe' fits a linear head called 'score', and a {type(model).__name__} has none: choose "
            "another objective, or a causal model's classifier."
        )
    return heads[0]


@torch.no_grad()
def probe_data(model: Any, dataset: Dataset, batch_size: int = 32) -> ProbeData:
    """Read every different answer once.

    Args:
        model: a sequence classifier with `score` on its last hidden states.
        dataset: rows of `chosen_ids`, `rejected_ids` and perhaps `margin`, as TRL's RewardTrainer keeps them. An answer
            ends at its last token that is no padding by its id, where Transformers' classifiers read the score.
        batch_size: answers of one forward; those of like length go together.
    """
    numbers: dict[tuple[int, ...], int] = {}
    pairs = [
        [numbers.setdefault(tuple(row[side]), len(numbers)) for side in ("chosen_ids", "rejected_ids")]
        for row in dataset
    ]
    padding = model.config.get_text_config().pad_token_id
    inputs: list[Tensor] = []
    features: dict[int, Tensor] = {}
    # The head's own input is what it can read, whatever the architecture does before it.
    hook = score_head(model).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        sequences = list(numbers)
        for rows, ids, mask in padded_by_length(sequences, batch_size):
            model(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device), use_cache=False)
            hidden = inputs.pop()
            for i, number in enumerate(rows):
                ids_of = sequences[number]
                end = max((k for k, token in enumerate(ids_of) if token != padding), default=len(ids_of) - 1)
                features[number] = hidden[i, end].double().cpu()
    finally:
        hook.remove()
    margins = dataset["margin"] if "margin" in dataset.column_names else [0.0] * len(pairs)
    return ProbeData(
        torch.stack([features[i] for i in range(len(numbers))]),
        torch.tensor(pairs),
        torch.tensor([float(m) for m in margins], dtype=torch.float64),
    )
