"""The old place of `trl_ext.interop.RewardModule`."""

from trl_ext._moved import moved

__getattr__ = moved(__name__, {"RewardModule": "trl_ext.interop.RewardModule"})
