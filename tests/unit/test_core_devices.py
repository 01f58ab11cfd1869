"""What the maths makes, it makes where the data is: on the meta device a tensor of the CPU is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from trl_ext.core import batch_baseline, last_true, token_logprobs

X = torch.zeros(2, 3, device="meta")
MASK = torch.ones(2, 3, dtype=torch.bool, device="meta")
IDS = torch.zeros(2, dtype=torch.long, device="meta")

CALLS: dict[str, Callable[[], Any]] = {
    "last_true": lambda: last_true(MASK),
    "batch_baseline": lambda: batch_baseline(X[:, 0], MASK[:, 0], leave_one_out=True),
    "token_logprobs": lambda: token_logprobs(
        X.clone().requires_grad_(), torch.zeros(7, 3, device="meta"), IDS, softcap=1.0, entropy_grad=True
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_on_another_device(name: str) -> None:
    made = CALLS[name]()
    for tensor in made if isinstance(made, tuple) else (made,):
        assert tensor.device.type == "meta" and len(tensor) == 2
