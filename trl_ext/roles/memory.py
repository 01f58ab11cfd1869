"""How many bytes each role holds, nothing counted twice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trl_ext.roles.sharding import own_part
from trl_ext.roles.switching import belongs_to


def storage_bytes(tensors: list[Tensor], counted: set[int]) -> int:
    """Bytes that this process holds of the storages of `tensors` that are not in `counted` (data pointers), which grows
    by them."""
    total = 0
    for tensor in tensors:
        storage = own_part(tensor).untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def memory_by_role(model: nn.Module, adapters: Mapping[Any, str | None], heads: nn.ModuleDict) -> dict[str, int]:
    """Bytes of unique storage of the base, of each role's own adapter, of each head, and of all together."""
    named = [*model.named_parameters(), *model.named_buffers()]
    holdings: dict[str, list[Tensor]] = {"base": []}
    for name, tensor in named:
        # What the value role shares with the policy counts as the policy's, which comes first.
        role = next((role for role, adapter in adapters.items() if belongs_to(name, adapter)), "base")
        holdings.setdefault(str(role), []).append(tensor)
        # A quantised weight keeps its scales beside it, outside named_parameters.
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            holdings[str(role)] += _quantisation_tensors(state)
    for head, module in heads.items():
        holdings[f"{head}_head"] = list(module.parameters())
    counted: set[int] = set()
    sizes = {holder: storage_bytes(tensors, counted) for holder, tensors in holdings.items()}
    return {**sizes, "total": sum(sizes.values())}


def _quantisation_tensors(state: Any) -> list[Tensor]:
    tensors = [state.absmax, state.code, state.offset]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
