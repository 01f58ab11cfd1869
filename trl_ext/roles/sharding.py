"""A base that FSDP2 (`fully_shard`) has shared out: each process keeps a part of every weight, and a layer is gathered
while it computes. Whoever needs all of a weight at another time asks here, in all processes at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether the module's parameters are shared out over processes."""
    return isinstance(module, FSDPModule)


def settle(module: nn.Module, *methods: str) -> None:
    """Leave a sharded module as an optimizer must find it, the parameters of its own in parts; and let each of its
    `methods` compute with whole ones, as its forward does. Nothing happens to any other module."""
    if isinstance(module, FSDPModule):
        module.reshard()  # once lazily initialised, the root keeps them whole until backward
        for name in methods:
            if name not in vars(module):
                register_fsdp_forward_method(module, name)


def whole(tensor: Tensor) -> Tensor:
    """All of a weight, gradient, moment or norm of which each process holds a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, as `like` is kept: this process's part of it, or all."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Whole tensors on the CPU, to be written to disk; None on processes that leave that to the main one."""
    made = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
    shared = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    return None if shared and torch.distributed.get_rank() > 0 else made
