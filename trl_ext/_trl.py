"""The one door to what TRL does not promise: every name that is not in `trl.__all__` is imported here, nowhere else.

It is not the door to methods: a subclass overrides those of Transformers' and TRL's trainers where it stands, and
`roles/` switches PEFT's layers by their own attributes. `tests/unit/test_borrowed.py` lists all of these by name.
"""

from importlib.metadata import version
from typing import Any

import torch

NEWEST = "1.16"  # the newest minor version of TRL that is tested

try:
    from trl.trainer.base_config import _BaseConfig as BaseConfig
    from trl.trainer.base_trainer import _BaseTrainer as BaseTrainer
except ImportError as error:
    if not (error.name or "").startswith("trl"):
        raise  # it is not TRL that lacks something
    raise ImportError(
        f"TRL {version('trl')} lacks a name that trl_ext needs ({error}): pip install 'trl=={NEWEST}.*', or a newer "
        "trl_ext."
    ) from error

__all__ = ["BaseConfig", "BaseTrainer", "train_in_float32"]


def train_in_float32(model: Any) -> None:
    """Take back that TRL holds adapters and head over a quantised base in bfloat16: what trains becomes float32."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
