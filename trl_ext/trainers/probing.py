"""What a linear probe is fitted to: the frozen base's last hidden state at the end of every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn


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
    """The module `score` of a sequence classifier, wrapped by PEFT or not."""
    (head,) = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "score"]
    return head


@torch.no_grad()
def probe_data(model: Any, dataset: Dataset) -> ProbeData:
    """Read every answer once.

    Args:
        model: a sequence classifier with `score` on its last hidden states.
        dataset: rows of `chosen_ids`, `rejected_ids` and perhaps `margin`, as TRL's RewardTrainer keeps them.
    """
    numbers: dict[tuple[int, ...], int] = {}
    features: list[Tensor] = []
    pairs: list[list[int]] = []
    # What the head is given is what it can read, whatever the architecture does before it.
    hook = score_head(model).register_forward_pre_hook(lambda _, given: features.append(given[0][0, -1].double()))
    try:
        for row in dataset:
            pairs.append([])
            for ids in (tuple(row["chosen_ids"]), tuple(row["rejected_ids"])):
                if ids not in numbers:
                    numbers[ids] = len(numbers)
                    model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
                pairs[-1].append(numbers[ids])
    finally:
        hook.remove()
    margins = dataset["margin"] if "margin" in dataset.column_names else [0.0] * len(pairs)
    return ProbeData(
        torch.stack(features).cpu(), torch.tensor(pairs), torch.tensor([float(m) for m in margins], dtype=torch.float64)
    )
