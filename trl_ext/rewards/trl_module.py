"""The old path of `trl_ext.interop.RewardModule`, until 0.3."""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "RewardModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        "trl_ext.rewards.trl_module is removed in trl_ext 0.3: import RewardModule from trl_ext.interop.",
        FutureWarning,
        stacklevel=2,
    )
    from trl_ext.interop import RewardModule

    return RewardModule
